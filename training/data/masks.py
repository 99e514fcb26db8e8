"""Block masks over the patches of global crops, and how much of each crop they take (dinov2's data/masking.py).

Which crops are masked, and how much of them, is drawn for all crops of a step at once; the mask of a crop is drawn from
its own seed. So ranks, micro-batches and workers change nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from training.config import MaskConfig

Grid = tuple[int, int]  # patches: (rows, columns)

_TRIES = 10
_RATIOS = 0x6D61736B  # tells this draw from others with the same seed and step


def plan_ratios(num_crops: int, *, seed: int, step: int, config: MaskConfig) -> np.ndarray:
    """Share of patches to mask in each global crop of a step.

    ``config.probability`` of the crops, rounded down, are masked. The range of ratios is cut into as many strata, and
    each of these crops gets a ratio from one of them; which one is random.

    Args:
        num_crops: of the whole step, over all ranks and micro-batches: twice its pictures, view-major.
        seed: of the run.
        step: its number.
        config: probability and range.

    Returns:
        float64 [num_crops]; 0 is an unmasked crop.
    """
    rng = np.random.Generator(np.random.PCG64([_RATIOS, seed % 2**64, step]))
    num_masked = int(num_crops * config.probability)
    edges = np.linspace(*config.ratio, num_masked + 1)
    ratios = np.zeros(num_crops)
    ratios[:num_masked] = rng.uniform(edges[:-1], edges[1:])
    rng.shuffle(ratios)
    return ratios


def draw_masks(crops: Sequence[int], ratios: np.ndarray, grid: Grid, *, seed: int, config: MaskConfig) -> np.ndarray:
    """Masks of global crops.

    Args:
        crops: number of each crop in the run: twice the position of its picture, plus its view.
        ratios: share of patches of each, float [n]; 0 masks none.
        grid: patches of a crop.
        seed: of the run.
        config: of the blocks.

    Returns:
        bool [n, N], True = masked.
    """
    height, width = grid
    masks = np.zeros((len(crops), height * width), bool)
    for mask, crop, ratio in zip(masks, crops, ratios.tolist(), strict=True):
        if ratio > 0:
            rng = random.Random(((seed % 2**64) << 64) | crop)
            mask[:] = block_mask(grid, int(height * width * ratio), rng, config=config).ravel()
    return masks


def block_mask(grid: Grid, num_masked: int, rng: random.Random, *, config: MaskConfig) -> np.ndarray:
    """Mask of rectangles that are laid until ``num_masked`` patches are covered, or ten tries in a row add none.

    Draws from ``rng`` what dinov2 draws from Python's ``random``, in its order; masks are equal for equal seeds.

    Args:
        grid: patches of the crop.
        num_masked: wanted patches; with completion ``none`` a few may be missing, never too many.
        rng: of this crop.
        config: sizes and shapes of blocks, and completion.

    Returns:
        bool [rows, columns].
    """
    mask = np.zeros(grid, bool)
    largest = _largest_block(grid, config)
    covered = 0
    while covered < num_masked:
        added = _add_block(mask, min(num_masked - covered, largest), rng, config)
        if not added:
            break
        covered += added
    if config.completion == "exact" and covered < num_masked:
        free = np.flatnonzero(~mask).tolist()
        mask.ravel()[rng.sample(free, min(num_masked - covered, len(free)))] = True
    return mask


def _largest_block(grid: Grid, config: MaskConfig) -> float:
    """Patches. dinov2 writes half of the grid as 0.5 * H // p * W // p, which halves the rows and rounds them down."""
    height, width = grid
    return height // 2 * width if config.max_block == "released" else height * width / 2


def _add_block(mask: np.ndarray, most: float, rng: random.Random, config: MaskConfig) -> int:
    """Lay one rectangle that adds 1 to ``most`` patches to ``mask``; how many it added."""
    rows, columns = mask.shape
    log_aspect = math.log(config.aspect_min)
    for _ in range(_TRIES):
        area = rng.uniform(config.min_block_patches, most)
        aspect = math.exp(rng.uniform(log_aspect, math.log(1 / config.aspect_min)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        block = mask[top : top + height, left : left + width]
        added = height * width - int(np.count_nonzero(block))
        if 0 < added <= most:
            block[:] = True
            return added
    return 0
