"""A pack as it is read: the order of its images, and how it travels between processes."""
import pickle

import numpy as np

import pack
from frames.packed import Pack, image_order


def test_order_is_a_permutation_that_spreads_siblings():
    groups = np.repeat(np.arange(40), 25)  # 40 clips of 25 frames, stored clip after clip
    order = image_order(groups, seed=0, epoch=0)
    assert sorted(order) == list(range(1000))
    batches = groups[order].reshape(-1, 20)
    siblings = np.mean([len(batch) - len(set(batch)) for batch in batches])
    shuffled = groups[np.random.default_rng(0).permutation(1000)].reshape(-1, 20)
    assert siblings < 0.35 * np.mean([len(batch) - len(set(batch)) for batch in shuffled])
    assert (order == image_order(groups, 0, 0)).all()
    assert (order != image_order(groups, 0, 1)).any() and (order != image_order(groups, 1, 0)).any()


def test_order_of_single_images_is_random():
    order = image_order(np.arange(1000), seed=0, epoch=0)
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_a_pack_is_not_copied_to_workers(tmp_path):
    """Where workers are not forked a pack travels as its folder's name, not as gigabytes; and it arrives whole."""
    pack.pack_phantoms(tmp_path / "p.pack", 12, 32)
    opened = Pack(tmp_path / "p.pack")
    assert len(pickle.dumps(opened)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).canvases, opened.canvases)
