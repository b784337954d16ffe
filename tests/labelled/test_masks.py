"""Segmentation sets of every layout, made up here; groups, splits, pixel sizes; what each mistake is answered with."""
import os
from collections import Counter

import numpy as np
import pytest
from file_tools import save, save_dicom, speckle
from PIL import Image, ImageDraw
from test_mask_codes import save_meta

from frames import lists
from labelled.masks import MaskedSet, classes_present, read_mask, read_masked, read_masked_image, split_masked
from labelled.splits import SPLITS

REAL = os.environ.get("ULTRASOUND_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="set ULTRASOUND_DATA to a folder with hc18/ and busi/")


def ids(seed, shape=(6, 8), high=3):
    return np.random.default_rng(seed).integers(0, high, shape, np.uint8)


def both(folder, images, mask_of, high=2, scale=255):
    """Save images and their masks, mask_of(name) -> name, below a folder; {image's name: its class numbers}."""
    expected = {}
    for seed, name in enumerate(images):
        save(folder / name, speckle(seed, (6, 8)))
        expected[name] = ids(seed, high=high)
        save(folder / mask_of(name), expected[name] * np.uint8(scale))
    return expected


def assert_masks(found, expected):
    assert found.names == sorted(expected)
    for i, name in enumerate(found.names):
        assert np.array_equal(read_mask(found, i), expected[name]), name
        assert read_masked_image(found, i).grey.shape == expected[name].shape
        assert classes_present(found)[i].tolist() == [k in expected[name] for k in range(len(found.classes))]
    assert np.array_equal(classes_present(found._replace(present=None)), classes_present(found))


def text(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# ---------------------------------------------------------------- layouts

@pytest.mark.parametrize("image, mask, ending", [
    ("images", "masks", ""), ("Image", "LABEL", "_mask"), ("IMG", "annotations", "_gt"),
    ("images", "labels", "_Segmentation"), ("imgs", "mask", "_annotation")])
def test_two_folders(tmp_path, image, mask, ending):
    expected = both(tmp_path, [f"{image}/{k}.png" for k in "abc"],
                    lambda name: name.replace(image, mask, 1).replace(".png", f"{ending}.tif"), high=3, scale=1)
    save(tmp_path / "overview.png", speckle(9))
    found = read_masked(str(tmp_path))
    assert_masks(found, expected)
    assert found.classes == ["background", "class 1", "class 2"] and found.values == {0: 0, 1: 1, 2: 2}
    assert found.layout == "two folders, other files: 1" and found.splits is None and found.circumference is None
    assert found.groups == found.names and found.grouped_by == lists.IMAGE_GROUPS and np.isnan(found.mm).all()


@pytest.mark.parametrize("pattern", ["{split}/{side}/{name}.png", "{side}/{split}/{name}.png",
                                     "{split}/all/{side}/{name}.png"])
def test_folders_of_splits(tmp_path, pattern):
    names = [pattern.format(split=split, side="images", name=k) for split in ("train", "Val", "testing") for k in "ab"]
    expected = both(tmp_path, names, lambda name: name.replace("images", "masks"))
    found = read_masked(str(tmp_path))
    assert_masks(found, expected)
    wanted = {"train": "train", "Val": "val", "testing": "test"}
    assert found.splits == [next(wanted[part] for part in name.split("/") if part in wanted) for name in found.names]
    assert split_masked(found, classes_present(found))[0] == found.splits
    save(tmp_path / "images/other/z.png", speckle(0, (6, 8)))
    save(tmp_path / "masks/other/z.png", ids(0))
    if pattern.startswith("{side}"):
        with pytest.raises(ValueError, match="other stands beside train and test"):
            read_masked(str(tmp_path))


def test_two_folders_of_any_name(tmp_path):
    expected = both(tmp_path, ["us/p/1.png", "us/p/2.png"], lambda name: name.replace("us/", "us/drawn by hand/", 1))
    found = read_masked(str(tmp_path / "us"), masks=str(tmp_path / "us/drawn by hand"))
    assert_masks(found, {name[3:]: mask for name, mask in expected.items()})
    named = both(tmp_path / "b", ["x/1.png"], lambda name: "y/seg-1-v2.png", scale=7)
    found = read_masked(str(tmp_path / "b/x"), masks=str(tmp_path / "b/y"), mask_pattern="seg-{}-*.png")
    assert_masks(found, {"1.png": named["x/1.png"]})


def test_masks_beside_images_in_nested_folders(tmp_path):
    """As BUSI, whose images can have several masks."""
    names = [f"{kind}/{kind} ({k}).png" for kind in ("benign", "normal") for k in (1, 2, 11)]
    expected = both(tmp_path, names, lambda name: name.replace(".png", "_mask.png"))
    more = ids(77, high=2)
    save(tmp_path / "benign/benign (1)_mask_1.png", more * np.uint8(255))
    expected["benign/benign (1).png"] = expected["benign/benign (1).png"] | more
    for arguments in ({}, {"mask_pattern": "{}_mask*.png"}):
        found = read_masked(str(tmp_path), **arguments)
        assert_masks(found, expected)
        assert list(map(len, found.masks)) == [2, 1, 1, 1, 1, 1] and found.groups == found.names
        pattern = arguments.get("mask_pattern", "X_mask beside X")
        assert found.layout == f"masks beside images, {pattern}; 2 folders are too few to be groups"
    assert read_masked(str(tmp_path), classes=["lesion"]).classes == ["background", "lesion"]
    few = read_masked(str(tmp_path), exclude=["normal/*", "*11*"])
    assert few.names == ["benign/benign (1).png", "benign/benign (2).png"]


def test_of_two_masks_the_later_lies_above(tmp_path):
    save(tmp_path / "a.png", speckle(0, (1, 3)))
    save(tmp_path / "a_mask.png", np.uint8([[1, 1, 0]]))
    save(tmp_path / "a_mask_1.png", np.uint8([[2, 0, 0]]))
    assert read_mask(read_masked(str(tmp_path)), 0).tolist() == [[2, 1, 0]]
    save(tmp_path / "a_mask_1.png", np.uint8([[2, 2, 0]]))
    assert classes_present(read_masked(str(tmp_path))).tolist() == [[True, False, True]]  # 1 lies below 2


@pytest.mark.parametrize("pattern, name", [("{}.tif", "a.tif"), ("seg_{}.png", "seg_a.png"), ("{}-?.png", "a-7.png")])
def test_mask_patterns(tmp_path, pattern, name):
    expected = both(tmp_path, ["a.bmp"], lambda _: name)
    assert_masks(read_masked(str(tmp_path), mask_pattern=pattern), expected)


def save_structures(path, seed):
    masks = {name: np.zeros((6, 8), np.uint8) for name in ("artery", "liver", "stomach", "vein")}
    numbers = ids(seed, high=5)
    for number, name in enumerate(masks, 1):
        masks[name][numbers == number] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, {"image": speckle(seed, (6, 8)), "structures": masks})
    return numbers


def test_fass_as_downloaded(tmp_path):
    expected = {}
    for seed, stem in enumerate(("P001_IMG1", "P001_IMG2", "P010_IMG1")):
        save(tmp_path / f"FASS/IMAGES/{stem}.png", speckle(seed, (6, 8)))
        expected[f"FASS/IMAGES/{stem}.png"] = save_structures(tmp_path / f"FASS/ARRAY_FORMAT/{stem}.npy", seed)
    found = read_masked(str(tmp_path))
    assert_masks(found, expected)
    assert found.classes == ["background", "artery", "liver", "stomach", "vein"]
    assert found.groups == ["P001", "P001", "P010"] and found.layout == "FASS as downloaded"
    assert read_masked(str(tmp_path), group_regex=r"_IMG(\d)").groups == ["1", "2", "1"]
    alone = read_masked(str(tmp_path / "FASS/IMAGES"), masks=str(tmp_path / "FASS/ARRAY_FORMAT"))
    assert alone.groups == found.groups and alone.classes == found.classes
    for side, suffix in (("IMAGES", "png"), ("ARRAY_FORMAT", "npy")):
        os.rename(tmp_path / f"FASS/{side}/P010_IMG1.{suffix}", tmp_path / f"FASS/{side}/x.{suffix}")
    with pytest.raises(ValueError, match="FASS/IMAGES/x.png: names no patient before _IMG, .* give --group_regex"):
        read_masked(str(tmp_path))


@pytest.mark.parametrize("folder", ["", "{video}/"])
def test_jnu_ifm_as_downloaded(tmp_path, folder):
    expected = {}
    for seed, (video, frame) in enumerate([("20190830T115515", 1), ("20190830T115515", 12), ("20190909T155747", 1)]):
        name = f"JNU/{folder}image/{video}_{frame}.png".format(video=video)
        save(tmp_path / name, speckle(seed, (6, 8)))
        expected[name] = ids(seed)
        save(tmp_path / name.replace("image", "mask").replace(".png", "_mask.png"), np.uint8([0, 7, 8])[expected[name]])
        save(tmp_path / name.replace("image", "mask_enhance").replace(".png", "_mask.png"), speckle(0, (6, 8, 3)))
    found = read_masked(str(tmp_path))
    assert_masks(found, expected)
    assert found.classes == ["background", "pubic symphysis", "head"] and found.layout == "JNU-IFM as downloaded"
    assert found.groups == ["20190830T115515"] * 2 + ["20190909T155747"]
    assert read_masked(str(tmp_path), classes=["both=7,8"]).classes == ["background", "both"]
    bad = next(iter(expected)).replace("image", "mask").replace(".png", "_mask.png")
    save(tmp_path / bad, np.where(expected[next(iter(expected))] == 1, 7, 3).astype(np.uint8))
    with pytest.raises(ValueError, match=f"{bad}: holds the value 3, which is in no class; name it by --classes"):
        read_masked(str(tmp_path))


TABLE = "training_set_pixel_size_and_HC.csv"


def save_hc18(top, suffix="png", below="training_set"):
    """Outlines of two heads of one examination and of one of another, a test set; the heads, filled by PIL."""
    heads = {}
    for stem, box in (("000_HC", (10, 8, 60, 50)), ("000_2HC", (-15, 10, 50, 60)), ("012_HC", (20, 20, 55, 48))):
        line, filled = Image.new("L", (80, 70)), Image.new("L", (80, 70))
        ImageDraw.Draw(line).ellipse(box, outline=255, width=2)
        ImageDraw.Draw(filled).ellipse((box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), fill=1)  # the line's middle
        save(top / below / f"{stem}.{suffix}", speckle(0, (70, 80)))
        save(top / below / f"{stem}_Annotation.png", line)
        heads[f"{stem}.{suffix}"] = np.array(filled)
    save(top / f"test_set/000_HC.{suffix}", speckle(1, (70, 80)))
    text(top / TABLE, ["filename,pixel size(mm),head circumference (mm)", f"012_HC.{suffix},0.3,99.5",
                       f"000_2HC.{suffix},0.25,88", f"000_HC.{suffix},0.1,77.25"])
    return heads


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_hc18_as_downloaded(tmp_path, suffix):
    heads = save_hc18(tmp_path, suffix)
    for data, folder in ((tmp_path, "training_set/"), (tmp_path / "training_set", "")):
        found = read_masked(str(data))
        assert found.names == [f"{folder}{stem}.{suffix}" for stem in ("000_2HC", "000_HC", "012_HC")]
        for i, name in enumerate(found.names):
            assert (read_mask(found, i) != heads[os.path.basename(name)]).mean() < 0.005
        assert found.classes == ["background", "head"] and found.groups == ["000", "000", "012"]
        assert found.layout == "HC18; outlines filled" and found.grouped_by == "HC18's leading number"
        assert found.mm.tolist() == [[0.25] * 2, [0.1] * 2, [0.3] * 2]
        assert found.circumference.tolist() == [88, 77.25, 99.5]
    save(tmp_path / "training_set/000_HC_Mask.png", ids(0, (70, 80), 2) * np.uint8(255))  # goes before the outline
    assert np.array_equal(read_mask(read_masked(str(tmp_path)), 1), ids(0, (70, 80), 2))
    sizes = text(tmp_path / "mm.csv", ["image,mm_x,mm_y", *(f"training_set/{name},1,2" for name in heads)])
    found = read_masked(str(tmp_path), pixel_sizes=sizes)
    assert found.mm.tolist() == [[1, 2]] * 3 and found.circumference.tolist() == [88, 77.25, 99.5]
    text(tmp_path / TABLE, ["filename,pixel size(mm),head circumference (mm)", f"012_HC.{suffix},0.3,99.5"])
    with pytest.raises(ValueError, match=f"{TABLE}: has no pixel size of training_set/000_2HC"):
        read_masked(str(tmp_path))


def test_meta_images_with_masks(tmp_path):
    expected = {}
    for seed in (1, 2):
        for side in ("image_mha", "label_mha"):
            (tmp_path / side).mkdir(exist_ok=True)
        name = f"image_mha/0000{seed}.mha"
        save_meta(tmp_path / name, speckle(seed, (3, 6, 8)), ElementSpacing="0.5 0.25 1")
        expected[name] = ids(seed)
        save_meta(tmp_path / name.replace("image", "label"), expected[name])
    found = read_masked(str(tmp_path), classes=["symphysis", "head"])
    assert_masks(found, expected)
    assert found.mm.tolist() == [[0.5, 0.25]] * 2 and found.classes == ["background", "symphysis", "head"]


def test_dicom_with_masks(tmp_path):
    for patient in "AB":
        save_dicom(tmp_path / f"images/{patient}.dcm", speckle(0, (1, 6, 8)), patient=patient, PixelSpacing=[0.2, 0.3])
        save(tmp_path / f"masks/{patient}.png", ids(0, high=2))
    found = read_masked(str(tmp_path))
    assert found.groups == ["A", "B"] and found.grouped_by == "DICOM patient" and found.mm.tolist() == [[0.3, 0.2]] * 2


def test_colours_name_classes(tmp_path):
    numbers = ids(0)
    save(tmp_path / "images/a.png", speckle(0, (6, 8)))
    save(tmp_path / "masks/a.png", np.uint8([(0, 0, 0), (255, 255, 255), (0, 255, 0)])[numbers])
    found = read_masked(str(tmp_path), classes=["white=#ffffff", "green=#00FF00"])
    assert_masks(found, {"images/a.png": numbers})
    assert found.classes == ["background", "white", "green"]
    assert found.values == {0: 0, (255, 255, 255): 1, (0, 255, 0): 2}
    image = Image.fromarray(numbers)
    image.putpalette([0, 0, 0, 255, 255, 255, 0, 255, 0])
    save(tmp_path / "masks/a.png", image)
    assert_masks(read_masked(str(tmp_path), classes=["white=#ffffff", "green=#00FF00"]), {"images/a.png": numbers})
    swapped = read_masked(str(tmp_path), classes=["two=2", "one=1"])  # indices
    assert np.array_equal(read_mask(swapped, 0), np.uint8([0, 2, 1])[numbers])
    with pytest.raises(ValueError, match="masks/a.png: holds the value #00ff00, which is in no class"):
        read_masked(str(tmp_path), classes=["white=#ffffff"])


# ---------------------------------------------------------------- groups, splits, pixel sizes

@pytest.mark.parametrize("folders, expected", [
    ([f"p{k}" for k in range(9)], "folder"), ([f"p{k}" for k in range(8)], "own"), ([""], "own"),
    ([f"{kind}/p{k}" for kind in ("a", "b") for k in range(9)], "below"),
    ([f"p{k}/v{v}" for k in range(9) for v in "ab"], "folder"),
])
def test_folders_are_groups_where_there_are_enough(tmp_path, folders, expected):
    names = [os.path.join("images", folder, f"{k}.png") for folder in folders for k in (1, 2)]
    both(tmp_path, names, lambda name: name.replace("images", "masks"))
    found = read_masked(str(tmp_path))
    home = [os.path.dirname(name)[7:] for name in found.names]
    wanted = {"folder": home, "own": found.names, "below": [os.path.basename(name) for name in home]}[expected]
    assert found.groups == wanted and found.grouped_by == (lists.IMAGE_GROUPS if expected == "own" else "parent folder")
    assert ("too few to be groups" in found.layout) == (len(folders) == 8)


def test_a_split_file(tmp_path):
    both(tmp_path, [f"{k}.png" for k in "abcde"], lambda name: name.replace(".", "_mask."))
    os.remove(tmp_path / "e_mask.png")
    rows = ["image,split,group", "b.png,Train,P1", "a.png,train,P1", "./c.png,validation,P2", "d.png,TEST,P3"]
    found = read_masked(str(tmp_path), split=text(tmp_path / "s.csv", rows))
    assert found.names == ["a.png", "b.png", "c.png", "d.png"] and found.splits == ["train", "train", "val", "test"]
    assert found.groups == ["P1", "P1", "P2", "P3"] and found.grouped_by == "group column"
    assert f"; 1 of 5 images left out, which {tmp_path}/s.csv does not list" in found.layout
    alone = read_masked(str(tmp_path), split=text(tmp_path / "t.csv", ["image,split", "a.png,train"]))
    assert alone.groups == ["a.png"] and alone.grouped_by == lists.IMAGE_GROUPS
    for lines, words in ((["image,split", "a.png,train", "z.png,test"], "line 3: there is no image z.png; .* as a.png"),
                         (["image,split", "a.png,dev"], "line 2: split is 'dev', expected one of train"),
                         (["image,split", "a.png,train", "a.png,val"], "line 3: a.png is listed twice"),
                         (["image,split"], "lists no image"),
                         (["image,part", "a.png,val"], "columns are image,part; expected"),
                         (["image,split", "e.png,train"], "e.png: has no mask; add it")):
        with pytest.raises(ValueError, match=words):
            read_masked(str(tmp_path), split=text(tmp_path / "u.csv", lines))
    with pytest.raises(ValueError, match="--group_regex .: the CSV of --split names groups"):
        read_masked(str(tmp_path), split=str(tmp_path / "s.csv"), group_regex=".")
    with pytest.raises(ValueError, match="none.csv: no such file"):
        read_masked(str(tmp_path), split="none.csv")


def test_pixel_sizes(tmp_path):
    both(tmp_path, ["p/a.png", "p/b.png"], lambda name: name.replace(".", "_mask."))
    sizes = text(tmp_path / "mm.csv", ["image;mm", "p/b.png;0.5", "p/a.png;0.25", "q;1"])
    found = read_masked(str(tmp_path), pixel_sizes=sizes)
    assert found.mm.tolist() == [[0.25] * 2, [0.5] * 2] and found.circumference is None
    for lines, words in ((["image,mm", "p/a.png,0.5"], "has no pixel size of p/b.png"),
                         (["image,size", "a,1"], "columns are image,size"),
                         (["image,mm", "p/a.png,zero"], "line 2: mm must be numbers above 0, not zero"),
                         (["image,mm_x,mm_y", "p/a.png,1,-1"], "line 2: mm_x, mm_y must be numbers above 0, not 1, -1"),
                         (["image,mm", "p/a.png,1", "p/a.png,2"], "line 3: p/a.png is listed twice")):
        with pytest.raises(ValueError, match=words):
            read_masked(str(tmp_path), pixel_sizes=text(tmp_path / "mm.csv", lines))


def masked(present, groups, splits=None):
    n, K = np.shape(present)
    classes = ["background", *"abcdefgh"[:K - 1]]
    return MaskedSet(None, [f"{i:03}" for i in range(n)], None, groups, splits, classes, None, np.full((n, 2), np.nan),
                     None, "group column", "made up")


def test_splits_are_drawn_by_group_and_reach_every_class():
    rng = np.random.default_rng(0)
    present = np.concatenate([np.ones((300, 1), bool), rng.random((300, 3)) < (0.5, 0.1, 0.03)], 1)
    groups = [f"g{k}" for k in rng.integers(0, 60, 300)]
    found = masked(present, groups)
    splits, notes = split_masked(found, present, seed=3)
    assert notes == [] and split_masked(found, present, seed=3)[0] == splits != split_masked(found, present, seed=4)[0]
    assert len({*zip(groups, splits)}) == len({*groups})
    shares = Counter(split for _, split in {*zip(groups, splits)})
    assert {split: round(share / 60, 1) for split, share in shares.items()} == {"train": 0.6, "val": 0.2, "test": 0.2}
    for k in range(4):
        homes = Counter(split for _, split in {*zip(np.array(groups)[present[:, k]], np.array(splits)[present[:, k]])})
        for split, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):  # of the groups that show class k
            assert homes[split] and abs(homes[split] / homes.total() - share) < 0.12, (k, homes)
    order = rng.permutation(300)
    mixed = found._replace(names=[found.names[i] for i in order], groups=[groups[i] for i in order])
    assert split_masked(mixed, present[order], seed=3)[0] == [splits[i] for i in order]


def test_given_splits_are_kept_and_checked():
    present = np.array([[1, 1], [1, 0], [1, 1], [1, 0]], bool)
    found = masked(present, ["p", "q", "r", "s"], ["train", "train", "test", "val"])
    assert split_masked(found, present) == (["train", "train", "test", "val"], ["class 'a' has no val image"])
    drawn = masked(np.ones((12, 2), bool), [f"p{k}" for k in range(12)], ["train"] * 9 + ["test"] * 3)
    splits, _ = split_masked(drawn, np.ones((12, 2), bool))
    assert splits[9:] == ["test"] * 3 and {*splits[:9]} == {"train", "val"}
    for groups, splits, shown, words in (
            (["p", "q", "p", "s"], ["train", "train", "test", "val"], present, "group 'p' is in train .* and in test"),
            ([*"pqrs"], ["test", "train", "test", "val"], present, "class 'a' is in test .*but not in train"),
            ([*"pqrs"], ["train", "train", "test", "val"], present & [True, False], "class 'a' is in no mask"),
            ([*"pppp"], None, present, "no image is in ")):
        with pytest.raises(ValueError, match=words):
            split_masked(masked(shown, groups, splits), shown)


# ---------------------------------------------------------------- mistakes

def remove(path):
    return lambda folder: os.remove(folder / path)


@pytest.mark.parametrize("spoil, arguments, words", [
    (remove("b_mask.png"), {}, "b.png: has no mask; add it, or leave the image out with --exclude"),
    (remove("b.png"), {}, "b_mask.png: a mask without an image, which would be called b; add it"),
    (lambda folder: save(folder / "b_mask.png", ids(0, (8, 6))), {},
     "b_mask.png: 6 x 8 pixels, but its image .*b.png has 8 x 6"),
    (lambda folder: save(folder / "b_mask.png", ids(0) * 9), dict(classes=["x=255"]), "b_mask.png: holds the value 9"),
    (lambda folder: save(folder / "b_mask.png", speckle(0, (6, 8))), {}, "b_mask.png: holds .* different values"),
    (lambda folder: (folder / "b_mask.png").write_text("x"), {}, "b_mask.png: cannot be read"),
    (lambda folder: (folder / "b.png").write_text("x"), {}, "b.png: cannot be read"),
    (lambda folder: save(folder / "b.bmp", speckle(0, (6, 8))), {}, "b.png: called as b.bmp, so that a mask could"),
    (lambda folder: None, dict(exclude=["*"]), "no masks found|no image that could have a mask.*excluded: "),
    (lambda folder: None, dict(mask_pattern="*_mask.png"), "--mask_pattern .*expected the image's name as {}"),
    (lambda folder: None, dict(mask_pattern="*{}.png"), "--mask_pattern .*expected the image's name as {}"),
    (lambda folder: None, dict(mask_pattern="{}_gt.png"), "no masks found; understood are folders images and masks"),
    (lambda folder: None, dict(mask_pattern="{}.png"), "a mask without an image, which would be called a;"),
    (lambda folder: None, dict(masks="nowhere"), "nowhere: no such folder"),
    (lambda folder: None, dict(classes=["a=255", "b=3"]), "class 'b' is in no mask"),
])
def test_mistakes_are_told_with_the_file(tmp_path, spoil, arguments, words):
    both(tmp_path, ["a.png", "b.png"], lambda name: name.replace(".", "_mask."))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words):
        found = read_masked(str(tmp_path), **arguments)
        split_masked(found, classes_present(found))


def test_what_is_no_set(tmp_path):
    save(tmp_path / "a.png", speckle(0))
    for data, words in ((tmp_path, "no masks found; understood are .*FASS.*JNU-IFM.*HC18"),
                        (tmp_path / "a.png", "no such folder"), (tmp_path / "b", "no such folder")):
        with pytest.raises(ValueError, match=words):
            read_masked(str(data))


def test_strays_can_be_left_out(tmp_path):
    expected = both(tmp_path, ["a.png", "b.png", "c.png"], lambda name: name.replace(".", "_mask."))
    os.remove(tmp_path / "b_mask.png")
    os.remove(tmp_path / "c.png")
    assert_masks(read_masked(str(tmp_path), exclude=["b.png", "c_*"]), {"a.png": expected["a.png"]})
    assert_masks(read_masked(str(tmp_path), exclude=["b.png", "c_mask.png"]), {"a.png": expected["a.png"]})


def test_a_mask_changed_since_it_was_read(tmp_path):
    both(tmp_path, ["a.png"], lambda _: "a_mask.png")
    found = read_masked(str(tmp_path))
    save(tmp_path / "a_mask.png", ids(0) * 9)
    with pytest.raises(ValueError, match="a_mask.png: holds the value 9"):
        read_mask(found, 0)


# ---------------------------------------------------------------- real sets

@needs_real
def test_real_breast_lesions():
    found = read_masked(os.path.join(REAL, "busi"))
    present, kinds = classes_present(found), Counter(name.split("/")[0] for name in found.names)
    assert kinds == {"benign": 346, "malignant": 161, "normal": 106} and present[:, 0].all()
    assert [name.split("/")[0] != "normal" for name in found.names] == present[:, 1].tolist()
    assert found.classes == ["background", "foreground"] and found.groups == found.names
    for i in range(0, 613, 100):
        mask = np.asarray(Image.open(found.paths[i].replace(".jpg", "_mask.png")).convert("L")) > 0
        assert np.array_equal(read_mask(found, i), mask) and read_masked_image(found, i).grey.shape == mask.shape
    splits, notes = split_masked(found, present)
    for split in SPLITS:
        assert notes == [] and abs(present[np.array(splits) == split, 1].mean() - 507 / 613) < 0.01


@needs_real
def test_real_fetal_heads():
    found = read_masked(os.path.join(REAL, "hc18"))
    assert len(found.names) == 816 and classes_present(found).all() and found.layout == "HC18; filled masks"
    assert all(name.startswith(f"training_set/{group}_") for name, group in zip(found.names, found.groups))
    assert found.mm[0].tolist() == [0.1152263402] * 2 and found.circumference[0] == 44.3
    splits, _ = split_masked(found, classes_present(found))
    assert Counter(splits).keys() == {*SPLITS} and len({*zip(found.groups, splits)}) == len({*found.groups})
    for i in (0, 400, 815):  # a circle of the head's area goes around about as far as was measured
        around = 2 * np.sqrt(np.pi * (read_mask(found, i) == 1).sum()) * found.mm[i, 0]
        assert 0.9 < around / found.circumference[i] < 1.02
