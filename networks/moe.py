"""Mixture of experts in a backbone's blocks: which FFN works on a token depends on the token and on the batch's task.

M2DINO (arXiv 2603.18123) has "task-conditioned Mixture-of-Experts blocks" in its later layers. As far as is known
y = sum over e of g_e FFN_e(h), g = softmax(W [h ; e_task] + b). What is not known was chosen here: experts start as
copies of the pretrained FFN (sparse upcycling, Komatsuzaki et al. 2023), gates are per token, top-k is an option.

T tokens of a batch, C width, E experts, R = T * top_k routed places; an expert's FFN has `hidden` units.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from kernels import all_reduce
from model import Block, KeepRows, Mlp, SwiGLU, folded

# task: embedding (d,) of the one task of a batch. gates: a list to which every mixture appends its probabilities
# (T, E), in the order of blocks. Give each forward a new one and read it before backward, where a checkpointed block,
# computed again, appends again.
Routing = namedtuple("Routing", "task gates")


# ---------------------------------------------------------------- products of all experts

def has_grouped_mm(x, width, out):
    """Whether torch has one call for such groups: float64 never, on a GPU bfloat16 alone, in rows of whole 16 bytes."""
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return (x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
            and width % 8 == 0 and out % 8 == 0)


def groups(x, ends):
    return x.tensor_split(ends[:-1].tolist())


def grouped(x, weight, ends):
    """Rows x (R, in), sorted by expert, times their expert's weight (E, in, out); ends (E,): where each group ends."""
    if has_grouped_mm(x, *weight.shape[1:]):
        return F.grouped_mm(x, weight, offs=ends)  # (R, out)
    return torch.cat([rows @ own for rows, own in zip(groups(x, ends), weight)])


def grouped_outer(x, y, ends):
    """x.T @ y of each expert's rows: (R, in), (R, out) -> (E, in, out)."""
    if has_grouped_mm(x, x.shape[1], y.shape[1]):
        return F.grouped_mm(x.T, y, offs=ends)
    return torch.stack([a.T @ b for a, b in zip(groups(x, ends), groups(y, ends))])


def activate(x, gated):
    """GELU, or SwiGLU of (..., 2 hidden) -> (..., hidden)."""
    if not gated:
        return F.gelu(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def activate_backward(grad, x, gated):
    if not gated:
        return torch.ops.aten.gelu_backward(grad, x)
    gate, value = x.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)), dim=-1)


class SecondLayer(torch.autograd.Function):
    """Second layers of the experts, of activations times gates. It keeps x and the gates; the rest is computed again.

    All experts for every token (ends None): x (T, E, width), gates (T, E, 1), weight (C, E * hidden) -> (T, C), the
    sum over experts. Routed places: x (R, width), gates (R, 1), weight (E, hidden, C), ends (E,) -> (R, C).
    """

    @staticmethod
    def forward(ctx, x, gates, weight, ends, gated):
        ctx.save_for_backward(x, gates, weight, ends)
        ctx.gated = gated
        if ends is None:
            return F.linear((activate(x, gated) * gates).flatten(1), weight)
        return grouped(activate(x, gated) * gates, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gates, weight, ends = ctx.saved_tensors
        grad, active = grad.contiguous(), activate(x, ctx.gated)
        if ends is None:
            dout = (grad @ weight).view_as(active)  # (T, E, hidden), before the gates
            grad_weight = grad.T @ (active * gates).flatten(1)  # (C, E * hidden)
        else:
            dout = grouped(grad, weight.transpose(1, 2), ends)  # (R, hidden)
            grad_weight = grouped_outer(active * gates, grad, ends)  # (E, hidden, C)
        grad_gates = (active * dout).sum(-1, keepdim=True)
        return activate_backward(dout * gates, x, ctx.gated), grad_gates, grad_weight, None, None


# ---------------------------------------------------------------- the block's mixture

def linear_of(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")  # no random numbers for what is replaced
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


class MixtureOfExperts(nn.Module):
    """In the place of a block's Mlp or SwiGLU `ffn`: experts that start as copies of it, and the gate.

    State dict: the dense layer's names. Experts lie one after the other along the hidden units: fc1.weight
    (E * hidden, C), fc1.bias (E * hidden,), fc2.weight (C, E * hidden), fc2.bias (E, C); a SwiGLU's w12 (E * 2 hidden,
    C), expert by expert its gate and its value, and w3. gate is W_h and b, task_gate W_t of
    softmax(W_h h + W_t e_task + b), which is softmax(W [h ; e_task] + b).

    top_k: a token meets the experts of its k largest gates alone, which are scaled to sum 1. With top_k=1 that is one
    expert's plain output: the gate then learns from the balance loss alone.
    """

    def __init__(self, ffn, experts, task_dim, top_k=None):
        super().__init__()
        self.experts, self.top_k, self.gated = experts, top_k, isinstance(ffn, SwiGLU)
        self.first, self.second = ("w12", "w3") if self.gated else ("fc1", "fc2")
        first, second = (getattr(ffn, name) for name in (self.first, self.second))
        weight, bias = first.weight.detach(), first.bias.detach()
        self.add_module(self.first, linear_of(weight.repeat(experts, 1), bias.repeat(experts)))
        weight, bias = second.weight.detach(), second.bias.detach()
        self.add_module(self.second, linear_of(weight.repeat(1, experts), bias.repeat(experts, 1)))
        like = dict(device=weight.device, dtype=weight.dtype)
        self.gate = nn.Linear(weight.shape[0], experts, **like)
        self.task_gate = nn.Linear(task_dim, experts, bias=False, **like)
        for layer in (self.gate, self.task_gate):  # not zero: equal gates would never tell equal experts apart
            nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def probabilities(self, x, norm, task):
        """Gates (T, E) of normalised tokens (T, C), in float32 (or float64) also under autocast."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = folded(self.gate, dtype, norm=norm)
            task_term = self.task_gate.weight.to(dtype) @ task.to(dtype)  # (E,), the same for all tokens
            return F.linear(x.to(dtype), weight, bias + task_term).softmax(-1)

    def forward(self, x, norm, scale, routing):
        """Tokens (T, C), normalised without `norm`'s weight and bias -> (T, C), times LayerScale `scale`."""
        if routing is None:
            raise ValueError("a block with a mixture of experts needs to know the task: pass routing=moe.Routing(task "
                             "embedding, []) to get_intermediate_layers")
        if routing.task.shape != (self.task_gate.in_features,):
            raise ValueError(f"routing has a task embedding of shape {tuple(routing.task.shape)}; a mixture of experts "
                             f"takes that of one task: ({self.task_gate.in_features},)")
        gates = self.probabilities(x, norm, routing.task)
        routing.gates.append(gates)
        first = folded(getattr(self, self.first), x.dtype, norm=norm)
        weight, bias = folded(getattr(self, self.second), x.dtype, scale=scale)  # (C, E * hidden), (E, C)
        if self.top_k is None:
            hidden = F.linear(x, *first).unflatten(1, (self.experts, -1))  # (T, E, width)
            gates = gates.to(x.dtype)
            y = SecondLayer.apply(hidden, gates[..., None], weight, None, self.gated)
        else:
            y, gates = self.routed(x, gates, *first, weight)
        return torch.addmm(y, gates, bias)

    def routed(self, x, gates, weight1, bias1, weight2):
        """The top_k experts of every token, without their second bias: (T, C) and the scaled gates (T, E), else 0."""
        shares, chosen = gates.topk(self.top_k)  # (T, k)
        shares = (shares / shares.sum(1, keepdim=True)).to(x.dtype)
        gates = torch.zeros_like(gates, dtype=x.dtype).scatter(1, chosen, shares)  # (T, E)
        experts, order = chosen.flatten().sort(stable=True)  # (R,), and the place (token, choice) of each
        inverse, numbers = order.argsort(), torch.arange(self.experts, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True).int()  # (E,)
        # permutations by KeepRows, biases by a product: their gradients add nothing atomically
        places = KeepRows.apply(x[:, None].expand(-1, self.top_k, -1).flatten(0, 1), order, inverse)  # (R, C)
        own = (experts[:, None] == numbers).to(x.dtype)  # (R, E), one 1 in each row
        hidden = torch.addmm(grouped(places, weight1.unflatten(0, (self.experts, -1)).transpose(1, 2), ends),
                             own, bias1.view(self.experts, -1))  # (R, width)
        weight2 = weight2.unflatten(1, (self.experts, -1)).permute(1, 2, 0)  # (E, hidden, C)
        shares = KeepRows.apply(shares.reshape(-1, 1), order, inverse)  # (R, 1)
        y = SecondLayer.apply(hidden, shares, weight2, ends, self.gated)  # (R, C)
        return KeepRows.apply(y, inverse, order).unflatten(0, chosen.shape).sum(1), gates


def add_experts(backbone, blocks, experts, task_dim, top_k=None):
    """Replace the FFN of these blocks of a VisionTransformer, in place, by a mixture of `experts` copies of it.

    Load dense weights before; to load those of a trained mixture, build the same and load_state_dict.
    """
    depth, blocks = len(backbone.blocks), list(blocks)
    if not depth or not all(isinstance(block, Block) for block in backbone.blocks):
        raise ValueError("timm's networks take no mixture of experts: give a backbone of VisionTransformer's families")
    if len(set(blocks)) < len(blocks) or not all(0 <= i < depth for i in blocks):
        raise ValueError(f"blocks for experts are {blocks}: give each once, from 0 to {depth - 1}")
    if experts < 1 or not (top_k is None or 1 <= top_k <= experts):
        raise ValueError(f"{experts} experts, top_k {top_k}: take one expert or more, and top_k from 1 to their number")
    for i in blocks:
        if not isinstance(backbone.blocks[i].mlp, (Mlp, SwiGLU)):
            raise ValueError(f"block {i} has experts already: add_experts starts from a dense backbone")
    for i in blocks:
        backbone.blocks[i].mlp = MixtureOfExperts(backbone.blocks[i].mlp, experts, task_dim, top_k)


# ---------------------------------------------------------------- from the gates of a forward

def balance_loss(gates, top_k):
    """Switch Transformer's E * sum_e f_e P_e (Fedus et al. 2021, eq. 4), mean over blocks; 1 where all is even.

    f_e is the share of routed places that expert e has, over all processes; P_e its mean probability, over the tokens
    of this one: the mean of the processes' losses, by their tokens, is the loss of the whole batch. Gradients reach P
    alone; without top_k every expert has every token and the loss is the constant 1.
    """
    if not gates:
        raise ValueError("no gates to balance: no block of this forward has a mixture of experts")
    E = gates[0].shape[1]
    chosen = [p.detach().topk(top_k or E).indices for p in gates]  # L of (T, k)
    places = all_reduce(torch.stack([F.one_hot(own, E).sum((0, 1)) for own in chosen]))  # (L, E)
    P = torch.stack([p.mean(0) for p in gates])  # (L, E)
    f = places.to(P.dtype) / places.sum(1, keepdim=True)
    return E * (f * P).sum(1).mean()


def gate_shares(gates):
    """(L, E): mean over tokens of each mixture's gates, detached."""
    return torch.stack([p.detach().mean(0) for p in gates])
