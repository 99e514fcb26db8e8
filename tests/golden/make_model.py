"""Golden values of backbones, position grids and heads, from facebookresearch/dinov2 on a CPU.

    python tests/golden/make_model.py --dinov2 PATH

Writes ``model.npz`` beside this file. Weights and inputs are noise that both sides make from names (``noise``), so that
only what comes out is stored:

    position/FLAVOUR/MxM/HxW     resized grid
    BACKBONE/cls, /registers, /patches, /deep_cls, /deep_patches   last block with masks; last but one without
    BACKBONE/grad/NAME           gradient of ``readout`` of the last block
    dropped                      a block in training with stochastic depth 0.3, drawn from seed 0
    HEAD/logits, /grad/NAME      a head, and gradients of its ``readout``
    keys/NAME                    names and shapes of a released model; chunked: of ``plain`` with blocks in two chunks
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DIM, DEPTH, HEADS, PATCH_PX = 16, 2, 2, 4
# name: values of our ModelConfig beside the ones above; the side of the stored grid is image_px / PATCH_PX
BACKBONES: dict[str, dict[str, Any]] = {
    "plain": {"image_px": 16},
    "registers": {"image_px": 16, "ffn": "swiglu", "num_registers": 3, "pos_resize": "size"},
    "bare": {"image_px": 24, "layerscale": None, "activation": "relu", "mlp_ratio": 2.5},
}
CROPS = [(3, 16, 16), (2, 12, 20)]  # pictures, height, width of groups
GRIDS = [(7, (5, 7)), (7, (16, 16)), (16, (7, 7)), (16, (16, 9)), (37, (7, 7)), (37, (16, 16)), (37, (40, 23))]
POSITION_DIM = 2
HEAD_ROWS = 6
# name: values of our HeadConfig
HEADS_OF: dict[str, dict[str, Any]] = {
    "head": {"num_layers": 3},
    "head_flat": {"num_layers": 1},
    "head_batch": {"num_layers": 3, "norm": "batch"},
}
HEAD = {"num_prototypes": 20, "hidden_dim": 12, "bottleneck_dim": 8}
RELEASED = {"vit_small": (False, 0), "vit_small_reg4": (False, 4), "vit_giant2": (True, 0)}


def noise(name: str, *shape: int) -> Tensor:
    """Normal float32 that depends on the name only (a generator that numpy keeps as it is)."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(drawn.astype(np.float32))


def fill(module: nn.Module, prefix: str) -> None:
    """Set every parameter to noise of a size at which all layers matter."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = noise(f"{prefix}/{name}", *parameter.shape)
            if name.endswith("gamma") or name.endswith("weight_g") or ("norm" in name and name.endswith("weight")):
                drawn = 1 + 0.2 * drawn
            elif parameter.ndim > 1 and "token" not in name and "pos_embed" not in name:
                drawn = drawn / np.sqrt(parameter[0].numel())
            parameter.copy_(drawn)


def crops() -> tuple[list[Tensor], list[Tensor]]:
    """Groups of crops [C, 3, H, W] and their masks bool [C, N]."""
    images = [noise(f"crops {i}", num, 3, height, width) for i, (num, height, width) in enumerate(CROPS)]
    masks = [
        noise(f"masks {i}", num, height * width // PATCH_PX**2) > 0.5 for i, (num, height, width) in enumerate(CROPS)
    ]
    return images, masks


def readout(parts: list[Tensor]) -> Tensor:
    """A scalar to which every number that comes out adds, each in its own way."""
    return torch.stack([(part * noise(f"readout {i}", *part.shape)).sum() for i, part in enumerate(parts)]).sum()


def gradients(module: nn.Module, prefix: str) -> dict[str, np.ndarray]:
    """Of every parameter that has one."""
    return {
        f"{prefix}/grad/{name}": parameter.grad.numpy()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def peer_backbone(values: Mapping[str, Any], **changes: Any) -> nn.Module:
    """The dinov2 model of one of ``BACKBONES``."""
    from dinov2.layers import MemEffAttention
    from dinov2.layers import NestedTensorBlock as Block
    from dinov2.models.vision_transformer import DinoVisionTransformer

    by_size = values.get("pos_resize") == "size"
    arguments = {
        "img_size": values["image_px"],
        "patch_size": PATCH_PX,
        "embed_dim": DIM,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": values.get("mlp_ratio", 4.0),
        "init_values": values.get("layerscale", 1.0),
        "ffn_layer": values.get("ffn", "mlp"),
        "act_layer": nn.ReLU if values.get("activation") == "relu" else nn.GELU,
        "num_register_tokens": values.get("num_registers", 0),
        "interpolate_antialias": by_size,
        "interpolate_offset": 0.0 if by_size else 0.1,
        "block_chunks": 0,
        "block_fn": lambda **options: Block(attn_class=MemEffAttention, **options),
    }
    return DinoVisionTransformer(**(arguments | changes))


def make_positions() -> dict[str, np.ndarray]:
    """Resized grids."""
    stored = {}
    for flavour in ("offset", "size"):
        for side, (height, width) in GRIDS:
            values = {"image_px": side * PATCH_PX, "pos_resize": flavour}
            model = peer_backbone(values, embed_dim=POSITION_DIM, depth=1, num_heads=1)
            positions = noise(f"position {side}", 1, 1 + side * side, POSITION_DIM)
            model.pos_embed.data = positions
            tokens = torch.zeros(1, 1 + height * width, POSITION_DIM)
            resized = model.interpolate_pos_encoding(tokens, height * PATCH_PX, width * PATCH_PX)
            stored[f"position/{flavour}/{side}x{side}/{height}x{width}"] = resized.detach().numpy()
    return stored


def make_backbones() -> dict[str, np.ndarray]:
    """What comes out of small backbones, and gradients."""
    stored: dict[str, np.ndarray] = {}
    images, masks = crops()
    for name, values in BACKBONES.items():
        model = peer_backbone(values)
        fill(model, name)
        parts = []
        for i, (group, mask) in enumerate(zip(images, masks, strict=True)):
            out = model.forward_features(group, mask)
            named = {kind: out[f"x_norm_{kind}"] for kind in ("clstoken", "regtokens", "patchtokens")}
            parts += named.values()
            for kind, ours in (("clstoken", "cls"), ("regtokens", "registers"), ("patchtokens", "patches")):
                stored[f"{name}/{i}/{ours}"] = named[kind].detach().numpy()
        readout(parts).backward()
        stored |= gradients(model, name)
        patches, cls = model.get_intermediate_layers(images[1], n=2, return_class_token=True)[0]
        stored |= {f"{name}/deep_cls": cls.detach().numpy(), f"{name}/deep_patches": patches.detach().numpy()}
    return stored


def make_dropped() -> dict[str, np.ndarray]:
    """A block with stochastic depth."""
    model = peer_backbone(BACKBONES["plain"], drop_path_rate=0.3, drop_path_uniform=True)
    fill(model, "plain")
    torch.manual_seed(0)
    return {"dropped": model.blocks[0].train()(noise("dropped", 10, 5, DIM)).detach().numpy()}


def make_heads() -> dict[str, np.ndarray]:
    """Heads and gradients."""
    from dinov2.layers import DINOHead

    stored: dict[str, np.ndarray] = {}
    for name, values in HEADS_OF.items():
        head = DINOHead(
            DIM,
            HEAD["num_prototypes"],
            use_bn=values.get("norm") == "batch",
            nlayers=values["num_layers"],
            hidden_dim=HEAD["hidden_dim"],
            bottleneck_dim=HEAD["bottleneck_dim"],
        )
        fill(head, name)
        logits = head(noise(f"rows {name}", HEAD_ROWS, DIM))
        readout([logits]).backward()
        stored |= {f"{name}/logits": logits.detach().numpy()} | gradients(head, name)
    return stored


def make_keys() -> dict[str, np.ndarray]:
    """Names and shapes of released models, as ``NAME SHAPE``."""
    from dinov2.models import vision_transformer

    stored = {}
    for name, (is_swiglu, num_registers) in RELEASED.items():
        with torch.device("meta"):
            model = getattr(vision_transformer, name.removesuffix("_reg4"))(
                patch_size=14,
                img_size=518,
                init_values=1.0,
                ffn_layer="swiglufused" if is_swiglu else "mlp",
                block_chunks=0,
                num_register_tokens=num_registers,
            )
        lines = [f"{key} {tuple(tensor.shape)}" for key, tensor in model.state_dict().items()]
        stored[f"keys/{name}"] = np.array(sorted(lines))
    chunked = peer_backbone(BACKBONES["plain"], block_chunks=2)
    return stored | {"keys/chunked": np.array([f"{key} {tuple(x.shape)}" for key, x in chunked.state_dict().items()])}


def main() -> None:
    """Make all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="checkout of facebookresearch/dinov2")
    options = parser.parse_args()
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path.insert(0, str(options.dinov2))
    torch.set_num_threads(1)
    path = Path(__file__).resolve().parent / "model.npz"
    stored = make_positions() | make_backbones() | make_dropped() | make_heads() | make_keys()
    np.savez_compressed(path, **stored)
    print(f"{path.name}: {len(stored)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
