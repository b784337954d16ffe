"""Cross-entropy between teacher targets and student logits, and its gradient, in one kernel.

    p[j, k] = exp(x[j, k] / T - a[k] - r[j])       the targets of softmax_center and sinkhorn, sum_k p[j, k] = 1
    q[i, k] = softmax_k(s[i, k] / tau)
    loss[i] = -weight[i] * sum_j sum_k p[j, k] * log q[i, k]
    d loss[i] / d s[i, k] = weight[i] / tau * (n[i] * q[i, k] - sum_j p[j, k])
where j runs over the n[i] = 1 or 2 teacher rows of student row i.

An item (an image or a masked patch) has S student and M teacher rows, adjacent: student row i is number i % S of item
i // S, and learns from the teacher rows of its item that rows_of[i % S] names (-1: no second one).

in    student s (items * S, K), teacher x (items * M, K): float16, bfloat16 or float32; a (K,), r (items * M,),
      weight (items * S,) float32; rows_of (S, 2) int64; student_temp tau, teacher_temp T: numbers
out   loss (items * S,) float32 (the reference keeps float64) and the gradient to s, written over s. Where s is
      float16 it is bfloat16: logits of unit vectors need float16's digits, gradients bfloat16's range. The weight is
      in it before it is rounded.

Bytes, for R rows of b bytes with one teacher row each: 4RKb, of which the L2 cache may answer one, the second read of
s (a program has 256 KB of it at K = 65,536 in float16, and few large programs run at a time). Plain torch writes a
float32 (rows, K) matrix for every operation, more than ten, and keeps two, targets and log-softmax, for backward.
Source: the losses of DINO (arXiv 2104.14294, equation 1) and iBOT (arXiv 2111.07832); the sum as in arXiv 1805.02867.
"""
import torch

from .common import LN2, LOG2E, at_least_float32, check_matrix, launch, slices, takes_kernel, tl, triton
from .softmax_center import LOWEST, online_logsumexp

ROWS, BLOCK_K, NUM_WARPS = 2, 4096, 16  # two rows share each load of a; 16 numbers a thread and stream


def gradient_view(student):
    """The student's memory as the matrix of its gradient."""
    return student.view(torch.bfloat16) if student.dtype == torch.float16 else student


def cross_entropy_ref(student, teacher, a, r, rows_of, weight, student_temp, teacher_temp):
    S = len(rows_of)
    items, M = len(student) // S, len(teacher) * S // max(len(student), 1)
    first, second = rows_of.unbind(1)
    losses = []
    for rows in slices(student, S):
        teachers = slice(rows.start // S * M, rows.stop // S * M)
        p = (at_least_float32(teacher[teachers]) / teacher_temp - a).sub_(r[teachers, None]).exp_()
        p = p.unflatten(0, (-1, M)) if items else p[:, None]                                    # (items, M, K)
        target = p[:, first]                                                                    # (items, S, K)
        if M > 1:
            target = target + p[:, second.clamp(min=0)] * (second >= 0)[:, None]
        s, w, target = student[rows], weight[rows], target.flatten(0, 1)                        # (R, K), (R,), (R, K)
        n = (1 + (second >= 0).to(r.dtype)).repeat(len(s) // S)                                 # (R,)
        log_q = (at_least_float32(s) / student_temp).log_softmax(1)                             # (R, K)
        losses.append(-w * torch.linalg.vecdot(target, log_q))
        gradient_view(s).copy_(log_q.exp_().mul_(n[:, None]).sub_(target).mul_((w / student_temp)[:, None]))
    return torch.cat(losses), gradient_view(student)


@triton.jit
def cross_entropy_kernel(student_ptr, student_stride, grad_ptr, teacher_ptr, teacher_stride, a_ptr, r_ptr, rows_of_ptr,
                         weight_ptr, loss_ptr, rows, S, M, K, inv_student_temp, inv_teacher_temp,
                         TWO: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]; 64-bit: rows * K passes 2^31
    here = i < rows
    student_ptr += i[:, None] * student_stride
    grad_ptr += i[:, None] * student_stride
    high = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = here[:, None] & (cols[None, :] < K)
        s = tl.load(student_ptr + cols[None, :], mask=mask, other=float("-inf"),
                    eviction_policy="evict_last").to(tl.float32)  # [ROWS, BLOCK_K], soon read again
        high, total = online_logsumexp(high, total, s * inv_student_temp * LOG2E, 1)
    lse = high + tl.log2(total)  # [ROWS], in base 2

    j0 = tl.load(rows_of_ptr + 2 * (i % S)) + i // S * M  # [ROWS]
    r0 = tl.load(r_ptr + j0, mask=here)
    if TWO:
        second = tl.load(rows_of_ptr + 2 * (i % S) + 1)
        has_second = here & (second >= 0)
        j1 = second + i // S * M
        r1 = tl.load(r_ptr + j1, mask=has_second, other=0.0)
    weight = tl.load(weight_ptr + i, mask=here)
    loss = tl.zeros([ROWS], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = here[:, None] & (cols[None, :] < K)
        a = tl.load(a_ptr + cols, mask=cols < K, other=0.0)[None, :]
        # An absent logit of the teacher is -inf, so that its p is 0.
        x = tl.load(teacher_ptr + j0[:, None] * teacher_stride + cols[None, :], mask=mask, other=float("-inf"),
                    eviction_policy="evict_first")
        p = tl.exp2((x.to(tl.float32) * inv_teacher_temp - a - r0[:, None]) * LOG2E)            # [ROWS, BLOCK_K]
        q_scale = 1.0
        if TWO:
            x = tl.load(teacher_ptr + j1[:, None] * teacher_stride + cols[None, :],
                        mask=has_second[:, None] & (cols[None, :] < K), other=float("-inf"))
            p += tl.exp2((x.to(tl.float32) * inv_teacher_temp - a - r1[:, None]) * LOG2E)
            q_scale = tl.where(has_second, 2.0, 1.0)[:, None]
        s = tl.load(student_ptr + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        log_q = s * inv_student_temp * LOG2E - lse[:, None]                                     # in base 2
        loss -= tl.sum(p * log_q, 1)
        gradient = (weight * inv_student_temp)[:, None] * (q_scale * tl.exp2(log_q) - p)
        tl.store(grad_ptr + cols[None, :], gradient.to(grad_ptr.dtype.element_ty), mask=mask,
                 eviction_policy="evict_first")
    tl.store(loss_ptr + i, weight * loss * LN2, mask=here)


@torch.no_grad()
def cross_entropy(student, teacher, a, r, rows_of, weight, student_temp, teacher_temp):
    """(loss (items * S,), gradient (items * S, K)); the gradient takes the place of the student's logits."""
    S, K = len(rows_of), student.shape[1]
    items = len(student) // S
    M = len(teacher) // max(items, 1)
    wanted = dict(student=(items * S, K), teacher=(items * M, K), a=(K,), r=(items * M,), rows_of=(S, 2),
                  weight=(items * S,))
    given = dict(student=student, teacher=teacher, a=a, r=r, rows_of=rows_of, weight=weight)
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} must be {shape} for {items} items of {S} student and {M} teacher rows, "
                             f"not {tuple(given[name].shape)}")
    if not takes_kernel(student):
        return cross_entropy_ref(student, teacher, a, r, rows_of, weight, student_temp, teacher_temp)
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    loss, gradient = student.new_empty(items * S, dtype=torch.float32), gradient_view(student)
    if items:
        launch(cross_entropy_kernel, (triton.cdiv(items * S, ROWS),), student, student.stride(0), gradient, teacher,
               teacher.stride(0), a.float().contiguous(), r.float().contiguous(), rows_of.contiguous(),
               weight.float().contiguous(), loss, items * S, S, M, K, 1 / student_temp, 1 / teacher_temp,
               TWO=M > 1, ROWS=ROWS, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS)
    return loss, gradient
