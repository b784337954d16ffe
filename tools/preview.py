"""What training would see of a few images, before it starts: pretrain.py's own flags, without the run.

    python -m tools.preview --data FOLDER --output_dir .

Writes OUTPUT_DIR/preview.png, a row per image, crops and masks those of step 0 of a run on just these images. No other
file is read, however many there are, so nothing is held out and no duplicates are looked for.
"""

import os
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw

import pretrain
import runtime
from data import PretrainBatches, to_device
from frames.images import count_frames, decode_chunk, read_frames
from frames.lists import list_images
from frames.packed import Canvases, Pack
from frames.phantom import phantom_images

IMAGES, LOCAL_CROPS = 6, 4  # at most so many are shown
GAP, MARGIN = 8, 24  # pixels between tiles; left of a row, for its number
MASKED, NO_TISSUE = 150, 70  # grey levels of masked patches that count in the loss, and that do not


def spread(count):
    """Numbers of at most IMAGES of `count` images, evenly spaced."""
    return np.unique(((np.arange(IMAGES) + 0.5) * count / IMAGES).astype(int))


def read_images(args):
    """(originals, a list of uint8 (h, w); Canvases), read as pack.py does; a clip's middle frame."""
    if not args.data:
        canvases, _, _ = phantom_images(IMAGES, pretrain.PHANTOM_SIZE, pretrain.PHANTOM_SEED)
        originals, sizes = list(canvases), [canvases.shape[:0:-1]] * IMAGES
    elif os.path.exists(os.path.join(args.data[0], "pack.json")):
        pack = Pack(args.data[0])
        some = spread(len(pack))
        canvases, sizes = pack.canvases[some], pack.sizes[some]
        originals = [np.asarray(Image.fromarray(canvas).resize(size)) for canvas, size in zip(canvases, sizes.tolist())]
    else:
        paths = list_images(args.data, args.exclude, args.group_regex).paths
        originals, canvases, sizes, reasons = [], [], [], []
        for path in (paths[number] for number in spread(len(paths))):
            middle = count_frames(path) // 2
            rows, squares, failed, _ = decode_chunk([path], middle, args.canvas, args.crop_fan, b"preview")
            if len(rows) and not (args.drop_colour and rows["colour"][0]):
                originals.append(next(read_frames(path, middle)).grey)
                canvases.append(squares[0])
                sizes.append((rows["width"][0], rows["height"][0]))
            else:
                reasons.append(f"{path}: {failed[0][2] if failed else 'in colour'}")
        if not originals:
            raise ValueError(f"none of {len(reasons)} files can be shown; first: {reasons[0]}")
    return originals, Canvases(np.stack(canvases), np.array(sizes), np.arange(len(originals)))


def shade(crops, micro, patch_size):
    """Global crops (2b, s, s) with flat grey masked patches: MASKED, or NO_TISSUE where their weight is 0."""
    masks = micro["masks"]  # (2b, P)
    weight = torch.zeros(masks.numel(), device=masks.device).index_add(0, micro["mask_indices"], micro["mask_weight"])
    level = torch.where(masks, torch.where(weight.view_as(masks) > 0, MASKED, NO_TISSUE), -1)
    side = crops.shape[-1] // patch_size
    level = level.view(-1, side, side).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return torch.where(level < 0, crops, level)


def tiles(args, originals, frames, device):
    """A row of tiles uint8 (h, w) per image: original, canvas, 2 global crops, the same with masks, local crops."""
    args = SimpleNamespace(**{**vars(args), "batch_size_per_gpu": len(frames), "accum_iter": 1})
    batches = PretrainBatches(frames, args)
    micro, = to_device(batches[0], device, args, 0.0, 1 / 255)  # normalised to what they are: grey levels
    whole, local = micro["global_crops"][:, 0], micro["local_crops"][:, 0]
    columns = [crops.round().byte().cpu().numpy().reshape(-1, len(frames), *crops.shape[1:]) for crops in (
        whole, shade(whole, micro, args.patch_size), local)]  # (crops, images, side, side) each
    rows, canvas = [], frames.canvases.shape[1]
    for place, image in enumerate(batches.indices(0)):
        original = Image.fromarray(originals[image])
        original.thumbnail((canvas, canvas))
        rows.append([np.asarray(original), frames.canvases[image],
                     *(crop[place] for crops in columns for crop in crops[:LOCAL_CROPS])])
    return rows


def draw(rows):
    """Rows of tiles -> one image, white between them, with a number at each row: file names can be patients' names."""
    widths = [max(tile.shape[1] for tile in column) for column in zip(*rows)]
    height = max(tile.shape[0] for row in rows for tile in row)
    lefts = MARGIN + np.cumsum([0, *widths]) + GAP * np.arange(len(widths) + 1)
    sheet = Image.new("L", (int(lefts[-1]), GAP + len(rows) * (height + GAP)), 255)
    for number, row in enumerate(rows):
        top = GAP + number * (height + GAP)
        ImageDraw.Draw(sheet).text((GAP, top), str(number + 1), fill=0)
        for left, tile in zip(lefts.tolist(), row):
            sheet.paste(Image.fromarray(tile), (left, top))
    return sheet


def main(args):
    if args.init:
        pretrain.open_init(args)  # it sets patch and crop sizes
    _, world_size, device = runtime.setup()
    if world_size > 1:
        raise ValueError("tools.preview is for one process: start it with python, not torchrun")
    rows = tiles(args, *read_images(args), device)
    os.makedirs(args.output_dir, exist_ok=True)
    path = os.path.join(args.output_dir, "preview.png")
    draw(rows).save(path)
    dark = " (dark: without tissue)" if args.mask_tissue else ""
    print(f"wrote {path}: {len(rows)} images, from left: original, canvas, 2 global crops, the same with masked "
          f"patches grey{dark}, {len(rows[0]) - 6} local crops. Names burnt into the frames show here as they will in "
          f"training: look before you share it.")


if __name__ == "__main__":
    with runtime.clear_errors():
        main(pretrain.get_args())
