"""Scores of masks at each image's own size, of a network or of files, and the masks as they are written."""
import os

import numpy as np
import pytest
import torch
from PIL import Image
from seg_tools import arguments, data, image_dice, load, masks_of, pooled_f1, read_rows  # noqa: F401
from stage_tools import one_thread  # noqa: F401
from stage_tools import CONFIG

from labelled import mask_codes
from model import VisionTransformer
from scores import exchange
from scores.metrics import MASK_SCORES, mask_scores
from training import segmenter

CPU = torch.device("cpu")


def small_network(n_classes, how=dict(name="linear", channels=None, norm="group")):
    torch.manual_seed(3)
    backbone = VisionTransformer(**CONFIG)
    network = segmenter.build(backbone, how, np.full(n_classes, 1 / n_classes), False, 0, 1.0, CPU)[0]
    with torch.no_grad():
        network.decoder.classifier.weight.mul_(300)  # so that all classes are predicted
    return network


def test_masks_on_disk_are_those_that_were_scored(data, tmp_path):
    """At their own size; whatever the batch, however many processes share the images."""
    data, args = data[0], arguments()
    network, canvases, stats = small_network(3), data.images.at(16), (0.4, 0.2)
    whole = segmenter.score_network(network, data, canvases, stats, args, "whole", CPU, 0, 1)
    truths, names = masks_of(tmp_path), [row["image"] for row in read_rows(tmp_path)]
    masks = [load(tmp_path / "whole" / name) for name in names]
    assert len({int(k) for mask in masks for k in np.unique(mask)}) == 3
    assert {mask.shape for mask in masks} == {(18, 18), (20, 26)} and network.training
    for row, (truth, mask) in enumerate(zip(truths, masks)):
        counts, values = mask_scores(truth, mask, 3, None, args.tolerance)
        assert np.array_equal(whole["counts"][row], counts)
        for name in MASK_SCORES:
            np.testing.assert_array_equal(whole[name][row], values[name])
    assert np.nanmean(whole["Dice"][:, 1:], 0).mean() == pytest.approx(image_dice(truths, masks), rel=1e-9)
    counts = whole["counts"].sum(0)[1:].numpy()
    assert (2 * counts[:, 0] / counts[:, 1:].sum(1)).mean() == pytest.approx(pooled_f1(truths, masks), rel=1e-9)
    args.eval_batch_size = 1
    parts = [segmenter.score_network(network, data, canvases, stats, args, "parts", CPU, rank, 4) for rank in range(4)]
    assert len(os.listdir("parts/images")) == 6
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=0, atol=0, equal_nan=True)
    assert all(np.array_equal(load(tmp_path / "parts" / name), mask) for name, mask in zip(names, masks))


def test_scores_of_files_are_those_of_the_network(data, tmp_path):
    data, args = data[0], arguments("--tolerance", 1)
    network, canvases = small_network(3), data.images.at(16)
    own = segmenter.score_network(network, data, canvases, (0.4, 0.2), args, "masks", CPU, 0, 1)
    names, shapes = [data.names[i] for i in data.test], [data.truth(i).shape for i in data.test]
    theirs = segmenter.score_files(exchange.read_predicted_masks("masks", names, shapes, 3), data, args)
    for name, value in own.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=0, equal_nan=True)
    args.tolerance = 5
    wider = segmenter.score_files(exchange.read_predicted_masks("masks", names, shapes, 3), data, args)
    assert wider["surface Dice"].nansum() > own["surface Dice"].nansum() and torch.equal(wider["counts"], own["counts"])


def test_sizes_of_pixels_make_millimetres(data, tmp_path):
    data, args = data[0], arguments()
    mm = np.tile([[0.5, 0.25]], (20, 1))
    read = lambda row: np.roll(data.truth(data.test[row]), 2, 0)  # noqa: E731
    pixels, lengths = (segmenter.score_files(read, data._replace(mm=own), args) for own in (None, mm))
    for row, i in enumerate(data.test):
        expected = mask_scores(data.truth(i), read(row), 3, (0.5, 0.25), args.tolerance)[1]
        np.testing.assert_array_equal(lengths["HD95"][row], expected["HD95"])
    known = ~torch.isnan(pixels["HD95"])
    assert (lengths["HD95"][known] < pixels["HD95"][known]).all() and known.any()
    assert torch.equal(pixels["counts"], lengths["counts"])


def test_circumference_is_of_the_first_class(data):
    """Only where it was measured, in mm of each image's own pixels; nan where nothing was found."""
    data, args = data[0], arguments()
    grid = np.mgrid[:120, :160]

    def head(row):  # half axes of 60 and 40 pixels, last image none
        mask = ((grid[1] - 79.5) / 60) ** 2 + ((grid[0] - 59.5) / 40) ** 2 <= 1
        return (mask & (row < 5)).astype(np.uint8)

    truth = lambda i: head(data.test.tolist().index(i))  # noqa: E731
    mm = np.linspace(0.1, 0.3, 20)[:, None] * np.ones(2)
    measured = data._replace(truth=truth, mm=mm, measured=np.full(20, 300.0), classes=["background", "head"])
    found = segmenter.score_files(head, measured, args)["circumference"]
    angle = np.linspace(0, 2 * np.pi, 100_001)
    around = np.hypot(np.diff(60 * np.cos(angle)), np.diff(40 * np.sin(angle))).sum()  # pixels
    np.testing.assert_allclose(found[:5], around * mm[data.test[:5], 0], rtol=2e-3)
    assert found[5].isnan() and "circumference" not in segmenter.empty_scores(data)


def test_runs_are_stacked():
    runs = [{"counts": torch.full((6, 3, 3), run), **{name: torch.full((6, 3), float(run)) for name in MASK_SCORES},
             "circumference": torch.full((6,), float(run))} for run in range(4)]
    found = segmenter.stack(runs)
    assert found.keys() == {"values", "counts", "circumference"} and found["values"].keys() == {*MASK_SCORES}
    assert found["counts"].shape == (4, 6, 3, 3) and found["circumference"].shape == (4, 6)
    for value in found["values"].values():
        assert value.shape == (4, 6, 3) and all((value[run] == run).all() for run in range(4))


@pytest.mark.parametrize("name", ["a/b.png", "b.jpg", "1.2.840.113619", "a.b.mha", "../c.png"])
def test_masks_are_called_as_predictions_are_looked_for(name):
    assert segmenter.mask_path("seg/masks", name) == os.path.join("seg/masks", mask_codes.mask_name(name))


def test_a_mask_is_a_picture_with_names(data, tmp_path):
    data = data[0]
    segmenter.score_network(small_network(3), data, data.images.at(16), (0.4, 0.2), arguments(), "masks", CPU, 0, 1)
    with Image.open(tmp_path / "masks" / read_rows(tmp_path)[0]["image"]) as file:
        assert file.mode == "P" and file.text["classes"] == "0 background\n1 bo_x\n2 s%tripe"
