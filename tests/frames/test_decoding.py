"""Reading many files in worker processes: order, clips in pieces, damage, the fan of a clip."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from file_tools import save, save_dicom, speckle
from PIL import Image

from frames import images
from frames.fan import find_fan
from frames.images import FRAMES, count_frames, decode_all, decode_chunk, resize_square
from frames.leakage import content_hash, salted

# ---------------------------------------------------------------- many files in worker processes

@pytest.fixture
def mixed(tmp_path):
    """Stills and clips, one of over two chunks' frames -> paths, (name, frame, canvas) of all that is in them."""
    expected = []
    for number, count in enumerate([1, 1, 2 * FRAMES + 9, 1, FRAMES, 5, FRAMES + 1, 1, 1, 1, 3]):
        pages = [speckle(1000 * number + frame) for frame in range(count)]
        path = save(tmp_path / f"{number:02}.tif", *pages)
        expected += [(path, frame, resize_square(page, 8)) for frame, page in enumerate(pages)]
    return sorted({path for path, _, _ in expected}), expected


def decode(paths, canvas=8, crop_fan=False, workers=1):
    """All of decode_all -> rows, canvases, failures, and the files ended after each step."""
    steps = list(decode_all(paths, canvas, crop_fan, b"salt", workers))
    return (np.concatenate([step[1] for step in steps]), np.concatenate([step[2] for step in steps]),
            [entry for step in steps for entry in step[3]], [step[0] for step in steps])


def assert_all(found, paths, expected):
    rows, canvases, failed, ended = found
    assert [(paths[row["image"]], row["frame"]) for row in rows] == [entry[:2] for entry in expected]
    assert np.array_equal(canvases, [square for _, _, square in expected]) and failed == []
    assert ended == sorted(ended) and ended[-1] == len(paths)
    assert rows["sum"].tolist() == canvases.astype(int).sum((1, 2)).tolist()
    assert rows["squares"].tolist() == (canvases.astype(int) ** 2).sum((1, 2)).tolist()
    assert {*zip(rows["width"].tolist(), rows["height"].tolist())} == {(30, 20)}


@pytest.mark.parametrize("workers", [1, 3])
def test_order_and_completeness(mixed, monkeypatch, workers):
    monkeypatch.setattr(images, "CHUNK", 3)
    assert_all(decode(mixed[0], workers=workers), *mixed)


SCRIPT = """import sys
sys.path.insert(0, {root!r})
from frames.images import decode_all
open("log", "a").write(__name__ + " ")
if __name__ == "__main__":
    print(sum(len(step[1]) for step in decode_all({paths!r}, 8, False, b"salt", 2)), __file__, __spec__)
"""


def test_processes_do_not_import_the_script(tmp_path):
    """pretrain.py, for one, would bring torch into each of them."""
    paths = [str(save(tmp_path / f"{number:02}.png", speckle(number))) for number in range(20)]
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(Path(images.__file__).parents[1]), paths=paths))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["20", str(tmp_path / "script.py"), "None"], done.stderr
    assert (tmp_path / "log").read_text() == "__main__ "


@pytest.mark.parametrize("chunk, frames", [(1, 1), (2, 7), (100, 3), (4, 1000)])
def test_any_size_of_chunk(mixed, monkeypatch, chunk, frames):
    monkeypatch.setattr(images, "CHUNK", chunk)
    monkeypatch.setattr(images, "FRAMES", frames)
    for _, rows, canvases, _ in decode_all(mixed[0], 8, False, b"salt", 1):
        assert len(rows) == len(canvases) <= frames
    assert_all(decode(mixed[0]), *mixed)


def test_a_chunk_goes_on_where_it_stopped(mixed, monkeypatch):
    paths, expected = mixed
    reads, read = [], images.read_frames
    monkeypatch.setattr(images, "read_frames", lambda path, first=0: reads.append((path, first)) or read(path, first))
    rows, _, failed, resume = decode_chunk(paths[:3], 0, 8, False, b"s")
    assert len(rows) == FRAMES and failed == [] and resume == (2, FRAMES - 2)
    rows, canvases, _, resume = decode_chunk(paths[2:3], FRAMES - 2, 8, False, b"s")
    assert rows["frame"].tolist() == list(range(FRAMES - 2, 2 * FRAMES - 2)) and resume == (0, 2 * FRAMES - 2)
    assert np.array_equal(canvases[0], expected[FRAMES][2])
    assert reads == [(paths[0], 0), (paths[1], 0), (paths[2], 0), (paths[2], FRAMES - 2)]  # no frame from the start
    for first in (2 * FRAMES + 8, 2 * FRAMES + 9):  # the last frame; none
        rows, _, failed, resume = decode_chunk(paths[2:3], first, 8, False, b"s")
        assert len(rows) == 2 * FRAMES + 9 - first and failed == [] and resume is None


def test_no_paths_are_no_steps():
    assert list(decode_all([], 8, False, b"s", 3)) == []


def test_frames_in_flight_are_bounded(mixed, monkeypatch):
    class Counting(images.ProcessPoolExecutor):
        def submit(self, *args):
            outstanding.append(1)
            most.append(len(outstanding))
            return super().submit(*args)
    outstanding, most = [], []
    monkeypatch.setattr(images, "ProcessPoolExecutor", Counting)
    monkeypatch.setattr(images, "CHUNK", 1)
    for _ in decode_all(mixed[0] * 4, 8, False, b"s", 2):
        outstanding.pop()
    assert not outstanding and len(most) == 4 * (len(mixed[0]) + 3)  # files, and three resumed clips
    assert max(most) == 1 + 3 * 2 + 1  # and that which is handed over


def broken_clip(folder, kind):
    """A clip of 6 frames, whose fourth is damaged -> path, its frames."""
    pages = [speckle(i, (30, 40)) for i in range(6)]
    if kind == "dicom":
        path = save_dicom(folder / "a.dcm", np.stack(pages))
        size = os.path.getsize(path)
        os.truncate(path, size - 3 * 1200 + 600)
    elif kind == "gif":
        path = save(folder / "a.gif", *pages)
        os.truncate(path, os.path.getsize(path) * 6 // 10)
    else:
        dtype = np.uint16 if kind == "deep" else np.uint8
        path = save(folder / "a.tif", *(page.astype(dtype) for page in pages),
                    compression="tiff_adobe_deflate" if kind == "deflate" else None)
        with Image.open(path) as image:
            image.seek(3)
            offset, length = image.tag_v2[273][0], image.tag_v2[279][0]
        if kind == "deflate":  # the other pages stay where they are
            with open(path, "r+b") as file:
                file.seek(offset)
                file.write(b"\xff" * length)
        else:
            os.truncate(path, offset + length // 2)
    return path, pages


@pytest.mark.parametrize("crop_fan", [False, True])
@pytest.mark.parametrize("kind", ["tiff", "deflate", "deep", "gif", "dicom"])
def test_frames_before_damage_stay(tmp_path, kind, crop_fan):
    path, pages = broken_clip(tmp_path, kind)
    good = save(tmp_path / "good.png", speckle(9))
    rows, canvases, failed, ended = decode([path, good], crop_fan=crop_fan)
    assert [tuple(row) for row in rows[["image", "frame"]].tolist()] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    (number, frame, reason), = failed
    assert (number, frame) == (0, 3) and reason and ended[-1] == 2
    if kind != "deep":
        assert rows["hash"].tolist() == [content_hash(page) for page in (*pages[:3], speckle(9))]


def test_reasons_are_words(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    paths = [str(tmp_path / name) for name in ("text.png", "empty.png", "gone.png", "")]
    assert decode(paths)[2] == [(0, 0, "not an image, or cut off in its first bytes"),
                                (1, 0, "not an image, or cut off in its first bytes"),
                                (2, 0, "No such file or directory"), (3, 0, "not a regular file")]


def screen(level, text):
    """A clip's frame: a wedge of speckle in one place, burnt-in text at the border that changes."""
    y, x = np.mgrid[:120, :160]
    inside = (np.hypot(x - 80, y + 20) < 120) & (np.abs(x - 80) < 0.6 * (y + 20))
    grey = np.where(inside, speckle(level, (120, 160)) % level + 1, 0).astype(np.uint8)
    grey[text:text + 2, 2:12] = 200
    return grey


@pytest.mark.parametrize("workers", [1, 2])
def test_a_clip_has_one_fan(tmp_path, workers):
    """Its dark frames would show less of it; that of the first frames holds for resumed chunks, too."""
    clip = [screen(level, 5 + number % 3) for number, level in enumerate([20, 200, 60] + [30] * (FRAMES + 5))]
    still = screen(99, 5)
    paths = [save(tmp_path / "clip.tif", *clip), save(tmp_path / "still.png", still)]
    fans = [find_fan(np.maximum.reduce(clip[:images.FAN_FRAMES])), find_fan(still)]
    assert not fans[0].all()
    rows, canvases, failed, _ = decode(paths, 32, True, workers)
    assert len(rows) == len(clip) + 1 and not failed
    for row, canvas, grey in zip(rows, canvases, [*clip, still]):
        trimmed, _ = images.apply_fan(grey, fans[row["image"]])
        assert (row["height"], row["width"]) == trimmed.shape and np.array_equal(canvas, resize_square(trimmed, 32))
    plain, other, _, _ = decode(paths, 32, False, workers)
    assert np.array_equal(rows["hash"], plain["hash"]) and np.array_equal(rows["looks"], plain["looks"])
    assert rows["hash"].tolist() == [content_hash(grey) for grey in [*clip, still]]
    assert not np.array_equal(canvases, other) and (plain["width"] == 160).all()


def test_frames_of_other_sizes_have_a_fan_of_their_own(tmp_path):
    pages = [screen(99, 5), np.pad(screen(99, 5), ((0, 0), (40, 0))), speckle(0, (9, 9))]
    rows, _, failed, _ = decode([save(tmp_path / "a.tif", *pages)], 16, True)
    assert not failed
    for row, page in zip(rows, pages):
        assert (row["height"], row["width"]) == images.apply_fan(page, find_fan(page))[0].shape


def test_patients_and_studies_are_salted(tmp_path):
    paths = [save_dicom(tmp_path / f"{number}.dcm", speckle(number, (1, 12, 20)), patient, study)
             for number, (patient, study) in enumerate([("P1", "1.2"), ("P1", "1.3"), ("", "1.2"), ("P1 ", "")])]
    paths.append(save(tmp_path / "a.png", speckle(9)))
    rows, *_ = decode(paths)
    one, two, three = salted("P1", b"salt"), salted("1.2", b"salt"), salted("1.3", b"salt")
    assert rows["patient"].tolist() == [one, one, 0, one, 0] and rows["study"].tolist() == [two, three, two, 0, 0]
    other = next(decode_all(paths, 8, False, b"pepper", 1))[1]
    assert not np.isin(other["patient"][:2], rows["patient"]).any() and np.array_equal(other["hash"], rows["hash"])


def test_a_header_that_claims_too_many_frames_is_not_believed(tmp_path):
    """count_frames foretells the disk space: one damaged file must not stop all the others."""
    path = save_dicom(tmp_path / "a.dcm", speckle(0, (2, 12, 20)), NumberOfFrames=2_000_000_000)
    assert count_frames(path) <= os.path.getsize(path)
    rows, _, failed, _ = decode([path])
    assert len(rows) == 2 and failed[0][:2] == (0, 2) and "frame 3 of 2000000000" in failed[0][2]
