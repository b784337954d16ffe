"""pretrain.py --init: what the file decides, what stays of it, what a checkpoint of such a run says."""

import numpy as np
import pytest
import torch
from stage_tools import one_thread  # noqa: F401

import data
import pretrain
import runtime
from frames import leakage
from losses import DINOHead
from model import SIZES, VisionTransformer
from networks.weights import IMAGENET_MEAN_STD, load_backbone, merge_seen
from runtime import parameter_groups
from tools import dry_run, preview

OURS = dict(img_size=16, patch_size=4, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_register_tokens=2,
            init_values=0.5)
ROPE = dict(OURS, pos="rope", norm_eps=1e-5, mask_k_bias=True)  # as DINOv3
DINOV2 = dict(img_size=70, patch_size=14, in_chans=3, embed_dim=64, depth=2, num_heads=1)  # 5 x 5 positions
HEADS = ["--head_n_prototypes", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8"]
CROPS = ["--global_crops_size", "16", "--local_crops_size", "8"]
CPU = torch.device("cpu")


def save(path, config, seed=0, **more):
    """A file with one backbone of random weights of visible size: ours, or DINOv2's layout for three channels."""
    torch.manual_seed(seed)
    model = VisionTransformer(**config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    if config["in_chans"] == 3:
        torch.save(model.state_dict(), path)
    else:
        teacher = {f"backbone.{key}": value for key, value in model.state_dict().items()}
        teacher.update({f"dino_head.{key}": value for key, value in DINOHead(32, 32, 16, 8).state_dict().items()})
        torch.save({"teacher": teacher, "config": config, "mean": 0.3, "std": 0.2, **more}, path)
    return model.eval()


@pytest.fixture
def ours(tmp_path):
    save(tmp_path / "ours.pt", OURS)
    return str(tmp_path / "ours.pt")


@pytest.fixture
def rope(tmp_path):
    save(tmp_path / "rope.pt", ROPE)
    return str(tmp_path / "rope.pt")


@pytest.fixture
def dinov2(tmp_path):
    save(tmp_path / "dinov2.pth", DINOV2)
    return str(tmp_path / "dinov2.pth")


def arguments(init, *more):
    return pretrain.get_args(["--preset", "cpu", "--init", init, *HEADS, *map(str, more)])


def networks(init, *more, mean=0.3, std=0.2):
    args = arguments(init, *more)
    start = pretrain.open_init(args, mean, std)
    return args, start, *pretrain.build_networks(args, CPU, start)


# ---------------------------------------------------------------- flags

def test_sizes_come_from_the_file(ours, dinov2):
    for preset, sizes in (("cpu", (42, 28)), ("ultradino", (224, 98))):
        args = pretrain.get_args(["--preset", preset, "--init", dinov2])
        pretrain.open_init(args)
        assert (args.global_crops_size, args.local_crops_size) == sizes and args.patch_size == 14
        assert args.arch == "width 64, depth 2" and args.num_register_tokens == 0
    args = arguments(ours, "--local_crops_size", 12)
    _, info = pretrain.open_init(args)
    assert (args.global_crops_size, args.local_crops_size) == (48, 12) and args.layerscale == 0.5
    assert info["config"] == dict(OURS, img_size=48, drop_path_rate=0.0)
    assert not hasattr(args, "fit_crops")  # it is no argument of the run


def test_a_known_size_is_named(tmp_path):
    save(tmp_path / "micro.pt", dict(OURS, **SIZES["vit_micro"]))
    args = arguments(str(tmp_path / "micro.pt"))
    pretrain.open_init(args)
    assert args.arch == "vit_micro"


@pytest.mark.parametrize("flag, value", [("arch", "vit_small"), ("patch_size", 8), ("num_register_tokens", 4),
                                         ("layerscale", 0.3), ("init_std", 0.08)])
def test_what_the_file_decides_is_no_flag(flag, value, capsys):
    """Also if it is given as the preset has it."""
    with pytest.raises(SystemExit):
        arguments("any.pt", f"--{flag}", value)
    assert f"--{flag} beside --init: the file decides" in capsys.readouterr().err


def test_unfit_files_and_sizes_get_a_sentence(dinov2, tmp_path, capsys):
    with pytest.raises(ValueError, match="--local_crops_size 96 is not a multiple of the patch size of --init .*, 14"):
        pretrain.open_init(arguments(dinov2, "--local_crops_size", 96))
    with pytest.raises(FileNotFoundError, match="none.pt: no such"):
        pretrain.open_init(arguments("none.pt"))
    with pytest.raises(SystemExit):
        arguments("timm:vit_tiny_patch16_224")
    assert "timm:vit_tiny_patch16_224: training goes on in this project's own transformer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        arguments(dinov2, "--freeze_backbone_fraction", 1.5)


@pytest.mark.parametrize("preset", pretrain.PRESETS)
def test_init_protects_by_default_and_can_be_overridden(preset):
    scratch, init = (vars(pretrain.get_args(["--preset", preset, *more])) for more in ([], ["--init", "any.pt"]))
    for name, value in pretrain.INIT[preset].items():
        assert init[name] == value != scratch[name], name
        again = pretrain.get_args(["--preset", preset, "--init", "any.pt", f"--{name}", str(scratch[name])])
        assert getattr(again, name) == scratch[name]
    assert init["base_lr"] < scratch["base_lr"] and init["momentum_teacher"] > scratch["momentum_teacher"]
    assert init["freeze_backbone_fraction"] > scratch["freeze_backbone_fraction"] == 0
    assert init["drop_path_rate"] <= 0.1


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize("mean, std", [(0.3, 0.2), (0.15, 0.25)])
@pytest.mark.parametrize("kind", ["ours", "rope", "dinov2"])
def test_features_before_a_step_are_the_files(kind, mean, std, request):
    """Of grey images, repeated for three channels, each with the statistics that its network was made for."""
    path = request.getfixturevalue(kind)
    args, _, student, teacher = networks(path, mean=mean, std=std)
    model, info = load_backbone(path)
    grey = torch.rand(3, 1, args.global_crops_size, args.global_crops_size)
    theirs_mean, theirs_std = (torch.tensor(info[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        want = model.forward_features((grey.expand(-1, model.in_chans, -1, -1) - theirs_mean) / theirs_std)
        for network in (student, teacher):
            ours = network.eval().backbone.forward_features((grey - mean) / std)
            for name in ("x_norm_clstoken", "x_norm_patchtokens"):
                assert (ours[name] - want[name]).norm() < 1e-5 * want[name].norm(), name
    assert student.backbone.in_chans == 1
    if kind == "dinov2":
        assert info["mean"] == IMAGENET_MEAN_STD[0]


def test_positions_of_a_crop_size_that_the_file_does_not_have(dinov2):
    """3 x 3 patches in training, 5 x 5 in the file: interpolated once, as the file's own network does at that size."""
    _, _, student, _ = networks(dinov2)
    model, _ = load_backbone(dinov2)
    assert student.backbone.pos_embed.shape == (1, 10, 64) and model.pos_embed.shape == (1, 26, 64)
    assert torch.equal(student.backbone.pos_embed, model.positions((3, 3)))


def test_heads_are_fresh(ours):
    theirs = torch.load(ours, weights_only=True)["teacher"]
    states = [networks(ours, *CROPS, "--seed", seed)[2].state_dict() for seed in (0, 0, 1)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])
        if key.startswith("backbone."):
            assert torch.equal(value, states[2][key]), key
    key = "dino_head.last_layer.weight_v"
    assert not torch.equal(states[0][key], states[2][key]) and not torch.equal(states[0][key], theirs[key])
    assert torch.equal(states[0]["backbone.blocks.0.attn.qkv.weight"], theirs["backbone.blocks.0.attn.qkv.weight"])


# ---------------------------------------------------------------- frozen steps

class FakePack:
    def __init__(self, images=24, canvas=24):
        self.canvases = np.random.default_rng(0).integers(0, 255, (images, canvas, canvas), dtype=np.uint8)
        self.sizes, self.groups = np.tile([40, 30], (images, 1)), np.arange(images)

    def __len__(self):
        return len(self.canvases)


@pytest.mark.parametrize("kind", ["ours", "rope"])
def test_frozen_backbone_stays_bit_equal_while_heads_learn(kind, request):
    args, _, student, teacher = networks(request.getfixturevalue(kind), *CROPS, "--batch_size_per_gpu", 4,
                                         "--drop_path_rate", 0.2)
    buffers, centers, optimizer = pretrain.build_state(student, teacher, args)
    batches, steps = data.PretrainBatches(FakePack(), args), 4
    schedule = dict(lr=1e-3, weight_decay=0.4, momentum=0.5, teacher_temp=0.05, freeze_last_layer=False)

    def state():
        return {f"{name} {key}": value.clone() for name, network in (("student", student), ("teacher", teacher))
                for key, value in network.state_dict().items()}

    for step in range(steps):
        before, frozen = state(), step < 2
        micros = data.to_device(batches[step], CPU, args, 0.3, 0.2)
        drops = list(pretrain.draw_drops(student.backbone, micros, 0, step, 0))
        stats = pretrain.train_step(student, teacher, optimizer, buffers, centers, micros,
                                    dict(schedule, freeze_backbone=frozen), args, 4, drops)
        assert stats["finite"] == 1 and stats["grad_norm_backbone"] > 0  # the backbone has a gradient all along
        after = state()
        still = {key for key in after if torch.equal(after[key], before[key])}
        assert still == ({key for key in after if " backbone." in key} if frozen else set()), (step, still)


def test_groups_of_backbone_and_heads(ours):
    """Split by where a parameter is, rates and decay as runtime.parameter_groups has them: the norm is no head."""
    _, _, student, _ = networks(ours)
    names = {id(p): name for name, p in student.named_parameters()}
    found = {names[id(p)]: group for group in pretrain.optimizer_groups(student, 0.9) for p in group["params"]}
    want = {names[id(p)]: group for group in parameter_groups(student, 0.9) for p in group["params"]}
    assert found.keys() == want.keys() == set(names.values())
    for name, group in found.items():
        assert group["is_backbone"] == name.startswith("backbone.")
        assert all(group[key] == want[name][key] for key in ("lr_multiplier", "wd_multiplier", "is_last_layer"))


def test_frozen_share_of_the_run():
    args = arguments("any.pt", "--freeze_backbone_fraction", 0.25)
    assert pretrain.schedules(args, 40, 32)["freeze_backbone"].tolist() == [True] * 10 + [False] * 30
    assert not pretrain.schedules(pretrain.get_args(["--preset", "cpu"]), 1000, 32)["freeze_backbone"].any()


# ---------------------------------------------------------------- what was seen

class Digests:
    """Of a pack: content, looks, groups named under a salt."""

    def __init__(self, number, salt=None, names=()):
        rng = np.random.default_rng(number)
        self.seen = {"content": rng.integers(0, 2 ** 63, 5).astype(np.uint64),
                     "looks": rng.integers(0, 2 ** 63, (5, leakage.WORDS)).astype(np.uint64)}
        if salt:
            digests = np.array([leakage.salted(name, salt) for name in names], np.uint64)
            self.seen.update(group_digests=digests, salt=salt)

    def digests(self):
        return dict(self.seen)


def found(seen, *packs, groups=None):
    """How many of the packs' images, or of images of these groups, a checkpoint says it has seen, and of how many."""
    content, looks = (np.concatenate([pack.seen[kind] for pack in packs]) for kind in ("content", "looks"))
    if groups:
        content, looks = content[:len(groups)] ^ 1, np.zeros_like(looks[:len(groups)])  # unknown, without structure
    counts, _, _ = leakage.overlap(seen, content, looks, groups)
    return counts["seen"], counts["images"]


def test_images_of_the_first_pretraining_stay_seen():
    new, old, stranger = Digests(0), Digests(1), Digests(2)
    seen = merge_seen(new.digests(), old.digests())
    assert found(seen, new, old) == (10, 10) and found(seen, stranger) == (0, 5)
    again = merge_seen(new.digests(), seen)  # on the same pack: no image twice
    assert len(again["content"]) == len(again["looks"]) == 10
    assert again["content"].dtype == again["looks"].dtype == torch.uint64
    alone = merge_seen(new.digests(), None)  # no --init, or a file that does not say what it has seen
    assert alone.keys() == new.seen.keys() and found(alone, new, old) == (5, 10)
    assert all(torch.is_tensor(alone[kind]) for kind in ("content", "looks"))  # checkpoints hold no arrays


@pytest.mark.parametrize("salts, counted", [((b"one", b"one"), 2), ((b"one", b"two"), 1), ((None, b"two"), 1),
                                            ((b"one", None), 1)])
def test_groups_are_kept_where_their_salt_allows(salts, counted):
    """Of groups "a", of the new pack, and "b", of the earlier one; under two salts only the new one's can be kept."""
    new, old = Digests(0, salts[0], ["a"]), Digests(1, salts[1], ["b"])
    seen = merge_seen(new.digests(), old.digests())
    assert found(seen, new, groups=["a", "b", "c"]) == (counted, 3) and len(seen["group_digests"]) == counted
    assert found(seen, new, groups=["b"] if salts[0] is None else ["a"]) == (1, 1)
    assert found(seen, new, old) == (10, 10)


# ---------------------------------------------------------------- a whole run

@pytest.fixture
def frames(tmp_path):
    """A folder of 12 frames in 3 clips, packed by the first run."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for clip in range(3):
        (tmp_path / "frames" / f"clip{clip}").mkdir(parents=True)
        for frame in range(4):
            pixels = rng.integers(0, 255, (20, 30), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "frames" / f"clip{clip}" / f"{frame}.png")
    return tmp_path / "frames"


def train(monkeypatch, frames, out, init, *more, stop_after=None):
    """pretrain.main in this process; `stop_after` so many checkpoints it is killed."""
    saves = []

    def save_checkpoint(path, checkpoint):
        write(path, checkpoint)
        saves.append(checkpoint["step"])
        if len(saves) == stop_after:
            raise KeyboardInterrupt

    write = runtime.save_checkpoint
    args = arguments(init, "--reference_ops", "--data", frames, "--output_dir", out, *CROPS, "--canvas", 24,
                     "--num_workers", 0, "--log_every", 1, "--batch_size_per_gpu", 4, "--total_samples", 32,
                     "--save_every", 2, "--freeze_backbone_fraction", 0.4, *more)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "stop_on_signals", list)  # pytest keeps its own
        patch.setattr(runtime, "save_checkpoint", save_checkpoint)
        if stop_after:
            with pytest.raises(KeyboardInterrupt):
                pretrain.main(args)
        else:
            pretrain.main(args)
    return torch.load(out / "last.pt", weights_only=True)


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_resumed_equals_uninterrupted_and_another_file_is_another_run(frames, ours, tmp_path, monkeypatch, capsys):
    """Killed in the frozen phase; the file counts by its content, wherever it lies, and its path is not kept."""
    whole = train(monkeypatch, frames, tmp_path / "whole", ours)
    half = train(monkeypatch, frames, tmp_path / "killed", ours, stop_after=1)
    start = torch.load(ours, weights_only=True)["teacher"]
    assert half["step"] == 2 and whole["step"] == 8
    for key, value in half["student"].items():
        if key.startswith("backbone.blocks"):
            assert torch.equal(value, start[key]) and not torch.equal(value, whole["student"][key]), key
    torch.save(half, tmp_path / "half.pt")
    (before, info), (after, folded) = (load_backbone(str(path)) for path in (ours, tmp_path / "half.pt"))
    grey = torch.rand(2, 1, 16, 16)
    with torch.no_grad():  # the pack's statistics took the place of the file's
        want, got = (model((grey - its["mean"]) / its["std"]) for model, its in ((before, info), (after, folded)))
    assert folded["mean"] != info["mean"] and (got - want).norm() < 1e-5 * want.norm()
    moved = tmp_path / "elsewhere.pt"
    moved.write_bytes((tmp_path / "ours.pt").read_bytes())
    assert_equal(train(monkeypatch, frames, tmp_path / "killed", str(moved)), whole)
    assert str(tmp_path) not in str(whole)
    out = capsys.readouterr().out
    assert "resuming" in out and "from pretrain.py: width 32, depth 2, patch 4, sha256" in out
    assert "freeze_backbone_fraction 0.4, base_lr" in out

    backbone, info = load_backbone(str(tmp_path / "whole" / "last.pt"))  # what the rest of the project reads
    assert info["config"] == dict(OURS, drop_path_rate=0.0) and backbone.in_chans == 1
    assert whole["args"]["patch_size"] == 4 and whole["args"]["arch"] == "width 32, depth 2"

    train(monkeypatch, frames, tmp_path / "whole", ours)
    assert "is finished: 8 of 8 steps" in capsys.readouterr().out
    save(tmp_path / "ours.pt", OURS, seed=1)
    other = train(monkeypatch, frames, tmp_path / "whole", ours, stop_after=1)
    assert "another run (other init)" in capsys.readouterr().out and (tmp_path / "whole" / "last.old-1.pt").exists()
    assert other["identity"]["init"] != whole["identity"]["init"]


def test_a_run_on_a_run_has_seen_both(frames, ours, tmp_path, monkeypatch):
    """A checkpoint of ours as the file: its images count as seen, though training goes on with others."""
    first = train(monkeypatch, frames, tmp_path / "first", ours)
    rest = tmp_path / "rest"
    rest.mkdir()
    (frames / "clip2").rename(rest / "clip2")
    second = train(monkeypatch, rest, tmp_path / "second", str(tmp_path / "first" / "last.pt"))
    assert second["identity"]["data"] != first["identity"]["data"] and len(first["seen"]["content"]) == 12
    assert set(first["seen"]["content"].tolist()) == set(second["seen"]["content"].tolist())
    for key, value in first["teacher"].items():  # it did start there: fewer than 8 steps away, the half of them frozen
        if key.startswith("backbone.blocks"):
            assert (second["teacher"][key] - value).norm() < 0.2 * value.norm(), key


@pytest.mark.parametrize("kind, global_size", [("ours", 48), ("dinov2", 42)])
def test_dry_run_and_preview(kind, global_size, request, capsys, monkeypatch, tmp_path):
    path = request.getfixturevalue(kind)
    monkeypatch.setattr(dry_run, "MEASURED_SECONDS", 0)
    dry_run.main(arguments(path, "--reference_ops", "--batch_size_per_gpu", 2, "--total_samples", 4))
    model, _ = load_backbone(path)
    count = sum(p.numel() for p in model.parameters())
    side, own = global_size // model.patch_size, (model.pos_embed.shape[1] - 1)
    count += model.embed_dim * (side ** 2 - own) - (model.in_chans - 1) * model.embed_dim * model.patch_size ** 2
    assert f"{count:,} parameters in the backbone" in capsys.readouterr().out
    preview.main(arguments(path, "--output_dir", tmp_path / "picture"))
    assert (tmp_path / "picture" / "preview.png").exists() and "2 global crops" in capsys.readouterr().out
