"""A segmentation set as a run sees it: its parts, squashed masks, few-shot draws."""

import numpy as np
import pytest
from seg_tools import CLASSES, data, load, masks_of, read_rows  # noqa: F401

import finetune_seg
from frames import phantom
from labelled import mask_sets


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
