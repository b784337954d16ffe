"""Teacher targets by centering: a softmax kept as two vectors, and the moving average of its center.

    p[i, k] = softmax_k((x[i, k] - center[k]) / T) = exp(x[i, k] / T - a[k] - r[i])
    a = center / T        r[i] = logsumexp_k(x[i, k] / T - a[k])

in    logits: chunks (rows, K) float16, bfloat16 or float32, center (K,), temp T: a number
out   a (K,), r (rows,) float32 (the reference keeps float64). Nothing is saved: targets have no gradient.

Bytes: the kernel reads the logits once and writes rows numbers. Plain torch reads and writes (rows, K) for the
shift, again for the softmax, and keeps the float32 probabilities until the loss: 512 MB for 2,000 rows of 65,536.
The kernel is the online softmax of arXiv 1805.02867, without its second pass.

The center (DINO, arXiv 2104.14294, equation 4) is an exponential moving average of the mean teacher logit:
    center <- momentum * center + (1 - momentum) * sum_i x[i] / count        over the rows of all ranks
"""
import torch

from .common import LN2, LOG2E, all_reduce, at_least_float32, check_matrix, launch, slices, takes_kernel, tl, triton

# A program owns ROWS rows, which share each load of a, and walks over K in steps of BLOCK_K: 64 numbers a thread.
ROWS, BLOCK_K, NUM_WARPS = 4, 2048, 4
LOWEST = tl.constexpr(-1e38)  # a running maximum starts here, not at -inf: exp2(-inf - -inf) is NaN


def row_logsumexp_ref(x, a, temp):
    return torch.cat([(at_least_float32(x[some]) / temp - a).logsumexp(1) for some in slices(x)])


@triton.jit
def online_logsumexp(high, total, y, axis: tl.constexpr):
    # Running maximum and sum of 2^(y - maximum) along an axis: one exp2 per element, one more per kept number.
    new_high = tl.maximum(high, tl.max(y, axis))
    total = total * tl.exp2(high - new_high) + tl.sum(tl.exp2(y - tl.expand_dims(new_high, axis)), axis)
    return new_high, total


@triton.jit
def row_logsumexp_kernel(x_ptr, stride, a_ptr, r_ptr, rows, K, inv_temp, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]; 64-bit: rows * K passes 2^31
    high = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = (i[:, None] < rows) & (cols[None, :] < K)
        x = tl.load(x_ptr + i[:, None] * stride + cols[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        a = tl.load(a_ptr + cols, mask=cols < K, other=0.0)
        high, total = online_logsumexp(high, total, (x * inv_temp - a[None, :]) * LOG2E, 1)  # of [ROWS, BLOCK_K]
    tl.store(r_ptr + i, (high + tl.log2(total)) * LN2, mask=i < rows)


def row_logsumexp(x, a, temp):
    """logsumexp_k(x / temp - a) of each row: (rows, K), (K,) -> (rows,)."""
    if not takes_kernel(x):
        return row_logsumexp_ref(x, a, temp)
    check_matrix("logits", x)
    rows, K = x.shape
    r = x.new_empty(rows, dtype=torch.float32)
    if rows:
        launch(row_logsumexp_kernel, (triton.cdiv(rows, ROWS),), x, x.stride(0), a.float().contiguous(), r, rows, K,
               1 / temp, ROWS=ROWS, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS)
    return r


@torch.no_grad()
def softmax_center(chunks, center, temp):
    """The two vectors (a, r) of softmax((logits - center) / temp); the logits come in chunks of rows."""
    a = at_least_float32(center) / temp
    return a, torch.cat([row_logsumexp(x, a, temp) for x in chunks])


@torch.no_grad()
def update_center(center, logit_sum, count, momentum=0.9):
    """The next center (K,) from this rank's sum of teacher logits (K,) and its number of rows.

    The caller has the sum without a pass over logits: the last layer is linear, so sum_i W f_i = W sum_i f_i.
    Sum and count are reduced apart: DINOv2 averages the ranks' means, which counts a row of a rank that has few
    masked patches more than another rank's. With equal counts both are the same. No rows anywhere: no change.
    """
    logit_sum = at_least_float32(logit_sum)
    total = torch.cat([logit_sum, logit_sum.new_zeros(1) + count])  # one message
    logit_sum, count = all_reduce(total).split([len(center), 1])
    moved = center * momentum + logit_sum / count * (1 - momentum)
    return torch.where(count > 0, moved, center)  # on the device: the CPU never waits for the count
