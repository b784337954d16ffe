"""Draw a sheet of phantom images: a plane per row, below it its masks' outlines.

    python -m tools.phantom_sheet sheet.png
"""


from PIL import Image, ImageDraw

import runtime
from arguments import Parser
from frames.phantom import MASK_PLANES, PLANES, phantom_images, phantom_masks
from frames.shapes import outlined


def get_args(argv=None):
    parser = Parser(__doc__.split("\n")[0], usage="%(prog)s OUT.png [OPTION ...]")
    parser.add_argument("out", metavar="OUT.png", help="image to write")
    parser.add_argument("--size", type=int, default=160, help="pixels of one image")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients")
    return parser.parse(argv)[0]


def main(args):
    columns, side = 9, args.size + 2
    images, labels, _ = phantom_images(columns * len(PLANES), args.size, args.seed)
    _, masks, groups = phantom_masks(columns * len(MASK_PLANES), args.size, args.seed)
    rows = []  # name, pictures
    for label, plane in enumerate(PLANES):
        own, own_masks = images[labels == label], masks[groups % len(PLANES) == label]
        rows.append((plane, [Image.fromarray(image) for image in own]))
        if own_masks.any():
            rows.append(("", [outlined(*pair, (args.size, args.size)) for pair in zip(own, own_masks)]))
    sheet = Image.new("RGB", (60 + columns * side, len(rows) * side))
    for row, (name, pictures) in enumerate(rows):
        ImageDraw.Draw(sheet).text((4, row * side + args.size // 2), name, fill="white")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (60 + column * side, row * side))
    sheet.save(args.out)


if __name__ == "__main__":
    with runtime.clear_errors():
        main(get_args())
