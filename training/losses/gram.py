"""Gram anchoring: similarities between the patches of a picture held to those of an earlier teacher.

Letters: C crops, N patches, D embedding dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of cosine similarities between all patches of the same crop.

    Args:
        student: [C, N, D].
        teacher: [C, N, D'].
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(_similarities(student), _similarities(teacher))


def _similarities(tokens: Tensor) -> Tensor:
    """[C, N, D] to [C, N, N]."""
    rows = F.normalize(tokens.float(), dim=-1)
    return rows @ rows.transpose(1, 2)


def resize_tokens(tokens: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Patch tokens [C, N, D] of one grid (rows, columns) to another, bicubic: [C, N', D]."""
    num_crops, _, dim = tokens.shape
    planes = tokens.transpose(1, 2).reshape(num_crops, dim, *from_grid)
    resized = F.interpolate(planes, size=to_grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)
