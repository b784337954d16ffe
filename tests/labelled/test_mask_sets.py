"""A segmentation set as a run sees it: parts, squashed masks, few-shot draws, and scores at each image's own size."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from seg_tools import CLASSES, DATA, image_dice, load, masks_of, pooled_f1, read_rows, save_set
from stage_tools import one_thread  # noqa: F401
from stage_tools import CONFIG

import finetune_seg
from frames import phantom
from labelled import mask_codes, mask_sets
from model import VisionTransformer
from scores import exchange, report
from scores.metrics import MASK_SCORES, mask_scores
from training import segmenter

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path, monkeypatch):
    save_set(tmp_path)
    monkeypatch.chdir(tmp_path)
    return mask_sets.open_data(arguments())


def arguments(*flags, size=16):
    args = finetune_seg.get_args([*map(str, (*DATA, "--img_size", size, *flags))])
    args.dtype = "float32"
    return args


# ---------------------------------------------------------------- images, masks, parts

def test_the_set_as_it_is_on_disk(data, tmp_path):
    data, notes, present = data
    assert data.classes == ["background", *CLASSES] and len(data.names) == 20 and notes == []
    for split in ("train", "val", "test"):
        rows, own = read_rows(tmp_path, split), getattr(data, split)
        assert [data.names[i] for i in own] == [row["image"] for row in rows]
        assert data.groups[own].tolist() == [row["group"] for row in rows]
        for i, mask, row in zip(own, masks_of(tmp_path, split), rows):
            assert np.array_equal(data.truth(i), mask)
            assert np.array_equal(data.grey(i), load(tmp_path / "set" / row["image"]))
            assert present[i].tolist() == [(mask == k).any() for k in range(3)]
    assert data.mm is None and data.measured is None
    assert data.images.at(16).shape == data.masks.shape == (20, 16, 16)


@pytest.mark.parametrize("size", [8, 16, 23])
def test_squashed_masks_are_the_nearest_pixels(data, size):
    data = data[0]
    masks = mask_sets.squash(data.truth, len(data.names), size)
    for i, mask in enumerate(masks):
        truth = data.truth(i)
        rows, columns = ([int((place + 0.5) * side / size) for place in range(size)] for side in truth.shape)
        assert np.array_equal(mask, truth[np.ix_(rows, columns)])
    assert masks.dtype == np.uint8


def test_squashed_masks_lie_on_squashed_images(data):
    """The middle of a bright disc stays where it is on both."""
    grid = np.mgrid[:40, :60]
    disc = ((grid[0] - 12) ** 2 + (grid[1] - 40) ** 2 < 64).astype(np.uint8)
    mask = mask_sets.squash(lambda i: disc, 1, 20)[0]
    image = mask_sets.Images(1, lambda i: mask_sets.Frame(255 * disc, 255 * disc)).at(20)[0] / 255
    assert abs(mask.sum() - image.sum()) < 4
    for axis in (0, 1):
        centers = [(own.sum(1 - axis) * np.arange(20)).sum() / own.sum() for own in (mask, image)]
        assert centers[0] == pytest.approx(centers[1], abs=0.3)


def test_phantoms_are_split_by_patient():
    args = finetune_seg.get_args(["--img_size", "32"])
    data, _, present = mask_sets.open_data(args)
    parts = [{*data.groups[own]} for own in (data.train, data.val, data.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == len({*data.groups})
    assert sum(len(own) for own in (data.train, data.val, data.test)) == len(data.names) == mask_sets.PHANTOM_IMAGES
    assert data.classes == list(phantom.STRUCTURES) and data.masks.shape[1:] == (32, 32)
    assert all(present[own].any(0).all() for own in (data.train, data.val, data.test))
    assert data.truth(3).shape == (mask_sets.PHANTOM_SIZE, mask_sets.PHANTOM_SIZE) and data.mm is None
    other = mask_sets.open_data(finetune_seg.get_args(["--img_size", "32", "--test_seed", "1"]))[0]
    assert not np.array_equal(other.test, data.test) and np.array_equal(other.masks, data.masks)


def test_the_digest_is_of_all_that_a_run_sees(data):
    data, canvases = data[0], data[0].images.at(16)
    digest = mask_sets.digest_of(data, canvases)
    assert digest == mask_sets.digest_of(data._replace(groups=np.char.add("x", data.groups)), canvases)  # names are none
    others = [(data, 255 - canvases), (data._replace(masks=data.masks // 2), canvases)]
    others += [(data._replace(**{part: getattr(data, part)[:-1]}), canvases) for part in ("train", "val", "test")]
    others += [(data._replace(groups=np.where(np.arange(20) == 1, "p", data.groups)), canvases),
               (data._replace(train=data.train[::-1]), canvases)]
    assert len({digest, *(mask_sets.digest_of(*other) for other in others)}) == 1 + len(others)


def test_shares_are_of_train_pixels(data, tmp_path):
    data = data[0]
    expected = [(mask_sets.squash(data.truth, 20, 16)[data.train] == k).mean() for k in range(3)]
    np.testing.assert_allclose(mask_sets.class_shares(data), expected)
    few = data._replace(train=data.train[1:2])  # it shows no stripe
    assert mask_sets.class_shares(few)[2] == 0 and mask_sets.class_shares(few).sum() == pytest.approx(1)


# ---------------------------------------------------------------- few-shot

def shots_set(groups=tuple(range(12)), K=3):
    """Only what draw_shots looks at: images 12.. are validation and test."""
    groups = np.array([f"p{group}" for group in groups] + ["v", "t"])
    n = len(groups) - 2
    present = np.zeros((n + 2, K), bool)
    present[:, 0] = present[n:] = True
    data = mask_sets.Data(None, ["background", "liver", "vein"], groups, "", np.arange(n), np.array([n]),
                         np.array([n + 1]), *[None] * 7)
    return data, present


def test_shots_are_images_of_the_train_set():
    data, present = shots_set()
    draws = [mask_sets.draw_shots(data, present, 5, "image", seed) for seed in range(30)]
    for own, note in draws:
        assert note is None and len({*own}) == 5 and np.isin(own, data.train).all()
    assert {*np.concatenate([own for own, _ in draws])} == {*range(12)} and len({tuple(own) for own, _ in draws}) > 25
    again = mask_sets.draw_shots(data, present, 5, "image", 3)[0]
    assert np.array_equal(again, draws[3][0])
    every, _ = mask_sets.draw_shots(data, present, 12, "image", 0)
    assert np.array_equal(np.sort(every), data.train)


def test_shots_by_group_are_all_their_images():
    data, present = shots_set(groups=np.repeat(range(5), [1, 2, 3, 4, 2]))
    for seed in range(10):
        own, _ = mask_sets.draw_shots(data, present, 2, "group", seed)
        drawn = {*data.groups[own]}
        assert len(drawn) == 2 and np.array_equal(own, np.flatnonzero(np.isin(data.groups, list(drawn))))


@pytest.mark.parametrize("by", ["image", "group"])
def test_shots_hold_every_class(by):
    """A rare one is there in each draw, where chance alone would miss it in most."""
    data, present = shots_set()
    present[[2, 7], 1], present[9, 2] = True, True
    draws = [mask_sets.draw_shots(data, present, 3, by, seed) for seed in range(20)]
    for own, note in draws:
        assert note is None and present[own].any(0).all() and len(own) == 3
    assert len({tuple(own) for own, _ in draws}) > 8


def test_shots_too_few_for_every_class_lack_the_fewest():
    data, present = shots_set()
    present[2, 1], present[9, 2] = True, True
    for seed in range(5):
        own, note = mask_sets.draw_shots(data, present, 1, "image", seed)
        assert own.tolist() in ([2], [9])
        assert note == f"--split_seed {seed}: no image shows {'vein' if own[0] == 2 else 'liver'}"


@pytest.mark.parametrize("by, shots, message", [("image", 13, "--shots 13: there are 12 train images"),
                                                ("group", 4, "--shots 4: there are 3 train groups")])
def test_more_shots_than_there_are(by, shots, message):
    data, present = shots_set(groups=np.repeat(range(3), 4))
    with pytest.raises(ValueError, match=message):
        mask_sets.draw_shots(data, present, shots, by, 0)


# ---------------------------------------------------------------- scores

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


# ---------------------------------------------------------------- the file of parts

def test_split_file(data, tmp_path):
    data = data[0]
    report.write_split("out.csv", {"image": data.names, "group": data.groups}, data)
    expected = [f"{row['image']},{row['group']},{row['split']}" for split in ("train", "val", "test")
                for row in read_rows(tmp_path, split)]
    lines = (tmp_path / "out.csv").read_text().split()
    assert lines[0] == "image,group,split" and sorted(lines[1:]) == sorted(expected)
    found, *_ = mask_sets.open_data(arguments("--split", "out.csv"))
    assert all(np.array_equal(getattr(found, part), getattr(data, part)) for part in ("train", "val", "test"))
    assert np.array_equal(found.groups, data.groups)


def test_another_split_is_kept_aside(data, tmp_path, capsys):
    (tmp_path / "out.csv").write_text("mine")
    columns = {"image": data[0].names, "group": data[0].groups}
    report.write_split("out.csv", columns, data[0])
    assert (tmp_path / "out.old-1.csv").read_text() == "mine" and "another split: kept as" in capsys.readouterr().out
    report.write_split("out.csv", columns, data[0])
    assert not (tmp_path / "out.old-2.csv").exists()


def test_a_mask_is_a_picture_with_names(data, tmp_path):
    data = data[0]
    segmenter.score_network(small_network(3), data, data.images.at(16), (0.4, 0.2), arguments(), "masks", CPU, 0, 1)
    with Image.open(tmp_path / "masks" / read_rows(tmp_path)[0]["image"]) as file:
        assert file.mode == "P" and file.text["classes"] == "0 background\n1 bo_x\n2 s%tripe"
