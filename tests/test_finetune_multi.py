"""One network for many tasks end to end on small ones: what is written, resuming, paradigms, seeds, leaks, learning."""


import re

import numpy as np
import pytest
import sklearn.metrics
import torch
from multi_tools import (BASIC, CLINICAL, DATA, NAMES, QUICK, assert_equal, few_replicates, names_in_test,  # noqa: F401
                         read_log, read_split, reports_of, run, save_all, save_tree)
from PIL import Image
from stage_tools import StopAfter, checkpoint, command, equal, one_thread, save_backbone, spy  # noqa: F401

import finetune_multi
import runtime
from frames import phantom
from frames.leakage import content_hash, perceptual_hash, salted
from labelled import augment, task_sets
from model import VisionTransformer
from networks.heads import open_network
from training import many_tasks

CPU = torch.device("cpu")
PARADIGMS = ("task", "clinical", "all")


@pytest.fixture
def folder(tmp_path):
    return save_all(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, output, reports, [(tasks of the network, task, x)] of every step) of a run of all paradigms, to be
    looked at only."""
    folder, steps = save_all(tmp_path_factory.mktemp("finished")), []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, many_tasks, "train_step", lambda network, _, optimizer, number, x, *more, result: steps.append(
            (tuple(task.name for task in network.tasks), network.tasks[number].name, x.clone())))
        output, reports = run(folder, *BASIC, "--paradigm", *PARADIGMS)
    return folder, output, reports, steps


# ---------------------------------------------------------------- what is said and written

def test_what_is_printed(finished):
    _, output, _, _ = finished
    lines = output.split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("fmc: "))
    assert lines[first] == ("fmc: 72 images of 36 groups (by group column); no image or group is in two parts")
    assert lines[first + 2].startswith("  fetal_head: segmentation, train 24, validation 12, test 12 images; mir")
    assert lines[first + 1].startswith("  FUGC: regression, ") and lines[first + 1].endswith("mirrored: no")
    for words in ("all: 4 tasks\na: a.pt (pretrain.py), seed 0\n", "step 8/16 | loss ", "| normalised ",
                  "clinical: test scores, mean of 1 run", "gain over task [95 %]", "all tasks: mean normalised score",
                  "a.pt: cannot tell whether test images were in the pretraining set",
                  "No test image was a copy or a look-alike of one in train or validation."):
        assert words in output, words
    assert "phantom" not in output


def test_what_is_written(finished):
    folder, _, reports, _ = finished
    networks = ["all", "clinical-OB", *(f"task-{name}" for name in NAMES)]
    assert {path.name for path in (folder / "multi").iterdir()} == {
        "split.csv", "paradigms.json", *(f"{name}.json" for name in PARADIGMS),
        *(f"{name}-seed0.{kind}" for name in networks for kind in ("pt", "jsonl")),
        *(f"gates-{name}.png" for name in networks)}
    for name in networks:
        with Image.open(folder / "multi" / f"gates-{name}.png") as picture:
            assert min(picture.size) > 20
    for name in PARADIGMS:
        report = reports[name]
        assert report["paradigm"] == name and not report["phantom"] and report["written_by"] == "finetune_multi.py"
        assert set(report["values"]) == set(report["scores"]["challenge"]) == set(NAMES)
        assert [len(runs) for runs in report["values"].values()] == [1] * 4
        m = len(report["values"]["fetal_head"][0]["Dice"])
        assert m == 12 and {*report["values"]["fetal_head"][0]} == {"DSC", "HD", "Dice", "HD95"}
    assert reports["paradigms"]["paradigms"] == list(PARADIGMS) and "sign-flip" in reports["paradigms"]["methods"]
    assert set(reports["paradigms"]["groups"]) == {"OB", "Thyroid"}
    assert any(value is None for row in reports["all"]["values"]["fetal_head"][0]["Dice"] for value in row)


def test_the_log(finished):
    folder, _, reports, _ = finished
    records = read_log(folder / "multi" / "all-seed0.jsonl")
    assert [record["step"] for record in records] == [8, 16]
    for record in records:
        for name in ("losses", "validation", "gates"):
            assert list(record[name]) == NAMES
        assert np.isfinite([*record["losses"].values(), *record["validation"].values(), record["normalised"]]).all()
        for shares in record["gates"].values():
            assert np.shape(shares) == (1, 2) and np.sum(shares) == pytest.approx(1)
    assert records[0]["lr"] > records[1]["lr"] > 0
    best = max(records, key=lambda record: record["normalised"])
    assert reports["all"]["chosen"]["all"] == [{"normalised": best["normalised"], "step": best["step"],
                                                "scores": best["validation"]}]


def test_losses_in_the_log_are_means_of_each_task(folder, monkeypatch):
    losses = []
    spy(monkeypatch, many_tasks, "train_step", lambda network, _, optimizer, number, *more, result: losses.append(
        (NAMES[number], result.item())))
    run(folder, *BASIC, "--iters", 3)
    for record, own in zip(read_log(folder / "multi" / "all-seed0.jsonl"), (losses[:8], losses[8:]), strict=True):
        for name in NAMES:
            expected = np.mean([loss for task, loss in own if task == name])
            assert record["losses"][name] == pytest.approx(expected, rel=1e-5)


def outputs_of(folder, name, part):
    """{task: (its TaskData, sizes, rows of the part, what the saved network says of their canvases)}."""
    network, saved = open_network(str(folder / "multi" / f"{name}-seed0.pt"), CPU)
    args = finetune_multi.get_args([str(flag) for flag in (*BASIC, "--data", folder / "fmc")])
    data = task_sets.open_data(args, clinical=True)
    for number, (task, own) in enumerate(zip(data.tasks, data.per)):
        rows = getattr(own, part)
        x = augment.normalise_only(torch.from_numpy(data.images.at(16)[own.images[rows]]), saved["mean"], saved["std"])
        with torch.no_grad():
            yield task, own, data.sizes[own.images[rows]], rows, network(x, number)[0]


def test_validation_is_scored_by_what_was_saved(finished):
    """The saved weights make the scores that are told; scikit-learn and loops over images say what these are."""
    folder, _, reports, _ = finished
    told = reports["all"]["chosen"]["all"][0]["scores"]
    for task, own, sizes, rows, output in outputs_of(folder, "all", "val"):
        if task.kind == "segmentation":
            masks, truths = output.argmax(1).numpy(), own.target[rows]
            assert {1, 2} <= set(np.unique(masks))
            expected = np.mean([np.mean([
                sklearn.metrics.f1_score((truth == k).ravel(), (mask == k).ravel())
                for truth, mask in zip(truths, masks) if (truth == k).any()]) for k in (1, 2)])
        elif task.kind == "classification":
            expected = sklearn.metrics.f1_score(own.target[rows], output.argmax(1), average="macro")
        elif task.kind == "detection":
            expected = np.mean([iou(truth, box * np.tile(size, 2)) for truth, box, size in
                                zip(own.truth[rows], boxes(output), sizes)])
        else:
            expected = np.mean([np.hypot(*(truth - point * size).T).mean() for truth, point, size in
                                zip(own.truth[rows], points(output), sizes)])
        assert told[task.name] == pytest.approx(expected, rel=1e-5), task.name


def points(maps):
    """Heat maps (B, K, h, w) -> mean places (B, K, 2) as shares, by loops."""
    heat = maps.double().flatten(2).softmax(2).view(maps.shape).numpy()
    y, x = (np.mgrid[:maps.shape[2], :maps.shape[3]] + 0.5) / np.reshape(maps.shape[2:], (2, 1, 1))
    return np.array([[[(own * x).sum(), (own * y).sum()] for own in image] for image in heat])


def boxes(maps):
    """(B, 5, rows, columns) -> boxes (B, 4) as shares, by loops."""
    found = np.zeros((len(maps), 4))
    for b, image in enumerate(maps.double()):
        weights, sides = image[4].flatten().softmax(0).view(image[4].shape).numpy(), image[:4].sigmoid().numpy()
        for (i, j), weight in np.ndenumerate(weights):
            y, x = (i + 0.5) / weights.shape[0], (j + 0.5) / weights.shape[1]
            left, top, right, bottom = sides[:, i, j]
            found[b] += weight * np.array([x * (1 - left), y * (1 - top), x + (1 - x) * right, y + (1 - y) * bottom])
    return found


def iou(a, b):
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = max(width, 0) * max(height, 0)
    return both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


@pytest.mark.parametrize("scores, best", [((0.1, 0.9, 0.3), 16), ((0.5, 0.5, 0.4), 8), ((-1, -0.9, -0.8), 20)])
def test_best_step_is_the_first_maximum_of_normalised_validation(folder, monkeypatch, scores, best):
    """Its weights are tested and saved, whatever came later; the last step is looked at, too."""
    given, states, tested = iter(scores), [], []

    def validate(network, *_):
        states.append(runtime.cpu_copy(network.state_dict()))
        return {"any": 0.0}, next(given), {}

    monkeypatch.setattr(many_tasks, "validate", validate)
    spy(monkeypatch, many_tasks, "test_values", lambda network, *_, result: tested.append(
        runtime.cpu_copy(network.state_dict())))
    _, reports = run(folder, *BASIC, "--iters", 5)
    own = states[scores.index(max(scores))]
    assert len(states) == 3 and len(tested) == 4 and all(equal(state, own) for state in tested)
    assert not equal(states[0], states[1]) and not equal(states[1], states[2])
    saved = checkpoint(folder / "multi" / "all-seed0.pt")
    assert equal({**saved["teacher"], **saved["head"]}, own)
    assert reports["all"]["chosen"]["all"] == [{"normalised": max(scores), "step": best, "scores": {"any": 0.0}}]


def test_phantoms(tmp_path, monkeypatch):
    monkeypatch.setattr(task_sets, "PHANTOM_IMAGES", 108)
    monkeypatch.setattr(task_sets, "PHANTOM_SIZE", 32)
    output, reports = run(tmp_path, "--img_size", 30, "--iters", 2, "--val_every", 1, "--batch_size", 4, "--paradigm",
                          "task", "all")
    names = ["phantom structures", "phantom planes", "phantom heart", "phantom femur"]
    assert set(reports) == {"task", "all", "paradigms"} and all(report["phantom"] for report in reports.values())
    assert finetune_multi.PHANTOMS in output and "The backbone starts from scratch." in output
    assert list(reports["all"]["values"]) == names and set(reports["paradigms"]["groups"]) == {"torso", "others"}
    saved = checkpoint(tmp_path / "multi" / "all-seed0.pt")
    assert saved["config"]["pos"] == "rope" and saved["img_size"] == 32 and saved["network_of"]["blocks"] == [2, 3]
    assert (tmp_path / "multi" / "task-phantom_heart-seed0.pt").exists()
    assert saved["identity"]["backbone_lr"] == saved["identity"]["lr"] and saved["seen"]["content"].numel() > 50


def test_some_phantom_tasks(tmp_path, monkeypatch):
    """Of images that none of them has, nothing is told."""
    monkeypatch.setattr(task_sets, "PHANTOM_IMAGES", 108)
    monkeypatch.setattr(task_sets, "PHANTOM_SIZE", 32)
    _, reports = run(tmp_path, "--img_size", 16, "--iters", 1, "--batch_size", 4, "--tasks", "phantom heart",
                     "phantom femur")
    assert list(reports["all"]["values"]) == ["phantom heart", "phantom femur"] and set(reports) == {"all", "paradigms"}
    assert 30 <= len(read_split(tmp_path / "multi")) <= 36
    args = finetune_multi.get_args(["--img_size", "32", "--tasks", "phantom heart", "phantom femur"])
    data = task_sets.open_data(args, clinical=False)
    images, groups, tasks = phantom.phantom_tasks(108, 32, task_sets.PHANTOM_SEED)
    for task, own in zip(data.tasks, data.per):
        rows = tasks[task.name][2]
        assert np.array_equal(data.images.at(32)[own.images], images[rows])
        assert [data.groups[i] for i in own.images] == groups[rows].astype(str).tolist()


# ---------------------------------------------------------------- paradigms, seeds, settings

def test_paradigms_are_task_lists_with_equal_budgets(finished):
    """Each paradigm has each task once, a clinical group of one task is that task's run; every task has 4 steps in
    each network, on the same batches in the same order, whoever is beside it."""
    _, output, reports, steps = finished
    groups = {name: [list(tasks) for tasks in dict.fromkeys(tasks for tasks, _, _ in steps) if set(tasks) <= set(every)]
              for name, every in CLINICAL.items()}
    assert groups["clinical-OB"] == [[name] for name in NAMES[:3]] + [NAMES[:3]] and groups["task-thyroid_nodule"] == [
        NAMES[3:]]
    for name, networks in zip(PARADIGMS, ({f"task-{name}": [name] for name in NAMES}, CLINICAL, {"all": NAMES})):
        assert list(reports[name]["chosen"]) == list(networks) == list(reports[name]["gates"])
        assert {key: list(gates) for key, gates in reports[name]["gates"].items()} == networks
    assert output.count("resuming ") == 1 and "resuming multi/task-thyroid_nodule-seed0.pt at step 4" in output
    assert_equal(reports["clinical"]["values"]["thyroid_nodule"], reports["task"]["values"]["thyroid_nodule"])
    assert len(steps) == (4 + 3 + 4) * 4
    for task in NAMES:
        seen = {tasks: [x for own, name, x in steps if (own, name) == (tasks, task)] for tasks, _, _ in steps
                if task in tasks}
        assert len(seen) == (3 if task != "thyroid_nodule" else 2)
        alone = seen[(task,)]
        assert len(alone) == 4 and not torch.equal(alone[0], alone[1])
        for tasks, batches in seen.items():
            assert len(batches) == 4 and all(map(torch.equal, batches, alone)), (task, tasks)


def test_the_table_joins_earlier_runs_of_the_folder(finished, folder):
    """One paradigm after the other gives what all at once give; another seed, or other images, are left out."""
    for name in PARADIGMS:
        output, reports = run(folder, *BASIC, "--paradigm", name)
    for key in ("tasks", "groups", "all tasks", "paradigms"):
        assert_equal(reports["paradigms"][key], finished[2]["paradigms"][key], key)
    tables = (text.split("gain over task")[1].split("\n\nOf fewer")[0] for text in (output, finished[1]))
    assert next(tables) == next(tables)
    run(folder, *BASIC, "--paradigm", "task", "--seed", 1)
    output, reports = run(folder, *BASIC, "--tasks", *NAMES[:2])
    assert "multi/task.json is of another images, seed, " in output
    assert "multi/clinical.json is of another images, " in output
    assert reports["paradigms"]["paradigms"] == ["all"]


def test_the_table_leaves_out_other_clinical_groups(folder):
    """The same tasks and recipe, but FUGC is in a group of its own now."""
    (folder / "groups.csv").write_text("task,group\n" + "".join(f"{name},OB\n" for name in NAMES[:3]) +
                                       "thyroid_nodule,Thyroid\n")
    flags = (*BASIC, "--iters", 1, "--groups", "groups.csv")
    run(folder, *flags, "--paradigm", "clinical")
    (folder / "groups.csv").write_text((folder / "groups.csv").read_text().replace("FUGC,OB", "FUGC,Cervix"))
    output, reports = run(folder, *flags)
    assert "multi/clinical.json is of another clinical grouping: left out of the table" in output
    assert reports["paradigms"]["paradigms"] == ["all"]


def test_seeds_are_runs_and_their_mean_is_scored(folder):
    flags = (*BASIC, "--iters", 2, "--paradigm", "task", "all", "--seeds", 2)
    output, reports = run(folder, *flags)
    assert "all: test scores, mean of 2 runs" in output
    for name in ("task", "all"):
        assert all(len(runs) == 2 and runs[0] != runs[1] for runs in reports[name]["values"].values())
        errors = [np.mean(run["error"]) for run in reports[name]["values"]["FUGC"]]
        assert reports[name]["scores"]["sound"]["FUGC"]["MRE"] == pytest.approx(np.mean(errors))
        about = reports["paradigms"]["tasks"]["FUGC"]["paradigms"][name]
        assert about["per run"] == pytest.approx(errors)
        assert about["score"]["estimate"] == pytest.approx(np.mean(errors))
        assert about["sd"] == pytest.approx(np.std(errors, ddof=1))
    task, together = (reports["paradigms"]["tasks"]["FUGC"]["paradigms"][name] for name in ("task", "all"))
    fewer = task["score"]["estimate"] - together["score"]["estimate"]  # pixels of error: a gain
    assert "gain" not in task and together["gain"]["estimate"] == pytest.approx(fewer) and f" {fewer:+.2f} [" in output
    assert len(list((folder / "multi").glob("*.pt"))) == 2 * (4 + 1)
    second = checkpoint(folder / "multi" / "all-seed1.pt")
    _, alone = run(folder, *BASIC, "--iters", 2, "--seed", 1, "--output_dir", "alone")
    assert equal(second["head"], checkpoint(folder / "alone" / "all-seed1.pt")["head"])
    assert_equal(alone["all"]["values"], {task: runs[1:] for task, runs in reports["all"]["values"].items()})


@pytest.mark.parametrize("flags, blocks, mixtures", [
    (("--experts", 1), [1], 0), (("--top_k", 1, "--experts", 3), [1], 1), (("--moe_blocks", 1, 0, 1), [0, 1], 2),
    (("--no-augment", "--img_size", 25), [1], 1)], ids=["dense", "top 1", "all blocks", "not augmented"])
def test_each_network_trains_and_opens_again(folder, flags, blocks, mixtures):
    output, reports = run(folder, *BASIC, "--iters", 1, *flags)
    network, saved = open_network(str(folder / "multi" / "all-seed0.pt"), CPU)
    assert sum(hasattr(block.mlp, "gate") for block in network.backbone.blocks) == mixtures
    assert saved["network_of"]["blocks"] == blocks and saved["img_size"] == (24 if "--img_size" in flags else 16)
    assert saved["seen"] is None and (saved["mean"], saved["std"]) == (0.3, 0.2)  # a.pt does not tell what it has seen
    start, moved = checkpoint(folder / "a.pt")["teacher"], {"backbone.pos_embed", "backbone.blocks.0.attn.qkv.weight"}
    assert not any(torch.equal(start[key], saved["teacher"][key]) for key in moved)
    assert bool(reports["all"]["gates"]["all"]) == bool(mixtures) == (folder / "multi" / "gates-all.png").exists()


# ---------------------------------------------------------------- parts

@pytest.mark.parametrize("grouped", [True, False])
def test_no_image_and_no_group_is_in_two_parts(tmp_path, grouped):
    """By column, or by a pattern; whatever task an image serves."""
    save_tree(tmp_path / "fmc", grouped=grouped)
    save_backbone(tmp_path / "a.pt")
    pattern = () if grouped else ("--group_regex", r"case (\d+) ")
    output, _ = run(tmp_path, *BASIC, "--iters", 1, *pattern)
    rows = read_split(tmp_path / "multi")
    assert len(rows) == len({row["image"] for row in rows}) == 72 and {row["split"] for row in rows} == {"train", "val",
                                                                                                       "test"}
    for who in (lambda row: row["group"], lambda row: row["image"].split(" (view")[0]):
        parts = {}
        for row in rows:
            assert parts.setdefault(who(row), row["split"]) == row["split"]
        assert len(parts) == 36
    assert ("(by group column)" if grouped else r"(by --group_regex case (\d+) )") in output


def test_what_pretraining_has_seen_is_told(folder):
    """A third of the test images, and what is remembered of them for the next."""
    run(folder, *BASIC, "--iters", 1, "--output_dir", "first")
    paths = [folder / "fmc" / name for name in sorted(names_in_test(folder / "first"))]
    greys = [np.asarray(Image.open(path)) for path in paths[::3]]
    seen = {"content": torch.from_numpy(np.array([content_hash(grey) for grey in greys], np.uint64)),
            "looks": torch.from_numpy(np.array([perceptual_hash(grey) for grey in greys], np.uint64))}
    save_backbone(folder / "b.pt", seen=seen)
    output, _ = run(folder, *DATA, "--ckpt", "b.pt", *QUICK, "--iters", 1)
    assert f"b.pt: transductive: {len(greys)} of {len(paths)} test images were in the pretraining set" in output
    saved = checkpoint(folder / "multi" / "all-seed0.pt")["seen"]["content"].numpy()
    assert len(saved) == len(greys) + sum(row["split"] == "train" for row in read_split(folder / "multi"))
    assert set(seen["content"].numpy().tolist()) <= set(saved.tolist())


def test_patients_that_pretraining_has_seen_are_told(folder):
    """By other frames: no image of them is known. In the JSON files and the methods text, too."""
    salt = bytes(16)
    run(folder, *BASIC, "--iters", 1, "--output_dir", "first")
    tested = [row["group"] for row in read_split(folder / "first") if row["split"] == "test"]
    known = sorted({*tested})[::2]
    digests = torch.from_numpy(np.array([salted(name, salt) for name in known], np.uint64))
    save_backbone(folder / "b.pt", seen={"content": torch.zeros(1, dtype=torch.uint64), "salt": salt,
                                         "group_digests": digests})
    output, reports = run(folder, *DATA, "--ckpt", "b.pt", *QUICK, "--iters", 1)
    n = sum(name in known for name in tested)
    told = f"transductive: {n} of {len(tested)} test images were in the pretraining set"
    assert 0 < n < len(tested) and f"b.pt: {told}" in output and told in reports["paradigms"]["methods"]
    for report in reports.values():
        backbone, = report["files"]["backbone"]
        assert backbone["in pretraining set"]["pretraining_group"] == n and told in backbone["pretraining set"]
        assert len(backbone["sha256"]) == 64 and report["copies"]["sentence"] in output


def test_what_pretraining_left_in_the_folder_is_where_it_starts(folder):
    (folder / "a.pt").rename(folder / "last.pt")
    output, _ = run(folder, *DATA, *QUICK, "--iters", 1)
    assert "all: 4 tasks\nlast: last.pt (pretrain.py), seed 0\n" in output
    assert checkpoint(folder / "multi" / "all-seed0.pt")["identity"]["start"] is not None


# ---------------------------------------------------------------- learning

def test_eight_images_of_each_task_are_learned():
    """By one network, in 40 rounds: each task's loss falls to a small share of its first."""
    args = finetune_multi.get_args(["--no-augment", "--img_size", "32", "--lr", "3e-3"])
    args.dtype, args.backbone_lr = "float32", args.lr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_sets, "PHANTOM_IMAGES", 108)
        patch.setattr(task_sets, "PHANTOM_SIZE", 32)
        data = task_sets.open_data(args, clinical=False)
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=32, patch_size=8, in_chans=1, embed_dim=48, depth=4, num_heads=2, pos="rope",
                                 mask_k_bias=True, init_values=1.0, num_register_tokens=1)
    how = dict(experts=2, blocks=[2, 3], top_k=None, task_dim=16, channels=32)
    shares = [task_sets.class_shares(*both) for both in zip(data.tasks, data.per)]
    network, gradients, optimizer = many_tasks.build(backbone, data.tasks, shares, how, 0, CPU)
    losses, canvases = [], data.images.at(32)
    for turn in range(40):
        for number, (task, own) in enumerate(zip(data.tasks, data.per)):
            x, target = task_sets.make_batch(task, own, canvases, np.arange(8), slice(0, 8), 0, turn, 8, args,
                                              (0.2, 0.2), CPU)
            losses.append(many_tasks.train_step(network, gradients, optimizer, number, x, target, 8, 1.0, args).item())
    rounds = np.reshape(losses, (40, 4))
    share = rounds[-5:].mean(0) / rounds[0]
    assert (share < [0.25, 0.1, 0.4, 0.2]).all(), share


# ---------------------------------------------------------------- the command

@pytest.mark.slow
def test_two_processes_give_the_run_of_one(folder):
    """To rounding; and from where one process was stopped, two go on."""
    flags = (*BASIC, "--paradigm", "task", "all")
    run(folder, *BASIC, "--output_dir", "2", received=StopAfter(5))
    for processes in (1, 2):
        done = command(finetune_multi, folder, *flags, "--output_dir", processes, processes=processes)
        assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.split("\n") if "resuming" in line] == ["resuming 2/all-seed0.pt at step 5"]
    one, two = (reports_of(folder / name) for name in ("1", "2"))
    for name in ("task", "all"):
        for key in ("values", "scores", "chosen", "gates"):
            assert_equal(one[name][key], two[name][key], f"{name} {key}", rel=2e-3)
    for path in (folder / "1").glob("*.pt"):
        a, b = (checkpoint(folder / name / path.name) for name in ("1", "2"))
        for key, value in {**a["teacher"], **a["head"]}.items():
            assert (value - {**b["teacher"], **b["head"]}[key]).abs().max() < 1e-3, (path, key)
    again = command(finetune_multi, folder, *flags, "--output_dir", 2, processes=2)
    assert again.returncode == 0 and again.stdout.count("resuming ") == 5
    assert_equal(reports_of(folder / "2")["all"]["values"], two["all"]["values"])


@pytest.mark.slow
def test_without_flags_phantoms_are_learned(tmp_path):
    done = command(finetune_multi, tmp_path)
    assert done.returncode == 0, done.stderr
    reports = reports_of(tmp_path / "multi")
    assert finetune_multi.PHANTOMS in done.stdout and set(reports) == {"all", "paradigms"}
    for name in ("phantom structures", "phantom planes", "phantom heart", "phantom femur"):
        assert f"\n  {name}: " in done.stdout
        normalised = reports["paradigms"]["tasks"][name]["paradigms"]["all"]["normalised"]["estimate"]
        assert normalised > (0 if name == "phantom structures" else 0.1), name  # 0: the predictor that never looks
    assert re.search(r"step 800/800 \| .* \| \d+ s\n", done.stdout)
