"""Squares of pixels to features: passes of a frozen backbone.

Letters: n pictures, S side of the square, D embedding dim, F features a picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import ViewConfig
from training.models.vit import VisionTransformer

Readout = Literal["cls", "mean", "cls_mean"]
READOUTS: tuple[Readout, ...] = get_args(Readout)


@torch.inference_mode()
def extract(
    backbone: VisionTransformer,
    pictures: Iterable[np.ndarray],
    *,
    views: ViewConfig,
    batch_size: int,
    num_blocks: int = 1,
    precision: str = "auto",
) -> Tensor:
    """Class tokens of the last blocks and the mean patch of the last: what all readouts and probes are cut from.

    Args:
        backbone: measured without stochastic depth, and left in the mode that it was in.
        pictures: each uint8 [S, S, 3].
        views: mean and standard deviation of a channel.
        batch_size: pictures at once.
        num_blocks: whose class tokens.
        precision: fp32, bf16, or auto: bf16 on a GPU.

    Returns:
        float32 [n, (num_blocks + 1) D] on the CPU: class tokens, the last block's last, then the mean patch.

    Raises:
        ValueError: there is no picture.
    """
    device = next(backbone.parameters()).device
    is_half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (views.mean, views.std))
    was_training = backbone.training
    backbone.eval()
    features = []
    for batch in _batches(pictures, batch_size):
        images = batch.to(device).permute(0, 3, 1, 2).float() / 255  # [b, 3, S, S]
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            blocks = backbone.intermediate((images - mean) / std, num_blocks)
        parts = [*(tokens.cls for tokens in blocks), blocks[-1].patches.float().mean(1)]
        features.append(torch.cat([part.float() for part in parts], dim=-1).cpu())
    backbone.train(was_training)
    if not features:
        raise ValueError("pictures: got none; allowed: one or more that can be decoded")
    return torch.cat(features)


def _batches(pictures: Iterable[np.ndarray], size: int) -> Iterator[Tensor]:
    """Up to ``size`` pictures at once, uint8 [b, S, S, 3]."""
    iterator = iter(pictures)
    while batch := list(itertools.islice(iterator, size)):
        yield torch.from_numpy(np.stack(batch))


def read_out(features: Tensor, dim: int, readout: Readout) -> Tensor:
    """What stands for a picture.

    Args:
        features: [n, k D], of ``extract``.
        dim: D.
        readout: cls or mean, of patches, [n, D]; cls_mean: both, each of length 1, [n, 2 D].
    """
    cls, mean = features[:, -2 * dim : -dim], features[:, -dim:]
    if readout == "cls_mean":
        return torch.cat([F.normalize(cls, dim=-1), F.normalize(mean, dim=-1)], dim=-1)
    return cls if readout == "cls" else mean
