"""PCA hash: on which side of its median a grey thumbnail lies along 64 principal axes of such thumbnails.

The DINOv2 paper (arXiv:2304.07193, section 3) says "PCA hash" and no more; size and fit are ours. The axes are fitted
once on pictures of the pool, so a code means something beside codes of the same fit only: its table lies in a folder
that names the fit, and the fit is kept when the pool grows.

Plain axes, with the medians of the fit as thresholds so that every bit halves the pictures. Rotating the axes, so that
all bits tell equally much, was measured and is worse: at radius 8, among 22,000 distinct pictures (2.4e8 pairs), 18
pairs fall together by plain axes, 39 by rotated whitened ones, 272 with half of the whitening and 12,555 without, and
no copy more is found. pHash: 23. Of 428 photographs saved at JPEG quality 20, or at half their size, 99.8 % stay within
4 bits and all within 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.describe import (
    arrays_to_table,
    crops_of_installed_photographs,
    read_small,
    sample_of,
    table_to_arrays,
)
from curation.dedup.near import rows_at
from curation.dedup.siftvlad import grey_of, resized
from curation.schema import TABLES
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, empty_table, keyed_folder
from training.config import Config

PCA_HASH = "pca_hash"  # as near.hash names it
SIDE_PX = 32
NUM_BITS = 64
_MIN_STD = 0.5  # of the thumbnail, of 255: below, the picture is one colour and its axes are noise
_FIT_AT_LEAST = 800
_FIT_SEED = 0
_PLACE = ["image_id", "small_object", "small_offset", "small_bytes"]


class PcaHashConfig(Config):
    """What the axes of the PCA hash are fitted on. They are made where ``near.hash`` is pca_hash."""

    fit_pictures: int = Field(
        2000, ge=1, description=f"pictures that fit the axes; fewer than {_FIT_AT_LEAST} are topped up"
    )
    fit_shards: int = Field(16, ge=1, description="first shards of the pool that they are drawn from")


# --- pure functions -------------------------------------------------------------------------------------------------


def thumbnail(rgb: np.ndarray) -> np.ndarray | None:
    """Grey thumbnail without its mean, at unit length, float64 [1024], of uint8 [H, W, 3]; None for one colour.

    So neither brightness nor contrast shows.
    """
    pixels = resized(grey_of(rgb), SIDE_PX, SIDE_PX).astype(np.float64).ravel()
    pixels -= pixels.mean()
    length = float(np.sqrt((pixels**2).sum()))
    return None if length < _MIN_STD * SIDE_PX else pixels / length


def fit_pca_axes(thumbnails: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, axes and thresholds from thumbnails [N, 1024], N >= 64, in a fixed order.

    Returns:
        mean [1024], axes [1024, 64] by falling variance, each with its largest number positive, medians [64]; float32.
    """
    mean = thumbnails.mean(axis=0)
    centred = thumbnails - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :NUM_BITS]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, np.arange(NUM_BITS)])
    fit = {"mean": mean.astype(np.float32), "axes": np.ascontiguousarray(axes, np.float32)}
    medians = np.median((thumbnails - fit["mean"]) @ fit["axes"].astype(np.float64), axis=0)
    return {**fit, "medians": medians.astype(np.float32)}


def pca_hash(rgb: np.ndarray, fit: dict[str, np.ndarray]) -> int | None:
    """64 bits of uint8 [H, W, 3], the first axis the most significant one; None for a picture of one colour.

    Such pictures would all have one code, and stand for each other.
    """
    pixels = thumbnail(rgb)
    if pixels is None:
        return None
    bits = (pixels - fit["mean"]) @ fit["axes"].astype(np.float64) > fit["medians"]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _one_thread() -> Any:
    """Linear algebra on one thread, so that sums are taken in one order on any machine."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


# --- fit ------------------------------------------------------------------------------------------------------------


def fit_pca_hash(io: TaskIO, *, shards: list[int], num_pictures: int) -> pa.Table:
    """The table ``fit_pca_hash``; no row where nothing asks for the hash (``num_pictures`` = 0).

    A pool of fewer than 800 usable pictures, or of none, is topped up with crops of installed photographs, so that
    there always are 64 axes.
    """
    if num_pictures == 0:
        return arrays_to_table({})

    def usable(pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        return (pixels for pixels in map(thumbnail, pictures) if pixels is not None)

    found = list(usable(read_small(io, place) for place in sample_of(io, shards, num_pictures)))
    found += islice(usable(crops_of_installed_photographs(_FIT_SEED)), max(0, _FIT_AT_LEAST - len(found)))
    with _one_thread():
        return arrays_to_table(fit_pca_axes(np.stack(found)))


class FitPcaHash(GlobalStage):
    """Axes of the PCA hash, from the first shards of the pool; kept when lists grow."""

    name = "fit_pca_hash"
    section = "pca_hash"
    reads = ("hashes", "detections")
    writes = ("fit_pca_hash",)
    config: PcaHashConfig

    def __init__(self, config: PcaHashConfig, hash_name: str) -> None:
        super().__init__(config)
        self.is_asked_for = hash_name == PCA_HASH

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the fit; nothing where there is none."""
        return self.config.fingerprint_values() if self.is_asked_for else {}

    def folder(self, table: str, context: Context) -> str:
        """``fits/fit_pca_hash/NAME-KEY``: of the settings and of the pictures' folder."""
        name = "grey32" if self.is_asked_for else "none"
        pixels = context.part("detections", 0).folder
        return f"fits/{keyed_folder(table, name, self.version, self.fingerprint_values(), pixels)}"

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One fit."""
        shards = context.shards("pool")[: self.config.fit_shards] if self.is_asked_for else []
        args = {"shards": shards, "num_pictures": self.config.fit_pictures if self.is_asked_for else 0}
        reads = tuple(context.part(table, shard) for table in self.reads for shard in shards)
        part = context.part("fit_pca_hash", 0)
        map([Task(function=fit_pca_hash, args=args, reads=reads, writes=part, once=True)])


# --- apply ----------------------------------------------------------------------------------------------------------


class PcaHashes(ShardStage):
    """One code for each picture that safety let through; empty parts where ``near.hash`` is another hash."""

    name = "pca_hash"
    section = "pca_hash"
    kind = "facts"
    after: ClassVar[str | None] = "safety"
    reads: ClassVar[tuple[str, ...]] = ("safety", "detections", "fit_pca_hash")
    writes = ("pca_hashes",)
    config: PcaHashConfig

    def __init__(self, config: PcaHashConfig, hash_name: str) -> None:
        super().__init__(config)
        self.is_asked_for = hash_name == PCA_HASH
        self._fit: dict[str, np.ndarray] | None = None
        if not self.is_asked_for:
            self.after = None  # type: ignore[misc]  # no row is let through to it

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the codes."""
        return self.config.fingerprint_values() if self.is_asked_for else {}

    def folder(self, table: str, context: Context) -> str:
        """``pca_hashes/NAME-KEY``: of the fit and of the pictures' folder."""
        name = "grey32" if self.is_asked_for else "none"
        fit = context.digest(context.part("fit_pca_hash", 0))
        pixels = context.part("detections", 0).folder
        return keyed_folder(table, name, self.version, self.fingerprint_values(), fit, pixels)

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Decode the 288-px pictures one by one."""
        if not self.is_asked_for:
            return {"pca_hashes": empty_table("pca_hashes")}
        if self._fit is None:
            self._fit = table_to_arrays(io.table("fit_pca_hash"))
        table = io.table("detections", _PLACE)
        at = rows_at(table["image_id"].to_numpy(), io.rows["image_id"].to_numpy())
        with _one_thread():
            codes = [pca_hash(read_small(io, place), self._fit) for place in table.take(pa.array(at)).to_pylist()]
        columns = [io.rows["image_id"], io.rows["sha256"], pa.array(codes, pa.uint64())]
        return {"pca_hashes": pa.table(columns, schema=TABLES["pca_hashes"].schema)}


def hash_table(io: TaskIO, shard: int, hash_name: str) -> pa.Table:
    """image_id and ``hash_name`` (uint64, null where there is none) of a shard of the pool, in id order.

    Covers at least what safety kept. The stage that calls it reads ``hashes`` and ``pca_hashes``.

    Args:
        io: of the task.
        shard: of the pool.
        hash_name: phash, dhash or pca_hash.
    """
    table = "pca_hashes" if hash_name == PCA_HASH else "hashes"
    return io.read(io.part(table, shard), ["image_id", hash_name])
