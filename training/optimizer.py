"""What fine-tuning does with gradients: AdamW over a network's parameters, and one step of it."""

import torch

from kernels import all_reduce
from runtime import PATCH_EMBED_LR_MULT, flatten_parameters, parameter_groups

ADAM_BETAS = (0.9, 0.999)


def build_optimizer(network, layer_decay):
    """(flat gradients of what is trained, AdamW).

    A layer decay of 1, for what starts from scratch, means one rate for all; else the patch embedding has a fifth of
    its layer's, as in DINOv2. What is frozen is in no group.
    """
    gradients = [grads for _, grads in flatten_parameters(network) if grads is not None]
    groups = parameter_groups(network, layer_decay, 1.0 if layer_decay == 1 else PATCH_EMBED_LR_MULT)
    return gradients, adamw(groups)


def adamw(groups):
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=ADAM_BETAS, fused=True)


def optimizer_step(optimizer, loss, gradients, lr, weight_decay, backbone_lr=None, clip_grad=None):
    """One AdamW step on the sum over processes of their parts of the loss.

    gradients: flat ones, which are zero afterwards. backbone_lr: of the groups with is_backbone.
    clip_grad: largest norm of all gradients together.
    """
    for group in optimizer.param_groups:  # plain floats: a checkpoint takes no numbers of numpy's
        group["lr"] = float(backbone_lr if group.get("is_backbone") else lr) * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]
    loss.backward()
    for grads in gradients:
        all_reduce(grads)
    if clip_grad is not None:
        norm = torch.stack([grads.norm() for grads in gradients]).norm()
        for grads in gradients:
            grads.mul_((clip_grad / (norm + 1e-6)).clamp(max=1))
    optimizer.step()
    for grads in gradients:
        grads.zero_()
