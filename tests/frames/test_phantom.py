"""Phantoms: reproducible, balanced, no plane betrayed by brightness or outline, hardly readable from raw pixels."""

import numpy as np
import pytest
from PIL import Image
from stage_tools import run_tool

from frames import phantom

PLANES = len(phantom.PLANES)


@pytest.fixture(scope="module")
def frames():
    return phantom.phantom_images(1080, seed=5)


def five_shot(features, labels, groups, episodes=150):
    """Accuracy of the nearest class mean, five training images of five patients per plane, tested on other patients."""
    generator, scores = np.random.default_rng(0), []
    for _ in range(episodes):
        support = np.array([[generator.choice(np.flatnonzero(groups == group)) for group in
                             generator.choice(np.unique(groups[labels == label]), 5, replace=False)]
                            for label in range(PLANES)])  # (planes, 5)
        shots = features[support]
        mean, std = shots.mean((0, 1)), shots.std((0, 1)) + 1e-3
        centres = ((shots - mean) / std).mean(1)  # (planes, features)
        query = generator.choice(np.flatnonzero(~np.isin(groups, groups[support])), 200, replace=False)
        distance = ((((features[query] - mean) / std)[:, None] - centres) ** 2).sum(-1)
        scores.append(np.mean(distance.argmin(1) == labels[query]))
    return np.mean(scores)


def test_pure_function_of_seed():
    first, again, other = (phantom.phantom_images(30, seed=seed)[0] for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not any(np.array_equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("size", [32, 64, 96])
def test_an_image_does_not_depend_on_how_many_are_drawn(size):
    images, labels, groups = phantom.phantom_images(101, size, seed=2)
    assert images.shape == (101, size, size) and images.dtype == np.uint8
    for n in (0, 1, 5, 7, 49, 100):
        fewer, fewer_labels, fewer_groups = phantom.phantom_images(n, size, seed=2)
        assert np.array_equal(fewer, images[:n]), n
        assert np.array_equal(fewer_labels, labels[:n]) and np.array_equal(fewer_groups, groups[:n])


def test_all_images_differ(frames):
    assert len({image.tobytes() for image in frames[0]}) == len(frames[0])


@pytest.mark.parametrize("n", [6, 54, 100, 1003])
def test_planes_are_balanced(n):
    counts = np.bincount(phantom.patients(np.arange(n))[0], minlength=PLANES)
    assert counts.max() - counts.min() <= 1


def test_a_group_is_a_few_frames_of_one_plane(frames):
    _, labels, groups = frames
    for group in np.unique(groups):
        assert len(set(labels[groups == group])) == 1
    assert set(np.bincount(groups)) == {2, 3, 4}
    keys = list(zip(groups, phantom.patients(np.arange(len(groups)))[2]))
    assert len(set(keys)) == len(keys), "two frames of a patient share their random draws"


def test_a_patient_shares_its_anatomy_not_its_view():
    parameters, noise = phantom.draw_parameters(np.array([0, 6, 12, 18]), 16, seed=0)  # three frames, then the next
    for name in phantom.PATIENT:
        values = parameters[name].ravel()
        assert values[0] == values[1] == values[2] != values[3], name
    for name in phantom.VIEW:
        assert len(set(parameters[name].ravel())) == 4, name
    assert not np.array_equal(noise[:, 0], noise[:, 1]) and not np.array_equal(noise[0, 0], noise[1, 0])


def test_nuisance_draws_do_not_know_the_plane():
    indices = np.arange(3240)
    parameters, _ = phantom.draw_parameters(indices, 4, seed=1)
    labels, groups, _ = phantom.patients(indices)
    values = np.stack([parameters[name].ravel() for name in (*phantom.PATIENT, *phantom.VIEW)], 1)
    values = (values - values.mean(0)) / values.std(0)
    once = np.unique(groups, return_index=True)[1]  # frames of a patient are no independent draws
    for label in range(PLANES):
        chosen = values[once][labels[once] == label]
        assert np.abs(chosen.mean(0)).max() * len(chosen) ** 0.5 < 4.5, phantom.PLANES[label]


def test_brightness_and_outline_do_not_tell_the_plane(frames):
    images, labels, groups = frames
    pixels = images.reshape(len(images), -1).astype(np.float32)
    statistics = np.stack([pixels.mean(1), pixels.std(1), np.percentile(pixels, 90, 1), (pixels > 0).mean(1)], 1)
    assert five_shot(statistics, labels, groups) < 0.21  # chance is 0.167


def test_few_raw_pixels_tell_little_but_something(frames):
    images, labels, groups = frames
    score = five_shot(images.reshape(len(images), -1).astype(np.float32) / 255, labels, groups, episodes=60)
    assert 0.19 < score < 0.35  # chance is 0.167


def test_sector_is_black_outside_and_speckled_inside(frames):
    images = frames[0]
    assert (images[:, :2, :2] == 0).all() and (images[:, 0, -2:] == 0).all()
    visible = (images > 0).mean((1, 2))
    assert 0.35 < visible.min() and visible.max() < 0.95
    middle = images[:, 16:48, 16:48].astype(np.float32)
    assert np.abs(np.diff(middle, axis=2)).mean((1, 2)).min() > 1


@pytest.mark.slow
def test_a_small_network_learns_the_planes():
    import torch
    from torch import nn
    torch.manual_seed(0)
    (x, y, _), (test_x, test_y, _) = phantom.phantom_images(9000, seed=0), phantom.phantom_images(900, seed=1)
    x, test_x = (torch.tensor(images)[:, None].float() / 64 - 1 for images in (x, test_x))
    y, test_y = torch.tensor(y), torch.tensor(test_y)
    widths = (1, 16, 32, 64, 96)
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in
              (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, PLANES))
    epochs, steps = 6, len(x) // 100
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        assert (network(test_x).argmax(1) == test_y).float().mean() >= 0.9


def test_contact_sheet(tmp_path):
    done = run_tool("phantom_sheet", tmp_path, "sheet.png", "--size", "40")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "sheet.png").height >= 40 * PLANES
    done = run_tool("phantom_sheet", tmp_path, "sheet.png", "--sizes", "40")
    assert done.returncode == 2 and "--sizes" in done.stderr
