"""The comparison of segmenters end to end on small networks: what is chosen, resuming, few-shot, each kind of row."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from file_tools import save
from seg_tools import CLASSES, DATA, QUICK, image_dice, load, masks_of, pooled_f1, predicted, read_rows, run, save_set
from stage_tools import one_thread  # noqa: F401
from stage_tools import (CONFIG, SPLITS, StopAfter, assert_a_signal_is_heeded, assert_same_run, assert_same_table,
                         checkpoint, command, equal, read_log, report_of, save_backbone, save_rows, spy)

import finetune_seg
import runtime
from networks import baselines
from training import segmenter

CPU = torch.device("cpu")
BASIC = (*DATA, "--ckpt", "a.pt", *QUICK)


@pytest.fixture
def folder(tmp_path):
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    return tmp_path


def arguments(folder, *flags):
    """As main() has them, of any current folder."""
    flags = [str(flag) for flag in (*BASIC, *flags)]
    args = finetune_seg.get_args([str(folder / flag) if flag in ("set", "split.csv") else flag for flag in flags])
    args.dtype = "float32"
    return args


# ---------------------------------------------------------------- one run

@pytest.mark.parametrize("dices, best", [((0.1, 0.9, 0.3), 4), ((0.5, 0.5, 0.4), 2), ((0.1, 0.2, 0.3), 5)])
def test_best_step_is_the_first_maximum_of_validation(folder, monkeypatch, dices, best):
    """Its weights are tested and saved, whatever came later; the last step is looked at, too."""
    values, states = iter(dices), []
    monkeypatch.setattr(segmenter, "validate",
                        lambda network, *_: states.append(runtime.cpu_copy(network.state_dict())) or next(values))
    spy(monkeypatch, finetune_seg, "score_network",
        lambda network, *_, result: states.append(runtime.cpu_copy(network.state_dict())))
    _, report = run(folder, *BASIC, "--iters", 5)
    number = dices.index(max(dices))
    assert report["chosen"] == {"a": [{"validation Dice": max(dices), "step": best}]}
    assert len(states) == 4 and equal(states[3], states[number])
    assert not equal(states[0], states[1])
    saved = checkpoint(folder / "seg" / "a-seed0.pt")
    assert equal({**saved["teacher"], **saved["head"]}, states[number])
    records = read_log(folder / "seg" / "a-seed0.jsonl")
    assert [record["step"] for record in records] == [2, 4, 5]
    assert [record["validation Dice"] for record in records] == list(dices)


def test_the_log_has_mean_losses(folder, monkeypatch):
    losses = []
    spy(monkeypatch, segmenter, "train_step", lambda *_, result: losses.append(result.item()))
    run(folder, *BASIC, "--iters", 5)
    records = read_log(folder / "seg" / "a-seed0.jsonl")
    expected = [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    np.testing.assert_allclose([record["loss"] for record in records], expected, rtol=1e-5)


def test_validation_is_scored_by_what_was_saved(folder):
    """The saved weights make the Dice that is told, on the validation images as they were squashed."""
    output, report = run(folder, *BASIC)
    network, saved = segmenter.open_segmenter(str(folder / "seg" / "a-seed0.pt"), CPU)
    data, *_ = finetune_seg.open_data(arguments(folder))
    logits = segmenter.predict_logits(network, data.images.at(16)[data.val], (0.3, 0.2), CPU, "float32")
    expected = pooled_f1(data.masks[data.val], logits.argmax(1).numpy())
    assert report["chosen"]["a"][0]["validation Dice"] == pytest.approx(expected, abs=1e-9)
    assert f"a, on validation: validation Dice {expected:.3f}, step" in output
    assert (saved["mean"], saved["std"], saved["img_size"]) == (0.3, 0.2, 16)
    assert saved["classes"] == ["background", *CLASSES]
    again = segmenter.predict_logits(network, data.images.at(16)[data.test], (0.3, 0.2), CPU, "float32")
    for i, own, mask in zip(data.test, again, predicted(folder, "a-seed0")):
        assert np.array_equal(segmenter.at_own_size(own, *data.truth(i).shape), mask)


def test_statistics_are_each_files_own_in_training_validation_and_test(folder, monkeypatch):
    save_backbone(folder / "b.pt", mean=0.6, std=0.1)
    used = []
    for name in ("augment_pair", "normalise_only"):
        spy(monkeypatch, segmenter, name, lambda images, *stats, result: used.append((len(images), stats[-2:])))
    run(folder, *DATA, "--ckpt", "a.pt", "b.pt", "none", *QUICK)
    assert [n for n, _ in used] == [5, 5, 4, 5, 5, 4, 6] * 3  # two batches and a validation, twice; the test
    for first, stats in ((0, (0.3, 0.2)), (7, (0.6, 0.1)), (14, (0.3, 0.2))):  # none: as the first file
        assert {own for _, own in used[first:first + 7]} == {stats}


def test_train_images_are_seen_with_their_masks_and_no_others(folder, monkeypatch):
    """Four steps of five are two epochs of the ten train images."""
    seen = []
    spy(monkeypatch, segmenter, "make_batch", lambda images, masks, *_, result: seen.extend(zip(images, masks)))
    run(folder, *BASIC)
    data, *_ = finetune_seg.open_data(arguments(folder))
    for i in data.train:
        image, mask = data.images.at(16)[i], data.masks[i]
        assert sum(np.array_equal(a, image) and np.array_equal(b, mask) for a, b in seen) == 2
    assert len(seen) == 20


def fine_tune(folder, name, received, *flags):
    """finetune_seg.fine_tune alone, as main() calls it."""
    args = arguments(folder, *flags)
    backbone, info = baselines.open_backbone(str(folder / "a.pt"), None, args.arch, 0, args.drop_path_rate)
    backbone.drop_path_uniform = False
    data, *_ = finetune_seg.open_data(args)
    return finetune_seg.fine_tune(backbone, info, data, args, 0, str(folder / f"{name}.pt"), str(folder / name), CPU, 0,
                                  1, received)


@pytest.mark.parametrize("stops", [(1,), (2, 1, 3), (3,), (4,), (5,), (6,), (7,)], ids=str)
def test_a_stopped_and_resumed_run_is_bit_equal(folder, stops, capsys):
    flags = ("--drop_path_rate", 0.5, "--iters", 7, "--val_every", 3)
    whole, best = fine_tune(folder, "whole", [], *flags)
    for steps in stops:
        assert fine_tune(folder, "cut", StopAfter(steps), *flags) is None
    resumed, resumed_best = fine_tune(folder, "cut", [], *flags)
    assert equal(whole, resumed) and best == resumed_best
    assert f"resuming {folder}/cut.pt at step {sum(stops)}" in capsys.readouterr().out
    log = assert_same_run(folder / "whole", folder / "cut")
    assert [record["step"] for record in log] == [3, 6, 7]
    for mask in (folder / "whole").rglob("*.png"):
        assert mask.read_bytes() == (folder / "cut" / mask.relative_to(folder / "whole")).read_bytes()


def test_drop_path_grows_from_block_to_block(folder, monkeypatch):
    drawn = []
    spy(monkeypatch, segmenter, "draw_drops", lambda *_, result: drawn.append([drop is None for drop in result[0]]))
    run(folder, *BASIC, "--drop_path_rate", 0.9)
    assert drawn == [[True, True, False, False]] * 4  # of two blocks with two branches the first has none


def test_drop_path_is_in_the_training(folder):
    some, none = (fine_tune(folder, f"rate{rate}", [], "--drop_path_rate", rate) for rate in (0.9, 0))
    a, b = (checkpoint(folder / f"rate{rate}.pt")["teacher"] for rate in (0.9, 0))
    assert not torch.equal(a["backbone.blocks.1.mlp.fc1.weight"], b["backbone.blocks.1.mlp.fc1.weight"])


def test_a_signal_ends_the_command_and_the_same_command_goes_on(folder):
    assert_a_signal_is_heeded(finetune_seg, folder, *BASIC)


def test_a_finished_run_is_not_trained_again(folder, monkeypatch):
    flags = (*DATA, "--ckpt", "a.pt", "none", *QUICK)
    first = run(folder, *flags)
    monkeypatch.setattr(segmenter, "train_step", None)  # cannot be called
    before = predicted(folder, "a-seed0")
    shutil.rmtree(folder / "seg" / "masks" / "a-seed0")  # predicted once more, with the best step's weights
    assert_same_table(first, run(folder, *flags))
    assert all(map(np.array_equal, predicted(folder, "a-seed0"), before)) and len(before) == 6
    assert_same_table(first, run(folder, *flags))


def test_a_finished_run_is_scored_again_where_scores_are_others(folder, monkeypatch):
    """Sizes of pixels or another tolerance change no weights, but every distance."""
    _, report = run(folder, *BASIC)
    monkeypatch.setattr(segmenter, "train_step", None)
    save_rows(folder / "mm.csv", [dict(image=row["image"], mm="0.5") for row in read_rows(folder, *SPLITS)])
    _, lengths = run(folder, *BASIC, "--pixel_sizes", "mm.csv", "--tolerance", 1)
    assert report["unit"] == "pixels" and lengths["unit"] == "mm"
    a, b = (own["models"]["a"]["scores"] for own in (report, lengths))
    assert b["HD95 [mm]"]["estimate"] == pytest.approx(a["HD95 [pixels]"]["estimate"] / 2)
    assert b["Dice"] == a["Dice"] and b["surface Dice"] == a["surface Dice"]  # 2 pixels are 1 mm
    _, wider = run(folder, *BASIC, "--pixel_sizes", "mm.csv", "--tolerance", 3)
    assert wider["models"]["a"]["scores"]["surface Dice"]["estimate"] > b["surface Dice"]["estimate"]


def test_other_settings_are_another_run(folder):
    run(folder, *BASIC)
    first = checkpoint(folder / "seg" / "a-seed0.pt")
    output, _ = run(folder, *BASIC, "--dice_weight", 3)
    assert "(other dice_weight)" in output
    assert not equal(first["head"], checkpoint(folder / "seg" / "a-seed0.pt")["head"])
    assert equal(first["head"], checkpoint(folder / "seg" / "a-seed0.old-1.pt")["head"])
    output, _ = run(folder, *BASIC, "--dice_weight", 3, "--eval_batch_size", 1, "--save_every", 2, "--latex", "t.tex")
    assert "(other" not in output


# ---------------------------------------------------------------- rows of the table

def test_seeds_are_runs_and_their_mean_is_scored(folder):
    output, report = run(folder, *DATA, "--ckpt", "ours=a.pt", "none", *QUICK, "--seeds", 2)
    truths = masks_of(folder)
    for name, file in (("ours", "ours"), ("from scratch", "from_scratch")):
        runs = [predicted(folder, f"{file}-seed{seed}") for seed in (0, 1)]
        assert report["models"][name]["runs"] == 2 and not all(map(np.array_equal, *runs))
        scores, each = report["models"][name]["scores"], report["models"][name]["per run"]
        for score, oracle in (("Dice", image_dice), ("pooled Dice", pooled_f1)):
            expected = [oracle(truths, masks) for masks in runs]
            assert each[score] == pytest.approx(expected, abs=1e-6)
            assert scores[score]["estimate"] == pytest.approx(np.mean(expected), abs=1e-6)
        own = report["models"][name]["per class"]["s%tripe"]
        alarms = [(mask == 2).any() for masks in runs for mask, truth in zip(masks, truths) if not (truth == 2).any()]
        assert own["images"] == 3 and own["false alarms"] == pytest.approx(np.mean(alarms))
    assert "ours: 2 runs, from scratch: 2 runs" in output
    starts = [checkpoint(folder / "seg" / f"from_scratch-seed{seed}.pt")["teacher"] for seed in (0, 1)]
    difference = starts[0]["backbone.pos_embed"] - starts[1]["backbone.pos_embed"]
    assert difference.abs().max() > 0.01  # initialisation is drawn anew, too


def test_files_of_one_name_are_pooled(folder):
    save_backbone(folder / "b.pt", seed=2)
    output, report = run(folder, *DATA, "--ckpt", "ours=a.pt,b.pt", "none", *QUICK)
    assert report["models"]["ours"]["runs"] == 2 and report["models"]["from scratch"]["runs"] == 1
    starts = {checkpoint(folder / "seg" / f"ours-{number}-seed{number}.pt")["identity"]["start"] for number in (0, 1)}
    assert len(starts) == 2 and "ours: 2 runs, from scratch: 1 run" in report["methods"]
    assert [file["path"] for file in report["files"]["ours"]] == ["a.pt", "b.pt"]
    assert sorted(path.name for path in (folder / "seg" / "masks").iterdir()) == [
        "from_scratch-seed0", "ours-0-seed0", "ours-1-seed1"]


@pytest.mark.parametrize("flags, words, decoder", [
    (("--frozen", "--decoder", "linear"), "a linear head on the last block, frozen backbone", {"classifier"}),
    (("--frozen",), "UPerNet on four blocks (group norm, 8 channels), frozen backbone", {"pyramid", "classifier"}),
    (("--decoder_norm", "none", "--img_size", 20), "UPerNet on four blocks (no norm, 8 channels), whole", {"fusion"}),
    (("--no-augment", "--img_size", 13), "augmentation off", {"laterals"})],
    ids=["linear, frozen", "frozen", "no norm", "odd size"])  # not of the sets: their order is of the process
def test_each_network_trains_and_opens_again(folder, flags, words, decoder):
    output, report = run(folder, *DATA, "--ckpt", "a.pt", *QUICK, *flags)
    network, saved = segmenter.open_segmenter(str(folder / "seg" / "a-seed0.pt"), CPU)
    assert words in output and words in report["methods"] and decoder <= {key.split(".")[1] for key in saved["head"]}
    start = checkpoint(folder / "a.pt")["teacher"]
    norms = any("norm" in key for key in saved["head"] if "pyramid" not in key)
    assert equal({key: saved["teacher"][key] for key in start}, start) == ("--frozen" in flags)
    assert norms == (not {"linear", "none"} & {*flags})
    assert len(predicted(folder, "a-seed0")) == 6 and saved["img_size"] == report["args"]["img_size"]
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 9, 24)).shape == (1, 3, 9, 24)


def test_a_network_from_scratch_has_one_rate_and_the_first_files_network(folder):
    run(folder, *DATA, "--ckpt", "a.pt", "none", *QUICK)
    first, scratch = (checkpoint(folder / "seg" / f"{name}-seed0.pt") for name in ("a", "from_scratch"))
    assert first["identity"]["layer_decay"] == 0.99 and scratch["identity"]["layer_decay"] == 1
    assert {key: scratch["config"][key] for key in CONFIG if key != "init_values"} == {
        key: value for key, value in CONFIG.items() if key != "init_values"}
    assert (scratch["mean"], scratch["std"]) == (0.3, 0.2)
    gammas = [value for key, value in scratch["teacher"].items() if key.endswith("gamma")]
    assert len(gammas) == 4 and all((value - 1).abs().max() < 0.01 for value in gammas)  # it began at 1, a.pt at 0.5
    assert first["identity"]["drop_path_rate"] == scratch["identity"]["drop_path_rate"] == 0.4
    assert scratch["seen"]["content"].numel() == 10 and first["seen"] is None  # a.pt does not tell what it has seen


def test_own_masks_are_given_as_others_are_taken(folder):
    _, first = run(folder, *BASIC)
    shutil.copytree(folder / "seg" / "masks" / "a-seed0", folder / "theirs")
    for row in read_rows(folder):
        shutil.copy(folder / "set" / row["image"].replace("images", "masks"), folder / "truth.png")
        save(folder / "perfect" / row["image"], load(folder / "truth.png"))
    output, second = run(folder, *BASIC, "--predictions", "again=theirs", "perfect", "both=theirs,perfect")
    assert list(second["models"]) == ["a", "again", "perfect", "both"]
    assert second["models"]["again"]["scores"] == first["models"]["a"]["scores"]
    assert second["differences"]["again"]["Dice"]["p"] == 1
    perfect, both = (second["models"][name] for name in ("perfect", "both"))
    assert all(perfect["scores"][name]["estimate"] == 1 for name in ("Dice", "IoU", "pooled Dice", "surface Dice"))
    assert perfect["scores"]["HD95 [pixels]"]["estimate"] == 0 and both["runs"] == 2
    mean = (1 + first["models"]["a"]["scores"]["Dice"]["estimate"]) / 2
    assert both["scores"]["Dice"]["estimate"] == pytest.approx(mean, abs=1e-6)
    assert "Given were the test masks of again, perfect, both. All models but these had the same" in second["methods"]
    assert "finetune_seg.json is of other arguments: kept as" in output
    assert (folder / "seg" / "finetune_seg.old-1.json").exists()


# ---------------------------------------------------------------- few-shot

def test_shots_are_runs_of_each_split_seed(folder, monkeypatch):
    """Few train images, drawn anew for each split seed, the same for every model; validation and test are whole."""
    seen = []
    spy(monkeypatch, segmenter, "batches", lambda groups, *_, result: seen.append(sorted(groups)))
    spy(monkeypatch, segmenter, "validate", lambda *given, result: seen.append(len(given[3])))
    flags = (*DATA, "--ckpt", "a.pt", "none", *QUICK, "--iters", 2, "--shots", 3, "--split_seed", 4, 1, 9, "--seeds", 2)
    output, report = run(folder, *flags)
    assert all(own == 4 for own in seen if isinstance(own, int)) and report["images"] == 6
    drawn = [own for own in seen if not isinstance(own, int)]
    assert len(drawn) == 12 and drawn[:6] == drawn[6:] and all(len(own) == 3 for own in drawn)
    assert drawn[0] == drawn[1] and len({str(own) for own in drawn}) == 3
    assert report["train"] == {"4": 3, "1": 3, "9": 3}
    assert {name: model["runs"] for name, model in report["models"].items()} == {"a": 6, "from scratch": 6}
    files = {f"{name}-split{split}-seed{seed}" for name in ("a", "from_scratch") for split in (4, 1, 9)
             for seed in (0, 1)}
    assert {path.name for path in (folder / "seg" / "masks").iterdir()} == files
    expected = [image_dice(masks_of(folder), predicted(folder, f"a-split{split}-seed{seed}")) for split in (4, 1, 9)
                for seed in (0, 1)]
    assert report["models"]["a"]["per run"]["Dice"] == pytest.approx(expected, abs=1e-6)
    assert "Of the train images 3 images were used, drawn by split seeds 4, 1, 9" in report["methods"]
    assert "split seed 9" in output and sum(row["split"] == "train" for row in read_rows(folder, "train")) == 10
    assert checkpoint(folder / "seg" / "from_scratch-split4-seed0.pt")["seen"]["content"].numel() == 3


def test_shots_by_group(folder, monkeypatch):
    sizes = []
    spy(monkeypatch, segmenter, "batches", lambda groups, *_, result: sizes.append((len(groups), len({*groups}))))
    _, report = run(folder, *BASIC, "--shots", 2, "--shots_by", "group", "--split_seed", 0, 1)
    assert sizes == [(4, 2)] * 2 and report["train"] == {"0": 4, "1": 4}
    assert "Of the train images 2 groups were used" in report["methods"]


# ---------------------------------------------------------------- parts, millimetres

def test_drawn_parts_are_given_back(folder, monkeypatch):
    """split.csv makes the same run again, without a draw: the finished one is found."""
    flags = ("--data", "set", *DATA[4:], "--ckpt", "a.pt", *QUICK)
    flags += ("--test_seed", 3)
    drawn, first = run(folder, *flags, "--group_regex", r"SECRET(\d+)_")
    monkeypatch.setattr(segmenter, "train_step", None)
    _, second = run(folder, *flags, "--split", "seg/split.csv")
    assert second["models"] == first["models"] and "no group is in two parts" in drawn
    with open(folder / "seg" / "split.csv") as file:
        parts = {row["image"]: row["split"] for row in csv.DictReader(file)}
    assert len(parts) == 20 and list(parts.values()).count("test") == first["images"]


def head(rng, shape=(60, 80)):
    """A bright ellipse: image, mask, its circumference in pixels."""
    a, b = rng.integers(15, 25, 2) + (5, 0)
    grid = np.mgrid[:shape[0], :shape[1]]
    mask = (((grid[1] - 39.5) / a) ** 2 + ((grid[0] - 29.5) / b) ** 2 <= 1).astype(np.uint8)
    angle = np.linspace(0, 2 * np.pi, 10_001)
    around = np.hypot(np.diff(a * np.cos(angle)), np.diff(b * np.sin(angle))).sum()
    return (rng.integers(0, 60, shape) + 150 * mask).astype(np.uint8), mask, around


def test_heads_are_measured_in_millimetres(tmp_path):
    """HC18 with filled masks beside the images; the circumferences measured are those of the drawn ellipses."""
    rng, rows = np.random.default_rng(0), []
    for i in range(15):
        image, mask, around = head(rng)
        mm = 0.1 + 0.01 * i
        save(tmp_path / "hc" / "training_set" / f"{i:03}_HC.png", image)
        save(tmp_path / "hc" / "training_set" / f"{i:03}_HC_Mask.png", 255 * mask)
        save(tmp_path / "perfect" / "training_set" / f"{i:03}_HC.png", mask)
        save(tmp_path / "empty" / "training_set" / f"{i:03}_HC.png", 0 * mask)
        rows.append({"filename": f"{i:03}_HC.png", "pixel size(mm)": f"{mm}",
                     "head circumference (mm)": f"{around * mm}"})
    save_rows(tmp_path / "hc" / "training_set_pixel_size_and_HC.csv", rows)
    save_backbone(tmp_path / "a.pt")
    output, report = run(tmp_path, "--data", "hc", "--ckpt", "a.pt", *QUICK, "--predictions", "perfect", "empty")
    measured = {row["filename"]: float(row["head circumference (mm)"]) for row in rows}
    with open(tmp_path / "seg" / "split.csv") as file:
        test = [row["image"].split("/")[-1] for row in csv.DictReader(file) if row["split"] == "test"]
    assert report["unit"] == "mm" and report["classes"] == ["background", "head"] and report["images"] == len(test) == 3
    scores = {name: model["scores"]["circumference error [mm]"]["estimate"] for name, model in report["models"].items()}
    assert scores["perfect"] < 0.005 * min(measured.values())
    assert scores["empty"] == pytest.approx(np.mean([measured[name] for name in test]), rel=1e-6)
    assert scores["perfect"] < scores["a"] < 3 * scores["empty"]
    assert report["models"]["empty"]["circumference [mm]"]["no ellipse"] == 3
    assert abs(report["models"]["perfect"]["circumference [mm]"]["bias"]["estimate"]) < 0.3
    for words in ("circumference error [mm]", "HD95 [mm]", "lower limit", "(by HC18's leading number)"):
        assert words in output + report["methods"], words


# ---------------------------------------------------------------- the command

@pytest.mark.slow
def test_two_processes_give_the_table_of_one(folder):
    """Without drop path and dropout, which are of a process's own; and once more from what is saved."""
    flags = (*DATA, "--ckpt", "a.pt", "none", *QUICK, "--drop_path_rate", 0, "--decoder", "linear")
    one, two = reports = [report_of(finetune_seg, folder, *flags, processes=processes) for processes in (1, 2)]
    assert one["models"].keys() == two["models"].keys()
    for name in one["models"]:
        for score in one["order"]:
            a, b = (report["models"][name]["scores"][score]["estimate"] for report in reports)
            assert a == pytest.approx(b, abs=1e-2 if score != "HD95 [pixels]" else 0.5)
    for row in read_rows(folder):
        a, b = (load(folder / str(number) / "masks" / "a-seed0" / row["image"]) for number in (1, 2))
        assert (a != b).mean() < 0.01
    shutil.rmtree(folder / "2" / "masks")
    assert report_of(finetune_seg, folder, *flags, processes=2)["models"] == two["models"]
    assert len(list((folder / "2" / "masks").rglob("*.png"))) == 12


@pytest.mark.slow
def test_without_flags_phantoms_are_learned(tmp_path):
    done = command(finetune_seg, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "phantom images: a smoke test of the code" in done.stdout and "from scratch" in done.stdout
    report = json.loads((tmp_path / "seg" / "finetune_seg.json").read_text())
    assert report["args"]["data"] is None and report["images"] > 100
    pooled = report["models"]["from scratch"]["scores"]["pooled Dice"]["estimate"]
    assert pooled > 0.3  # one class everywhere: below 0.1
