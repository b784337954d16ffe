"""Loading that cannot go half wrong: layouts, refusals, positions, folders, grey images, models of timm."""

import argparse
import hashlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import runtime
from model import VisionTransformer
from networks.families import convert
from networks.weights import ULTRADINO_MEAN_STD, grey_backbone, load_backbone, load_strict
from runtime import parameter_groups

TINY = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=64, depth=2, num_heads=1, num_register_tokens=4)


def saved(tmp_path, checkpoint):
    path = str(tmp_path / "file.pt")
    runtime.save_checkpoint(path, checkpoint)
    return path


def same_features(a, b, channels=1):
    x = torch.randn(2, channels, 32, 32)
    return torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("layout", ["ours", "ultradino teacher", "ultradino full", "dinov2", "chunked"])
def test_layouts_load(tmp_path, layout):
    config = dict(TINY, in_chans=3 if layout == "dinov2" else 1)
    vit = VisionTransformer(**config)
    state = vit.state_dict()
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    teacher["dino_head.mlp.0.weight"] = torch.zeros(3, 3)
    checkpoint = {
        "ours": {"teacher": teacher, "config": config, "mean": 0.3, "std": 0.2,
                 "seen": {"content": torch.zeros(2, dtype=torch.uint64)}},
        "ultradino teacher": {"teacher": teacher},
        "ultradino full": {"model": {**{f"teacher.{key}": value for key, value in teacher.items()},
                                     "student.backbone.cls_token": torch.zeros(1), "dino_loss.center": torch.zeros(1)}},
        "dinov2": state,
        "chunked": {"teacher": {key.replace("blocks.", "blocks.0."): value for key, value in teacher.items()}},
    }[layout]
    loaded, info = load_backbone(saved(tmp_path, checkpoint))
    if layout == "dinov2":  # its files with registers interpolate to exact sizes, antialiased
        assert loaded.interpolate_offset == 0 and loaded.interpolate_antialias and len(info["mean"]) == 3
    else:
        assert info["mean"] == (0.3 if layout == "ours" else ULTRADINO_MEAN_STD[0])
    assert info["img_size"] == 32 and same_features(loaded, vit, config["in_chans"])
    assert info["family"] == {"ours": "pretrain.py", "dinov2": "DINOv2 + registers"}.get(layout, "UltraDINO")
    assert info["digest"] == hashlib.sha256((tmp_path / "file.pt").read_bytes()).hexdigest()
    assert (info["seen"] is not None) == (layout == "ours")


def test_giant_layout_is_inferred(tmp_path):
    vit = VisionTransformer(**{**TINY, "ffn_layer": "swiglu", "init_values": None, "num_register_tokens": 0})
    assert same_features(load_backbone(saved(tmp_path, vit.state_dict()))[0], vit)


@pytest.mark.parametrize("change, says", [
    (lambda state: state.pop("norm.weight"), "missing norm.weight"),
    (lambda state: state.update(extra=torch.zeros(1)), "left over extra"),
    (lambda state: state.update({"norm.bias": torch.zeros(3)}), r"norm.bias is \(3,\), the model has \(64,\)")])
def test_anything_missing_or_left_over_raises(change, says):
    state = VisionTransformer(**TINY).state_dict()
    change(state)
    with pytest.raises(ValueError, match=says):
        load_strict(VisionTransformer(**TINY), state, "file.pt")


def test_only_positions_are_resized():
    small, large = VisionTransformer(**TINY), VisionTransformer(**{**TINY, "img_size": 64})
    load_strict(large, small.state_dict(), "file.pt")
    assert torch.equal(large.pos_embed[:, 0], small.pos_embed[:, 0])
    assert torch.allclose(large.pos_embed, small.positions((8, 8)), atol=1e-6)
    down = torch.nn.functional.avg_pool2d(large.pos_embed[0, 1:].T.view(64, 8, 8), 2).flatten(1).T
    assert torch.corrcoef(torch.stack((down.flatten(), small.pos_embed[0, 1:].detach().flatten())))[0, 1] > 0.9
    with pytest.raises(ValueError, match="patch_embed.proj.weight"):
        load_strict(VisionTransformer(**{**TINY, "patch_size": 4}), small.state_dict(), "file.pt")


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_backbone(str(tmp_path / "none.pt"))
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="text.pt: damaged, or not a checkpoint"):
        load_backbone(str(text))
    with pytest.raises(ValueError, match="no DINOv2 backbone in this file"):
        load_backbone(saved(tmp_path, {"weights": torch.zeros(3)}))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = saved(tmp_path, VisionTransformer(**TINY).state_dict())
    content = bytearray(open(path, "rb").read())
    if damage == "flip":
        weight = torch.load(path)["blocks.0.mlp.fc1.weight"].numpy().tobytes()
        content[content.index(weight[:64]) + 1] ^= 1  # one bit of one weight
    else:
        del content[len(content) * 2 // 3:]
    open(path, "wb").write(content)
    with pytest.raises(ValueError, match="damaged"):
        runtime.load_checkpoint(path)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = saved(tmp_path, {"step": 1})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError):
        runtime.save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert runtime.load_checkpoint(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["file.pt"]


def test_checkpoints_with_arguments_load(tmp_path):
    """DINO's and iBOT's training files hold an argparse.Namespace; anything that would run code stays refused."""
    vit = VisionTransformer(**TINY)
    path = saved(tmp_path, {"teacher": vit.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3})
    assert same_features(load_backbone(path)[0], vit)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        load_backbone(saved(tmp_path, {**vit.state_dict(), "code": Runs()}))


class Runs:
    def __reduce__(self):
        return print, ("this must not run",)


def test_ultradinos_table_of_tensors():
    """Names and shapes of UltraDINO's ViT-S/16 file, 176 of them."""
    D = 384
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 197, D), "register_tokens": (1, 4, D), "mask_token": (1, D),
              "patch_embed.proj.weight": (D, 1, 16, 16), "patch_embed.proj.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,)}
    for i in range(12):
        layer = {"attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D),
                 "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,), "mlp.fc2.weight": (D, 4 * D)}
        layer |= {name: (D,) for name in ("attn.proj.bias", "mlp.fc2.bias", "norm1.weight", "norm1.bias",
                                          "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    family, _, config = convert({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, "file")
    vit = VisionTransformer(**config)
    assert len(shapes) == 176 and family == "UltraDINO" and vit.num_heads == 6 and not vit.interpolate_antialias
    assert {name: tuple(value.shape) for name, value in vit.state_dict().items()} == shapes


@pytest.mark.parametrize("change, how", [
    ({}, dict(size=(6, 3), antialias=True)),  # DINOv2 with registers
    ({"num_register_tokens": 0}, dict(scale_factor=(6.1 / 4, 3.1 / 4))),
    ({"in_chans": 1}, dict(scale_factor=(6.1 / 4, 3.1 / 4)))], ids=["registers", "none", "ultradino"])
def test_positions_are_resized_as_the_family_does(change, how, tmp_path):
    vit = VisionTransformer(**{**TINY, "in_chans": 3, **change})
    loaded = load_backbone(saved(tmp_path, vit.state_dict()))[0]
    patches = vit.pos_embed[:, 1:].detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)  # (1, C, 4, 4)
    want = F.interpolate(patches, mode="bicubic", **how).flatten(2).mT
    assert torch.allclose(loaded.positions((6, 3))[:, 1:], want, atol=1e-6)


@pytest.mark.parametrize("tensors, says", [
    (["decoder_embed.weight", "cls_token"], "a masked autoencoder"), (["visual.conv1.weight"], "CLIP"),
    (["vision_model.embeddings.class_embedding"], "CLIP"),
    (["layers.0.blocks.0.attn.qkv.weight"], "a Swin transformer"),
    (["blocks.0.attn.q_bias", "cls_token"], "a BEiT, as USFM is"),
    (["conv1.weight", "layer1.0.conv1.weight"], "convolutional"),
    (["rel_pos_bias.relative_position_bias_table", "cls_token"], "USFM"), (["stages.0.0.gamma"], "convolutional"),
    (["backbone.cls_token", "decode_head.atm.weight"], "a segmentation network"),
    (["encoder.weight"], "no DINOv2 backbone"),
    (["backbone.cls_token", "neck.weight"], "1 tensors beside the backbone"),
    (["cls_token"], "no patch_embed.proj.weight"),
    (["a.cls_token", "b.cls_token"], "no DINOv2 backbone")])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_other_architectures_are_named(tensors, says, wrapper, tmp_path):
    state = {name: torch.zeros(1) for name in tensors}
    path = saved(tmp_path, {wrapper: state} if wrapper else state)
    with pytest.raises(ValueError, match=f"file.pt: .*{says}.*; join it by --features or --predictions"):
        load_backbone(path)


def test_what_does_not_fit_is_counted(tmp_path):
    state = VisionTransformer(**{**TINY, "in_chans": 3}).state_dict()
    state = {name: value for name, value in state.items() if "norm2" not in name}
    state |= {f"head.{i}": torch.zeros(1) for i in range(4)}
    with pytest.raises(ValueError, match="missing blocks.0.norm2.weight; .*left over head.1; and 2 more; join it by"):
        load_backbone(saved(tmp_path, state))
    with pytest.raises(ValueError, match="width 60 is no multiple of 64"):
        load_backbone(saved(tmp_path, VisionTransformer(**{**TINY, "embed_dim": 60}).state_dict()))


def test_safetensors_is_asked_for(tmp_path, monkeypatch):
    path = str(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_backbone(path)
    (tmp_path / "model.safetensors").write_bytes(b"not what it says")
    with pytest.raises(ValueError, match="damaged, or not a safetensors file"):
        load_backbone(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="needs the package safetensors; install it with: pip install safetensors"):
        load_backbone(path)


# ---------------------------------------------------------------- grey images

@pytest.mark.parametrize("mean, std", [(None, None), (0.3, 0.1)])
def test_grey_of_one_channel(mean, std, tmp_path):
    vit = VisionTransformer(**{**TINY, "init_values": 0.5})
    path = saved(tmp_path, vit.state_dict())
    folded, info = grey_backbone(path, mean, std)
    grey = torch.rand(2, 1, 32, 32)
    want = vit.eval()((grey - ULTRADINO_MEAN_STD[0]) / ULTRADINO_MEAN_STD[1])
    got = folded((grey - info["mean"]) / info["std"])
    assert (info["mean"], info["std"]) == (ULTRADINO_MEAN_STD if mean is None else (mean, std))
    assert (got - want).norm() <= (1e-5 * want.norm() if mean else 0)
    assert torch.equal(folded.patch_embed.proj.weight, vit.patch_embed.proj.weight) == (mean is None)
    with pytest.raises(ValueError, match="std of grey images must be above 0"):
        grey_backbone(path, 0.1, 0.0)


# ---------------------------------------------------------------- timm, as far as its documented interface goes

class FakeTransformer(torch.nn.Module):
    """What timm's vision transformers show: prefix tokens first, forward_intermediates with maps and prefixes."""
    num_features, num_prefix_tokens = 8, 2
    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}

    def __init__(self):
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.patch_embed.patch_size = (4, 4)
        self.cls_token, self.reg_token = (torch.nn.Parameter(torch.randn(1, 1, 8)) for _ in range(2))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward_features(self, x):
        assert x.shape[2] == 16, "Input height doesn't match model (16)."
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token)] + [x], 1)
        for block in self.blocks:
            x = torch.tanh(block(x + x.mean(1, keepdim=True)))
        return x

    def forward_intermediates(self, x, indices, norm, intermediates_only, return_prefix_tokens):
        assert norm and intermediates_only and return_prefix_tokens
        x = self.forward_features(x)
        return [(x[:, 2:].mT.unflatten(2, (4, 4)), x[:, :2])] * indices


class FakeConvolution(torch.nn.Module):
    """A network of maps; `output_fmt` NHWC is Swin's."""
    num_features, pretrained_cfg, output_fmt = 6, FakeTransformer.pretrained_cfg, "NCHW"

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 6, 4, stride=4)

    def forward_features(self, x):
        x = self.stem(x)
        return x if self.output_fmt == "NCHW" else x.permute(0, 2, 3, 1)


@pytest.fixture
def timm(monkeypatch):
    """A stand-in whose models are the same at every call."""
    def create_model(name, pretrained, num_classes, **how):
        assert pretrained and num_classes == 0
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        if name != "vit" and how:
            raise TypeError("got an unexpected keyword argument 'dynamic_img_size'")
        torch.manual_seed(1)
        model = FakeTransformer() if name == "vit" else FakeConvolution()
        model.output_fmt = "NHWC" if name == "swin" else "NCHW"
        return model
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return create_model


def test_timm_transformer(timm):
    model, info = load_backbone("timm:vit")
    x, theirs = torch.randn(2, 3, 16, 16), timm("vit", True, 0)
    tokens, ours = theirs.forward_features(x), model.forward_features(x)
    assert torch.equal(ours["x_norm_clstoken"], tokens[:, 0]) and torch.equal(ours["x_norm_patchtokens"], tokens[:, 2:])
    (_, _), (patches, cls) = model.get_intermediate_layers(x, 2, return_class_token=True)
    assert torch.equal(cls, tokens[:, 0]) and torch.equal(patches, tokens[:, 2:])
    assert torch.equal(model.get_intermediate_layers(x)[0], patches) and torch.equal(model(x), cls)
    assert (model.embed_dim, model.patch_size, model.in_chans, len(model.blocks), model.training) == (8, 4, 3, 3, False)
    assert info["family"] == "timm" and info["img_size"] == 16 and info["mean"] == (0.5, 0.4, 0.3)
    assert info["digest"] == load_backbone("timm:vit")[1]["digest"] != load_backbone("timm:convolution")[1]["digest"]
    with pytest.raises(ValueError, match="timm:vit: Input height doesn't match"):
        model.forward_features(torch.randn(1, 3, 20, 20))
    with pytest.raises(ValueError, match=r"timm:unknown: Unknown model"):
        load_backbone("timm:unknown")


def test_timm_layers_get_their_rates(timm):
    network = torch.nn.ModuleDict({"backbone": load_backbone("timm:vit")[0], "head": torch.nn.Linear(8, 2)})
    rates = {id(p): group["lr_multiplier"] for group in parameter_groups(network, 0.5) for p in group["params"]}
    model = network.backbone.model
    assert [rates[id(block.weight)] for block in model.blocks] == [0.125, 0.25, 0.5]
    assert rates[id(network.head.weight)] == 1 and rates[id(model.cls_token)] == 0.0625
    assert rates[id(model.patch_embed.weight)] == pytest.approx(0.2 * 0.0625)


@pytest.mark.parametrize("name", ["convolution", "swin"])
def test_timm_maps(timm, name):
    model, x = load_backbone(f"timm:{name}")[0], torch.randn(2, 3, 8, 24)
    ours, maps = model.forward_features(x), timm(name, True, 0).stem(x)  # (2, 6, 2, 6)
    assert torch.equal(ours["x_norm_patchtokens"], maps.flatten(2).mT)
    assert torch.allclose(ours["x_norm_clstoken"], maps.mean((2, 3)))
    assert model.patch_size == 1 and len(model.blocks) == 0
    with pytest.raises(ValueError, match="gives its last features only"):
        model.get_intermediate_layers(x, 4)


@pytest.mark.parametrize("name", ["vit", "convolution"])
@pytest.mark.parametrize("mean, std", [(None, None), (0.2, 0.15)])
def test_timm_grey(timm, name, mean, std):
    model, info = grey_backbone(f"timm:{name}", mean, std)
    grey = torch.rand(2, 1, 16, 16)
    m, s = (torch.tensor(value).view(1, 3, 1, 1) for value in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    want = load_backbone(f"timm:{name}")[0].forward_features((grey - m) / s)
    got = model.forward_features((grey - info["mean"]) / info["std"])
    assert all((got[key] - want[key]).norm() <= 1e-5 * want[key].norm() for key in got)
    assert model.in_chans == info["config"]["in_chans"] == 1
    assert (info["mean"], info["std"]) == pytest.approx((mean or 0.4, std or 0.25))


def test_timm_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm:resnet18: needs the package timm; install it with: pip install timm"):
        load_backbone("timm:resnet18")
