"""Features of truncated networks, and a cache that is right or made anew."""

import copy
import os

import numpy as np
import pytest
import torch
from picture_tools import noise

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
