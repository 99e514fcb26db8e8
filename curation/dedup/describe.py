"""Descriptors of pictures for copy detection: a fit where the descriptor needs one, then one vector a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.dedup.calibration import open_calibrated
from curation.dedup.copydescriptor import WEIGHT_FREE, Descriptor, DescriptorConfig
from curation.dedup.near import rows_at
from curation.modelfacts import ModelFacts
from curation.schema import TABLES, vector_schema
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, keyed_folder
from curation.weights import file_sha256

# --- named arrays in a table ----------------------------------------------------------------------------------------


def arrays_to_table(arrays: dict[str, np.ndarray]) -> pa.Table:
    """Named float32 arrays as rows of ``fit_descriptor``, by name."""
    rows = [
        {"name": name, "shape": list(array.shape), "data": np.asarray(array, np.float32).ravel()}
        for name, array in sorted(arrays.items())
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["fit_descriptor"].schema)


def table_to_arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """The reverse of ``arrays_to_table``."""
    names, shapes = table["name"].to_pylist(), table["shape"].to_pylist()
    return {
        name: table["data"][row].values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(shapes[row])
        for row, name in enumerate(names)
    }


# --- reading pictures -----------------------------------------------------------------------------------------------

_CROP_PX = 128
PLACE = ["image_id", "small_object", "small_offset", "small_bytes"]


def read_small(io: TaskIO, place: dict[str, Any]) -> np.ndarray:
    """The 288-px picture that ``detections`` points to, RGB uint8 [H, W, 3].

    Raises:
        LookupError: none was stored, so the row should not have been let through.
    """
    from training.data.pixels import decode

    if place["small_object"] is None:
        raise LookupError(f"picture {place['image_id']} passed safety, but look stored no 288-px version of it")
    data = io.blob(place["small_object"], place["small_offset"], place["small_bytes"])
    rgb: np.ndarray = decode(data).rgb
    return rgb


def vectors_table(image_id: pa.ChunkedArray, sha256: pa.ChunkedArray, vectors: np.ndarray) -> pa.Table:
    """Rows of ``descriptors``; vectors float [N, D] are rounded to fp16."""
    dim = vectors.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, dim)
    return pa.table([image_id, sha256, column], schema=vector_schema(dim))


def vectors_of(table: pa.Table) -> np.ndarray:
    """The column ``vector`` of ``descriptors`` or ``embeddings`` as float32 [N, D]."""
    kind = table.schema.field("vector").type
    column = pa.concat_arrays(table["vector"].chunks) if len(table) else pa.array([], kind)
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(len(table), kind.list_size)


# --- fit ------------------------------------------------------------------------------------------------------------


def sample_of(io: TaskIO, shards: list[int], num_pictures: int) -> list[dict[str, Any]]:
    """Places of the pictures with the least sha256 in some shards, each content once, in the order of sha256."""
    best: dict[str, dict[str, Any]] = {}
    for shard in shards:
        hashes = io.read(io.part("hashes", shard), ["image_id", "sha256", "ok"])
        places = io.read(io.part("detections", shard), PLACE)
        ok = hashes.filter(hashes["ok"])
        at = rows_at(places["image_id"].to_numpy(), ok["image_id"].to_numpy())
        rows = zip(ok["sha256"].to_pylist(), places.take(pa.array(at)).to_pylist(), strict=True)
        for sha256, place in rows:
            if place["small_object"] is not None:
                best.setdefault(sha256, place)
        best = {sha256: best[sha256] for sha256 in sorted(best)[:num_pictures]}
    return list(best.values())


def crops_of_installed_photographs(seed: int) -> Iterator[np.ndarray]:
    """Different crops of the photographs that come with scikit-image, RGB uint8 [H, W, 3], in a seeded order."""
    import skimage.data

    from training.data.pixels import DecodeError, decode

    photographs = []
    for path in sorted(Path(skimage.data.__file__).parent.glob("*")):
        if path.suffix in (".png", ".jpg"):
            with suppress(DecodeError):
                photographs.append(decode(path.read_bytes()).rgb)
    photographs = [rgb for rgb in photographs if min(rgb.shape[:2]) >= 2 * _CROP_PX]
    draw = np.random.Generator(np.random.PCG64(seed))
    while True:
        rgb = photographs[draw.integers(len(photographs))]
        top, left = (int(draw.integers(side - _CROP_PX + 1)) for side in rgb.shape[:2])
        yield np.ascontiguousarray(rgb[top : top + _CROP_PX, left : left + _CROP_PX])


def fit_descriptor(io: TaskIO, *, shards: list[int], num_pictures: int, at_least: int, seed: int) -> pa.Table:
    """The table ``fit_descriptor``; no row where the descriptor needs no fit (``num_pictures`` = 0).

    A whitening of a few pictures tells nothing apart, so a small pool is topped up with crops of installed photographs.
    """
    from threadpoolctl import threadpool_limits

    from curation.dedup.siftvlad import fit_sift_vlad

    if num_pictures == 0:
        return arrays_to_table({})
    places = sample_of(io, shards, num_pictures)

    def pictures() -> Iterator[np.ndarray]:
        for place in places:
            yield read_small(io, place)
        yield from islice(crops_of_installed_photographs(seed), max(0, at_least - len(places)))

    limits: Any = threadpool_limits(1)
    with limits:
        return arrays_to_table(fit_sift_vlad(pictures(), seed=seed))


class FitDescriptor(GlobalStage):
    """Words and whitening of the weight-free descriptor, from the first shards of the pool; kept when lists grow."""

    name = "fit_descriptor"
    section = "descriptor"
    reads = ("hashes", "detections")
    writes = ("fit_descriptor",)
    version = 3
    config: DescriptorConfig

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the fit."""
        return self.config.model_values()

    def preflight(self) -> None:
        """The name is known, weights and thresholds are there."""
        self.config.check()

    def folder(self, table: str, context: Context) -> str:
        """``fits/fit_descriptor/NAME-KEY``: of the settings and of the pictures' folder."""
        pixels = context.part("detections", 0).folder
        return f"fits/{keyed_folder(table, self.config.kind, self.version, self.config.model_values(), pixels)}"

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One fit."""
        fits = self.config.kind == WEIGHT_FREE
        shards = context.shards("pool")[: self.config.fit_shards] if fits else []
        args = {
            "shards": shards,
            "num_pictures": self.config.fit_pictures if fits else 0,
            "at_least": self.config.fit_at_least,
            "seed": self.config.fit_seed,
        }
        reads = tuple(context.part(table, shard) for table in ("hashes", "detections") for shard in shards)
        part = context.part("fit_descriptor", 0)
        map([Task(function=fit_descriptor, args=args, reads=reads, writes=part, once=True)])


# --- apply ----------------------------------------------------------------------------------------------------------


class Describe(ShardStage):
    """One vector for each picture that near let through, and for each picture of query sets and benchmarks."""

    name = "describe"
    section = "descriptor"
    kind = "facts"
    after = "near"
    reads: ClassVar[tuple[str, ...]] = ("near", "detections", "fit_descriptor")
    writes = ("descriptors",)
    version = 3
    roles = ("pool", "query", "benchmark")
    config: DescriptorConfig

    def __init__(self, config: DescriptorConfig) -> None:
        super().__init__(config)
        self._model: Descriptor | None = None

    def models(self) -> list[ModelFacts]:
        """The descriptor."""
        if self.config.kind == "open_clip":
            from curation.outline import backbone_facts

            return [backbone_facts(self.config.backbone, "descriptor")]
        name = self.config.kind if self.config.kind == "sscd" else self.config.name
        facts = ModelFacts(name=name, takes="288 px", precision=self.config.precision)
        path = self.config.weights_path
        if path is None:
            from curation.dedup.siftvlad import DIM

            return [replace(facts, dim=DIM, needs_cpu=True)]
        return [replace(facts, file=Path(path), sha256=file_sha256(path, key=self.config.weights_key))]

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the vectors."""
        return self.config.model_values()

    def folder(self, table: str, context: Context) -> str:
        """``descriptors/NAME-KEY``: of the model and, where there is one, of its fit."""
        del table
        fit = context.digest(context.part("fit_descriptor", 0))
        pixels = context.part("detections", 0).folder
        return keyed_folder("descriptors", self.config.kind, self.version, self.config.model_values(), fit, pixels)

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Decode the 288-px pictures one by one."""
        if self._model is None:
            fit = table_to_arrays(io.table("fit_descriptor"))
            self._model = open_calibrated(self.config, fit, crops_of_installed_photographs(0))
        rows = io.rows
        table = io.table("detections", PLACE)
        at = rows_at(table["image_id"].to_numpy(), rows["image_id"].to_numpy())
        vectors = np.zeros((rows.num_rows, self._model.dim), np.float32)
        for row, place in enumerate(table.take(pa.array(at)).to_pylist()):
            vectors[row] = self._model.vector(read_small(io, place))
        return {"descriptors": vectors_table(rows["image_id"], rows["sha256"], vectors)}
