"""Random draws and device-side augmentation: against Pillow, against written-out formulas, and for what they promise."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import data
from frames.packed import CROPS, MASKS, philox


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.random((24, 24)).astype(np.float32)).resize((96, 96)))
    return (smooth * 200 + 55 * rng.random((96, 96))).astype(np.uint8)  # smooth structure and speckle, full range


def plain_draws(boxes, **changed):
    """draws for make_crops that only crop: boxes (B, n, 4)."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    draws = dict(box=boxes, flip=0, brightness=1, contrast=1, contrast_first=0, sigma=0, solarize=0)
    draws.update(changed)
    return {key: value if key == "box" else torch.full(boxes.shape[:2], float(value)) for key, value in draws.items()}


def crops_in_grey(canvas, draws, size):
    """make_crops without normalisation, in 0..255: (n, size, size)."""
    return data.make_crops(torch.as_tensor(canvas)[None], draws, size, 0.0, 1 / 255)[:, 0]


@pytest.mark.parametrize("box", [(0, 0, 96, 96), (5, 11, 60, 43), (30, 2, 17, 90), (95, 95, 1, 1), (40, 40, 8, 7)])
@pytest.mark.parametrize("size", [32, 48, 7])
def test_crop_equals_pillow(frame, box, size):
    """Integer boxes: Pillow's crop, then its bicubic resize in float mode, to 0.01 grey level (clamped to 0..255)."""
    left, top, width, height = box
    pillow = Image.fromarray(frame.astype(np.float32)).crop((left, top, left + width, top + height))
    pillow = np.asarray(pillow.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)
    ours = crops_in_grey(frame, plain_draws([[box]]), size)[0].numpy()
    assert np.abs(ours - pillow).max() < 0.01


def test_pixels_outside_the_box_have_no_influence(frame):
    changed = frame.copy()
    changed[:20], changed[70:], changed[:, :30], changed[:, 80:] = 0, 255, 255, 0
    draws = plain_draws([[(30, 20, 50, 50)]])
    assert torch.equal(crops_in_grey(frame, draws, 16), crops_in_grey(changed, draws, 16))


def test_fractional_box_moves_smoothly_and_thin_boxes_are_finite(frame):
    a, b = (crops_in_grey(frame, plain_draws([[(10 + shift, 10, 40, 40)]]), 20) for shift in (0.0, 0.25))
    assert 0 < (a - b).abs().mean() < 15
    thin = crops_in_grey(frame, plain_draws([[(33.4, 10.2, 0.3, 40)]]), 8)  # a very wide image, squashed to the canvas
    assert thin.isfinite().all() and thin.std() > 0


def test_flip_is_vertical(frame):
    box = [[(4, 8, 64, 64)]]
    plain, flipped = (crops_in_grey(frame, plain_draws(box, flip=f), 32) for f in (0, 1))
    assert torch.allclose(flipped, plain.flip(1), atol=1e-3) and not torch.allclose(flipped, plain, atol=1)


@pytest.mark.parametrize("flip, mirrored", [("vertical", -2), ("horizontal", -1), ("none", ())])
def test_flip_changes_nothing_else(flip, mirrored):
    """The same draws whatever the flip; crops drawn to be flipped are mirrored, the others as they were."""
    batches = data.PretrainBatches(FakePack(8), batch_args(flip=flip, batch_size_per_gpu=8))
    for key, value in data.PretrainBatches(FakePack(8), batch_args(batch_size_per_gpu=8))[0][0].items():
        assert torch.equal(batches[0][0][key], value), key
    flipped, plain = batches[0], batches[0]
    for key in ("global_flip", "local_flip"):
        plain[0][key] = torch.zeros_like(plain[0][key])
    crops, plain = (data.to_device(batch, torch.device("cpu"), batches.args, 0.0, 1 / 255)[0]
                    for batch in (flipped, plain))
    for kind in ("global", "local"):
        drawn = batches[0][0][f"{kind}_flip"].T.flatten() > 0  # crop-major
        assert drawn.any() and not drawn.all()
        expected = plain[f"{kind}_crops"].clone()
        expected[drawn] = expected[drawn].flip(mirrored)
        assert torch.allclose(crops[f"{kind}_crops"], expected, atol=2e-2)  # of 255: sums in another order
        assert flip == "none" or not torch.allclose(crops[f"{kind}_crops"], plain[f"{kind}_crops"], atol=1)


def test_jitter_order_and_clamp(frame):
    x = crops_in_grey(frame, plain_draws([[(0, 0, 96, 96)]]), 96)

    def contrast(x):
        return (x.mean() + 1.4 * (x - x.mean())).clamp(0, 255)

    first = crops_in_grey(frame, plain_draws([[(0, 0, 96, 96)]], brightness=1.3, contrast=1.4, contrast_first=1), 96)
    second = crops_in_grey(frame, plain_draws([[(0, 0, 96, 96)]], brightness=1.3, contrast=1.4, contrast_first=0), 96)
    assert torch.allclose(first, (contrast(x) * 1.3).clamp(0, 255), atol=1e-2)
    assert torch.allclose(second, contrast((x * 1.3).clamp(0, 255)), atol=1e-2)
    assert (first - second).abs().max() > 0.5  # they differ, by what was clamped


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_nine_taps_with_reflection(frame, sigma):
    x = crops_in_grey(frame, plain_draws([[(0, 0, 96, 96)]]), 32)
    taps = torch.exp(-0.5 * (torch.arange(-4, 5) / sigma) ** 2)
    taps = taps / taps.sum()
    padded = torch.nn.functional.pad(x[None], (4, 4, 4, 4), mode="reflect")
    expected = torch.nn.functional.conv2d(padded, (taps[:, None] * taps)[None, None])[0]
    ours = crops_in_grey(frame, plain_draws([[(0, 0, 96, 96)]], sigma=sigma), 32)
    assert torch.allclose(ours, expected, atol=1e-2)


def test_solarize_and_normalise(frame):
    x = crops_in_grey(frame, plain_draws([[(0, 0, 96, 96)]]), 32)
    solarized = crops_in_grey(frame, plain_draws([[(0, 0, 96, 96)]], solarize=1), 32)
    assert torch.allclose(solarized, torch.where(x >= 128, 255 - x, x), atol=1e-3)
    normalised = data.make_crops(torch.as_tensor(frame)[None], plain_draws([[(0, 0, 96, 96)]]), 32, 0.3, 0.2)
    assert torch.allclose(normalised[0, 0], (x[0] / 255 - 0.3) / 0.2, atol=1e-5)


def test_crops_are_crop_major(frame):
    canvases = torch.stack((torch.as_tensor(frame), torch.full((96, 96), 7, dtype=torch.uint8)))
    boxes = [[(0, 0, 96, 96), (0, 0, 48, 48), (48, 48, 48, 48)]] * 2
    crops = data.make_crops(canvases, plain_draws(boxes), 16, 0.0, 1 / 255)
    assert crops.shape == (6, 1, 16, 16)
    assert torch.allclose(crops[[1, 3, 5]], torch.tensor(7.0), atol=1e-3)  # all crops of image 1
    assert torch.allclose(crops[2, 0], crops_in_grey(frame, plain_draws([boxes[0][1:2]]), 16)[0], atol=1e-3)


# ---------------------------------------------------------------- draws

def test_boxes_follow_random_resized_crop():
    """Area share, aspect and position in original pixels, for a wide image; inside it always."""
    sizes = np.tile([960, 660], (500, 1))
    boxes = data.draw_boxes(philox(0, 0, CROPS), sizes, 8, (0.05, 0.32)).reshape(-1, 4)
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 960).all() and (top + height <= 660).all()
    area = width * height / (960 * 660)
    assert area.min() > 0.045 and area.max() < 0.325 and area.mean() == pytest.approx(0.185, abs=0.005)
    aspect = np.log(width / height)
    assert abs(aspect).max() < np.log(4 / 3) + 0.02 and aspect.std() == pytest.approx(2 * np.log(4 / 3) / 12 ** 0.5, rel=0.05)
    assert (boxes == boxes.round()).all()


def test_boxes_fall_back_to_the_largest_centred_one():
    boxes = data.draw_boxes(philox(0, 0, CROPS), np.array([[3000, 10], [10, 3000]]), 50, (0.5, 1.0))
    assert (boxes[0] == [1493, 0, 13, 10]).all()  # height 10 at aspect 4:3, in the middle of 3,000
    assert (boxes[1] == [0, 1493, 10, 13]).all()


def test_squashed_canvas_keeps_the_true_aspect():
    """A square crop of a 200 x 100 image is twice as high as wide on the square canvas."""
    draws = data.draw_crops(philox(0, 0, CROPS), np.array([[200, 100]] * 400), 64, 1, (0.1, 0.2), 0, 0)
    assert np.log(draws["box"][..., 3] / draws["box"][..., 2]).mean() == pytest.approx(np.log(2), abs=0.03)


def test_probabilities_of_the_draws():
    draws = data.draw_crops(philox(3, 5, CROPS), np.array([[100, 100]] * 4000), 64, 2, (0.3, 1.0),
                            [0.0, 0.9], (0, 0.2))
    assert draws["flip"].mean() == pytest.approx(0.5, abs=0.02)
    assert (draws["brightness"] == 1).mean() == pytest.approx(0.2, abs=0.02)
    assert ((draws["brightness"] == 1) == (draws["contrast"] == 1)).all()  # one coin for the whole jitter
    assert 0.6 <= draws["contrast"].min() < 0.62 and 1.38 < draws["contrast"].max() <= 1.4
    assert (draws["sigma"] > 0).mean(0) == pytest.approx([0, 0.9], abs=0.02)
    assert (draws["solarize"]).mean(0) == pytest.approx([0, 0.2], abs=0.02)
    blurred = draws["sigma"][draws["sigma"] > 0]
    assert 0.1 <= blurred.min() < 0.12 and 1.98 < blurred.max() <= 2.0


def test_block_masks_have_ibots_statistics():
    """UltraDINO's setting: 256 crops of 14 x 14, half masked, ratios 0.1 to 0.5: about 7,448 patches (its own run)."""
    masks = data.draw_masks(0, 0, 128, np.arange(128), (14, 14), 0.5, (0.1, 0.5))
    shares = np.sort(masks.mean(1))
    assert (shares[:128] == 0).all() and (shares[128:] > 0).all()
    assert masks.sum() == pytest.approx(7448, rel=0.02)
    assert shares[128] == pytest.approx(0.1, abs=0.02) and shares[-1] == pytest.approx(0.5, abs=0.02)  # stratified
    other = data.draw_masks(0, 1, 128, np.arange(128), (14, 14), 0.5, (0.1, 0.5))
    assert (masks.any(1) != other.any(1)).any()
    assert 40 < masks[:128].any(1).sum() < 88  # first crops as often as second ones


@pytest.mark.parametrize("batch, share, probability", [(32, 32, 0.5), (1024, 128, 0.5), (7, 7, 0.3), (6, 3, 0.9), (5, 5, 1),
                                                       (64, 16, 0.25), (8, 4, 0.5), (9, 3, 0.5), (1, 1, 0.5), (4, 2, 0.1), (8, 8, 0)])
def test_masks_are_dealt_evenly(batch, share, probability):
    """Every stratum is dealt once, and no rank's share of a batch has more masked patches than the bound."""
    masked, ratio = int(2 * batch * probability), (0.1, 0.5)
    edges, bound = np.linspace(*ratio, masked + 1), data.mask_bound(share, batch, 196, probability, ratio)
    for step in range(5):
        dealt = data.deal_strata(philox(0, step, MASKS), batch, masked)
        assert sorted(dealt[dealt >= 0]) == list(range(masked))
        for first in range(0, batch, share):
            mine = dealt[:, first:first + share]
            most = sum(int(196 * edges[stratum + 1]) for stratum in mine[mine >= 0])
            assert most <= bound
            if probability == 0.5 and share % 2 == 0:  # no pair is torn: a patch a crop lost to rounding, no more
                assert bound <= most + 2 * share


def one_block_mask(tries, grid, target):
    """iBOT's loop over rectangles, for one mask."""
    mask, failed = np.zeros(grid, bool), 0
    for area, aspect, top, left in tries:
        remaining = min(target - mask.sum(), mask.size // 2)
        if remaining <= 0 or failed == 10:
            break
        area, aspect = np.interp(area, (0, 1), sorted((4, remaining))), np.exp(np.log(0.3) * (1 - 2 * aspect))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        new = np.zeros(grid, bool)
        if h < grid[0] and w < grid[1]:
            top, left = int(top * (grid[0] - h + 1)), int(left * (grid[1] - w + 1))
            new[top:top + h, left:left + w] = True
        added = (new & ~mask).sum()
        failed = 0 if 0 < added <= remaining else failed + 1
        mask |= new & (failed == 0)
    return mask


@pytest.mark.parametrize("grid", [(14, 14), (6, 9), (3, 3), (1, 5), (37, 37)])
def test_block_masks_are_ibots(grid):
    patches = grid[0] * grid[1]
    tries, targets = philox(0, 0, MASKS).random((60, data.MASK_TRIES, 4)), np.arange(60) * patches // 110
    masks = data.block_masks(tries, grid, targets)
    for mask, *one in zip(masks, tries, targets):
        assert (mask == one_block_mask(one[0], grid, one[1])).all()
    assert (masks.sum((1, 2)) <= targets).all() and not masks[targets == 0].any()
    if patches > 9:  # a mask that has no room for another rectangle lacks few patches
        assert (targets - masks.sum((1, 2))).mean() < 0.4


def test_block_masks_are_blocks():
    mask = data.block_masks(philox(0, 0, MASKS).random((1, data.MASK_TRIES, 4)), (14, 14), np.array([60]))[0]
    inner = mask[1:-1, 1:-1]
    neighbours = (mask[:-2, 1:-1] * 1 + mask[2:, 1:-1] + mask[1:-1, :-2] + mask[1:-1, 2:])[inner]
    assert neighbours.mean() > 2.5  # of 4; independent patches at this ratio would have 1.2


def test_masks_do_not_depend_on_who_asks():
    everyone = data.draw_masks(7, 3, 32, np.arange(32), (6, 6), 0.5, (0.1, 0.5))
    some = data.draw_masks(7, 3, 32, np.array([5, 30]), (6, 6), 0.5, (0.1, 0.5))
    assert (some == everyone[[5, 30, 32 + 5, 32 + 30]]).all() and some.any()


# ---------------------------------------------------------------- order and batches

class FakePack:
    def __init__(self, images, canvas=32):
        rng = np.random.default_rng(0)
        self.canvases = rng.integers(0, 255, (images, canvas, canvas), dtype=np.uint8)
        self.sizes, self.groups = np.tile([40, 30], (images, 1)), np.arange(images)

    def __len__(self):
        return len(self.canvases)


def batch_args(**changed):
    return Namespace(**{**dict(batch_size_per_gpu=4, accum_iter=1, seed=0, global_crops_size=16, global_crops_scale=(0.5, 1),
                               local_crops_number=2, local_crops_size=8, local_crops_scale=(0.2, 0.5), patch_size=4,
                               blur_compat=True, mask_sample_probability=0.5, mask_ratio_min_max=(0.1, 0.5),
                               flip="vertical", mask_tissue=False), **changed})


def test_every_image_once_an_epoch_across_batches():
    pack = FakePack(10)
    batches = data.PretrainBatches(pack, batch_args())
    seen = np.concatenate([batches.indices(step) for step in range(5)])  # 20 draws of 10 images, batches of 4
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_a_batch_larger_than_the_data_repeats_it():
    pack = FakePack(3)
    assert np.bincount(data.PretrainBatches(pack, batch_args(batch_size_per_gpu=9)).indices(0)).tolist() == [3, 3, 3]


def test_ranks_and_micro_batches_share_one_global_batch():
    pack = FakePack(40)
    whole = data.PretrainBatches(pack, batch_args(batch_size_per_gpu=8))[3][0]
    ranks = [data.PretrainBatches(pack, batch_args(), rank, 2)[3][0] for rank in range(2)]
    micros = data.PretrainBatches(pack, batch_args(accum_iter=2))[3]
    for parts in (ranks, micros):
        for key in whole:
            if key == "masks":  # crop-major: (2, b, P)
                joined = torch.cat([part[key].view(2, 4, -1) for part in parts], dim=1).flatten(0, 1)
            elif key.startswith("mask_"):
                continue
            else:
                joined = torch.cat([part[key] for part in parts])
            assert torch.equal(joined, whole[key]), key
    assert whole["mask_weight"].sum() == pytest.approx(whole["masks"].any(1).sum().item())
    real = whole["mask_weight"] > 0
    assert torch.equal(whole["masks"].flatten().nonzero()[:, 0], whole["mask_indices"][real])
    sizes = {len(batch["mask_indices"]) for step in range(9) for batch in data.PretrainBatches(pack, batch_args(accum_iter=2))[step]}
    assert len(sizes) == 1 and not real[-1]  # padded to one size


def test_blur_compat_swaps_the_probabilities():
    pack = FakePack(40)
    compat, written = (data.PretrainBatches(pack, batch_args(batch_size_per_gpu=256, blur_compat=flag))[0][0]
                       for flag in (True, False))
    assert (compat["global_sigma"] > 0).float().mean(0).numpy() == pytest.approx([0, 0.9], abs=0.06)
    assert (written["global_sigma"] > 0).float().mean(0).numpy() == pytest.approx([1, 0.1], abs=0.06)


def test_drawing_and_cropping_a_real_batch_shape():
    pack = FakePack(40)
    micro = data.PretrainBatches(pack, batch_args())[0][0]
    draws = {key[len("local_"):]: value for key, value in micro.items() if key.startswith("local_")}
    crops = data.make_crops(micro["canvases"], draws, 8, 0.5, 0.25)
    assert crops.shape == (8, 1, 8, 8) and crops.isfinite().all() and crops.abs().max() <= 2.001


# ---------------------------------------------------------------- masked patches that show tissue

def tissue_batch(**changed):
    """Micro-batches of images of every brightness around the threshold, black in part, one of them all black."""
    pack, rng = FakePack(24), np.random.default_rng(1)
    pack.canvases = (pack.canvases * rng.random((24, 1, 1)) ** 3).astype(np.uint8)
    for image, black in enumerate(rng.integers(0, 24, 24)):
        pack.canvases[image, :black] = 0
    pack.canvases[5] = 0
    return data.PretrainBatches(pack, batch_args(batch_size_per_gpu=24, mask_tissue=True, **changed))


@pytest.mark.parametrize("flip", ["vertical", "horizontal"])
def test_tissue_weights_equal_a_plain_loop(flip):
    """98th percentile of each masked patch, cut but not jittered, above 10; then 1 / their number in the crop."""
    batches = tissue_batch(flip=flip, mask_sample_probability=0.9)
    ours, = data.to_device(batches[0], torch.device("cpu"), batches.args, 0.3, 0.2)
    given, = batches[0]
    plain = dict(box=given["global_box"], flip=given["global_flip"], **{
        key: torch.full_like(given["global_flip"], value) for key, value in (
            ("brightness", 1), ("contrast", 1), ("contrast_first", 0), ("sigma", 0), ("solarize", 0))})
    crops = data.make_crops(given["canvases"], plain, 16, 0.0, 1 / 255, flip)[:, 0].numpy()
    expected = np.zeros(given["masks"].shape, np.float32)
    for crop, mask in enumerate(given["masks"].numpy()):
        shown = [patch for patch in mask.nonzero()[0] if np.percentile(
            crops[crop, patch // 4 * 4:, patch % 4 * 4:][:4, :4], 98, method="inverted_cdf") > 10]
        expected[crop, shown] = 1 / max(len(shown), 1)
    masked = given["masks"].sum().item()
    expected = torch.from_numpy(expected).flatten()[given["mask_indices"]]
    assert 0.2 * masked < (expected[:masked] > 0).sum() < 0.8 * masked
    assert torch.allclose(ours["mask_weight"][:masked], expected[:masked], rtol=1e-6, atol=0)
    assert (ours["mask_weight"][masked:] == 0).all() and len(expected) > masked  # padding
    assert ours["tissue"].item() == pytest.approx((expected[:masked] > 0).sum().item() / masked)


def test_black_half_has_no_weight():
    """Whole frames, black below row 12 of 32: the two lower rows of patches count nothing, the others sum to 1."""
    batches = tissue_batch(mask_sample_probability=1, flip="none")
    batch = batches[0]
    batch[0]["canvases"][:], batch[0]["canvases"][:, 12:], batch[0]["canvases"][5] = 90, 0, 0
    batch[0]["global_box"][:] = torch.tensor([0.0, 0, 32, 32])
    micro, = data.to_device(batch, torch.device("cpu"), batches.args, 0.3, 0.2)
    weight = torch.zeros(micro["masks"].numel()).index_add(0, micro["mask_indices"], micro["mask_weight"]).view(48, 4, 4)
    masks = micro["masks"].view(48, 4, 4)
    assert masks[:, 2:].any() and (weight[:, 2:] == 0).all() and (weight[~masks] == 0).all()
    counted = masks[:, :2].any((1, 2))
    counted[[5, 24 + 5]] = False  # the black image
    assert counted.sum() > 24 and torch.allclose(weight.sum((1, 2)), counted.float())


def test_padding_has_no_weight_where_the_first_patch_is_masked():
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[0, [0, 4]] = masks[3, 2] = True
    micro = dict(masks=masks, mask_indices=torch.tensor([0, 4, 29, 0, 0]), mask_weight=torch.tensor([0.5, 0.5, 1, 0, 0]))
    for tissue, weight, share in (([0, 4, 29], [0.5, 0.5, 1, 0, 0], 1), ([0, 1, 2], [1, 0, 0, 0, 0], 1 / 3),
                                  ([], [0] * 5, 0)):
        shown = torch.zeros(36, dtype=torch.bool)
        shown[tissue] = True
        ours = data.weigh_tissue(micro, shown.view(4, 9))
        assert ours[0].tolist() == weight and ours[1].item() == pytest.approx(share)


def test_without_the_flag_the_weights_stay():
    batches = tissue_batch()
    batches.args.mask_tissue = False
    micro, = data.to_device(batches[0], torch.device("cpu"), batches.args, 0.3, 0.2)
    assert torch.equal(micro["mask_weight"], batches[0][0]["mask_weight"]) and "tissue" not in micro


def test_tissue_is_found_without_looking_at_numbers():
    """No shape depends on pixels and none is read on the host, or tensors without numbers would raise."""
    batches, fake = tissue_batch(), FakeTensorMode()
    real, = data.to_device(batches[0], torch.device("cpu"), batches.args, 0.3, 0.2)
    with fake:
        batch = [{key: fake.from_tensor(value) for key, value in micro.items()} for micro in batches[0]]
        micro, = data.to_device(batch, torch.device("cpu"), batches.args, 0.3, 0.2)
    assert {key: value.shape for key, value in micro.items()} == {key: value.shape for key, value in real.items()}
