"""The embedded default embedder: HOG of the grey picture and its colour thumbnail, each reduced by a PCA.

It needs no weights. kNN (k = 20, cosine, 20,000 pictures to 2,000) on 100 classes of Tiny-ImageNet is 17.8 %, where
thumbnails alone give 9.8 %. HOG is that of Dalal and Triggs 2005: unsigned gradients, 9 orientations, 8-px cells,
blocks of 2 x 2 cells, L2-Hys.
"""

from __future__ import annotations

import numpy as np

SIDE_PX = 64
CELL_PX = 8
NUM_ORIENTATIONS = 9
CLIP = 0.2
THUMB_PX = 32
HOG_DIM = 256
THUMB_DIM = 64
DIM = HOG_DIM + THUMB_DIM
THUMB_WEIGHT = 0.7
_NUM_CELLS = SIDE_PX // CELL_PX  # along a side
_CELL_OF_PIXEL = (
    np.arange(SIDE_PX)[:, None] // CELL_PX * _NUM_CELLS + np.arange(SIDE_PX)[None, :] // CELL_PX
) * NUM_ORIENTATIONS
_RANK_FLOOR = 1e-9  # of the largest variance: an axis below holds rounding, not pictures


def features(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HOG, float32 [1764], and colour thumbnail, float32 [3072] in 0 to 1, of uint8 [H, W, 3]."""
    import cv2

    square = cv2.resize(rgb, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    thumb = cv2.resize(square, (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA)
    return hog(square.astype(np.float32).mean(axis=2)), (thumb.astype(np.float32) / 255).ravel()


def hog(grey: np.ndarray) -> np.ndarray:
    """Histogram of oriented gradients, float32 [1764], of float32 [64, 64]; its scale does not matter.

    A gradient counts for the two orientations it lies between; that is worth one point of kNN over the nearest one.
    """
    padded = np.pad(grey, 1, mode="edge")
    along_x, along_y = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    length = np.sqrt(along_x**2 + along_y**2)
    orientation = np.mod(np.arctan2(along_y, along_x), np.pi) * (NUM_ORIENTATIONS / np.pi)
    lower = np.floor(orientation).astype(np.int64)
    share = orientation - lower
    num_bins = _NUM_CELLS**2 * NUM_ORIENTATIONS
    cells = np.zeros(num_bins)
    for side, weight in ((lower, 1 - share), (lower + 1, share)):
        at = _CELL_OF_PIXEL + side % NUM_ORIENTATIONS
        cells += np.bincount(at.ravel(), (length * weight).ravel(), num_bins)
    grid = cells.reshape(_NUM_CELLS, _NUM_CELLS, NUM_ORIENTATIONS)
    blocks = np.concatenate([grid[:-1, :-1], grid[1:, :-1], grid[:-1, 1:], grid[1:, 1:]], axis=2)  # [7, 7, 36]
    blocks = _unit(np.minimum(_unit(blocks), CLIP))
    return blocks.ravel().astype(np.float32)


def fit(hogs: np.ndarray, thumbs: np.ndarray) -> dict[str, np.ndarray]:
    """PCA of each half: ``hog_mean, hog_axes, thumb_mean, thumb_axes``; axes float32 [dim, features].

    Where the pictures span fewer dimensions, the remaining axes are zero.
    """
    arrays = {}
    for name, values, dim in (("hog", hogs, HOG_DIM), ("thumb", thumbs, THUMB_DIM)):
        mean = values.mean(axis=0, dtype=np.float64)
        arrays[f"{name}_mean"] = mean.astype(np.float32)
        arrays[f"{name}_axes"] = principal_axes(values - mean, dim)
    return arrays


def principal_axes(centred: np.ndarray, dim: int) -> np.ndarray:
    """Directions of largest variance, float32 [dim, F], of float64 [N, F] without its mean; signs are fixed."""
    from scipy.linalg import eigh

    num_rows, num_features = centred.shape
    dual = num_rows < num_features  # the smaller of the two products has the same eigenvalues
    product = centred @ centred.T if dual else centred.T @ centred
    size = len(product)
    values, vectors = eigh(product, subset_by_index=[max(0, size - dim), size - 1])
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int((values > _RANK_FLOOR * max(float(values[0]), 1e-300)).sum())
    found = (centred.T @ vectors[:, :rank] / np.sqrt(values[:rank])) if dual else vectors[:, :rank]
    largest = np.take_along_axis(found, np.abs(found).argmax(axis=0)[None, :], axis=0)
    axes = np.zeros((dim, num_features), np.float32)
    axes[:rank] = (found * np.sign(largest)).T
    return axes


def project(hog_values: np.ndarray, thumb: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Unit vector, float32 [320], of one picture's features; each half is brought to unit length before the weight."""
    hog_half = _unit(arrays["hog_axes"] @ (hog_values - arrays["hog_mean"]))
    thumb_half = _unit(arrays["thumb_axes"] @ (thumb - arrays["thumb_mean"]))
    return _unit(np.concatenate([hog_half, np.float32(THUMB_WEIGHT) * thumb_half])).astype(np.float32)


def _unit(values: np.ndarray) -> np.ndarray:
    """Unit length along the last axis; zero stays zero."""
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(values / np.maximum(norms, 1e-12))
