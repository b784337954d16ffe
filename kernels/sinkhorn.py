"""Teacher targets by Sinkhorn-Knopp over the rows of all ranks, kept as two vectors.

    p[i, k] = exp(x[i, k] / T - a[k] - r[i])

Every prototype k gets the same total weight, then every row i sums to 1, in turn, n_iterations times:
    a[k] = logsumexp_i(x[i, k] / T - r[i])      all rows of all ranks; r = 0 at first
    r[i] = logsumexp_k(x[i, k] / T - a[k])
DINOv2 scales a whole matrix Q = exp(x / T) by its total, by rows and by columns; the totals cancel, so that
n_iterations of the pair above give the same p.

in    logits (rows, K) float16, bfloat16 or float32, rows may be 0 here and not elsewhere; temp T: a number
out   a (K,) equal on all ranks, r (rows,) float32 (the reference keeps float64). Targets have no gradient.

In practice a starts as the column's maximum and each update adds to it the log of
    s[k] = sum_i exp(x[i, k] / T - a[k] - r[i])      summed over ranks
so one exponential serves, and it cannot overflow: at first a is the maximum, later exp(...) is a p <= 1.
Nor can s vanish: s >= 1 at first. Later, before r was refreshed, each column summed to 1, with terms <= 1. So a
row summed to at most K, and dividing it by that sum leaves every column at least 1 / K.

Bytes, for n logits of b bytes and 3 iterations: 7nb read (the maximum, then a column and a row pass each), vectors
written. Normalising a float32 matrix in plain torch, as DINOv2 does: 23 passes of 4n read, 16 written.
Source: Sinkhorn-Knopp in SwAV (arXiv 2006.09882, section 3.1) as DINOv2 (arXiv 2304.07193) uses it.
"""
import torch

from .common import all_reduce, at_least_float32, check_matrix, takes_kernel, tl, triton
from .softmax_center import row_logsumexp

# A program sums SPLIT rows of BLOCK_K columns, BLOCK_ROWS at a time. 128 columns of half precision are two full
# cache lines; 4,000 x 65,536 logits make 8 x 512 programs, and their partial sums are 1/256 of the logits' bytes.
SPLIT, BLOCK_ROWS, BLOCK_K = 512, 16, 128


def column_sum_ref(x, a, r, temp):
    return (at_least_float32(x) / temp - a - r[:, None]).exp().sum(0)


@triton.jit
def column_sum_kernel(x_ptr, stride, a_ptr, r_ptr, partial_ptr, rows, K, inv_temp,
                      SPLIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * SPLIT
    a = tl.load(a_ptr + cols, mask=cols < K)
    total = tl.zeros([BLOCK_ROWS, BLOCK_K], tl.float32)
    for start in range(first, tl.minimum(first + SPLIT, rows), BLOCK_ROWS):
        i = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # 64-bit: rows * K passes 2^31
        mask = (i[:, None] < rows) & (cols[None, :] < K)
        x = tl.load(x_ptr + i[:, None] * stride + cols[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        r = tl.load(r_ptr + i, mask=i < rows, other=0.0)
        total += tl.exp(x * inv_temp - a[None, :] - r[:, None])  # [BLOCK_ROWS, BLOCK_K], an absent row adds 0
    tl.store(partial_ptr + tl.program_id(1) * K + cols, tl.sum(total, 0), mask=cols < K)


def column_sum(x, a, r, temp):
    """sum_i exp(x / temp - a - r) over this rank's rows: (rows, K), (K,), (rows,) -> (K,)."""
    if not takes_kernel(x):
        return column_sum_ref(x, a, r, temp)
    check_matrix("logits", x)
    rows, K = x.shape
    splits = triton.cdiv(rows, SPLIT)
    # Partial sums and then one sum, instead of atomic adds: the order is fixed, so two runs agree bit by bit.
    partial = x.new_empty(splits, K, dtype=torch.float32)
    if rows:
        column_sum_kernel[(triton.cdiv(K, BLOCK_K), splits)](
            x, x.stride(0), a, r, partial, rows, K, 1 / temp,
            SPLIT=SPLIT, BLOCK_ROWS=BLOCK_ROWS, BLOCK_K=BLOCK_K, num_warps=4)
    return partial.sum(0)


def column_max(x, temp):
    if not len(x):
        return at_least_float32(x.new_full((x.shape[1],), float("-inf")))
    return at_least_float32(x.amax(0)) / temp


@torch.no_grad()
def sinkhorn(logits, temp, n_iterations=3):
    """The two vectors (a, r) of the Sinkhorn-Knopp targets."""
    a = all_reduce(column_max(logits, temp), "max")
    r = torch.zeros_like(a[:1]).expand(len(logits)).contiguous()
    for _ in range(n_iterations):
        a = a + all_reduce(column_sum(logits, a, r, temp)).log()
        r = row_logsumexp(logits, a, temp)
    return a, r
