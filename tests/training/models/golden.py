"""What dinov2 computed, and the noise that it computed on; see tests/golden/make_model.py."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.config import ModelConfig

FOLDER = Path(__file__).resolve().parents[2] / "golden"
MADE: dict[str, Any] = runpy.run_path(str(FOLDER / "make_model.py"))
VALUES: dict[str, np.ndarray] = dict(np.load(FOLDER / "model.npz"))


def golden(name: str) -> Tensor:
    return torch.from_numpy(VALUES[name])


def names(prefix: str) -> list[str]:
    """Stored names that begin so, without it."""
    return [name.removeprefix(prefix) for name in VALUES if name.startswith(prefix)]


def config_of(backbone: str, **changes: Any) -> ModelConfig:
    """Our configuration of a backbone of ``make_model.py``."""
    shape = {"dim": MADE["DIM"], "depth": MADE["DEPTH"], "num_heads": MADE["HEADS"], "patch_px": MADE["PATCH_PX"]}
    return ModelConfig(**(shape | {"layerscale": 1.0} | MADE["BACKBONES"][backbone] | changes))
