"""Packs whose files are damaged: refused, and the file named."""
import shutil

import pytest
from test_faults import encode, speckle

import pack
from frames.packed import PACK_VERSION, Pack


@pytest.fixture(scope="module")
def good_pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    for number in range(6):
        (folder / "src" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        (folder / "src" / str(number % 2) / f"{number}.png").write_bytes(encode("PNG", speckle(number)))
    pack.make_pack([str(folder / "src")], str(folder / "good"), canvas=8, workers=1, log=list)
    return folder / "good"


def edit(file, old, new):
    """A change of text: old must be there."""
    def change(folder):
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))
    return change


def cell(row, column, value):
    """A change of one cell of index.csv."""
    def change(folder):
        lines = [line.split(",") for line in (folder / "index.csv").read_text().splitlines()]
        lines[row + 1][lines[0].index(column)] = value
        (folder / "index.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    return change


def rewrite(file, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def remove(file):
    return lambda folder: (folder / file).unlink()


DAMAGE = {
    "no canvases": (remove("canvases.u8"), "canvases.u8"),
    "canvases shorter": (rewrite("canvases.u8", lambda data: data[:-1]), "canvases.u8"),
    "canvases longer": (rewrite("canvases.u8", lambda data: data + b"x"), "canvases.u8"),
    "canvases empty": (rewrite("canvases.u8", lambda data: b""), "canvases.u8"),
    "no index": (remove("index.csv"), "index.csv"),
    "index empty": (rewrite("index.csv", lambda data: b""), "index.csv"),
    "row missing": (rewrite("index.csv", lambda data: b"".join(data.splitlines(True)[:-1])), "index.csv"),
    "row twice": (rewrite("index.csv", lambda data: data + data.splitlines(True)[-1]), "index.csv"),
    "row cut off": (rewrite("index.csv", lambda data: data[:-20]), "index.csv"),
    "row garbage": (rewrite("index.csv", lambda data: data[:-20] + b"\xff\xfe\0" * 9), "index.csv"),
    "index binary": (rewrite("index.csv", lambda data: bytes(range(256)) * 9), "index.csv"),
    "width no number": (cell(2, "width", "wide"), "index.csv"),
    "width 0": (cell(2, "width", "0"), "index.csv"),
    "height negative": (cell(2, "height", "-24"), "index.csv"),
    "hash no hex": (cell(2, "hash", "x" * 16), "index.csv"),
    "hash short": (cell(2, "hash", "1234"), "index.csv"),
    "looks short": (cell(2, "looks", "0" * 48), "index.csv"),
    "group unknown": (cell(2, "group", "2"), "index.csv"),
    "group negative": (cell(2, "group", "-1"), "index.csv"),
    "no groups": (remove("groups.csv"), "groups.csv"),
    "group missing": (rewrite("groups.csv", lambda data: b"".join(data.splitlines(True)[:-1])), "groups.csv"),
    "groups garbage": (edit("groups.csv", "\n1,", "\n1,no digest"), "groups.csv"),
    "no pack.json": (remove("pack.json"), "pack"),
    "pack.json cut off": (rewrite("pack.json", lambda data: data[:99]), "pack"),
    "pack.json a list": (rewrite("pack.json", lambda data: b"[]"), "pack"),
    "pack.json bare": (edit("pack.json", '"images"', '"pictures"'), "pack.json"),
    "other version": (lambda folder: edit("pack.json", f'"version": {PACK_VERSION}', '"version": 1')(folder),
                      "pack.json: pack version 1"),
    "no version": (edit("pack.json", '"version"', '"vision"'), "pack.json: pack version None"),
    "other canvas": (edit("pack.json", '"canvas": 8', '"canvas": 16'), "canvases.u8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pack_is_refused_by_name(good_pack, tmp_path, damage):
    change, complaint = DAMAGE[damage]
    shutil.copytree(good_pack, tmp_path / "copy")
    assert len(Pack(str(tmp_path / "copy"))) == 6
    change(tmp_path / "copy")
    with pytest.raises(ValueError) as error:
        Pack(str(tmp_path / "copy"))
    assert str(tmp_path / "copy") in str(error.value) and complaint in str(error.value)


def test_a_pack_without_names_is_whole(good_pack, tmp_path):
    shutil.copytree(good_pack, tmp_path / "copy")
    for file in ("names.csv", "skipped.txt"):
        (tmp_path / "copy" / file).unlink()
    assert Pack(str(tmp_path / "copy")).names([0, 5]) == ["canvas 0", "canvas 5"]
