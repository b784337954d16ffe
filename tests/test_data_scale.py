"""The data path at size: a large sparse pack, workers that share memory, and the benchmark that measures both."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import FakePack, batch_args

import data
from frames.packed import Pack, image_order

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "data.py"
sys.path.append(str(SCRIPT.parent))  # at the end: its data.py is not ours
spec = importlib.util.spec_from_file_location("data_benchmark", SCRIPT)
data_benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(data_benchmark)


@pytest.mark.parametrize("images, groups", [(200_000, 500), pytest.param(2_000_000, 5_000, marks=pytest.mark.slow)])
def test_large_pack(tmp_path, images, groups):
    folder = data_benchmark.write_pack(tmp_path / "sparse.pack", images, groups, 384)
    args = batch_args(batch_size_per_gpu=10)
    order = image_order(np.arange(images) * groups // images, 0, 0)
    first = order[:10]
    with open(folder / "canvases.u8", "r+b") as file:  # ten images of the zeros' middle
        for number, image in enumerate(first.tolist()):
            file.seek(image * 384 * 384)
            file.write(np.full(384 * 384, number + 1, np.uint8))
    assert (folder / "canvases.u8").stat().st_blocks * 512 < 10 * 384 * 384 + 2 ** 20
    pack = Pack(folder)
    batches = data.PretrainBatches(pack, args)
    assert (batches.indices(0) == first).all()
    micro = batches[0][0]
    assert (micro["canvases"] == torch.arange(1, 11, dtype=torch.uint8)[:, None, None]).all()
    assert (micro["groups"].numpy() == first * groups // images).all()

    size = images // groups  # images of a group are a groups' length apart, but for the group's own offset
    places = np.argsort(order).reshape(groups, size)
    assert np.diff(np.sort(places, axis=1), axis=1).min() > groups / 2
    arrays = pack.sizes, pack.groups, pack.hashes, pack.looks, *batches.orders.values()
    assert sum(array.nbytes for array in arrays) <= 72 * images


def test_workers_give_what_this_process_gives(tmp_path):
    """Three epochs of items, in and out of workers: equal while they are valid, in three blocks of shared memory."""
    pack = Pack(data_benchmark.write_pack(tmp_path / "noise.pack", 50, 7, 48, noise=True))
    batches = data.PretrainBatches(pack, batch_args(accum_iter=2))
    steps = range(1, 20)
    for step, here, there in zip(steps, batches.loader(steps, 0), batches.loader(steps, 2), strict=True):
        for one, other in zip(here, there, strict=True):
            assert list(one) == list(other)
            assert all(torch.equal(one[key], other[key]) for key in one), step
        storages = {value.untyped_storage().data_ptr() for micro in there for value in micro.values()}
        assert len(storages) == 3 and all(value.is_shared() for micro in there for value in micro.values())


def test_items_of_this_process_stay(tmp_path):
    batches = data.PretrainBatches(FakePack(40), batch_args())
    items = list(batches.loader(range(9), 0))
    assert all(torch.equal(item[0]["canvases"], batches[step][0]["canvases"]) for step, item in enumerate(items))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_is_valid_until_the_next_but_one(workers):
    batches = data.PretrainBatches(FakePack(40), batch_args())
    before = None
    for step, item in enumerate(batches.loader(range(30), workers)):
        if before is not None:
            assert torch.equal(before[0]["canvases"], batches[step - 1][0]["canvases"])
        before = item


def test_workers_share_the_first_order(tmp_path, monkeypatch):
    """It is made once, before they are forked; a later epoch's by each worker."""
    log, original = tmp_path / "log", image_order

    def logged(groups, seed, epoch):
        with open(log, "a") as file:
            file.write(f"{epoch}\n")
        return original(groups, seed, epoch)

    monkeypatch.setattr(data, "image_order", logged)
    batches = data.PretrainBatches(FakePack(40), batch_args())  # 10 steps an epoch
    assert len(list(batches.loader(range(13, 18), 2))) == 5
    assert log.read_text().split() == ["1"]
    assert len(list(batches.loader(range(13, 30), 2))) == 17
    assert sorted(log.read_text().split()) == ["1", "2", "2"]


def test_parts_of_one_storage():
    arrays = {"flags": np.array([True, False, True]), "numbers": np.arange(6).reshape(2, 3),
              "none": np.zeros((0, 4), np.float32), "column": np.eye(3, dtype=np.float32)[:, 1]}
    tensors = data.in_one_storage(arrays)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
    for key, array in arrays.items():
        assert tensors[key].shape == array.shape and (tensors[key].numpy() == array).all()
        assert tensors[key].dtype == torch.from_numpy(array).dtype


def test_canvases_of_any_size_are_read(tmp_path):
    """Advice to the disk begins on a page; canvases need not."""
    pack = Pack(data_benchmark.write_pack(tmp_path / "noise.pack", 30, 3, 50, noise=True))
    indices = np.array([29, 0, 13, 13])
    assert (data.read_canvases(pack.canvases, indices) == np.array(pack.canvases)[indices]).all()


# ---------------------------------------------------------------- benchmarks/data.py

def test_ten_crops(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    crops = data_benchmark.ten_crops(tmp_path / "a.png")
    assert [tuple(crop.shape) for crop in crops] == 2 * [(3, 224, 224)] + 8 * [(3, 96, 96)]
    assert all(crop.dtype == torch.float32 and crop.std() > 0.1 for crop in crops)


def test_benchmark_runs(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--quick", "--output", tmp_path / "r", "--folder", tmp_path],
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "r.json").read_text())
    assert list(parts) == ["packing", "reading", "scale", "workers"] and (tmp_path / "r.md").exists()
    goals = [row["result"] for part in parts.values() for row in part["tables"][-1][1]]
    assert len(goals) == 11 and set(goals) <= {"met", "missed"}
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.md"}  # what it made is gone
