"""Learned position embeddings on grids of another size than the one that they are stored for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSET = 0.1


def stored_side(pos_embed: Tensor) -> int:
    """M of position embeddings [1, 1 + M M, D]: that of the class token, then a square grid, row by row.

    Raises:
        ValueError: the grid is not square.
    """
    num_patches = pos_embed.shape[1] - 1
    side = math.isqrt(max(num_patches, 0))
    if num_patches < 1 or side * side != num_patches:
        raise ValueError(f"pos_embed: got {num_patches} positions of patches; allowed: a square number")
    return side


def resize_positions(pos_embed: Tensor, grid: tuple[int, int], flavour: str) -> Tensor:
    """Bring position embeddings to another grid, by bicubic interpolation in fp32.

    dinov2 has two flavours. ``offset``, of models without registers, asks for a scale of (n + 0.1) / M instead of the
    size n that is wanted, which moves all sampling points a little. ``size``, of those with registers, asks for the
    size, with antialiasing where the grid shrinks.

    Args:
        pos_embed: [1, 1 + M M, D], the class token first.
        grid: patches (down, across) that are wanted: h, w.
        flavour: offset or size.

    Returns:
        [1, 1 + h w, D]; what was given where that is the stored grid.
    """
    side = stored_side(pos_embed)
    if grid == (side, side):
        return pos_embed
    square = pos_embed[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, M, M]
    if flavour == "offset":
        scale = ((grid[0] + OFFSET) / side, (grid[1] + OFFSET) / side)
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
    else:
        resized = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
    patches = resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # [1, h w, D]
    return torch.cat([pos_embed[:, :1], patches], dim=1)
