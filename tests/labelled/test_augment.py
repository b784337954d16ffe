"""Fine-tuning's augmentations: against written-out loops over one image, their statistics, and who draws what."""

import numpy as np
import pytest
import torch
from scipy import stats

from frames.packed import AUGMENT, MIX, BatchRows, philox
from labelled import augment as fine

NEVER = dict(light=0, gamma=0, noise=0, distortion=0, flip=0)


@pytest.fixture
def images():
    """uint8 (6, 40, 40): smooth structure and speckle over the full range."""
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(40), 2 * np.arange(40)) * 1.5
    return torch.from_numpy((ramp + 60 * rng.random((6, 40, 40))).clip(0, 255).astype(np.uint8))


def drawn(batch=6, seed=0, step=0, **probabilities):
    """draw_augment's dict as tensors, nothing but the named augmentations."""
    draws = fine.draw_augment(philox(seed, step, AUGMENT), batch, **{**NEVER, **probabilities})
    return {key: torch.from_numpy(value) for key, value in draws.items()}


def in_grey(images, draws):
    """augment without normalisation, in 0..255: (B, h, w)."""
    return fine.augment(images, draws, 0.0, 1 / 255)[:, 0]


# ---------------------------------------------------------------- draws

def test_draws_are_a_function_of_seed_and_step_and_ranks_take_rows():
    whole = fine.draw_augment(philox(3, 7, AUGMENT), 12)
    assert {value.dtype for key, value in whole.items() if key != "noise_seed"} == {np.dtype(np.float32)}
    assert all(len(value) == 12 for value in whole.values())
    for images in (np.arange(0, 4), np.arange(4, 12)):
        own = fine.draw_augment(BatchRows(philox(3, 7, AUGMENT), 12, images), len(images))
        for key, value in own.items():
            assert np.array_equal(value, whole[key][images]), key
    for seed, step in ((3, 8), (4, 7)):
        other = fine.draw_augment(philox(seed, step, AUGMENT), 12)
        assert not np.array_equal(other["gamma"], whole["gamma"])
        assert not set(other["noise_seed"]) & set(whole["noise_seed"])
    mixes = [fine.draw_mix(philox(3, step, MIX), 32, 0.8, 1.0) for step in (7, 7, 8)]
    assert mixes[0] == mixes[1] != mixes[2]


def test_ranges_and_shares():
    draws = fine.draw_augment(philox(0, 0, AUGMENT), 20_000)
    lit, bent = draws["contrast"] != 1, (draws["grid"] != 0).any((1, 2))
    assert np.array_equal(lit, draws["brightness"] != 0)  # one coin for both
    for happened in (lit, draws["gamma"] != 1, draws["noise"] > 0, bent, draws["flip"] == 1):
        assert abs(happened.mean() - 0.5) < 0.02  # 5 standard deviations
    uniforms = [(draws["contrast"][lit] - 0.7) / 0.6, (draws["brightness"][lit] / 255 + 0.3) / 0.6,
                (draws["gamma"][draws["gamma"] != 1] - 0.8) / 0.4, (draws["noise"][draws["noise"] > 0] ** 2 - 10) / 40]
    for values in uniforms:
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    coins = [lit, draws["gamma"] != 1, draws["noise"] > 0, bent, draws["flip"]]
    assert abs(np.corrcoef(coins) - np.eye(5)).max() < 0.04
    lengths = np.diff(draws["grid"][bent] + np.linspace(0, 1, 6), axis=-1)  # (n, 2, 5) shares of the side
    assert np.allclose(lengths.sum(-1), 1, atol=1e-6) and (draws["grid"][..., [0, -1]] == 0).all()
    assert (lengths.max(-1) / lengths.min(-1)).max() <= 1.3 / 0.7 + 1e-5
    assert (lengths.max(-1) / lengths.min(-1)).max() > 1.8 and abs(lengths.mean((0, 1)) - 0.2).max() < 0.001
    assert not np.allclose(draws["grid"][bent][:, 0], draws["grid"][bent][:, 1])  # rows and columns on their own


@pytest.mark.parametrize("name", NEVER)
def test_an_augmentation_can_be_switched_off_and_leaves_the_others_as_they_were(name):
    all_on = fine.draw_augment(philox(0, 0, AUGMENT), 50)
    one_off = fine.draw_augment(philox(0, 0, AUGMENT), 50, **{name: 0})
    keys = {"light": ["brightness", "contrast"], "distortion": ["grid"]}.get(name, [name])
    for key, value in all_on.items():
        assert np.array_equal(one_off[key], value) != (key in keys), key


# ---------------------------------------------------------------- pixels of one image

def test_nothing_drawn_changes_nothing(images):
    """To the bit before the normalisation, and so what training and evaluation see is the same."""
    draws = drawn()
    assert torch.equal(fine.warp(fine.relight(images.float(), draws), draws), images.float())
    assert torch.equal(fine.augment(images, draws, 0.3, 0.2), fine.normalise_only(images, 0.3, 0.2))
    expected = (images.numpy().astype(np.float64) / 255 - 0.3) / 0.2
    assert np.allclose(fine.normalise_only(images, 0.3, 0.2)[:, 0], expected, atol=1e-5)
    assert fine.augment(images, draws, 0.3, 0.2).shape == (6, 1, 40, 40)


def bilinear(image, rows, columns):
    """One image (h, w) at rows x columns, by np.interp along one axis after the other."""
    height, width = image.shape
    moved = np.stack([np.interp(rows, np.arange(height), image[:, x]) for x in range(width)], axis=1)
    return np.stack([np.interp(columns, np.arange(width), row) for row in moved])


def written_out(image, draws, number):
    """All of one image's augmentations but noise, after albumentations' definitions, in float64."""
    own = {key: value[number].double().numpy() for key, value in draws.items()}
    x = np.clip(image.astype(np.float64) * own["contrast"] + own["brightness"], 0, 255)
    x = np.clip(255 * (x / 255) ** own["gamma"], 0, 255)
    sources = []
    for shifts, size in zip(own["grid"], image.shape):  # output cells are equal, source cells are not
        borders = np.linspace(0, size, 6)
        sources.append(np.interp(np.arange(size) + 0.5, borders, borders + size * shifts) - 0.5)
    x = bilinear(x, *sources)  # outside 0 .. size - 1 np.interp repeats the border
    return x[:, ::-1] if own["flip"] else x


@pytest.mark.parametrize("size", [(40, 40), (31, 40), (40, 31)])
@pytest.mark.parametrize("names", [["light"], ["gamma"], ["distortion"], ["flip"],
                                   ["light", "gamma", "distortion", "flip"]])
def test_equals_a_written_out_loop(images, names, size):
    images = images[:, :size[0], :size[1]]
    draws = drawn(**dict.fromkeys(names, 1))
    ours = in_grey(images, draws).numpy()
    for number, image in enumerate(images.numpy()):
        expected = written_out(image, draws, number)
        assert np.abs(ours[number] - expected).max() < 0.02  # grey levels; positions are float32
        assert np.abs(ours[number] - image).mean() > 0.5  # and something happened


def test_levels_are_clamped_after_each_step():
    image = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).expand(1, 4, 4)
    draws = drawn(1)
    draws["brightness"] += 76.5
    assert in_grey(image, draws)[0, 0].tolist() == pytest.approx([76.5, 176.5, 255, 255], abs=1e-3)
    draws["brightness"] -= 2 * 76.5
    draws["gamma"] += 0.2  # of a negative level it would be nan
    dark = in_grey(image, draws)[0, 0]
    assert dark[0] == 0 and torch.allclose(dark[1:], 255 * (torch.tensor([23.5, 123.5, 178.5]) / 255) ** 1.2, atol=1e-2)
    draws = drawn(1, noise=1)
    noisy = fine.relight(torch.tensor([0.0, 255.0]).repeat(1, 64, 32), draws)
    assert noisy.min() == 0 and noisy.max() == 255 and 0.4 < (noisy % 255 == 0).float().mean() < 0.6


def test_slices_of_the_batch_give_the_same_rows(images, monkeypatch):
    draws = drawn(light=0.5, gamma=0.5, noise=1, distortion=0.5, flip=0.5)
    whole = fine.augment(images, draws, 0.2, 0.2)
    for own in (slice(0, 2), slice(2, 6)):
        part = fine.augment(images[own], {key: value[own] for key, value in draws.items()}, 0.2, 0.2)
        assert torch.equal(part, whole[own])
    monkeypatch.setattr(fine, "SLICE", 4)
    assert torch.equal(fine.augment(images, draws, 0.2, 0.2), whole)


# ---------------------------------------------------------------- noise

def test_noise_has_the_drawn_deviation():
    grey = torch.full((4, 64, 64), 128, dtype=torch.uint8)
    draws = drawn(4, noise=1)
    noise = in_grey(grey, draws) - 128
    assert torch.allclose(noise.std((1, 2)), draws["noise"], rtol=0.05)  # 5 standard errors of 64 x 64 values
    assert noise.mean((1, 2)).abs().max() < 5 * 7.1 / 64


def test_hashed_normals_are_normal_and_independent():
    seeds = torch.from_numpy(drawn(8)["noise_seed"].numpy())
    x = fine.hashed_normals(seeds, 101 * 101)  # an odd number
    assert x.shape == (8, 101 * 101) and x.isfinite().all()
    flat = x.flatten().double().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3 and abs(stats.kurtosis(flat)) < 0.1 and abs(flat).max() > 3.8
    limit = 5 / 101  # five standard deviations of a correlation
    assert abs(np.corrcoef(x.numpy()) - np.eye(8)).max() < limit  # between images
    assert abs(np.corrcoef(x.square().numpy()) - np.eye(8)).max() < limit
    field = x.view(8, 101, 101)
    half = -(-101 * 101 // 2)
    pairs = [(field[:, :, 1:], field[:, :, :-1]), (field[:, 1:], field[:, :-1]), (field[:, 2:, 1:], field[:, :-2, :-1]),
             (x[:, half:], x[:, :x.shape[1] - half])]  # the last: the two normals that share their uniforms
    for a, b in pairs:
        for power in (1, 2):
            correlation = np.corrcoef((a**power).flatten().numpy(), (b**power).flatten().numpy())[0, 1]
            assert abs(correlation) < 5 / np.sqrt(a.numel())
    spectrum = np.abs(np.fft.fft2(field.double().numpy())) ** 2 / 101**2  # white: exponential, no line stands out
    assert spectrum[:, 1:, 1:].max() < 25 and abs(spectrum[:, 1:, 1:].mean() - 1) < 0.02


def test_neighbouring_and_large_seeds_share_nothing():
    seeds = torch.tensor([0, 1, 2, 2**32, 2**32 + 1, 2**53 - 1])
    x = fine.hashed_normals(seeds, 10_000)
    assert abs(np.corrcoef(x.numpy()) - np.eye(6)).max() < 0.05
    assert x.abs().max() < 5.5  # none is 0 of 0
    assert len(set(x.flatten().tolist())) > 59_000  # and no image holds another's numbers, in another order


def test_the_hash_is_bijective_and_flips_half_the_bits():
    bits = torch.from_numpy(np.random.default_rng(0).choice(2**32, 2**14, replace=False))
    hashed = fine._scramble(bits)
    assert hashed.unique().numel() == 2**14 and hashed.min() >= 0 and hashed.max() < 2**32
    for bit in (0, 15, 31):
        changed = (hashed ^ fine._scramble(bits ^ 1 << bit)).numpy()
        flipped = np.stack([changed >> place & 1 for place in range(32)]).mean(1)
        assert abs(flipped - 0.5).max() < 0.03  # 7 standard deviations


def test_the_hash_equals_32_bit_arithmetic():
    """numpy's uint32 wraps, which is what the signed factors stand for."""
    x = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    y = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    y = (y ^ y >> np.uint32(15)) * np.uint32(0x846CA68B)
    y = y ^ y >> np.uint32(16)
    assert np.array_equal(fine._scramble(torch.from_numpy(x.astype(np.int64))).numpy(), y)


def test_no_noise_is_repeated_between_steps():
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    steps = torch.cat([in_grey(grey, drawn(3, step=step, noise=1)) - 128 for step in range(4)])  # (12, 32, 32)
    assert abs(np.corrcoef(steps.flatten(1).numpy()) - np.eye(12)).max() < 5 / 32
    again = in_grey(grey, drawn(3, step=2, noise=1)) - 128
    assert torch.equal(again, steps[6:9])


def test_one_pixel_images():
    image = torch.full((2, 1, 1), 7.0)
    assert torch.equal(fine.warp(image, drawn(2, distortion=1, flip=1)), image)


# ---------------------------------------------------------------- mixup and cutmix

def test_beta_moments_and_coin():
    draws = [fine.draw_mix(philox(0, step, MIX), 64, 0.8, 1.0) for step in range(4000)]
    mixup = np.array([draw["share"] for draw in draws if draw["box"] is None])
    assert abs(len(mixup) / 4000 - 0.5) < 0.04
    assert abs(mixup.mean() - 0.5) < 0.04 and abs(mixup.var() - 1 / (4 * 2.6)) < 0.01  # Beta(a, a): 1 / (4 (2 a + 1))
    assert stats.kstest(mixup, "beta", args=(0.8, 0.8)).pvalue > 1e-3
    sides = np.array([(box[2] - box[0], box[3] - box[1]) for box in (draw["box"] for draw in draws) if box])
    assert sides.max() > 56 and sides.min() >= 0 and np.corrcoef(sides.T)[0, 1] < 0.95  # clipped on their own


def test_cutmix_share_is_what_is_left():
    x = torch.stack((torch.zeros(1, 33, 33), torch.ones(1, 33, 33)))
    targets = fine.soft_targets(torch.tensor([0, 1]), 2, 0.0)
    clipped = 0
    for step in range(60):
        draws = fine.draw_mix(philox(1, step, MIX), 33, 0, 1.0)
        mixed, soft = fine.mix(x, targets, draws)
        assert draws["share"] == pytest.approx(1 - mixed[0].mean().item(), abs=1e-6)
        assert draws["share"] == pytest.approx(mixed[1].mean().item(), abs=1e-6)
        assert torch.allclose(soft, torch.stack((1 - mixed.mean((1, 2, 3)), mixed.mean((1, 2, 3))), dim=1), atol=1e-6)
        clipped += min(draws["box"]) == 0 or max(draws["box"]) == 33
    assert 10 < clipped < 60 and x[0].max() == 0  # the input is left as it was


def test_switches():
    def kinds(**how):
        draws = [fine.draw_mix(philox(0, step, MIX), 32, **how) for step in range(200)]
        return {"none" if draw["share"] == 1 and draw["box"] is None else "mixup" if draw["box"] is None else "cutmix"
                for draw in draws}
    assert kinds(mixup_alpha=0.8, cutmix_alpha=1.0) == {"mixup", "cutmix"}
    assert kinds(mixup_alpha=0.8, cutmix_alpha=0) == {"mixup"}
    assert kinds(mixup_alpha=0, cutmix_alpha=1.0) == {"cutmix"}
    assert kinds(mixup_alpha=0, cutmix_alpha=0) == kinds(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0) == {"none"}
    assert kinds(mixup_alpha=0.8, cutmix_alpha=0, prob=0.5) == {"mixup", "none"}
    for wrong in (dict(mixup_alpha=-1, cutmix_alpha=1), dict(mixup_alpha=0, cutmix_alpha=0, prob=1.5)):
        with pytest.raises(ValueError, match="must be 0"):
            kinds(**wrong)


def test_soft_targets():
    soft = fine.soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(soft, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    assert torch.equal(fine.soft_targets(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
@pytest.mark.parametrize("how", [dict(mixup_alpha=0.8, cutmix_alpha=0), dict(mixup_alpha=0, cutmix_alpha=1.0)])
def test_partners_are_neighbours(how, batch):
    x, labels = torch.rand(batch, 1, 16, 16), torch.randint(0, 3, (batch,))
    targets = fine.soft_targets(labels, 3, 0.1)
    draws = fine.draw_mix(philox(0, 4, MIX), 16, **how)
    assert 0.1 < draws["share"] < 0.9
    mixed, soft = fine.mix(x, targets, draws)
    assert torch.allclose(soft.sum(1), torch.ones(batch), atol=1e-6)
    for i in range(batch):
        j = i if i == batch - 1 and batch % 2 else i + 1 if i % 2 == 0 else i - 1
        expected = draws["share"] * x[i] + (1 - draws["share"]) * x[j]
        if draws["box"]:
            top, left, bottom, right = draws["box"]
            expected = x[i].clone()
            expected[:, top:bottom, left:right] = x[j][:, top:bottom, left:right]
        assert torch.allclose(mixed[i], expected, atol=1e-6)
        assert torch.allclose(soft[i], draws["share"] * targets[i] + (1 - draws["share"]) * targets[j], atol=1e-6)
    for own in (slice(0, batch // 2 // 2 * 2), slice(batch // 2 // 2 * 2, batch)):  # ranks with even shares
        part, part_soft = fine.mix(x[own], targets[own], draws)
        assert torch.equal(part, mixed[own]) and torch.equal(part_soft, soft[own])
