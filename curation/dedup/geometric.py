"""Do two pictures show the same thing at the same places? Geometric verification of candidate copies.

Keypoints of one picture are matched with those of the other and of its mirror image, and a similarity transform (turn,
scale, shift) is sought that most of them agree on (RANSAC, Fischler and Bolles 1981). Unrelated pictures agree on a few
places at most, however many of them there are in a pool: what a threshold on a cosine lets through grows with the pool,
what this lets through hardly does. Of two copies one is in the other, whole or nearly so; pictures that share a caption
or a logo agree on that alone, which is a small part of both.
"""

from __future__ import annotations

import numpy as np

from curation.dedup.siftvlad import MIRROR, Keypoints

MIN_PLACES = 12  # more than any two photographs that share nothing reached: `make bench NAME=copies`
MIN_SPAN = 0.5  # of the keypoints of one of the two, both ways: what agrees
_NEAREST_RATIO = 0.72  # squared distance to the nearest keypoint over that to the second nearest (Lowe 2004)
_CELL_PX = 3  # two keypoints in one cell of this size are one place
_ERROR_PX = 4.0  # of a keypoint that agrees
_SCALES = (0.2, 5.0)
_MIN_SPREAD_PX = 8  # of the places that agree, both ways: repeated points lie in a heap, or along a side
_TAILS = (5, 95)  # percent; a keypoint far from the others does not make a picture larger
_ITERATIONS = 1000
_CONFIDENCE = 0.995


def places_in_common(left: Keypoints, right: Keypoints, *, at_least: int = MIN_PLACES) -> int:
    """Distinct places of ``right`` that agree with places of ``left``, or of its mirror image, on one transform.

    0 where fewer than ``at_least`` keypoints look alike, as in nearly all pairs of unrelated pictures: quick.
    """
    rows, others = left.rows, right.rows
    mirrored = left.places * np.array([-1, 1], np.float32) + np.array([left.width_px - 1, 0], np.float32)
    return max(
        _agreeing(left.places, right.places, rows @ others.T, at_least),
        _agreeing(mirrored, right.places, rows[:, MIRROR] @ others.T, at_least),
    )


def _agreeing(left: np.ndarray, right: np.ndarray, scores: np.ndarray, at_least: int) -> int:
    """Distinct places that agree.

    Args:
        left: places, float32 [N, 2].
        right: places, float32 [M, 2].
        scores: cosines of their keypoints, float32 [N, M]; is written to.
        at_least: keypoints that have to look alike.
    """
    import cv2

    if min(scores.shape) < 2:
        return 0
    at = np.arange(len(scores))
    nearest = scores.argmax(1)
    first = scores[at, nearest]
    scores[at, nearest] = -np.inf
    second = scores.max(1)
    matched = np.flatnonzero(1 - first < _NEAREST_RATIO * (1 - second))
    if len(matched) < at_least:
        return 0
    here, there = left[matched], right[nearest[matched]]
    transform, agrees = cv2.estimateAffinePartial2D(
        here,
        there,
        method=cv2.RANSAC,
        ransacReprojThreshold=_ERROR_PX,
        maxIters=_ITERATIONS,
        confidence=_CONFIDENCE,
    )
    if transform is None:
        return 0
    inside = agrees.ravel() > 0
    scale = float(np.hypot(transform[0, 0], transform[1, 0]))
    sides = ((left, here[inside]), (right, there[inside]))
    if not _SCALES[0] < scale < _SCALES[1] or np.ptp(here[inside], 0).min() < _MIN_SPREAD_PX:
        return 0
    if max(_span(inner, all_places) for all_places, inner in sides) < MIN_SPAN:
        return 0
    return min(len(np.unique(np.round(inner / _CELL_PX), axis=0)) for _, inner in sides)


def _span(some: np.ndarray, places: np.ndarray) -> float:
    """How much of the extent of all places, float32 [N, 2], some of them take, along the side where it is less."""
    extent = np.ptp(np.percentile(places, _TAILS, axis=0), 0)
    return float((np.ptp(some, 0) / np.maximum(extent, 1)).min())
