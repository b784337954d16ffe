"""Episodes that share no group, classifiers against scikit-learn and spelled-out loops, and every error sentence."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from file_tools import load_grey
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import fewshot
import metrics
import phantom
import runtime
from images import Frame, list_images, resize_square
from leakage import content_hash, perceptual_hash
from model import VisionTransformer

CONFIG = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=2, init_values=0.5)


def counts_of(labels, groups):
    confusion = metrics.group_confusion(labels, labels, groups, labels.max() + 1, groups.max() + 1)
    return confusion.diagonal(axis1=1, axis2=2)  # (G, K)


def blobs(n, d, K, spread, seed=0):
    """Features around K random centres, labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % K
    return torch.from_numpy(rng.normal(size=(K, d))[labels] + spread * rng.normal(size=(n, d)) + 2), labels


def supports(labels, shots, episodes=3):
    groups = np.arange(len(labels))
    drawn = [fewshot.draw_episode(labels, groups, counts_of(labels, groups), shots, 0, i)[0] for i in range(episodes)]
    return torch.from_numpy(np.stack(drawn))  # (E, K, k)


# ---------------------------------------------------------------- classifiers

@pytest.mark.parametrize("d, K, shots, C", [(60, 6, 5, 1.0), (60, 6, 1, 1.0), (5, 3, 20, 1.0), (60, 2, 5, 1.0),
                                            (60, 4, 5, 0.01), (60, 4, 5, 100.0), (2, 3, 2, 1e4)])
def test_logistic_regression_is_scikit_learns(d, K, shots, C):
    x, labels = blobs(200, d, K, spread=1.0)
    x[:, 1] = 0.3  # a constant feature has no standard deviation to divide by
    support = supports(labels, shots)
    weight, bias = fewshot.fit_logistic(x, support, torch.full((3,), C, dtype=torch.float64))
    for w, b, rows in zip(weight, bias, support.flatten(1)):
        scaler = StandardScaler().fit(x[rows])
        oracle = LogisticRegression(C=C, tol=1e-9, max_iter=20000).fit(scaler.transform(x[rows]), labels[rows])
        actual, expected = (x @ w + b).softmax(1).numpy(), oracle.predict_proba(scaler.transform(x))
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_logistic_regression_in_parts_and_per_episode_C(monkeypatch):
    x, labels = blobs(60, 8, 3, spread=1.0)
    support, C = supports(labels, 4, episodes=5), torch.tensor([0.01, 0.1, 1, 10, 100], dtype=torch.float64)
    weight, bias = fewshot.fit_logistic(x, support, C)
    for i in range(5):  # one at a time
        alone = fewshot.fit_logistic(x, support[i:i + 1], C[i:i + 1])
        torch.testing.assert_close((weight[i], bias[i]), (alone[0][0], alone[1][0]), atol=1e-6, rtol=1e-6)
    predictions = fewshot.logistic_regression(x.float(), support, 1.0)
    expected = fewshot.fit_logistic(x.float().double(), support, torch.ones(5, dtype=torch.float64))
    assert (predictions == torch.stack([(x.float().double() @ w + b).argmax(1) for w, b in zip(*expected)])).all()


def test_steps_shrink_where_newtons_overshoot():
    """Few rows of very unequal length: with full steps the logits run off to infinity."""
    z = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1000
    z = torch.cat((z.sign() * z.abs() ** 1.5 / 1000 ** 0.5, torch.ones(1, 12, 1, dtype=torch.float64)), dim=2)
    targets, ridge = torch.eye(6, dtype=torch.float64).repeat_interleave(2, dim=0), torch.tensor([[1.0], [1], [1], [0]])
    w = fewshot.minimise(z, targets, ridge.double())
    gradient = z.mT @ ((z @ w).softmax(2) - targets) + ridge * w
    assert gradient.abs().max() < 1e-7


def test_C_is_chosen_by_cross_validation_on_the_support():
    x, labels = blobs(90, 12, 3, spread=2.0)
    support, candidates = supports(labels, 7, episodes=2), [1e-3, 1e-2, 1e-1, 1.0]
    chosen = fewshot.choose_C(x, support, np.array(candidates))
    for C, rows in zip(chosen, support):
        losses = []
        for candidate in candidates:
            losses.append(0.0)
            for fold in range(5):
                out = np.arange(7) % 5 == fold
                train, test = rows[:, ~out].flatten(), rows[:, out].flatten()
                scaler = StandardScaler().fit(x[train])
                oracle = LogisticRegression(C=candidate, tol=1e-9, max_iter=5000).fit(
                    scaler.transform(x[train]), labels[train])
                p = oracle.predict_proba(scaler.transform(x[test]))
                losses[-1] -= np.log(p[np.arange(len(test)), labels[test]]).sum()
        assert C == candidates[np.argmin(losses)]
    assert (fewshot.choose_C(x, supports(labels, 1)) == 1).all()  # nothing to leave out


@pytest.mark.parametrize("shots", [1, 3, 8])
def test_nearest_mean_and_neighbours_against_loops(shots):
    x, labels = blobs(80, 6, 4, spread=1.5)
    support = supports(labels, shots)
    mean, neighbours = fewshot.nearest_mean(x, support), fewshot.nearest_neighbours(x, support)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    for e, rows in enumerate(support.numpy()):
        for i in range(80):
            distances = [np.linalg.norm(unit[i] - unit[images].mean(0)) for images in rows]
            assert mean[e, i] == np.argmin(distances)
            nearest = sorted(rows.flatten(), key=lambda j: -unit[i] @ unit[j])[:min(shots, 5)]
            votes = np.zeros(4)
            for j in nearest:
                votes[labels[j]] += np.exp(unit[i] @ unit[j] / 0.07)
            assert neighbours[e, i] == np.argmax(votes)


# ---------------------------------------------------------------- episodes

def layout(name):
    """Labels and groups of a few kinds of test set."""
    rng = np.random.default_rng(1)
    if name == "each image its own group":
        return np.arange(40) % 4, np.arange(40)
    if name == "patients of one class, unequal":
        groups = rng.choice(24, 200, p=np.arange(1, 25) / 300)
        groups = np.unique(groups, return_inverse=True)[1]
        return groups % 3, groups
    if name == "patients with all classes":
        return np.arange(72) % 6, np.arange(72) // 12
    if name == "patients with some classes":
        return rng.integers(0, 3, 120), np.arange(120) // 8
    groups = np.repeat(np.arange(24), [10, 1] * 12)  # 12 classes of two patients: one order in 4096 leaves 10 images
    return groups // 2, groups


LAYOUTS = ["each image its own group", "patients of one class, unequal", "patients with all classes",
           "patients with some classes", "tight: all of a patient but one image"]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shots", [1, 5])
def test_episode(name, shots):
    labels, groups = layout(name)
    counts = counts_of(labels, groups)
    fewshot.check_shots(counts, shots, list("abcdefghijkl")[:counts.shape[1]])
    for episode in range(20):
        support, query = fewshot.draw_episode(labels, groups, counts, shots, 0, episode)
        assert support.shape == (counts.shape[1], shots) and len(np.unique(support)) == support.size
        assert (labels[support] == np.arange(counts.shape[1])[:, None]).all()
        touched = np.isin(groups, groups[support])
        assert (query == ~touched).all(), "the query is every image of the other groups, and no other"
        assert set(labels[query]) == set(labels), "a class has no query image"
        for label, images in enumerate(support):
            used, times = np.unique(groups[images], return_counts=True)
            free = counts[:, label].copy()
            free[np.unique(groups[query])] = 0
            if name in LAYOUTS[:2] and (counts[:, label] > 0).sum() > shots:
                assert len(used) == shots, "two images of a patient though there are enough patients"
            # in turn: a group gives one more than another only where the other has no more
            assert all(times[i] >= times.max() - 1 or times[i] == counts[used[i], label] for i in range(len(used)))


def test_episodes_depend_on_seed_shots_and_episode_alone():
    labels, groups = layout("patients of one class, unequal")
    counts = counts_of(labels, groups)

    def draw(*key):
        np.random.seed(len(key))  # global state is not read
        return fewshot.draw_episode(labels, groups, counts, *key)[0].tolist()

    assert draw(5, 0, 3) == draw(5, 0, 3)
    assert len({str(sorted(draw(*key))) for key in ((5, 0, 3), (5, 0, 4), (5, 1, 3))}) == 3


def test_every_image_and_group_gets_its_turn():
    labels, groups = layout("patients of one class, unequal")
    counts, seen, asked = counts_of(labels, groups), set(), set()
    for episode in range(300):
        support, query = fewshot.draw_episode(labels, groups, counts, 2, 0, episode)
        seen.update(support.flatten().tolist())
        asked.update(np.flatnonzero(query).tolist())
    assert len(asked) == 200 and set(groups[list(seen)]) == set(groups)


def test_largest_shots_in_the_message_is_the_largest_that_works():
    rng = np.random.default_rng(2)
    for _ in range(20):
        groups = np.unique(rng.integers(0, 12, 60), return_inverse=True)[1]
        labels = groups % 2
        counts = counts_of(labels, groups)
        largest = min((own.sum() - own[own > 0].min()) for own in counts.T)  # all but the smallest group of a class
        fewshot.check_shots(counts, largest, ["a", "b"])
        assert fewshot.draw_episode(labels, groups, counts, largest, 0, 0)[0].shape == (2, largest)
        with pytest.raises(ValueError, match=f"--shots up to {largest} works"):
            fewshot.check_shots(counts, largest + 1, ["a", "b"])


def test_groups_of_labelled_sets(tmp_path):
    """A patient met in two classes is one group; a class folder is no patient, whether a folder or a CSV names it."""
    for name in ("brain/p1/0.png", "femur/p1/0.png", "femur/p2/0.png", "femur/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(str(tmp_path), labelled=True).groups == ["p1", "femur/3.png", "p1", "p2"]
    csv = tmp_path / "a.csv"
    csv.write_text("image,label\nA/1.png,a\nA/2.png,a\nB/1.png,b\n")
    assert list_images(str(csv), labelled=True).groups == ["A/1.png", "A/2.png", "B/1.png"]
    csv.write_text("image,label\np1/1.png,a\np1/2.png,b\np2/1.png,b\n")
    assert list_images(str(csv), labelled=True).groups == ["p1", "p1", "p2"]


# ---------------------------------------------------------------- scores

def evaluate(features, labels, groups, shots=2, episodes=20):
    args = argparse.Namespace(seed=0, episodes=episodes, C=1.0)
    return fewshot.evaluate(features, labels, groups, counts_of(labels, groups), shots, args)


def test_separable_features_score_one_and_noise_scores_chance():
    groups = np.arange(600) // 3
    labels = groups % 3
    separable = torch.eye(3)[labels] + 0.01 * torch.randn(600, 3)
    noise = torch.randn(600, 8)
    results = evaluate({"pretrained": separable, "random init": noise, "pixels": noise}, labels, groups)
    for classifier in ("nearest mean", "k-NN", "logreg"):
        for score in (0, 1):
            assert metrics.interval(results["pretrained", classifier][score]) == (1, 1, 1)
        _, low, high = metrics.interval(results["random init", classifier][0])
        assert low < 1 / 3 < high and high - low < 0.1
        difference = results["pretrained - random init", classifier][0]
        assert difference[0] == 1 - results["random init", classifier][0, 0]
        assert (results["pretrained - pixels", classifier] == results["pretrained - random init", classifier]).all()


def test_scores_do_not_see_the_support():
    """Features that name the group and nothing else are worthless, however well they fit the support."""
    groups = np.arange(120) // 4
    labels = groups % 3
    results = evaluate({"group": torch.eye(30)[groups], "none": torch.ones(120, 2)}, labels, groups)
    assert results["group", "k-NN"][0, 0] == pytest.approx(1 / 3, abs=0.02)


def test_table_is_narrow_and_records_are_complete():
    labels, groups = np.arange(60) % 3, np.arange(60)
    features = {name: torch.randn(60, 4) for name in ("pretrained", "random init", "pixels")}
    results = evaluate(features, labels, groups)
    lines = fewshot.table(results, 5, 1 / 3)
    assert max(map(len, lines)) <= 120
    assert sum("pretrained - " in line for line in lines) == 4 and "chance 0.333" in lines[1]
    estimate, low, high = metrics.interval(results["pixels", "logreg"][0])
    row = next(line for line in lines if line.strip().startswith("pixels"))
    assert row.endswith(f"{estimate:.3f} [{low:.3f}, {high:.3f}]")
    assert len(list(fewshot.records(results, 5))) == 5 * 3 * 2


# ---------------------------------------------------------------- features

@pytest.mark.parametrize("in_chans, mean, std", [(1, 0.3, 0.2), (3, 0.3, 0.2), (3, (0.5, 0.4, 0.3), (0.2, 0.1, 0.3))])
def test_features_are_class_token_and_mean_patch(in_chans, mean, std):
    backbone = VisionTransformer(**{**CONFIG, "in_chans": in_chans}).eval()
    images = [np.random.default_rng(i).integers(0, 255, (20 + i, 30), dtype=np.uint8) for i in range(5)]
    (features, pixels), content, looks = fewshot.extract(5, lambda i: Frame(images[i], images[i]), 16, [backbone], mean, std, 2, "cpu")
    assert content.tolist() == list(map(content_hash, images))
    assert np.array_equal(looks, np.array(list(map(perceptual_hash, images))))
    for i, image in enumerate(images):
        x = torch.from_numpy(resize_square(image, 16).copy()) / 255
        channels = [(x - m) / s for m, s in zip(np.broadcast_to(mean, in_chans), np.broadcast_to(std, in_chans))]
        with torch.no_grad():
            tokens = backbone.forward_features(torch.stack(channels)[None].float())
        torch.testing.assert_close(features[i, :16], tokens["x_norm_clstoken"][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features[i, 16:], tokens["x_norm_patchtokens"][0].mean(0), atol=1e-5, rtol=1e-4)
        thumbnail = torch.from_numpy(resize_square(image, fewshot.PIXELS_SIDE).copy()) / 255  # whatever the model takes
        expected = (thumbnail.flatten() - np.mean(mean)) / np.mean(std)
        torch.testing.assert_close(pixels[i], expected.float(), atol=1e-5, rtol=1e-4)


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


def test_the_documented_command(tmp_path):
    save_backbone(tmp_path / "last.pt", seen=seen_images(phantom.phantom_images(1200, seed=0)[0]))
    done = run(tmp_path, "--ckpt", "last.pt", "--shots", "5")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "none of the 1,200 test images" in done.stdout and "a smoke test" in done.stdout
    assert "1 shot:" not in done.stdout and "5 shots:" in done.stdout

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((tmp_path / "fewshot.json").read_text(), parse_constant=refuse)
    assert report["args"]["shots"] == [5] and report["checkpoint"]["step"] == 12 and report["test_set"]["phantom"]
    assert len(report["results"]) == 30 and report["test_set"]["in_pretraining_set"]["seen"] == 0
    features = {record["features"] for record in report["results"]}
    assert features == {"pretrained", "random init", "pixels", "pretrained - random init", "pretrained - pixels"}


def test_a_folder_twice_gives_the_same_numbers_and_says_what_was_seen_before(tmp_path):
    folder = save_images(tmp_path / "set")
    first = load_grey(folder / "brain" / "p00" / "0.png")
    save_backbone(tmp_path / "last.pt", seen=seen_images([first]))
    flags = ("--data", folder, "--shots", 1, 2, "--episodes", 5, "--C", "support")
    done, again = run(tmp_path, *flags), run(tmp_path, *flags)  # the second overwrites the first's fewshot.json
    assert done.returncode == again.returncode == 0, done.stderr + again.stderr
    assert done.stdout == again.stdout
    assert done.stdout.startswith("transductive: 1 of 16 test images")
    assert "16 images, 2 classes, 8 groups by parent folder, 5 episodes" in done.stdout
    assert "smoke test" not in done.stdout and "p00" not in done.stdout
    bright = next(line for line in done.stdout.split("\n") if line.strip().startswith("pixels"))
    assert "1.000 [1.000, 1.000]" in bright


def broken_csv(folder):
    save_images(folder)
    (folder / "a.csv").write_text("image,label\nbrain/p00/0.png,brain\nbrain/p00/9.png,brain\n"
                                  "femur/p10/0.png,femur\nfemur/p11/0.png,femur\nbrain/p01/0.png,brain\n")
    return folder / "a.csv"


def unknown_column(folder):
    save_images(folder)
    (folder / "a.csv").write_text("image,label,patient\nbrain/p00/0.png,brain,1\n")
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
    "missing image": (["--data", broken_csv, "--shots", 1], ["9.png", "No such file", "--exclude"]),
    "unknown column": (["--data", unknown_column], ["image,label,patient", "expected image,label[,group]"]),
    "no data": (["--data", "nowhere"], ["nowhere: no such file or folder"]),
    "bad regex": (["--data", save_images, "--group_regex", "(p"], ["--group_regex", "unterminated"]),
    "size": (["--img_size", 20], ["--img_size 20", "patch size 8"]),
    "foreign json": (["--json", foreign_json], ["notes.json", "not written by fewshot.py"]),
    "json nowhere": (["--json", "nowhere/a.json"], ["nowhere/a.json", "folder"]),
    "unknown flag": (["--shot", 5], ["unrecognized arguments: --shot"]),
    "no shots": (["--shots", 0], ["at least 1"]),
    "bad C": (["--C", "-1"], ["argument --C", "positive number or 'support'"]),
    "exclude of nothing": (["--exclude", "*"], ["need --data"]),
}


@pytest.mark.parametrize("flags, words", ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_sentence(tmp_path, flags, words):
    save_backbone(tmp_path / "last.pt")
    (tmp_path / "set").mkdir()
    done = run(tmp_path, *(flag(tmp_path / "set") if callable(flag) else flag for flag in flags))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    sentence = done.stderr.strip().split("\n")[-1]  # argparse puts its usage above
    assert sentence.startswith("fewshot.py: error: ") and all(word in sentence for word in words), done.stderr
    assert not (tmp_path / "fewshot.json").exists()
