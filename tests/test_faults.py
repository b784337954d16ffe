"""Damaged files by the hundred: packing goes on, tells every loss, keeps memory bounded. Damaged packs are refused."""
import csv
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pack
from frames import images
from frames.images import IMAGE_SUFFIXES, read_frames, resize_square
from frames.packed import Pack

ROOT = Path(__file__).resolve().parents[1]
CANVAS = 32
MEGABYTES = 700  # peak of any process: the interpreter with torch takes 250, a frame of MAX_PIXELS has to fit the rest


def speckle(seed, shape=(24, 36)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# ---------------------------------------------------------------- whole files

def encode(kind, *pages, **options):
    file, pages = io.BytesIO(), [Image.fromarray(page) for page in pages]
    if len(pages) > 1:
        options.update(save_all=True, append_images=pages[1:])
    pages[0].save(file, kind, **options)
    return file.getvalue()


def dicom_file(frames, **elements):
    import pydicom
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.PatientID, ds.PhotometricInterpretation, ds.SamplesPerPixel, ds.PixelRepresentation = "P", "MONOCHROME2", 1, 0
    ds.NumberOfFrames, ds.Rows, ds.Columns = frames.shape
    ds.BitsAllocated = ds.BitsStored = 8 * frames.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelData = frames.tobytes()
    ds["PixelData"].VR = "OB" if frames.itemsize == 1 else "OW"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def whole_files():
    """Name -> bytes of 40 valid files of every kind."""
    made = {}
    for seed in range(2):
        grey, clip = speckle(seed), [speckle(10 * seed + frame) for frame in range(5)]
        deep, rgb = grey.astype(np.uint16) * 200, np.dstack([grey, grey, speckle(seed + 50)])
        files = {
            "grey.png": encode("PNG", grey), "deep.png": encode("PNG", deep), "rgb.png": encode("PNG", rgb),
            "grey.jpg": encode("JPEG", grey), "rgb.jpg": encode("JPEG", rgb, quality=30),
            "progressive.jpg": encode("JPEG", rgb, progressive=True),
            "grey.bmp": encode("BMP", grey), "rgb.bmp": encode("BMP", rgb),
            "still.gif": encode("GIF", grey), "clip.gif": encode("GIF", *clip),
            "grey.tif": encode("TIFF", grey), "deep.tif": encode("TIFF", deep),
            "float.tif": encode("TIFF", grey.astype(np.float32)), "clip.tif": encode("TIFF", *clip),
            "deep_clip.tif": encode("TIFF", *(page.astype(np.uint16) for page in clip)),
            "lzw.tif": encode("TIFF", *clip, compression="tiff_lzw"),
            "deflate.tif": encode("TIFF", *clip, compression="tiff_adobe_deflate")}
        try:
            files.update({"still.dcm": dicom_file(grey[None]), "clip.dcm": dicom_file(np.stack(clip)),
                          "1.2.840": dicom_file(np.stack(clip).astype(np.uint16))})
        except ImportError:  # DICOM is optional
            pass
        made.update({f"{seed}_{name}" if name[0].isalpha() else f"{name}.{seed}": data for name, data in files.items()})
    return made


# ---------------------------------------------------------------- damage

def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *more, bits=8, colour=0):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(more) + png_chunk(b"IEND", b"")


def tiff(pages, data=b"", last=0, **changed):
    """A chain of `pages` IFDs of 1 x 1 pixels, the last pointing to the offset `last`; then data."""
    tags = {"256": 1, "257": 1, "258": 8, "259": 1, "262": 1, "273": 8, "277": 1, "278": 1, "279": 1, **changed}
    size = 2 + 12 * len(tags) + 4
    out = b"II*\0" + struct.pack("<I", 8)
    entries = b"".join(struct.pack("<HHII", int(tag), 4, 1, tags[tag]) for tag in sorted(tags, key=int))
    for page in range(pages):
        following = last if page == pages - 1 else 8 + size * (page + 1)
        out += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return out + data


def packed_zeros(count):
    """zlib stream of `count` zeros, a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    million = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # can be repeated
    rest = packer.compress(bytes(count % (1 << 20))) + packer.flush()
    return b"\x78\xda" + million * (count >> 20) + rest + struct.pack(">HH", count % 65521, 1)  # Adler-32


def odd_files():
    """Name -> bytes of files that no generator of random damage would find."""
    ifd, side = 2 + 12 * 9 + 4, 7000  # one of 49 million pixels is within MAX_PIXELS, or is refused
    files = {
        "empty.png": b"", "empty.tif": b"", "empty.gif": b"", "zeros.bmp": bytes(1000), "text.jpg": b"no image\n" * 99,
        "huge.png": png(60000, 60000, png_chunk(b"IDAT", packed_zeros(10_000_000))),
        "huge.bmp": b"BM" + struct.pack("<IIIIiiHHII", 99, 0, 54, 40, 60000, 60000, 1, 24, 0, 0) + bytes(99),
        "huge.gif": b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0x80, 0, 0) + bytes(6) +
                    b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x08\x02\x44\x01\0;",
        "patch.gif": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) +
                     b"," + struct.pack("<HHHHB", 60000, 60000, 1, 1, 0) + b"\x02\x02\x44\x01\0;",
        "huge.tif": tiff(1, **{"256": 60000, "257": 60000, "278": 60000}),
        "huge_rows.tif": tiff(1, **{"278": 2 ** 32 - 1, "279": 2 ** 32 - 1}),
        "far.tif": tiff(1, last=2 ** 32 - 1), "self.tif": tiff(1, last=8), "loop.tif": tiff(300, last=8 + 100 * ifd),
        "text_bomb.png": png(9, 9, png_chunk(b"zTXt", b"x\0\0" + packed_zeros(400_000_000)),
                             png_chunk(b"IDAT", packed_zeros(90))),
        "profile_bomb.png": png(9, 9, png_chunk(b"iCCP", b"x\0\0" + packed_zeros(400_000_000)),
                                png_chunk(b"IDAT", packed_zeros(90))),
        "pixel_bomb.png": png(9, 9, png_chunk(b"IDAT", packed_zeros(400_000_000))),
        "large_rgba.png": png(side, side, png_chunk(b"IDAT", packed_zeros((4 * side + 1) * side)), colour=6),
        "large_deep.png": png(side, side, png_chunk(b"IDAT", packed_zeros((2 * side + 1) * side)), bits=16)}
    tile = packed_zeros(30_000 ** 2)
    tags = {"256": 16, "257": 16, "259": 8, "278": 16, "279": len(tile), "322": 30_000, "323": 30_000,
            "324": 8 + 2 + 12 * 13 + 4, "325": len(tile)}
    files["tile_bomb.tif"] = tiff(1, tile, **tags)
    try:
        files["many.dcm"] = dicom_file(speckle(0)[None], NumberOfFrames=2_000_000_000)
        files["large.dcm"] = dicom_file(speckle(0)[None], Rows=65535, Columns=65535)
    except ImportError:
        pass
    return files


def mutate(rng, files):
    """One of files, damaged -> (suffix, bytes)."""
    name = rng.choice(sorted(files))
    data, other = bytearray(files[name]), files[rng.choice(sorted(files))]
    suffix = f".{name.rsplit('.', 1)[1]}"
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    kind = int(rng.integers(9))
    if kind == 0:
        del data[at:]
    elif kind == 1:
        del data[at:at + length]
    elif kind == 2:
        data[at:at + length] = bytes(len(data[at:at + length]))
    elif kind == 3:
        data[at:at + length] = b"\xff" * len(data[at:at + length])
    elif kind == 4:
        data[at:at] = rng.bytes(length)
    elif kind == 5:  # wrong extension
        suffix = rng.choice([end for end in (*IMAGE_SUFFIXES, ".dcm") if end != suffix])
    elif kind == 6:  # swapped contents
        data[at:] = other[at:]
    else:  # bit flips, anywhere or in the header
        for _ in range(int(rng.integers(1, 9))):
            spot = int(rng.integers(min(len(data), 100 if kind == 7 else len(data))))
            data[spot] ^= 1 << int(rng.integers(8))
    return suffix, bytes(data)


LOW, HIGH = (bytes(sorted({*range(first, first + 128)} - {*b"\0/"})) for first in (0, 128))  # all a name can have


def damaged_folder(src, count):
    """Fill src with all whole files and `count` damaged ones -> names of the files, {name: bytes} of the whole."""
    rng, files = np.random.default_rng(count), whole_files()
    whole = {f"whole/{name}": data for name, data in files.items()}
    whole[os.fsdecode(LOW + b"/" + HIGH + b".png")] = files["0_grey.png"]
    bad = {f"odd/{name}": data for name, data in odd_files().items()}
    bad[os.fsdecode(LOW + b"/" + HIGH + b"0.png")] = b"no image"
    for number in range(count - len(bad)):
        suffix, data = mutate(rng, files)
        bad[f"bad/{number:04}{suffix}"] = data
    for name, data in {**whole, **bad}.items():
        os.makedirs(os.path.dirname(src / name), exist_ok=True)
        (src / name).write_bytes(data)
    links = {"odd/self.png": "self.png", "odd/ping.dcm": "pong.dcm", "odd/pong.dcm": "ping.dcm", "odd/gone.bmp": "gone"}
    for name, target in links.items():
        (src / name).symlink_to(target)
    (src / "odd/folder.png").mkdir()
    os.mkfifo(src / "odd/pipe.png")
    names = {*whole, *bad, *links, "odd/pipe.png"}
    if os.geteuid():
        (src / "odd/secret.png").write_bytes(files["0_grey.png"])
        (src / "odd/secret.png").chmod(0)
        names.add("odd/secret.png")
    return names, whole


# ---------------------------------------------------------------- packing them

# runs a command -> status, most memory of any of its processes, KiB; those that the command leaves behind are ours
MEASURED = """
import ctypes, json, os, resource, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
status = subprocess.run(sys.argv[2:]).returncode
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
with open(sys.argv[1], "w") as file:
    json.dump([status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss], file)
"""


def run(folder, *arguments, timeout):
    """pack.py in a folder -> status, stderr, peak megabytes, seconds."""
    command = [sys.executable, "-c", MEASURED, folder / "measured.json", sys.executable, ROOT / "pack.py", *arguments,
               "--workers", "2", "--canvas", str(CANVAS)]
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        pytest.fail(f"pack.py {' '.join(arguments)} still ran after {timeout} s")
    status, peak = json.loads((folder / "measured.json").read_text())
    return status, errors, peak / 1024, time.monotonic() - begun


def skipped(folder):
    """[name, reason] of each line of skipped.txt."""
    with open(folder / "skipped.txt", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read().split("\n")
    assert lines.pop() == ""
    escapes, found = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}, []
    for line in lines:
        name, reason = line.split("\t")
        parts, at = [], 0
        while at < len(name):
            step = 2 if name[at] == "\\" else 1
            parts.append(escapes.get(name[at:at + step], name[at:at + step]))
            at += step
        found.append(("".join(parts), reason))
    return found


def packed(folder):
    """(name, frame) of each canvas, from names.csv."""
    with open(folder / "names.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [(row["name"], int(row["frame"])) for row in csv.DictReader(file)]


@pytest.fixture(scope="module", params=[120, pytest.param(1000, marks=pytest.mark.slow)])
def faults(request, tmp_path_factory):
    """The damaged folder, packed by command."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of orphaned processes is measured on Linux only")
    folder = tmp_path_factory.mktemp("faults")
    names, whole = damaged_folder(folder / "src", request.param)
    outcome = run(folder, "src", "out", "--max_skipped", "1", timeout=60 if request.param < 1000 else 180)
    return folder, names, whole, outcome


def test_packing_goes_on(faults):
    _, _, _, (status, errors, _, _) = faults
    assert status == 0 and "Traceback" not in errors, errors


def test_nothing_is_said_on_stderr(faults):
    """Warnings about a damaged file, without its name, help nobody."""
    assert faults[3][1] == ""


def test_every_file_is_packed_or_skipped_with_a_reason(faults):
    folder, names, whole, _ = faults
    reasons, kept = skipped(folder / "out"), packed(folder / "out")
    assert {name for name, _ in reasons} | {name for name, _ in kept} == names
    assert len({name for name, _ in reasons}) == len(reasons) == Pack(folder / "out").info["skipped"]
    for name, reason in reasons:
        assert len(reason.strip()) > 3 and name not in whole, (name, reason)
    told, frames = dict(reasons), {}
    for name, frame in kept:
        frames.setdefault(name, []).append(frame)
    for name, numbers in frames.items():
        assert numbers == list(range(len(numbers))), name
        assert name not in told or told[name].startswith(f"from frame {len(numbers)} on: "), (name, told[name])


def test_whole_files_among_them_are_right(faults):
    folder, _, whole, _ = faults
    made, found = Pack(folder / "out"), {}
    for entry, canvas in zip(packed(folder / "out"), made.canvases):
        found[entry] = canvas
    count = 0
    for name in whole:
        for number, frame in enumerate(read_frames(str(folder / "src" / name))):
            assert np.array_equal(found[name, number], resize_square(frame.grey, CANVAS)), (name, number)
            count += 1
    assert count == sum(name in whole for name, _ in found) > 2 * len(whole)
    assert len(found) == len(made) and made.canvases.shape[1:] == (CANVAS, CANVAS)


def test_memory_is_bounded(faults):
    assert faults[3][2] < MEGABYTES


def test_what_is_too_large_or_a_loop_is_told_so(faults):
    reasons = dict(skipped(faults[0] / "out"))
    for name in ("huge.png", "huge.bmp", "huge.gif", "huge.tif"):
        assert "exceeds limit" in reasons[f"odd/{name}"] or "pixels" in reasons[f"odd/{name}"], reasons[f"odd/{name}"]
    for name in ("self.png", "ping.dcm", "pong.dcm"):
        assert reasons[f"odd/{name}"] == os.strerror(40)
    assert reasons["odd/pipe.png"] == "not a regular file" and reasons["odd/gone.bmp"] == "No such file or directory"
    assert [name for name, _ in packed(faults[0] / "out")].count("odd/loop.tif") == 300


@pytest.mark.slow
def test_a_chain_of_20_000_pages_is_no_burden(tmp_path):
    """It ends in time: its pages are packed or it is skipped."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "chain.tif").write_bytes(tiff(20_000))
    (tmp_path / "src" / "good.png").write_bytes(encode("PNG", speckle(1)))
    status, errors, peak, _ = run(tmp_path, "src", "out", "--max_skipped", "1", timeout=90)
    assert status == 0 and peak < MEGABYTES, errors
    kept = [name for name, _ in packed(tmp_path / "out")]
    assert kept.count("good.png") == 1
    assert kept.count("chain.tif") == 20_000 or "chain.tif" in dict(skipped(tmp_path / "out"))


def test_one_lying_header_does_not_fill_the_disk(tmp_path):
    """Half of the files looked at for the space needed is one that claims two thousand million frames."""
    pytest.importorskip("pydicom")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.dcm").write_bytes(dicom_file(speckle(0)[None], NumberOfFrames=2_000_000_000))
    (tmp_path / "src" / "b.dcm").write_bytes(dicom_file(speckle(1)[None]))
    pack.make_pack([str(tmp_path / "src")], str(tmp_path / "out"), canvas=CANVAS, workers=1, log=list)
    assert packed(tmp_path / "out") == [("a.dcm", 0), ("b.dcm", 0)]
    (name, reason), = skipped(tmp_path / "out")
    assert name == "a.dcm" and reason.startswith("from frame 1 on: frame 2 of 2000000000")


def test_max_skipped_stops_and_a_higher_share_goes_on(tmp_path):
    src = tmp_path / "src"
    for number in range(30):
        (src / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        data = b"no image" if number % 2 and number > 9 else encode("PNG", speckle(number))
        (src / f"{number % 2}" / f"{number:02}.png").write_bytes(data)
    status, errors, _, _ = run(tmp_path, "src", "out", "--max_skipped", "0.2", timeout=60)
    assert status == 1 and errors.startswith("pack.py: ") and errors.count("\n") == 1
    assert "of the first 30 files cannot be read, over --max_skipped 0.2; the last: 'src/1/" in errors
    assert sorted(os.listdir(tmp_path)) == ["measured.json", "out.part", "src"]
    lines, options = [], dict(canvas=CANVAS, workers=1)
    with pytest.raises(ValueError, match="over --max_skipped 0.25"):
        pack.make_pack([str(src)], str(tmp_path / "out"), **options, max_skipped=0.25, log=lines.append)
    pack.make_pack([str(src)], str(tmp_path / "out"), **options, max_skipped=0.34, log=lines.append)
    assert lines[0].startswith(f"going on with {tmp_path / 'out.part'}: ")
    pack.make_pack([str(src)], str(tmp_path / "whole"), **options, max_skipped=1, log=lines.append)
    for file in ("canvases.u8", "index.csv", "names.csv", "skipped.txt"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert len(skipped(tmp_path / "out")) == 10 and len(packed(tmp_path / "out")) == 20


def test_a_name_with_a_newline_leaves_the_error_one_line(tmp_path, monkeypatch):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a\nb\x1b[2J.png").write_text("no image")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for share in "01":
        arguments = [f"{tmp_path}/src", f"{tmp_path}/out", "--max_skipped", share, "--workers", "1"]
        with pytest.raises(SystemExit) as stop:
            pack.main(pack.get_args(arguments))
        assert "can" in stop.value.code and stop.value.code.isprintable()


def test_damage_changes_no_other_file(tmp_path):
    """The same good files, with and without bad ones between them, make the same rows."""
    files = whole_files()
    for number, (name, data) in enumerate(files.items()):
        for folder in ("clean", "dirty"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(data)
        (tmp_path / "dirty" / f"{name.split('.')[0]}_{number}.png").write_bytes(data[:len(data) // 2])
    for folder in ("clean", "dirty"):
        pack.make_pack([str(tmp_path / folder)], str(tmp_path / f"{folder}.pack"), canvas=CANVAS, workers=1,
                       max_skipped=1, log=list)
    clean, dirty = (Pack(tmp_path / f"{folder}.pack") for folder in ("clean", "dirty"))
    found = {entry: index for index, entry in enumerate(packed(tmp_path / "dirty.pack"))}
    order = [found[entry] for entry in packed(tmp_path / "clean.pack")]
    assert np.array_equal(clean.canvases, dirty.canvases[order]) and np.array_equal(clean.hashes, dirty.hashes[order])
    assert np.array_equal(clean.sizes, dirty.sizes[order]) and np.array_equal(clean.looks, dirty.looks[order])


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "gif", "tif", "lzw", "dcm"])
def test_no_cut_file_is_taken_for_a_whole_one(tmp_path, kind):
    """A still that lost its end is refused wherever it is cut, not filled up with grey."""
    grey, path = speckle(3), tmp_path / f"a.{'tif' if kind == 'lzw' else kind}"
    if kind == "dcm":
        pytest.importorskip("pydicom")
        data = dicom_file(grey[None])
    elif kind == "lzw":
        data = encode("TIFF", grey, compression="tiff_lzw")
    else:
        data = encode({"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper()), grey)
    path.write_bytes(data)
    whole, = read_frames(str(path))
    for length in range(0, len(data), 13):
        path.write_bytes(data[:length])
        rows, _, failed, _ = images.decode_chunk([str(path)], 0, 8, False, b"s")
        if failed:
            assert len(rows) == 0 and failed[0][2]
        else:  # only marks of the end are missing
            frame, = read_frames(str(path))
            assert np.array_equal(frame.grey, whole.grey), length
