"""The prototype layer and the cross-entropy in one: (rows, K) logits exist for CHUNK rows at a time only.

    s = f W^T      x = f' W'^T        f, f' unit-length bottleneck features, W, W' the prototypes of student, teacher
    loss = sum_i cross_entropy(s, x)[i]        see cross_entropy.py for the formula, the targets and the items

in    features f (items, S, d) and prototypes W (K, d) with gradient; teacher_features f' (items, M, d),
      teacher_prototypes W' (K, d), a (K,), r (items, M), rows_of (S, 2), weight (items, S); the two temperatures;
      dtype of matrix products: float32 (float64 stays) or bfloat16, where logits are float16 and gradients bfloat16
out   loss: a number with gradient; losses (items, S), the same row by row, without

The gradient is computed in the forward, chunk by chunk, with G = d loss / d s written over s:
    s = f W^T,  x = f' W'^T,  G and the losses by one kernel,  df = G W,  dW += G^T f
Backward multiplies df and dW by the gradient of the loss. So weight must hold all that differs between rows.

Bytes kept, for 10,000 rows of K = 65,536: two chunks (268 MB each in half precision), df and dW. Plain torch keeps
logits, log-softmax and targets of all rows: 1.3 GB + 2.6 GB + 2.6 GB, and more while it computes.
The price: the teacher's logits are computed once more here than for their targets alone. Under bfloat16 a chunk's part
of dW is rounded to bfloat16, as autocast rounds the whole; the parts are added in float32.
"""
import torch
from torch.autograd.function import once_differentiable

from .cross_entropy import cross_entropy

CHUNK = 2048  # rows: enough to fill a GPU with one product, and dW (K, d) is read and written once per chunk
KEPT_BYTES = 2 ** 30  # teacher logits up to this size are kept between the passes of Sinkhorn-Knopp


def precision(x, dtype):
    """dtypes of logits and of their gradients. Logits of unit vectors lie in -1..1, times weight_g, which starts at 1;
    near ties decide the top prototype: float16 has three more bits there than bfloat16, whose range gradients need."""
    return (torch.float16, dtype) if dtype == torch.bfloat16 else 2 * (torch.promote_types(x.dtype, dtype),)


class LogitChunks:
    """The rows of features @ prototypes.T in order, some at a time, as often as one iterates over it.

    features (rows, d), prototypes (K, d) -> matrices (n, K). They are kept where all fit KEPT_BYTES and there are
    several passes; else each pass computes them into one buffer of CHUNK rows: a chunk is gone when the next one comes.
    """

    def __init__(self, features, prototypes, dtype, passes=2):
        dtype, _ = precision(features, dtype)
        self.features, self.prototypes, self.kept = features.detach().to(dtype), prototypes.detach().to(dtype), None
        rows, K = len(features), len(prototypes)
        kept = passes > 1 and rows * K * self.features.element_size() <= KEPT_BYTES
        self.buffer = self.features.new_empty(rows if kept else min(rows, CHUNK), K)
        if kept:
            self.kept = self.product(self.features)

    @torch.no_grad()
    def product(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return torch.mm(features, self.prototypes.T, out=self.buffer[:len(features)])

    def __iter__(self):
        return iter([self.kept]) if self.kept is not None else map(self.product, self.features.split(CHUNK))


class PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, prototypes, teacher_features, teacher_prototypes, a, r, rows_of, weight, student_temp,
                teacher_temp, dtype):
        (items, S, d), M, K = features.shape, teacher_features.shape[1], len(prototypes)
        logits, gradients = precision(features, dtype)
        f, W = features.to(logits), prototypes.to(logits)
        f_t, W_t = teacher_features.to(logits), teacher_prototypes.to(logits)
        f_g, W_g = features.to(gradients), prototypes.to(gradients)
        step = max(1, CHUNK // max(S, M))
        buffer, buffer_t = (f.new_empty(min(step, items) * n, K) for n in (S, M))
        df, dW = torch.empty_like(features), torch.zeros_like(prototypes)
        losses = torch.empty_like(features[..., 0], dtype=torch.promote_types(features.dtype, torch.float32))
        for first in range(0, items, step):
            some = slice(first, first + step)
            rows = f[some].flatten(0, 1)                                                        # (n * S, d)
            s = torch.mm(rows, W.T, out=buffer[:len(rows)])                                     # (n * S, K)
            rows = f_t[some].flatten(0, 1)                                                      # (n * M, d)
            x = torch.mm(rows, W_t.T, out=buffer_t[:len(rows)])                                 # (n * M, K)
            loss, G = cross_entropy(s, x, a, r[some].flatten(), rows_of, weight[some].flatten(), student_temp,
                                    teacher_temp)
            losses[some] = loss.view(-1, S)
            df[some] = torch.mm(G, W_g).view(-1, S, d)
            dW += torch.mm(G.T, f_g[some].flatten(0, 1))                                        # (K, d)
        ctx.save_for_backward(df, dW)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        df, dW = ctx.saved_tensors
        return (dloss * df, dloss * dW) + 9 * (None,)


def prototype_loss(features, prototypes, teacher_features, teacher_prototypes, a, r, rows_of, weight, student_temp,
                   teacher_temp, dtype=torch.float32):
    """(loss, losses (items, S)) of student rows features @ prototypes.T against the targets that a and r describe."""
    (items, S, d), (K, _) = features.shape, prototypes.shape
    wanted = dict(prototypes=(K, d), teacher_features=(items, teacher_features.shape[1], d), teacher_prototypes=(K, d),
                  a=(K,), r=(items, teacher_features.shape[1]), rows_of=(S, 2), weight=(items, S))
    given = dict(prototypes=prototypes, teacher_features=teacher_features, teacher_prototypes=teacher_prototypes, a=a,
                 r=r, rows_of=rows_of, weight=weight)
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} must be {shape} for features {tuple(features.shape)}, "
                             f"not {tuple(given[name].shape)}")
    with torch.autocast(features.device.type, enabled=False):  # the precision of each product is chosen here
        return PrototypeLoss.apply(features, prototypes, teacher_features.detach(), teacher_prototypes.detach(), a, r,
                                   rows_of, weight, student_temp, teacher_temp, dtype)
