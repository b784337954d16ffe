"""Attention of all crop sizes on one packed qkv matrix, without moving a token.

    O = softmax(Q K^T / sqrt(D)) V        within each image, every token sees every token

in    qkv (T, 3C)  the output of the qkv linear layer, columns [3, H, D]: C query columns, C key, C value, each
                   head by head. float16, bfloat16 or float32; rows may lie further apart than 3C.
      shapes       [(B, N), ...], one per crop size; T = sum of B * N. Rows: group by group, image by image.
out   (T, C)       same rows, same dtype.

Forward (FlashAttention-2, arXiv 2307.08691, algorithm 1): a program holds BLOCK_M queries of one head of one
image and walks over its keys, keeping each row's running maximum m and sum l. Rows meet a new maximum by scaling
what they have by exp(m_old - m_new). Scores never leave the chip.

Saved for backward: qkv, O and lse (H, T) float32, the log-sum-exp of each row of scores (in base 2: the GPU's
own exponential is exp2, so log2(e) is folded into the score scale).

Backward (algorithm 2), with P = exp(S - lse) recomputed and delta = rowsum(dO * O):
    dV = P^T dO      dP = dO V^T      dS = P * (dP - delta) / sqrt(D)      dQ = dS K      dK = dS^T Q
One kernel owns rows of dQ and walks over keys, one owns rows of dK and dV and walks over queries: each number is
written once, by one program, so no atomics, and two runs agree bit by bit.

Bytes, for T tokens of width C in b bytes: forward reads 3TCb and writes TCb, whatever N is. Plain torch also
writes and reads the scores and the probabilities (4THN b for N keys; at N = 201, D = 64 that is 3 times the bytes
of q, k, v and O together) and permutes q, k, v and O into new memory. A slice per group would cost its backward a
zero-filled gradient of the whole qkv per group; here (and in the reference, by `split`) there is one gradient.
"""
import torch
from torch.autograd.function import once_differentiable

from .common import at_least_float32, check_matrix, launch, takes_kernel, tl, triton


def tiles(dtype, D):
    # BLOCK_M rows a program owns, BLOCK_N rows a step of its walk: steps of 32 pad 201 tokens to 224 and 41 to 64.
    # Chosen by compiling for compute capability 8.0 to 12.0: nothing spills (but 8 bytes of float32, D = 128, on 8.0)
    # and 99 KB of shared memory suffice. Half precision runs on tensor cores; float32 stays off them ("ieee": as exact
    # as the reference), is slow, and has room for smaller tiles.
    if dtype == torch.float32:
        BLOCK_M, BLOCK_N, num_warps, num_stages = (32, 32, 8, 1) if D < 128 else (16, 16, 8, 1)
    else:
        BLOCK_M, BLOCK_N, num_warps, num_stages = (64, 32, 4, 3) if D < 128 else (64, 32, 8, 3)
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages)


def attention_ref(qkv, shapes, num_heads):
    # The explicit formula: on a CPU it beats F.scaled_dot_product_attention at 17 and 41 tokens and equals it at 201.
    C = qkv.shape[1] // 3
    outs = []
    with torch.autocast(qkv.device.type, enabled=False):  # it would round the products to half precision
        for (B, N), x in zip(shapes, at_least_float32(qkv).split([B * N for B, N in shapes])):
            q, k, v = x.view(B, N, 3, num_heads, C // num_heads).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
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
def attention_fwd_kernel(qkv_ptr, out_ptr, lse_ptr, first, stride, T, N, H, scale,
                         D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, head, image_start = place(first, N, H, BLOCK_M)
    C = H * D
    tokens = image_start + rows                                                     # [BLOCK_M]
    columns = head * D + tl.arange(0, D)[None, :]                                   # [1, D]
    q = tl.load(qkv_ptr + tokens[:, None] * stride + columns, mask=rows[:, None] < N)  # [BLOCK_M, D]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        kv_ptr = qkv_ptr + (image_start + keys)[:, None] * stride + columns
        k = tl.load(kv_ptr + C, mask=keys[:, None] < N)                             # [BLOCK_N, D]
        v = tl.load(kv_ptr + 2 * C, mask=keys[:, None] < N, other=0.0)              # 0 * p, not garbage * p
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        s = tl.where(keys[None, :] < N, s, float("-inf"))                           # [BLOCK_M, BLOCK_N]
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)                                         # 0 in the first step
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tokens[:, None] * C + columns, out, mask=rows[:, None] < N)
    tl.store(lse_ptr + head * T + tokens, row_max + tl.log2(row_sum), mask=rows < N)


@triton.jit
def attention_bwd_dq_kernel(qkv_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, first, stride, T, N, H, scale,
                            D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, head, image_start = place(first, N, H, BLOCK_M)
    C = H * D
    tokens = image_start + rows
    columns = head * D + tl.arange(0, D)[None, :]
    q = tl.load(qkv_ptr + tokens[:, None] * stride + columns, mask=rows[:, None] < N)  # [BLOCK_M, D]
    out = tl.load(out_ptr + tokens[:, None] * C + columns, mask=rows[:, None] < N)
    dout = tl.load(dout_ptr + tokens[:, None] * C + columns, mask=rows[:, None] < N)
    lse = tl.load(lse_ptr + head * T + tokens, mask=rows < N)                       # [BLOCK_M]
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + tokens, delta, mask=rows < N)                   # the next kernel reads it
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        kv_ptr = qkv_ptr + (image_start + keys)[:, None] * stride + columns
        k = tl.load(kv_ptr + C, mask=keys[:, None] < N, other=0.0)                  # [BLOCK_N, D]
        v = tl.load(kv_ptr + 2 * C, mask=keys[:, None] < N, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        # An absent key has s = 0, and exp2(0 - lse) overflows where all true scores are far below 0.
        p = tl.exp2(tl.where(keys[None, :] < N, s, float("-inf")) - lse[:, None])   # [BLOCK_M, BLOCK_N]
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq = (dq * scale).to(dqkv_ptr.dtype.element_ty)
    tl.store(dqkv_ptr + tokens[:, None] * (3 * C) + columns, dq, mask=rows[:, None] < N)


@triton.jit
def attention_bwd_dkdv_kernel(qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, first, stride, T, N, H, scale,
                              D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    keys, head, image_start = place(first, N, H, BLOCK_M)
    C = H * D
    tokens = image_start + keys
    columns = head * D + tl.arange(0, D)[None, :]
    kv_ptr = qkv_ptr + tokens[:, None] * stride + columns
    k = tl.load(kv_ptr + C, mask=keys[:, None] < N)                                 # [BLOCK_M, D]
    v = tl.load(kv_ptr + 2 * C, mask=keys[:, None] < N)
    dk = tl.zeros([BLOCK_M, D], tl.float32)
    dv = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        # An absent query has q = dO = lse = delta = 0: p = 1, and it adds 1 * dO = 0 to dV, 1 * (0 - 0) to dS.
        rows = start + tl.arange(0, BLOCK_N)
        queries = image_start + rows                                                # [BLOCK_N]
        q = tl.load(qkv_ptr + queries[:, None] * stride + columns, mask=rows[:, None] < N, other=0.0)
        dout = tl.load(dout_ptr + queries[:, None] * C + columns, mask=rows[:, None] < N, other=0.0)
        lse = tl.load(lse_ptr + head * T + queries, mask=rows < N, other=0.0)
        delta = tl.load(delta_ptr + head * T + queries, mask=rows < N, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)
        p = tl.exp2(s - lse[None, :])                                               # [BLOCK_M, BLOCK_N]: P^T
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dkv_ptr = dqkv_ptr + tokens[:, None] * (3 * C) + columns
    tl.store(dkv_ptr + C, (dk * scale).to(dqkv_ptr.dtype.element_ty), mask=keys[:, None] < N)
    tl.store(dkv_ptr + 2 * C, dv.to(dqkv_ptr.dtype.element_ty), mask=keys[:, None] < N)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, shapes, num_heads):
        T, C = qkv.shape[0], qkv.shape[1] // 3
        out = qkv.new_empty(T, C)
        lse = qkv.new_empty(num_heads, T, dtype=torch.float32)
        for grid, sizes, constants in launches(qkv, shapes, num_heads):
            launch(attention_fwd_kernel, grid, qkv, out, lse, *sizes, **constants)
        ctx.save_for_backward(qkv, out, lse)
        ctx.shapes, ctx.num_heads = shapes, num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        delta = torch.empty_like(lse)
        dqkv = qkv.new_empty(qkv.shape)
        for grid, sizes, constants in launches(qkv, ctx.shapes, ctx.num_heads):
            launch(attention_bwd_dq_kernel, grid, qkv, out, dout, lse, delta, dqkv, *sizes, **constants)
            launch(attention_bwd_dkdv_kernel, grid, qkv, dout, lse, delta, dqkv, *sizes, **constants)
        return dqkv, None, None


def launches(qkv, shapes, H):
    """What each group with tokens is launched with: one program per block of rows, head and image."""
    T, D = qkv.shape[0], qkv.shape[1] // (3 * H)
    constants = dict(D=D, **tiles(qkv.dtype, D))
    first = 0
    for B, N in shapes:
        if B * N:
            grid = (triton.cdiv(N, constants["BLOCK_M"]) * H * B,)
            yield grid, (first, qkv.stride(0), T, N, H, D ** -0.5), constants
        first += B * N


def attention(qkv, shapes, num_heads):
    """Packed (T, 3C) queries, keys and values of all crops in, packed (T, C) outputs out; shapes = [(B, N), ...]."""
    T, width = qkv.shape
    if T != sum(B * N for B, N in shapes) or width % (3 * num_heads):
        raise ValueError(f"qkv {tuple(qkv.shape)} is not 3 * {num_heads} heads wide with one row per token of {shapes}")
    if not takes_kernel(qkv):
        return attention_ref(qkv, shapes, num_heads)
    check_matrix("qkv", qkv)
    if width // (3 * num_heads) not in (32, 64, 128):
        raise ValueError(f"the attention kernel knows head dims 32, 64 and 128, not {width // (3 * num_heads)}: choose "
                         "num_heads to match, or pass --reference_ops")
    return Attention.apply(qkv, shapes, num_heads)
