"""The rows of a comparison: what --ckpt, --features and --predictions name, and networks at random initialisation."""

import collections
import itertools
import os
import re

import torch

from model import DINOV3, SIZES, VisionTransformer
from networks.weights import ULTRADINO_MEAN_STD, grey_backbone
from scores.report import slug

# name: in tables; paths: of the files whose weights it starts from, several being pretraining seeds, [None] for `none`
Model = collections.namedtuple("Model", "name paths")
# a run to be done: its Model's name, the number of its file there, how its own files are called, what it draws with
Start = collections.namedtuple("Start", "model file name seed draw backbone info")
DEFAULT_SIZE = 224  # of images, where no file of pretrain.py tells


def add_arguments(p, frozen=True, ckpt=None):
    """The flags that every comparison takes; `frozen`: also those of frozen features. ckpt: the default."""
    add = p.add_argument
    add("--ckpt", nargs="+", metavar="MODEL", default=ckpt, help="FILE, NAME=FILE, NAME=FILE,FILE,... (pretraining "
        "seeds), none (the first file's network without its weights) or timm:NAME; the first is compared with the "
        "others")
    if frozen:
        add("--features", nargs="+", default=[], metavar="NAME=FILE", help="another model's frozen vectors, .npz")
    add("--img_size", type=int, help="side that images are squashed to, the same for all models, but for the nearest "
        "multiple of a patch; default: what the first file of pretrain.py was trained at, else 224, phantoms 64")
    if frozen:
        add("--cache", default="features", help="folder of frozen features, kept by digest of checkpoint and image")


def list_models(texts, none_name):
    """Words of --ckpt -> [Model]; ValueError where two would have one name.

    Without NAME= a model is called after its file. Where two of them are called alike, folders come before the name
    until they differ.
    """
    parts, paths = [], []
    for text in texts:
        name, files = split_name(text)
        paths.append([None if file == "none" else file for file in (files.split(",") if name else [files])])
        if "" in paths[-1]:
            raise ValueError(f"--ckpt {text!r}: names no file; expected FILE, NAME=FILE, NAME=FILE,FILE or none")
        parts.append([name] if name else [none_name] if files == "none" else name_parts(files))
    shown, longer = [1] * len(parts), True
    while longer:
        names = ["/".join(own[-count:]) for own, count in zip(parts, shown)]
        longer = [i for i, name in enumerate(names) if names.count(name) > 1 and shown[i] < len(parts[i])]
        for i in longer:
            shown[i] += 1
    check_names(names)
    return [Model(*both) for both in zip(names, paths)]


def name_parts(file):
    """The folders of a file and its name without suffix; of pretrain.py's last.pt, which says nothing, the folders."""
    if file.startswith("timm:"):
        return [file]
    parts = [part for part in os.path.normpath(file).split(os.sep) if part not in ("", os.curdir, os.pardir)]
    *folders, name = parts or [os.path.basename(os.path.abspath(file))]
    if os.path.isdir(file):  # Hugging Face's: a dot in its name begins no suffix
        return [*folders, name]
    stem = os.path.splitext(name)[0]
    return folders if folders and stem == "last" else [*folders, stem]


def named_files(texts):
    """Words of --features or --predictions, FILE or NAME=FILE -> [(name, file)]; else called after the file."""
    return [(name or name_parts(file)[-1], file) for name, file in map(split_name, texts)]


def split_name(text):
    """NAME=FILE -> (name, file); FILE -> (None, file), also where one of its folders has a = in its name."""
    return re.fullmatch(r"(?:([^=/]+)=)?(.*)", text, re.S).groups()


def check_names(names):
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two models are called {name!r}: name them apart, NAME=FILE")


def common_network(models, img_size, default=DEFAULT_SIZE):
    """What the models have in common, from their files: the side of images (`default`: where none tells), and the info
    of the network that `none` copies, the first file's (None: there is none)."""
    like = None
    for path in [path for model in models for path in model.paths if path]:
        info = grey_backbone(path)[1]
        if like is None and info["family"] != "timm":
            like = info
        if img_size is None and info["family"] == "pretrain.py":
            img_size = info["img_size"]
        if like is not None and img_size is not None:
            break
    return img_size or default, like


def open_backbone(path, like, arch, seed, drop_path_rate=0.0, pos="learned"):
    """(backbone that takes one channel, its info, with its path). path None: at random initialisation, with the
    network and normalisation of `like`, else `arch` with UltraDINO's; pos="rope": made as DINOv3's. timm's networks
    skip nothing, whatever the drop_path_rate."""
    if path is not None:
        backbone, info = grey_backbone(path)
        backbone.drop_path_rate = drop_path_rate if isinstance(backbone, VisionTransformer) else 0.0
        return backbone, {**info, "path": path}
    patch_size = 8 if arch == "vit_micro" else 16  # as pretrain.py's: small networks are for small images
    config = dict(SIZES[arch], img_size=DEFAULT_SIZE, patch_size=patch_size, num_register_tokens=4)
    if pos == "rope":
        config.update(DINOV3)
    mean, std = ULTRADINO_MEAN_STD
    if like is not None:
        config, mean, std = like["config"], like["mean"], like["std"]
    config = {**config, "in_chans": 1, "drop_path_rate": drop_path_rate}
    torch.manual_seed(seed)
    return VisionTransformer(**config).eval(), dict(config=config, mean=mean, std=std, img_size=config["img_size"],
                                                    seen=None, digest=None, family="random", path="none")


def files_and_seeds(model, args):
    """Yield (number, file, seeds) of each file of a model: --seeds of them, and no seed serves two files."""
    for number, path in enumerate(model.paths):
        yield number, path, range(args.seed + number * args.seeds, args.seed + (number + 1) * args.seeds)


def open_runs(models, like, args, is_main, drop_path_rate=0.0, pos="learned", draws=(None,)):
    """Yield a Start for each run of a comparison, files x draws (of train images) x seeds, with a fresh backbone."""
    for model in models:
        for number, path, seeds in files_and_seeds(model, args):
            for draw, seed in itertools.product(draws, seeds):
                backbone, info = open_backbone(path, like, args.arch, seed, drop_path_rate, pos)
                parts = [slug(model.name), *[str(number)] * (len(model.paths) > 1),
                         *[f"split{draw}"] * (draw is not None), f"seed{seed}"]
                if is_main:
                    print(f"{model.name}: {info['path']} ({info['family']}), seed {seed}"
                          + (f", split seed {draw}" if draw is not None else ""), flush=True)
                yield Start(model.name, number, "-".join(parts), seed, draw, backbone, info)


def full_layerscale(backbone):
    """From scratch the papers' fine-tuned networks begin with whole blocks: LayerScale 1, where it begins near 0."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)


def own_size(size, backbone):
    """The nearest multiple of the backbone's patch size."""
    return max(1, round(size / backbone.patch_size)) * backbone.patch_size


def default_models():
    """`--ckpt` where it is not given: what pretrain.py wrote here, if it did, and the same network from scratch."""
    return ["last.pt", "none"] if os.path.exists("last.pt") else ["none"]
