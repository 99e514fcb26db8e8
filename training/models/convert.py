"""Weights of a backbone in other layouts: released dinov2 files, timm, Hugging Face; and what builds a model for them.

Ours is dinov2's own layout, which its hub reads. Letters: M stored grid side, D embedding dim, R registers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.config import ARCHITECTURES, ConfigError, ModelConfig
from training.models.block import NORM_EPS, hidden_dim
from training.models.position import resize_positions, stored_side
from training.models.timm_stem import STEM_STRIDE, from_timm_name, to_timm_name
from training.models.vit import VisionTransformer

State = dict[str, Tensor]

# where the weights of a checkpoint may lie within it; what comes first is taken
WRAPPERS = ("teacher", "model", "state_dict")
PREFIXES = ("teacher.backbone.", "backbone.", "module.", "dinov2_with_registers.", "dinov2.")
# what files hold beside a backbone
OTHERS = ("dino_head.", "ibot_head.", "feature_map.", "head.", "linear_head.", "classifier.", "fc_norm.")

# ours: Hugging Face's
HF_NAMES = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HF_BLOCK_NAMES = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls2.gamma": "layer_scale2.lambda1",
}
HF_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What loading did.

    Attributes:
        layout: dinov2, timm or Hugging Face.
        missing: tensors of the model that the file has not, and that may be: it keeps those it had.
        unused: tensors of the file that no backbone has.
        resized: sides of the position grid, stored and wanted; None where they are the same.
    """

    layout: str
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    resized: tuple[int, int] | None = None

    def __str__(self) -> str:
        lines = [f"backbone taken ({self.layout} layout)"]
        if self.resized:
            old, new = self.resized
            lines.append(f"position grid resized from {old} x {old} to {new} x {new}")
        if self.missing:
            lines.append(f"not in the file: {', '.join(self.missing)}")
        if self.unused:
            groups = sorted({name.split(".")[0] for name in self.unused})
            lines.append(f"not used: {len(self.unused)} tensors of {', '.join(groups)}")
        return "; ".join(lines)


def load_backbone(model: VisionTransformer, state: Mapping[str, Any]) -> Report:
    """Bring weights into a backbone: all of them or none.

    Args:
        model: unsharded.
        state: a released file, flat or with its blocks in chunks; a checkpoint with the backbone of a teacher in it;
            our own network; files of timm or Hugging Face. The position grid is resized where it must be.

    Returns:
        What was done.

    Raises:
        ConfigError: the file does not fit; names the first tensor that it lacks, has too many, or of another shape.
    """
    found, unused = _backbone_part(state)
    if any(name.startswith("embeddings.") for name in found):
        layout, found = "Hugging Face", backbone_from_hf(found)
    else:
        layout, found = "dinov2" if "mask_token" in found else "timm", backbone_from_timm(found)
    if model.config.layerscale is None:
        found = {name: tensor for name, tensor in found.items() if not _is_unit_gain(name, tensor)}
    own = model.state_dict()
    missing = sorted(set(own) - set(found))
    resized = _resize(found, model)
    _check_fits(found, own)
    model.load_state_dict(own | found)
    return Report(layout=layout, missing=tuple(missing), unused=tuple(unused), resized=resized)


def _backbone_part(state: Mapping[str, Any]) -> tuple[State, list[str]]:
    """The tensors of the backbone by our names, and the names of all others."""
    while wrapper := next((name for name in WRAPPERS if isinstance(state.get(name), Mapping)), None):
        state = state[wrapper]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)), "")
    unused = [name for name in tensors if not name.startswith(prefix) or name.startswith(OTHERS)]
    found = {}
    for name in sorted(set(tensors) - set(unused)):
        # released training code splits blocks into chunks and counts on: blocks.1.7 is block 7
        found[re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name.removeprefix(prefix))] = tensors[name]
    return found, sorted(unused)


def _is_unit_gain(name: str, tensor: Tensor) -> bool:
    return bool(name.endswith(".gamma") and (tensor == 1).all())


def _resize(found: State, model: VisionTransformer) -> tuple[int, int] | None:
    """Bring the position grid to the model's size, in place."""
    if "pos_embed" not in found:
        return None
    try:
        old, new = stored_side(found["pos_embed"]), stored_side(model.pos_embed)
    except ValueError as error:
        raise ConfigError(f"weights: {error}") from None
    if old == new:
        return None
    found["pos_embed"] = resize_positions(found["pos_embed"], (new, new), model.config.pos_resize)
    return old, new


def _check_fits(found: State, own: Mapping[str, Tensor]) -> None:
    """Every tensor there, of the right shape, and no other. Only the mask token may be missing: timm drops it."""
    way_out = "give model the values that the file was made with"
    problems = {
        "lacks": sorted(set(own) - set(found) - {"mask_token"}),
        "has beside the model's": sorted(set(found) - set(own)),
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"weights: the file {problem} {names[0]!r}{more}; {way_out}")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise ConfigError(
                f"weights: {name!r} is {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} here; {way_out}"
            )


def check_exportable(config: ModelConfig, to: str) -> None:
    """Other libraries build the patch embedding as published; timm also has the layers of our convolutional stem.

    Raises:
        ConfigError: the model has another one.
    """
    if config.stem != "linear" and to != "timm":
        raise ConfigError(
            f"export to {to}: model.stem {config.stem!r}; allowed there: linear. This project's own files hold it "
            "(network.safetensors, teacher.safetensors), and files for timm"
        )


# timm


def backbone_to_timm(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """Weights as the model of ``timm_architecture`` names them.

    timm has no mask token. Its models with registers have no position of the class token: it is added to the token.
    """
    kept = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    if config.num_registers:
        positions = kept["pos_embed"]  # [1, 1 + M M, D]
        kept["reg_token"] = kept.pop("register_tokens")
        kept["cls_token"] = kept["cls_token"] + positions[:, :1]
        kept["pos_embed"] = positions[:, 1:]
    kept = {to_timm_name(name): tensor for name, tensor in kept.items()}
    return {name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): kept[name] for name in kept}


def backbone_from_timm(state: Mapping[str, Tensor]) -> State:
    """Weights of timm by our names; the position of a class token that has none is 0. Ours come back as they are."""
    ours = {from_timm_name(name): tensor for name, tensor in state.items()}
    if "reg_token" in ours:
        ours["register_tokens"] = ours.pop("reg_token")
    positions = ours.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        ours["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    narrow = ours.get("blocks.0.mlp.fc2.weight")
    if narrow is None or ours["blocks.0.mlp.fc1.weight"].shape[0] == narrow.shape[1]:
        return ours
    # SwiGLU: twice as many channels come out of the first layer as go into the second
    return {name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): ours[name] for name in ours}


def timm_architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The call ``timm.create_model(name, **arguments)`` that makes the model of ``backbone_to_timm``.

    Returns:
        Name, and arguments that JSON can hold: a released model where it is one, else one of the right layers with
        all sizes given. A convolutional stem needs ``embed_layer=timm_embed_layer(dim)`` besides.
    """
    # timm leaves out arguments that are None; 0 is no LayerScale too
    arguments: dict[str, Any] = {"img_size": config.image_px, "init_values": config.layerscale or 0, "num_classes": 0}
    dim, depth, num_heads = config.shape
    size = next((name for name, shape in ARCHITECTURES.items() if shape == config.shape), "")
    is_swiglu = config.ffn == "swiglu"
    is_released = (
        size in ("vit_small", "vit_base", "vit_large", "vit_giant2")
        and (config.patch_px, config.mlp_ratio) == (14, 4)
        and is_swiglu == (size == "vit_giant2")
        and (is_swiglu or config.activation == "gelu")
        and config.num_registers in (0, 4)
    )
    if is_released:
        registers = "_reg4" if config.num_registers else ""
        return f"{size.removesuffix('2')}_patch14{registers}_dinov2", arguments
    patch_size = config.patch_px // STEM_STRIDE if config.stem == "conv" else config.patch_px
    arguments |= {"patch_size": patch_size, "embed_dim": dim, "depth": depth, "num_heads": num_heads}
    if config.num_registers:
        arguments |= {"reg_tokens": config.num_registers, "no_embed_class": True}
    if is_swiglu:
        # timm counts both halves; it rounds down, so half a channel is added against an inexact quotient
        return "vit_giant_patch14_dinov2", arguments | {"mlp_ratio": (2 * hidden_dim(config) + 0.5) / dim}
    return "vit_base_patch16_224", arguments | {"mlp_ratio": config.mlp_ratio, "act_layer": config.activation}


# Hugging Face


def backbone_to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> tuple[State, dict[str, Any]]:
    """Weights and ``config.json`` of a ``Dinov2Model``, with registers of a ``Dinov2WithRegistersModel``.

    Their blocks always have a LayerScale: where ours have none it is 1.

    Raises:
        ConfigError: ``mlp_ratio`` is no whole number, and their configuration takes no other.
    """
    if config.mlp_ratio != int(config.mlp_ratio):
        raise ConfigError(f"export to hf: model.mlp_ratio {config.mlp_ratio}; allowed there: whole numbers")
    theirs: State = {}
    for name, tensor in state.items():
        match = re.match(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            theirs[_renamed(name, HF_NAMES)] = tensor
            continue
        layer, inner = f"encoder.layer.{match[1]}.", match[2]
        if inner.startswith("attn.qkv."):
            suffix = inner.removeprefix("attn.qkv")
            for part, rows in zip(HF_QKV, tensor.chunk(3), strict=True):  # [D, D] or [D] each
                theirs[layer + part + suffix] = rows.clone()  # shares no memory with its neighbours
        else:
            theirs[layer + _renamed(inner, HF_BLOCK_NAMES)] = tensor
    dim, depth, num_heads = config.shape
    if config.layerscale is None:
        like = state["cls_token"]
        gains = [f"encoder.layer.{i}.layer_scale{half}.lambda1" for i in range(depth) for half in (1, 2)]
        theirs |= {name: torch.ones(dim, dtype=like.dtype, device=like.device) for name in gains}
    about = {
        "architectures": ["Dinov2WithRegistersModel" if config.num_registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if config.num_registers else "dinov2",
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "mlp_ratio": int(config.mlp_ratio),
        "use_swiglu_ffn": config.ffn == "swiglu",
        "hidden_act": config.activation,
        "layerscale_value": config.layerscale if config.layerscale is not None else 1.0,
        "layer_norm_eps": NORM_EPS,
        "image_size": config.image_px,
        "patch_size": config.patch_px,
        "num_channels": 3,
        "qkv_bias": True,
    }
    return theirs, about | ({"num_register_tokens": config.num_registers} if config.num_registers else {})


def backbone_from_hf(state: Mapping[str, Tensor]) -> State:
    """Weights of files of ``Dinov2Model`` or ``Dinov2WithRegistersModel`` by our names.

    Since transformers 5 models in memory have other names; ``save_pretrained`` still writes these.
    """
    names = {theirs: ours for ours, theirs in HF_NAMES.items()}
    block_names = {theirs: ours for ours, theirs in HF_BLOCK_NAMES.items()}
    ours: State = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = re.match(r"encoder\.layer\.(\d+)\.(.+)", name)
        if match is None:
            ours[_renamed(name, names)] = tensor
            continue
        block, inner = f"blocks.{match[1]}.", match[2]
        part = next((part for part in HF_QKV if inner.startswith(part)), None)
        if part is None:
            ours[block + _renamed(inner, block_names)] = tensor
        else:
            apart.setdefault(block + "attn.qkv" + inner.removeprefix(part), {})[part] = tensor
    for name, parts in apart.items():
        if len(parts) == len(HF_QKV):
            ours[name] = torch.cat([parts[part] for part in HF_QKV])  # [3 D, D] or [3 D]
    return ours


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with the module that it begins with renamed; as it is where that is not in the table."""
    begin = next((old for old in names if name == old or name.startswith(old + ".")), None)
    return name if begin is None else names[begin] + name[len(begin) :]
