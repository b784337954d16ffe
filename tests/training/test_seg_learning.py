"""Eight images are learned by heart: network, loss, rates and steps together do what they are for."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stage_tools import one_thread  # noqa: F401

from frames import phantom
from model import VisionTransformer
from training import segmenter

CPU = torch.device("cpu")


def overfit(images, masks, n_classes, norm, steps):
    """Train on some images without augmentation: the Dice on themselves."""
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=64, patch_size=8, in_chans=1, embed_dim=64, depth=2, num_heads=2,
                                 num_register_tokens=1, init_values=1.0, init_std=0.125)
    how, stats = dict(name="upernet", channels=32, norm=norm), (images.mean() / 255, images.std() / 255)
    shares = np.bincount(masks.ravel(), minlength=n_classes) / masks.size
    net, gradients, optimizer = segmenter.build(backbone, how, shares, False, 0, 1.0, CPU)
    args = argparse.Namespace(augment=False, weight_decay=0.01, dice_weight=1.0, dtype="float32")
    whole = slice(0, len(images))
    x, targets = segmenter.make_batch(images, masks, whole, 0, 0, len(images), args, stats, CPU)
    for step, lr in enumerate(segmenter.learning_rates(2e-3, steps, 20)):
        _, keep = segmenter.draw_drops(net, len(x), 64, 0, step, 0)
        segmenter.train_step(net, gradients, optimizer, x, targets, len(x), lr, args, None, keep)
    return segmenter.validate(net, images, masks, np.arange(len(images)), n_classes, stats, len(x), CPU, "float32")


@pytest.mark.parametrize("norm", ["none", "group"])
def test_eight_phantom_heads_are_learned_by_heart(norm):
    images, masks, _ = phantom.phantom_masks(8 * len(phantom.MASK_PLANES), 64, 5)
    own = np.flatnonzero((masks == phantom.STRUCTURES.index("head")).any((1, 2)))
    assert len(own) == 8
    assert overfit(images[own], masks[own], 2, norm, 150) > 0.98


@pytest.mark.slow
def test_eight_phantoms_of_all_structures_are_learned_by_heart():
    images, masks, _ = phantom.phantom_masks(8, 64, 5)
    assert len(np.unique(masks)) == 5
    assert overfit(images, masks, 5, "none", 400) > 0.98


@pytest.mark.skipif("ULTRASOUND_DATA" not in os.environ, reason="ULTRASOUND_DATA names no folder with hc18/")
@pytest.mark.parametrize("norm", ["none", "group"])
def test_eight_real_heads_are_learned_by_heart(norm):
    files = sorted((Path(os.environ["ULTRASOUND_DATA"]) / "hc18" / "training_set").glob("*_HC_Mask.png"))[:8]
    masks = [Image.open(file).convert("L").resize((64, 64), Image.Resampling.NEAREST) for file in files]
    images = [Image.open(str(file).replace("_Mask.png", ".jpg")).convert("L").resize((64, 64)) for file in files]
    assert len(files) == 8
    assert overfit(np.stack(images), (np.stack(masks) > 127).astype(np.uint8), 2, norm, 150) > 0.98
