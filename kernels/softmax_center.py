"""Teacher targets by centering: a softmax kept as two vectors, and the moving average of its center.

    p[i, k] = softmax_k((x[i, k] - center[k]) / T) = exp(x[i, k] / T - a[k] - r[i])
    a = center / T        r[i] = logsumexp_k(x[i, k] / T - a[k])

in    logits (rows, K) float16, bfloat16 or float32, center (K,), temp T: a number
out   a (K,), r (rows,) float32 (the reference keeps float64). Nothing is saved: targets have no gradient.

Bytes: the kernel reads the logits once and writes rows numbers. Plain torch reads and writes (rows, K) for the
shift, again for the softmax, and keeps the float32 probabilities until the loss: 512 MB for 2,000 rows of 65,536.
The kernel is the online softmax of arXiv 1805.02867, without its second pass.

The center (DINO, arXiv 2104.14294, equation 4) is an exponential moving average of the mean teacher logit:
    center <- momentum * center + (1 - momentum) * sum_i x[i] / count        over the rows of all ranks
"""
import torch

from .common import all_reduce, at_least_float32, check_matrix, takes_kernel, tl, triton

BLOCK_K = 2048  # columns per step of a row: 4 warps hold 16 numbers a thread, and 65,536 columns are 32 steps


def row_logsumexp_ref(x, a, temp):
    return (at_least_float32(x) / temp - a).logsumexp(1)


@triton.jit
def row_logsumexp_kernel(x_ptr, stride, a_ptr, r_ptr, K, inv_temp, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # 64-bit: rows * K passes 2^31
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride + cols, mask=cols < K, other=float("-inf")).to(tl.float32)
        y = x * inv_temp - tl.load(a_ptr + cols, mask=cols < K, other=0.0)  # [BLOCK_K]
        new_max = tl.maximum(row_max, tl.max(y, 0))
        row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(y - new_max), 0)
        row_max = new_max
    tl.store(r_ptr + row, row_max + tl.log(row_sum))


def row_logsumexp(x, a, temp):
    """logsumexp_k(x / temp - a) of each row: (rows, K), (K,) -> (rows,). One program per row."""
    if not takes_kernel(x):
        return row_logsumexp_ref(x, a, temp)
    check_matrix("logits", x)
    rows, K = x.shape
    r = x.new_empty(rows, dtype=torch.float32)
    if rows:
        row_logsumexp_kernel[(rows,)](x, x.stride(0), a.float().contiguous(), r, K, 1 / temp,
                                      BLOCK_K=BLOCK_K, num_warps=4)
    return r


@torch.no_grad()
def softmax_center(logits, center, temp):
    """The two vectors (a, r) of softmax((logits - center) / temp)."""
    a = at_least_float32(center) / temp
    return a, row_logsumexp(logits, a, temp)


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
