"""Packing when things go wrong: full disks, killed runs, dead workers, several processes at once."""
import errno
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from file_tools import load_grey
from test_pack import ROOT, clips, make, names, run, save, speckle  # clips is a fixture

import pack
from frames import images
from frames.images import resize_square
from frames.packed import Pack

# ---------------------------------------------------------------- what goes wrong on a machine

def test_full_disk_is_noticed_before_the_work(tmp_path, clips, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 12 * 16 * 16)  # room for the canvases, not for the index
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match="about 12 canvases of 16x16 need .* are free.*--canvas"):
        make(clips, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


@pytest.fixture
def reads(monkeypatch):
    """Count how often each file is decoded; every frame enters the journal at once."""
    counts, read = Counter(), images.read_frames

    def counting(path, first=0):
        counts[os.path.basename(path)] += 1
        return read(path, first)
    monkeypatch.setattr(images, "read_frames", counting)
    monkeypatch.setattr(images, "CHUNK", 1)
    monkeypatch.setattr(pack, "SAVE_EVERY", -1)
    return counts


def equal_packs(one, two):
    for file in ("canvases.u8", "index.csv", "names.csv", "skipped.txt"):
        assert Path(one.folder, file).read_bytes() == Path(two.folder, file).read_bytes(), file
    return {**one.info, "salt": ""} == {**two.info, "salt": ""}


def full_disk_after(calls, monkeypatch):
    """The disk is full at so many writes of canvases; half of the last one still fits."""
    add, left = pack.Journal.add, iter(range(calls))

    def limited(self, rows, canvases, failed):
        if next(left, None) is None:
            with open(self.paths[0], "ab") as file:
                file.write(canvases.tobytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, rows, canvases, failed)
    monkeypatch.setattr(pack.Journal, "add", limited)
    return add


def test_full_disk_keeps_what_was_done_and_the_same_command_goes_on(tmp_path, clips, monkeypatch, reads):
    (clips / "sick" / "bad.png").write_text("no image")
    whole, _ = make(clips, tmp_path / "whole")
    reads.clear()
    add = full_disk_after(6, monkeypatch)
    with pytest.raises(OSError, match="out.part/canvases.u8: the disk is full after 5 images.*goes on from there"):
        make(clips, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out.part", "src", "whole"]
    monkeypatch.setattr(pack.Journal, "add", add)
    made, log = make(clips, tmp_path / "out")
    assert "going on with" in log and "5 of 13 files are read" in log
    again = [name for name, times in reads.items() if times > 1]
    assert again == ["sick-b_frame1.png", "sick-b_frame2.png"]  # the last that was written, and the one that was not
    assert equal_packs(made, whole) and sorted(os.listdir(tmp_path)) == ["out", "src", "whole"]


def test_an_unfinished_pack_goes_on_with_the_same_files_and_arguments_only(tmp_path, clips, monkeypatch, reads):
    add = full_disk_after(3, monkeypatch)
    with pytest.raises(OSError):
        make(clips, tmp_path / "out")
    monkeypatch.setattr(pack.Journal, "add", add)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out.part").iterdir()}
    with pytest.raises(ValueError, match=r"out.part: was begun with other arguments or other files \(--drop_colour\); delete it"):
        make(clips, tmp_path / "out", drop_colour=True)
    save(clips / "sick" / "new.png", speckle(77))
    with pytest.raises(ValueError, match=r"was begun with other .* \(files\)"):
        make(clips, tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out.part").iterdir()}
    (clips / "sick" / "new.png").unlink()
    assert len(make(clips, tmp_path / "out")[0]) == 12


@pytest.mark.parametrize("where", ["write_tables", "settle", "rename"])
def test_a_run_killed_at_the_end_is_finished_by_the_next(tmp_path, clips, monkeypatch, where):
    """Frames are dropped, so that canvases move: whatever was done of that is done again."""
    for number in range(4):
        (clips / "sick" / f"copy{number}.png").write_bytes((clips / "sick" / "sick-a_frame0.png").read_bytes())
    whole, _ = make(clips, tmp_path / "whole", dedup=True)
    assert len(whole) == 12 and whole.info["equal"] == 4

    def killed(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os if where == "rename" else pack, where, killed)
        with pytest.raises(KeyboardInterrupt):
            make(clips, tmp_path / "out", dedup=True)
    if where == "settle":  # killed between two moves
        canvases = np.memmap(tmp_path / "out.part/canvases.u8", np.uint8, "r+").reshape(-1, 256)
        target, origin = np.load(tmp_path / "out.part/moves.npy")[0]
        canvases[target] = canvases[origin]
        canvases.flush()
    if where != "write_tables":
        with pytest.raises(ValueError, match="was begun with other arguments"):
            make(clips, tmp_path / "out")
    made, _ = make(clips, tmp_path / "out", dedup=True)
    assert equal_packs(made, whole)
    for name, canvas in zip(names(made), made.canvases):
        assert np.array_equal(canvas, resize_square(load_grey(clips / name), 16)), name
    assert sorted(os.listdir(made.folder)) == ["canvases.u8", "groups.csv", "index.csv", "names.csv", "pack.json",
                                               "skipped.txt"]


def test_two_processes_do_not_pack_into_one_folder(tmp_path, clips):
    with pack.unfinished(str(tmp_path / "out")):
        done = run("src", "out", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "pack.py: out.part: another process is packing there\n"


def die(paths, *_):
    os._exit(9)


def test_worker_that_dies_ends_the_run(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(images, "decode_chunk", die)
    with pytest.raises(ChildProcessError, match="a decoding process died.*sick-a_frame0.png to .*well-b_frame2.png"):
        make(clips, tmp_path / "out", workers=2)
    assert os.listdir(tmp_path) == ["src"]


def die_sending(paths, *_):
    """Send the first bytes of a result, by the queue of the pool's own function that has called us, and die."""
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals:
        frame = frame.f_back
    os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 99) + b"half of it")
    os._exit(9)


def test_worker_that_dies_while_it_sends_ends_the_run(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(images, "decode_chunk", die_sending)
    started = time.monotonic()
    with pytest.raises(ChildProcessError, match="a decoding process died"):
        make(clips, tmp_path / "out", workers=2)
    assert time.monotonic() - started < 60


# packs, and says when two chunks are in the journal's hands; none is on its disk before the end
WATCHED = """
import sys
import pack
add, calls, pack.SAVE_EVERY = pack.Journal.add, [], 1e9
def add_and_tell(*arguments):
    add(*arguments)
    calls.append(1)
    if len(calls) == 2:
        print("two chunks", flush=True)
pack.Journal.add = add_and_tell
pack.main(pack.get_args(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_goes_on(tmp_path, number):
    for image in range(2 * images.CHUNK):
        save(tmp_path / "src" / "p" / f"a{image}.png", speckle(image))
    save(tmp_path / "src" / "p" / "b0.png", speckle(0, (3000, 3000)))
    for copy in range(1, 100):  # far from done when the signal comes, however slow or fast the machine
        os.link(tmp_path / "src/p/b0.png", tmp_path / f"src/p/b{copy}.png")
    process = subprocess.Popen([sys.executable, "-c", WATCHED, "src", "out", "--workers", "2"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # background jobs ignore it
    assert process.stdout.readline() == "two chunks\n", process.communicate()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)  # also waits until the workers have closed stderr
    assert process.returncode not in (0, None) and sorted(os.listdir(tmp_path)) == ["out.part", "src"]
    if number != signal.SIGKILL:
        assert errors == "pack.py: interrupted; the same command goes on from what out.part holds\n"
    saved, rest = divmod(os.path.getsize(tmp_path / "out.part/rows"), images.ROW.itemsize)
    assert rest == 0 and (saved == 0 if number == signal.SIGKILL else 2 * images.CHUNK <= saved < 100)
    with pytest.raises(ValueError, match="not a readable pack"):
        Pack(tmp_path / "out.part")
    for copy in range(100):  # the same names; now quick to read
        (tmp_path / f"src/p/b{copy}.png").unlink()
        save(tmp_path / f"src/p/b{copy}.png", speckle(copy))
    done = run("src", "out", cwd=tmp_path)
    assert done.returncode == 0 and len(Pack(tmp_path / "out")) == 2 * images.CHUNK + 100, done.stderr
    assert ("going on with out.part" in done.stdout) == (number != signal.SIGKILL)


# ---------------------------------------------------------------- what pretraining opens

def test_a_folder_is_packed_once_and_other_processes_wait_for_it(tmp_path, clips, capsys):
    how = pack.options(pack.get_args(["src", "out", "--canvas", "16"]))
    folder, waiting = str(tmp_path / "out"), []
    threads = [threading.Thread(target=lambda: waiting.append(pack.open_pack([str(clips)], folder, False, **how)))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert not waiting
    first = pack.open_pack([str(clips)], folder, True, **how)
    for thread in threads:
        thread.join(20)
    assert [len(one) for one in waiting] == [12, 12] and len(first) == 12
    assert f"packing {clips} once, into {folder}" in capsys.readouterr().out
    pack.open_pack([str(clips)], folder, True, **how)
    assert f"using {folder}, packed earlier" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"was packed with other arguments \(--dedup\): delete it"):
        pack.open_pack([str(clips)], folder, True, **{**how, "dedup": True})


def test_another_machine_that_packs_is_waited_for(tmp_path, clips):
    out, found = str(tmp_path / "out"), []
    made, _ = make(clips, tmp_path / "elsewhere")
    with pack.unfinished(out):
        thread = threading.Thread(target=lambda: found.append(pack.make_or_wait(out, True, lambda: make(clips, out))))
        thread.start()
        time.sleep(0.2)
        assert not found
    os.rename(made.folder, out)
    thread.join(20)
    assert len(found[0]) == 12


def test_a_waiting_process_takes_over_or_leaves(tmp_path, clips, monkeypatch):
    out, found = str(tmp_path / "out"), []
    with pack.unfinished(out):  # a packer that dies: its lock is free, there is no pack
        thread = threading.Thread(target=lambda: found.append(pack.make_or_wait(out, True, lambda: make(clips, out))))
        thread.start()
        time.sleep(0.2)
    thread.join(20)
    assert len(found[0]) == 12
    monkeypatch.setattr(pack, "PATIENCE", 0.1)
    with pytest.raises(ChildProcessError, match="nobody packs"):
        pack.make_or_wait(str(tmp_path / "never"), False, None)


def test_a_single_file_is_a_source_and_a_pack_is_none(tmp_path, clips):
    made, _ = make(clips / "sick/sick-a_frame0.png", tmp_path / "out")
    assert names(made) == ["sick-a_frame0.png"]
    with pytest.raises(ValueError, match="out is a pack, not a source of images"):
        make(tmp_path / "out", tmp_path / "other")


def test_a_wrong_source_stops_before_all_of_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "ENOUGH", 20)
    for number in range(200):
        save(tmp_path / "src" / f"{number:03d}.png", speckle(number))
        if number < 40:
            (tmp_path / "src" / f"{number:03d}.png").write_text("no image")
    with pytest.raises(ValueError, match="(16|24) of the first (16|24) files cannot be read, over --max_skipped 0.5"):
        make(tmp_path / "src", tmp_path / "out")
    assert len(make(tmp_path / "src", tmp_path / "out", max_skipped=1)[0]) == 160  # goes on, or anew


def test_a_pack_takes_no_packing_flags_and_no_company(tmp_path, clips):
    make(clips, tmp_path / "made")
    for how in (dict(exclude=["x"]), dict(holdout=["x"]), dict(group_regex="(x)"), dict(dedup=True), dict(crop_fan=True),
                dict(max_per_group=3), dict(drop_colour=True)):
        with pytest.raises(ValueError, match=f"is a pack already: give --{list(how)[0]} to pack.py"):
            pack.open_pack([str(tmp_path / "made")], "unused", True, canvas=384, max_skipped=0.5, **how)
    with pytest.raises(ValueError, match="must be the only --data"):
        pack.open_pack([str(tmp_path / "made"), str(clips)], "unused", True)
