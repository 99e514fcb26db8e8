"""Golden schedules and parameter groups, from facebookresearch/dinov2 on a CPU.

    python tests/golden/make_optim.py --dinov2 PATH

Writes ``optim.npz`` beside this file:

    steps/RECIPE                     sampled steps, the last of them beyond the end
    schedule/RECIPE/NAME             values there, of lr, last_layer_lr, weight_decay, momentum, teacher_temperature
    sums/RECIPE/NAME                 of all steps of the recipe: sum of values, sum of value x step
    groups/ARCH/names                parameters of a student with both heads
    groups/ARCH/DECAY                for each lr multiplier, weight decay multiplier, is_last_layer
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# our recipe: their configuration, GPUs that make its published batch
RECIPES = {"vitl16_short": ("vitl16_short", 32), "vitl14": ("vitl14", 96), "vitg14": ("vitg14", 256)}
NUM_SAMPLES = 300
# our name of an architecture: theirs, feed-forward layer, register tokens
ARCHITECTURES = {"vit_small": ("mlp", 4), "vit_large": ("swiglu", 0), "vit_giant2": ("swiglu", 0)}
DECAYS = (0.9, 1.0)
PATCH_EMBED_LR = 0.2


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One configuration laid over another."""
    return below | {k: merged(below[k], v) if isinstance(v, dict) and k in below else v for k, v in above.items()}


def schedules(dinov2: Path, name: str, gpus: int) -> dict[str, Any]:
    """The arrays of a configuration and the values after them, as train.py asks for them."""
    from dinov2.utils.utils import CosineScheduler

    folder = dinov2 / "dinov2" / "configs"
    config = yaml.safe_load((folder / "ssl_default_config.yaml").read_text())
    config = merged(config, yaml.safe_load((folder / "train" / f"{name}.yaml").read_text()))
    optim, teacher, epoch = config["optim"], config["teacher"], config["train"]["OFFICIAL_EPOCH_LENGTH"]
    total = optim["epochs"] * epoch
    lr = optim["base_lr"] * np.sqrt(config["train"]["batch_size_per_gpu"] * gpus / 1024.0)
    warmup, frozen = optim["warmup_epochs"] * epoch, optim["freeze_last_layer_epochs"] * epoch
    heat = teacher["warmup_teacher_temp_epochs"] * epoch
    last = CosineScheduler(lr, optim["min_lr"], total, warmup)
    last.schedule[:frozen] = 0
    return {
        "lr": CosineScheduler(lr, optim["min_lr"], total, warmup),
        "last_layer_lr": last,
        "weight_decay": CosineScheduler(optim["weight_decay"], optim["weight_decay_end"], total),
        "momentum": CosineScheduler(teacher["momentum_teacher"], teacher["final_momentum_teacher"], total),
        "teacher_temperature": CosineScheduler(
            teacher["teacher_temp"], teacher["teacher_temp"], heat, heat, teacher["warmup_teacher_temp"]
        ),
    }


def sampled(total: int, edges: list[int]) -> np.ndarray:
    """Steps at and beside the edges, and others drawn from all: int64, ascending."""
    beside = [step for edge in edges for step in (edge - 1, edge, edge + 1) if step >= 0]
    drawn = np.random.RandomState(0).randint(0, total, NUM_SAMPLES)
    return np.unique(np.concatenate([beside, drawn, [total - 1, total, total + 1000]]))


def groups(architecture: str, decay: float) -> tuple[list[str], np.ndarray]:
    """Names and [n, 3] multipliers of a student's backbone and heads; nothing is computed."""
    import torch
    from dinov2.layers import DINOHead
    from dinov2.models import vision_transformer
    from dinov2.utils.param_groups import get_params_groups_with_decay

    ffn, registers = ARCHITECTURES[architecture]
    with torch.device("meta"):
        backbone = vision_transformer.__dict__[architecture](
            patch_size=14, ffn_layer=ffn, init_values=1e-5, num_register_tokens=registers, block_chunks=0,
            drop_path_uniform=True,
        )  # fmt: skip
        heads = {name: DINOHead(backbone.embed_dim, 16, nlayers=3) for name in ("dino_head", "ibot_head")}
    names, rows = [], []
    for child, module in {"backbone": backbone, **heads}.items():
        for group in get_params_groups_with_decay(module, decay, PATCH_EMBED_LR):
            names.append(f"{child}.{group['name']}")
            rows.append((group["lr_multiplier"], group["wd_multiplier"], float(group["is_last_layer"])))
    return names, np.array(rows)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", required=True, type=Path, help="a checkout of facebookresearch/dinov2")
    path: Path = parser.parse_args().dinov2
    sys.path.insert(0, str(path))
    values: dict[str, Any] = {}
    for recipe, (name, gpus) in RECIPES.items():
        made = schedules(path, name, gpus)
        total = made["lr"].total_iters
        steps = sampled(total, [0, 1250, 12_500, 37_500, 100_000])
        values[f"steps/{recipe}"] = steps
        for quantity, schedule in made.items():
            values[f"schedule/{recipe}/{quantity}"] = np.array([schedule[step] for step in steps], np.float64)
            whole = np.array([schedule[step] for step in range(total)], np.float64)
            values[f"sums/{recipe}/{quantity}"] = np.array([whole.sum(), whole @ np.arange(total)])
    for architecture in ARCHITECTURES:
        for decay in DECAYS:
            names, rows = groups(architecture, decay)
            values[f"groups/{architecture}/names"] = np.array(names)
            values[f"groups/{architecture}/{decay}"] = rows
    np.savez_compressed(Path(__file__).with_name("optim.npz"), **values)


if __name__ == "__main__":
    main()
