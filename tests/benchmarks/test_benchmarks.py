"""The benchmarks' opponent computes what we compute, and the scripts do what a CPU can check of them."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import kernels
import pretrain
import runtime
from networks import moe
from runtime import parameter_groups

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import cpu  # noqa: E402
import gpu  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_tasks  # noqa: E402
import mixture  # noqa: E402
import plain  # noqa: E402
import record  # noqa: E402
import steps  # noqa: E402
import timing  # noqa: E402

SMALL = ["--preset", "cpu", "--batch_size_per_gpu", "8", "--head_n_prototypes", "32", "--head_hidden_dim", "16",
         "--head_bottleneck_dim", "8", "--global_crops_size", "16", "--local_crops_size", "8", "--patch_size", "4",
         "--local_crops_number", "3"]
CONFIG = dict(embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=4, in_chans=1, num_register_tokens=2,
              init_values=0.5)
VALUES = dict(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The scripts switch references on and off; here they are what a CPU runs either way."""
    monkeypatch.setattr(kernels.common, "INTERPRET", False)


class FakePack:
    def __init__(self, images=40, canvas=24):
        rng = np.random.default_rng(0)
        self.canvases = rng.integers(0, 255, (images, canvas, canvas), dtype=np.uint8)
        self.sizes, self.groups = np.tile([40, 30], (images, 1)), np.arange(images)

    def __len__(self):
        return len(self.canvases)


def both(args):
    """Our student and teacher, which differ, and plain ones with the same weights."""
    torch.manual_seed(0)
    config = dict(CONFIG, drop_path_rate=args.drop_path_rate)
    ours = [pretrain.Network(config, args).double() for _ in range(2)]
    for p in (p for network in ours for p in network.parameters()):
        p.data += 0.1 * torch.randn_like(p)
    return ours, plain.networks(config, args, *(network.state_dict() for network in ours))


def micro_of(args, step):
    micro = pretrain.to_device(data.PretrainBatches(FakePack(), args)[step], torch.device("cpu"), args, 0.5, 0.25)[0]
    return {key: value.double() if value.is_floating_point() else value for key, value in micro.items()}


def kept_images(drops, micro, registers):
    """Our drop-path draws, rows of the packed tokens, as plain's: image numbers per crop size and branch."""
    kept, first = [], 0
    for crops in (micro["global_crops"], micro["local_crops"]):
        N, place = 1 + registers + (crops.shape[-1] // 4) ** 2, 0 if not kept else 1
        starts = [sum(b * n for b, n in drop.shapes[:place]) for drop in drops]
        kept.append([(drop.rows[start:start + drop.shapes[place][0] * N:N] - first) // N
                     for drop, start in zip(drops, starts)])
        first += len(crops) * N
    return kept


@pytest.mark.parametrize("clip", ["1e9", "0.05"], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("drop_path_rate", ["0", "0.4"])
def test_plain_steps_equal_ours(drop_path_rate, centering, clip):
    """Two steps with the same drop path: terms, gradients (Adam's first moments), weights, teacher, centers to 1e-5."""
    args = pretrain.get_args([*SMALL, "--drop_path_rate", drop_path_rate, "--centering", centering, "--clip_grad",
                              clip])
    (student, teacher), theirs = both(args)
    buffers = runtime.flatten_parameters(student), runtime.flatten_parameters(teacher.requires_grad_(False))
    optimizers = [torch.optim.AdamW(parameter_groups(network, 0.9), lr=0.0, fused=True)
                  for network in (student, theirs[0])]
    centers = [torch.zeros(2, 32, dtype=torch.float64) for _ in range(2)]
    for step in range(2):
        micro = micro_of(args, step)
        draws = list(pretrain.draw_drops(student.backbone, [micro], 0, step, 0))
        kept = kept_images(draws[0][0], micro, 2) if draws[0][0] else (None, None)
        stats = pretrain.train_step(student, teacher, optimizers[0], buffers, centers[0], [micro], VALUES, args, 8,
                                    draws)
        terms = plain.train_step(*theirs, optimizers[1], centers[1], plain.prepare(micro), VALUES, args, kept)
        ours = torch.stack([stats[name] for name in ("dino_local", "dino_global", "ibot", "koleo")])
        assert torch.allclose(ours, terms, rtol=1e-5, atol=0) and (terms[:3] > 0).all()
    pairs = {"centers": centers}
    for who, mine, other in (("student", student, theirs[0]), ("teacher", teacher, theirs[1])):
        pairs.update({f"{who} {key}": (value, other.state_dict()[key]) for key, value in mine.state_dict().items()})
    moments = [{name: optimizer.state[p]["exp_avg"] for name, p in network.named_parameters()}
               for optimizer, network in zip(optimizers, (student, theirs[0]))]
    pairs.update({f"gradient of {name}": (value, moments[1][name]) for name, value in moments[0].items()})
    for name, (got, want) in pairs.items():
        if centering == "centering" or name != "centers":
            error = (got - want).norm() / want.norm()
            assert error < 1e-5, f"{name}: {error:.1e}"


def test_plain_draws_its_own_drop_path():
    """As many images as ours, different ones each time; none in evaluation."""
    args = pretrain.get_args([*SMALL, "--drop_path_rate", "0.4"])
    _, (student, _) = both(args)
    crops, calls = torch.randn(10, 1, 16, 16).double(), []
    student.backbone.blocks[0].attn.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    one, two = student.backbone(crops), student.backbone(crops)
    assert calls == [6, 6] and not torch.equal(one, two)
    student.eval()
    assert torch.equal(student.backbone(crops), student.backbone(crops)) and calls[2:] == [10, 10]


# ---------------------------------------------------------------- steps that are measured

TINY = [*SMALL, "--dtype", "float32", "--canvas", "24", "--num_register_tokens", "2", "--drop_path_rate", "0.4"]


@pytest.fixture
def tiny_args(monkeypatch):
    args = pretrain.get_args(TINY)
    monkeypatch.setattr(pretrain, "backbone_config", lambda args: dict(CONFIG, drop_path_rate=args.drop_path_rate))
    return args


def test_measured_steps_are_training_steps(tiny_args):
    """Ours and plain start from the same weights; a compiled twin, or one of references, steps the same parameters."""
    ours, micro = steps.Ours(tiny_args, "cpu"), steps.one_batch(tiny_args, "cpu")
    other = steps.Plain(tiny_args, "cpu", ours)
    theirs = other.student.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.student.state_dict().items())
    before = ours.student.backbone.blocks[0].mlp.fc1.weight.clone()
    for how in ({}, {"reference": True}, {"checkpointing": True}):
        stats = ours.step(micro, **how)()
        assert stats["finite"] == 1 and not torch.equal(ours.student.backbone.blocks[0].mlp.fc1.weight, before)
        before = ours.student.backbone.blocks[0].mlp.fc1.weight.clone()
    assert not ours.student.backbone.checkpoint_activations  # of the twin only
    assert other.step(micro)()[:3].min() > 0


def test_step_flops_are_those_of_the_products(tiny_args, monkeypatch):
    """Counted by torch in a plain step without padding, with explicit attention."""
    micro = plain.prepare(steps.one_batch(tiny_args, "cpu"))
    n = micro["n_masked"]
    micro.update(mask_indices=micro["mask_indices"][:n], mask_weight=micro["mask_weight"][:n])
    monkeypatch.setattr(plain.Attention, "backend", torch.nn.attention.SDPBackend.MATH)
    monkeypatch.setattr(plain, "koleo_loss", lambda x: x.sum() * 0)
    step = steps.Plain(tiny_args, "cpu", steps.Ours(tiny_args, "cpu")).step(micro)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == pytest.approx(steps.step_flops(tiny_args, n), rel=0.01)


# ---------------------------------------------------------------- result files

def test_parts_are_merged(tmp_path):
    def part(title, rows):
        return dict(title=title, machine="a machine", command="a command", minutes=0.12, tables=[("What | how", rows)])

    path = tmp_path / "new" / "gpu"
    record.write_part(path, "Measured", "b", part("second", [{"x": 1.23456, "ok": True}]))
    record.write_part(path, "Measured", "a", part("first", []))
    record.write_part(path, "Measured", "b", part("again", [{"x": 0.000123, "n": 4096, "ok": False}]))
    found = record.read_results(path)
    assert list(found) == ["a", "b"]
    assert found["b"]["tables"] == [["What | how", [{"x": 0.000123, "n": 4096, "ok": False}]]]
    text = (tmp_path / "new" / "gpu.md").read_text()
    assert text.startswith("# Measured\n") and "## a: first" in text and "second" not in text and "a machine" in text
    assert "| x | n | ok |\n| --- | --- | --- |\n| 0.000123 | 4,096 | no |" in text and "0.1 minutes" in text


def test_a_reported_table_is_kept_at_once(tmp_path, capsys):
    """A benchmark that fails later has lost none of what it found."""
    path = tmp_path / "speed"
    report = record.reporter(path, "Measured", "folder", "A folder", "python x.py")
    report("First.", [{"ms": 1.5}])
    assert record.read_results(path)["folder"]["tables"] == [["First.", [{"ms": 1.5}]]]
    report("Second.", [{"ms": 2.5}])
    found = record.read_results(path)["folder"]
    assert [caption for caption, _ in found["tables"]] == ["First.", "Second."] and 0 <= found["minutes"] < 1
    assert (found["title"], found["command"]) == ("A folder", "python x.py") and "commit" in found["machine"]
    assert "| 2.5 |" in (tmp_path / "speed.md").read_text() and "Second.\n  {'ms': 2.5}\n" in capsys.readouterr().out


def test_table_fills_what_a_row_lacks():
    assert record.table([{"x": 1.23456}, {"y": 12345.6, "z": "a | b"}]) == [
        "| x | y | z |", "| --- | --- | --- |", "| 1.23 |  |  |", "|  | 12,346 | a / b |"]


def test_rounds_take_turns_and_say_what_failed():
    order = []

    def fails():
        order.append("bad")
        raise RuntimeError("no such backend\nat all")

    times = timing.rounds({"one": lambda: order.append("one"), "bad": fails,
                           "two": (lambda: order.append("two"), lambda: order.append("prepare"))}, "cpu", 2, 1)
    assert order == ["one", "bad", "prepare", "two", "one", "prepare", "two", "one", "prepare", "two"]
    assert len(times["one"]) == len(times["two"]) == 2 and times["bad"] == "RuntimeError: no such backend"
    assert timing.divided(6, 3) == 2 and timing.divided("why", 3) is None and timing.divided(1, None) is None


# ---------------------------------------------------------------- gpu.py and cpu.py, as far as a CPU goes

class Report:
    def __init__(self):
        self.tables = []

    def __call__(self, caption, rows):
        json.dumps(rows)  # plain values only
        assert rows and record.table(rows)
        self.tables.append((caption, rows))


def test_gpu_without_a_gpu_is_one_sentence():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py", "--parts", "a", "d"], capture_output=True, text=True,
                          env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "benchmarks/gpu.py measures a GPU and torch sees none here.\n"


@pytest.mark.slow
def test_gpu_correctness_passes_on_references():
    report = Report()
    gpu_kernels.part_a(report, "cpu", copy_bytes=1000, sides=(16, 32), repeats=2)
    gpu_kernels.part_b(report, "cpu", K=500, rows=130, images=2, tokens=(9, 21, 26), proto_rows=60)
    rows = report.tables[1][1]
    assert all(row["passed"] for row in rows), [row for row in rows if not row["passed"]]
    assert {row["kernel"] for row in rows} == {"attention", "softmax_center", "sinkhorn", "cross_entropy",
                                               "prototype_loss"}
    assert all(row["two runs are bit-equal"] for row in report.tables[2][1])
    gpu_kernels.touch("cpu")


@pytest.mark.parametrize("damage", [lambda x: x * 1.02, lambda x: x + float("nan")], ids=["2 % off", "NaN"])
def test_gpu_correctness_can_fail(damage):
    got = torch.randn(9, 7)
    row = gpu_kernels.compared("attention", "a case", torch.float16, 1e-3, {"out": (got, got.double()),
                                                                            "dq": (damage(got), got.double())})
    assert row["passed"] is False and "(dq)" in row["relative RMS"]


def test_gpu_correctness_survives_a_kernel_that_raises(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "cases", lambda device: [
        (gpu_kernels.target_row, ("sinkhorn", 3, 5, dtype, "cpu")) for dtype in ("no dtype", torch.float16)])
    failed, passed = gpu_kernels.correctness("cpu")
    assert failed["passed"] is False and "Error" in failed["case"] and passed["passed"]


@pytest.mark.slow
def test_gpu_speed_tables(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # minutes on a CPU
    report = Report()
    gpu_kernels.part_c(report, "cpu", K=300, rows=12, images=2, tokens=(9, 21), d=8, repeats=2, copy_bytes=1000,
                       sides=(16,))
    *tables, (_, goals) = report.tables
    kernels_rows = [row for _, rows in tables for row in rows if row["by"] in ("kernel", "kernels")]
    assert len(tables) == 6 and all(row["times ours"] == 1 for row in kernels_rows) and len(kernels_rows) == 9
    assert [row["result"] in ("met", "missed") for row in goals] == 6 * [True] + [False]  # no peak memory on a CPU
    rows = tables[-1][1]
    assert [row["by"] for row in rows] == 2 * ["kernels", "eager", "compiled"] and all(row["ms"] > 0 for row in rows)


def test_unfused_losses_equal_ours():
    """What part c compares prototype_loss to is the same loss but for the weights; here all are equal."""
    torch.manual_seed(0)
    f, W, f_t, W_t = (gpu_kernels.unit(*shape, device="cpu") for shape in ((12, 1, 8), (50, 8), (12, 1, 8), (50, 8)))
    f.requires_grad_(), W.requires_grad_()
    weight, center = torch.rand(12, 1), torch.randn(50) * 0.1
    ours = gpu_kernels.whole_loss(f, W, f_t, W_t, center, torch.tensor(gpu_kernels.ONE), weight, torch.float32)
    targets = plain.centered_targets(f_t[:, 0] @ W_t.T, center, gpu_kernels.TEMP)
    loss = plain.ibot_loss(f[:, 0] @ W.T, targets, weight[:, 0], 1)
    for got, want in zip(ours, (loss, *torch.autograd.grad(loss, (f, W)))):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


class FakeEvent:
    def __init__(self, **_):
        self.time = None

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time) + 1e-3


@pytest.fixture
def fake_gpu(monkeypatch, tiny_args):
    """Steps of the tiny model on the CPU, where gpu.py thinks it drives a GPU."""
    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 10 ** 9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1e11))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(runtime, "host_copy", lambda x: (x, FakeEvent()))
    for module in (gpu, gpu_kernels, gpu_tasks, timing):
        monkeypatch.setattr(module, "free", lambda: None)  # collecting garbage takes a second among pytest's objects
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(gpu, "arguments", lambda arch, batch, *flags: pretrain.get_args([*TINY, *flags]))
    monkeypatch.setattr(gpu, "best_backend", lambda args, device: "flash")
    monkeypatch.setattr(gpu, "ceilings", lambda device: dict(copy=1e12, matmul=1e14))
    monkeypatch.setattr(gpu_kernels, "BACKENDS", {"flash": None})
    monkeypatch.setattr(gpu, "BACKENDS", {"flash": None})
    monkeypatch.setattr(gpu, "one_batch", lambda args, device: steps.one_batch(args, "cpu"))
    return Report()


@pytest.mark.slow
def test_gpu_whole_steps(fake_gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "peak_of", functools.partial(gpu.peak_of, steps=0))
    monkeypatch.setattr(gpu, "whole_steps", functools.partial(gpu.whole_steps, rounds=1))
    monkeypatch.setattr(gpu, "fit_elsewhere", lambda *_: {"result": "met"})
    gpu.part_d(fake_gpu, "vit_small", "cpu")
    (_, eager), (_, goals), (_, compiled), (_, compiled_goals), _ = fake_gpu.tables
    assert [row["by"] for row in eager] == ["ours", "plain, flash SDPA", "ours --reference_ops"]
    assert [row["by"] for row in compiled] == ["ours", "plain, flash SDPA", "ours --compile",
                                               "plain compiled, flash SDPA"]
    assert eager[1]["times faster than plain"] == eager[1]["memory of plain"] == 1
    assert all(row["ms"] > 0 for row in eager)
    assert len(goals) == len(compiled_goals) == 3 and all(row["result"] in ("met", "missed") for row in goals)
    assert [row["result"] for row in goals[1:]] == [
        "met" if eager[0]["times faster than plain"] >= 1.7 else "missed", "missed"]


@pytest.mark.slow
def test_gpu_step_that_fails_is_a_row(fake_gpu, monkeypatch):
    def step(self, micro, compiled=False):
        return original(self, micro) if not compiled else lambda: torch.empty(-1)

    original = steps.Plain.step
    monkeypatch.setattr(steps.Plain, "step", step)
    _, rows = gpu.whole_steps("vit_small", "cpu", rounds=1)
    assert rows[3]["ms"].startswith("RuntimeError: ") and rows[3]["images/s"] is None and rows[1]["ms"] > 0
    record.table(rows)
    assert [row["result"] for row in gpu.against_goals("vit_small", rows[3])] == 3 * ["not measured"]


def test_gpu_fit(fake_gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "Ours", lambda args, _: steps.Ours(args, "cpu"))
    for ms, result in ((1.5, "met"), ("OutOfMemoryError: CUDA", "missed: OutOfMemoryError: CUDA")):
        monkeypatch.setattr(gpu, "step_times", lambda calls, *_: {name: ms for name in calls})
        gpu.fit("vit_large", 4, 22.0, ["--checkpoint_activations"])
        assert json.loads(capsys.readouterr().out)["result"] == result


def test_gpu_where_time_goes(fake_gpu, monkeypatch):
    found = [("attention_fwd_kernel", 2.0, 3), ("nvjet_x", 1.0, 1)]
    monkeypatch.setattr(gpu, "profiled", lambda call: (call(), found)[1])
    monkeypatch.setattr(gpu, "Canvases", lambda images: steps.Canvases(images, 24))
    gpu.part_e(fake_gpu, "cpu", rounds=1)
    (_, groups), (_, longest) = fake_gpu.tables[:2]
    assert groups[0]["group"] == "attention" and groups[0]["ours"] == 2 and groups[-2]["ours"] == 3
    assert groups[-1]["ours"] > 0
    assert longest[0]["kernel"] == "attention_fwd_kernel"
    assert all(row["waits for the device"] == "never" for row in fake_gpu.tables[-1][1])


@pytest.mark.slow
def test_gpu_many_tasks(fake_gpu, monkeypatch):
    """Part g, on the CPU in bfloat16: experts are right, every network makes steps of every kind, twice alike."""
    monkeypatch.setattr(gpu_tasks, "peak_of", functools.partial(timing.peak_of, steps=0))
    monkeypatch.setattr(gpu_tasks, "step_times", functools.partial(timing.step_times, in_a_row=1, warmup=0))
    gpu_tasks.part_g(fake_gpu, "cpu", archs=["vit_micro"], size=16, flags=["--batch_size", "2", "--channels", "32"],
                     rounds=1, tokens=50, width=16, mixtures=mixture.QUICK)
    (_, correct), (_, costs), (_, timed), (_, peaks), (_, waiting), (_, repeated) = fake_gpu.tables
    assert len(correct) == 6 and all(row["passed"] for row in correct), correct
    assert [row["experts"] for row in costs] == list(mixture.MIXTURES)
    assert len(timed) == len(waiting) == 12 and all(row["ms"] > 0 for row in timed)
    assert {row["of dense"] for row in timed[:4]} == {1}
    assert len(peaks) == 3 and all(row["detection, peak GB"] for row in peaks)
    assert all(row["two runs are bit-equal"] and row["finite"] for row in repeated) and len(repeated) == 3


def test_gpu_mixture_correctness_can_fail(monkeypatch):
    right = moe.grouped  # else the first expert for all, where it is not the reference
    monkeypatch.setattr(moe, "grouped", lambda x, weight, ends: (
        right(x, weight, ends) if x.dtype == torch.float64 else x @ weight[0]))
    rows = list(gpu_tasks.correctness("cpu", 50, 16))
    assert [row["passed"] for row in rows] == [True, False, False] * 2


def test_profile_counts_kernels_once(fake_gpu, monkeypatch):
    """Ranges that torch marks on the device's timeline, an optimizer's step say, span kernels that count already."""
    def event(key, milliseconds, device="CUDA", annotation=False):
        return SimpleNamespace(key=key, self_device_time_total=1000 * milliseconds, count=10,
                               is_user_annotation=annotation, device_type=getattr(torch.autograd.DeviceType, device))

    events = [event("small", 5), event("large", 10), event("Optimizer.step", 15, annotation=True),
              event("launch", 1, "CPU")]
    profile = contextlib.nullcontext(SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile)
    assert gpu.profiled(lambda: None, steps=5) == [("large", 2, 2), ("small", 1, 2)]


@pytest.mark.parametrize("kernel, group", [
    ("attention_bwd_dkdv_kernel", "attention"), ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
    ("row_logsumexp_kernel", "losses over prototypes"), ("column_logsumexp_kernel", "losses over prototypes"),
    ("cross_entropy_kernel", "losses over prototypes"),
    ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"), ("sm90_xmma_gemm_bf16bf16", "matrix products"),
    ("multi_tensor_apply_kernel<...FusedAdamMathFunctor>", "optimizer"), ("Memcpy DtoD", "copies and fills"),
    ("vectorized_layer_norm_kernel", "elementwise, norms, gathers"),
    ("triton_poi_fused_gelu_1", "elementwise, norms, gathers")])
def test_groups_of_kernels(kernel, group):
    assert gpu.group_of(kernel) == group


def test_every_kernel_of_ours_has_its_group():
    names = [name for file in (BENCHMARKS.parent / "kernels").glob("*.py") for name in re.findall(
        r"@triton\.jit\ndef (\w+_kernel)", file.read_text())]
    assert len(names) >= 6 and {gpu.group_of(name) for name in names} == {"attention", "losses over prototypes"}


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_gpu_pipeline(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "Ours", lambda args, _: steps.Ours(args, "cpu"))
    args, pack = pretrain.get_args(TINY), steps.Canvases(40, 24, tmp_path)
    assert pack.canvases.std() > 50
    row = gpu.pipeline(args, pack, 0, False, "cpu", steps=6, warmup=2)
    fake_gpu("", [row])
    assert row["images/s"] > 0 and row["crops ms"] > 0


def test_a_part_that_fails_says_so_and_costs_nothing_else(tmp_path, monkeypatch):
    args = SimpleNamespace(output=str(tmp_path / "gpu"), commit="abc")
    record.write_part(args.output, "x", "a", dict(title="kept", machine="m", command="c", minutes=1, tables=[]))
    script = tmp_path / "fails.py"
    script.write_text("import sys; sys.exit('no such card')")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert "no such card" in gpu.start(args, "b")
    found = record.read_results(args.output)
    assert found["a"]["title"] == "kept" and found["b"]["tables"][-1][1] == [{"why": "exit status 1: no such card"}]
    assert "commit abc" in found["b"]["machine"]


def test_cpu_children_and_rounding(monkeypatch, tiny_args):
    report = Report()
    cpu.part_logits(report, rows=64, K=300, d=8)
    row = report.tables[0][1][0]
    assert float(row["bfloat16: target moved"][:-2]) > float(row["float16: target moved"][:-2]) > 0
    peaks = [cpu.loss_child(kind, 64, 128, 8) for kind in ("inputs", "ours", "plain")]
    assert peaks == sorted(peaks)  # of one process: it only grows
    assert cpu.goal("x", 1.0, 0.9)["result"] == "met" and cpu.goal("x", 1.0, 1.1)["result"] == "missed"
    monkeypatch.setattr(cpu, "child", lambda *words: 100.0 if {"batch", "inputs"} & set(words) else 150.0)
    monkeypatch.setattr(cpu, "SIZES", {"tiny": (("vit_micro", 8, {}), 2, ("plain", "plain compiled"))})
    monkeypatch.setattr(cpu, "VARIANTS", {"ours": {}, "ours --checkpoint_activations": dict(checkpointing=True)})
    monkeypatch.setattr(cpu, "arguments", lambda *_, **__: tiny_args)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    cpu.part_steps(report)
    rows = report.tables[1][1]
    assert [row["by"] for row in rows] == ["ours", "ours --checkpoint_activations", "plain", "plain compiled"]
    assert rows[2]["times plain's"] == 1 and rows[0]["memory of plain's"] == 1
    cpu.part_memory(report)
    assert report.tables[-1][1][0]["result"] == "missed"


def test_checkpoint_rows(tmp_path, tiny_args):
    ours = steps.Ours(tiny_args, "cpu")
    torch.save({"teacher": ours.teacher.state_dict(), "config": CONFIG, "mean": 0.2, "std": 0.2}, tmp_path / "last.pt")
    (what, features, prototypes), _ = cpu.checkpoint_rows(tmp_path / "last.pt", 6)
    assert what == "x_norm_clstoken, last.pt" and features.shape == (6, 8) and prototypes.shape == (32, 8)
