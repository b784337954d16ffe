"""Steps to be measured: ours as pretrain.main makes them, and the plain composition of plain.py, on one fixed batch."""
import copy
import itertools
from pathlib import Path

import numpy as np
import torch

import data
import kernels
import plain
import pretrain
from runtime import parameter_groups

VALUES = dict(lr=1e-5, weight_decay=0.04, momentum=0.992, teacher_temp=0.07, freeze_last_layer=False,
              freeze_backbone=False)


class Canvases:
    """A pack of noise; in `folder` it is a file read through numpy.memmap, like a pack."""

    def __init__(self, images, canvas=384, folder=None):
        rng, shape = np.random.default_rng(0), (images, canvas, canvas)
        self.canvases = np.memmap(Path(folder) / "canvases.u8", np.uint8, "w+", shape=shape) if folder else np.empty(
            shape, np.uint8)
        for i in range(0, images, 256):
            self.canvases[i:i + 256] = rng.integers(0, 256, self.canvases[i:i + 256].shape, np.uint8)
        self.sizes, self.groups = np.tile([960, 660], (images, 1)), np.arange(images)

    def __len__(self):
        return len(self.canvases)


def arguments(arch, batch, *flags, preset="ultradino"):
    return pretrain.get_args(["--preset", preset, "--arch", arch, "--batch_size_per_gpu", str(batch), *flags])


def one_batch(args, device):
    batch = data.PretrainBatches(Canvases(2 * args.batch_size_per_gpu, args.canvas), args)[0]
    return pretrain.to_device(batch, torch.device(device), args, 0.5, 0.25)[0]


def step_flops(args, masked):
    """Floating-point operations of the matrix products that one step needs; recomputing any adds nothing here."""
    c, b, L = pretrain.backbone_config(args), args.batch_size_per_gpu, args.local_crops_number
    C, total = c["embed_dim"], 0
    P1, P2 = ((side // args.patch_size) ** 2 for side in (args.global_crops_size, args.local_crops_size))
    for crops, P, passes in ((2 * b, P1, 1), (2 * b, P1, 3), (L * b, P2, 3)):  # the teacher's first
        N, kept = P + 1 + args.num_register_tokens, crops
        if passes == 3 and args.drop_path_rate:
            kept = max(int(crops * (1 - args.drop_path_rate)), 1)
        total += passes * c["depth"] * kept * N * (24 * C * C + 4 * N * C)
        total += (2 if passes == 3 else 1) * crops * P * 2 * C * args.patch_size ** 2  # crops need no gradient
    h, d = args.head_hidden_dim, args.head_bottleneck_dim
    rows = 3 * ((2 + L) * b + masked) + 2 * b + masked  # student forward and backward, teacher
    return total + rows * 2 * (C * h + h * h + h * d + d * args.head_n_prototypes)


def twin(network):
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


class Ours:
    """Student, teacher and all that a step needs, as pretrain.main makes them; and steps of it, callables."""

    def __init__(self, args, device):
        self.args = args
        self.student, self.teacher = pretrain.build_networks(args, device)
        self.buffers, self.centers, self.optimizer = pretrain.build_state(self.student, self.teacher, args)

    def step(self, micro, compiled=False, reference=False, checkpointing=False):
        """A callable that takes a step, with networks of its own of the same parameters: compiling stays its own."""
        student, teacher = (twin(network) for network in (self.student, self.teacher))
        student.backbone.checkpoint_activations |= checkpointing
        if compiled:
            student.backbone.compile_blocks(), teacher.backbone.compile_blocks()
        number = itertools.count()

        def call(micros=(micro,)):
            kernels.use_reference(reference)
            drops = list(pretrain.draw_drops(student.backbone, micros, 0, next(number), 0))
            stats = pretrain.train_step(student, teacher, self.optimizer, self.buffers, self.centers, micros, VALUES,
                                        self.args, self.args.batch_size_per_gpu, drops)
            kernels.use_reference(False)
            return stats
        return call


class Plain:
    def __init__(self, args, device, ours):
        self.args, states = args, [network.state_dict() for network in (ours.student, ours.teacher)]
        self.student, self.teacher = plain.networks(pretrain.backbone_config(args), args, *states, device)
        self.centers = torch.zeros(2, args.head_n_prototypes, device=device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student, args.layerwise_decay), lr=0.0,
                                           betas=pretrain.ADAM_BETAS, fused=True)

    def step(self, micro, compiled=False):
        student, teacher = (twin(network) for network in (self.student, self.teacher))
        micro, use = plain.prepare(micro), plain.compiled(student, teacher) if compiled else plain.EAGER
        return lambda: plain.train_step(student, teacher, self.optimizer, self.centers, micro, VALUES, self.args,
                                        use=use)
