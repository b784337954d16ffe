"""Attention of all crop sizes on one packed qkv matrix, without moving a token.

    O = softmax(Q K^T / sqrt(D)) V        within each image, every token sees every token

in    qkv (T, 3C)  the output of the qkv linear layer, columns [3, H, D]: C query columns, C key, C value, each
                   head by head. float16, bfloat16 or float32; rows may lie further apart than 3C.
      shapes       [(B, N), ...], one per crop size; T = sum of B * N. Rows: group by group, image by image.
      rope         rotary positions (DINOv3): None, or per crop size None or (cos, sin), float32 (N, D/2). Token n's
                   query and key turn: their halves x1, x2 become x1 cos - x2 sin, x2 cos + x1 sin (a product of two
                   then depends on the difference of their angles). Tokens without a place have cos 1, sin 0.
out   (T, C)       same rows, same dtype.

Forward (FlashAttention-2, arXiv 2307.08691, algorithm 1): a program holds BLOCK_M queries of one head of one
image and walks over its keys, keeping each row's running maximum m and sum l. Rows meet a new maximum by scaling
what they have by exp(m_old - m_new). Scores never leave the chip.

Saved for backward: qkv, O and lse (H, T) float32, the log-sum-exp of each row of scores (in base 2: the GPU's
own exponential is exp2, so log2(e) is folded into the score scale).

Backward (algorithm 2), with P = exp(S - lse) recomputed and delta = rowsum(dO * O):
    dV = P^T dO      dP = dO V^T      dS = P * (dP - delta) / sqrt(D)      dQ = dS K      dK = dS^T Q
One kernel owns rows of dQ and walks over keys, one owns rows of dK and dV and walks over queries: each number is
written once, by one program, so no atomics, and two runs agree bit by bit. With rope, Q and K here are the turned
ones; a turn's transpose is the turn back, so dQ and dK turn by minus the angle before they are written.

Bytes, for T tokens of width C in b bytes: forward reads 3TCb and writes TCb, whatever N is. Plain torch also
writes and reads the scores and the probabilities (4THN b for N keys; at N = 201, D = 64 that is 3 times the bytes
of q, k, v and O together) and permutes q, k, v and O into new memory. A slice per group would cost its backward a
zero-filled gradient of the whole qkv per group; here (and in the reference, by `split`) there is one gradient.
Rope adds its tables, 4ND bytes that all images and heads share; turning q and k apart from attention would read and
write 4TCb more, forward and again backward.
"""
import torch
from torch.autograd.function import once_differentiable

from .common import LOG2E, at_least_float32, check_matrix, launch, takes_kernel, tl, triton


def tiles(kernel, dtype, D, N, rope):
    """BLOCK_M rows a program owns, BLOCK_N rows a step of its walk."""
    # Chosen by compiling (Triton 3.7) for compute capability 8.0 to 12.0: nothing spills, and 99 KB of shared memory
    # suffice. Half precision, on tensor cores: 16 rows a warp. More rows share each key read from L2; but 64 rows hold
    # a whole local crop, the backward's gradients fill the registers, and turned tiles pass through registers, so they
    # cannot be fetched ahead (num_stages). float32 stays off tensor cores ("ieee": as exact as the reference), is
    # slow, and has room for smaller tiles.
    if dtype == torch.float32:
        tile = 16 if D == 128 and kernel is not attention_bwd_dkdv_kernel else 32, 16, 4 if D == 64 else 8, 1
    elif D == 128:
        tile = 128, 16, 8, 1
    elif kernel is not attention_fwd_kernel:
        tile = 64, 32, 4, 1 if rope else 3
    elif N <= 64:  # a local crop: one block of queries, one step
        tile = 64, 64, 4, 1 if rope else 2
    else:  # steps of 32 pad 201 keys to 224, not 256
        tile = 128, 32, 8, 1 if rope else 3
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile))


def turn(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def attention_ref(qkv, shapes, num_heads, rope=None):
    # The explicit formula: on a CPU it beats F.scaled_dot_product_attention at 17 and 41 tokens and equals it at 201.
    C = qkv.shape[1] // 3
    groups = at_least_float32(qkv).split([B * N for B, N in shapes])
    outs = []
    with torch.autocast(qkv.device.type, enabled=False):  # it would round the products to half precision
        for (B, N), x, tables in zip(shapes, groups, rope or [None] * len(shapes)):
            q, k, v = x.view(B, N, 3, num_heads, C // num_heads).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
            if tables is not None:
                q, k = turn(q, *tables), turn(k, *tables)
            p = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)              # (B, H, N, N)
            outs.append((p @ v).transpose(1, 2).reshape(B * N, C))                       # (B*N, C)
    return torch.cat(outs).to(qkv.dtype)


@triton.jit
def place(first, N, H, BLOCK: tl.constexpr):
    # Programs are numbered block by block, head by head, image by image, so that neighbours share keys in L2.
    pid, blocks = tl.program_id(0), tl.cdiv(N, BLOCK)
    rows = pid % blocks * BLOCK + tl.arange(0, BLOCK)           # [BLOCK], within the image
    head = pid // blocks % H
    image_start = first + (pid // blocks // H).to(tl.int64) * N  # 64-bit: T * 3C passes 2^31
    return rows, head, image_start


@triton.jit
def load_turned(x_ptr, rows, N, cos_ptr, sin_ptr, D: tl.constexpr, ROPE: tl.constexpr):
    """Queries or keys at x_ptr [BLOCK, D], 0 where absent; with ROPE each row turned to its token's place."""
    x = tl.load(x_ptr, mask=rows[:, None] < N, other=0.0)
    if ROPE:
        # The other half is read again, from cache: to swap halves on chip in every step costs more.
        column = tl.arange(0, D)[None, :]
        swapped = tl.load(x_ptr + tl.where(column < D // 2, D // 2, -(D // 2)), mask=rows[:, None] < N, other=0.0)
        angle = rows[:, None] * (D // 2) + column % (D // 2)
        cos = tl.load(cos_ptr + angle, mask=rows[:, None] < N, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=rows[:, None] < N, other=0.0) * tl.where(column < D // 2, -1.0, 1.0)
        x = (x.to(tl.float32) * cos + swapped.to(tl.float32) * sin).to(x.dtype)
    return x


@triton.jit
def store_turned_back(x_ptr, x, rows, N, cos_ptr, sin_ptr, D: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr):
    """x [BLOCK, D], the gradient of turned queries or keys, becomes that of the unturned: turned by minus the angle."""
    if ROPE:
        angle = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        cos = tl.load(cos_ptr + angle, mask=rows[:, None] < N)                      # [BLOCK, D/2]
        sin = tl.load(sin_ptr + angle, mask=rows[:, None] < N)
        x1, x2 = tl.split(x.reshape(BLOCK, 2, D // 2).permute(0, 2, 1))             # the halves, each [BLOCK, D/2]
        x = tl.join(x1 * cos + x2 * sin, x2 * cos - x1 * sin).permute(0, 2, 1).reshape(BLOCK, D)
    tl.store(x_ptr, x.to(x_ptr.dtype.element_ty), mask=rows[:, None] < N)


@triton.jit
def attention_fwd_kernel(qkv_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, first, stride, T, N, H, scale,
                         D: tl.constexpr, ROPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, head, image_start = place(first, N, H, BLOCK_M)
    C = H * D
    tokens = image_start + rows                                                     # [BLOCK_M]
    columns = head * D + tl.arange(0, D)[None, :]                                   # [1, D]
    q_ptr = qkv_ptr + tokens[:, None] * stride + columns
    q = load_turned(q_ptr, rows, N, cos_ptr, sin_ptr, D, ROPE)                      # [BLOCK_M, D]
    to_log2 = scale * LOG2E  # one multiply-add per score then prepares its exp2
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        kv_ptr = qkv_ptr + (image_start + keys)[:, None] * stride + columns
        k = load_turned(kv_ptr + C, keys, N, cos_ptr, sin_ptr, D, ROPE)             # [BLOCK_N, D]
        v = tl.load(kv_ptr + 2 * C, mask=keys[:, None] < N, other=0.0)              # 0 * p, not garbage * p
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                          # [BLOCK_M, BLOCK_N]
        s = tl.where(keys[None, :] < N, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * to_log2)
        p = tl.exp2(s * to_log2 - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)                                         # 0 in the first step
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tokens[:, None] * C + columns, out, mask=rows[:, None] < N)
    tl.store(lse_ptr + head * T + tokens, row_max + tl.log2(row_sum), mask=rows < N)


@triton.jit
def attention_bwd_dq_kernel(qkv_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, cos_ptr, sin_ptr,
                            first, stride, T, N, H, scale,
                            D: tl.constexpr, ROPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, head, image_start = place(first, N, H, BLOCK_M)
    C = H * D
    tokens = image_start + rows
    columns = head * D + tl.arange(0, D)[None, :]
    q_ptr = qkv_ptr + tokens[:, None] * stride + columns
    q = load_turned(q_ptr, rows, N, cos_ptr, sin_ptr, D, ROPE)                      # [BLOCK_M, D]
    out = tl.load(out_ptr + tokens[:, None] * C + columns, mask=rows[:, None] < N)
    dout = tl.load(dout_ptr + tokens[:, None] * C + columns, mask=rows[:, None] < N)
    lse = tl.load(lse_ptr + head * T + tokens, mask=rows < N)                       # [BLOCK_M]
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + tokens, delta, mask=rows < N)                   # the next kernel reads it
    to_log2 = scale * LOG2E
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        kv_ptr = qkv_ptr + (image_start + keys)[:, None] * stride + columns
        k = load_turned(kv_ptr + C, keys, N, cos_ptr, sin_ptr, D, ROPE)             # [BLOCK_N, D]
        v = tl.load(kv_ptr + 2 * C, mask=keys[:, None] < N, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                          # [BLOCK_M, BLOCK_N]
        # An absent key has s = 0, and exp2(0 - lse) overflows where all true scores are far below 0.
        s = tl.where(keys[None, :] < N, s, float("-inf"))
        p = tl.exp2(s * to_log2 - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq_ptr = dqkv_ptr + tokens[:, None] * (3 * C) + columns
    store_turned_back(dq_ptr, dq * scale, rows, N, cos_ptr, sin_ptr, D, BLOCK_M, ROPE)


@triton.jit
def attention_bwd_dkdv_kernel(qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, cos_ptr, sin_ptr,
                              first, stride, T, N, H, scale,
                              D: tl.constexpr, ROPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    keys, head, image_start = place(first, N, H, BLOCK_M)
    C = H * D
    tokens = image_start + keys
    columns = head * D + tl.arange(0, D)[None, :]
    kv_ptr = qkv_ptr + tokens[:, None] * stride + columns
    k = load_turned(kv_ptr + C, keys, N, cos_ptr, sin_ptr, D, ROPE)                 # [BLOCK_M, D]
    v = tl.load(kv_ptr + 2 * C, mask=keys[:, None] < N)
    to_log2 = scale * LOG2E
    dk = tl.zeros([BLOCK_M, D], tl.float32)
    dv = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        # An absent query has q = dO = lse = delta = 0: p = 1, and it adds 1 * dO = 0 to dV, 1 * (0 - 0) to dS.
        rows = start + tl.arange(0, BLOCK_N)
        queries = image_start + rows                                                # [BLOCK_N]
        q = load_turned(qkv_ptr + queries[:, None] * stride + columns, rows, N, cos_ptr, sin_ptr, D, ROPE)
        dout = tl.load(dout_ptr + queries[:, None] * C + columns, mask=rows[:, None] < N, other=0.0)
        lse = tl.load(lse_ptr + head * T + queries, mask=rows < N, other=0.0)
        delta = tl.load(delta_ptr + head * T + queries, mask=rows < N, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")                          # [BLOCK_M, BLOCK_N]: S^T
        p = tl.exp2(s * to_log2 - lse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dkv_ptr = dqkv_ptr + tokens[:, None] * (3 * C) + columns
    store_turned_back(dkv_ptr + C, dk * scale, keys, N, cos_ptr, sin_ptr, D, BLOCK_M, ROPE)
    tl.store(dkv_ptr + 2 * C, dv.to(dqkv_ptr.dtype.element_ty), mask=keys[:, None] < N)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, shapes, num_heads, rope):
        T, C = qkv.shape[0], qkv.shape[1] // 3
        out = qkv.new_empty(T, C)
        lse = qkv.new_empty(num_heads, T, dtype=torch.float32)
        launch_groups(attention_fwd_kernel, (qkv, out, lse), qkv, shapes, num_heads, rope)
        ctx.save_for_backward(qkv, out, lse)
        ctx.arguments = shapes, num_heads, rope
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        delta = torch.empty_like(lse)
        dqkv = qkv.new_empty(qkv.shape)
        launch_groups(attention_bwd_dq_kernel, (qkv, out, dout, lse, delta, dqkv), qkv, *ctx.arguments)
        launch_groups(attention_bwd_dkdv_kernel, (qkv, dout, lse, delta, dqkv), qkv, *ctx.arguments)
        return dqkv, None, None, None


def launch_groups(kernel, tensors, qkv, shapes, H, rope):
    """Launch the kernel on each group with tokens: one program per block of rows, head and image."""
    T, D = qkv.shape[0], qkv.shape[1] // (3 * H)
    first = 0
    for (B, N), tables in zip(shapes, rope or [None] * len(shapes)):
        constants = tiles(kernel, qkv.dtype, D, N, tables is not None)
        cos, sin = tables or (qkv, qkv)  # without rope never read
        if B * N:
            grid = (triton.cdiv(N, constants["BLOCK_M"]) * H * B,)
            launch(kernel, grid, *tensors, cos, sin, first, qkv.stride(0), T, N, H, D ** -0.5, D=D,
                   ROPE=tables is not None, **constants)
        first += B * N


def attention(qkv, shapes, num_heads, rope=None):
    """Packed (T, 3C) queries, keys and values of all crops in, packed (T, C) outputs out; shapes = [(B, N), ...]."""
    T, width = qkv.shape
    D = width // (3 * num_heads)
    if T != sum(B * N for B, N in shapes) or width % (3 * num_heads):
        raise ValueError(f"qkv {tuple(qkv.shape)} is not 3 * {num_heads} heads wide with one row per token of {shapes}")
    if rope is not None and (len(rope) != len(shapes) or not all(
            x.shape == (N, D // 2) and x.dtype == torch.float32 and x.device == qkv.device and x.is_contiguous()
            for (_, N), tables in zip(shapes, rope) if tables is not None for x in tables)):
        raise ValueError(f"rope must hold, for each of {shapes}, None or (cos, sin): contiguous float32 tensors "
                         f"(N, {D // 2}) on {qkv.device}")
    if not takes_kernel(qkv):
        return attention_ref(qkv, shapes, num_heads, rope)
    check_matrix("qkv", qkv)
    if D not in (32, 64, 128):
        raise ValueError(f"the attention kernel knows head dims 32, 64 and 128, not {D}: choose num_heads to match, or "
                         "pass --reference_ops")
    return Attention.apply(qkv, shapes, num_heads, rope)
