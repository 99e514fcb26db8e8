"""Scored edges between copies: pool against pool, and pool against benchmarks. Searched once, thresholded later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.describe import vectors_of
from curation.dedup.join import Members, assign, fit_centroids, join_list, join_references
from curation.dedup.near import rows_at
from curation.schema import TABLES
from curation.stage import Context, GlobalStage, Map, Task, TaskIO, keyed_folder
from training.config import Config, ConfigError

FLOOR_BELOW_THRESHOLD = 0.05
MIN_PICTURES_PER_LIST = 39  # what Faiss asks for, or its centroids are pictures rather than means
FEW_LISTS = 64  # so few are good enough whatever the sample


class EdgesConfig(Config):
    """How edges are searched, and from which cosine on they are stored."""

    floor: float | None = Field(None, gt=-1, lt=1)  # None = 0.05 below the descriptor's duplicate threshold
    reference_floor: float | None = Field(None, gt=-1, lt=1)  # None = 0.05 below its leakage threshold
    num_lists: int = Field(
        16, ge=1, le=65_536
    )  # 16 up to 50,000 pictures; about one for 3,000 above. One list = one task
    # Of 16 lists, 12 find .9995 of the edges at the threshold (edge_recall), 8 find .994, 4 find .966.
    probes: int = Field(12, ge=1)  # lists that a pool picture probes
    reference_probes: int = Field(16, ge=1)  # lists that a benchmark picture probes; they are few, so all of 16
    fit_pictures: int = Field(20_000, ge=1)  # sample of the quantiser
    fit_shards: int = Field(64, ge=1)
    fit_seed: int = 0

    @model_validator(mode="after")
    def _enough_pictures(self) -> EdgesConfig:
        least = MIN_PICTURES_PER_LIST * self.num_lists
        if self.num_lists > FEW_LISTS and self.fit_pictures < least:
            raise ValueError(
                f"edges.fit_pictures: got {self.fit_pictures}, allowed with edges.num_lists={self.num_lists}: {least} "
                f"({MIN_PICTURES_PER_LIST} a list) and above; raise edges.fit_pictures or lower edges.num_lists"
            )
        return self

    def floors(self, descriptor: DescriptorConfig) -> tuple[float, float]:
        """Cosines from which edges and reference edges are stored.

        Raises:
            ConfigError: the descriptor has no thresholds.
        """
        thresholds = descriptor.thresholds()
        floor = thresholds.duplicate - FLOOR_BELOW_THRESHOLD if self.floor is None else self.floor
        below = thresholds.leakage - FLOOR_BELOW_THRESHOLD
        return round(floor, 6), round(below if self.reference_floor is None else self.reference_floor, 6)


def checked_threshold(key: str, value: float, floor: float, floor_key: str) -> float:
    """A threshold that the stored edges can answer.

    Raises:
        ConfigError: edges below the threshold were not stored.
    """
    if value < floor:
        raise ConfigError(
            f"{key}: got {value}, allowed: {floor} (edges.{floor_key}) and above; "
            f"set edges.{floor_key}={value} to search again"
        )
    return value


def is_copy(edges: pa.Table, threshold: float) -> np.ndarray:
    """Which pairs of ``edges`` or ``reference_edges`` are copies, bool [E].

    Where local features were compared, they decide; elsewhere the similarity does, from the threshold on.
    """
    verified = edges["verified"]
    high = edges["similarity"].to_numpy() >= np.float32(threshold)
    agree = verified.fill_null(False).to_numpy()
    return np.asarray(np.where(verified.is_null().to_numpy(), high, agree), bool)


def _unverified(columns: tuple[np.ndarray, ...], table: str) -> pa.Table:
    """Rows of ``edges`` or ``reference_edges`` whose pictures were not compared."""
    return pa.table([*columns, pa.nulls(len(columns[0]), pa.bool_())], schema=TABLES[table].schema)


# --- tasks ----------------------------------------------------------------------------------------------------------


def fit_quantiser(io: TaskIO, *, shards: list[int], num_pictures: int, num_lists: int, seed: int) -> pa.Table:
    """The table ``fit_quantiser`` from the vectors with the least sha256 in some shards."""
    names, vectors = np.empty(0, "U64"), np.empty((0, 0), np.float32)
    for shard in shards:
        table = io.read(io.part("descriptors", shard))
        names = np.concatenate([names, np.array(table["sha256"].to_pylist(), "U64")])
        vectors = np.concatenate([vectors, vectors_of(table)]) if len(vectors) else vectors_of(table)
        names, first = np.unique(names, return_index=True)
        names, vectors = names[:num_pictures], vectors[first[:num_pictures]]
    centroids = fit_centroids(vectors, num_lists, seed)
    rows = [{"centroid": number, "vector": vector} for number, vector in enumerate(centroids)]
    return pa.Table.from_pylist(rows, schema=TABLES["fit_quantiser"].schema)


def centroids_of(table: pa.Table) -> np.ndarray:
    """Centroids of ``fit_quantiser``, float32 [L, D]."""
    return np.array(table["vector"].to_pylist(), np.float32)


def members_of_list(
    io: TaskIO, *, shards: list[int], centroids: np.ndarray, list_number: int, probes: int, home_only: bool = False
) -> Members:
    """Pictures of some shards that are at home in a list or probe it, read one shard at a time."""
    parts = [
        Members(
            np.empty(0, np.int64),
            np.empty((0, centroids.shape[1]), np.float32),
            np.empty(0, np.int32),
            np.empty((0, len(centroids)), bool),
        )
    ]
    for shard in shards:
        ids = io.kept("near", shard)["image_id"].to_numpy()
        table = io.read(io.part("descriptors", shard), ["image_id", "vector"])
        at = rows_at(table["image_id"].to_numpy(), ids)
        vectors = vectors_of(table)[at]
        home, seen = assign(vectors, centroids, probes)
        mine = (home == list_number) if home_only else seen[:, list_number]
        parts.append(Members(ids[mine], vectors[mine], home[mine], seen[mine]))
    return Members(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def edges_of_list(io: TaskIO, *, shards: list[int], list_number: int, probes: int, floor: float) -> pa.Table:
    """One part of ``edges``."""
    centroids = centroids_of(io.read(io.part("fit_quantiser", 0)))
    schema = TABLES["edges"].schema
    if list_number >= len(centroids):  # a small pool filled fewer lists
        return schema.empty_table()
    members = members_of_list(io, shards=shards, centroids=centroids, list_number=list_number, probes=probes)
    return _unverified(join_list(members, list_number, floor), "edges")


def reference_edges_of_list(
    io: TaskIO, *, shards: list[int], references: list[int], list_number: int, probes: int, floor: float
) -> pa.Table:
    """One part of ``reference_edges``."""
    centroids = centroids_of(io.read(io.part("fit_quantiser", 0)))
    schema = TABLES["reference_edges"].schema
    if list_number >= len(centroids) or not references:
        return schema.empty_table()
    base: dict[str, Any] = {"centroids": centroids, "list_number": list_number}
    members = members_of_list(io, shards=shards, probes=1, home_only=True, **base)
    seen = members_of_list(io, shards=references, probes=probes, **base)
    return _unverified(join_references(members, seen, list_number, floor), "reference_edges")


# --- stages ---------------------------------------------------------------------------------------------------------


class FitQuantiser(GlobalStage):
    """Coarse quantiser over descriptors of the first shards of the pool; kept when lists are appended."""

    name = "fit_quantiser"
    section = "edges"
    reads = ("descriptors",)
    writes = ("fit_quantiser",)
    config: EdgesConfig

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the fit; floors and probes do not."""
        config = self.config
        return {"fit": [config.num_lists, config.fit_pictures, config.fit_shards, config.fit_seed]}

    def folder(self, table: str, context: Context) -> str:
        """``fits/fit_quantiser/kmeans-KEY``: of the descriptors and of the fit."""
        descriptors = context.part("descriptors", 0).folder
        return f"fits/{keyed_folder(table, 'kmeans', self.version, self.fingerprint_values(), descriptors)}"

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One fit."""
        config = self.config
        shards = context.shards("pool")[: config.fit_shards]
        args = {
            "shards": shards,
            "num_pictures": config.fit_pictures,
            "num_lists": config.num_lists,
            "seed": config.fit_seed,
        }
        reads = tuple(context.part("descriptors", shard) for shard in shards)
        map([Task(function=fit_quantiser, args=args, reads=reads, writes=context.part("fit_quantiser", 0), once=True)])


class Edges(GlobalStage):
    """Pairs of pool pictures, and of pool and benchmark pictures, at or above the floors; one list = one task."""

    name = "edges"
    section = "edges"
    reads = ("near", "safety", "descriptors", "fit_quantiser")
    writes = ("edges", "reference_edges")
    version = 2
    config: EdgesConfig

    def __init__(self, config: EdgesConfig, descriptor: DescriptorConfig) -> None:
        super().__init__(config)
        self.floor, self.reference_floor = config.floors(descriptor)

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its floors resolved."""
        return {**super().fingerprint_values(), "floor": self.floor, "reference_floor": self.reference_floor}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Two tasks a list."""
        shards, references = context.shards("pool"), context.shards("benchmark")
        pool_reads = (
            context.part("fit_quantiser", 0),
            *(context.part(table, shard) for table in ("near", "descriptors") for shard in shards),
        )
        reference_reads = tuple(
            context.part(table, shard) for table in ("safety", "descriptors") for shard in references
        )
        tasks = []
        for number in range(self.config.num_lists):
            args = {"shards": shards, "list_number": number, "probes": self.config.probes, "floor": self.floor}
            tasks.append(
                Task(function=edges_of_list, args=args, reads=pool_reads, writes=context.part("edges", number))
            )
            reference_args = {
                "shards": shards,
                "references": references,
                "list_number": number,
                "probes": self.config.reference_probes,
                "floor": self.reference_floor,
            }
            tasks.append(
                Task(
                    function=reference_edges_of_list,
                    args=reference_args,
                    reads=pool_reads + reference_reads,
                    writes=context.part("reference_edges", number),
                )
            )
        map(tasks)
