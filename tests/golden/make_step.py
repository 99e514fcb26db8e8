"""Golden values of whole training steps, from facebookresearch/dinov2 on a CPU.

    PYTHONPATH=PACKAGES python tests/golden/make_step.py --dinov2 PATH

PACKAGES: what dinov2 needs besides (see tests/benchmarks/peers_dinov2.py, which also says how it is run). Writes
``step_VARIANT.npz`` beside this file, for two variants of the objective. Nothing random is stored: starting weights,
crops and masks are noise that both sides make from the same seeds. Stored for each of 4 steps: terms of the loss, and
gradient norms of each submodule before clipping; after the last step: every weight of student and teacher, as float16
difference from the start (error below 2e-6).

Terms, in our convention, from what dinov2 logs:
    dino_global, dino_local   as logged (each carries its 1 / (2 + 2 L)); dino is their sum
    koleo                     sum over both views, not weighted: logged * 2 / weight
    ibot                      mean over all global crops of the mean over masked patches: logged * 2
    total                     dino + ibot + weight * koleo
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPE = (24, 2, 3)  # dim, blocks, heads
BATCH, LOCALS, GLOBAL_PX, LOCAL_PX, PATCH_PX = 4, 4, 28, 14, 7
STEPS, LENGTH = 4, 8  # steps made, and length of the schedules
KOLEO_WEIGHT = 0.1
HEAD = {"K": 64, "hidden": 32, "bottleneck": 16}
# dinov2 speaks of epochs; here one has two steps
VARIANTS: dict[str, dict[str, Any]] = {
    "sinkhorn": {"centering": "sinkhorn_knopp", "is_tied": False, "layer_decay": 0.9, "clip": 3.0, "base_lr": 0.02},
    "centering": {"centering": "centering", "is_tied": True, "layer_decay": 1.0, "clip": 0.3, "base_lr": 0.03},
}


def noise(name: str, *shape: int) -> Tensor:
    """Uniform float32 in [-1, 1) that depends on the name only, on any machine (splitmix64)."""
    with np.errstate(over="ignore"):
        z = (np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) >> np.uint64(40)
    return torch.from_numpy((z.astype(np.float64) / 2**23 - 1).astype(np.float32).reshape(shape))


def start(name: str, shape: tuple[int, ...]) -> Tensor:
    """Starting value of the parameter of that name."""
    drawn = noise(name, *shape)
    if name.endswith("gamma"):
        return 0.2 + 0.1 * drawn
    if name.endswith("weight_g") or ("norm" in name and name.endswith("weight")):
        return 1 + 0.1 * drawn
    if len(shape) < 2:
        return 0.1 * drawn
    if "token" in name or "pos_embed" in name:
        return 0.5 * drawn
    return drawn * float(np.sqrt(3 / np.prod(shape[1:])))


def crops(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a step: global crops [2 B, 3, G, G] and locals [L B, 3, l, l], view-major; masks bool [2 B, N]."""
    # A picture shines through its crops, else they have nothing in common.
    colour = noise(f"colour {step}", 1, BATCH, 3, 1, 1)
    global_crops = noise(f"global {step}", 2, BATCH, 3, GLOBAL_PX, GLOBAL_PX) + colour
    local_crops = noise(f"local {step}", LOCALS, BATCH, 3, LOCAL_PX, LOCAL_PX) + colour
    num_patches = (GLOBAL_PX // PATCH_PX) ** 2
    order = noise(f"mask {step}", 2 * BATCH, num_patches).argsort(dim=1).argsort(dim=1)
    counts = torch.tensor([0, 3, 0, 7, 5, 0, 2, 0]).roll(step)[:, None]
    return global_crops.flatten(0, 1), local_crops.flatten(0, 1), order < counts


def dinov2_values(variant: dict[str, Any]) -> dict[str, Any]:
    """The variant in dinov2's words."""
    head = {
        "head_n_prototypes": HEAD["K"],
        "head_hidden_dim": HEAD["hidden"],
        "head_bottleneck_dim": HEAD["bottleneck"],
    }
    return {
        "dino": head | {"koleo_loss_weight": KOLEO_WEIGHT},
        "ibot": head | {"separate_head": not variant["is_tied"]},
        "train": {"batch_size_per_gpu": BATCH, "OFFICIAL_EPOCH_LENGTH": 2, "centering": variant["centering"]},
        "student": {"patch_size": PATCH_PX, "drop_path_rate": 0.0, "layerscale": 1.0},
        "teacher": {"momentum_teacher": 0.9, "final_momentum_teacher": 1, "warmup_teacher_temp_epochs": 2},
        "optim": {
            "epochs": LENGTH // 2,
            "base_lr": variant["base_lr"],
            "warmup_epochs": 1,
            "freeze_last_layer_epochs": 1,
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "clip_grad": variant["clip"],
            "layerwise_decay": variant["layer_decay"],
            "patch_embed_lr_mult": 0.2,
        },
        "crops": {"global_crops_size": GLOBAL_PX, "local_crops_size": LOCAL_PX, "local_crops_number": LOCALS},
    }


def in_our_convention(losses: dict[str, float]) -> dict[str, float]:
    """Logged terms of dinov2 as ours; see the head of this file."""
    terms = {
        "dino_global": losses["dino_global_crops_loss"],
        "dino_local": losses["dino_local_crops_loss"],
        "ibot": losses["ibot_loss"] * 2,
        "koleo": losses["koleo_loss"] * 2 / KOLEO_WEIGHT,
    }
    dino = terms["dino_global"] + terms["dino_local"]
    return terms | {"dino": dino, "total": dino + terms["ibot"] + KOLEO_WEIGHT * terms["koleo"]}


def make(variant: dict[str, Any]) -> dict[str, np.ndarray]:
    """Run the steps; all that is stored."""
    from peers_dinov2 import Dinov2, collated, parameters

    peer = Dinov2(dinov2_values(variant), SHAPE)
    with torch.no_grad():
        for name, parameter in parameters(peer.arch.student):
            parameter.copy_(start(name, tuple(parameter.shape)))
    peer.start_teacher()
    stored: dict[str, np.ndarray] = {}
    for step in range(STEPS):
        losses, norms = peer.step(collated(*crops(step)), step)
        values = in_our_convention(losses) | {f"norm_{name}": norm for name, norm in norms.items()}
        print(step, {name: round(value, 5) for name, value in values.items()})
        stored |= {f"{step}/{name}": np.float64(value) for name, value in values.items()}
    for side in ("student", "teacher"):
        for name, parameter in parameters(getattr(peer.arch, side)):
            moved = parameter.detach() - start(name, tuple(parameter.shape))
            stored[f"{side}/{name}"] = moved.numpy().astype(np.float16)
    return stored


def main() -> None:
    """Make all variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="checkout of facebookresearch/dinov2")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(folder.parent / "benchmarks"))
    from peers_dinov2 import prepare

    torch.set_num_threads(1)
    prepare(options.dinov2)
    for name, variant in VARIANTS.items():
        path = folder / f"step_{name}.npz"
        np.savez_compressed(path, **make(variant))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
