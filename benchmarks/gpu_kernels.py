"""Parts a, b and c of gpu.py: what the card can do, whether the kernels are right on it, how fast each one is."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
import plain
from timing import divided, first_line, free, goal, in_turn, peak_bytes

STUDENT_TEMP, TEMP = 0.1, 0.07
HALF = (torch.float16, torch.bfloat16)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cuDNN": SDPBackend.CUDNN_ATTENTION}
PAIRS = [[1, -1], [0, -1]] + 8 * [[0, 1]]  # 2 global and 8 local crops, each with its teacher rows
ONE = [[0, -1]]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- a: ceilings

def ceilings(device, copy_bytes=2 ** 32, sides=(4096, 8192, 16384), repeats=10):
    """Bytes per second of a copy (read and written) and bf16 FLOP/s of the best square product of random numbers."""
    x = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = in_turn({"copy": lambda: y.copy_(x)}, device, repeats, flush=False)["copy"]
    del x, y
    products, flops = {}, {}
    for side in sides:
        a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
        products[f"bf16 matmul {side}"] = lambda a=a, b=b: a @ b
        flops[f"bf16 matmul {side}"] = 2 * side ** 3
    times = in_turn(products, device, repeats, flush=False)
    rates = {name: flops[name] / times[name] * 1000 for name in products}
    return dict(copy=2 * copy_bytes / copy * 1000, matmul=max(rates.values()), rates=rates)


def part_a(report, device="cuda", **sizes):
    found = ceilings(device, **sizes)
    rows = [{"what": "copy, bytes read and written", "rate": f"{found['copy'] / 1e12:.2f} TB/s"}]
    rows += [{"what": name, "rate": f"{rate / 1e12:.0f} TFLOP/s"} for name, rate in found["rates"].items()]
    report("Ceilings of this card: every share below is of the copy or of the best product.", rows)


# ---------------------------------------------------------------- b: correctness

def with_gradient(op, x, dout):
    x = x.detach().requires_grad_()
    out = op(x)
    return out.detach(), torch.autograd.grad(out, x, dout)[0]


def reference(call, *inputs):
    """A call with the plain-torch formulas on float64 copies of its inputs."""
    kernels.use_reference(True)
    try:
        return call(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs))
    finally:
        kernels.use_reference(False)


def compared(kernel, case, dtype, tolerance, pairs):
    """One row: the worst of several tensors (name: (got, want)); NaN fails."""
    rms, peak = {}, {}
    for name, (got, want) in pairs.items():
        want = want.detach().double()
        error = got.detach().double() - want
        rms[name] = (error.norm() / want.norm().clamp(min=1e-30)).item()
        peak[name] = (error.abs().max() / want.abs().max().clamp(min=1e-30)).item()
    worst = max(rms, key=lambda name: rms[name] if rms[name] == rms[name] else float("inf"))
    return {"kernel": kernel, "case": case, "dtype": name_of(dtype), "relative RMS": f"{rms[worst]:.1e} ({worst})",
            "max / largest": f"{max(peak.values()):.1e}", "tolerance": f"{tolerance:.0e}",
            "passed": all(error <= tolerance for error in rms.values())}


def attention_row(shapes, H, D, dtype, device, rope=None, extreme=0):
    T, tolerance = sum(B * N for B, N in shapes), {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    qkv, dout = torch.randn(T, 3 * H * D, device=device), torch.randn(T, H * D, device=device).to(dtype)
    case = " + ".join(f"{B} x {N}" for B, N in shapes) + f", {H} heads of {D}" + (", rope" if rope else "")
    if extreme:  # every score lies near `extreme`: exponentials overflow unless the row's maximum is taken out
        direction = torch.randn(H * D, device=device)
        qkv[:, :H * D] = direction * (1 + 0.01 * torch.randn(T, 1, device=device))
        norm = direction.view(H, D).square().sum(1).repeat_interleave(D)
        qkv[:, H * D:2 * H * D] = direction * extreme * D ** 0.5 / norm + 0.5 * torch.randn(T, H * D, device=device)
        case = f"{case}, scores near {extreme:,}"
    qkv = qkv.to(dtype)
    got = with_gradient(lambda x: kernels.attention(x, shapes, H, rope), qkv, dout)
    want = reference(lambda x, d: with_gradient(lambda y: kernels.attention(y, shapes, H, rope), x, d), qkv, dout)
    parts = dict(zip(("dq", "dk", "dv"), zip(got[1].chunk(3, 1), want[1].chunk(3, 1))))
    if extreme:
        parts = {"dv": parts["dv"]}  # dq and dk are small differences of large numbers
    return compared("attention", case, dtype, tolerance, {"out": (got[0], want[0]), **parts})


def rotary(shapes, D, device, prefix=5):
    """Cosines and sines of random angles for each crop size; class token and registers have none."""
    angles = [torch.rand(N, D // 2, device=device) * 6 for _, N in shapes]
    for angle in angles:
        angle[:prefix] = 0
    return [(angle.cos(), angle.sin()) for angle in angles]


def probabilities(x, a, r, temp):
    return (x.double() / temp - a.double() - r.double()[:, None]).exp()


def target_row(kernel, rows, K, dtype, device):
    """The probabilities that the two vectors describe; of extreme logits, the vector itself."""
    name, _, extreme = kernel.partition(",")
    x, center = torch.randn(rows, K, device=device) * 0.1, torch.randn(K, device=device) * 0.1
    x = (x.sign() * 3e4 if extreme else x).to(dtype)

    def call(x, center):
        return kernels.sinkhorn([x], TEMP) if name == "sinkhorn" else kernels.softmax_center([x], center, TEMP)

    got, want = call(x, center), reference(call, x, center)
    pairs = {"r": (got[1], want[1])} if extreme else {
        "p": (probabilities(x, *got, TEMP), probabilities(x, *want, TEMP))}
    return compared(name, f"{rows:,} x {K:,}{extreme and ','}{extreme}", dtype, 1e-4, pairs)


def loss_inputs(items, rows_of, K, dtype, device, scale=0.1):
    S, M = len(rows_of), max(max(pair) for pair in rows_of) + 1
    s, x = ((torch.randn(items * n, K, device=device) * scale).to(dtype) for n in (S, M))
    a, r = reference(lambda x, c: kernels.softmax_center([x], c, TEMP), x, torch.zeros(K, device=device))
    return s, x, a.float(), r.float(), torch.tensor(rows_of, device=device), torch.rand(items * S, device=device)


def cross_entropy_row(items, rows_of, K, dtype, device, scale=0.1):
    inputs = loss_inputs(items, rows_of, K, dtype, device, scale)
    want = reference(lambda *x: kernels.cross_entropy(*x, STUDENT_TEMP, TEMP), *inputs)  # of copies: s is written over
    got = kernels.cross_entropy(*inputs, STUDENT_TEMP, TEMP)
    case = f"{items * len(rows_of):,} x {K:,}, {len(rows_of)} rows an item, logits of size {scale:g}"
    # p of huge logits is exp of a small difference of numbers that float32 holds to 0.01
    tolerance = 4e-3 if scale < 1 else 5e-2
    return compared("cross_entropy", case, dtype, tolerance, dict(zip(("loss", "gradient"), zip(got, want))))


def unit(*shape, device):
    return F.normalize(torch.randn(*shape, device=device), dim=-1)


def centered(f_t, W_t, center, dtype):
    """The two vectors of the targets of teacher rows (items, M, d); logits that were kept are gone afterwards."""
    a, r = kernels.softmax_center(kernels.LogitChunks(f_t.flatten(0, 1), W_t, dtype, passes=1), center, TEMP)
    return a, r.view(f_t.shape[:2])


def whole_loss(f, W, f_t, W_t, center, rows_of, weight, dtype):
    """Targets by centering, loss and both gradients, as pretrain.py calls them."""
    vectors = centered(f_t, W_t, center, dtype)
    loss, _ = kernels.prototype_loss(f, W, f_t, W_t, *vectors, rows_of, weight, STUDENT_TEMP, TEMP, dtype)
    return loss, *torch.autograd.grad(loss, (f, W))


def prototype_row(items, rows_of, K, d, device):
    S, M = len(rows_of), max(max(pair) for pair in rows_of) + 1
    tensors = [unit(*shape, device=device) for shape in ((items, S, d), (K, d), (items, M, d), (K, d))]
    more = torch.zeros(K, device=device), torch.tensor(rows_of, device=device), torch.rand(items, S, device=device)

    def call(dtype, f, W, *rest):
        return whole_loss(f.requires_grad_(), W.requires_grad_(), *rest, dtype)

    got = call(torch.bfloat16, *(x.clone() for x in tensors), *more)
    want = reference(lambda *x: call(torch.float64, *x), *tensors, *more)
    return compared("prototype_loss", f"{items * S:,} x {K:,}, {S} rows an item, d {d}: float16 logits of unit vectors",
                    torch.bfloat16, 3e-2, dict(zip(("loss", "df", "dW"), zip(got, want))))


def cases(device, K=65536, rows=512, images=16, tokens=(41, 201, 261), proto_rows=4133):
    """(what makes a row, its arguments) for every kernel."""
    mixed = [(images, tokens[1]), (4 * images, tokens[0])]
    for dtype in HALF:
        for N in tokens:
            yield attention_row, ([(images, N)], 12, 64, dtype, device)
        for H, D in ((4, 32), (6, 64), (2, 128)):
            yield attention_row, (mixed, H, D, dtype, device)
        for H, D in ((4, 32), (6, 64), (2, 128)):
            yield attention_row, (mixed, H, D, dtype, device, rotary(mixed, D, device))
        for extreme in (-1000, 1000):
            yield attention_row, (mixed, 2, 64, dtype, device, None, extreme)
        for size in ((rows, K), (rows // 13, K // 13)):
            for kernel in ("softmax_center", "sinkhorn", "softmax_center, logits ±30,000"):
                yield target_row, (kernel, *size, dtype, device)
            for rows_of in (PAIRS, ONE):
                yield cross_entropy_row, (size[0] // len(rows_of), rows_of, size[1], dtype, device)
        yield cross_entropy_row, (rows // 10, PAIRS, K, dtype, device, 1e4)
    for rows_of in (PAIRS, ONE):
        yield prototype_row, (proto_rows // len(rows_of), rows_of, K, 256, device)


def correctness(device, **sizes):
    """A row per case; one that raises is a row that failed."""
    for make, given in cases(device, **sizes):
        try:
            yield make(*given)
        except Exception as error:
            yield {"kernel": make.__name__.removesuffix("_row"), "case": first_line(error), "passed": False}
        free()


def agree_twice(device, K=65536, rows=300):
    """Every kernel twice on the same inputs: equal bit by bit."""
    shapes, inputs = [(4, 201), (9, 41)], loss_inputs(rows // 10, PAIRS, K, torch.bfloat16, device)
    qkv, dout = (torch.randn(4 * 201 + 9 * 41, n * 384, device=device).bfloat16() for n in (3, 1))
    calls = {"attention": lambda: with_gradient(lambda x: kernels.attention(x, shapes, 6), qkv, dout),
             "softmax_center": lambda: kernels.softmax_center([inputs[1]], inputs[2], TEMP),
             "sinkhorn": lambda: kernels.sinkhorn([inputs[1]], TEMP),
             "cross_entropy": lambda: kernels.cross_entropy(inputs[0].clone(), *inputs[1:], STUDENT_TEMP, TEMP)}
    for name, call in calls.items():
        one, two = ([x.clone() for x in call()] for _ in range(2))
        yield {"kernel": name, "two runs are bit-equal": all(torch.equal(x, y) for x, y in zip(one, two))}


def touch(device="cuda"):
    """Each kernel on small inputs and nothing else, for compute-sanitizer to watch."""
    for dtype in HALF:
        shapes = [(2, 41), (1, 201)]
        for H, D in ((2, 32), (2, 64), (1, 128)):
            qkv, dout = (torch.randn(2 * 41 + 201, n * H * D, device=device).to(dtype) for n in (3, 1))
            for rope in (None, rotary(shapes, D, device)):
                with_gradient(lambda x: kernels.attention(x, shapes, H, rope), qkv, dout)
        for K, items in ((5000, 3), (8192, 30)):
            s, x, *vectors = loss_inputs(items, PAIRS, K, dtype, device)
            kernels.softmax_center([x], vectors[0], TEMP)
            kernels.sinkhorn([x], TEMP)
            kernels.cross_entropy(s, x, *vectors, STUDENT_TEMP, TEMP)
    if device == "cuda":
        torch.cuda.synchronize()


def sanitized():
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for check in ("memcheck", "racecheck"):
        if tool is None:
            yield {"compute-sanitizer": check, "result": "not run: the tool is not installed here"}
            continue
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable,
                   str(Path(__file__).with_name("gpu.py")), "--worker", "touch"]
        try:
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=150,
                                  env=dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
            summary = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
            result = f"{'passed' if done.returncode == 0 else f'exit status {done.returncode}'}: {' '.join(summary)}"
        except (subprocess.TimeoutExpired, OSError) as error:
            result = f"not finished: {first_line(error)}"
        yield {"compute-sanitizer": check, "result": result}


def part_b(report, device="cuda", **sizes):
    torch.manual_seed(0)
    rows = list(correctness(device, **sizes))
    report("Each kernel against its plain-torch formula in float64, on fresh random inputs: relative RMS error of the "
           f"worst tensor, largest error over the largest number. {sum(row['passed'] for row in rows)} of {len(rows)} "
           "passed. Half precision rounds outputs, attention's probabilities and the gradients of logits; "
           "prototype_loss also rounds the logits themselves.", rows)
    report("Order of summation.", list(agree_twice(device)))
    if device == "cuda":
        report("Out-of-bounds and race checks on small inputs of every kernel.", list(sanitized()))


# ---------------------------------------------------------------- c: speed

def sdpa(qkv, shapes, H, backend):
    """What a ViT does around scaled_dot_product_attention: out of one qkv matrix, into one (tokens, C) matrix."""
    outs = []
    for (B, N), x in zip(shapes, qkv.split([B * N for B, N in shapes])):
        q, k, v = x.view(B, N, 3, H, -1).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(backend):
            outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * N, -1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def apart(qkv, dout, B, N, H, backend):
    """The same on q, k and v that are there already, with three gradients: what a ViT cannot have, SDPA at its best."""
    q, k, v = (x.contiguous().view(B, N, H, -1).transpose(1, 2).requires_grad_() for x in qkv.detach().chunk(3, 1))
    dout = dout.view(B, N, H, -1).transpose(1, 2)

    def forward():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)
    return forward, lambda: torch.autograd.grad(forward(), (q, k, v), dout)


def without_gradient(call):
    with torch.no_grad():
        return call()


def attention_speed(shapes, H, D, device, ceiling, **how):
    T = sum(B * N for B, N in shapes)
    qkv = torch.randn(T, 3 * H * D, device=device).bfloat16().requires_grad_()
    dout = torch.randn(T, H * D, device=device).bfloat16()
    ops = {"kernel": lambda: kernels.attention(qkv, shapes, H)}
    ops.update({f"SDPA {name}": lambda backend=backend: sdpa(qkv, shapes, H, backend)
                for name, backend in BACKENDS.items()})
    forward = {name: lambda op=op: without_gradient(op) for name, op in ops.items()}
    both = {name: lambda op=op: torch.autograd.grad(op(), qkv, dout) for name, op in ops.items()}
    if len(shapes) == 1:
        for name, backend in BACKENDS.items():
            name, (one, two) = f"SDPA {name}, q k v apart", apart(qkv, dout, *shapes[0], H, backend)
            forward[name], both[name] = lambda op=one: without_gradient(op), two
    times, whole = in_turn(forward, device, **how), in_turn(both, device, **how)
    flops, size = 14 * sum(B * N * N for B, N in shapes) * H * D, T * H * D * qkv.element_size()
    for name in both:
        seconds = divided(whole[name], 1000)
        yield {"images x tokens, heads": " + ".join(f"{B} x {N}" for B, N in shapes) + f", {H}", "by": name,
               "forward ms": times[name], "forward + backward ms": whole[name],
               "TFLOP/s": divided(flops / 1e12, seconds), "of matmul": share(flops, seconds, ceiling["matmul"]),
               "of copy": share(12 * size, seconds, ceiling["copy"]),
               "times ours": divided(whole[name], whole["kernel"])}


def share(amount, seconds, ceiling):
    return f"{100 * amount / seconds / ceiling:.0f} %" if seconds else None


def loss_rows(what, calls, needed_bytes, device, ceiling, **how):
    """calls: {name: call or (call, prepare)}, ours first; needed_bytes: what ours has to move, or None."""
    times = in_turn(calls, device, **how)
    ours = next(iter(times.values()))
    for name, call in calls.items():
        call, prepare = call if isinstance(call, tuple) else (call, lambda: None)
        prepare()
        peak = peak_bytes(call) if device != "cpu" else None
        yield {"what": what, "by": name, "ms": times[name],
               "of copy": share(needed_bytes, divided(times[name], 1000), ceiling["copy"]) if needed_bytes else None,
               "peak MB": divided(peak, 1e6), "times ours": divided(times[name], ours)}
        free()


def autocast(function, device):
    """The function under bf16 autocast, and compiled as well."""
    def call(*args):
        with torch.autocast(device, torch.bfloat16):
            return function(*args)
    return {"eager": call, "compiled": torch.compile(call, dynamic=False)}


def target_speed(rows, K, device, ceiling, **how):
    x, center = (torch.randn(rows, K, device=device) * 0.1).half(), torch.zeros(K, device=device)
    size, b = f"{rows:,} x {K:,}", rows * K * 2
    softmaxed = autocast(lambda x: plain.centered_targets(x, center, TEMP), device)
    balanced = autocast(lambda x: plain.sinkhorn_targets(x, TEMP), device)
    for what, ours, theirs, needed in (
            (f"softmax_center {size}", lambda: kernels.softmax_center([x], center, TEMP), softmaxed, b),
            (f"sinkhorn, 3 iterations, {size}", lambda: kernels.sinkhorn([x], TEMP), balanced, 6 * b)):
        calls = {"kernels": ours, **{name: lambda call=call: without_gradient(lambda: call(x))
                                     for name, call in theirs.items()}}
        yield from loss_rows(what, calls, needed, device, ceiling, **how)


def cross_entropy_speed(rows, K, device, ceiling, **how):
    first, x, a, r, rows_of, weight = loss_inputs(rows, ONE, K, torch.float16, device)
    s, center = first.clone(), torch.zeros(K, device=device)

    def ours():
        a, r = kernels.softmax_center([x], center, TEMP)
        return kernels.cross_entropy(s, x, a, r, rows_of, weight, STUDENT_TEMP, TEMP)

    leaf = first.clone().requires_grad_()
    losses = autocast(lambda s: plain.ibot_loss(s, plain.centered_targets(x, center, TEMP), weight, 1), device)
    theirs = {name: lambda call=call: torch.autograd.grad(call(leaf), leaf) for name, call in losses.items()}
    size = f"{rows:,} x {K:,}"
    alone = {"kernels": (lambda: kernels.cross_entropy(s, x, a, r, rows_of, weight, STUDENT_TEMP, TEMP),
                         lambda: s.copy_(first))}
    yield from loss_rows(f"cross_entropy and gradient, {size}", alone, 3 * rows * K * 2, device, ceiling, **how)
    yield from loss_rows(f"softmax_center, cross_entropy and gradient, {size}", {
        "kernels": (ours, lambda: s.copy_(first)), **theirs}, 4 * rows * K * 2, device, ceiling, **how)


def prototype_speed(items, rows_of, K, d, device, ceiling, **how):
    """Features and prototypes to loss and gradients of both, with targets by centering."""
    S, M = len(rows_of), max(max(pair) for pair in rows_of) + 1
    f, W, f_t, W_t = (unit(*shape, device=device) for shape in ((items, S, d), (K, d), (items, M, d), (K, d)))
    f.requires_grad_(), W.requires_grad_()
    pairs, weight, center = torch.tensor(rows_of, device=device), torch.rand(items, S, device=device), W.new_zeros(K)

    def unfused(f, W):
        with torch.no_grad():
            targets = [plain.centered_targets(F.linear(x, W_t), center, TEMP) for x in f_t.unbind(1)]
        logits = F.linear(f.transpose(0, 1), W)  # (S, items, K)
        if S == 1:
            return plain.ibot_loss(logits[0], targets[0], weight[:, 0], 1)
        same = plain.dino_loss([logits[:2].flatten(0, 1)], [torch.cat(targets[::-1])])
        return plain.dino_loss(logits[2:], targets) + same

    calls = {"kernels": lambda: whole_loss(f, W, f_t, W_t, center, pairs, weight, torch.bfloat16)}
    calls.update({name: lambda call=call: torch.autograd.grad(call(f, W), (f, W))
                  for name, call in autocast(unfused, device).items()})
    yield from loss_rows(f"prototype_loss, {items * S:,} student and {items * M:,} teacher rows x {K:,}", calls, None,
                         device, ceiling, **how)


def loss_goals(found):
    """Goals of one H200 at 4,000 x 65,536; found: {(what, by): a row of loss_rows}."""
    sinkhorn, entropy = found["sinkhorn", "kernels"], found["cross_entropy and gradient", "kernels"]
    ours, eager = (found["softmax_center", by] for by in ("kernels", "eager"))  # with targets, as the eager loss has
    yield goal("sinkhorn, ms", 0.9, sinkhorn["ms"])
    yield goal("sinkhorn, eager's time, of ours", 6, found["sinkhorn", "eager"]["times ours"], True)
    yield goal("cross_entropy and gradient, ms", 0.5, entropy["ms"])
    yield goal("targets, loss and gradient, eager's time, of ours", 4, eager["times ours"], True)
    yield goal("targets, loss and gradient, memory, of eager's", 1 / 3, divided(ours["peak MB"], eager["peak MB"]))


def part_c(report, device="cuda", K=65536, rows=4000, images=128, tokens=(41, 201, 261), d=256, repeats=20, **sizes):
    torch.manual_seed(0)
    ceiling, how, goals = ceilings(device, **sizes), dict(repeats=repeats), []
    for N in tokens:
        rows_found = list(attention_speed([(images, N)], 12, 64, device, ceiling, **how))
        report(f"Attention, bf16, {N} tokens: forward + backward. Times ours above 1: slower than the kernel. Of copy: "
               "of 12 matrices (tokens, C) moved.", rows_found)
        others = [row["times ours"] for row in rows_found[1:] if row["times ours"]]
        goals.append(goal(f"attention, {N} tokens, the best SDPA's time, of ours", 1, min(others, default=None), True))
        free()
    report("Attention, both crop sizes of a step of ViT-S/16.", list(attention_speed(
        [(2 * images, tokens[1]), (8 * images, tokens[0])], 6, 64, device, ceiling, **how)))
    free()
    found = {}
    for speed in (target_speed, cross_entropy_speed):
        rows_found = list(speed(rows, K, device, ceiling, **how))
        report("Losses: eager and compiled are DINOv2's, which write the targets. Of copy: of the bytes that the "
               "kernels need. Peak: beyond the inputs.", rows_found)
        found.update({(row["what"].split(",")[0], row["by"]): row for row in rows_found})
        free()
    goals += loss_goals(found)
    rows_found = [*prototype_speed(images, PAIRS, K, d, device, ceiling, **how),
                  *prototype_speed(2 * rows, ONE, K, d, device, ceiling, **how)]
    report("From features and prototypes to the loss and both gradients.", rows_found)
    report("Goals.", goals)
