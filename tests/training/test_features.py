"""Images read once, features of truncated networks, a cache that is right or made anew, what lies outside the fan."""

import copy
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from frames import images
from frames.images import Frame, resize_square
from frames.leakage import content_hash, perceptual_hash
from labelled import store
from model import VisionTransformer
from training import features, probes

CPU = torch.device("cpu")
CONFIG = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=6, num_heads=2, init_values=0.5,
              num_register_tokens=2)


def network(**changes):
    torch.manual_seed(1)
    return VisionTransformer(**{**CONFIG, **changes}).eval()


def about(**changes):
    return {"mean": 0.3, "std": 0.2, "digest": "a" * 64, "config": CONFIG, "path": "last.pt", **changes}


def noise(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), np.uint8)


# ---------------------------------------------------------------- images

def test_images_are_read_once_for_all_sizes_and_hashed_as_on_screen():
    frames, loaded = [noise(1, 20 + i, seed=i)[0] for i in range(5)], []

    def load(i):
        loaded.append(i)
        return Frame(255 - frames[i], frames[i])

    images = store.Images(5, load)
    squares = images.read([16, 24])
    assert sorted(loaded) == [0, 1, 2, 3, 4] and squares.keys() == {16, 24}
    whole = Frame(255 - frames[2], frames[2]).whole
    assert images.content[2] == content_hash(whole) and (images.looks[2] == perceptual_hash(whole)).all()
    grey = Frame(255 - frames[2], frames[2]).grey
    assert (squares[16][2] == resize_square(grey, 16)).all() and (squares[24][2] == resize_square(grey, 24)).all()
    assert images.at(24) is squares[24] and len(loaded) == 5, "a size that is there was read again"
    assert images.at(8).shape == (5, 8, 8) and len(loaded) == 10


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png: cannot be read .*--exclude"):
        store.Images(1, lambda i: images.read_image(str(tmp_path / "a.png"))).at(8)


# ---------------------------------------------------------------- features

def test_features_are_class_tokens_of_the_last_blocks_and_the_mean_patch():
    """Against networks whose last blocks were cut off, an image at a time."""
    backbone, canvases = network(), noise(5)
    found = features.extract(backbone, canvases, 0.3, 0.2, 2, CPU)  # the last batch holds one
    assert found.shape == (5, 5, 16) and found.dtype == torch.float32
    for i, canvas in enumerate(canvases):
        x = (torch.from_numpy(canvas)[None, None] / 255 - 0.3) / 0.2
        for row, depth in enumerate((3, 4, 5, 6)):
            cut = copy.deepcopy(backbone)
            cut.blocks = cut.blocks[:depth]
            with torch.no_grad():
                tokens = cut.forward_features(x)
            torch.testing.assert_close(found[i, row], tokens["x_norm_clstoken"][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[i, 4], tokens["x_norm_patchtokens"][0].mean(0), atol=1e-5, rtol=1e-4)
    vector = features.few_shot_vector(found)
    assert torch.equal(vector, torch.cat((found[:, 3], found[:, 4]), 1))
    assert torch.equal(features.few_shot_vector(found[:, :1]), found[:, 0])


def test_features_of_fewer_than_four_blocks():
    assert features.extract(network(depth=2), noise(3), 0.3, 0.2, 8, CPU).shape == (3, 3, 16)
    assert list(probes.feature_variants(features.extract(network(depth=1), noise(3), 0.3, 0.2, 8, CPU))) == [
        "last 1 block", "last 1 block + average pool"]


# ---------------------------------------------------------------- the cache

@pytest.fixture
def counted(monkeypatch):
    """How many images each call of `extract` looked at."""
    calls, extract = [], features.extract

    def counting(backbone, canvases, *rest):
        calls.append(len(canvases))
        return extract(backbone, canvases, *rest)

    monkeypatch.setattr(features, "extract", counting)
    return calls


def test_what_was_computed_is_read(tmp_path, counted):
    folder, canvases = str(tmp_path / "new" / "cache"), noise(6)
    backbone, info = network(), about()
    first = features.cached_features(backbone, info, canvases, 4, CPU, folder)
    assert torch.equal(first, features.extract(backbone, canvases, 0.3, 0.2, 4, CPU))
    counted.clear()
    assert torch.equal(features.cached_features(None, info, canvases, 4, CPU, folder), first)  # no network is needed
    order = np.array([5, 0, 3, 3])
    assert torch.equal(features.cached_features(None, info, canvases[order], 4, CPU, folder), first[order])
    assert counted == [], "the network was asked again"
    more = np.concatenate((canvases[2:4], noise(2, seed=9)))
    found = features.cached_features(backbone, info, more, 4, CPU, folder)
    assert counted == [2], "only new images are computed"
    assert torch.equal(found[:2], first[2:4])
    torch.testing.assert_close(found, features.extract(backbone, more, 0.3, 0.2, 4, CPU))
    features.cached_features(None, info, np.concatenate((canvases, more)), 4, CPU, folder)  # old ones were kept
    assert len(os.listdir(folder)) == 1


def test_equal_images_are_computed_once(tmp_path, counted):
    canvases = noise(2)[[0, 1, 0, 0]]
    found = features.cached_features(network(), about(), canvases, 4, CPU, str(tmp_path))
    assert counted == [2] and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("change", [dict(digest="b" * 64), dict(mean=0.31), dict(std=0.21),
                                    dict(config={**CONFIG, "norm_eps": 1e-5})], ids=str)
def test_another_checkpoint_or_normalisation_is_computed(tmp_path, counted, change):
    features.cached_features(network(), about(), noise(3), 4, CPU, str(tmp_path))
    features.cached_features(network(), about(**change), noise(3), 4, CPU, str(tmp_path))
    assert counted == [3, 3] and len(os.listdir(tmp_path)) == 2


def test_another_image_size_or_a_single_pixel_is_computed(tmp_path, counted):
    canvases = noise(3)
    for changed in (canvases, noise(3, 24)):
        features.cached_features(network(), about(), changed, 4, CPU, str(tmp_path))
    canvases[1, 0, 0] ^= 1
    features.cached_features(network(), about(), canvases, 4, CPU, str(tmp_path))
    assert counted == [3, 3, 1]


@pytest.mark.parametrize("folder, digest", [(None, "a" * 64), ("cache", None)])
def test_nothing_is_kept_of_random_networks_or_without_a_folder(tmp_path, monkeypatch, counted, folder, digest):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        features.cached_features(network(), about(digest=digest), noise(3), 4, CPU, folder)
    assert counted == [3, 3] and not os.listdir(tmp_path)


def test_a_damaged_cache_is_made_anew(tmp_path, counted):
    """Cut off, emptied, another file, and a byte changed anywhere: the same features, never wrong ones."""
    backbone, canvases = network(), noise(3)
    first = features.cached_features(backbone, about(), canvases, 4, CPU, str(tmp_path))
    path = tmp_path / os.listdir(tmp_path)[0]
    good, rng = path.read_bytes(), np.random.default_rng(0)
    broken = [b"", b"no archive", good[:len(good) // 2], good[:-30], good + b"x"]
    version = good.index(b"PK\x01\x02") + 6  # of the format, in the archive's table of contents
    for place in [version, *rng.integers(len(good), size=60).tolist()]:
        broken.append(good[:place] + bytes([good[place] ^ int(rng.integers(1, 256))]) + good[place + 1:])
    for content in broken:
        path.write_bytes(content)
        assert torch.equal(features.cached_features(backbone, about(), canvases, 4, CPU, str(tmp_path)), first)
    path.write_bytes(b"")
    counted.clear()
    features.cached_features(backbone, about(), canvases, 4, CPU, str(tmp_path))
    features.cached_features(None, about(), canvases, 4, CPU, str(tmp_path))
    assert counted == [3], "the new one was not kept"
    np.savez(path, other=np.zeros(3))
    features.cached_features(backbone, about(), canvases, 4, CPU, str(tmp_path))
    assert counted == [3, 3] and len(os.listdir(tmp_path)) == 1


def test_features_that_are_not_finite_are_an_error_and_not_kept(tmp_path):
    for folder in (str(tmp_path), None):
        with pytest.raises(ValueError, match="last.pt: features are not finite"):
            features.cached_features(network(), about(mean=float("nan")), noise(2), 4, CPU, folder)
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- outside the fan

def screen(label, seed, inside=None, corner=True):
    """240 x 320 with a fan of speckle, in which a bright disc tells `inside`, and the label as text beside it."""
    image = Image.new("L", (320, 240))
    draw = ImageDraw.Draw(image)
    fan = Image.new("L", (320, 240))
    ImageDraw.Draw(fan).pieslice((40, -170, 280, 230), 50, 130, fill=1)
    speckle = np.random.default_rng(seed).integers(40, 160, (240, 320))
    grey = np.where(np.asarray(fan), speckle, 0).astype(np.uint8)
    if inside is not None:
        y, x = (180, 130) if inside else (180, 190)
        grey[y - 20:y + 20, x - 20:x + 20] = 255
    if corner:
        draw.text((4, 205), ("HEAD", "LEGS", "BELLY")[label], fill=255, font_size=15)
    return np.maximum(grey, np.asarray(image))


def vectors_outside(frames, groups):
    def load(i):
        return Frame(frames[i], frames[i])

    show, partly = store.outside_fans(load, groups)
    squares = store.Images(len(frames), load, show).at(64)
    return torch.from_numpy(squares).float().flatten(1), partly


def accuracy(x, labels, shots=3, episodes=10):
    rng, right = np.random.default_rng(0), []
    for _ in range(episodes):
        support = np.stack([rng.choice(np.flatnonzero(labels == k), shots, replace=False) for k in np.unique(labels)])
        predicted = probes.nearest_mean(x, torch.from_numpy(support)[None])[0].numpy()
        query = ~np.isin(np.arange(len(labels)), support)
        right.append((predicted == labels)[query].mean())
    return np.mean(right)


def test_a_label_written_beside_the_fan_is_found():
    labels = np.arange(24) % 3
    x, partly = vectors_outside([screen(label, i) for i, label in enumerate(labels)], np.arange(24))
    assert partly.all() and accuracy(x, labels) > 0.95


def test_what_only_the_fan_shows_is_not():
    labels = np.arange(24) % 2
    frames = [screen(0, i, inside=label) for i, label in enumerate(labels)]
    whole = torch.from_numpy(np.stack([resize_square(frame, 64) for frame in frames])).float().flatten(1)
    assert accuracy(whole, labels) > 0.95
    assert accuracy(vectors_outside(frames, np.arange(24))[0], labels) < 0.65


def test_outside_is_kept_as_it_is_and_the_fan_takes_the_background():
    frame = np.where(screen(0, 1, corner=False) > 0, screen(0, 1, corner=False), 17)  # a grey background
    frame[200:220, 4:60] = np.where(screen(2, 1)[200:220, 4:60] > 0, 255, 17)  # text
    show, partly = store.outside_fans(lambda i: Frame(frame, frame), ["a"])
    shown = show(0, frame)
    assert shown.dtype == np.uint8 and shown.shape == frame.shape and partly.tolist() == [True]
    assert (shown[200:220, 4:60] == frame[200:220, 4:60]).all() and (shown[60:200, 100:220] == 17).all()
    assert set(np.unique(shown)) == {17, 255}


def test_images_of_a_group_share_the_fan_of_their_maximum():
    """A frame dark on one side alone shows its lit side; the clip's other frames tell that all of it is fan."""
    left, right = screen(0, 1, corner=False), screen(0, 2, corner=False)
    left[:, 165:], right[:, :155] = 0, 0
    left[150:154, 230:234] = 200  # a lone echo in the dark half

    def load(i):
        frame = (left, right)[i]
        return Frame(frame, frame)

    alone, _ = store.outside_fans(load, ["a", "b"])
    clip, _ = store.outside_fans(load, ["a", "a"])
    assert alone(0, left)[150:154, 230:234].all(), "this still's fan is its lit half"
    assert not clip(0, left)[150:154, 230:234].any() and not clip(1, right).any()


def test_images_of_a_group_but_of_another_size_have_their_own_fan():
    small, large = screen(0, 1, corner=False), screen(0, 2, corner=False).repeat(2, 0).repeat(2, 1)
    frames = [small, large, small]
    show, partly = store.outside_fans(lambda i: Frame(frames[i], frames[i]), ["a"] * 3)
    assert partly.all() and [show(i, frame).shape for i, frame in enumerate(frames)] == [f.shape for f in frames]
    assert not show(1, large).any()


def test_an_image_that_is_all_fan_has_no_outside():
    full = np.random.default_rng(0).integers(0, 256, (60, 80)).astype(np.uint8)
    frames = [full, screen(0, 1)]
    show, partly = store.outside_fans(lambda i: Frame(frames[i], frames[i]), ["a", "b"])
    assert partly.tolist() == [False, True] and len(np.unique(show(0, full))) == 1
