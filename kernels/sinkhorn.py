"""Teacher targets by Sinkhorn-Knopp over the rows of all ranks, kept as two vectors.

    p[i, k] = exp(x[i, k] / T - a[k] - r[i])

Every prototype k gets the same total weight, then every row i sums to 1, in turn, n_iterations times:
    a[k] = logsumexp_i(x[i, k] / T - r[i])      all rows of all ranks; r = 0 at first
    r[i] = logsumexp_k(x[i, k] / T - a[k])
DINOv2 scales a whole matrix Q = exp(x / T) by its total, by rows and by columns; the totals cancel, so that
n_iterations of the pair above give the same p.

in    logits: chunks (rows, K) float16, bfloat16 or float32 that can be gone through again and again; rows may be 0
      here and not elsewhere; valid (rows,) bool: padding is no row; temp T: a number
out   a (K,) equal on all ranks, r (rows,) float32 (the reference keeps float64), +inf at padding: p = 0 there.
      Targets have no gradient.

A row's new r and its part of the next a need the same logits: a chunk is computed (or read) n_iterations + 1 times.
Bytes, for n logits of b bytes and 3 iterations: 6nb read, vectors written. Normalising a float32 matrix in plain
torch, as DINOv2 does: 23 passes of 4n read, 16 written.
Source: Sinkhorn-Knopp in SwAV (arXiv 2006.09882, section 3.1) as DINOv2 (arXiv 2304.07193) uses it.
"""
import torch

from .common import LN2, LOG2E, all_reduce, at_least_float32, check_matrix, launch, slices, takes_kernel, tl, triton
from .softmax_center import LOWEST, online_logsumexp, row_logsumexp

# A program is one warp, whose lanes own 8 columns each and meet SPLIT rows, ROWS at a time: nothing is exchanged
# between lanes. 4,000 x 65,536 logits make 16 x 256 programs, and their partial results are 1/128 of the bytes.
SPLIT, ROWS, BLOCK_K = 256, 8, 256


def column_logsumexp_ref(x, r, temp):
    return torch.stack([(at_least_float32(x[some]) / temp - r[some, None]).logsumexp(0) for some in slices(x)])


@triton.jit
def column_logsumexp_kernel(x_ptr, stride, r_ptr, partial_ptr, rows, K, inv_temp,
                            SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * SPLIT
    high = tl.full([BLOCK_K], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(first, tl.minimum(first + SPLIT, rows), ROWS):
        i = (start + tl.arange(0, ROWS)).to(tl.int64)  # 64-bit: rows * K passes 2^31
        mask = (i[:, None] < rows) & (cols[None, :] < K)
        x = tl.load(x_ptr + i[:, None] * stride + cols[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        r = tl.load(r_ptr + i, mask=i < rows, other=0.0)  # +inf at padding: y = -inf, nothing is added
        high, total = online_logsumexp(high, total, (x * inv_temp - r[:, None]) * LOG2E, 0)  # of [ROWS, BLOCK_K]
    tl.store(partial_ptr + tl.program_id(1) * K + cols, (high + tl.log2(total)) * LN2, mask=cols < K)


def column_logsumexp(x, r, temp):
    """logsumexp_i(x / temp - r) of some rows: (rows, K), (rows,) -> parts (P, K), whose logsumexp over P it is."""
    if not takes_kernel(x):
        return column_logsumexp_ref(x, r, temp)
    check_matrix("logits", x)
    rows, K = x.shape
    splits = triton.cdiv(rows, SPLIT)
    # Parts instead of atomic adds: the order of summation is fixed, so two runs agree bit by bit.
    partial = x.new_empty(splits, K, dtype=torch.float32)
    if rows:
        launch(column_logsumexp_kernel, (triton.cdiv(K, BLOCK_K), splits), x, x.stride(0), r, partial, rows, K,
               1 / temp, SPLIT=SPLIT, ROWS=ROWS, BLOCK_K=BLOCK_K, num_warps=1)
    return partial


def logsumexp_over_ranks(parts):
    """logsumexp over P and over ranks: (P, K), P may be 0 -> (K,) equal on all ranks, 0 where nobody has a row."""
    parts = torch.cat((parts, parts.new_full((1, parts.shape[1]), float("-inf"))))
    high = all_reduce(parts.amax(0), "max")
    high = torch.where(high.isneginf(), 0.0, high)
    total = all_reduce((parts - high).exp().sum(0))
    return torch.where(total > 0, high + total.log(), 0.0)


def with_row_sums(chunks, a, temp, valid):
    """Each chunk of logits and its r (rows,): 0 before there is an a, +inf at padding."""
    first = 0
    for x in chunks:
        if a is None:
            r = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        else:
            r = row_logsumexp(x, a, temp)
        if valid is not None:
            r = r.masked_fill(~valid[first:first + len(x)], float("inf"))
        first += len(x)
        yield x, r


@torch.no_grad()
def sinkhorn(chunks, temp, n_iterations=3, valid=None):
    """The two vectors (a, r) of the Sinkhorn-Knopp targets; the logits come in chunks of rows, anew for each pass."""
    a = None
    for _ in range(n_iterations):
        parts = [column_logsumexp(x, r, temp) for x, r in with_row_sums(chunks, a, temp, valid)]
        a = logsumexp_over_ranks(torch.cat(parts))
    return a, torch.cat([r for _, r in with_row_sums(chunks, a, temp, valid)])
