"""Many tasks: one network with task-conditioned experts for segmentation, classification, boxes and landmarks at once.

M2DINO (arXiv 2603.18123) on FMC_UIA's data as downloaded, or your own in its layout, in its three paradigms: a model
per task, per clinical group, or one for all. Each network is chosen by its mean normalised validation score and scored
once on the test groups; the runs of one folder make one table of what training together gains or loses.

    python finetune_multi.py                                            # phantoms, four tasks of four kinds
    python finetune_multi.py --data FMC_UIA --ckpt dinov3_vits16.pth --paradigm task clinical all --seeds 3
    torchrun --nproc_per_node 8 finetune_multi.py --data FMC_UIA --ckpt last.pt
"""

import argparse
import json
import os

import numpy as np
import torch
import torch.distributed as dist

import runtime
from arguments import add_run, by_data, stage_parser
from labelled import task_sets
from labelled.fmc_uia import GROUPS_FILE
from model import SIZES
from networks.baselines import DEFAULT_SIZE, common_network, full_layerscale, list_models, open_runs
from networks.weights import trained_weights
from runtime import cosine_schedule
from scores.challenge import challenge_scores, leaderboard, sound_scores, table
from scores.comparison import number
from scores.multi_report import Truth, compare_paradigms, methods_sentences, table_of_paradigms
from scores.plots import gates_png
from scores.report import PHANTOMS, check_output, count, files_of, find_copies, slug, write_json, write_split
from training import many_tasks
from training.segmenter import batches

SCRIPT = "finetune_multi.py"
WARMUP_FRACTION = 0.05  # of the learning rates, share of the run; then cosine to 0
PARADIGMS = ("task", "clinical", "all")
SIDES = ("fetal_head_pos_cls", "fetal_sacral_pos_cls", "cardiac_multi", "cervix_multi", "head_symphysis_multi")
PRESETS = {
    "m2dino": {},
    "cpu": dict(arch="vit_micro", img_size=64, iters=200, batch_size=16, lr=2e-3, backbone_lr=1e-3, channels=32,
                val_every=50, save_every=100),
}
# may differ between a run and its resumption; what the images and checkpoints are is checked by their digests
NOT_RECIPE = {"data", "tasks", "group_regex", "groups", "skip_wrong_rows", "val_fraction", "test_fraction", "test_seed",
              "paradigm", "ckpt", "seeds", "seed", "output_dir", "save_every", "preset", "eval_batch_size"}


def get_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    flag = dict(action=argparse.BooleanOptionalAction, default=False)
    add = p.add_argument_group("data").add_argument
    add("--data", help="folder with csv_files/, as FMC_UIA is downloaded; without it phantoms")
    add("--tasks", nargs="+", metavar="TASK", help="only these")
    add("--group_regex", help="first capture in an image's path is its patient, clip or examination")
    add("--groups", metavar="FILE.csv", help="task,group: clinical groups, of --paradigm clinical and of the table; "
        "default: those of FMC_UIA's tasks")
    add("--skip_wrong_rows", **flag, help="leave out rows that are wrong, instead of stopping")
    add("--val_fraction", type=float, default=0.1, help="share of groups kept for validation")
    add("--test_fraction", type=float, default=0.2, help="share of groups kept for the test")
    add("--test_seed", type=int, default=0, help="of the groups drawn for validation and test")
    add = p.add_argument_group("model").add_argument
    add("--paradigm", nargs="+", choices=PARADIGMS, default=["all"], help="a model per task, per group, for all")
    add("--ckpt", nargs="+", metavar="FILE", help="backbone to start from, or none; default: last.pt if it is here, "
        "else none")
    add("--arch", choices=SIZES, default="vit_small", help="of `none`, which is made as DINOv3's")
    add("--img_size", type=int, default=256, help="side that images are squashed to, a multiple of a patch's")
    add("--experts", type=int, default=4, help="of each mixture; 1 is the dense network")
    add("--moe_blocks", type=int, nargs="+", metavar="BLOCK", help="with experts, from 0; default: the second half")
    add("--top_k", type=int, help="experts that a token meets; default: all, weighed by the gate")
    add("--balance_weight", type=float, default=0.01, help="of the loss that keeps experts busy; with --top_k only")
    add("--task_dim", type=int, default=64, help="width of a task's embedding")
    add("--channels", type=int, default=128, help="of the DPT decoder and the box heads")
    add = p.add_argument_group("training").add_argument
    add("--iters", type=int, default=2000, help="steps of each task, in every paradigm")
    add("--batch_size", type=int, default=16, help="images per step, all of one task, over all processes")
    add("--lr", type=float, default=1e-4, help="learning rate of heads and experts; of all from scratch")
    add("--backbone_lr", type=float, default=1e-5, help="of the pretrained rest")
    add("--weight_decay", type=float, default=0.05, help="AdamW's, but for biases, norms and LayerScale")
    add("--clip_grad", type=float, default=1.0, help="largest gradient norm")
    add("--rope_rescale", type=float, default=1.0, help="largest factor of coordinates in training; DINOv3's is 2")
    add("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="light, gamma, noise, grid, affine, flip")
    add("--no_flip", nargs="+", default=[], metavar="TASK", help="never mirrored, like landmarks and, of FMC_UIA, "
        + ", ".join(SIDES))
    add("--val_every", type=int, default=200, help="steps of each task between validations, of which the best counts")
    add = add_run(p, PRESETS, "multi", 32, 200, "steps of each task").add_argument
    args, _ = p.parse(argv, by_data(PRESETS))
    check_args(p, args)
    return args


def check_args(p, args):
    if args.data is None and (args.group_regex or args.skip_wrong_rows):
        p.error("--group_regex and --skip_wrong_rows need --data: phantoms have no files")
    if len(args.ckpt or ()) > 1:
        p.error("--ckpt: one backbone to start from; several finished runs are for predict.py")
    least = dict(seeds=1, seed=0, test_seed=0, iters=1, batch_size=1, eval_batch_size=1, save_every=1, val_every=1,
                 img_size=1, weight_decay=0, experts=1, task_dim=1, channels=32, backbone_lr=0, balance_weight=0,
                 rope_rescale=1, top_k=1)
    p.check(args, least, shares=("val_fraction", "test_fraction"), positive=("lr", "clip_grad"))
    if args.channels % 32:  # half of them in groups of 16
        p.error(f"--channels must be a multiple of 32, not {args.channels}")
    if args.top_k is not None and args.top_k > args.experts:
        p.error(f"--top_k {args.top_k}: there are {args.experts} experts")
    args.groups = args.groups or GROUPS_FILE
    args.paradigm = list(dict.fromkeys(args.paradigm))
    args.no_flip = sorted({*SIDES, *args.no_flip})


# ---------------------------------------------------------------- one network

def networks(paradigm, tasks, clinical):
    """{name of a network: numbers of its tasks}. One of a single task is called alike in all paradigms: it is the same
    run, and is trained once."""
    everything = list(range(len(tasks)))
    if paradigm == "task":
        groups = {task.name: [i] for i, task in enumerate(tasks)}
    elif paradigm == "all":
        groups = {"all": everything}
    else:
        groups = {}
        for i, task in enumerate(tasks):
            groups.setdefault(clinical[task.name], []).append(i)
    names = [f"task-{slug(tasks[own[0]].name)}" if len(own) == 1 else "all" if own == everything
             else f"clinical-{slug(group)}" for group, own in groups.items()]
    for name, group in zip(names, groups):
        if names.count(name) > 1:
            raise ValueError(f"two networks would be called {name}, one of them for {group}: rename it")
    return dict(zip(names, groups.values()))


def fine_tune(backbone, info, data, numbers, args, seed, path, device, rank, world_size, received):
    """One run: (values of the tasks' test images, best step and scores, gate shares), or None if it was stopped. `path`
    keeps its state, and at last its best step's weights."""
    canvases = data.images.at(args.img_size)
    stats, batch, rounds = (info["mean"], info["std"]), args.batch_size, args.iters
    tasks, per = [data.tasks[number] for number in numbers], [data.per[number] for number in numbers]
    how = dict(experts=args.experts, blocks=args.moe_blocks, top_k=args.top_k, task_dim=args.task_dim,
               channels=args.channels)
    shares = [task_sets.class_shares(*both) for both in zip(tasks, per)]
    network, gradients, optimizer = many_tasks.build(backbone, tasks, shares, how, seed, device)
    rates = argparse.Namespace(**{**vars(args), "backbone_lr": args.lr if info["digest"] is None else args.backbone_lr})
    steps = rounds * len(tasks)
    share_of_rate = cosine_schedule(1.0, 0.0, steps, round(WARMUP_FRACTION * steps))
    turns = many_tasks.whose_turn(len(tasks), rounds, seed)

    # ---- resume ----
    identity = runtime.run_identity(rates, NOT_RECIPE, info, seed=seed, warmup_fraction=WARMUP_FRACTION,
                                    tasks=[list(task) for task in tasks],
                                    images=task_sets.digest_of(data, numbers, canvases))
    worst = {"normalised": -np.inf, "step": 0, "scores": {}}
    run = runtime.open_run(path, identity, network, optimizer, worst, device, rank == 0, [task.name for task in tasks])
    if "values" in run.saved:
        return run.saved["values"], run.best, run.saved["gates"]
    guesses = {number: many_tasks.guessed_score(data.tasks[number], data.per[number], data) for number in numbers}

    # ---- loop ----
    own = slice(batch * rank // world_size, batch * (rank + 1) // world_size)
    taken = np.bincount(turns[:run.step], minlength=len(tasks))  # turns that each task has had
    drawn = [batches(data.units[part.images[part.train]], seed, range(first, rounds), batch)
             for part, first in zip(per, taken)]
    for step in runtime.training_steps(run, network, optimizer, steps, args.val_every * len(tasks),
                                       args.save_every * len(tasks), received):
        turn = turns[step]
        task, part = tasks[turn], per[turn]
        rows = part.train[next(drawn[turn])[own]]
        x, target = task_sets.make_batch(task, part, canvases, rows, own, seed, taken[turn], batch, args, stats,
                                         device)
        rescale = many_tasks.draw_scales(network, args.rope_rescale, seed, step, rank)
        loss = many_tasks.train_step(network, gradients, optimizer, turn, x, target, batch, share_of_rate[step], rates,
                                     rescale)
        runtime.add_loss(run, loss, turn)
        taken[turn] += 1
        if run.validates:
            scores, found, gates = many_tasks.validate(network, numbers, data, canvases, guesses, stats, args, device,
                                                       rank, world_size)
            run.found = {"normalised": found, "step": step + 1, "scores": scores}
            run.record = {"validation": scores, "normalised": found, "gates": gates,
                          "lr": float(share_of_rate[step] * args.lr)}
    if run.stopped:
        return None

    # ---- test, once, with the best step's weights ----
    network.load_state_dict(run.best.pop("state"))
    network.eval()
    values, gates = {}, {}
    for position, (task, part) in enumerate(zip(tasks, per)):
        found, shares = many_tasks.test_values(network, position, task, part, data, canvases, stats, args, device,
                                               rank, world_size)
        values[task.name] = {name: torch.from_numpy(value) for name, value in found.items()}
        if shares is not None:
            gates[task.name] = torch.from_numpy(shares)
    used = np.unique(np.concatenate([part.images[part.train] for part in per]))
    runtime.save_run(run, values=values, gates=gates, tasks=[list(task) for task in tasks], network_of=how,
                     img_size=args.img_size, **trained_weights(network, info, data.images, used))
    if dist.is_initialized():
        dist.barrier()  # another paradigm may ask for this very run
    return values, run.best, gates


def run_paradigm(paradigm, model, like, data, args, device, rank, world_size, received):
    """Every network of a paradigm, every seed: ({task: [values of each run]}, {network: [what was chosen]}, {network:
    gate shares of the first run}, info of the backbone); stopped by a signal: None."""
    values, chosen, gates = {task.name: [] for task in data.tasks}, {}, {}
    for name, numbers in networks(paradigm, data.tasks, data.clinical).items():
        if rank == 0:
            print(f"{name}: {count(len(numbers), 'task')}", flush=True)
        for start in open_runs([model], like, args, rank == 0, pos="rope"):
            if start.info["digest"] is None:
                full_layerscale(start.backbone)
            path = os.path.join(args.output_dir, f"{name}-seed{start.seed}.pt")
            found = fine_tune(start.backbone, start.info, data, numbers, args, start.seed, path, device, rank,
                              world_size, received)
            if found is None:
                return None
            for task, own in found[0].items():
                values[task].append({key: value.numpy() for key, value in own.items()})
            chosen.setdefault(name, []).append(found[1])
            gates.setdefault(name, {task: shares.tolist() for task, shares in found[2].items()})
    return values, chosen, gates, start.info


# ---------------------------------------------------------------- what is said about it

def lists_of(values):
    """Arrays of one run as lists for JSON, nan as None."""
    return {name: np.where(np.isnan(value), None, value).tolist() for name, value in values.items()}


def arrays_of(lists):
    return {name: np.array(value, np.float64) for name, value in lists.items()}


def truth_of(data):
    """{task: multi_report.Truth} of the test images."""
    truth = {}
    for task, own in zip(data.tasks, data.per):
        images = own.images[own.test]
        labels = many_tasks.labels_of(task, own, own.test)
        guess = many_tasks.guess_values(task, own, data, own.test, True)
        truth[task.name] = Truth(task.kind, task.K, data.units[images], labels, np.hypot(*data.sizes[images].T), guess)
    return truth


def challenge_table(values, truth, data):
    """A paradigm's scores as the challenge computes them, and sound ones beside them, as challenge.score_submission has
    them: means over runs of the test images."""
    found = {"challenge": {}, "sound": {}, "images": {}, "missing": dict.fromkeys(values, 0)}
    for task in data.tasks:
        own, runs = truth[task.name], values[task.name]
        found["images"][task.name] = len(own.units)
        for name, each in (("challenge", [challenge_scores(task, run, own.labels) for run in runs]),
                           ("sound", [sound_scores(task, run, own.labels, own.diagonals) for run in runs])):
            found[name][task.name] = {score: number(np.mean([one[score] for one in each])) for score in each[0]}
    return {**found, "leaderboard": leaderboard(found["challenge"], data.tasks)}


def tasks_of_networks(paradigm, data):
    return {name: [data.tasks[number].name for number in own]
            for name, own in networks(paradigm, data.tasks, data.clinical).items()}


def read_paradigms(folder, settings, data):
    """What finished runs left in `folder`: ({paradigm: {task: [values of each run]}}, sentences on those left out)."""
    found, notes = {}, []
    for paradigm in PARADIGMS:
        path = os.path.join(folder, f"{paradigm}.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                report = json.load(file)
            differ = sorted(key for key in settings if report["settings"].get(key) != settings[key])
            if report["networks"] != tasks_of_networks(paradigm, data):
                differ.append("clinical grouping")
            if differ:
                notes.append(f"{path} is of another {', '.join(differ)}: left out of the table")
            else:
                found[paradigm] = {task: [arrays_of(run) for run in runs] for task, runs in report["values"].items()}
    return found, notes


def settings_of(data, args, info):
    """What runs must have in common to be compared: recipe, data, parts, start and seeds."""
    settings = {key: value for key, value in vars(args).items() if key not in NOT_RECIPE}
    settings.update(images=task_sets.digest_of(data, range(len(data.tasks)), data.images.at(args.img_size)),
                    start=info["digest"], config=info["config"], seed=args.seed, seeds=args.seeds,
                    warmup_fraction=WARMUP_FRACTION)
    return json.loads(json.dumps(settings))


def draw_gates(path, gates, blocks, data):
    """The picture of a network's gates: which experts serve which task, block by block."""
    tasks = [task.name for task in data.tasks if task.name in gates]
    shares = np.array([gates[task] for task in tasks])  # (T, L, E)
    if shares.size:
        gates_png(path, shares, tasks, [f"block {block}" for block in blocks],
                  f"mean gates of {'phantom' if data.layout == 'phantoms' else 'test'} images, first run")


def parts_of(data):
    """What report.py asks of a set with one task: the images of each part, whatever task they serve."""
    parts = {part: np.unique(np.concatenate([own.images[getattr(own, part)] for own in data.per]))
             for part in ("train", "val", "test")}
    return argparse.Namespace(**parts, images=data.images, names=data.names, groups=np.array(data.groups),
                              grouped_by=data.grouped_by)


def leak_sentences(files, copies):
    """Whether test images had been seen before: by the backbone's pretraining, or in train under another name."""
    backbone, = files["backbone"]
    if backbone["sha256"] is None:
        return ["The backbone starts from scratch.", copies["sentence"]]
    return [f"{backbone['path']}: {backbone['pretraining set']}.", copies["sentence"]]


def counts_lines(data, args):
    for task, own in zip(data.tasks, data.per):
        parts = ", ".join(f"{part} {len(rows):,}" for part, rows in
                          (("train", own.train), ("validation", own.val), ("test", own.test)))
        yield f"  {task.name}: {task.kind}, {parts} images; mirrored: {'yes' if task_sets.flips(task, args) else 'no'}"


def main(args):
    # ---- setup ----
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    args.ckpt = args.ckpt or (["last.pt"] if os.path.exists("last.pt") else ["none"])
    model, = list_models(args.ckpt, "from scratch")
    if len(model.paths) > 1:
        raise ValueError(f"--ckpt {args.ckpt[0]}: one backbone to start from; several finished runs are for "
                         f"predict.py")
    if str(model.paths[0]).startswith("timm:"):
        raise ValueError(f"--ckpt {args.ckpt[0]}: timm's networks know no tasks; give a file of pretrain.py, of DINOv2 "
                         f"or DINOv3")
    _, like = common_network([model], args.img_size, DEFAULT_SIZE)
    patch = like["config"]["patch_size"] if like else 8 if args.arch == "vit_micro" else 16
    args.img_size = max(1, round(args.img_size / patch)) * patch
    depth = (like["config"] if like else SIZES[args.arch])["depth"]
    args.moe_blocks = sorted({*(args.moe_blocks or range(depth // 2, depth))})  # in the order of the forward
    if not all(0 <= block < depth for block in args.moe_blocks):
        raise ValueError(f"--moe_blocks {' '.join(map(str, args.moe_blocks))}: blocks are 0 to {depth - 1}")
    if args.rope_rescale != 1 and like and like["config"].get("pos") != "rope":
        raise ValueError(f"--rope_rescale {args.rope_rescale:g} is for rotary positions, those of "
                         f"{model.paths[0]} are learned: leave it out")
    data = task_sets.open_data(args, clinical="clinical" in args.paradigm)
    if unknown := {*args.no_flip} - {*SIDES} - {task.name for task in data.tasks}:
        raise ValueError(f"--no_flip {' '.join(sorted(unknown))}: the tasks are "
                         f"{', '.join(task.name for task in data.tasks)}")
    os.makedirs(args.output_dir, exist_ok=True)
    for paradigm in args.paradigm:
        networks(paradigm, data.tasks, data.clinical)  # names are told before the work
    for name in (*PARADIGMS, "paradigms"):
        check_output(os.path.join(args.output_dir, f"{name}.json"), "--output_dir's", SCRIPT)
    received, (rank, world_size, device) = runtime.stop_on_signals(), runtime.setup()
    torch.backends.cudnn.deterministic = True  # convolutions, or no run could be repeated to the bit
    if args.batch_size < world_size:
        raise ValueError(f"{world_size} processes for batches of {args.batch_size} images: --nproc_per_node "
                         f"{args.batch_size} is the most")
    if rank == 0:
        runtime.show_run(args, device, world_size)
        print(f"{data.layout}: {len(data.names):,} images of {len(np.unique(data.groups)):,} groups (by "
              f"{data.grouped_by}); no image or group is in two parts")
        print("\n".join([*counts_lines(data, args), *data.notes]), flush=True)

    # ---- networks ----
    found = {}
    for paradigm in args.paradigm:
        found[paradigm] = run_paradigm(paradigm, model, like, data, args, device, rank, world_size, received)
        if found[paradigm] is None:
            break
    if not runtime.goes_on(rank, None in found.values()):
        return

    # ---- report ----
    truth, parts = truth_of(data), parts_of(data)
    info, copies = list(found.values())[-1][3], find_copies(parts)  # all start from one backbone
    files = files_of({"backbone": [{**info, "fed": args.img_size}]}, parts)
    leaks = leak_sentences(files, copies)
    write_split(os.path.join(args.output_dir, "split.csv"), {"image": data.names, "group": data.groups}, parts)
    settings = settings_of(data, args, info)
    for paradigm, (values, chosen, gates, _) in found.items():
        scores = challenge_table(values, truth, data)
        print("\n".join(["", f"{paradigm}: test scores, mean of {count(args.seeds, 'run')}; left of the bar as the "
                         f"challenge computes them, right of it sound ones; distances in pixels", "",
                         *table(scores, data.tasks)]))
        report = {"phantom": args.data is None, "paradigm": paradigm, "settings": settings, "chosen": chosen,
                  "networks": tasks_of_networks(paradigm, data), "files": files, "copies": copies, "scores": scores,
                  "gates": gates,
                  "values": {task: [lists_of(run) for run in runs] for task, runs in values.items()}}
        write_json(os.path.join(args.output_dir, f"{paradigm}.json"), SCRIPT, args, device, report)
        for name, own in gates.items():
            draw_gates(os.path.join(args.output_dir, f"gates-{name}.png"), own, args.moe_blocks, data)
    paradigms, notes = read_paradigms(args.output_dir, settings, data)
    compared = compare_paradigms(paradigms, truth, data.clinical, args.seed)
    print("\n".join(["", *leaks, *notes, "", *table_of_paradigms(compared)]))
    if args.data is None:
        print(f"\n{PHANTOMS}")
    path = os.path.join(args.output_dir, "paradigms.json")
    write_json(path, SCRIPT, args, device, {"phantom": args.data is None, **compared, "files": files, "copies": copies,
                                            "methods": " ".join([methods_sentences(compared), *leaks])})
    print(f"\nwrote {path}, a JSON file per paradigm and gates-*.png beside it")


if __name__ == "__main__":
    with runtime.clear_errors():
        main(get_args())
