"""Each family's own classes, with random weights, against what their files become here: features to 1e-5.

transformers' classes are the oracle of its files, and of iBOT's network, which is a plain vision transformer.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import VisionTransformer
from networks.families import convert
from networks.weights import IMAGENET_MEAN_STD, grey_backbone, load_backbone

transformers = pytest.importorskip("transformers")
SMALL = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
# (rows, columns) of patches: as trained, larger, smaller and not square, as many patches but not square
GRIDS = (4, 4), (6, 6), (3, 5), (2, 8)


def dinov2(**more):
    return transformers.Dinov2Model(transformers.Dinov2Config(image_size=32, patch_size=8, **SMALL, **more))


def registers(**more):
    config = transformers.Dinov2WithRegistersConfig(image_size=32, patch_size=8, **SMALL, **more)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3(**more):
    config = transformers.DINOv3ViTConfig(image_size=64, patch_size=16, num_register_tokens=4, **SMALL, **more)
    return transformers.DINOv3ViTModel(config)


MODELS = {
    "dinov2": lambda: dinov2(), "dinov2 swiglu": lambda: dinov2(use_swiglu_ffn=True),
    "dinov2 without mask token": lambda: dinov2(use_mask_token=False),
    "registers": lambda: registers(), "registers swiglu": lambda: registers(use_swiglu_ffn=True, num_register_tokens=2),
    "dinov3": lambda: dinov3(intermediate_size=512),
    "dinov3 gated": lambda: dinov3(intermediate_size=768, use_gated_mlp=True, hidden_act="silu"),
}


def build(name):
    """The family's model with every tensor of a size that shows in the features."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        p.data.normal_(std=0.1 if p.ndim == 2 and min(p.shape) > 1 else 0.5)
        if "norm" in key and key.endswith("weight"):
            p.data += 1
    return model


def saved(model, layout, tmp_path):
    """As save_pretrained writes it, tensor names of older releases; or the state dict by the names of today."""
    if layout == "folder":
        model.save_pretrained(tmp_path)
        return str(tmp_path)
    state = model.state_dict()
    if layout == "folder of .bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(model.config.to_json_string(use_diff=False))
        return str(tmp_path)
    path = str(tmp_path / f"weights.{layout}")
    save_file(state, path) if layout == "safetensors" else torch.save(state, path)
    return path


def agree(ours, theirs, label):
    error = (ours - theirs).norm() / theirs.norm()
    assert ours.shape == theirs.shape and error <= 1e-5, f"{label}: relative error {error:.1e}"


@torch.no_grad()
def same_features(vit, model, grids, channels=3):
    R = vit.num_register_tokens
    for rows, columns in grids:
        x = torch.randn(2, channels, rows * vit.patch_size, columns * vit.patch_size)
        theirs, ours = model(pixel_values=x).last_hidden_state, vit.forward_features(x)
        agree(ours["x_norm_clstoken"], theirs[:, 0], f"cls of {rows}x{columns} patches")
        if R:
            agree(ours["x_norm_regtokens"], theirs[:, 1:1 + R], f"registers of {rows}x{columns} patches")
        agree(ours["x_norm_patchtokens"], theirs[:, 1 + R:], f"patches of {rows}x{columns} patches")
    (patches, cls), = vit.get_intermediate_layers(x, return_class_token=True)
    agree(torch.cat((cls[:, None], patches), 1), torch.cat((theirs[:, :1], theirs[:, 1 + R:]), 1), "last block")


@pytest.mark.parametrize("layout", ["folder", "pt"])
@pytest.mark.parametrize("name", MODELS)
def test_hugging_face(name, layout, tmp_path):
    model = build(name)
    vit, info = load_backbone(saved(model, layout, tmp_path))
    assert info["family"] == {"dinov2": "DINOv2", "registers": "DINOv2 + registers", "dinov3": "DINOv3"}[
        name.split()[0]] + " (Hugging Face)"
    assert (info["mean"], info["std"]) == IMAGENET_MEAN_STD and not vit.training
    assert info["seen"] is info["step"] is info["args"] is None and len(info["digest"]) == 64
    same_features(vit, model, GRIDS)
    if name in ("dinov2", "dinov3"):  # pretraining goes on with its mask token
        mask = torch.rand(2, 16) < 0.5
        x = torch.randn(2, 3, 4 * vit.patch_size, 4 * vit.patch_size)
        with torch.no_grad():
            theirs = model(pixel_values=x, bool_masked_pos=mask).last_hidden_state
            agree(vit.forward_features(x, mask)["x_norm_clstoken"], theirs[:, 0], "cls, masked")


@pytest.mark.parametrize("layout", ["folder of .bin", "safetensors"])
def test_other_files_of_hugging_face(layout, tmp_path):
    model = build("dinov2 swiglu")
    same_features(load_backbone(saved(model, layout, tmp_path))[0], model, GRIDS[:2])


def test_the_backbone_of_a_classifier(tmp_path):
    config = transformers.Dinov2Config(image_size=32, patch_size=8, **SMALL)
    model = transformers.Dinov2ForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    same_features(load_backbone(str(tmp_path))[0], model.dinov2, GRIDS[:1])


def test_statistics_of_the_processor_are_used(tmp_path):
    folder = saved(build("dinov3"), "folder", tmp_path)
    statistics = tmp_path / "preprocessor_config.json"
    statistics.write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1] * 3}))
    info = load_backbone(folder)[1]
    assert info["mean"] == (0.4, 0.5, 0.6) and info["std"] == (0.1, 0.1, 0.1)
    assert load_backbone(str(tmp_path / "model.safetensors"))[1] == info  # the file in the folder is the folder
    statistics.write_text(json.dumps({"image_mean": [0.4], "image_std": [0.1]}))
    with pytest.raises(ValueError, match="1 means for 3 channels"):
        load_backbone(folder)


@pytest.mark.parametrize("name, change", [
    ("dinov2", {"num_attention_heads": 4}), ("dinov2", {"layer_norm_eps": 1e-5}),
    ("dinov2", {"hidden_act": "gelu_new"}),
    ("dinov2", {"qkv_bias": False}), ("dinov2", {"use_swiglu_ffn": True}), ("dinov2", {"patch_size": 14}),
    ("dinov2", {"image_size": 56}), ("dinov2", {"mlp_ratio": 3}), ("dinov2", {"model_type": "dinov2_with_registers"}),
    ("dinov2", {"patch_size": [8, 4]}), ("dinov3", {"rope_theta": 10000.0}), ("dinov3", {"layer_norm_eps": 1e-6}),
    ("dinov3", {"key_bias": True}), ("dinov3", {"use_gated_mlp": True}), ("dinov3 gated", {"hidden_act": "gelu"}),
    ("dinov3 gated", {"intermediate_size": 512}), ("dinov3", {"num_register_tokens": 0})], ids=str)
def test_a_config_that_says_otherwise_is_refused(name, change, tmp_path):
    folder = saved(build(name), "folder", tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    key, = change
    assert key in stated
    (tmp_path / "config.json").write_text(json.dumps({**stated, "patch_size": [stated["patch_size"]] * 2}))
    load_backbone(folder)  # one side or two equal ones
    (tmp_path / "config.json").write_text(json.dumps({**stated, **change}))
    with pytest.raises(ValueError, match=f"config.json says {key} .*; join it by --features or --predictions"):
        load_backbone(folder)


def test_sharded_folders_and_empty_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder without model.safetensors or pytorch_model.bin"):
        load_backbone(str(tmp_path))
    build("dinov2").save_pretrained(tmp_path, max_shard_size="500KB")
    with pytest.raises(ValueError, match="in several files; write one: save_pretrained"):
        load_backbone(str(tmp_path))


# ---------------------------------------------------------------- iBOT and DINO: a plain vision transformer

def plain():
    config = transformers.ViTConfig(image_size=32, patch_size=8, intermediate_size=512, layer_norm_eps=1e-6, **SMALL)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    for key, p in model.named_parameters():
        p.data.normal_(std=0.1 if p.ndim == 2 else 0.5)
        if "norm" in key and key.endswith("weight"):
            p.data += 1
    return model


def ibot_names(model):
    """The state dict of iBOT's class that computes the same."""
    theirs, state = model.state_dict(), {}
    place = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(2):
        layer = next(key for key in theirs if "layernorm_before" in key).split(".0.")[0] + f".{i}."
        names = [key[len(layer):] for key in theirs if key.startswith(layer) and key.endswith("weight")]

        def find(*words):
            return next(layer + name.removesuffix(".weight") for name in names if any(word in name for word in words))
        q, k, v = find("query", "q_proj"), find("key", "k_proj"), find("value", "v_proj")
        for kind in ("weight", "bias"):
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([theirs[f"{part}.{kind}"] for part in (q, k, v)])
        place |= {f"blocks.{i}.norm1": find("layernorm_before"), f"blocks.{i}.norm2": find("layernorm_after"),
                  f"blocks.{i}.attn.proj": find("attention.output.dense", "o_proj"),
                  f"blocks.{i}.mlp.fc1": find("intermediate.dense", "fc1"),
                  f"blocks.{i}.mlp.fc2": next(layer + n.removesuffix(".weight") for n in names
                                              if n in ("output.dense.weight", "mlp.fc2.weight"))}
    for ours, name in place.items():
        if name in theirs:
            state[ours] = theirs[name]
        else:
            state |= {f"{ours}.{kind}": theirs[f"{name}.{kind}"] for kind in ("weight", "bias")}
    return state


HEADS = {name: torch.zeros(3, 3) for name in ("mlp.0.weight", "last_layer.weight_g", "last_norm.weight")}
LAYOUTS = {
    "released": lambda state, masked: {"state_dict": state},
    "bare, with its head": lambda state, masked: {**state, **{f"head.{key}": value for key, value in HEADS.items()}},
    "masked": lambda state, masked: {"state_dict": {**state, "masked_embed": masked}},
    "training": lambda state, masked: {
        "student": {f"module.backbone.{k}": v * 0 for k, v in {**state, "masked_embed": masked}.items()},
        "teacher": {**{f"backbone.{k}": v for k, v in state.items()}, **{f"head.{k}": v for k, v in HEADS.items()}},
        "epoch": 3},
    "student only": lambda state, masked: {"student": {**{f"module.backbone.{k}": v for k, v in state.items()},
                                                       **{f"module.head.{k}": v for k, v in HEADS.items()}}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ibot(layout, tmp_path):
    model, path, masked = plain(), str(tmp_path / "ibot.pth"), torch.randn(1, 128)
    torch.save(LAYOUTS[layout](ibot_names(model), masked), path)
    vit, info = load_backbone(path)
    same_features(vit, model, GRIDS[:1])
    assert info["family"] == ("iBOT" if layout == "masked" else "iBOT or DINO") and vit.num_register_tokens == 0
    assert torch.equal(vit.mask_token, masked if layout == "masked" else torch.zeros(1, 128))
    patches = vit.pos_embed[:, 1:].detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)  # (1, C, 4, 4)
    want = F.interpolate(patches, scale_factor=(6.1 / 4, 3.1 / 4), mode="bicubic").flatten(2).mT
    assert torch.allclose(vit.positions((6, 3))[:, 1:], want, atol=1e-5)


# ---------------------------------------------------------------- grey

@pytest.mark.parametrize("name", ["dinov2", "registers swiglu", "dinov3", "ibot"])
@pytest.mark.parametrize("mean, std", [(None, None), (0.21, 0.17)])
def test_grey_equals_repeated_grey(name, mean, std, tmp_path):
    """One channel by folded weights against the family's own class on three equal ones, each by its statistics."""
    if name == "ibot":
        model, path = plain(), str(tmp_path / "ibot.pth")
        torch.save({"state_dict": ibot_names(model)}, path)
    else:
        model = build(name)
        path = saved(model, "folder", tmp_path)
    vit, info = grey_backbone(path, mean, std)
    assert info["mean"] == pytest.approx(mean or sum(IMAGENET_MEAN_STD[0]) / 3)
    assert info["std"] == pytest.approx(std or sum(IMAGENET_MEAN_STD[1]) / 3)
    assert vit.in_chans == info["config"]["in_chans"] == 1 and vit.patch_embed.proj.weight.shape[1] == 1
    grey = torch.rand(2, 1, 4 * vit.patch_size, 4 * vit.patch_size)
    m, s = (torch.tensor(value).view(1, 3, 1, 1) for value in IMAGENET_MEAN_STD)
    with torch.no_grad():
        theirs = model(pixel_values=(grey - m) / s).last_hidden_state
        ours = vit.forward_features((grey - info["mean"]) / info["std"])
    agree(ours["x_norm_clstoken"], theirs[:, 0], "cls")
    agree(ours["x_norm_patchtokens"], theirs[:, 1 + vit.num_register_tokens:], "patches")


def test_a_grey_backbone_is_one_that_loads_again(tmp_path):
    """Its config and tensors are those of a grey network: saved by us, it loads as ours."""
    vit, info = grey_backbone(saved(build("dinov3"), "folder", tmp_path))
    checkpoint = {"teacher": {f"backbone.{key}": value for key, value in vit.state_dict().items()},
                  **{key: info[key] for key in ("config", "mean", "std")}}
    torch.save(checkpoint, tmp_path / "last.pt")
    again, ours = load_backbone(str(tmp_path / "last.pt"))
    x = torch.randn(1, 1, 32, 48)
    assert torch.equal(again(x), vit(x)) and (ours["mean"], ours["std"], ours["family"]) == (
        info["mean"], info["std"], "pretrain.py")


# ---------------------------------------------------------------- the specifications' tables

@pytest.mark.parametrize("embed_dim, depth, ffn, ratio, parameters", [
    (384, 12, "mlp", 4, 21_601_152), (384, 12, "swiglu", 6, 28_697_472), (768, 12, "mlp", 4, 85_669_632),
    (1024, 24, "mlp", 4, 303_154_176), (1280, 32, "swiglu", 6, 840_633_600)])
def test_parameter_counts_are_dinov3s(embed_dim, depth, ffn, ratio, parameters, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, std: x)  # slow without memory

    def count(depth):
        with torch.device("meta"):
            vit = VisionTransformer(embed_dim=embed_dim, depth=depth, num_heads=embed_dim // 64, ffn_layer=ffn,
                                    mlp_ratio=ratio, num_register_tokens=4, pos="rope", norm_eps=1e-5, mask_k_bias=True)
        return sum(p.numel() for p in vit.parameters())
    assert count(1) + (depth - 1) * (count(2) - count(1)) == parameters


def official_dinov3(D=768, depth=12):
    """The 188 tensors of DINOv3's ViT-B/16 (released code, run), without memory of their own."""
    def empty(*shape):
        return torch.zeros(1).expand(shape)
    mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(D)
    state = {"cls_token": empty(1, 1, D), "storage_tokens": empty(1, 4, D), "mask_token": empty(1, D),
             "patch_embed.proj.weight": empty(D, 3, 16, 16), "patch_embed.proj.bias": empty(D),
             "rope_embed.periods": (100 ** (torch.arange(16) / 16)).bfloat16(),
             "norm.weight": empty(D), "norm.bias": empty(D)}
    for i in range(depth):
        shapes = {"norm1.weight": (D,), "norm1.bias": (D,), "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
                  "attn.proj.weight": (D, D), "attn.proj.bias": (D,), "ls1.gamma": (D,), "norm2.weight": (D,),
                  "norm2.bias": (D,), "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
                  "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,), "ls2.gamma": (D,)}
        state |= {f"blocks.{i}.{key}": empty(*shape) for key, shape in shapes.items()}
        state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    return state


def test_dinov3_has_188_keys(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, std: x)
    state = official_dinov3()
    assert len(state) == 188
    family, state, config = convert(state, "file")
    with torch.device("meta"):
        vit = VisionTransformer(**config)
    assert family == "DINOv3" and vit.rope_dtype == "bfloat16" and vit.num_heads == 12
    ours, theirs = ({key: value.shape for key, value in x.items()} for x in (vit.state_dict(), state))
    assert ours == theirs


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("blocks.0.attn.qkv.bias"), r"no bias \(DINOv3's 7B\)"),
    (lambda s: s.update({"cls_norm.weight": torch.zeros(64)}), "cls_norm"),
    (lambda s: s.update({"rope_embed.periods": 10000 ** (torch.arange(16) / 16)}), "rope_embed.periods are not"),
    (lambda s: s.update({"blocks.0.attn.qkv.bias_mask": torch.full((192,), float("nan"))}), "bias_mask must be"),
    (lambda s: s.update({"blocks.0.attn.qkv.bias_mask": torch.ones(192)}), "bias_mask must be"),
    (lambda s: s.pop("rope_embed.periods"), "neither pos_embed .* nor rope_embed.periods"),
    (lambda s: s.update({"storage_tokens": torch.zeros(1, 4, 32)}), r"register_tokens is \(1, 4, 32\)")])
def test_other_dinov3s_are_refused(change, says, tmp_path):
    state = official_dinov3(64, 1)
    load_backbone(str(save(state, tmp_path)))
    change(state)
    with pytest.raises(ValueError, match=f"{says}.*; join it by --features or --predictions"):
        load_backbone(str(save(state, tmp_path)))


def save(state, tmp_path):
    torch.save({key: value.clone() for key, value in state.items()}, tmp_path / "dinov3.pth")
    return tmp_path / "dinov3.pth"


def test_dinov3s_masks_and_spare_norms(tmp_path):
    """The masked bias is as good as none, in training files too; the norm of local crops is no feature's."""
    torch.manual_seed(0)
    state = {key: value.clone() if "mask" in key or "periods" in key else torch.randn(value.shape) * 0.2
             for key, value in official_dinov3(64, 1).items()}
    vit = load_backbone(str(save(state, tmp_path)))[0]
    assert vit.blocks[0].attn.qkv.bias.detach().view(3, 64).abs().sum(1).gt(0).tolist() == [True, False, True]
    state["blocks.0.attn.qkv.bias"][64:128] = 9
    state["local_cls_norm.weight"] = state["local_cls_norm.bias"] = torch.randn(64)
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    torch.save({"teacher": {**teacher, "ibot_head.mlp.0.bias": torch.zeros(1)}}, tmp_path / "teacher.pth")
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(load_backbone(str(tmp_path / "teacher.pth"))[0](x), vit(x))
    state["blocks.0.attn.qkv.bias_mask"] = torch.zeros(192)  # some released files mask all of it
    none = load_backbone(str(save(state, tmp_path)))[0]
    assert not none.blocks[0].attn.qkv.bias.any() and not torch.equal(none(x), vit(x))
