"""One segmenter over a folder: the training run's own masks again, clips, what is there already or cannot be read."""
import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from file_tools import greys, save, save_dicom, speckle
from PIL import Image
from stage_tools import CONFIG, one_thread, save_backbone  # noqa: F401

import predict
import runtime
from frames.images import Frame
from labelled import mask_sets
from model import VisionTransformer
from networks.decoders import Segmenter
from training import segmenter

CLASSES = ["background", "head", "lésion"]
DECODERS = {"upernet": dict(name="upernet", channels=32, norm="group"),
            "linear": dict(name="linear", channels=None, norm="group")}
SIZES = [(20, 30), (33, 17), (16, 16), (50, 41), (1, 9), (20, 30), (64, 48)]
ROOT = Path(predict.__file__).parent


def save_segmenter(path, decoder="upernet", seed=1):
    """A file as finetune_seg.py leaves it, of random weights that tell three classes apart."""
    torch.manual_seed(seed)
    network = Segmenter(VisionTransformer(**CONFIG), segmenter.make_decoder(DECODERS[decoder], 16, 3))
    torch.nn.init.normal_(network.decoder.classifier.weight, std=3)
    state = network.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    runtime.save_checkpoint(path, {
        "step": 3, "classes": CLASSES, "decoder": DECODERS[decoder], "config": CONFIG, "mean": 0.3, "std": 0.2,
        "img_size": 20, **{part: {key: value for key, value in state.items() if key.startswith(own)}
                           for part, own in (("teacher", "backbone."), ("head", "decoder."))}})
    return path


def run(ckpt, data, out, *flags, received=()):
    """main() in this process -> what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(runtime, "stop_on_signals", lambda: received)
        data = ["--data", str(data)] if data else []
        predict.main(predict.get_args(["--ckpt", str(ckpt), *data, "--output_dir", str(out), *map(str, flags)]))
    return shown.getvalue()


def masks_of(folder):
    """{name: mask} of every PNG below a folder."""
    return {str(path.relative_to(folder)): np.array(Image.open(path)) for path in sorted(Path(folder).rglob("*.png"))}


def skipped(folder):
    with open(folder / "skipped.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "reason"]
    return dict(rows)


@pytest.fixture
def ckpt(tmp_path):
    return save_segmenter(tmp_path / "seg" / "run.pt")


@pytest.fixture
def folder(tmp_path):
    for number, shape in enumerate(SIZES):
        save(tmp_path / "data" / f"p{number % 2}" / f"{number}.png", speckle(number, shape))
    return tmp_path / "data"


# ---------------------------------------------------------------- masks

@pytest.mark.parametrize("decoder", DECODERS)
def test_masks_are_those_of_the_training_run(tmp_path, decoder):
    """Exactly, whatever the batches: segmenter.score_network writes the masks that finetune_seg.py scores."""
    for number, shape in enumerate(SIZES):
        save(tmp_path / "set" / "images" / f"{number}.png", speckle(number, shape))
        save(tmp_path / "set" / "masks" / f"{number}.png", speckle(number, shape) % 3)
    ckpt = save_segmenter(tmp_path / "run.pt", decoder)
    args = SimpleNamespace(
        data=str(tmp_path / "set"), masks=None, mask_pattern=None, classes=None, exclude=[], group_regex=None,
        split=None, pixel_sizes=None, test_seed=0, val_fraction=0.2, test_fraction=0.2, img_size=20, eval_batch_size=3,
        dtype="float32", tolerance=2.0)
    data = mask_sets.open_data(args)[0]
    data, canvases = data._replace(test=np.arange(len(SIZES))), data.images.at(20)
    cpu, theirs = torch.device("cpu"), str(tmp_path / "theirs")
    network, _ = segmenter.open_segmenter(str(ckpt), cpu)
    segmenter.score_network(network, data, canvases, (0.3, 0.2), args, theirs, cpu, 0, 1)
    run(ckpt, tmp_path / "set" / "images", tmp_path / "ours", "--batch_size", 2, "--dtype", "float32")
    ours, theirs = masks_of(tmp_path / "ours"), {Path(name).name: mask for name, mask in masks_of(theirs).items()}
    assert list(ours) == list(theirs) == [f"{number}.png" for number in range(len(SIZES))]
    for name, mask in ours.items():
        assert (mask == theirs[name]).all()
    assert set(np.unique(np.concatenate([mask.ravel() for mask in ours.values()]))) == {0, 1, 2}


def test_a_mask_by_hand(ckpt, folder, tmp_path):
    """Its image squashed, normalised, through the network, bilinear back, the largest logit; class names beside it."""
    run(ckpt, folder, tmp_path / "out", "--dtype", "float32")
    saved = torch.load(ckpt)
    network = Segmenter(VisionTransformer(**CONFIG), segmenter.make_decoder(DECODERS["upernet"], 16, 3)).eval()
    network.load_state_dict({**saved["teacher"], **saved["head"]})
    assert len(masks_of(tmp_path / "out")) == len(SIZES)
    for number, shape in enumerate(SIZES):
        square = Image.fromarray(speckle(number, shape)).resize((20, 20), Image.Resampling.BICUBIC)
        with torch.no_grad():
            logits = network((torch.tensor(np.array(square))[None, None] / 255 - 0.3) / 0.2)
        want = F.interpolate(logits, shape, mode="bilinear").argmax(1)[0].numpy()
        with Image.open(tmp_path / "out" / f"p{number % 2}" / f"{number}.png") as image:
            assert image.mode == "P" and image.text["classes"].splitlines() == ["0 background", "1 head", "2 lésion"]
            assert np.array(image).shape == shape and (np.array(image) == want).all()


def test_half_precision_is_asked_for(ckpt, folder, tmp_path, monkeypatch):
    seen, predict = [], segmenter.predict_logits
    monkeypatch.setattr(segmenter, "predict_logits", lambda *args: seen.append(args[-1]) or predict(*args))
    run(ckpt, folder, tmp_path / "a", "--dtype", "bfloat16")
    assert "  dtype float32\n" in run(ckpt, folder, tmp_path / "b") and seen == ["bfloat16", "float32"]


# ---------------------------------------------------------------- files of several frames

@pytest.fixture
def clips(tmp_path):
    """Of 20 frames (GIF), of 9 (DICOM, its name all dots), of one (TIFF)."""
    tall = np.stack([speckle(100 + number, (30, 18)) for number in range(9)])
    save(tmp_path / "clips" / "long.gif", *[speckle(number, (24, 20)) for number in range(20)])
    save_dicom(tmp_path / "clips" / "sub" / "1.2.840.7", tall)
    save(tmp_path / "clips" / "one.tif", speckle(9))
    return tmp_path / "clips"


def test_each_frame_has_a_mask(ckpt, clips, tmp_path):
    """The masks of frames are those of the same pictures in files of their own."""
    said = run(ckpt, clips, tmp_path / "out", "--batch_size", 7)
    found = masks_of(tmp_path / "out")
    assert "30 masks written" in said and set(found) == {
        "one.png", *(f"long_frame{number:05d}.png" for number in range(20)),
        *(f"sub/1.2.840.7_frame{number:05d}.png" for number in range(9))}
    for name in ("long.gif", "sub/1.2.840.7"):
        for number, grey in enumerate(greys(clips / name)):
            save(tmp_path / "stills" / f"{mask_stem(name)}_frame{number:05d}.png", grey)
    run(ckpt, tmp_path / "stills", tmp_path / "again", "--batch_size", 5)
    again = masks_of(tmp_path / "again")
    assert len(again) == 29 and all((mask == found[name]).all() for name, mask in again.items())


def mask_stem(name):
    return name.removesuffix(".gif")


def test_a_clip_goes_on_after_its_last_mask(ckpt, clips, tmp_path, monkeypatch):
    run(ckpt, clips, tmp_path / "out")
    for number in (11, 12, 15):
        os.remove(tmp_path / "out" / f"long_frame{number:05d}.png")
    firsts, read = [], predict.read_frames

    def noted(path, first):
        firsts.append((Path(path).name, first))
        return read(path, first)

    monkeypatch.setattr(predict, "read_frames", noted)
    before = masks_of(tmp_path / "out")
    said = run(ckpt, clips, tmp_path / "out", "--batch_size", 2)
    assert "3 masks written" in said and "27 were there" in said, said
    assert sorted(firsts) == [("1.2.840.7", 9), ("long.gif", 11)], "frames before were decoded once more"
    after = masks_of(tmp_path / "out")
    assert len(after) == 30 and all((after[name] == mask).all() for name, mask in before.items())


def test_a_clip_that_breaks_off(ckpt, tmp_path, monkeypatch):
    """What comes before the break has masks; the rest is listed, as often as the command is given."""
    def load(i, first):
        yield from (Frame(speckle(number), speckle(number)) for number in range(first, (5, 1)[i]))
        raise OSError("cut off")

    monkeypatch.setattr(predict, "open_images", lambda args: (["a.tif", "b.tif"], load, []))
    for written, there in ((6, 0), (0, 6)):
        said = run(ckpt, "a list", tmp_path / "out")
        assert f"{written} masks written" in said and f"{there} were there" in said and "2 files skipped" in said
        assert list(masks_of(tmp_path / "out")) == [f"a_frame{n:05d}.png" for n in range(5)] + ["b_frame00000.png"]
        assert skipped(tmp_path / "out") == {"a.tif": "frame 5: cut off", "b.tif": "frame 1: cut off"}


# ---------------------------------------------------------------- going on

def test_masks_that_are_there_are_left(ckpt, folder, tmp_path):
    out = tmp_path / "out"
    run(ckpt, folder, out)
    first = masks_of(out)
    (out / "p0" / "2.png").write_bytes(b"somebody's work")
    os.remove(out / "p1" / "3.png")
    save(folder / "p0" / "new.png", speckle(77))
    said = run(ckpt, folder, out, "--batch_size", 1)
    assert "2 masks written" in said and "6 were there" in said and "0 files skipped" in said, said
    assert (out / "p0" / "2.png").read_bytes() == b"somebody's work"
    os.remove(out / "p0" / "2.png")
    run(ckpt, folder, out)
    second = masks_of(out)
    assert second.keys() == {*first, "p0/new.png"} and all((second[name] == mask).all() for name, mask in first.items())
    assert "0 masks written" in run(ckpt, folder, out)


def test_stopped_between_batches(ckpt, folder, tmp_path, monkeypatch):
    received, predict = [], segmenter.predict_logits

    def stop_at_second(*args):
        calls.append(args)
        received.extend([2] * (len(calls) == 2))
        return predict(*args)

    calls = []
    monkeypatch.setattr(segmenter, "predict_logits", stop_at_second)
    said = run(ckpt, folder, tmp_path / "out", "--batch_size", 2, received=received)
    assert "4 masks written" in said and "stopped before the end" in said and len(masks_of(tmp_path / "out")) == 4
    received.clear()
    assert "3 masks written" in run(ckpt, folder, tmp_path / "out", received=received)


def test_ctrl_c_leaves_whole_files(ckpt, tmp_path):
    for number in range(300):
        save(tmp_path / "data" / f"{number:03d}.png", speckle(number, (30, 40)))
    words = [sys.executable, ROOT / "predict.py", "--ckpt", ckpt, "--data", tmp_path / "data", "--output_dir",
             tmp_path / "out", "--batch_size", "1"]
    done = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while len(list((tmp_path / "out").glob("*.png"))) < 5:
        assert done.poll() is None, done.stdout.read()
        time.sleep(0.01)
    done.send_signal(signal.SIGINT)
    said = done.communicate(timeout=60)[0]
    assert done.returncode == 0 and "the same command goes on" in said and "Traceback" not in said, said
    found = masks_of(tmp_path / "out")
    assert 5 <= len(found) < 300 and all(mask.shape == (30, 40) for mask in found.values())
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.suffix != ".png") == [".csv", ".json"]


# ---------------------------------------------------------------- memory that does not grow

def test_readers_wait_for_whoever_takes():
    """No more than `ahead` parts are read and not taken, of stills and clips; the order is always the same."""
    lengths, lock, read = [1, 1, 30, 1, 0, 17, 8, 1] * 12, threading.Lock(), []

    def load(i, first):
        for number in range(first, lengths[i]):
            time.sleep(0.0005 * (i % 3))
            with lock:
                read.append((i, number))
            yield Frame(None, np.full((4, 5), number, np.uint8))

    def take(ahead, pause):
        read.clear()
        order, taken, most = [], 0, 0
        for i, first, part, ended, reason in predict.read_ahead(((i, 0) for i in range(len(lengths))), load, 3, ahead):
            order += [(i, None if first is None else first + k) for k in range(len(part))]
            assert [canvas[0, 0] for _, canvas in part] == [(first or 0) + k for k in range(len(part))]
            assert (reason == "holds no frame") == (lengths[i] == 0)
            time.sleep(pause)
            taken += len(part)
            most = max(most, len(read) - taken)
        return order, most

    order, most = take(6, 0.003)
    assert 12 < most <= 6 * predict.PART, "nothing was read ahead, or too much"
    assert sorted(order, key=str) == sorted(((i, number if n > 1 else None) for i, n in enumerate(lengths)
                                             for number in range(n)), key=str)
    assert take(6, 0)[0] == order
    assert order.index((2, 8)) > order.index((5, 0)), "clips do not take turns"


def test_writers_are_waited_for(ckpt, folder, tmp_path, monkeypatch):
    """There are never logits of more than two batches."""
    predicted, written, most, forward, write = [0], [], [0], segmenter.predict_logits, predict.write_mask

    def slow(*args):
        time.sleep(0.02)
        write(*args)
        written.append(args)

    def watched(network, canvases, *more):
        predicted[0] += len(canvases)
        most[0] = max(most[0], predicted[0] - len(written))
        return forward(network, canvases, *more)

    monkeypatch.setattr(predict, "write_mask", slow)
    monkeypatch.setattr(segmenter, "predict_logits", watched)
    run(ckpt, folder, tmp_path / "out", "--batch_size", 1)
    assert most == [2] and len(written) == len(SIZES)


@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_full_disk_stops_the_run(ckpt, folder, tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(predict, "write_mask", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run(ckpt, folder, tmp_path / "out", "--batch_size", batch_size)


# ---------------------------------------------------------------- names

@pytest.mark.parametrize("names", [("x.jpg", "x.png"), ("a/x.PNG", "a/x.tiff")])
def test_two_files_with_one_mask(ckpt, tmp_path, names):
    for name in names:
        save(tmp_path / "data" / name, speckle(1))
    with pytest.raises(ValueError, match=r"x\.\w+ and \S*x\.\w+ would have one mask, \S*x\.png: leave one"):
        run(ckpt, tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(ckpt, tmp_path / "data", tmp_path / "out", "--exclude", "*." + names[0].split(".")[1])
    assert len(masks_of(tmp_path / "out")) == 1


def test_a_still_called_like_a_frame(ckpt, tmp_path):
    save(tmp_path / "data" / "x_frame00001.png", speckle(1))
    save(tmp_path / "data" / "x.gif", speckle(2))
    run(ckpt, tmp_path / "data", tmp_path / "out")
    assert list(masks_of(tmp_path / "out")) == ["x.png", "x_frame00001.png"]
    save(tmp_path / "data" / "x.gif", speckle(2), speckle(3))
    with pytest.raises(ValueError, match=r"x_frame00001.png is called like a frame of x.gif, which has several"):
        run(ckpt, tmp_path / "data", tmp_path / "out2")


def test_lists_lead_to_no_mask_outside(ckpt, folder, tmp_path):
    """A path that is absolute, or climbs, has its mask below --output_dir all the same."""
    listed = tmp_path / "lists" / "some.txt"
    listed.parent.mkdir()
    listed.write_text(f"{folder}/p0/2.png\n../data/p1/3.png\n")
    run(ckpt, listed, tmp_path / "lists" / "out" / "deep")
    assert len(masks_of(tmp_path / "lists" / "out" / "deep")) == 2
    assert len(list(tmp_path.rglob("*.png"))) == len(SIZES) + 2
    listed.write_text("../data/p1/3.png\n../data/p1/3.png\n")
    with pytest.raises(ValueError, match="would have one mask"):
        run(ckpt, listed, tmp_path / "lists" / "again")


def test_one_file_and_names_that_are_no_utf8(ckpt, tmp_path):
    name = os.fsdecode(b"sch\xe4del.png")
    path = save(tmp_path / "data" / name, speckle(1))
    Path(tmp_path / "data" / os.fsdecode(b"b\xe4d.png")).write_bytes(b"nothing")
    run(ckpt, path, tmp_path / "one")
    assert list(masks_of(tmp_path / "one")) == [name]
    run(ckpt, tmp_path / "data", tmp_path / "all")
    assert list(skipped(tmp_path / "all")) == [os.fsdecode(b"b\xe4d.png")]


# ---------------------------------------------------------------- what is wrong is told

def test_unreadable_files_are_listed(ckpt, folder, tmp_path):
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "b.png").write_bytes((folder / "p1" / "3.png").read_bytes()[:200])
    said = run(ckpt, folder, tmp_path / "out")
    assert "7 masks written" in said and f"2 files skipped, see {tmp_path / 'out' / 'skipped.csv'}" in said
    found = skipped(tmp_path / "out")
    assert found.keys() == {"a.png", "b.png"} and "not an image" in found["a.png"] and found["b.png"]
    os.remove(folder / "a.png"), os.remove(folder / "b.png")
    assert "0 files skipped\n" in run(ckpt, folder, tmp_path / "out") and not skipped(tmp_path / "out")


def test_nothing_but_unreadable_files(ckpt, tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"no picture")
    with pytest.raises(SystemExit) as left, runtime.clear_errors():
        run(ckpt, tmp_path / "data", tmp_path / "out")
    said = capsys.readouterr().err
    assert left.value.code == 2 and "error: none of 2 files could be read" in said and "a.png: not an image" in said
    assert len(skipped(tmp_path / "out")) == 2


def test_wrong_checkpoints(ckpt, folder, tmp_path):
    saved = torch.load(ckpt)
    state = {key: value for key, value in saved.items() if key not in ("decoder", "classes")}
    bad = {"pretrained.pt": (save_backbone, {}, "no finished run of finetune_seg.py"),
           "classes.pt": (save_backbone, dict(classes=["a", "b"], head={}), "no finished run of finetune_seg.py"),
           "unfinished.pt": (runtime.save_checkpoint, dict(state, best={}, network={}), "no finished run"),
           "timm.pt": (runtime.save_checkpoint, dict(saved, config=dict(timm="x", in_chans=3, embed_dim=8)), "backbone is timm's"),
           "other.pt": (runtime.save_checkpoint, dict(saved, head={}), "does not fit this model: missing decoder")}
    for name, (write, content, sentence) in bad.items():
        if write is save_backbone:
            save_backbone(tmp_path / name, **content)
        else:
            write(tmp_path / name, content)
        with pytest.raises(ValueError, match=f"{name}.*{sentence}"):
            run(tmp_path / name, folder, tmp_path / "out")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        run(tmp_path / "text.pt", folder, tmp_path / "out")
    with pytest.raises(ValueError, match="none.pt: no such file; a run of finetune_seg.py or finetune_multi.py leaves one"):
        run(tmp_path / "none.pt", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_folders(ckpt, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images found"):
        run(ckpt, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / "p0" / "masks", folder / ".." / "data", tmp_path / "link" / "masks"):
        with pytest.raises(ValueError, match="is in --data .* would be taken for images"):
            run(ckpt, folder, out)
    with pytest.raises(ValueError, match="holds files that predict.py did not write"):
        run(ckpt, folder / "p0", folder / "p1")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(ckpt, folder, tmp_path / "file")
    run(ckpt, folder, tmp_path / "out")
    run(ckpt, f"{folder}/p0/..", tmp_path / "out")  # the same folder by another path
    with pytest.raises(ValueError, match="out: its masks are of another --data; choose"):
        run(ckpt, folder / "p0", tmp_path / "out")
    with pytest.raises(ValueError, match="out: its masks are of another --ckpt"):
        run(save_segmenter(tmp_path / "second.pt", seed=5), folder, tmp_path / "out")
    assert "data" not in (tmp_path / "out" / "segment.json").read_text().replace("--data", "")


@pytest.mark.parametrize("flags", [("--batch_size", "0"), ("--exclude", "*.png"), ("--areas",)])
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit):
        predict.get_args(flags)
    assert flags[0] in capsys.readouterr().err


# ---------------------------------------------------------------- no flags

def test_without_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "stop_on_signals", lambda: ())
    with pytest.raises(ValueError, match="seg/last-seed0.pt: no such file; a run of finetune_seg.py or finetune_multi.py leaves one"):
        predict.main(predict.get_args([]))
    save_segmenter(tmp_path / "seg" / "last-seed0.pt")
    predict.main(predict.get_args([]))
    said = capsys.readouterr().out
    assert "60 masks written to masks" in said and "smoke test" in said and "60 phantoms" in said
    found = masks_of(tmp_path / "masks")
    assert len(found) == 60 and all(mask.shape == (64, 64) for mask in found.values())


def test_progress_counts_files(tmp_path):
    """Of stills, clips, done and failed ones: as many as there are."""
    lengths, bar = [1, 20, 0, 1, 1], SimpleNamespace(n=0)
    bar.update = lambda n=1: setattr(bar, "n", bar.n + n)
    count, names, missed = {"there": 0}, [f"{i}.tif" for i in range(5)], []
    (tmp_path / "3.png").write_bytes(b"")
    parts = predict.read_ahead(predict.unfinished(names, str(tmp_path), count, bar), lambda i, first: [
        Frame(speckle(number), speckle(number)) for number in range(first, lengths[i])], 4, 3)
    batches = list(predict.make_batches(parts, names, str(tmp_path), 6, count, missed, bar))
    assert bar.n == 5 and count["there"] == 1 and missed == [("2.tif", "holds no frame")]
    assert [len(batch) for batch in batches] == [6, 6, 6, 4]


@pytest.mark.slow
def test_speed_tables(tmp_path):
    """The benchmark runs, on a handful of images."""
    script = ROOT / "benchmarks" / "segment_speed.py"
    subprocess.run([sys.executable, script, "--quick", "--output", tmp_path / "speed"], check=True,
                   stdout=subprocess.DEVNULL)
    text = (tmp_path / "speed.md").read_text()
    assert "| linear | 0.000645 |" in text and "commit" in text and "| peak memory, 9 images, of 3" in text
