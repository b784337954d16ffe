"""The families of backbones that load: their tensors by VisionTransformer's names, and timm's models behind its face.

Names, shapes and conventions are the released code's of DINOv2, DINOv3, iBOT and UltraDINO, and of transformers'
Dinov2Model, Dinov2WithRegistersModel and DINOv3ViTModel. What cannot be the same to the last digit is refused.
"""

import math
import re

import torch
from torch import nn

from model import DINOV3, rope_periods

JOIN = "join it by --features or --predictions (docs/comparing.md)"

# What tensor names give away, first match: architectures with other layers than ours.
OTHERS = {
    r"decoder_embed\.": "a masked autoencoder (MAE)",
    r"(^|\.)(visual|vision_model)\.|(^|\.)logit_scale$": "CLIP",
    r"(^|\.)image_encoder\.": "Segment Anything",
    r"(^|\.)(decode_head|decoder|segmentation_head)\.": "a segmentation network",
    r"(^|\.)layers\.\d+\.blocks\.": "a Swin transformer",
    r"rel_pos_bias|relative_position_bias_table|\.q_bias$": "a BEiT, as USFM is",
    r"(^|\.)(conv1|conv_stem|layer1\.0|stages\.0|stem\.0|features\.0|downsample_layers\.0)\b": "a convolutional net",
}
# Beside a backbone with a prefix: heads, centers and the student, which no feature needs.
BESIDE = re.compile(r"^(student\.|dino_loss\.|ibot_patch_loss\.)|(^|\.)(head|dino_head|ibot_head|classifier)\.")

HUGGING_FACE = {  # of older and newer transformers
    r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.(projection\.)?": "patch_embed.proj.",
    r"^(encoder\.|model\.)?layer\.(\d+)\.": r"blocks.\2.",
    r"\.attention\.(attention\.query|q_proj)\.": ".attn.q.",
    r"\.attention\.(attention\.key|k_proj)\.": ".attn.k.",
    r"\.attention\.(attention\.value|v_proj)\.": ".attn.v.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"\.mlp\.weights_in\.": ".mlp.w12.",
    r"\.mlp\.weights_out\.": ".mlp.w3.",
    r"^layernorm\.": "norm.",
}
GATED = {r"\.mlp\.gate_proj\.": ".mlp.w1.", r"\.mlp\.up_proj\.": ".mlp.w2.", r"\.mlp\.down_proj\.": ".mlp.w3."}
PLAIN = {r"\.mlp\.up_proj\.": ".mlp.fc1.", r"\.mlp\.down_proj\.": ".mlp.fc2."}  # of DINOv3


def refuse(path, reason):
    raise ValueError(f"{path}: {reason}; {JOIN}")


def rename(state, rules):
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def join(state, parts, whole):
    """Stack the tensors blocks.N.PART of all `parts` into blocks.N.WHOLE, row by row, where all are there."""
    for key in [key for key in state if key.endswith(f".{parts[0]}")]:
        names = [key.removesuffix(parts[0]) + part for part in parts]
        if all(name in state for name in names):
            state[key.removesuffix(parts[0]) + whole] = torch.cat([state.pop(name) for name in names])


# ---------------------------------------------------------------- files

def backbone_tensors(checkpoint, path):
    """The backbone's tensors, prefix removed, from any layout that these families' files have; the teacher's if two."""
    tensors = next((checkpoint[wrapper] for wrapper in ("teacher", "model", "state_dict", "student")
                    if isinstance(checkpoint.get(wrapper), dict)), checkpoint)
    tensors = {str(key): value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    for pattern, architecture in OTHERS.items():
        if found := next((key for key in tensors if re.search(pattern, key)), None):
            refuse(path, f"{architecture} (it has {found}), not a DINO vision transformer")
    prefixes = {match[1] for key in tensors if (match := re.fullmatch(r"((?:.+\.)?)cls_token", key))}
    if len(prefixes) > 1:
        prefixes = {prefix for prefix in prefixes if "teacher." in prefix}
    if len(prefixes) != 1:
        refuse(path, "no DINOv2 backbone in this file (looked for a cls_token, alone or in teacher, model, state_dict; "
                     f"it has {', '.join(sorted(map(str, checkpoint))[:5])})")
    prefix = prefixes.pop().removesuffix("embeddings.")
    left = [key for key in tensors if not key.startswith(prefix) and not BESIDE.search(key)]
    if left:
        refuse(path, f"{len(left)} tensors beside the backbone {prefix}* belong to no head, {left[0]} for one")
    state = {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if not re.match(r"head\.(mlp|last_)", key)}  # iBOT's own head


def convert(state, path):
    """Tensors by their family's names -> (family, tensors by ours, VisionTransformer's keywords)."""
    state = rename(state, {r"^blocks\.\d+\.(\d+)\.": r"blocks.\1."})  # with block_chunks: blocks.CHUNK.i
    family = dinov3 if "rope_embed.periods" in state else dinov2
    if "embeddings.cls_token" in state:
        family = hugging_face
        gated = any(".mlp.gate_proj." in key for key in state)
        state = rename(state, {**HUGGING_FACE, **(GATED if gated else PLAIN)})
        if "pos_embed" not in state:
            add_key_bias(state, path)
    for kind in ("weight", "bias"):
        join(state, (f"attn.q.{kind}", f"attn.k.{kind}", f"attn.v.{kind}"), f"attn.qkv.{kind}")
        join(state, (f"mlp.w1.{kind}", f"mlp.w2.{kind}"), f"mlp.w12.{kind}")  # gate and value of a SwiGLU
    if "blocks.0.attn.qkv.weight" in state and "blocks.0.attn.qkv.bias" not in state:
        refuse(path, "queries, keys and values have no bias (DINOv3's 7B), which this network cannot do without")
    try:
        return family(state, path)
    except KeyError as error:
        refuse(path, f"not a DINO vision transformer (no {error.args[0]})")


def add_key_bias(state, path):
    """DINOv3's keys have no bias: zeros beside the bias of the queries."""
    for key in [key for key in state if key.endswith(".attn.q.bias")]:
        if (name := key.replace(".q.", ".k.")) in state:
            refuse(path, "its keys have a bias, DINOv3's have none")
        state[name] = torch.zeros_like(state[key])


def dinov2(state, path):
    config = shape_of(state, path)
    if config["pos"] == "rope":
        refuse(path, "neither pos_embed (DINOv2) nor rope_embed.periods (DINOv3)")
    registers, in_chans = config["num_register_tokens"], config["in_chans"]
    if "mask_token" not in state and "blocks.0.ls1.gamma" not in state:
        family = "iBOT" if "masked_embed" in state else "iBOT or DINO"  # a teacher of iBOT looks like DINO's
        state["mask_token"] = state.pop("masked_embed", torch.zeros(1, config["embed_dim"]))  # used in pretraining only
    else:
        family = "UltraDINO" if in_chans == 1 else "DINOv2 + registers" if registers else "DINOv2"
    exact = registers > 0 and in_chans == 3  # DINOv2's files with registers ask for sizes and antialias
    return family, state, dict(config, interpolate_offset=0.0 if exact else 0.1, interpolate_antialias=exact)


def dinov3(state, path):
    if "cls_norm.weight" in state:
        refuse(path, "it has a norm of its own for the class token (cls_norm)")
    for key in ("local_cls_norm.weight", "local_cls_norm.bias"):  # of local crops in pretraining: features do without
        state.pop(key, None)
    state = rename(state, {r"^storage_tokens$": "register_tokens"})
    for key in [key for key in state if key.endswith(".bias_mask")]:
        mask, bias = state.pop(key), key.removesuffix("_mask")
        if not ((mask == 0) | (mask == 1)).all() or mask.chunk(3)[1].any():
            refuse(path, f"{key} must be 0 for keys and 0 or 1 for queries and values")
        state[bias] = state[bias] * mask
    config, periods = shape_of(state, path), state.pop("rope_embed.periods").double()
    for dtype in ("float32", "bfloat16"):  # Meta's files hold bfloat16
        want = rope_periods(config["embed_dim"] // config["num_heads"], dtype)
        if periods.shape == want.shape and torch.allclose(periods, want, rtol=1e-6, atol=0):
            return "DINOv3", state, dict(config, **DINOV3, rope_dtype=dtype)
    refuse(path, "rope_embed.periods are not 100^(4i / head dim)")


def hugging_face(state, path):
    if "register_tokens" in state and not state["register_tokens"].shape[1]:
        del state["register_tokens"]
    config = shape_of(state, path)
    mask_token = state.get("mask_token", torch.zeros(1, config["embed_dim"]))  # pretraining's: some files have none
    state["mask_token"] = mask_token.flatten(0, -2)  # (1, C)
    if config["pos"] == "rope":
        return "DINOv3 (Hugging Face)", state, dict(config, **DINOV3)
    registers = config["num_register_tokens"] > 0
    family = "DINOv2 + registers (Hugging Face)" if registers else "DINOv2 (Hugging Face)"
    return family, state, dict(config, interpolate_offset=0.0, interpolate_antialias=registers)


def shape_of(state, path):
    """Constructor keywords that shapes tell. Every size of these families has 64 a head."""
    embed_dim, in_chans, patch_size, columns = state["patch_embed.proj.weight"].shape
    if embed_dim % 64 or columns != patch_size:
        refuse(path, f"width {embed_dim} is no multiple of 64 or patches of {patch_size}x{columns} are not square")
    swiglu, rope = "blocks.0.mlp.w12.weight" in state, "pos_embed" not in state
    hidden = state[f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"].shape[1]
    side = 224 // patch_size if rope else math.isqrt(state["pos_embed"].shape[1] - 1)
    return dict(
        img_size=side * patch_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
        num_heads=embed_dim // 64, depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_register_tokens=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        mlp_ratio=hidden * (1.5 if swiglu else 1) / embed_dim, ffn_layer="swiglufused" if swiglu else "mlp",
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None, pos="rope" if rope else "learned")


def check_config(theirs, config, path):
    """Every value of a config.json that changes features must be what `config` builds."""
    rope, registers = config["pos"] == "rope", config["num_register_tokens"]
    swiglu, hidden = config["ffn_layer"] != "mlp", int(config["embed_dim"] * config["mlp_ratio"])
    ours = {
        "model_type": "dinov3_vit" if rope else "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": config["embed_dim"], "num_hidden_layers": config["depth"], "num_channels": config["in_chans"],
        "num_attention_heads": config["num_heads"], "patch_size": config["patch_size"],
        "num_register_tokens": registers, "layer_norm_eps": config.get("norm_eps", 1e-6), "rope_theta": 100,
        "use_swiglu_ffn": swiglu, "use_gated_mlp": swiglu, "qkv_bias": True, "query_bias": True, "key_bias": False,
        "value_bias": True, "proj_bias": True, "mlp_bias": True}
    if rope:
        ours["hidden_act"] = "silu" if swiglu else "gelu"
        ours["intermediate_size"] = round(hidden / 1.5) if swiglu else hidden
    else:
        ours["image_size"] = config["img_size"]
        if not swiglu:  # DINOv2's SwiGLU is gated by SiLU whatever hidden_act says; its size follows from mlp_ratio
            ours |= {"hidden_act": "gelu", "mlp_ratio": config["mlp_ratio"]}
    for key, value in ours.items():
        stated = theirs.get(key, value)
        if isinstance(stated, list):
            stated = stated[0] if len(set(stated)) == 1 else stated
        if stated != value:
            refuse(path, f"config.json says {key} {stated}, its tensors or this vision transformer {value}")


# ---------------------------------------------------------------- timm

class TimmBackbone(nn.Module):
    """A pretrained model of timm with VisionTransformer's attributes and features; needs the package timm.

    Its class token where there is one that the final norm sees, else the mean of its patches; those of a convolutional
    network are the places of its last map (and patch_size 1).
    """

    def __init__(self, name):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ValueError(f"timm:{name}: needs the package timm; install it with: pip install timm")
        try:
            try:  # vision transformers of a fixed size then take others
                self.model = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
            except TypeError:
                self.model = timm.create_model(name, pretrained=True, num_classes=0)
        except (RuntimeError, OSError, ValueError) as error:  # no such model, no weights, no network
            raise ValueError(f"timm:{name}: {str(error).strip().splitlines()[0]}")
        self.name, self.embed_dim = name, self.model.num_features
        self.in_chans = self.model.pretrained_cfg["input_size"][0]
        self.prefix = getattr(self.model, "num_prefix_tokens", 0)
        self.patch_size = self.model.patch_embed.patch_size[0] if hasattr(self.model, "num_prefix_tokens") else 1
        self.fc_norm = getattr(self.model, "fc_norm", None) or nn.Identity()  # norm after the mean, of BEiT for one
        self.has_class_token = self.prefix > 0 and isinstance(self.fc_norm, nn.Identity) and (
            getattr(self.model, "cls_token", None) is not None)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    @property
    def blocks(self):
        return getattr(self.model, "blocks", [])

    def fold_grey(self, scale, shift):
        """Take one channel, which reaches the model's channel c as x * scale[c] + shift[c]."""
        self.scale, self.shift, self.in_chans = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), 1

    def call(self, forward, x, **how):
        try:
            return forward(x if self.scale is None else x * self.scale + self.shift, **how)
        except (AssertionError, TypeError) as error:  # of the image size; of a model that knows no such argument
            raise ValueError(f"timm:{self.name}: {error}")

    def tokens(self, x, prefix=None):
        """(B, N, C), (B, C, h, w) or (B, h, w, C) -> class token or mean (B, C), patches (B, P, C)."""
        if x.ndim == 4:
            last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            x = x.flatten(1, 2) if last else x.flatten(2).mT  # (B, P, C)
        elif x.ndim == 3 and prefix is None:
            prefix, x = x[:, :self.prefix], x[:, self.prefix:]
        elif x.ndim != 3:
            raise ValueError(f"timm:{self.name}: features of shape {tuple(x.shape)} are no tokens and no map; {JOIN}")
        return prefix[:, 0] if self.has_class_token else self.fc_norm(x.mean(1)), self.fc_norm(x)

    def forward_features(self, x):
        cls, patches = self.tokens(self.call(self.model.forward_features, x))
        return {"x_norm_clstoken": cls, "x_norm_patchtokens": patches}

    def forward(self, x):
        return self.forward_features(x)["x_norm_clstoken"]

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False):
        """Of the last n blocks (or of the blocks named in the list n), or the last n stages of a convolutional network
        (each of its own width). Patches (B, P, C); with `reshape`, of vision transformers alone, (B, C, rows, columns).
        """
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"timm:{self.name}: gives its last features only")
        how = dict(return_prefix_tokens=True) if self.prefix else {}
        found = self.call(self.model.forward_intermediates, x, indices=n, norm=True, intermediates_only=True, **how)
        outputs = []
        for maps in found:
            maps, prefix = maps if self.prefix else (maps, None)  # (B, C, rows, columns), (B, prefix, C)
            cls, patches = self.tokens(maps.flatten(2).mT, prefix)
            if reshape:
                grid = tuple(length // self.patch_size for length in x.shape[2:])
                if maps.shape[1:] != (self.embed_dim, *grid):
                    raise ValueError(f"timm:{self.name}: a map of {tuple(maps.shape[1:])} where one of "
                                     f"{(self.embed_dim, *grid)} was expected; use a plain vision transformer, whose "
                                     "blocks all have one width and one grid")
                patches = patches.mT.unflatten(2, grid).contiguous()  # (B, C, rows, columns)
            outputs.append((patches, cls) if return_class_token else patches)
        return tuple(outputs)
