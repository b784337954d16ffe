"""What stays in a pack: duplicates, caps, colour, the fan, look-alikes of held-out images, DICOM's patients."""
import os
from pathlib import Path

import numpy as np
import pytest
from file_tools import load_grey, save_dicom
from PIL import Image
from test_pack import make, names, save, skipped, speckle, write_csv

from frames import leakage, selection
from frames.images import resize_square
from frames.lists import dicom_groups
from frames.phantom import phantom_images
from labelled.labels import read_labelled


@pytest.fixture(scope="module")
def frames():
    """Six frames of six patients, uint8 (6, 256, 256)."""
    pixels, _, groups = phantom_images(24, 256, seed=5)
    return pixels[np.unique(groups, return_index=True)[1][:6]]


def as_jpeg(path, grey, quality=60):
    save(path, grey, quality=quality)


# ---------------------------------------------------------------- duplicates, caps, colour

def test_duplicates_are_counted_and_dropped_on_request(tmp_path, frames):
    src = tmp_path / "src"
    save(src / "p" / "0.png", frames[0])
    save(src / "p" / "1.bmp", frames[0])  # equal
    as_jpeg(src / "p" / "2.jpg", frames[0])  # nearly
    save(src / "p" / "3.png", frames[1])
    save(src / "q" / "0.png", frames[1])  # equal, of another group
    as_jpeg(src / "q" / "1.jpg", frames[0], 80)  # nearly equal, but not of its own group: stays
    made, log = make(src, tmp_path / "kept")
    assert len(made) == 6 and (made.info["equal"], made.info["near"], made.info["equal_across_groups"]) == (2, 1, 1)
    assert "2 images equal an earlier one (1 one of another group), 1 nearly equal one of their group: kept" in log
    made, log = make(src, tmp_path / "left", dedup=True)
    assert names(made) == ["p/0.png", "p/3.png", "q/1.jpg"]
    assert skipped(made) == {"p/1.bmp": "equal to an earlier image", "q/0.png": "equal to an earlier image",
                             "p/2.jpg": "nearly equal to an earlier image of its group"}
    assert "left out" in log and made.groups.tolist() == [0, 0, 1]
    for name, canvas in zip(names(made), made.canvases):
        assert np.array_equal(canvas, resize_square(load_grey(src / name), 16)), name


def test_long_clips_are_capped_evenly(tmp_path):
    for group, count in (("long", 10), ("short", 3)):
        for number in range(count):
            save(tmp_path / "src" / group / f"{number}.png", speckle(number + 50 * count))
    made, log = make(tmp_path / "src", tmp_path / "out", max_per_group=4)
    assert sorted(names(made)) == [*(f"long/{number}.png" for number in (2, 4, 7, 9)),
                                   *(f"short/{number}.png" for number in range(3))]
    assert "over --max_per_group 4: 6 images left out" in log and len(skipped(made)) == 6


@pytest.mark.parametrize("most", [1, 2, 3, 7, 50])
def test_spread_takes_as_many_as_it_may_at_even_distances(most):
    groups = np.random.default_rng(0).permutation(np.repeat([5, 3, 9], [1, 20, 7])).astype(np.uint64)
    keep = selection.spread(groups, most)
    for group, count in ((5, 1), (3, 20), (9, 7)):
        places = np.flatnonzero(keep[groups == group])
        assert len(places) == min(most, count)
        if len(places) > 1:
            assert np.ptp(np.diff(places)) <= 1


def test_colour_frames_are_counted_and_dropped_on_request(tmp_path, frames):
    doppler = np.repeat(frames[0][..., None], 3, axis=2)
    doppler[100:160, 100:160, 0] = 255  # 5 % of the pixels
    save(tmp_path / "src" / "doppler.png", doppler)
    save(tmp_path / "src" / "grey.png", frames[1])
    made, log = make(tmp_path / "src", tmp_path / "kept")
    assert len(made) == 2 and "colour: 1 images: kept; --drop_colour leaves them out" in log
    colour = np.loadtxt(tmp_path / "kept" / "index.csv", delimiter=",", skiprows=1, usecols=5)
    assert dict(zip(names(made), colour)) == {"doppler.png": 1, "grey.png": 0}
    made, log = make(tmp_path / "src", tmp_path / "left", drop_colour=True)
    assert names(made) == ["grey.png"] and skipped(made) == {"doppler.png": "in colour"} and "1 images: left out" in log


def test_crop_fan_trims_the_screen_and_keeps_the_hashes(tmp_path):
    rows, columns = np.mgrid[:300, :400]
    fan = (columns > 100) & (columns < 300) & (rows > 50) & (rows < 250)
    screen = np.where(fan, 80 + speckle(3, (300, 400)) // 4, 0).astype(np.uint8)
    screen[10:20, 10:60] = 255  # text
    save(tmp_path / "src" / "screen.png", screen)
    whole, _ = make(tmp_path / "src", tmp_path / "whole", canvas=64)
    made, _ = make(tmp_path / "src", tmp_path / "trimmed", canvas=64, crop_fan=True)
    width, height = made.sizes[0]
    assert whole.sizes.tolist() == [[400, 300]] and 199 <= width <= 215 and 199 <= height <= 215
    assert made.canvases.max() < 160 and made.mean > 2 * whole.mean
    assert np.array_equal(made.hashes, whole.hashes) and np.array_equal(made.looks, whole.looks)


# ---------------------------------------------------------------- the leakage guard

def test_a_reexported_holdout_frame_stays_out_with_its_group(tmp_path, frames):
    src = tmp_path / "src"
    for number, frame in enumerate(frames):
        save(src / f"patient{number // 2}_{number}.png", frame)
    smaller = np.asarray(Image.fromarray(frames[2]).resize((180, 190), Image.Resampling.BICUBIC))
    as_jpeg(tmp_path / "test" / "export.jpg", smaller)
    made, log = make(src, tmp_path / "out", holdout=[str(tmp_path / "test")])  # each image its own group
    assert len(made) == 5 and skipped(made) == {"patient1_2.png": "held out (looks like a held-out image)"}
    assert "0 identical images, 1 look-alikes" in log
    made, _ = make(src, tmp_path / "named", holdout=[str(tmp_path / "test")], group_regex="(patient.)")
    assert skipped(made) == {"patient1_2.png": "held out (looks like a held-out image)",
                             "patient1_3.png": "held out (group patient1)"}


def test_names_stay_in_the_two_private_files(tmp_path, frames):
    src = tmp_path / "ROE_FAMILY"
    save(src / "DOE_JANE" / "DOE_JANE_1.png", frames[0])
    save(src / "ROE_MARY" / "ROE_MARY_1.png", frames[1])
    save(src / "ROE_MARY" / "ROE_MARY_2.png", frames[1])
    save(tmp_path / "DOE_TEST" / "other.png", frames[2])
    how = dict(group_regex="([A-Z_]+)/[^/]*$", dedup=True, exclude=["*DOE_X*"], holdout=[str(tmp_path / "DOE_TEST")])
    one, _ = make(src, tmp_path / "one", **how)
    two, _ = make(src, tmp_path / "two", **how)
    naming = {path.name for path in Path(one.folder).iterdir() if b"DOE" in path.read_bytes() or b"ROE" in path.read_bytes()}
    assert naming == {"names.csv", "skipped.txt"}
    assert one.info["salt"] != two.info["salt"] and not set(one.group_digests) & set(two.group_digests)
    assert one.info["digest"] == two.info["digest"]
    seen = one.digests()
    assert int(seen["group_digests"][1]) == leakage.salted("ROE_MARY", seen["salt"])
    for name in naming:
        os.remove(Path(one.folder, name))
    shared = type(one)(one.folder)  # reads as before without them
    assert shared.names([1]) == ["canvas 1"] and np.array_equal(shared.canvases, one.canvases)


def test_folder_names_are_not_compared_with_a_test_set(tmp_path, frames):
    save(tmp_path / "src" / "1" / "a.png", frames[0])
    save(tmp_path / "src" / "2" / "b.png", frames[1])
    made, _ = make(tmp_path / "src", tmp_path / "out")
    assert set(made.digests()) == {"content", "looks"}


def test_one_file_without_a_patient_does_not_hide_the_others(tmp_path, frames):
    save_dicom(tmp_path / "src" / "a" / "0.dcm", frames[:1], "P1", "1.1")
    save_dicom(tmp_path / "src" / "a" / "1.dcm", frames[1:2], "P2", "1.2")
    save(tmp_path / "src" / "b" / "2.png", frames[2])
    made, _ = make(tmp_path / "src", tmp_path / "out")
    assert made.named.tolist() == [True, True, False]
    seen = made.digests()
    looks = leakage.perceptual_hash(frames[5])[None]
    counts, line, _ = leakage.overlap(seen, np.array([1], np.uint64), looks, ["P2"])
    assert counts["seen"] == 1 and "1 of a pretraining group" in line
    assert leakage.overlap(seen, np.array([1], np.uint64), looks, ["b"])[0]["seen"] == 0


# ---------------------------------------------------------------- sources and DICOM

def test_several_sources(tmp_path, frames):
    for number, source in enumerate(("a", "b")):
        save(tmp_path / source / "p" / "0.png", frames[number])
        save(tmp_path / source / "q" / "1.png", frames[2 + number])
    made, log = make([tmp_path / "a", tmp_path / "b"], tmp_path / "out", exclude=["q/*"])
    assert names(made) == ["a/p/0.png", "b/p/0.png"] and made.groups.tolist() == [0, 1]
    write_csv(tmp_path / "a" / "list.csv", ("image", "group"), ("p/0.png", "x"), ("q/1.png", "y"))
    write_csv(tmp_path / "b" / "list.csv", ("image", "group"), ("p/0.png", "x"))
    made, log = make([tmp_path / "a/list.csv", tmp_path / "b/list.csv"], tmp_path / "named")
    assert made.groups.tolist() == [0, 1, 0] and "2 groups by group column" in log  # one patient in both


def test_dicom_patients_are_groups_and_are_held_out(tmp_path, frames):
    save_dicom(tmp_path / "src" / "IM0", frames[:2], "P1", "1.1", PixelSpacing=[0.25, 0.5])
    save_dicom(tmp_path / "src" / "IM1", frames[2:3], "P1", "1.2", PixelSpacing=[0.25, 0.5])
    save_dicom(tmp_path / "src" / "sub" / "IM2.dcm", frames[3:4], "P2", "1.3", PixelSpacing=[0.25, 0.5])
    save(tmp_path / "src" / "sub" / "plain.png", frames[4])
    made, log = make(tmp_path / "src", tmp_path / "out")
    assert names(made) == ["IM0", "IM0 (frame 1)", "IM1", "sub/IM2.dcm", "sub/plain.png"]
    assert made.groups.tolist() == [0, 0, 0, 1, 2] and "3 groups by DICOM patient, else parent folder" in log
    mm = np.loadtxt(tmp_path / "out/index.csv", delimiter=",", skiprows=1, usecols=(6, 7))
    assert mm.tolist() == [[0.5, 0.25]] * 4 + [[0, 0]]
    save_dicom(tmp_path / "test" / "other.dcm", frames[5:6], "P1", "1.9")  # another study of the first patient
    made, _ = make(tmp_path / "src", tmp_path / "held", holdout=[str(tmp_path / "test")])
    assert names(made) == ["sub/IM2.dcm", "sub/plain.png"] or names(made) == ["sub/plain.png", "sub/IM2.dcm"]
    assert made.info["held_out_by_group"] == 3 and made.info["held_out_groups"] == 1


def test_a_held_out_patient_of_many_studies_stays_out(tmp_path, frames):
    """The source has one patient, so that its groups are studies: its name is held out all the same."""
    for number in range(2):
        save_dicom(tmp_path / "src" / f"{number}.dcm", frames[number:number + 1], "P1", f"1.{number}")
    save(tmp_path / "src" / "plain.png", frames[4])
    save_dicom(tmp_path / "test" / "other.dcm", frames[5:6], "P1", "1.9")
    made, _ = make(tmp_path / "src", tmp_path / "out", holdout=[str(tmp_path / "test")])
    assert names(made) == ["plain.png"] and made.info["held_out_by_group"] == 2


def test_a_frame_trimmed_to_its_tissue_region_is_known_by_its_whole_screen(tmp_path, frames):
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    for keyword, value in dict(RegionSpatialFormat=1, RegionDataType=1, RegionLocationMinX0=40, RegionLocationMinY0=30,
                               RegionLocationMaxX1=219, RegionLocationMaxY1=199).items():
        setattr(item, keyword, value)
    save_dicom(tmp_path / "src" / "0.dcm", frames[:1], "P1", "1.1", SequenceOfUltrasoundRegions=pydicom.Sequence([item]))
    save_dicom(tmp_path / "src" / "1.dcm", frames[1:2], "P2", "1.2")
    save(tmp_path / "test" / "screen.png", frames[0])
    made, _ = make(tmp_path / "src", tmp_path / "out", holdout=[str(tmp_path / "test")])
    assert skipped(made) == {"0.dcm": "held out (identical image)"}
    made, _ = make(tmp_path / "src", tmp_path / "all")
    assert made.sizes.tolist() == [[180, 170], [256, 256]]


def test_anonymised_dicom_goes_by_study(tmp_path, frames):
    for number in range(3):
        save_dicom(tmp_path / "src" / f"{number}.dcm", frames[number:number + 1], "ANONYMOUS", f"1.{number // 2}")
    made, log = make(tmp_path / "src", tmp_path / "out")
    assert made.groups.tolist() == [0, 0, 1] and "2 groups by DICOM study" in log


def test_a_regex_goes_before_dicom_names(tmp_path, frames):
    for number in range(2):
        save_dicom(tmp_path / "src" / f"clip{number}.dcm", frames[:2] + number, "P", f"1.{number}")
    made, log = make(tmp_path / "src", tmp_path / "out", group_regex="(clip.)")
    assert made.groups.tolist() == [0, 0, 1, 1] and made.named.all()


def test_labelled_dicom_is_grouped_by_patient(tmp_path, frames):
    for number in range(4):
        save_dicom(tmp_path / "set" / "ab"[number % 2] / f"{number}.dcm", frames[number:number + 1], f"P{number // 2}", "1.1")
    save(tmp_path / "set" / "a" / "plain.png", frames[4])
    found = read_labelled(str(tmp_path / "set"))
    assert dict(zip(found.names, found.groups)) == {"a/0.dcm": "P0", "b/1.dcm": "P0", "a/2.dcm": "P1", "b/3.dcm": "P1",
                                                    "a/plain.png": "a/plain.png"}
    assert found.grouped_by.startswith("DICOM patient, else image")
    named = read_labelled(str(tmp_path / "set"), group_regex=r"(\d|plain)")
    assert named.groups == ["0", "2", "plain", "1", "3"] and dicom_groups(named) is named


# ---------------------------------------------------------------- labelled sets as hold-outs

def test_every_split_of_a_labelled_csv_is_held_out_whatever_columns_it_has(tmp_path, frames):
    for number in range(4):
        save(tmp_path / "src" / f"{number}.png", frames[number])
        save(tmp_path / "test" / f"{number}.bmp", frames[number])
    write_csv(tmp_path / "src" / "source.csv", ("image", "group"), *((f"{n}.png", f"g{n}") for n in range(4)))
    rows = [("0.bmp", "a", "train", "Aloka"), ("1.bmp", "a", "val", ""), ("2.bmp", "a", "test", "Voluson")]
    write_csv(tmp_path / "test" / "test.csv", ("image", "label", "split", "machine"), *rows)
    made, _ = make(tmp_path / "src" / "source.csv", tmp_path / "out", holdout=[str(tmp_path / "test" / "test.csv")])
    assert names(made) == ["3.png"] and set(skipped(made).values()) == {"held out (identical image)"}


@pytest.mark.parametrize("what", ["", "FETAL_PLANES_DB_data.csv"])
def test_fetal_planes_is_held_out_by_patient(tmp_path, frames, what):
    header = "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"
    rows = "Patient00007_Plane1_1_of_2;7;Other;Not A Brain;Op. 1;Aloka;1\n"
    rows += "Patient00008_Plane1_1_of_1;8;Other;Other;;;0\n"
    save(tmp_path / "db" / "Images" / "Patient00007_Plane1_1_of_2.png", frames[0])
    save(tmp_path / "db" / "Images" / "Patient00008_Plane1_1_of_1.png", frames[1])
    (tmp_path / "db" / "FETAL_PLANES_DB_data.csv").write_text(header + rows)
    save(tmp_path / "src" / "7" / "a.png", frames[2])  # nobody's patient 7
    save(tmp_path / "src" / "x" / "Patient00007_more.png", frames[3])  # the set's
    save(tmp_path / "src" / "x" / "Patient00009_copy.png", frames[1])
    made, _ = make(tmp_path / "src", tmp_path / "by_folder", holdout=[str(tmp_path / "db" / what)])
    assert names(made) == ["7/a.png", "x/Patient00007_more.png"]
    made, _ = make(tmp_path / "src", tmp_path / "by_name", holdout=[str(tmp_path / "db" / what)],
                   group_regex=r"(Patient\d+|\d+/)")
    assert names(made) == ["7/a.png"] and made.info["held_out_groups"] == 2


def test_class_folders_of_a_labelled_csv_with_splits_are_not_held_out_whole(tmp_path, frames):
    for number in range(4):
        save(tmp_path / "src" / "sick" / f"{number}.png", frames[number])
    write_csv(tmp_path / "src" / "test.csv", ("image", "label", "split"), ("sick/0.png", "sick", "test"),
              ("sick/1.png", "sick", "train"))
    made, _ = make(tmp_path / "src", tmp_path / "out", holdout=[str(tmp_path / "src" / "test.csv")])
    assert names(made) == ["sick/2.png", "sick/3.png"]


def test_a_group_column_holds_out_by_name_where_each_image_has_its_own(tmp_path, frames):
    for number in range(4):
        save(tmp_path / f"{number}.png", frames[number])
    write_csv(tmp_path / "test.csv", ("image", "label", "group"), ("0.png", "a", "P"), ("1.png", "b", "Q"))
    write_csv(tmp_path / "source.csv", ("image", "group"), ("2.png", "P"), ("3.png", "R"))
    made, _ = make(tmp_path / "source.csv", tmp_path / "out", holdout=[str(tmp_path / "test.csv")])
    assert names(made) == ["3.png"]
