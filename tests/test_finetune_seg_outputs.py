"""What finetune_seg.py writes: table, JSON, LaTeX, pictures, checkpoints, and nothing of the images' names."""

import hashlib
import shutil

import numpy as np
import pytest
import sklearn.metrics
import torch
from seg_tools import DATA, QUICK, load, masks_of, predicted, read_rows, run, save_set
from stage_tools import one_thread  # noqa: F401
from stage_tools import assert_files_hold_no_names, assert_latex_is_whole, checkpoint, moved, save_backbone, spy

import finetune_seg
from frames.leakage import content_hash


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One command with every output: (folder, what it printed, its JSON)."""
    folder = tmp_path_factory.mktemp("finished")
    save_set(folder)
    seen = [content_hash(load(folder / "set" / row["image"])) for row in read_rows(folder)[:2]]
    save_backbone(folder / "a_b%c.pt", seen={"content": torch.from_numpy(np.array(seen, np.uint64))})
    shutil.copytree(folder / "set" / "masks", folder / "theirs" / "images")
    output, report = run(folder, *DATA, "--ckpt", "a_b%c.pt", "none", *QUICK, "--latex", "table.tex", "--predictions",
                         "their_s=theirs")
    return folder, output, report


def test_table_on_screen(finished):
    _, output, report = finished
    text = output.split("\ntest: 6 images of 3 groups;")[1]
    assert max(map(len, text.split("\n\n")[1].split("\n"))) <= 120
    names = ["a_b%c", "from scratch", "their_s"]
    lines = [line for line in text.split("\n") if any(line.startswith(name) for name in names)]
    for name, line in zip(names, lines[:3]):
        dice = report["models"][name]["scores"]["Dice"]
        assert line.startswith(name) and f"{dice['estimate']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}]" in line
    assert report["order"] == ["Dice", "IoU", "pooled Dice", "HD95 [pixels]", "surface Dice"]
    assert report["unit"] == "pixels"
    assert "  s%tripe, 3" in text and "smoke test" not in output
    assert list(report["differences"]) == names[1:] and report["phantom"] is False


def test_files_and_their_overlap_with_pretraining_are_told(finished):
    folder, output, report = finished
    assert "transductive: 2 of 6 test images were in the pretraining set (2 identical)" in output
    own = report["files"]["a_b%c"][0]
    assert own["in pretraining set"] == {"images": 6, "identical": 2, "seen": 2} and own["img_size"] == 16
    assert own["sha256"] == hashlib.sha256((folder / "a_b%c.pt").read_bytes()).hexdigest()
    assert "transductive: 2 of 6" in report["methods"] and report["files"]["from scratch"][0]["sha256"] is None


def test_latex_is_whole(finished):
    folder, _, report = finished
    text = assert_latex_is_whole(folder / "table.tex", finetune_seg)
    for score in report["order"]:
        assert score.replace("[", "{[}") in text
    assert r"their\_s" in text and "UPerNet on four blocks" in text


def test_overlays_show_best_median_and_worst(tmp_path, monkeypatch):
    folder, shown = tmp_path, {}
    save_set(folder)
    save_backbone(folder / "a.pt")
    spy(monkeypatch, finetune_seg, "overlay_png", lambda path, rows, classes, title, result: shown.update({path: rows}))
    run(folder, *DATA, "--ckpt", "a.pt", "none", *QUICK)
    assert shown.keys() == {"seg/overlay-a.png", "seg/overlay-from_scratch.png"}
    truths, masks = masks_of(folder), predicted(folder, "a-seed0")
    dices = [np.mean([sklearn.metrics.f1_score((truth == k).ravel(), (mask == k).ravel())
                      for k in (1, 2) if (truth == k).any()]) for truth, mask in zip(truths, masks)]
    rows, ranks = shown["seg/overlay-a.png"], np.argsort(dices)
    values = [float(text.split()[-1]) for text, *_ in rows]
    assert [text.split(":")[0] for text, *_ in rows] == ["best", "median", "worst"]
    np.testing.assert_allclose(values, np.sort(dices)[[5, 2, 0]], atol=6e-4)
    assert np.array_equal(rows[2][2], truths[ranks[0]]) and np.array_equal(rows[2][3], masks[ranks[0]])
    assert all(load(folder / path).ndim == 3 for path in shown)


def test_no_name_of_an_image_is_in_a_checkpoint(finished):
    folder, *_ = finished
    assert_files_hold_no_names(folder / "seg", 2, [b"SECRET", b"split.csv"], b"bo_x")


def test_a_fine_tuned_file_is_a_backbone(finished):
    folder, *_ = finished
    model, info, names = moved(folder / "seg" / "a_b_c-seed0.pt", folder / "a_b%c.pt")
    assert (info["mean"], info["std"]) == (0.3, 0.2) and model.in_chans == 1
    assert {"patch_embed.proj.weight", "blocks.1.mlp.fc2.weight"} <= {*names}
    trained = [content_hash(load(folder / "set" / row["image"])) for row in read_rows(folder, "train")]
    saved = checkpoint(folder / "seg" / "from_scratch-seed0.pt")
    assert sorted(saved["seen"]["content"].tolist()) == sorted(trained)  # all that these weights have seen
