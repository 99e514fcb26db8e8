"""The nearest centroid of each vector: a GEMM proposes, exact similarities decide.

Vectors and centroids are held as fp16 values. The product of two is a multiple of 2^-48, so fp64 sums them without
rounding, in whatever order. A score of the GEMM is off by less than a margin; whatever lies within two margins of the
best score is scored again, exactly. So neither the block, nor the precision of the GEMM, nor the device changes a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

Precision = Literal["fp32", "bf16"]
Device = Literal["cpu", "cuda"]

# By how much a score of unit vectors may be off. bf16 rounds both factors (2^-8 of the similarity of their absolute
# values, which is at most 1) and the score (2^-9).
MARGINS: dict[Precision, float] = {"fp32": 1e-4, "bf16": 6.1e-3}
_BLOCK_SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}  # held at once: 8 and 256 MiB
_LEAST_ROWS, _MOST_ROWS = {"cpu": 64, "cuda": 256}, {"cpu": 512, "cuda": 1 << 16}
# bf16 pays where a GEMM is large, and as long as it leaves few centroids of a row to be scored again.
_LEAST_BF16, _MOST_RESCORED = 1024, 1 / 50


def multiplies_bf16(device: Device = "cpu") -> bool:
    """Whether the device has instructions for it."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def fastest_precision(num_centroids: int, device: Device = "cpu") -> Precision:
    """bf16 where the device multiplies by it and there are enough centroids for that to pay."""
    return "bf16" if num_centroids >= _LEAST_BF16 and multiplies_bf16(device) else "fp32"


class Nearest(NamedTuple):
    """The nearest centroid of each row of a block, ties to the least number."""

    cluster: np.ndarray  # int32 [R]
    similarity: np.ndarray  # float32 [R], exact


def widened(vectors: np.ndarray) -> np.ndarray:
    """fp16 values, [N, D], as float32; nothing is copied that is float32 already."""
    if vectors.dtype != np.float16:
        return np.ascontiguousarray(vectors, np.float32)
    from curation.represent import loops

    wide = np.empty(vectors.shape, np.float32)
    loops.widen(np.ascontiguousarray(vectors).view(np.uint16).ravel(), wide.ravel(), wide.view(np.uint32).ravel())
    return wide


@contextmanager
def whole_sums() -> Iterator[None]:
    """A GEMM on the GPU adds in fp32, and rounds no factor that it was not given rounded."""
    import torch

    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction")
    backend = torch.backends.cuda.matmul
    before = [getattr(backend, name) for name in names]
    for name in names:
        setattr(backend, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(backend, name, value)


class Centroids:
    """Centroids, ready to be asked which of them is nearest.

    Args:
        centroids: fp16 values, [K, D], K >= 1, about unit length.
        precision: of the GEMM that proposes; bf16 scores more of them again, and gives way to fp32 where these are too
            many. None takes the faster. It changes no byte.
        device: cpu or cuda; changes no byte.
    """

    def __init__(self, centroids: np.ndarray, *, precision: Precision | None = None, device: Device = "cpu") -> None:
        precision = precision or fastest_precision(len(centroids), device)
        self._exact = widened(centroids)
        self._precision, self._margin = precision, self._margin_of(precision)
        self._device = device
        rows = _BLOCK_SCORES[device] // len(centroids)
        self._num_rows = min(_MOST_ROWS[device], max(_LEAST_ROWS[device], rows))
        self._scores = np.empty((self._num_rows, len(centroids)) if device == "cpu" else (0, 0), np.float32)
        self._held: Any = None  # what torch multiplies by
        self._held_exactly: Any = None  # the same in fp32
        if precision == "bf16" or device == "cuda":
            import torch

            self._held_exactly = torch.from_numpy(self._exact).to(device)
            self._held = self._held_exactly.bfloat16() if precision == "bf16" else self._held_exactly

    def blocks(self, vectors: np.ndarray) -> Iterator[tuple[np.ndarray, Nearest]]:
        """Blocks of rows in order, float32 [R, D], each with its nearest centroids.

        Args:
            vectors: fp16 values, [N, D].
        """
        for start in range(0, len(vectors), self._num_rows):
            block = widened(vectors[start : start + self._num_rows])
            yield block, self._on_cpu(block) if self._device == "cpu" else self._by_torch(block)

    def of(self, vectors: np.ndarray) -> Nearest:
        """The nearest centroid of each of the vectors, fp16 values, [N, D]."""
        found = [nearest for _, nearest in self.blocks(vectors)]
        if not found:
            return Nearest(np.zeros(0, np.int32), np.zeros(0, np.float32))
        return Nearest(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _on_cpu(self, block: np.ndarray) -> Nearest:
        from curation.represent import loops

        scores = self._scores[: len(block)]
        if self._held is None:
            np.matmul(block, self._exact.T, out=scores)
        else:
            import torch

            torch.from_numpy(scores).copy_(torch.from_numpy(block).bfloat16() @ self._held.T)
        cluster, similarity, num_scored = loops.settle(scores, block, self._exact, self._margin)
        self._mind(num_scored, scores.size)
        return Nearest(cluster, similarity)

    def _mind(self, num_scored: int, num: int) -> None:
        """Give bf16 up where it decides too little, as among vectors that are all alike."""
        if self._precision == "bf16" and num_scored > _MOST_RESCORED * num:
            self._precision, self._margin = "fp32", self._margin_of("fp32")
            self._held = self._held_exactly if self._device == "cuda" else None

    def _margin_of(self, precision: Precision) -> float:
        """By how much a score may be off; where there are many dimensions, the rounding of fp32 sums decides."""
        return max(MARGINS[precision], 1.1 * len(self._exact[0]) * 2.0**-24)

    def _by_torch(self, block: np.ndarray) -> Nearest:
        """The same on a GPU, and on any device of torch."""
        import torch

        vectors = torch.from_numpy(block).to(self._held.device)
        with whole_sums():
            scores = (vectors.to(self._held.dtype) @ self._held.T).float()  # [R, K]
        row, column = (scores >= scores.amax(dim=1, keepdim=True) - 2 * self._margin).nonzero(as_tuple=True)
        self._mind(len(row), scores.numel())
        exact = torch.empty(len(row), dtype=torch.float32, device=row.device)
        for start in range(0, len(row), 1 << 18):
            some = slice(start, start + (1 << 18))
            pair = vectors[row[some]].double() * self._held_exactly[column[some]].double()
            exact[some] = pair.sum(dim=1).float()
        highest = torch.full((len(block),), -torch.inf, device=row.device).scatter_reduce(0, row, exact, "amax")
        tied = torch.where(exact == highest[row], column, scores.shape[1])
        least = torch.full((len(block),), scores.shape[1], device=row.device).scatter_reduce(0, row, tied, "amin")
        return Nearest(least.cpu().numpy().astype(np.int32), highest.cpu().numpy())
