"""tools/preview.py: one picture of what training will see of a few images, as a user asks for it."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from stage_tools import run_tool

import data
import pack
import pretrain
from frames.packed import Canvases, Pack
from tools import preview

SMALL = ["--preset", "cpu", "--global_crops_size", "32", "--local_crops_size", "16", "--local_crops_number", "3",
         "--patch_size", "8", "--canvas", "40", "--mask_tissue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 files: a bright upper half, black below, one unreadable; some show a name in theirs."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for number in range(12):
        pixels = (rng.random((60, 90)) * 200 + 30).astype(np.uint8)
        pixels[30:] = 0
        Image.fromarray(pixels).save(folder / f"Doe_Jane_{number:02}.png")
    (folder / "Doe_Jane_05.png").write_text("not an image")
    return folder


def script(folder, *args, expect=0):
    done = run_tool("preview", folder, *SMALL, *args)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def tile(sheet, row, column, canvas, widths):
    """A tile of the picture, from its layout as documented: GAP around, MARGIN at the left, a row as high as a canvas."""
    left = preview.MARGIN + sum(widths[:column]) + column * preview.GAP
    top = preview.GAP + row * (canvas + preview.GAP)
    return sheet[top:top + canvas, left:left + widths[column]]


def test_folder(folder, tmp_path):
    """Every second file is shown; each tile is what pack.py and make_crops give; no pack and no checkpoint is made."""
    out = script(tmp_path, "--data", folder)
    assert "wrote ./preview.png: 5 images" in out and "3 local crops" in out and "look before you share it" in out
    assert "Doe" not in out and [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    sheet, widths = np.asarray(Image.open(tmp_path / "preview.png")), [40, 40, 32, 32, 32, 32, 16, 16, 16]
    assert sheet.shape == (5 * 40 + 6 * preview.GAP, preview.MARGIN + sum(widths) + 9 * preview.GAP)

    pack.make_pack([str(folder)], tmp_path / "all.pack", canvas=40, log=lambda text: None)
    packed = Pack(tmp_path / "all.pack")
    shown = [packed.names([index])[0] for index in range(len(packed))]
    shown = np.array([shown.index(f"Doe_Jane_{number:02}.png") for number in (1, 3, 7, 9, 11)])  # 5 is unreadable
    args = pretrain.get_args([*SMALL, "--batch_size_per_gpu", "5"])
    frames = Canvases(packed.canvases[shown], packed.sizes[shown], np.arange(5))
    batches = data.PretrainBatches(frames, args)
    micro, = data.to_device(batches[0], torch.device("cpu"), args, 0.3, 0.2)  # normalised, unlike the preview's
    crops = {kind: (255 * (0.2 * micro[f"{kind}_crops"][:, 0] + 0.3)).unflatten(0, (-1, 5))
             for kind in ("global", "local")}
    weight = torch.zeros(micro["masks"].numel()).index_add(0, micro["mask_indices"], micro["mask_weight"])
    weight, masks = (x.view(2, 5, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3) for x in (weight, micro["masks"]))
    for row, image in enumerate(batches.indices(0)):
        tiles = [tile(sheet, row, column, 40, widths) for column in range(9)]
        original = Image.open(folder / packed.names([shown[image]])[0])
        original.thumbnail((40, 40))
        assert original.size == (40, 27) and (tiles[0][:27] == original).all() and (tiles[0][27:] == 255).all()
        assert (tiles[1] == packed.canvases[shown[image]]).all()
        for crop in (0, 1):
            whole, masked = (tiles[column + crop][:32].astype(int) for column in (2, 4))
            assert np.abs(whole - crops["global"][crop, row].numpy()).max() < 0.6
            masked_here, counted = masks[crop, row].numpy(), weight[crop, row].numpy() > 0
            assert (masked[~masked_here] == whole[~masked_here]).all()
            assert (masked[masked_here & counted] == preview.MASKED).all()
            assert (masked[masked_here & ~counted] == preview.NO_TISSUE).all()
        for crop in range(3):
            assert np.abs(tiles[6 + crop][:16] - crops["local"][crop, row].numpy()).max() < 0.6
    assert masks.any() and (weight[masks] > 0).any() and (weight[masks] == 0).any()  # all three cases were there


def test_phantoms_and_overwriting(tmp_path):
    """Without --data; a preview that is there gives way."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "preview.png").write_text("old")
    out = script(tmp_path, "--output_dir", "here")
    assert "wrote here/preview.png: 6 images" in out
    size = pretrain.PHANTOM_SIZE
    assert Image.open(tmp_path / "here" / "preview.png").size == (
        preview.MARGIN + 2 * size + 4 * 32 + 3 * 16 + 9 * preview.GAP, 6 * size + 7 * preview.GAP)


def test_pack_shows_canvases_in_their_true_aspect(folder, tmp_path):
    pack.make_pack([str(folder)], tmp_path / "some.pack", canvas=40, log=lambda text: None)
    args = pretrain.get_args([*SMALL, "--data", str(tmp_path / "some.pack")])
    originals, frames = preview.read_images(args)
    packed = Pack(tmp_path / "some.pack")
    assert [original.shape for original in originals] == [(60, 90)] * 6 and (frames.sizes == [90, 60]).all()
    assert all((packed.canvases == canvas).all((1, 2)).sum() == 1 for canvas in frames.canvases)


def test_crop_fan_drop_colour_and_exclude_count(folder, tmp_path):
    """What the pack would trim or leave out is trimmed or left out here."""
    rng = np.random.default_rng(0)
    fan = np.zeros((90, 120), np.uint8)
    fan[20:80, 30:100] = rng.integers(60, 200, (60, 70))
    Image.fromarray(fan).save(tmp_path / "fan.png")
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "doppler.png")
    Image.fromarray(fan).save(tmp_path / "fan_mask.png")
    args = pretrain.get_args([*SMALL, "--data", str(tmp_path), "--crop_fan", "--drop_colour", "--exclude", "*_mask.png"])
    originals, frames = preview.read_images(args)
    assert [original.shape for original in originals] == [(90, 120)] and abs(frames.sizes - [70, 60]).max() < 6
    args = pretrain.get_args([*SMALL, "--data", str(tmp_path), "--exclude", "*_mask.png"])
    originals, frames = preview.read_images(args)
    assert [original.shape for original in originals] == [(60, 80), (90, 120)]
    assert (frames.sizes == [[80, 60], [120, 90]]).all()


def test_what_cannot_be_shown_gets_a_sentence(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.png").write_text("not an image")
    out = script(tmp_path, "--data", "bad", expect=2)
    assert re.search(r"none of 1 files can be shown; first: bad/text.png: not an image", out) and "Traceback" not in out


@pytest.mark.parametrize("count, numbers", [(1, [0]), (4, [0, 1, 2, 3]), (6, range(6)), (2_000_000, None)])
def test_images_are_evenly_spaced(count, numbers):
    ours = preview.spread(count)
    assert numbers is None or ours.tolist() == list(numbers)
    assert len(ours) == min(count, 6) and ours[0] < max(count // 6, 1) and ours[-1] >= count - max(count // 6, 1)


def test_shades():
    """Masked patches are flat, dark where they weigh nothing; padding, of index 0 and weight 0, changes nothing."""
    masks = torch.zeros(2, 4, dtype=torch.bool)
    masks[0, 1] = masks[0, 3] = True
    micro = dict(masks=masks, mask_indices=torch.tensor([1, 3, 0]), mask_weight=torch.tensor([1.0, 0, 0]))
    crops = torch.full((2, 4, 4), 99.0)
    shaded = preview.shade(crops, micro, 2)
    assert (shaded[0, :2, 2:] == preview.MASKED).all() and (shaded[0, 2:, 2:] == preview.NO_TISSUE).all()
    assert (shaded[0, :, :2] == 99).all() and (shaded[1] == 99).all()
