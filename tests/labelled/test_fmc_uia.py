"""FMC_UIA's CSVs: what is read of them, and which rows are wrong."""
import csv
import os

import numpy as np
import pytest
from file_tools import save, speckle
from PIL import Image

from frames import lists
from frames.images import read_image
from labelled.fmc_uia import BOX, Task, read_task_mask, read_tasks

NBSP = "\u00a0"
A, B, C = (f"../Detection/One/uterine fibroid{NBSP}images_871/a, b (1).png", "../Segmentation/Two/x y/it's.bmp",
           "..\\Classification\\Six\\\"q\" ä.jpg")
SHAPES = {A: (20, 30), B: (24, 16), C: (11, 40)}
SEG = dict(task_id="seg", task_name="segmentation", num_classes=3)
CLS = dict(task_id="cls", task_name="classification", num_classes=3)
DET = dict(task_id="det", task_name="detection", num_classes=1)
REG = dict(task_id="reg", task_name="Regression", num_classes=2)


def table(path, rows, **how):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, columns, **how)
        writer.writeheader()
        writer.writerows(rows)


def place(top, relative):
    return top / "csv_files" / relative.replace("\\", "/")


def images(top, names, shape=(20, 30)):
    """Blank images; names start from csv_files."""
    for name in names:
        save(place(top, name), np.zeros(SHAPES.get(name, shape), np.uint8))


def stripes(shape):
    return (np.arange(np.prod(shape)) % 3).astype(np.uint8).reshape(shape)


def boxed(*box):
    return dict(zip(BOX, box))


def tree(top):
    """Three images of three sizes, four tasks; A serves three of them."""
    images(top, SHAPES)
    for name in (A, B):
        save(place(top, f"../masks {NBSP}/{os.path.basename(name)}.png"), stripes(SHAPES[name]))
    table(top / "csv_files/Seg-Three_1.seg.csv", [
        dict(image_path=name, **SEG, mask_path=f"../masks {NBSP}/{os.path.basename(name)}.png") for name in (B, A)],
        encoding="utf-8-sig")
    table(top / "csv_files/Cls-Three_1.cls.csv", [dict(image_path=C, **CLS, mask=2), dict(image_path=A, **CLS, mask=0)],
          delimiter=";")
    table(top / "csv_files/Det.csv", [dict(image_path=A, **DET, **boxed(0, 0, 30, 20.0)),
                                      dict(image_path=B, **DET, **boxed(1.5, 2, 3, 24))])
    table(top / "csv_files/Reg.csv", [
        dict(image_path=B, **REG, point_1_xy="[0, 24.0]", point_2_xy=""),
        dict(image_path=C, **REG, point_1_xy="[3.25,4]", point_2_xy="[ 40, 11 ]")])
    (top / "csv_files/._Reg.csv").write_bytes(b"\0\5\x16\7")  # as a Mac leaves beside a file
    return top


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("data", ["", "csv_files", "csv_files/", "elsewhere"])
def test_what_is_written_is_read(tmp_path, data):
    top = tree(tmp_path / "set 1")
    if data == "elsewhere":
        (top / "csv_files").rename(top / data)
    found = read_tasks(f"{top}/{data}")
    assert found.tasks == [Task("cls", "classification", 3), Task("det", "detection", 1), Task("reg", "regression", 2),
                           Task("seg", "segmentation", 3)]
    assert found.csv_folder == str(top / ("elsewhere" if data == "elsewhere" else "csv_files")) and found.wrong == []
    order = [C, A, B]  # Classification, Detection, Segmentation
    assert found.paths == [os.path.normpath(place(top, name)) for name in order]
    assert found.names == [("" if data != "elsewhere" else "../") + name.replace("\\", "/")[3:] for name in order]
    assert found.groups == found.names and found.grouped_by == lists.IMAGE_GROUPS and found.splits is None
    assert found.sizes.tolist() == [list(SHAPES[name][::-1]) for name in order] and found.sizes.dtype == np.int64
    cls, det, reg, seg = (found.rows[task.name] for task in found.tasks)
    assert [rows.images.tolist() for rows in (cls, det, reg, seg)] == [[0, 1], [1, 2], [2, 0], [2, 1]]
    assert cls.targets.tolist() == [2, 0] and cls.targets.dtype == np.int64 and cls.mask_paths == [None, None]
    assert det.targets.tolist() == [[0, 0, 30, 20], [1.5, 2, 3, 24]] and det.targets.dtype == np.float64
    np.testing.assert_array_equal(reg.targets, [[[0, 24], [np.nan, np.nan]], [[3.25, 4], [40, 11]]])
    assert cls.image_paths == [C, A] and reg.lines == ["Reg.csv, line 2", "Reg.csv, line 3"]
    assert seg.mask_paths == [f"../masks {NBSP}/{os.path.basename(name)}.png" for name in (B, A)]
    for mask, name in zip(seg.targets, (B, A)):
        assert os.path.isabs(mask)
        np.testing.assert_array_equal(read_task_mask(mask, 3), stripes(SHAPES[name]))


def test_one_csv_of_all_tasks_as_pandas_writes_it(tmp_path):
    """Columns that a task does not use are empty; whole numbers beside empty cells become 2.0."""
    images(tmp_path, ["a.png"])
    rows = [dict(image_path="a.png", **dict(CLS, num_classes="3.0"), mask="2.0"),
            dict(image_path="a.png", **dict(DET, num_classes="1.0"), **boxed(0, 0, 1, 1)),
            dict(image_path="a.png", **dict(REG, num_classes="2.0"), point_1_xy="[1, 2]", point_2_xy="[0, 0]")]
    table(tmp_path / "csv_files/all.csv", rows)
    found = read_tasks(tmp_path)
    assert [found.rows[name].targets.tolist() for name in ("cls", "det", "reg")] == [
        [2], [[0, 0, 1, 1]], [[[1, 2], [0, 0]]]]
    assert [task.K for task in found.tasks] == [3, 1, 2] and len(found.paths) == 1


def test_sizes_are_those_of_the_image_as_it_is_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    for name, how in (("a.jpg", dict(exif=exif)), ("b.png", dict(exif=exif)), ("c.tif", dict(tiffinfo={0x0112: 6})),
                      ("d.jpg", dict(exif=b"Exif\0\0garbage")), ("e.gif", {})):
        save(tmp_path / name, np.zeros((20, 30), np.uint8), **how)
    table(tmp_path / "t.csv", [dict(image_path=name, **CLS, mask=0)
                               for name in ("a.jpg", "b.png", "c.tif", "d.jpg", "e.gif")])
    found = read_tasks(tmp_path)
    assert found.sizes.tolist() == [list(read_image(path).grey.shape[::-1]) for path in found.paths]
    assert found.sizes.tolist() == [[20, 30]] * 3 + [[30, 20]] * 2


def test_tasks_are_chosen_by_name(tmp_path):
    found = read_tasks(tree(tmp_path), tasks=["reg", "cls"])
    assert [task.name for task in found.tasks] == ["cls", "reg"] == list(found.rows)
    assert found.names == ["Classification/Six/\"q\" ä.jpg", A[3:], B[3:]]
    with pytest.raises(ValueError, match="has no task 'sag'; there are cls, det, reg, seg"):
        read_tasks(tmp_path, tasks=["reg", "sag"])


def test_unlabelled(tmp_path):
    """For prediction: labels may be wrong or not there, masks are names only; images must be there."""
    images(tmp_path, ["a.png", "b.png"])
    rows = [dict(image_path=f"{name}.png", **task, mask_path=mask) for name in "ab"
            for task, mask in ((SEG, f"../S/{name}.png"), (CLS, ""), (DET, "x.xml"), (REG, ""))]
    table(tmp_path / "csv_files/all.csv", rows)
    found = read_tasks(tmp_path, labelled=False)
    assert all(rows.targets is None and rows.images.tolist() == [0, 1] for rows in found.rows.values())
    assert found.rows["seg"].mask_paths == ["../S/a.png", "../S/b.png"] and found.rows["cls"].mask_paths == [None] * 2
    with pytest.raises(ValueError, match="no column mask, which classification with num_classes 3 needs"):
        read_tasks(tmp_path)
    rows = [{key: row[key] for key in ("image_path", *CLS)} for row in rows] + [dict(image_path="c.png", **CLS)]
    table(tmp_path / "csv_files/all.csv", rows)
    with pytest.raises(ValueError, match=r"1 of 9 rows are wrong: all.csv, line 10: .*c.png is not there"):
        read_tasks(tmp_path, labelled=False)
    assert read_tasks(tmp_path, labelled=False, skip_wrong_rows=True).rows["reg"].mask_paths == [None, None]


# ---------------------------------------------------------------- wrong rows

def mask_files(top):
    """Masks for a 30 x 20 image with K = 3: {name: what is wrong, or None}, all with the classes 0 and 2."""
    levels = np.zeros((20, 30), np.uint8)
    levels[:5] = 2
    palette = Image.fromarray(levels).convert("P")
    palette.putdata(levels.ravel().tolist())
    palette.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 9])
    coloured = np.stack([levels] * 3, 2)
    pictures = {"grey.png": levels, "palette.png": palette, "rgb.png": coloured, "deep.png": levels.astype(np.uint16),
                "rgba.png": np.concatenate([coloured, np.full((20, 30, 1), 255, np.uint8)], 2),
                "empty.png": np.zeros((20, 30), np.uint8), "3.png": np.where(levels, 3, levels).astype(np.uint8),
                "255.png": np.where(levels, 255, levels).astype(np.uint8), "turned.png": levels.T.copy(),
                "colours.png": coloured * np.array([1, 0, 1], np.uint8)}
    for name, picture in pictures.items():
        save(top / name, picture)
    (top / "cut.png").write_bytes((top / "grey.png").read_bytes()[:50])
    return levels, {**dict.fromkeys(["grey.png", "palette.png", "rgb.png", "deep.png", "rgba.png", "empty.png"]),
                    "3.png": "3.png holds 3, expected class numbers from 0 to 2", "255.png": "255.png holds 255, exp",
                    "turned.png": "turned.png has 20 x 30 pixels, its image 30 x 20",
                    "colours.png": "colours.png holds #020002", "cut.png": "cut.png cannot be read (",
                    "none.png": "none.png", "": "no mask_path"}


def wrong_tables(top):
    """CSVs of sound and wrong rows: {file: [(row, what is wrong or None)]}."""
    names = [f"{k}.png" for k in range(20)]
    images(top, names)
    (top / "csv_files/broken.jpg").write_bytes(b"no image")
    (top / "csv_files/folder.png").mkdir()
    save(top / "csv_files/cut.jpg", speckle(90, (200, 300)))
    whole = (top / "csv_files/cut.jpg").read_bytes()
    (top / "csv_files/cut.jpg").write_bytes(whole[:len(whole) // 2])  # its header is whole
    save(top / "csv_files/clip.gif", *(np.full((9, 9), level, np.uint8) for level in (1, 200)))
    cls = [("0", 0, None), ("1", 3, "mask, the class, is '3', expected a whole number from 0 to 2"),
           ("2", -1, "is '-1'"), ("3", 1.5, "is '1.5'"), ("4", "", "is ''"), ("5", "cyst", "is 'cyst'"), ("6", 2, None),
           ("6", 1, "6.png is listed twice for cls, first in Cls.csv, line 8"), ("nan", 1, "nan.png is not there"),
           ("7", 3, "is '3'"), ("7", 1, None)]  # its sound row counts
    files = {"Cls.csv": [(dict(image_path=f"{name}.png", **CLS, mask=label), what) for name, label, what in cls] + [
        (dict(image_path=path, **CLS, mask=0), what) for path, what in (
            ("broken.jpg", "broken.jpg cannot be read (not an image, or cut off)"), ("folder.png", "is not there"),
            ("cut.jpg", "cut.jpg cannot be read ("), ("clip.gif", "clip.gif cannot be read (holds several frames"),
            ("", "no image_path"), ("./x/../6.png", "listed twice"), ("Cls.csv", "or is no image (.png, "))]}
    box = "expected x_min, y_min, x_max, y_max of some extent inside its image of 30 x 20 pixels"
    boxes = [((0, 0, 30, 20), None), ((0, 0, 30.5, 20), box), ((0, 0, 30, 21), box), ((-1, 0, 5, 5), box),
             ((0, -.1, 5, 5), box), ((5, 0, 5, 5), box), ((6, 0, 5, 5), box), ((0, 5, 5, 5), box), ((0, 0, "", 5), box),
             (("a", 0, 5, 5), box), (("nan", 0, 5, 5), box), ((0, 0, "inf", 5), box), ((1, 2, 3, 4), None)]
    files["Det.csv"] = [(dict(image_path=names[k], **DET, **boxed(*own)), what) for k, (own, what) in enumerate(boxes)]
    point = "point_2_xy is '{}', expected two numbers, as in [12.5, 40], inside its image of 30 x 20 pixels"
    points = ["[1]", "[1, 2, 3]", "1, 2", "(1, 2)", "[1 2]", "[true, 1]", '["1", "2"]', "[NaN, 1]", "[1, Infinity]",
              "[30.1, 1]", "[1, 20.1]", "[-1, 1]", "[1, -0.5]", "null", "[null, null]", '{"x": 1, "y": 2}', "3",
              "[" * 9999]
    files["Reg.csv"] = [
        (dict(image_path=names[0], **REG, point_1_xy="", point_2_xy=" "), "all points are missing"),
        (dict(image_path=names[1], **REG, point_1_xy="", point_2_xy="[30, 20]"), None)] + [
        (dict(image_path=names[k], **REG, point_1_xy="[1, 2]", point_2_xy=text), point.format(text[:40]))
        for k, text in enumerate(points, 2)]
    files["Seg.csv"] = [(dict(image_path=names[k], **SEG, mask_path=name and f"../masks/{name}"), what)
                        for k, (name, what) in enumerate(mask_files(top / "masks")[1].items())]
    for file, rows in files.items():
        table(top / "csv_files" / file, [row for row, _ in rows])
    return files


def test_every_wrong_row_is_named_and_no_other_is_lost(tmp_path):
    files = wrong_tables(tmp_path)
    rows = [(f"{file}, line {number}", row, what) for file in sorted(files)
            for number, (row, what) in enumerate(files[file], 2)]
    wrong = [(where, what) for where, _, what in rows if what]
    found = read_tasks(tmp_path, skip_wrong_rows=True)
    assert [sentence.split(": ")[0] for sentence in found.wrong] == [where for where, _ in wrong]
    for sentence, (_, what) in zip(found.wrong, wrong):
        assert what in sentence
    for name in ("cls", "det", "reg", "seg"):
        own = [(where, row["image_path"]) for where, row, what in rows if not what and row["task_id"] == name]
        assert [*zip(found.rows[name].lines, found.rows[name].image_paths)] == own
        assert [found.names[i] for i in found.rows[name].images] == [f"csv_files/{path}" for _, path in own]
    assert found.rows["cls"].targets.tolist() == [0, 2, 1] and found.rows["det"].targets[1].tolist() == [1, 2, 3, 4]
    used = {row["image_path"] for _, row, what in rows if not what}
    assert {*found.names} == {f"csv_files/{path}" for path in used} and len(found.names) == len(used)
    with pytest.raises(ValueError) as error:
        read_tasks(tmp_path)
    assert str(error.value) == (f"{tmp_path}/csv_files: {len(wrong)} of {len(rows)} rows are wrong: "
                                f"{'; '.join(found.wrong[:20])}; and {len(wrong) - 20} more; mend them, or add "
                                f"--skip_wrong_rows")


def test_a_task_of_wrong_rows_only_is_not_dropped_in_silence(tmp_path):
    tree(tmp_path)
    table(tmp_path / "csv_files/Det.csv", [dict(image_path=A, **DET, **boxed(0, 0, 0, 20))])
    with pytest.raises(ValueError, match="1 of 7 rows are wrong: Det.csv, line 2: the box is 0, 0, 0, 20, expected .*; "
                                         "mend them, or add --skip_wrong_rows and leave out det, which would be empty"):
        read_tasks(tmp_path, skip_wrong_rows=True)


def test_masks_of_any_kind_are_class_numbers(tmp_path):
    levels, masks = mask_files(tmp_path)
    for name in (name for name, what in masks.items() if not what and name != "empty.png"):
        mask = read_task_mask(str(tmp_path / name), 3)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, levels, err_msg=name)
    assert not read_task_mask(str(tmp_path / "empty.png"), 2).any()
    with pytest.raises(ValueError, match="holds 2, expected class numbers from 0 to 1"):
        read_task_mask(str(tmp_path / "grey.png"), 2)


ROW = dict(image_path="a.png", **CLS, mask=0)
REFUSED = {  # rows, what is said
    "kind": ([dict(ROW, task_name="ranking")], "line 2: task_name is 'ranking', expected one of segmentation, classif"),
    "no number": ([ROW, dict(ROW, num_classes="two")], "line 3: num_classes is 'two', in classification expected a "
                                                       "whole number from 2"),
    "half": ([dict(ROW, num_classes=2.5)], "num_classes is '2.5'"), "one class": ([dict(ROW, num_classes=1)], "is '1'"),
    "background only": ([dict(ROW, task_name="segmentation", num_classes=1)], "in segmentation expected a whole"),
    "masks are bytes": ([dict(ROW, task_name="segmentation", num_classes=257)], "from 2 to 256"),
    "two boxes": ([dict(ROW, task_name="detection", num_classes=2)], "is '2', in detection expected 1"),
    "no points": ([dict(ROW, task_name="Regression", num_classes=0)], "is '0', in regression expected a whole number "),
    "unnamed": ([ROW, dict(ROW, task_id=" ")], "line 3: no task_id in"),
    "two kinds": ([ROW, dict(ROW, **{**SEG, "task_id": "cls"}, mask_path="m.png")],
                  "line 3: cls is segmentation with num_classes 3, but classification with 3 in t.csv, line 2"),
    "two Ks": ([ROW, dict(ROW, num_classes=4)], "line 3: cls is classification with num_classes 4, but classification "
                                                "with 3 in t.csv, line 2"),
    "no column": ([{key: ROW[key] for key in ROW if key != "task_name"}], "t.csv: has no column task_name; expected"),
    "no box": ([dict(ROW, **DET)], "t.csv, line 2: there is no column x_min, which detection"),
    "two points of three": ([dict(ROW, **dict(REG, num_classes=3), point_1_xy="", point_2_xy="")],
                            "no column point_3_xy, which regression with num_classes 3 needs"),
    "no rows": ([], "t.csv: has no column image_path"),
    "split": ([dict(ROW, split="dev")], "t.csv, line 2: split is 'dev', expected one of train"),
    "half a split": ([dict(ROW, split="train"), dict(ROW, split="")], "line 2 and t.csv, line 3 has a split, one has"),
}


@pytest.mark.parametrize("rows, sentence", REFUSED.values(), ids=REFUSED)
def test_tables_that_cannot_be_meant_are_refused(tmp_path, rows, sentence):
    table(tmp_path / "t.csv", rows)
    with pytest.raises(ValueError) as error:
        read_tasks(tmp_path, skip_wrong_rows=True)
    assert sentence in str(error.value)


def test_folders_without_tables(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder; expected the challenge's"):
        read_tasks(tmp_path / "none")
    with pytest.raises(ValueError, match="0 CSVs, no rows; expected csv_files, or the folder above it"):
        read_tasks(tmp_path)
