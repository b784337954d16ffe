"""Listing files: odd folders, several sources, DICOM, lists."""
import contextlib
import csv
import importlib.util
import os
import signal

import numpy as np
import pytest
from file_tools import greys, save, save_dicom, speckle
from PIL import Image

from frames import lists
from frames.images import count_frames, decode_chunk, read_frames
from frames.lists import list_images
from labelled.labels import read_labelled

ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def alarm():
    """Whatever still waits after 5 s fails: a BaseException, which `except Exception` does not swallow."""
    def hang(*_):
        pytest.fail("still waiting after 5 s")
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- folders

def touch(folder, *names):
    for name in names:
        save(folder / name, np.zeros((1, 1), np.uint8))
    return folder


def test_links_to_folders_are_followed_once(tmp_path):
    src, far = touch(tmp_path / "src", "m/1.png", "m/2.png", "x.png"), touch(tmp_path / "far", "deep/3.png")
    (src / "m" / "up").symlink_to(src)  # a link to the parent
    (src / "z").symlink_to(src / "m")  # to a sibling
    (src / "far1").symlink_to(far)
    (src / "far2").symlink_to(far)
    (far / "back").symlink_to(src)
    (far / "deep" / "self").symlink_to(far / "deep")
    for source in (src, f"{src}/", f"{src}/.//"):
        found = list_images(str(source))
        assert found.names == ["x.png", "far1/deep/3.png", "m/1.png", "m/2.png"], source
        assert [os.path.exists(path) for path in found.paths] == [True] * 4 and found.closed == []


def test_two_links_to_each_other(tmp_path):
    src = touch(tmp_path / "src", "1.png")
    for here, there in ("ab", "ba"):
        touch(src / here, "1.png")
        (src / here / "other").symlink_to(src / there)
    (src / "loop1").symlink_to(src / "loop2")
    (src / "loop2").symlink_to(src / "loop1")
    (src / "loop.png").symlink_to(src / "loop.png")
    assert list_images(str(src)).names == ["1.png", "loop.png", "a/1.png", "a/other/1.png"]
    assert [reason for _, _, reason in decode_chunk([str(src / "loop.png")], 0, 8, False, b"s")[2]] == [
        os.strerror(40)]


def test_files_that_are_listed(tmp_path):
    src = touch(tmp_path / "src", "A.PNG", "b.jpeg", "c.Tif", ".hidden.png", "._b.jpeg")
    (src / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (src / "link.png").symlink_to(src / "A.PNG")
    (src / "folder.png").mkdir()
    for name in ("notes.txt", "README", "1.2.840", "png", "a.png.part", "Thumbs.db"):
        (src / name).write_text("no image")
    found = list_images(str(src))
    assert found.names == ["A.PNG", "b.jpeg", "c.Tif", "gone.png", "link.png"]  # what is gone is told when it is read
    assert found.grouped_by == lists.IMAGE_GROUPS
    assert decode_chunk(found.paths[3:4], 0, 8, False, b"s")[2] == [(0, 0, "No such file or directory")]


@pytest.mark.parametrize("name", ["x.png", "x", "1.2.3", "x.dcm"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_pipe_does_not_hang(tmp_path, alarm, monkeypatch, name, listed):
    src = touch(tmp_path / "src", "a.png")
    os.mkfifo(src / name)
    (src / "list.txt").write_text(f"a.png\n{name}\n")
    source = str(src / "list.txt" if listed else src)
    with monkeypatch.context() as patch:  # is_dicom is asked for all files then
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with contextlib.suppress(ValueError):  # x.dcm is DICOM, by its name
            list_images(source)
    found = list_images(source)
    assert found.names == ["a.png"] + [name] * (listed or name in ("x.png", "x.dcm"))
    path = str(src / name)
    assert count_frames(path) == 1
    with pytest.raises((ValueError, OSError), match="not a regular file"):
        greys(path)


def test_unreadable_folders_are_told(tmp_path, monkeypatch):
    src, scan = touch(tmp_path / "src", "a/1.png", "b/2.png", "c/3.png"), os.scandir
    if ROOT_USER:
        def scandir(path):
            if os.path.basename(path) == "b":
                raise PermissionError(13, "Permission denied", path)
            return scan(path)
        monkeypatch.setattr(os, "scandir", scandir)
    else:
        (src / "b").chmod(0)
    try:
        found = list_images(str(src))
        assert found.names == ["a/1.png", "c/3.png"] and found.closed == [(str(src / "b"), "Permission denied")]
        with pytest.raises(ValueError, match="b: no images found .*; .*b: Permission denied"):
            list_images(str(src / "b"))
    finally:
        (src / "b").chmod(0o755)


# ---------------------------------------------------------------- several sources

def test_several_sources_prefix_names_and_groups(tmp_path):
    one, two = touch(tmp_path / "one", "p/1.png", "q/1.png"), touch(tmp_path / "two", "p/1.png", "1.png")
    (tmp_path / "list.txt").write_text("one/p/1.png\n")
    found = list_images([str(one), str(two), str(tmp_path / "list.txt")])
    assert found.names == ["one/p/1.png", "one/q/1.png", "two/1.png", "two/p/1.png", "list.txt/one/p/1.png"]
    assert found.groups == ["one/p", "one/q", "two", "two/p", "list.txt/one/p"] and found.grouped_by == "parent folder"
    assert [os.path.samefile(path, tmp_path / name) for path, name in zip(found.paths, found.names[:4])] == [True] * 4
    assert list_images([str(one), str(two)], exclude=["p/*"]).names == ["one/q/1.png", "two/1.png"]


def test_sources_of_equal_names_keep_apart(tmp_path, monkeypatch):
    touch(tmp_path / "x" / "data", "p/1.png", "q/1.png")
    touch(tmp_path / "y" / "data", "p/1.png")
    monkeypatch.chdir(tmp_path)
    for sources in (["x/data", "y/data/"], ["x/data", "./y/data"], [f"{tmp_path}/x/data", f"{tmp_path}/y/data"]):
        found = list_images(sources)
        assert len({*found.names}) == len({*found.groups}) == 3, found
        assert all(name.endswith(("x/data/p/1.png", "x/data/q/1.png", "y/data/p/1.png")) for name in found.names)
    monkeypatch.chdir(tmp_path / "x")  # one relative, one absolute
    assert len({*list_images(["data", str(tmp_path / "y/data")]).groups}) == 3


def write_csv(path, *rows, **options):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, **options).writerows(rows)
    return str(path)


def test_group_columns_of_several_sources(tmp_path):
    touch(tmp_path, "1.png", "2.png")
    one = write_csv(tmp_path / "1.csv", ("image", "group"), ("1.png", "P"))
    two = write_csv(tmp_path / "2.csv", ("group", "image"), ("P", "2.png"))
    bare = write_csv(tmp_path / "3.csv", ("image",), ("2.png",))
    found = list_images([one, two])
    assert found.groups == ["P", "P"] and found.names == ["1.csv/1.png", "2.csv/2.png"]  # one patient in two lists
    assert found.grouped_by == "group column"
    for sources in ([one, bare], [bare, one], [one, str(tmp_path)]):
        with pytest.raises(ValueError, match="some have a group column and some have none; give all of them one"):
            list_images(sources)


# ---------------------------------------------------------------- DICOM in folders

@pytest.fixture
def dicoms(tmp_path):
    frames = speckle(0, (2, 12, 20))
    for name in ("a.dcm", "b.IMA", "1.2.840.113619.2", "IM0001", "sub/I_5."):
        save_dicom(tmp_path / "src" / name, frames)
    (tmp_path / "src" / "1.2.9").write_bytes(bytes(200))
    (tmp_path / "src" / "notes.v2").write_bytes((tmp_path / "src" / "IM0001").read_bytes())  # a suffix of another kind
    return touch(tmp_path / "src", "z.png")


def test_dicom_is_found_by_suffix_or_magic(dicoms):
    found = list_images(str(dicoms))
    assert found.names == ["1.2.840.113619.2", "IM0001", "a.dcm", "b.IMA", "z.png", "sub/I_5."]
    for path in found.paths:
        assert count_frames(path) == (1 if path.endswith("z.png") else 2)
        if not path.endswith("z.png"):
            frames = list(read_frames(path))
            assert np.array_equal([frame.grey for frame in frames], speckle(0, (2, 12, 20)))
            assert {frame[2:] for frame in frames} == {(False, (0, 0), "P7", "1.2.7")}
            assert all(np.array_equal(frame.grey, frame.whole) for frame in frames)


def test_missing_pydicom_is_told_at_listing(dicoms, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        list_images(str(dicoms))
    assert str(error.value) == (f"{dicoms / '1.2.840.113619.2'} is DICOM: reading it needs pydicom (pip install "
                                f"pydicom); or --exclude such files")
    with pytest.raises(ValueError, match="IM0001 is DICOM"):
        list_images(str(dicoms), exclude=["1.*", "*.dcm", "*.IMA"])
    assert list_images(str(dicoms), exclude=["1.*", "I*", "*.dcm", "*.IMA", "*/I*"]).names == ["z.png"]


# ---------------------------------------------------------------- lists

def test_text_lists_keep_names_as_they_are(tmp_path):
    odd = ["a b.png", " lead.png", "trail.png ", "tab.png\t", "comma,quote\".png", "ä.png", os.fsdecode(b"\xff.png")]
    touch(tmp_path, *(name for name in odd if name.endswith("png")))
    for end in (b"\n", b"\r\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            for last in (b"", end, 3 * end):
                text = mark + (2 * end).join(map(os.fsencode, odd)) + last
                for name in ("list.txt", "list"):
                    (tmp_path / name).write_bytes(text)
                    found = list_images(str(tmp_path / name))
                    assert found.names == odd and found.paths == [str(tmp_path / name) for name in odd]
    assert found.grouped_by == lists.IMAGE_GROUPS
    assert found.groups == odd


def test_a_path_per_line_may_be_called_csv(tmp_path):
    (tmp_path / "paths.csv").write_text("/data/a.png\r\nsub/b.png\r\n")
    found = list_images(str(tmp_path / "paths.csv"))
    assert found.names == ["/data/a.png", "sub/b.png"] and found.paths == ["/data/a.png", str(tmp_path / "sub/b.png")]


def test_lists_may_be_separated_by_semicolons(tmp_path):
    path = write_csv(tmp_path / "a.csv", ("image", "label", "group"), ("a,1.png", "x", "P"), ("b;2.png", "y", "P"),
                     delimiter=";")
    found = list_images(path)
    assert found.names == ["a,1.png", "b;2.png"] and found.groups == ["P", "P"] and found.grouped_by == "group column"
    (tmp_path / "a.csv").write_text("image;side\na.png;left\n")
    with pytest.raises(ValueError, match=r"columns are image,side; expected image\[,group\]"):
        list_images(path)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("columns", [("image",), ("image", "group"), ("group", "image")])
def test_csv_names_with_newlines(tmp_path, quoting, columns):
    odd = ["a\nb.png", "c\r\nd.png", "e,f.png", 'g"h.png', " i.png ", os.fsdecode(b"\xff.png"), "ä.png"]
    rows = [[name if column == "image" else f"group\n{name}" for column in columns] for name in odd]
    path = write_csv(tmp_path / "a.csv", columns, *rows, quoting=quoting)
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    for source in (path, str(tmp_path / "bom.csv")):
        found = list_images(source)
        assert found.names == odd and found.paths == [str(tmp_path / name) for name in odd]
        assert found.groups == ([f"group\n{name}".strip() for name in odd] if len(columns) == 2 else odd)


@pytest.mark.parametrize("text, line, complaint", [
    ('image,group\na.png,1\nb.png\n', 3, r"expected 2 columns, got \['b.png'\]"),
    ('image,group\r\n"a\nb.png",1\r\n\r\nc.png,\r\n', 5, r"no group in \['c.png', ''\]"),
    ('image,group\n,1\n', 2, r"no image in \['', '1'\]"),
    ('image,label,group\na.png,x,\n', 2, "no group in"),
    ('image,group\na.png,1,2\n', 2, r"expected 2 columns, got \['a.png', '1', '2'\]"),
])
def test_csv_errors_name_the_line(tmp_path, text, line, complaint):
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(ValueError, match=f"a.csv, line {line}: {complaint}"):
        list_images(str(tmp_path / "a.csv"))


def test_a_quote_that_never_ends_is_a_sentence(tmp_path):
    (tmp_path / "a.csv").write_text('image,group\n"a.png,1\n' + "b.png,2\n" * 30_000)
    with pytest.raises(ValueError, match="a.csv"):
        list_images(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("text, read, complaint", [
    ("picture,group\na.png,1\n", list_images, r"columns are picture,group; expected image\[,group\]"),
    ("image,group,image\na.png,1,2\n", list_images, "columns are image,group,image; each must be there once"),
    ("image,group\na.png,1\n", read_labelled, r"columns are image,group; expected image,label\[,group\]"),
    ("image,side\na.png,1\n", list_images, "columns are image,side"),
    ("a.png\nb.png\n", read_labelled, "labels need a folder per class or a .csv"),
    ("", list_images, "no images found"),
    ("image,group\n", list_images, "no images found"),
])
def test_lists_that_are_refused(tmp_path, text, read, complaint):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read(str(tmp_path / "a.csv"))


def test_list_without_a_header_reads_as_paths(tmp_path):
    """UltraDINO's train_paths_2m.csv: one relative path per line, no header."""
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a b.png")
    (tmp_path / "train_paths.csv").write_text("a b.png\n")
    assert list_images(str(tmp_path / "train_paths.csv")).names == ["a b.png"]
