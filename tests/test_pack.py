"""Packing as a user does it: odd files, odd names, lists, hold-outs, full disks, killed workers."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from file_tools import load_grey
from PIL import Image

import pack
from frames import images
from frames.images import resize_square
from frames.leakage import content_hash
from frames.packed import Pack

ROOT = Path(__file__).resolve().parents[1]


def speckle(seed, shape=(40, 60)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_csv(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def make(source, out, **options):
    """make_pack in this process -> the pack and what was logged."""
    lines = []
    sources = [str(path) for path in (source if isinstance(source, list) else [source])]
    pack.make_pack(sources, str(out), **{"canvas": 16, "workers": 1, "log": lines.append, **options})
    return Pack(str(out)), "\n".join(lines)


def names(made):
    return made.names(range(len(made)))


def skipped(made):
    lines = Path(made.folder, "skipped.txt").read_text(errors="surrogateescape").splitlines()
    return dict(line.split("\t") for line in lines)


def run(*arguments, cwd=None):
    command = [sys.executable, ROOT / "pack.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def clips(tmp_path):
    """Two folders that are classes, each with frames of two clips; a label and group for each in clips.csv."""
    rows = []
    for label in ("sick", "well"):
        for clip in "ab":
            for frame in range(3):
                name = f"{label}/{label}-{clip}_frame{frame}.png"
                save(tmp_path / "src" / name, speckle(len(rows)))
                rows.append((name, label, f"{label}-{clip}"))
    write_csv(tmp_path / "src" / "clips.csv", ("image", "label", "group"), *rows)
    return tmp_path / "src"


# ---------------------------------------------------------------- the pack itself

def test_folder_by_command(tmp_path, clips):
    done = run("src", "out.pack", "--canvas", 16, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12 images, 2 groups by parent folder -> out.pack (0.0 MB)\n"
    made = Pack(tmp_path / "out.pack")
    assert names(made) == sorted(names(made)) and len(made) == 12
    for name, canvas, size, pixels_hash in zip(names(made), made.canvases, made.sizes, made.hashes):
        grey = load_grey(clips / name)
        assert np.array_equal(canvas, resize_square(grey, 16)) and tuple(size) == (60, 40)
        assert int(pixels_hash) == content_hash(grey)
    assert made.groups.tolist() == [0] * 6 + [1] * 6
    assert made.mean == pytest.approx(np.mean(made.canvases / 255), rel=1e-12)
    assert made.std == pytest.approx(np.std(made.canvases / 255), rel=1e-12)
    assert made.info["recipe"]["canvas"] == 16 and skipped(made) == {}
    assert sorted(os.listdir(tmp_path)) == ["out.pack", "src"]


def test_worker_count_does_not_matter(tmp_path, clips):
    (clips / "sick" / "bad.png").write_text("no image")
    save(tmp_path / "bench" / "copy.tif", load_grey(clips / "sick" / "sick-b_frame1.png"))
    for workers in (1, 3):
        made, _ = make(clips, tmp_path / f"{workers}.pack", workers=workers, holdout=[str(tmp_path / "bench")],
                       group_regex="([^/._]*)[_.]")
    assert len(made) == 9
    for file in ("canvases.u8", "index.csv", "names.csv", "skipped.txt"):
        assert (tmp_path / "1.pack" / file).read_bytes() == (tmp_path / "3.pack" / file).read_bytes(), file
    one, three = ({**Pack(tmp_path / f"{workers}.pack").info, "salt": ""} for workers in (1, 3))
    assert one == three


def test_digest_tells_pixels_and_groups_but_not_names(tmp_path, clips):
    first, _ = make(clips, tmp_path / "1.pack")
    other, _ = make(clips, tmp_path / "other.pack", canvas=24)
    assert other.info["digest"] != first.info["digest"]  # other canvases are other data
    (clips / "sick" / "sick-a_frame0.png").rename(clips / "sick" / "sick-a_frame00.png")
    renamed, _ = make(clips, tmp_path / "2.pack")
    assert names(renamed) != names(first) and renamed.info["digest"] == first.info["digest"]
    regrouped, _ = make(clips, tmp_path / "3.pack", group_regex="(.*)_frame")
    assert regrouped.info["digest"] != first.info["digest"]
    save(clips / "well" / "well-a_frame0.png", speckle(99))
    repainted, _ = make(clips, tmp_path / "4.pack")
    assert repainted.info["digest"] != first.info["digest"]


def test_file_formats(tmp_path):
    grey, src = speckle(1), tmp_path / "src"
    wide = grey.astype(np.uint16) * 200 + 1000
    low, high = np.percentile(wide, (0.5, 99.5))
    stretched = (np.clip((wide - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, 2)
    alpha = np.where(np.arange(60) < 30, 255, 0).astype(np.uint8) * np.ones((40, 1), np.uint8)
    expected = {"grey.png": grey, "grey.bmp": grey, "grey.TIFF": grey, "rgb.tif": grey,
                "wide.png": stretched, "wide.tif": stretched,
                "alpha.png": np.where(alpha, grey, 0), "palette.png": np.where(grey < 9, 0, grey)}
    for name in ("grey.png", "grey.bmp", "grey.TIFF"):
        save(src / name, grey)
    save(src / "rgb.tif", rgb)
    save(src / "wide.png", wide)
    save(src / "wide.tif", wide)
    save(src / "alpha.png", np.dstack([rgb, alpha]))
    palette = Image.fromarray(grey, "L").convert("P")
    palette.putpalette(np.repeat(np.arange(256), 3).astype(np.uint8).tobytes())
    palette.save(src / "palette.png", transparency=bytes(0 if i < 9 else 255 for i in range(256)))
    Image.fromarray(grey).save(src / "grey.jpg", quality=95)
    Image.fromarray(rgb).convert("CMYK").save(src / "cmyk.jpeg", quality=95)
    made, _ = make(src, tmp_path / "out")
    found = dict(zip(names(made), made.canvases.astype(int)))
    assert set(found) == {*expected, "grey.jpg", "cmyk.jpeg"} and skipped(made) == {}
    for name, pixels in expected.items():
        assert np.array_equal(found[name], resize_square(pixels.astype(np.uint8), 16)), name
    for name in ("grey.jpg", "cmyk.jpeg"):
        assert np.abs(found[name] - resize_square(grey, 16)).mean() < 6, name


def test_unreadable_files_are_skipped_and_listed(tmp_path, clips, monkeypatch):
    whole = save(clips / "well" / "whole.png", speckle(50, (300, 300))).read_bytes()
    (clips / "well" / "truncated.png").write_bytes(whole[:len(whole) // 2])
    (clips / "well" / "broken.png").write_bytes(whole[:60] + b"?" * 40 + whole[100:])
    (clips / "well" / "empty.png").write_bytes(b"")
    (clips / "well" / "text.png").write_text("not an image")
    save(clips / "well" / "bomb.png", np.zeros((400, 400), np.uint8))
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    expected = {f"well/{name}.png" for name in ("truncated", "broken", "empty", "text", "bomb")}
    if os.geteuid():
        (clips / "well" / "secret.png").write_bytes(whole)
        (clips / "well" / "secret.png").chmod(0)
        expected.add("well/secret.png")
    made, log = make(clips, tmp_path / "out")
    assert len(made) == 13 and made.info["skipped"] == len(expected)
    assert set(skipped(made)) == expected and all(skipped(made).values())
    assert "over 100,000" in skipped(made)["well/bomb.png"] and f"skipped: {len(expected)} unreadable" in log
    assert "WARNING" not in log


def test_mostly_unreadable_stops_and_wholly_unreadable_is_an_error(tmp_path):
    for name in "abc":
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "x.png").write_text("no image")
    with pytest.raises(ValueError, match="3 of the first 3 files cannot be read, over --max_skipped 0.5.*not an image"):
        make(tmp_path / "src", tmp_path / "out", max_skipped=0.5)
    with pytest.raises(ValueError, match="none of 3 files can be read"):
        make(tmp_path / "src", tmp_path / "out", max_skipped=1)
    assert os.listdir(tmp_path) == ["src"]
    save(tmp_path / "src" / "d.png", speckle(1))
    made, log = make(tmp_path / "src", tmp_path / "out", max_skipped=0.75)
    assert len(made) == 1 and "skipped: 3 unreadable" in log
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]


def test_odd_names_round_trip(tmp_path):
    odd = ["a b.png", "a,b.png", 'a"b.png', "a\nb.png", "a\rb.png", "a\tb.png", " a.png", "ä.png", "#;'.png",
           os.fsdecode(b"\xff\xfe.png")]
    for number, name in enumerate(odd):
        save(tmp_path / "src" / "p" / name, speckle(number))
        (tmp_path / "src" / "q").mkdir(exist_ok=True)
        (tmp_path / "src" / "q" / name).write_text("no image")
    done = run("src", "out", "--canvas", 16, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = Pack(tmp_path / "out")
    assert sorted(names(made)) == sorted(f"p/{name}" for name in odd)
    for name, pixels_hash in zip(names(made), made.hashes):
        assert int(pixels_hash) == content_hash(load_grey(tmp_path / "src" / name))
    assert len(skipped(made)) == len(odd) and "q/a\\nb.png" in skipped(made)


# ---------------------------------------------------------------- sources and groups

def test_lists_keep_their_order_and_groups(tmp_path, clips):
    order = ["well/well-b_frame1.png", "sick/sick-a_frame0.png", "well/well-a_frame2.png", "sick/sick-a_frame2.png"]
    (clips / "list.txt").write_text("\n".join(order) + "\n\n")
    made, _ = make(clips / "list.txt", tmp_path / "1")
    assert names(made) == order and made.groups.tolist() == [0, 1, 0, 1]
    write_csv(clips / "list.csv", ("image", "group"), *((name, group) for name, group in zip(order, "xyyz")))
    made, log = make(clips / "list.csv", tmp_path / "2")
    assert names(made) == order and made.groups.tolist() == [0, 1, 1, 2] and "3 groups by group column" in log
    made, _ = make(clips, tmp_path / "3", group_regex="([^/]*)_frame", exclude=["*frame2*", "well/*"])
    assert names(made) == [f"sick/sick-{clip}_frame{frame}.png" for clip in "ab" for frame in (0, 1)]
    assert made.groups.tolist() == [0, 0, 1, 1]
    assert made.info["grouped_by"] == "--group_regex ([^/]*)_frame" and made.info["groups"] == 2


@pytest.mark.parametrize("arguments, complaint", [
    (("nothing", "out"), "nothing: no such file or folder"),
    (("bare", "out"), "no images found"),
    (("src", "out", "--exclude", "*"), "excluded: *"),
    (("src", "bare"), "bare: exists already"),
    (("src", "out", "--group_regex", "(("), "--group_regex"),
    (("src", "out", "--group_regex", "(frame9)"), "does not match"),
    (("bad.csv", "out"), "columns are picture,group"),
    (("src", "out", "--holdout", "gone.csv"), "gone.csv: no such file"),
    (("src", "out", "--holdout", "lost.csv"), "lost.png (No such file or directory)"),
    (("src", "out", "--holdout", "src"), "all 12 images are held out"),
    (("src", "out", "--canvas", "100000000"), "--canvas"),
])
def test_bad_input_is_one_sentence(tmp_path, clips, arguments, complaint):
    (tmp_path / "bare").mkdir()
    write_csv(tmp_path / "bad.csv", ("picture", "group"), ("a.png", "1"))
    write_csv(tmp_path / "lost.csv", ("image", "label"), ("lost.png", "sick"))
    done = run(*arguments, "--workers", 1, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("pack.py: ") and complaint in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


@pytest.mark.parametrize("arguments", [("--canvass", "9"), ("--canvas", "0"), ("--workers", "0"), ("--canvas", "big"),
                                       ("--work", "1")])
def test_bad_flags_are_usage_errors(tmp_path, clips, arguments):
    done = run("src", "out", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and arguments[0] in done.stderr and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- hold-out

def clips_left(made):
    return sorted({os.path.basename(name).split("_")[0] for name in names(made)})


def test_holdout_by_group_name(tmp_path, clips):
    write_csv(tmp_path / "test.csv", ("image", "label", "group"), ("src/sick/sick-a_frame1.png", "sick", "sick-a"))
    for source, regex in ((clips / "clips.csv", None), (clips, "([^/]*)_frame")):
        made, log = make(source, tmp_path / f"{regex is None}.pack", group_regex=regex,
                         holdout=[str(tmp_path / "test.csv")])
        assert clips_left(made) == ["sick-b", "well-a", "well-b"] and len(made) == 9
        assert "held out: 3 images of 1 groups, 0 identical images" in log and "WARNING" not in log
        assert (made.info["held_out_by_group"], made.info["held_out_identical"]) == (3, 0)
        assert set(skipped(made).values()) == {"held out (group sick-a)"}
        for name, canvas in zip(names(made), made.canvases):  # the gaps are closed
            assert np.array_equal(canvas, resize_square(load_grey(clips / name), 16)), name


def test_holdout_by_regex_on_both_sides(tmp_path, clips):
    save(tmp_path / "elsewhere" / "x" / "well-b_frame77.png", speckle(77))  # unlike any packed frame, but the same clip
    made, _ = make(clips, tmp_path / "out", holdout=[str(tmp_path / "elsewhere")], group_regex="([^/]*)_frame")
    assert clips_left(made) == ["sick-a", "sick-b", "well-a"]


def test_identical_image_under_another_name_takes_its_named_group_along(tmp_path, clips):
    save(tmp_path / "bench" / "copy.bmp", load_grey(clips / "well/well-a_frame1.png"))
    made, _ = make(clips / "clips.csv", tmp_path / "out", holdout=[str(tmp_path / "bench")])
    assert clips_left(made) == ["sick-a", "sick-b", "well-b"] and len(made) == 9
    assert skipped(made) == {"well/well-a_frame1.png": "held out (identical image)",
                             "well/well-a_frame0.png": "held out (group well-a)",
                             "well/well-a_frame2.png": "held out (group well-a)"}
    assert list(skipped(made)) == sorted(skipped(made))  # in the order of the source
    assert (made.info["held_out_by_group"], made.info["held_out_identical"]) == (2, 1)
    for name, canvas in zip(names(made), made.canvases):
        assert np.array_equal(canvas, resize_square(load_grey(clips / name), 16)), name
    assert made.mean == pytest.approx(np.mean(made.canvases / 255), rel=1e-12)


def test_blank_frames_do_not_take_their_group_along(tmp_path, clips):
    save(clips / "sick" / "sick-a_frame1.png", np.zeros((40, 60), np.uint8))
    save(tmp_path / "bench" / "blank.png", np.zeros((40, 60), np.uint8))
    made, _ = make(clips / "clips.csv", tmp_path / "out", holdout=[str(tmp_path / "bench")])
    assert skipped(made) == {"sick/sick-a_frame1.png": "held out (identical image)"}


@pytest.mark.parametrize("columns", [3, 2])
def test_class_folders_are_not_held_out_whole(tmp_path, clips, columns):
    """The source goes by parent folder; groups or labels in the holdout show that these folders are no patients."""
    rows = [("image", "label", "group"), ("sick/sick-a_frame1.png", "sick", "sick-a"),
            ("well/well-b_frame1.png", "well", "well-b")]
    write_csv(clips / "test.csv", *(row[:columns] for row in rows))
    os.symlink(clips, tmp_path / "link")
    made, log = make(tmp_path / "link", tmp_path / "out", holdout=[str(clips / "test.csv")])
    assert set(skipped(made)) == {row[0] for row in rows[1:]} and len(made) == 10
    assert set(skipped(made).values()) == {"held out (identical image)"}
    assert "WARNING" in log and "--group_regex" in log


def test_patient_folders_are_held_out_whole(tmp_path, clips):
    (tmp_path / "test.txt").write_text("src/sick/sick-a_frame1.png\n")
    os.symlink(clips, tmp_path / "link")  # the same folder under another name
    made, log = make(tmp_path / "link", tmp_path / "out", holdout=[str(tmp_path / "test.txt")])
    assert clips_left(made) == ["well-a", "well-b"] and "whole folders are held out" in log


def test_a_folder_of_the_same_name_elsewhere_is_another_folder(tmp_path, clips):
    for number, label in enumerate(("sick", "well")):
        save(tmp_path / "other" / label / "1.png", speckle(100 + number))
    made, _ = make(clips, tmp_path / "out", holdout=[str(tmp_path / "other")])
    assert len(made) == 12


# ---------------------------------------------------------------- phantoms

def test_phantom_pack(tmp_path):
    from frames.phantom import phantom_images
    lines = []
    pack.pack_phantoms(str(tmp_path / "out"), 100, 32, seed=3, log=lines.append)
    made, (images, _, groups) = Pack(tmp_path / "out"), phantom_images(100, 32, 3)
    assert np.array_equal(made.canvases, images)
    assert len(set(zip(made.groups, groups))) == len(set(groups)) == made.info["groups"]
    assert made.info["recipe"] == {"phantoms": 100, "canvas": 32, "seed": 3} and "100 phantom images" in lines[0]
    assert made.std == pytest.approx(np.std(images / 255), rel=1e-12)
    with pytest.raises(ValueError, match="exists already"):
        pack.pack_phantoms(str(tmp_path / "out"), 100, 32, seed=3)


def test_recipe_survives_json():
    recipe = pack.recipe(["src"], exclude=("*a*",), holdout=("test.csv",), canvas=64, group_regex="(x)")
    assert json.loads(json.dumps(recipe)) == recipe


@pytest.mark.skipif("ULTRASOUND_DATA" not in os.environ, reason="needs ULTRASOUND_DATA, a folder of real ultrasound")
def test_real_images(tmp_path):
    source = Path(os.environ["ULTRASOUND_DATA"]) / "pocus"
    made, _ = make(source, tmp_path / "out", canvas=64, workers=None)
    assert len(made) > 1000 and made.info["skipped"] == 0 and 0.1 < made.mean < 0.4
