"""Cross-entropy between teacher targets and student logits, without ever writing a probability.

    p[j, k] = exp(x[j, k] / T - a[k] - r[j])       the targets of softmax_center and sinkhorn, sum_k p[j, k] = 1
    loss[i] = weight[i] * sum_j sum_k -p[j, k] * log softmax(s[i] / tau)[k]
            = weight[i] * (n[i] * lse[i] - sum_j sum_k p[j, k] * s[i, k] / tau),    lse[i] = logsumexp_k(s[i, k] / tau)
where j runs over the n[i] = 1 or 2 teacher rows in teacher_rows[i].

in    student s (R, K) with gradient, teacher x (S, K): float16, bfloat16 or float32; a (K,), r (S,) float32;
      teacher_rows (R, 2) int64, second column -1 where there is one teacher row; weight (R,);
      student_temp tau, teacher_temp T: numbers
out   loss (R,) float32 (the reference keeps float64)

Saved for backward: the inputs and lse (R,). With g the gradient of the loss:
    ds[i, k] = g[i] * weight[i] / tau * (n[i] * softmax(s[i] / tau)[k] - sum_j p[j, k])        in the student's dtype

Bytes, for R rows with one teacher row each, in b bytes a logit: forward reads 2RKb, backward reads 2RKb and
writes RKb. Plain torch (the reference below) writes a float32 (rows, K) matrix for every operation, more than ten,
and keeps two of them, targets and log-softmax, for backward.
Source: the losses of DINO (arXiv 2104.14294, equation 1) and iBOT (arXiv 2111.07832); lse as in arXiv 1805.02867.
"""
import torch
from torch.autograd.function import once_differentiable

from .common import at_least_float32, check_matrix, takes_kernel, tl, triton

BLOCK_K = 2048  # columns per step or program: 3 streams of 16 numbers a thread stay in the registers of 4 warps


def cross_entropy_ref(student, teacher, a, r, teacher_rows, weight, student_temp, teacher_temp):
    p = (at_least_float32(teacher) / teacher_temp - a - r[:, None]).exp()                       # (S, K)
    first, second = teacher_rows.unbind(1)
    target = p[first] + p[second.clamp(min=0)] * (second >= 0)[:, None]                         # (R, K)
    return -weight * (target * (at_least_float32(student) / student_temp).log_softmax(1)).sum(1)


@triton.jit
def target_block(teacher_ptr, stride, a_ptr, r_ptr, rows_ptr, i, cols, K, inv_temp):
    # sum_j p[j, cols]: [BLOCK_K], 0 beyond K. An absent second row reads as logits of -inf, so as p = 0.
    j0, j1 = tl.load(rows_ptr + 2 * i), tl.load(rows_ptr + 2 * i + 1)
    x0 = tl.load(teacher_ptr + j0 * stride + cols, mask=cols < K, other=float("-inf")).to(tl.float32)
    x1 = tl.load(teacher_ptr + j1 * stride + cols, mask=(cols < K) & (j1 >= 0), other=float("-inf")).to(tl.float32)
    a = tl.load(a_ptr + cols, mask=cols < K, other=0.0)
    r0, r1 = tl.load(r_ptr + j0), tl.load(r_ptr + j1, mask=j1 >= 0, other=0.0)
    return tl.exp(x0 * inv_temp - a - r0) + tl.exp(x1 * inv_temp - a - r1)


@triton.jit
def cross_entropy_fwd_kernel(student_ptr, student_stride, teacher_ptr, teacher_stride, a_ptr, r_ptr, rows_ptr,
                             weight_ptr, loss_ptr, lse_ptr, K, inv_student_temp, inv_teacher_temp,
                             BLOCK_K: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)  # 64-bit: R * K passes 2^31
    row_max = float("-inf")
    row_sum = 0.0
    dot = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        s = tl.load(student_ptr + i * student_stride + cols, mask=cols < K, other=float("-inf")).to(tl.float32)
        s = s * inv_student_temp                                    # [BLOCK_K]
        new_max = tl.maximum(row_max, tl.max(s, 0))
        row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(s - new_max), 0)
        row_max = new_max
        p = target_block(teacher_ptr, teacher_stride, a_ptr, r_ptr, rows_ptr, i, cols, K, inv_teacher_temp)
        dot += p * tl.where(cols < K, s, 0.0)                       # beyond K s is -inf
    lse = row_max + tl.log(row_sum)
    n = tl.where(tl.load(rows_ptr + 2 * i + 1) >= 0, 2.0, 1.0)
    tl.store(loss_ptr + i, tl.load(weight_ptr + i) * (n * lse - tl.sum(dot, 0)))
    tl.store(lse_ptr + i, lse)


@triton.jit
def cross_entropy_bwd_kernel(student_ptr, student_stride, teacher_ptr, teacher_stride, a_ptr, r_ptr, rows_ptr,
                             scale_ptr, lse_ptr, grad_ptr, K, inv_student_temp, inv_teacher_temp,
                             BLOCK_K: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    s = tl.load(student_ptr + i * student_stride + cols, mask=cols < K).to(tl.float32) * inv_student_temp
    n = tl.where(tl.load(rows_ptr + 2 * i + 1) >= 0, 2.0, 1.0)
    p = target_block(teacher_ptr, teacher_stride, a_ptr, r_ptr, rows_ptr, i, cols, K, inv_teacher_temp)
    grad = tl.load(scale_ptr + i) * (n * tl.exp(s - tl.load(lse_ptr + i)) - p)  # [BLOCK_K]
    tl.store(grad_ptr + i * K + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < K)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, a, r, teacher_rows, weight, student_temp, teacher_temp):
        R, K = student.shape
        loss, lse = student.new_empty(2, R, dtype=torch.float32)
        if R:
            cross_entropy_fwd_kernel[(R,)](
                student, student.stride(0), teacher, teacher.stride(0), a, r, teacher_rows, weight, loss, lse,
                K, 1 / student_temp, 1 / teacher_temp, BLOCK_K=BLOCK_K, num_warps=4)
        ctx.save_for_backward(student, teacher, a, r, teacher_rows, weight, lse)
        ctx.temps = student_temp, teacher_temp
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        student, teacher, a, r, teacher_rows, weight, lse = ctx.saved_tensors
        (R, K), (student_temp, teacher_temp) = student.shape, ctx.temps
        scale = dloss * weight / student_temp
        grad = student.new_empty(R, K)
        if R:
            cross_entropy_bwd_kernel[(R, triton.cdiv(K, BLOCK_K))](
                student, student.stride(0), teacher, teacher.stride(0), a, r, teacher_rows, scale, lse, grad,
                K, 1 / student_temp, 1 / teacher_temp, BLOCK_K=BLOCK_K, num_warps=4)
        return (grad,) + 7 * (None,)


def cross_entropy(student, teacher, a, r, teacher_rows, weight, student_temp, teacher_temp):
    """One loss per student row against its one or two teacher rows; targets are exp(teacher / temp - a - r)."""
    R, S, K = len(student), len(teacher), student.shape[1]
    wanted = dict(teacher=(S, K), a=(K,), r=(S,), teacher_rows=(R, 2), weight=(R,))
    given = dict(teacher=teacher, a=a, r=r, teacher_rows=teacher_rows, weight=weight)
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} must be {shape} for a student of {tuple(student.shape)}, "
                             f"not {tuple(given[name].shape)}")
    if not takes_kernel(student):
        return cross_entropy_ref(student, teacher, a, r, teacher_rows, weight, student_temp, teacher_temp)
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    return CrossEntropy.apply(student, teacher.detach(), a.float().contiguous(), r.float().contiguous(),
                              teacher_rows.long().contiguous(), weight.float().contiguous(), student_temp, teacher_temp)
