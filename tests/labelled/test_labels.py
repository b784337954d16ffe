"""Labelled sets: class folders, CSVs, FETAL_PLANES_DB as downloaded; splits by group."""
import itertools
import os

import numpy as np
import pytest
from file_tools import save

from frames import lists
from labelled.labels import LabelledSet, has_labels, read_labelled
from labelled.splits import SPLIT_WORDS, SPLITS, check_splits, split_groups


def tree(folder, *names):
    for name in names:
        save(folder / name, np.zeros((1, 1), np.uint8))
    return str(folder)


def table(path, text):
    path.write_bytes(text.encode())
    return str(path)


# ---------------------------------------------------------------- folders

def test_a_folder_per_class(tmp_path):
    """A patient met in two classes is one group; a class folder is no patient."""
    top = tree(tmp_path / "set", "brain/p1/0.png", "brain/p1/0_mask.png", "femur/p1/0.png", "femur/p2/0.png",
               "femur/3.png", "thumbnail.png")
    found = read_labelled(top, exclude=["*_mask.png", "thumb*"])
    assert found.names == ["brain/p1/0.png", "femur/3.png", "femur/p1/0.png", "femur/p2/0.png"]
    assert found.paths == [os.path.join(top, name) for name in found.names]
    assert found.labels == ["brain", "femur", "femur", "femur"]
    assert found.groups == ["p1", "femur/3.png", "p1", "p2"] and found.grouped_by == "parent folder"
    assert found.splits is None and found.columns == {}
    flat = read_labelled(tree(tmp_path / "flat", "a/1.png", "a/2.png", "b/1.png"))
    assert flat.groups == flat.names and flat.grouped_by == lists.IMAGE_GROUPS
    named = read_labelled(top, exclude=["*_mask.png", "thumb*"], group_regex=r"(\d)\.png")
    assert named.groups == ["0", "3", "0", "0"] and named.grouped_by == r"--group_regex (\d)\.png"


@pytest.mark.parametrize("mask, exclude", [
    (["a/1_mask.png"], "'*_mask.png'"), (["a/1_Mask.bmp"], "'*_Mask.bmp'"), (["b/p/2_mask.tif"], "'*_mask.tif'"),
    (["a/1_mask.png", "a/1_mask_1.png", "a/1_mask_2.png"], "'*_mask.png' '*_mask_*.png'"),
])
def test_masks_are_no_images(tmp_path, mask, exclude):
    top = tree(tmp_path, "a/1.png", "b/p/2.png", "b/3_mask.png", "b/unmask.png", *mask)  # 3 has no image
    with pytest.raises(ValueError) as error:
        read_labelled(top)
    assert str(error.value) == (f"{tmp_path}/{mask[0]}: a mask beside its image, and no image; leave masks out with "
                                f"--exclude {exclude}")
    found = read_labelled(top, exclude=exclude.replace("'", "").split())  # as a shell gives it
    assert {*found.names} >= {"a/1.png", "b/p/2.png", "b/unmask.png"} and not {*mask} & {*found.names}


@pytest.mark.parametrize("train, val, test", [("train", "val", "test"), ("Training", "VALID", "testing"),
                                              ("train", "validation", "Test")])
def test_folders_of_splits_hold_class_folders(tmp_path, train, val, test):
    top = tree(tmp_path, f"{train}/a/p1/1.png", f"{train}/b/p1/1.png", f"{train}/b/2.png", f"{val}/b/p2/1.png",
               f"{test}/a/p3/1.png")
    found = dict(zip(*(getattr(read_labelled(top), field) for field in ("names", "labels"))))
    assert found == {f"{train}/a/p1/1.png": "a", f"{train}/b/p1/1.png": "b", f"{train}/b/2.png": "b",
                     f"{val}/b/p2/1.png": "b", f"{test}/a/p3/1.png": "a"}
    found = read_labelled(top)
    assert dict(zip(found.names, found.splits)) == {name: SPLIT_WORDS[name.split("/")[0].lower()]
                                                    for name in found.names}
    assert dict(zip(found.names, found.groups)) == {
        f"{train}/a/p1/1.png": "p1", f"{train}/b/p1/1.png": "p1", f"{train}/b/2.png": f"{train}/b/2.png",
        f"{val}/b/p2/1.png": "p2", f"{test}/a/p3/1.png": "p3"}


def test_a_patient_in_two_split_folders_is_found(tmp_path):
    top = tree(tmp_path, "train/a/p1/1.png", "train/b/p2/1.png", "val/a/p4/1.png", "test/b/p1/1.png")
    found = read_labelled(top)
    with pytest.raises(ValueError, match=r"group 'p1' is in test \(test/b/p1/1.png\) and in train \(train/a/p1"):
        check_splits(found, split_groups(found))


def test_digits_name_classes_and_patients(tmp_path):
    found = read_labelled(tree(tmp_path, "0/1/a.png", "1/1/a.png", "1/0/a.png", "0/2/a.png"))
    assert sorted(zip(found.names, found.groups)) == [("0/1/a.png", "1"), ("0/2/a.png", "2"), ("1/0/a.png", "0"),
                                                      ("1/1/a.png", "1")]


def test_an_unreadable_folder_is_no_smaller_set(tmp_path, monkeypatch):
    top, scan = tree(tmp_path, "a/1.png", "b/2.png"), os.scandir

    def scandir(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"b: cannot be opened \(Permission denied\), and a labelled set"):
        read_labelled(top)


# ---------------------------------------------------------------- CSVs

def test_csv_with_all_columns(tmp_path):
    tree(tmp_path, "1.png", " 2.png", "sub/ä.png")
    path = table(tmp_path / "a.csv", "\ufefflabel, image,machine ,split,group\r\n"
                 "a ,1.png, Aloka,Train,P1\r\n\r\nb, 2.png,\"Voluson, E6\",VALIDATION, P2\r\n"
                 f"a,{tmp_path}/sub/ä.png,x,testing,P1 \r\n,,,,\r\n")
    found = read_labelled(path, by=["machine", "split"])
    assert found.names == ["1.png", " 2.png", f"{tmp_path}/sub/ä.png"] and all(map(os.path.isfile, found.paths))
    assert found.labels == ["a", "b", "a"] and found.groups == ["P1", "P2", "P1"]
    assert found.splits == ["train", "val", "test"] and found.grouped_by == "group column"
    assert found.columns == {"machine": ["Aloka", "Voluson, E6", "x"], "split": ["Train", "VALIDATION", "testing"]}
    assert read_labelled(path, by=None).columns == {}
    assert read_labelled(path, exclude=["*ä*"], by=None).labels == ["a", "b"]


def test_a_group_for_each_image_is_said_to_be_one(tmp_path):
    tree(tmp_path, "1.png", "2.png", "3.png")
    for last, words in (("y", "group column"), ("z", "group column (each image is its own group)")):
        found = read_labelled(table(tmp_path / "a.csv", f"image,label,group\n1.png,a,x\n2.png,b,y\n3.png,b,{last}\n"))
        assert found.grouped_by == words and found.groups == ["x", "y", last]


@pytest.mark.parametrize("columns, rows", [
    ("image;label;group;machine", ("1.png;a;x;Voluson, E6", "2,5.png;b;x;\"A;B\"")),
    ("image,label,group,machine", ("1.png,a,x,\"Voluson, E6\"", "\"2,5.png\",b,x,A;B")),
    ("image;label;group;\"machine\"", ("1.png;a;x;Voluson, E6", "2,5.png;b;x;\"A;B\"")),
])
def test_the_header_tells_the_separator(tmp_path, columns, rows):
    tree(tmp_path, "1.png", "2,5.png")
    path = table(tmp_path / "a.csv", "\r\n".join((columns, *rows)))
    found = read_labelled(path, by=["machine"])
    assert found.names == ["1.png", "2,5.png"] and found.labels == ["a", "b"] and found.groups == ["x", "x"]
    assert found.columns == {"machine": ["Voluson, E6", "A;B"]} and has_labels(path)
    assert not has_labels(table(tmp_path / "b.csv", "image;group\n1.png;x\n"))
    with pytest.raises(ValueError, match="columns are image,group; expected image,label"):
        read_labelled(str(tmp_path / "b.csv"))
    with pytest.raises(ValueError, match="a.csv, line 3: expected 4 columns, got"):
        read_labelled(table(tmp_path / "a.csv", "\n".join((columns, rows[0], "2.png"))), by=["machine"])


def test_a_regex_beside_a_group_column_is_refused(tmp_path):
    tree(tmp_path, "1.png")
    path = table(tmp_path / "a.csv", "image,label,group\n1.png,a,x\n")
    with pytest.raises(ValueError) as error:
        read_labelled(path, group_regex="(.)")
    assert str(error.value) == (f"--group_regex (.): {path} names groups in its column group; drop --group_regex, or "
                                f"the column")
    with pytest.raises(ValueError, match="names groups in its column Patient_num; drop --group_regex$"):
        read_labelled(str(planes_db(tmp_path / "planes")), group_regex="(Patient.*)_Plane")


@pytest.mark.parametrize("rows, groups", [
    (("A/1.png,a", "A/2.png,a", "B/1.png,b"), ["A/1.png", "A/2.png", "B/1.png"]),  # a folder for each class
    (("p1/1.png,a", "p1/2.png,b", "p2/1.png,b"), ["p1", "p1", "p2"]),
    (("p1/1.png,a", "p2/2.png,a", "p3/1.png,b"), ["p1", "p2", "p3"]),
    (("x/a/1.png,a", "x/b/2.png,b", "y/a/1.png,a", "y/b/1.png,b"), None),  # class folders in each split's folder
    (("x/a/p/1.png,a", "x/b/p/2.png,b", "y/a/q/1.png,a"), ["p", "p", "q"]),
    (("x/a/p/1.png,a", "x/b/2.png,b"), ["p", "x/b/2.png"]),
    (("1.png,a", "2.png,b"), None),
])
def test_class_folders_in_a_csv_are_no_patients(tmp_path, rows, groups):
    tree(tmp_path, *(row.split(",")[0] for row in rows))
    found = read_labelled(table(tmp_path / "a.csv", "image,label\n" + "\n".join(rows)))
    assert found.groups == (groups or found.names)
    assert (found.grouped_by == lists.IMAGE_GROUPS) == (found.groups == found.names)


def test_each_file_is_looked_at_once(tmp_path, monkeypatch):
    tree(tmp_path, *(f"{number}.png" for number in range(50)))
    path = table(tmp_path / "a.csv", "image,label\n" + "".join(f"{number}.png,{number % 2}\n" for number in range(50)))
    looks, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: looks.append(str(path)) or stat(path, **how))
    read_labelled(path)
    assert sum(path.endswith("png") for path in looks) == 50


TREE = ["1.png", "2.png", "a/1.png", "b/1.png"]
REFUSED = {  # text of a CSV, by, what is said
    "unlabelled": ("image,label\n1.png,a\n2.png,\n", (), "a.csv, line 3: no label in ['2.png', '']"),
    "blank label": ("image,label\n1.png, \n", (), "a.csv, line 2: no label in"),
    "no image": ("image,label\n,a\n", (), "line 2: no image in ['', 'a']"),
    "no group": ("image,label,group\n1.png,a,x\n\n2.png,a,\n", (), "line 4: no group in"),
    "no split": ("image,label,split\n1.png,a,\n", (), "line 2: no split in"),
    "no machine": ("image,label,machine\n1.png,a,\n", ("machine",), "line 2: no machine in"),
    "short row": ("image,label\n1.png,a\n2.png\n", (), "line 3: expected 2 columns, got ['2.png']"),
    "long row": ("image,label\n1.png,a,b\n", (), "line 2: expected 2 columns, got ['1.png', 'a', 'b']"),
    "bad split": ("image,label,split\n1.png,a,train\n2.png,a,dev\n", (), "line 3: split is 'dev', expected one of"),
    "missing": ("image,label\n1.png,a\n9.png,b\n", (), "a.csv, line 3: {}/9.png (No such file or directory); mend"),
    "twice": ("image,label\n1.png,a\n2.png,b\n./1.png,b\n", (), "a.csv, lines 2 and 4: {}/./1.png is listed twice"),
    "column": ("image,label,age\n1.png,a,3\n", (), "columns are image,label,age; expected image,label[,group][,split]: "
                                                   "name 'age' in --by, or remove it"),
    "one of two columns": ("image,label,age,sex\n1.png,a,3,f\n", ("age",), "name 'sex' in --by, or remove it"),
    "no label column": ("image,group\n1.png,a\n", (), "columns are image,group; expected image,label[,group][,split]"),
    "no such column": ("image,label\n1.png,a\n", ("age",), "--by age: {}/a.csv has no such column; there are image, "),
    "column twice": ("image,label,label\n1.png,a,b\n", (), "columns are image,label,label; each must be there once"),
    "no header": ("1.png\n2.png\n", (), "labels need a folder per class or a .csv"),
    "empty": ("", (), "labels need a folder per class or a .csv"),
    "header only": ("image,label\n", (), "no images found"),
    "open quote": ('image,label\n"1.png,a\n' + "2.png,b\n" * 30_000, (), "does a quotation mark lack its end?"),
}


@pytest.mark.parametrize("text, by, sentence", REFUSED.values(), ids=REFUSED)
def test_csvs_that_are_refused(tmp_path, text, by, sentence):
    tree(tmp_path, *TREE)
    with pytest.raises(ValueError) as error:
        read_labelled(table(tmp_path / "a.csv", text), by=by)
    assert sentence.format(tmp_path) in str(error.value) and "\n" not in str(error.value)


FOLDERS = {  # files, what is said
    "beside classes": (["a/1.png", "b/1.png", "1.png"], "{}/1.png: not in a class folder; expected {}/CLASS/image"),
    "beside classes of a split": (["train/a/1.png", "test/1.png"],
                                  "{}/test/1.png: not in a class folder; expected {}/test/CLASS/image"),
    "beside splits": (["train/a/1.png", "test/a/1.png", "extra/a/1.png"], "{}/extra: stands beside train and test"),
    "nothing": ([], "no images found"),
}


@pytest.mark.parametrize("names, sentence", FOLDERS.values(), ids=FOLDERS)
def test_folders_that_are_refused(tmp_path, names, sentence):
    with pytest.raises(ValueError) as error:
        read_labelled(tree(tmp_path, *names))
    assert sentence.format(tmp_path, tmp_path) in str(error.value)


def test_sources_that_are_refused(tmp_path):
    top = tree(tmp_path / "set", *TREE[2:])
    for source, how, sentence in ((top, {"by": ["machine"]}, "--by machine: .* is a folder, which has no columns"),
                                  (top, {"exclude": ["*"]}, r"no images found .*excluded: \*"),
                                  (str(tmp_path / "none"), {}, "none: no such file or folder"),
                                  (os.path.join(top, "a", "1.png"), {}, "labels need a folder per class or a .csv"),
                                  (top, {"group_regex": "(x)"}, "'a/1.png'")):
        with pytest.raises(ValueError, match=sentence):
            read_labelled(source, **how)
    (tmp_path / "set" / "pack.json").touch()
    with pytest.raises(ValueError, match="is a pack, not a source of images"):
        read_labelled(top)


def test_a_link_to_nowhere_is_a_missing_file(tmp_path):
    top = tree(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"^\S*/b/2.png \(No such file or directory\)"):
        read_labelled(top)


# ---------------------------------------------------------------- FETAL_PLANES_DB

PLANES = ("Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \r\n"
          "Patient00001_Plane1_1_of_2;1;Other;Not A Brain;Other;Aloka;1\r\n"
          "Patient00001_Plane1_2_of_2; 1;Fetal brain ;Trans-thalamic;Op. 1;Voluson E6;1 \r\n"
          "Patient01791_Plane3_1_of_1 ;1791;Maternal cervix;Not A Brain;Op. 2;;0\r\n")


def planes_db(folder, text=PLANES):
    tree(folder / "Images", *(line.split(";")[0].strip() + ".png" for line in PLANES.splitlines()[1:]))
    (folder / "FETAL_PLANES_DB_data.csv").write_bytes(text.encode())
    return folder


@pytest.mark.parametrize("what", ["", "FETAL_PLANES_DB_data.csv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_fetal_planes_as_downloaded(tmp_path, what, mark):
    found = read_labelled(str(planes_db(tmp_path, mark + PLANES) / what), by=["Operator", "Patient_num"])
    assert found.names == ["Images/Patient00001_Plane1_1_of_2.png", "Images/Patient00001_Plane1_2_of_2.png",
                           "Images/Patient01791_Plane3_1_of_1.png"]
    assert all(map(os.path.isfile, found.paths))
    assert found.labels == ["Other", "Fetal brain", "Maternal cervix"]
    assert found.groups == ["Patient00001", "Patient00001", "Patient01791"] and found.grouped_by == "group column"
    assert found.splits == ["train", "train", "test"]
    assert found.columns == {"Operator": ["Other", "Op. 1", "Op. 2"], "Patient_num": ["1", "1", "1791"]}


@pytest.mark.parametrize("old, new, by, sentence", [
    ("Aloka;1", "Aloka;2", (), "line 2: Train is '2', expected one of 1, 0"),
    ("Aloka;1", "Aloka; ", (), "line 2: no Train in"),
    ("Aloka;1", "Aloka", (), "line 2: expected 7 columns, got"),
    ("; 1;", ";;", (), "line 3: no Patient_num in"),
    ("Patient01791_Plane3", "Patient01791_Plane4", (),
     "line 4: .*Images/Patient01791_Plane4_1_of_1.png .No such file or directory"),
    ("", "", ("US_Machine",), "line 4: no US_Machine in"),
    ("", "", ("Machine",), "--by Machine: .* has no such column; there are Image_name, Patient_num, Plane, "
                           "Brain_plane, Operator, US_Machine, Train$"),
])
def test_fetal_planes_that_are_refused(tmp_path, old, new, by, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_labelled(str(planes_db(tmp_path, PLANES.replace(old, new, 1) if old else PLANES)), by=by)


# ---------------------------------------------------------------- splits

def labelled(groups, labels, splits=None):
    groups, labels = [str(group) for group in groups], [str(label) for label in labels]
    names = [f"{number}.png" for number in range(len(groups))]
    return LabelledSet(names, names, labels, groups, splits, {}, "group column")


def group_counts(found, splits):
    """{(class, split): number of groups}."""
    pairs = {(label, split, group) for label, split, group in zip(found.labels, splits, found.groups)}
    return {(label, split): sum(pair[:2] == (label, split) for pair in pairs)
            for label in set(found.labels) for split in SPLITS}


def videos(seed=0, sizes={"a": 3, "b": 8, "c": 41, "d": 148}):
    """Groups of one class with one image up to thirty, so that shares of images differ from shares of groups."""
    rng, groups, labels = np.random.default_rng(seed), [], []
    for label, size in sizes.items():
        for number in range(size):
            images = int(rng.integers(1, 31))
            groups += [f"{label}{number}"] * images
            labels += [label] * images
    return labelled(groups, labels)


@pytest.mark.parametrize("val, test", [(0.2, 0.2), (0.1, 0.3), (0.25, 0.05)])
def test_drawn_shares_are_of_groups_and_alike_in_every_class(val, test):
    found = videos()
    splits = split_groups(found, val=val, test=test)
    assert check_splits(found, splits) == []  # no group in two splits, every class in all
    counts = group_counts(found, splits)
    for split, share in (("val", val), ("test", test), ("train", 1 - val - test)):
        for label, size in (("a", 3), ("b", 8), ("c", 41), ("d", 148)):
            assert max(abs(counts[label, split] - share * size) - 1, 0) < 1e-9 or counts[label, split] == 1
        assert abs(sum(counts[label, split] for label in "abcd") - 200 * share) <= 2


def test_splits_depend_on_seed_groups_and_labels_alone():
    found = videos()
    splits = split_groups(found, seed=3)
    assert split_groups(found, seed=3) == splits
    assert len({tuple(split_groups(found, seed=seed)) for seed in range(6)}) == 6
    order = np.random.default_rng(1).permutation(len(splits))
    shuffled = found._replace(groups=[found.groups[i] for i in order], labels=[found.labels[i] for i in order])
    assert split_groups(shuffled, seed=3) == [splits[i] for i in order]
    once = {group: (label, split) for group, label, split in zip(found.groups, found.labels, splits)}
    single = labelled(once, [label for label, _ in once.values()])  # an image of each group
    assert split_groups(single, seed=3) == [split for _, split in once.values()]


def test_draws_do_not_favour_the_first_names():
    found = labelled(range(100, 120), [0] * 10 + [1] * 10)
    tested = np.mean([np.array(split_groups(found, seed=seed)) == "test" for seed in range(400)], axis=0)
    assert abs(tested - 0.2).max() < 5 * (0.2 * 0.8 / 400) ** 0.5


def test_classes_of_few_groups_go_where_they_are_needed_most():
    found = labelled("abcdefghij", "xyyzzz" + "wwww")
    counts = group_counts(found, split_groups(found))
    assert [counts["x", split] for split in SPLITS] == [1, 0, 0]
    assert [counts["y", split] for split in SPLITS] == [1, 0, 1]
    assert [counts["z", split] for split in SPLITS] == [1, 1, 1]
    notes = check_splits(found, split_groups(found))
    assert notes == ["class 'x' has no val image", "class 'y' has no val image", "class 'x' has no test image"]


def missing_classes(has, drawn):
    """What a draw leaves out: 1000 for a class that train (0) lacks, 1 for one that another split lacks."""
    return sum((1000 if split == 0 else 1) * (~has[np.array(drawn) == split].any(0)).sum() for split in range(3))


@pytest.mark.parametrize("seed", range(12))
def test_groups_of_several_classes_reach_all_splits_if_that_can_be(seed):
    """Against all 3^G ways to split."""
    rng = np.random.default_rng(seed)
    has = rng.random((6, 3)) < rng.uniform(0.3, 0.7)
    has[np.arange(6), rng.integers(0, 3, 6)] = True
    has = has[:, has.any(0)]
    found = labelled(*np.nonzero(has))
    splits = dict(zip(found.groups, split_groups(found, seed)))
    drawn = [("train", "test", "val").index(splits[str(group)]) for group in range(6)]
    ways = itertools.product(range(3), repeat=6)
    assert missing_classes(has, drawn) == min(missing_classes(has, way) for way in ways)


def test_patients_who_hold_all_classes_are_split_by_share():
    found = labelled(np.repeat(np.arange(50), 3), [0, 1, 2] * 50)
    counts = group_counts(found, split_groups(found))
    assert {(split, counts[label, split]) for label in "012" for split in SPLITS} == {
        ("train", 30), ("val", 10), ("test", 10)}


def test_a_class_counts_the_patients_that_rarer_classes_have_placed():
    """Every patient has class 1, half of them class 0."""
    found = labelled([*range(50), *range(100)], [0] * 50 + [1] * 100)
    counts = group_counts(found, split_groups(found))
    assert [counts["0", split] for split in SPLITS] == [30, 10, 10]
    assert [counts["1", split] for split in SPLITS] == [60, 20, 20]


def test_rounding_of_many_small_classes_evens_out():
    found = labelled(range(70), np.arange(70) // 7)  # of seven, val and test are owed 1.4 each
    splits = split_groups(found)
    assert splits.count("train") == 40 and splits.count("val") == splits.count("test") == 15


def test_official_splits_stay_and_validation_comes_from_train_by_patient():
    found = videos(1)
    official = ["test" if group[-1] in "02468" else "train" for group in found.groups]
    found = found._replace(splits=official)
    splits = split_groups(found)
    assert [split == "test" for split in splits] == [split == "test" for split in official]
    assert check_splits(found, splits) == ["class 'a' has no val image"]  # one patient in train
    counts = group_counts(found, splits)
    for label in "bcd":
        train = counts[label, "train"] + counts[label, "val"]
        assert abs(counts[label, "val"] - 0.2 * train) <= 1
    everything = found._replace(splits=["val" if split == "train" and group[-1] == "1" else split
                                        for split, group in zip(official, found.groups)])
    assert split_groups(everything, seed=9) == everything.splits


@pytest.mark.parametrize("splits, sentence", [
    (["val"] * 4, "the splits name val but no train images"),
    (["train"] * 4, "the splits name train but no test images; name some, or leave the splits out"),
    (["train", "val", "train", "val"], "the splits name train and val but no test images"),
    (["test", "val", "test", "val"], "the splits name val and test but no train images"),
])
def test_splits_without_train_or_test_are_refused(splits, sentence):
    with pytest.raises(ValueError, match=sentence):
        split_groups(labelled("abcd", "xyxy", splits))


@pytest.mark.parametrize("val, test", [(0, 0.2), (0.2, 0), (0.5, 0.5), (-0.1, 0.2)])
def test_shares_that_leave_nothing_are_refused(val, test):
    with pytest.raises(ValueError, match="shares of val and test groups"):
        split_groups(labelled("abcd", "xyxy"), val=val, test=test)


@pytest.mark.parametrize("groups, labels, splits, sentence", [
    ("aabc", "xyxy", ["train", "val", "val", "test"],
     r"group 'a' is in train \(0.png\) and in val \(1.png\): splits must not share a group; mend the splits"),
    ("abcd", "xyxz", ["train", "train", "val", "test"], r"class 'z' is in test \(3.png\) but not in train"),
    ("abcd", "xyxy", ["train", "train", "test", "test"], "no image is in val: 4 groups by group column do not fill"),
    ("abcd", "xxxx", ["train", "train", "val", "test"], "all images are of one class, 'x': a classifier needs two"),
])
def test_splits_that_prove_nothing_are_refused(groups, labels, splits, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_splits(labelled(groups, labels), splits)


def test_too_few_groups_leave_a_split_empty():
    found = labelled("aabb", "xyxy")
    with pytest.raises(ValueError, match="no image is in val: 2 groups by group column"):
        check_splits(found, split_groups(found))
