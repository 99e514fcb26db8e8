from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from training.config import MaskConfig
from training.data.masks import block_mask, draw_masks, plan_ratios

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "masks.npz")
RELEASED = MaskConfig()
EXACT = MaskConfig(completion="exact")


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (37, 37), (8, 12)])
def test_masks_are_dinov2s_for_the_same_seed(grid):
    name = f"{grid[0]}x{grid[1]}"
    masks = np.unpackbits(GOLDEN[f"masks_{name}"], axis=1)[:, : grid[0] * grid[1]].astype(bool)
    for seed, (mask, target) in enumerate(zip(masks, GOLDEN[f"targets_{name}"], strict=True)):
        found = block_mask(grid, int(target), random.Random(seed), config=RELEASED)
        np.testing.assert_array_equal(found.ravel(), mask)


@pytest.mark.parametrize(("side", "mean", "fill"), [(16, 0.296, 0.9989), (14, 0.296, 0.9984), (37, 0.291, 0.97)])
def test_masks_fill_their_target_as_dinov2s_do(side, mean, fill):
    rng = random.Random(0)
    shares, fills = [], []
    for _ in range(300):
        target = int(side * side * rng.uniform(0.1, 0.5))
        covered = int(block_mask((side, side), target, rng, config=RELEASED).sum())
        assert covered <= target
        shares.append(covered / side**2)
        fills.append(covered / target)
    assert np.mean(shares) == pytest.approx(mean, abs=0.02)
    assert np.mean(fills) > fill - 0.003
    assert min(fills) > 0.9


@pytest.mark.parametrize("grid", [(16, 16), (37, 37), (4, 7), (1, 5)])
def test_exact_completion_masks_the_very_number(grid):
    rng = random.Random(1)
    for target in range(0, grid[0] * grid[1] + 1, max(1, grid[0] * grid[1] // 23)):
        assert block_mask(grid, target, rng, config=EXACT).sum() == target


def test_exact_completion_only_adds_to_the_released_mask():
    for seed in range(20):
        released = block_mask((14, 14), 90, random.Random(seed), config=RELEASED)
        exact = block_mask((14, 14), 90, random.Random(seed), config=EXACT)
        assert (exact | released == exact).all()


@pytest.mark.parametrize(("max_block", "most"), [("released", 666), ("paper", 684)])
def test_the_largest_block_of_a_37_grid_is_halved_by_rule(max_block, most):
    config = MaskConfig(max_block=max_block, min_block_patches=680, aspect_min=1)
    # a 26 x 26 square has 676 patches: more than dinov2's 666, not more than half of 1,369
    sizes = {int(block_mask((37, 37), 684, random.Random(seed), config=config).sum()) for seed in range(10)}
    assert (676 in sizes) == (most >= 676)


def test_no_block_spans_the_grid():
    config = MaskConfig(min_block_patches=60, aspect_min=1)
    assert not block_mask((8, 8), 64, random.Random(0), config=config).any()


# Ratios


def test_half_of_the_crops_are_masked_one_from_each_stratum():
    ratios = plan_ratios(128, seed=0, step=3, config=RELEASED)
    assert ratios.shape == (128,)
    drawn = np.sort(ratios[ratios > 0])
    edges = np.linspace(0.1, 0.5, 65)
    assert len(drawn) == 64
    assert (drawn >= edges[:-1]).all()
    assert (drawn <= edges[1:]).all()


@pytest.mark.parametrize(
    ("num", "probability", "masked"), [(7, 0.5, 3), (1, 0.5, 0), (8, 0, 0), (8, 1, 8), (6, 0.34, 2)]
)
def test_the_number_of_masked_crops_is_rounded_down(num, probability, masked):
    ratios = plan_ratios(num, seed=0, step=0, config=MaskConfig(probability=probability))
    assert (ratios > 0).sum() == masked


def test_ratios_are_uniform_inside_strata_and_land_on_any_crop():
    steps = np.stack([plan_ratios(8, seed=1, step=step, config=RELEASED) for step in range(800)])
    assert stats.kstest(steps[steps > 0], "uniform", (0.1, 0.4)).pvalue > 0.001
    within = np.sort(steps, 1)[:, 4:] - np.linspace(0.1, 0.5, 5)[:-1]
    for stratum in within.T:
        assert stats.kstest(stratum, "uniform", (0, 0.1)).pvalue > 0.001
    assert stats.chisquare((steps > 0).sum(0)).pvalue > 0.001
    assert stats.chisquare(np.bincount(steps.argmax(1), minlength=8)).pvalue > 0.001


def test_ratios_follow_from_seed_and_step():
    one = plan_ratios(16, seed=5, step=7, config=RELEASED)
    np.testing.assert_array_equal(one, plan_ratios(16, seed=5, step=7, config=RELEASED))
    for seed, step in ((5, 8), (6, 7), (-5, 7)):
        assert (one != plan_ratios(16, seed=seed, step=step, config=RELEASED)).any()


# Masks of many crops


def test_masks_do_not_depend_on_how_the_crops_are_split():
    ratios = plan_ratios(12, seed=0, step=0, config=RELEASED)
    crops = list(range(100, 112))
    whole = draw_masks(crops, ratios, (14, 14), seed=4, config=RELEASED)
    parts = [draw_masks(crops[i::3], ratios[i::3], (14, 14), seed=4, config=RELEASED) for i in range(3)]
    for i in range(3):
        np.testing.assert_array_equal(parts[i], whole[i::3])
    assert whole.dtype == bool
    assert whole.shape == (12, 196)
    np.testing.assert_array_equal(whole.any(1), ratios > 0)


def test_each_crop_and_each_seed_has_a_mask_of_its_own():
    ratios = np.full(6, 0.3)
    one = draw_masks(range(6), ratios, (16, 16), seed=0, config=RELEASED)
    assert len(np.unique(one, axis=0)) == 6
    assert (one != draw_masks(range(6), ratios, (16, 16), seed=1, config=RELEASED)).any(1).all()


def test_every_patch_is_masked_sometimes():
    masks = draw_masks(range(400), np.full(400, 0.3), (14, 14), seed=0, config=RELEASED)
    share = masks.mean(0).reshape(14, 14)
    assert share.min() > 0.01
    assert share[3:-3, 3:-3].mean() > share[[0, -1]].mean()  # rectangles reach the middle more often
    np.testing.assert_allclose(share, share[::-1, ::-1], atol=0.15)
