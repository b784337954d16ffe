"""Part g of gpu.py: are mixtures of experts right on this card, what do they cost, and a step of finetune_multi.py."""
import copy

import torch
from torch import nn

from record import ROOT  # noqa: F401  first: it puts the project on the path
import finetune_multi
import mixture
from gpu_kernels import compared
from labelled.fmc_uia import Task
from model import LayerScale, Mlp, SwiGLU
from networks.baselines import full_layerscale, open_backbone
from networks.moe import MixtureOfExperts, Routing
from timing import divided, first_line, free, peak_of, step_times, waits
from training import many_tasks

TASKS = [Task("outlines", "segmentation", 4), Task("planes", "classification", 8), Task("box", "detection", 1),
         Task("ends", "regression", 2)]
NETWORKS = {"dense": ["--experts", "1"], "4 experts": [], "4 experts, top 2": ["--top_k", "2"]}
TOLERANCE = 2e-2  # of bfloat16


# ---------------------------------------------------------------- correctness

def mixture_row(ffn, top_k, device, T, C, E=4):
    """Output and all gradients of one mixture in bfloat16, against the same weights and tokens in float64."""
    torch.manual_seed(0)
    layer = MixtureOfExperts(ffn(C, 4 * C), E, mixture.TASK_DIM, top_k)
    whole = nn.ModuleDict(dict(layer=layer, norm=nn.LayerNorm(C), scale=LayerScale(C, 1.0))).to(device)
    for p in whole.parameters():  # experts that differ, gates that prefer some
        nn.init.normal_(p, mean=p.detach().mean().item(), std=0.1 if p.ndim > 1 else 0.02)
    x, dout = (torch.randn(T, C, device=device).bfloat16() for _ in range(2))
    task = torch.randn(mixture.TASK_DIM, device=device)

    def call(whole, x, task, dout):
        names, parameters = zip(*whole.named_parameters())
        inputs = x.requires_grad_(), task.requires_grad_(), *parameters
        y = whole["layer"](x, whole["norm"], whole["scale"], Routing(task, []))
        return dict(zip(("out", "dx", "dtask", *names), (y, *torch.autograd.grad(y, inputs, dout))))

    want = call(copy.deepcopy(whole).double(), *(tensor.double() for tensor in (x, task, dout)))
    got = call(whole, x, task, dout)
    if top_k == 1:  # a single gate is scaled to 1: what reaches the gates is 0
        got = {name: tensor for name, tensor in got.items() if "gate" not in name and name != "dtask"}
    case = f"{T:,} tokens of {C}, {E} experts, {ffn.__name__}, top {top_k or 'all'}"
    return compared("mixture", case, torch.bfloat16, TOLERANCE, {name: (got[name], want[name]) for name in got})


def correctness(device, T=4133, C=384):
    """A row per case; one that raises is a row that failed."""
    for ffn in (Mlp, SwiGLU):
        for top_k in (None, 2, 1):
            try:
                yield mixture_row(ffn, top_k, device, T, C)
            except Exception as error:
                yield {"kernel": "mixture", "case": first_line(error), "passed": False}
            free()


# ---------------------------------------------------------------- steps of finetune_multi.py

class Steps:
    """A network of a task of each kind, and a fixed batch of each."""

    def __init__(self, arch, name, device, size, flags):
        self.args = args = finetune_multi.get_args(["--preset", "m2dino", "--arch", arch, *NETWORKS[name], *flags])
        args.dtype = "bfloat16"
        torch.backends.cudnn.deterministic = True  # as in the stage
        backbone, _ = open_backbone(None, None, arch, 0, pos="rope")
        full_layerscale(backbone)
        depth = len(backbone.blocks)
        how = dict(experts=args.experts, blocks=range(depth // 2, depth), top_k=args.top_k, task_dim=args.task_dim,
                   channels=args.channels)
        self.parts = many_tasks.build(backbone, TASKS, [None] * len(TASKS), how, 0, device)
        draws, B = torch.Generator().manual_seed(0), args.batch_size
        corners = torch.rand(B, 2, 2, generator=draws).sort(1).values
        targets = (torch.randint(4, (B, size, size), generator=draws), torch.randint(8, (B,), generator=draws),
                   corners.flatten(1), torch.rand(B, 2, 2, generator=draws))
        self.x = torch.randn(B, 1, size, size, generator=draws).to(device)
        self.targets = [target.to(device) for target in targets]

    def step(self, number):
        return lambda: many_tasks.train_step(*self.parts, number, self.x, self.targets[number], len(self.x), 1.0,
                                             self.args)


def step_rows(arch, device, size, flags, rounds):
    """A row per network and kind of task, timed in turn in one process; and whether the CPU waits in any."""
    made = {name: Steps(arch, name, device, size, flags) for name in NETWORKS}
    calls = {(name, task.kind): own.step(number) for name, own in made.items() for number, task in enumerate(TASKS)}
    times = step_times(calls, device, rounds)
    rows = [{"network": name, "task": kind, "ms": ms, "images/s": divided(1000 * made[name].args.batch_size, ms),
             "of dense": divided(ms, times["dense", kind])} for (name, kind), ms in times.items()]
    return rows, [waits(", ".join(key), call) for key, call in calls.items() if isinstance(times[key], float)]


def memory_rows(arch, device, size, flags):
    for name in NETWORKS:
        own = Steps(arch, name, device, size, flags)
        yield {"network": name, **{f"{task.kind}, peak GB": divided(peak_of(own.step(number)), 1e9)
                                   for number, task in enumerate(TASKS)}}
        del own
        free()


def repeated_rows(arch, device, size, flags, rounds=2):
    """Whether the same steps, done twice from the same start, leave the same weights, bit by bit."""
    for name in NETWORKS:
        states = []
        for _ in range(2):
            own = Steps(arch, name, device, size, flags)
            for number in list(range(len(TASKS))) * rounds:
                own.step(number)()
            states.append(own.parts[0].state_dict())
        yield {"network": name, "steps": rounds * len(TASKS),
               "two runs are bit-equal": all(torch.equal(a, b) for a, b in zip(*(each.values() for each in states))),
               "finite": all(bool(tensor.isfinite().all()) for tensor in states[0].values())}
        free()


def part_g(report, device="cuda", archs=("vit_small", "vit_base"), size=256, flags=(), rounds=6, tokens=4133,
           width=384, mixtures=dict(batch=32, repeats=10, warmup=3)):
    report("Mixtures of experts, output and gradients in bfloat16 against float64.",
           list(correctness(device, tokens, width)))
    for arch in archs:
        mixture.measure(report, arch, **mixtures)
        rows, waiting = step_rows(arch, device, size, flags, rounds)
        report(f"One step of finetune_multi.py, {arch}, bf16, AdamW included, on a fixed batch of images of {size} "
               f"pixels.", rows)
        report("Peak of allocated memory in such a step, all of it.", list(memory_rows(arch, device, size, flags)))
        report('Does the CPU wait for the GPU inside a step (torch.cuda.set_sync_debug_mode("error"))?', waiting)
        free()
    report("The same steps twice.", list(repeated_rows(archs[0], device, size, flags)))
