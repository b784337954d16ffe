"""Scores of several models on the same episodes, fine-tuning on them, and every error sentence."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from file_tools import load_grey
from PIL import Image

import fewshot
import finetune_cls
import runtime
from frames import phantom
from frames.leakage import content_hash, perceptual_hash
from labelled.labels import read_labelled
from model import VisionTransformer
from scores import metrics, stats

CPU = torch.device("cpu")
CONFIG = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=2, init_values=0.5)


def counts_of(labels, groups):
    confusion = metrics.group_confusion(labels, labels, groups, labels.max() + 1, groups.max() + 1)
    return confusion.diagonal(axis1=1, axis2=2)  # (G, K)


# ---------------------------------------------------------------- scores

def evaluate(features, labels, groups, shots=2, **more):
    """Scores of {row: features (n, d) or a list of them, a file each}."""
    args = argparse.Namespace(**{**dict(seed=0, episodes=20, C=1.0, finetune_episodes=10,
                                        classifiers=["nearest_mean", "knn", "logreg"]), **more})
    rows = {name: [(x[:, None], None) for x in (own if isinstance(own, list) else [own])]
            for name, own in features.items()}
    return fewshot.evaluate(rows, {}, labels, groups, counts_of(labels, groups), shots, args, CPU)


def test_separable_features_score_one_and_noise_scores_chance():
    groups = np.arange(600) // 3
    labels = groups % 3
    separable = torch.eye(3)[labels] + 0.01 * torch.randn(600, 3)
    noise = torch.randn(600, 8)
    results = evaluate({"pretrained": separable, "random init": noise, "pixels": noise}, labels, groups)
    rows = {(name, column): replicates for name, _, cells in fewshot.lines_of(results)
            for column, replicates in cells.items()}
    for classifier in ("nearest mean", "k-NN", "logreg"):
        for score in (0, 1):
            assert stats.interval(results["pretrained", classifier][score]) == (1, 1, 1)
        _, low, high = stats.interval(results["random init", classifier][0])
        assert low < 1 / 3 < high and high - low < 0.1
        difference = rows["pretrained - random init", classifier][0]
        assert difference[0] == 1 - results["random init", classifier][0, 0]
        assert (rows["pretrained - pixels", classifier] == rows["pretrained - random init", classifier]).all()


def test_scores_do_not_see_the_support():
    """Features that name the group and nothing else are worthless, however well they fit the support."""
    groups = np.arange(120) // 4
    labels = groups % 3
    results = evaluate({"group": torch.eye(30)[groups], "none": torch.ones(120, 2)}, labels, groups)
    assert results["group", "k-NN"][0, 0] == pytest.approx(1 / 3, abs=0.02)


def test_several_files_score_as_their_mean_on_the_same_episodes():
    labels, groups = np.arange(90) % 3, np.arange(90)
    a, b = (torch.eye(3)[labels] + spread * torch.randn(90, 3) for spread in (0.3, 1.5))
    words = ["nearest_mean", "logreg", "linear"]
    both = evaluate({"two": [a, b], "a": a, "b": b}, labels, groups, episodes=5, classifiers=words)
    for column in ("nearest mean", "logreg", "linear probe"):
        np.testing.assert_allclose(both["two", column], (both["a", column] + both["b", column]) / 2, atol=1e-12)
    assert both["a", "logreg"][1, 0] > both["b", "logreg"][1, 0] + 0.1


def test_table_is_narrow_and_records_are_complete():
    labels, groups = np.arange(60) % 3, np.arange(60)
    features = {name: torch.randn(60, 4) for name in ("pretrained", "random init", "pixels")}
    results = evaluate(features, labels, groups)
    lines = fewshot.table(results, 5, 1 / 3)
    assert max(map(len, lines)) <= 120
    assert sum("pretrained - " in line for line in lines) == 4 and "chance 0.333" in lines[1]
    estimate, low, high = stats.interval(results["pixels", "logreg"][0])
    row = next(line for line in lines if line.strip().startswith("pixels"))
    assert row.endswith(f"{estimate:.3f} [{low:.3f}, {high:.3f}]")
    assert len(list(fewshot.records(results, 5))) == 5 * 3 * 2


def test_a_table_of_five_classifiers_has_two_blocks_and_no_cell_for_what_was_not_scored():
    half = np.tile(np.linspace(0.4, 0.6, 11), (2, 1))
    results = {(name, column): half for name in ("a" * 90, "b - c", "pixels") for column in fewshot.CLASSIFIERS.values()
               if (name, column) != ("pixels", "fine-tuned")}
    lines = fewshot.table(results, 100, 0.5)
    assert max(map(len, lines)) <= 120 and sum("chance" in line for line in lines) == 2
    wide, narrow = lines[:len(lines) // 2], lines[len(lines) // 2:]
    assert "logreg" in wide[1] and "fine-tuned" not in wide[1] and narrow[1].split("(")[1].split()[2:] == [
        "linear", "probe", "fine-tuned"]
    assert narrow[4].split() == ["pixels", "0.400", "[0.425,", "0.596]", "-"]
    assert wide[3].split()[:4] == ["b", "-", "c", "0.400"], "a name is no difference"
    assert len(list(fewshot.records(results, 5))) == 2 * (14 + 9)


@pytest.mark.parametrize("level, outside, images, verdict", [
    (0.5, 20, 40, "not shown"), (0.5, 19, 40, "cannot be tested"), (0.5, 0, 40, "cannot be tested"),
    (0.5, 9, 9, "cannot be tested"), (0.5, 10, 10, "not shown"), (0.62, 40, 40, "told"), (0.62, 10, 40, "told"),
    (0.62, 9, 9, "cannot be tested"), (0.57, 40, 40, "not shown")])  # 0.57: told, if it were the only row
def test_whether_the_outside_tells(level, outside, images, verdict):
    noise = 0.03 * np.random.default_rng(0).normal(size=2001)
    noise[0] = 0
    results = {(shots, name, "k-NN"): np.stack([value + noise, noise]) for shots, name, value in
               [(1, "ours", 0.49), (5, "ours", level), (5, "pixels", 0.48)]}
    sentence, found = fewshot.what_tells(results, 0.5, np.arange(images) < outside)
    assert found["verdict"] == verdict and found["images_with_outside"] == outside and "told" not in found
    assert (found["shots"], found["features"], found["estimate"]) == (5, "ours", level)
    low, high = np.percentile(results[5, "ours", "k-NN"][0][1:], [100 * 0.05 / 6, 100 - 100 * 0.05 / 6])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-12)
    assert {"told": "the label is told: balanced accuracy", "not shown": f"up to {high:.3f} is not ruled out",
            "cannot be tested": f"cannot be tested: {outside} of {images} images have any"}[verdict] in sentence
    assert ("label is told" in sentence) == (verdict == "told") and "\n" not in sentence


def test_the_row_that_tells_need_not_be_the_largest():
    wide, narrow = 0.2 * np.random.default_rng(0).normal(size=2001), np.zeros(2001)
    results = {(5, "ours", "k-NN"): np.stack([0.7 + wide] * 2), (1, "pixels", "logreg"): np.stack([0.6 + narrow] * 2)}
    results[5, "ours", "k-NN"][0, 0] = 0.7
    sentence, found = fewshot.what_tells(results, 0.5, np.ones(30, bool))
    assert (found["verdict"], found["features"], found["low"]) == ("told", "pixels", pytest.approx(0.6))
    assert "(pixels, logreg, 1 shot;" in sentence
    constant = {key: np.full((2, 5), 1 / 3 + 1e-9) for key in results}  # one class for all: chance but for rounding
    assert fewshot.what_tells(constant, 1 / 3, np.ones(30, bool))[1]["verdict"] == "not shown"


# ---------------------------------------------------------------- fine-tuning

FLAGS = ["--finetune_steps", "20", "--lr", "1e-2", "--layer_decay", "0.9", "--batch_size", "7"]


def tuning_set():
    """Canvases of two classes, dark or bright, that no frozen network is needed to tell; labels, groups, a File."""
    labels = np.arange(24) % 2
    noise = np.random.default_rng(0).integers(0, 60, (24, 16, 16))
    torch.manual_seed(2)
    file = fewshot.File("last.pt", VisionTransformer(**CONFIG).eval(), {"mean": 0.5, "std": 0.3, "digest": "a" * 64,
                                                                       "path": "last.pt"}, 16)
    return (noise + 180 * labels[:, None, None]).astype(np.uint8), labels, np.arange(24), file


def test_fine_tuning_learns_and_starts_anew_in_every_episode():
    canvases, labels, groups, file = tuning_set()
    args, before = fewshot.get_args(FLAGS), runtime.cpu_copy(file.backbone.state_dict())
    episodes = [fewshot.draw_episode(labels, groups, counts_of(labels, groups), 4, 0, i) for i in range(2)]

    def tune(i):
        return fewshot.fine_tuned(file, canvases, labels, groups, *episodes[i], 100 + i, args, CPU)

    first, second = tune(0), tune(1)
    for (_, query), predictions in zip(episodes, (first, second)):
        assert (predictions[~query] == -1).all() and (predictions[query] == labels[query]).all()
    assert all(torch.equal(value, before[key]) for key, value in file.backbone.state_dict().items())


def test_episodes_in_any_order_give_the_same(monkeypatch):
    """The very same loss after the last step, in whatever order, and another one with another seed."""
    canvases, labels, groups, file = tuning_set()
    args, losses, step = fewshot.get_args([*FLAGS, "--finetune_steps", "3"]), [], fewshot.classifier.train_step
    monkeypatch.setattr(fewshot.classifier, "train_step", lambda *given: losses.append(step(*given)) or losses[-1])
    episodes = [fewshot.draw_episode(labels, groups, counts_of(labels, groups), 4, 0, i) for i in range(2)]
    for i, seed in ((0, 5), (1, 6), (1, 6), (0, 5), (0, 6)):
        fewshot.fine_tuned(file, canvases, labels, groups, *episodes[i], seed, args, CPU)
    a, b, b2, a2, c = torch.stack(losses).view(5, 3).tolist()
    assert a == a2 and b == b2 and a != b and a != c


def test_all_models_have_the_same_budget_and_batches(monkeypatch):
    """Steps, batches, rates: of files and random networks alike, but random ones have no layer decay."""
    canvases, labels, groups, file = tuning_set()
    random = file._replace(path=None, info={**file.info, "digest": None, "path": "none"})
    args = fewshot.get_args([*FLAGS, "--classifiers", "finetune", "--episodes", "3", "--finetune_episodes", "2",
                             "--finetune_steps", "4"])
    seen, step = {}, fewshot.classifier.train_step
    seeds, build = [], fewshot.classifier.build
    monkeypatch.setattr(fewshot.classifier, "build", lambda *given: seeds.append(given[2]) or build(*given))

    def record(network, gradients, optimizer, x, targets, batch, lr, recipe):
        rates = sorted({group["lr_multiplier"] for group in optimizer.param_groups})
        seen.setdefault(tuple(rates), []).append((x.clone(), targets.clone(), batch, lr))
        return step(network, gradients, optimizer, x, targets, batch, lr, recipe)

    monkeypatch.setattr(fewshot.classifier, "train_step", record)
    vectors = torch.randn(24, 1, 3)
    rows = {"pretrained": [(vectors, file)], "random init": [(vectors, random)], "pixels": [(vectors, None)]}
    results = fewshot.evaluate(rows, {16: canvases}, labels, groups, counts_of(labels, groups), 3, args, CPU)
    assert set(results) == {("pretrained", "fine-tuned"), ("random init", "fine-tuned")}
    (decayed, ours), (flat, scratch) = sorted(seen.items(), key=lambda item: len(item[0]), reverse=True)
    assert len(ours) == len(scratch) == 2 * 4 and max(flat) == 1 and len(decayed) > len(flat)
    for (x, targets, batch, lr), (x2, targets2, batch2, lr2) in zip(ours, scratch):
        assert torch.equal(x, x2) and torch.equal(targets, targets2) and batch == batch2 == 6 and lr == lr2
    assert [lr for *_, lr in ours[:4]] == runtime.cosine_schedule(1e-2, 0, 4).tolist()
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1] and not torch.equal(ours[0][0], ours[4][0])


def test_the_recipe_is_that_of_finetune_cls():
    theirs, ours = vars(finetune_cls.get_args(["--data", "x"])), fewshot.get_args([])
    assert fewshot.RECIPE == {key: theirs[key] for key in fewshot.RECIPE}
    assert (ours.lr, ours.layer_decay) == (theirs["lr"], theirs["layer_decay"])


# ---------------------------------------------------------------- which rows there are

@pytest.mark.parametrize("flags, names", [
    ([], ["pretrained", "random init"]), (["--ckpt", "x.pt"], ["pretrained", "random init"]),
    (["--ckpt", "x.pt", "none"], ["pretrained", "random init"]), (["--ckpt", "none"], ["random init"]),
    (["--ckpt", "ours=x.pt"], ["ours", "random init"]), (["--ckpt", "none", "x.pt"], ["random init", "pretrained"]),
    (["--ckpt", "x=x"], ["x", "random init"]),
    (["--ckpt", "runs/seed0/last.pt", "none"], ["pretrained", "random init"]),
    (["--ckpt", "x.pt", "y/last.pt"], ["x", "y", "random init"]),
    (["--ckpt", "x.pt", "y=y.pt"], ["x", "y", "random init"]),
    (["--ckpt", "x.pt", "scratch=none,none", "--features", "theirs=z.npz"], ["pretrained", "scratch"])])
def test_rows(flags, names):
    models, foreign = fewshot.list_rows(fewshot.get_args(flags))
    assert [model.name for model in models] == names
    assert foreign == ([("theirs", "z.npz")] if "--features" in flags else [])


def test_random_networks_of_one_row_differ():
    models, _ = fewshot.list_rows(fewshot.get_args(["--ckpt", "none=none,none"]))
    like = {"config": CONFIG, "mean": 0.3, "std": 0.2}
    a, b = fewshot.open_files(models, like, 20, seed=0)["none"]
    assert not torch.equal(a.backbone.cls_token, b.backbone.cls_token) and a.size == b.size == 16


# ---------------------------------------------------------------- the command

def seen_images(images, **more):
    return {"content": torch.from_numpy(np.array([content_hash(image) for image in images], np.uint64)),
            "looks": torch.from_numpy(np.array([perceptual_hash(image) for image in images])), **more}


def save_backbone(path, **changes):
    torch.manual_seed(1)
    state = {f"backbone.{key}": value for key, value in VisionTransformer(**CONFIG).state_dict().items()}
    checkpoint = {"teacher": state, "config": CONFIG, "mean": 0.3, "std": 0.2, "step": 12,
                  "seen": seen_images([np.zeros((8, 8), np.uint8)])}
    runtime.save_checkpoint(path, {**checkpoint, **changes})


def save_images(folder, classes=("brain", "femur"), patients=4, images=2):
    """CLASS/PATIENT/IMAGE.png, each patient of one class; brighter in later classes."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        for patient in range(patients):
            parent = folder / name / f"p{i}{patient}"
            parent.mkdir(parents=True)
            for image in range(images):
                pixels = rng.integers(0, 60, (20, 24), dtype=np.uint8) + np.uint8(80 * i)
                Image.fromarray(pixels).save(parent / f"{image}.png")
    return folder


def run(folder, *flags):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    env["OMP_NUM_THREADS"] = "1"  # two threads on busy cores wait for each other
    script = pathlib.Path(fewshot.__file__).resolve()
    command = [sys.executable, script, *map(str, flags)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def score(folder, monkeypatch, capsys, *flags):
    """main() in a folder, in this process: what it prints and writes."""
    monkeypatch.chdir(folder)
    fewshot.main(fewshot.get_args([str(flag) for flag in flags]))
    return capsys.readouterr().out, json.loads((folder / "fewshot.json").read_text())


def test_the_documented_command(tmp_path):
    save_backbone(tmp_path / "last.pt", seen=seen_images(phantom.phantom_images(1200, seed=0)[0]))
    done = run(tmp_path, "--ckpt", "last.pt", "--shots", "5")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith("none of the 1,200 test images") and "a smoke test" in done.stdout
    assert "1 shot:" not in done.stdout and "5 shots:" in done.stdout

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((tmp_path / "fewshot.json").read_text(), parse_constant=refuse)
    assert report["args"]["shots"] == [5] and report["checkpoint"]["step"] == 12 and report["test_set"]["phantom"]
    assert len(report["results"]) == 30 and report["test_set"]["in_pretraining_set"]["seen"] == 0
    features = {record["features"] for record in report["results"]}
    assert features == {"pretrained", "random init", "pixels", "pretrained - random init", "pretrained - pixels"}
    assert sorted(os.listdir(tmp_path)) == ["fewshot.json", "last.pt"], "phantoms are not cached, one point is no curve"


def test_a_folder_twice_gives_the_same_numbers_and_says_what_was_seen_before(tmp_path, monkeypatch, capsys):
    folder = save_images(tmp_path / "set")
    first = load_grey(folder / "brain" / "p00" / "0.png")
    save_backbone(tmp_path / "last.pt", seen=seen_images([first]))
    flags = ("--data", folder, "--shots", 1, 2, "--episodes", 5, "--C", "support")
    out, report = score(tmp_path, monkeypatch, capsys, *flags)
    # the second overwrites the first's fewshot.json, and reads its features
    assert score(tmp_path, monkeypatch, capsys, *flags) == (out, report) and len(os.listdir(tmp_path / "features")) == 1
    assert out.startswith("transductive: 1 of 16 test images")
    assert "16 images, 2 classes, 8 groups by parent folder, 5 episodes" in out
    assert "smoke test" not in out and "p00" not in out
    bright = next(line for line in out.split("\n") if line.strip().startswith("pixels"))
    assert "1.000 [1.000, 1.000]" in bright
    for name in ("nearest_mean", "k-NN", "logreg"):
        with Image.open(tmp_path / f"fewshot-{name}.png") as picture:
            assert picture.size[0] > 1000


def test_several_models_with_one_by_its_vectors(tmp_path, monkeypatch, capsys):
    """Vectors written from a checkpoint score as it does; files of a row are averaged; a split is a smaller pool."""
    folder = save_images(tmp_path / "set")
    found = read_labelled(str(folder))
    rows = "".join(f"set/{name},{label},{group},{('train', 'test')[int(group[-1]) % 2]}\n"
                   for name, label, group in zip(found.names, found.labels, found.groups))
    (tmp_path / "a.csv").write_text("image,label,group,split\n" + rows)
    save_backbone(tmp_path / "last.pt")
    save_backbone(tmp_path / "late.pt", step=13, seen=None)
    backbone, info = fewshot.open_backbone(str(tmp_path / "last.pt"), None, None, 0)
    canvases = fewshot.Images(16, lambda i: fewshot.read_image(found.paths[i])).at(16)
    vectors = fewshot.few_shot_vector(fewshot.cached_features(backbone, info, canvases, 4, CPU, None))
    np.savez(tmp_path / "x.npz", name=["set/" + name for name in found.names], vector=vectors)
    flags = ("--data", tmp_path / "a.csv", "--ckpt", "ours=last.pt", "both=last.pt,late.pt", "--features",
             "theirs=x.npz", "--shots", 2, "--episodes", 4, "--classifiers", "nearest_mean", "linear", "logreg",
             "finetune", "--finetune_steps", 2, "--finetune_episodes", 2)
    out, report = score(tmp_path, monkeypatch, capsys, *flags)
    assert "16 images, 2 classes, 8 groups by group column" in out and "mean over episodes and files" in out
    assert "both, late.pt: cannot tell" in out and "ours, last.pt: none of the 16" in out
    assert [(own["model"], own["path"], own["step"]) for own in report["checkpoints"]] == [
        ("ours", "last.pt", 12), ("both", "last.pt", 12), ("both", "late.pt", 13)]
    value = {(own["features"], own["classifier"], own["score"]): own["estimate"] for own in report["results"]}
    for classifier in ("nearest mean", "logreg"):  # late.pt has the weights of last.pt
        for name in ("theirs", "both"):
            assert value[name, classifier, "macro F1"] == pytest.approx(value["ours", classifier, "macro F1"], abs=1e-6)
            assert value[f"ours - {name}", classifier, "macro F1"] == pytest.approx(0, abs=1e-6)
    tuned = {name for name, classifier, _ in value if classifier == "fine-tuned"}
    assert tuned == {"ours", "both", "random init", "ours - both", "ours - random init"}
    out, report = score(tmp_path, monkeypatch, capsys, *flags[:2], "--split", "test", "--shots", 1, "--episodes", 2)
    assert "8 images, 2 classes, 4 groups" in out and report["args"]["ckpt"] == ["last.pt"]


def test_outside_the_fan_of_phantoms_is_nothing(tmp_path, monkeypatch, capsys):
    save_backbone(tmp_path / "last.pt")
    monkeypatch.setattr(fewshot, "PHANTOM_IMAGES", 120)
    out, report = score(tmp_path, monkeypatch, capsys, "--outside_fan", "--episodes", 5, "--shots", 2)
    assert "outside the fan: 120 of 120 images" in out and "tell the label is not shown" in out
    assert report["outside_fan"]["verdict"] == "not shown" and report["outside_fan"]["images_with_outside"] == 120
    assert report["outside_fan"]["estimate"] == pytest.approx(1 / 6, abs=0.04)


def broken_csv(folder):
    save_images(folder)
    (folder / "a.csv").write_text("image,label\nbrain/p00/0.png,brain\nbrain/p00/9.png,brain\n"
                                  "femur/p10/0.png,femur\nfemur/p11/0.png,femur\nbrain/p01/0.png,brain\n")
    return folder / "a.csv"


def unknown_column(folder):
    save_images(folder)
    (folder / "a.csv").write_text("image,label,patient\nbrain/p00/0.png,brain,1\n")
    return folder / "a.csv"


def train_csv(folder):
    save_images(folder)
    (folder / "a.csv").write_text("image,label,split\nbrain/p00/0.png,brain,train\n")
    return folder / "a.csv"


def foreign_json(folder):
    (folder / "notes.json").write_text('{"mine": 1}')
    return folder / "notes.json"


def damaged(folder):
    (folder / "bad.pt").write_bytes(b"PK not a checkpoint")
    return folder / "bad.pt"


def diverged(folder):
    save_backbone(folder / "nan.pt", mean=float("nan"))
    return folder / "nan.pt"


ERRORS = {  # flags, functions of a folder among them; words of the sentence
    "no checkpoint": (["--ckpt", "other.pt"], ["other.pt", "no such checkpoint", "pretrain.py"]),
    "damaged checkpoint": (["--ckpt", damaged], ["bad.pt", "damaged"]),
    "diverged checkpoint": (["--ckpt", diverged, "--data", save_images], ["nan.pt", "not finite"]),
    "too many shots": (["--data", save_images, "--shots", 1, 7],
                       ["--shots 7", "'brain'", "8 images", "4 groups", "up to 6 works"]),
    "one class": (["--data", lambda folder: save_images(folder, ["brain"])], ["one class", "'brain'", "two"]),
    "one group": (["--data", lambda folder: save_images(folder, patients=1)], ["1 groups", "further groups"]),
    "missing image": (["--data", broken_csv, "--shots", 1], ["a.csv, line 3", "9.png", "No such file", "--exclude"]),
    "unknown column": (["--data", unknown_column], ["image,label,patient", "expected image,label[,group]"]),
    "no data": (["--data", "nowhere"], ["nowhere: no such file or folder"]),
    "bad regex": (["--data", save_images, "--group_regex", "(p"], ["--group_regex", "unterminated"]),
    "foreign json": (["--json", foreign_json], ["notes.json", "not written by fewshot.py"]),
    "json nowhere": (["--json", "nowhere/a.json"], ["nowhere/a.json", "folder"]),
    "unknown flag": (["--shot", 5], ["--shot: no such option"]),
    "no shots": (["--shots", 0], ["at least 1"]),
    "bad C": (["--C", "-1"], ["argument --C", "positive number or 'support'"]),
    "no steps": (["--finetune_steps", 0], ["--finetune_steps must be at least 1"]),
    "no rate": (["--lr", 0], ["--lr must be positive, not 0.0"]),
    "classifier": (["--classifiers", "svm"], ["invalid choice: 'svm'"]),
    "two of a name": (["--ckpt", "last.pt", "pixels=last.pt"], ["two models are called 'pixels'"]),
    "features": (["--features", "no.npz"], ["--features no.npz", "No such file"]),
    "png nowhere": (["--png", "nowhere/a.png"], ["nowhere/a.png", "folder"]),
    "no splits": (["--data", save_images, "--split", "test"], ["--split test", "no such split; there is none"]),
    "other splits": (["--data", train_csv, "--split", "test"], ["--split test", "there are train"]),
    "split of nothing": (["--split", "test"], ["need --data"]),
    "exclude of nothing": (["--exclude", "*"], ["need --data"]),
}


@pytest.mark.parametrize("flags, words", ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, flags, words):
    save_backbone(tmp_path / "last.pt")
    (tmp_path / "set").mkdir()
    flags = [str(flag(tmp_path / "set") if callable(flag) else flag) for flag in flags]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left, runtime.clear_errors():
        fewshot.main(fewshot.get_args(flags))
    out, error = capsys.readouterr()
    assert left.value.code == 2 and not out
    sentence, = error.strip().split("\n")
    assert ": error: " in sentence and all(word in sentence for word in words), error
    assert not (tmp_path / "fewshot.json").exists()


def test_an_error_leaves_no_traceback(tmp_path):
    done = run(tmp_path, "--ckpt", "other.pt")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("fewshot.py: error: other.pt: no such checkpoint") and done.stderr.count("\n") == 1
