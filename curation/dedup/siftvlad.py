"""The weight-free copy descriptor: RootSIFT, VLAD, whitening, joined with low frequencies of the grey thumbnail.

Design and weights: measured on 200 photographs with 12 edits each among 44,000 other pictures; whole-image hashes and
DCT vectors see no crop, VLAD sees no strong blur, the two joined see both. A picture and its mirror image have one
vector: the VLADs of the two are added, and odd frequencies of the DCT lose their sign. That finds more crops than
asking twice, with the picture and with its mirror image, and costs no second search.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

# Long side at which SIFT looks. Small pictures are enlarged, so that a copy at half size keeps its keypoints.
SIDE_PX = 288
NUM_KEYPOINTS = 400
# The VLAD of a few keypoints is like many others: such pictures were the hubs of half of the false pairs with 12.
MIN_KEYPOINTS = 40
SIFT_DIM = 64  # of 128, by PCA
NUM_WORDS = 64
VLAD_DIM = 909  # whitened axes
PICTURES_PER_AXIS = 2  # of the fit, at least
DCT_DIM = 115
DCT_SIDE = 12  # frequencies a side, of a 32 x 32 thumbnail
DIM = VLAD_DIM + DCT_DIM
VLAD_WEIGHT = 0.8  # share of the squared length; the rest is the DCT's
MAX_FIT_KEYPOINTS = 120_000
# Rows of SIFT's 4 x 4 x 8 histogram seen in a mirror: equal to SIFT of the mirrored picture.
MIRROR = np.arange(128).reshape(4, 4, 8)[::-1][:, :, (8 - np.arange(8)) % 8].ravel()


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at length 1; rows of zeros stay."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9), np.float32)


def signed_root(rows: np.ndarray) -> np.ndarray:
    """Square root that keeps the sign; damps bursts."""
    return np.asarray(np.sign(rows) * np.sqrt(np.abs(rows)), np.float32)


def resized(grey: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    """Area filter when it shrinks, cubic when it grows."""
    import cv2

    shrinks = width_px * height_px < grey.shape[0] * grey.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(grey, (width_px, height_px), interpolation=method))


def grey_of(rgb: np.ndarray) -> np.ndarray:
    """Luma, uint8 [H, W]."""
    import cv2

    cv2.setNumThreads(1)
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY))


class Keypoints(NamedTuple):
    """Keypoints of a picture with its long side at 288 px, the strongest first; at most 400."""

    places: np.ndarray  # float32 [N, 2], x and y in px
    sift: np.ndarray  # uint8 [N, 128], as OpenCV rounds it
    width_px: int  # of the picture at that size

    @property
    def rows(self) -> np.ndarray:
        """RootSIFT, float32 [N, 128] (Arandjelovic and Zisserman 2012)."""
        wide = self.sift.astype(np.float32)
        return np.asarray(np.sqrt(wide / np.maximum(wide.sum(1, keepdims=True), 1e-9)), np.float32)


def keypoints_of(grey: np.ndarray) -> Keypoints:
    """Where SIFT sees something in a grey picture, uint8 [H, W], and what."""
    import cv2

    scale = SIDE_PX / max(grey.shape)
    small = resized(grey, max(16, round(grey.shape[1] * scale)), max(16, round(grey.shape[0] * scale)))
    sift = cv2.SIFT.create(nfeatures=NUM_KEYPOINTS, contrastThreshold=0.015, edgeThreshold=12)
    points, descriptors = sift.detectAndCompute(small, None)
    if descriptors is None or len(points) == 0:
        return Keypoints(np.empty((0, 2), np.float32), np.empty((0, 128), np.uint8), small.shape[1])
    order = np.argsort([-point.response for point in points], kind="stable")[:NUM_KEYPOINTS]
    places = np.array([points[at].pt for at in order], np.float32)
    return Keypoints(places, descriptors[order].astype(np.uint8), small.shape[1])


def _cosines(side_px: int, count: int) -> np.ndarray:
    basis = np.cos(np.pi * (2 * np.arange(side_px)[None] + 1) * np.arange(count)[:, None] / (2 * side_px))
    basis *= np.sqrt(2 / side_px)
    basis[0] /= np.sqrt(2)
    return np.asarray(basis, np.float32)


_BASIS = _cosines(32, DCT_SIDE)
_KEPT = (np.add.outer(np.arange(DCT_SIDE), np.arange(DCT_SIDE)).ravel() < 16) & (np.arange(DCT_SIDE**2) > 0)


def dct_vector(grey: np.ndarray) -> np.ndarray:
    """Signed roots of the low frequencies of the 32 x 32 thumbnail, without the mean; unit length, float32 [115].

    A mirror image has the opposite sign in the odd columns, so these are taken without it.
    """
    thumbnail = resized(grey, 32, 32).astype(np.float32)
    low = _BASIS @ thumbnail @ _BASIS.T
    low[:, 1::2] = np.abs(low[:, 1::2])
    return unit(signed_root(low.ravel()[_KEPT]))


def vlad(rows: np.ndarray, fit: dict[str, np.ndarray]) -> np.ndarray:
    """Sums of differences to the nearest word, each word at length 1, signed roots; unit length, float32 [words * dim].

    Jegou et al. 2010 with the intra-normalisation of Arandjelovic and Zisserman 2013.
    """
    words = fit["words"]
    reduced = (rows - fit["sift_mean"]) @ fit["sift_axes"]
    nearest = (reduced @ words.T - (words**2).sum(1) / 2).argmax(1)
    member = np.zeros((len(words), len(rows)), np.float32)
    member[nearest, np.arange(len(rows))] = 1
    sums = member @ reduced - member.sum(1)[:, None] * words
    return unit(signed_root(unit(sums)).ravel())


def symmetric_vlad(rows: np.ndarray, fit: dict[str, np.ndarray]) -> np.ndarray:
    """``vlad`` of a picture and of its mirror image, added; unit length, float32 [words * dim]."""
    return unit(vlad(rows, fit) + vlad(np.ascontiguousarray(rows[:, MIRROR]), fit))


def own_direction(grey: np.ndarray) -> np.ndarray:
    """A unit vector drawn from the thumbnail's digest, for pictures without enough keypoints.

    They have nothing that VLAD could compare; a common vector would make them copies of each other.
    """
    thumbnail = resized(grey, 32, 32)
    digest = hashlib.sha256(min(thumbnail.tobytes(), thumbnail[:, ::-1].tobytes())).digest()
    draw = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return unit(draw.standard_normal(VLAD_DIM).astype(np.float32))


def fit_sift_vlad(pictures: Iterable[np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
    """Words from pictures and their mirror images, whitening from the vectors of the two together.

    With few pictures there are fewer words and whitened axes; the vector is filled up with zeros. With none of use (no
    keypoints at all) the arrays are empty and a vector is told apart by its DCT and its own direction only.

    Args:
        pictures: RGB uint8 [H, W, 3] each, in a fixed order.
        seed: of the draw of keypoints and of k-means.

    Returns:
        sift_mean [128], sift_axes [128, d], words [w, d], vlad_mean [w * d], vlad_axes [w * d, a], float32.
    """
    found = [keypoints_of(grey_of(rgb)).rows for rgb in pictures]
    found = [rows for rows in found if len(rows) >= MIN_KEYPOINTS]
    if len(found) < 2:
        shapes = {"sift_mean": (128,), "sift_axes": (128, 0), "words": (0, 0), "vlad_mean": (0,), "vlad_axes": (0, 0)}
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    sample = _sample(found, seed)
    fit = {"sift_mean": sample.mean(0)}
    centred = sample - fit["sift_mean"]
    _, axes = np.linalg.eigh(centred.T @ centred)
    fit["sift_axes"] = np.ascontiguousarray(axes[:, ::-1][:, :SIFT_DIM], np.float32)
    fit["words"] = _words(centred @ fit["sift_axes"], seed)
    rows = np.stack([symmetric_vlad(view, fit) for view in found])
    fit["vlad_mean"] = rows.mean(0)
    fit["vlad_axes"] = whitening(rows - fit["vlad_mean"])
    return {name: np.asarray(array, np.float32) for name, array in fit.items()}


def _sample(found: list[np.ndarray], seed: int) -> np.ndarray:
    """Keypoints drawn from all pictures and their mirror images, in order, float32 [at most 120,000, 128]."""
    ends = np.cumsum([0] + [2 * len(rows) for rows in found])
    draw = np.random.Generator(np.random.PCG64(seed))
    chosen = np.sort(draw.permutation(int(ends[-1]))[:MAX_FIT_KEYPOINTS])
    drawn = []
    for rows, first, end in zip(found, ends[:-1], ends[1:], strict=True):
        mine = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, end)] - first
        plain = mine[mine < len(rows)]
        drawn += [rows[plain], rows[mine[len(plain) :] - len(rows)][:, MIRROR]]
    return np.concatenate(drawn)


def _words(rows: np.ndarray, seed: int) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(1)
    num_words = max(1, min(NUM_WORDS, len(rows) // 40))
    kmeans = faiss.Kmeans(rows.shape[1], num_words, niter=20, seed=seed, min_points_per_centroid=1)
    kmeans.train(np.ascontiguousarray(rows, np.float32))
    return np.asarray(kmeans.centroids, np.float32)


def whitening(centred: np.ndarray) -> np.ndarray:
    """Projection onto the strongest axes, each at unit variance, float32 [D, at most VLAD_DIM].

    Axes with next to no variance are left out, because whitening would blow up their noise. With as many axes as
    pictures every picture would be orthogonal to every other one, its own copies included, so there are far fewer.
    """
    from scipy.linalg import eigh

    num_rows = len(centred)
    most = int(max(1, min(VLAD_DIM, num_rows // PICTURES_PER_AXIS)))
    gram = (centred @ centred.T).astype(np.float64)
    values, vectors = eigh(gram, subset_by_index=(num_rows - most, num_rows - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    count = int(max(1, (values > values[0] * 1e-4).sum()))
    values, vectors = values[:count], vectors[:, :count]
    axes = centred.T @ (vectors / np.sqrt(values))
    return np.asarray(axes / np.sqrt(values / num_rows), np.float32)


class SiftVladDct:
    """The fitted descriptor."""

    dim = DIM

    def __init__(self, fit: dict[str, np.ndarray]) -> None:
        self.fit = fit

    def vector(self, rgb: np.ndarray) -> np.ndarray:
        """RGB uint8 [H, W, 3] to a unit vector, float32 [1024]."""
        grey = grey_of(rgb)
        return self.vector_of(grey, keypoints_of(grey).rows)

    def vector_of(self, grey: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The same, from the grey picture, uint8 [H, W], and its RootSIFT, float32 [N, 128]."""
        from threadpoolctl import threadpool_limits

        limits: Any = threadpool_limits(1)  # so that a sum is cut the same way on any machine size
        with limits:
            if len(rows) < MIN_KEYPOINTS or len(self.fit["vlad_mean"]) == 0:
                local = own_direction(grey)
            else:
                white = (symmetric_vlad(rows, self.fit) - self.fit["vlad_mean"]) @ self.fit["vlad_axes"]
                local = np.zeros(VLAD_DIM, np.float32)
                local[: len(white)] = unit(white)
            joined = [np.sqrt(VLAD_WEIGHT) * local, np.sqrt(1 - VLAD_WEIGHT) * dct_vector(grey)]
        return unit(np.concatenate(joined).astype(np.float32))
