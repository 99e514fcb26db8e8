"""Scored edges between copies: pool against pool, and pool against benchmarks. Searched once, thresholded later.

A coarse quantiser cuts the descriptors into lists. Each picture has a home list and probes its nearest ones. A list joins
the pictures at home in it with all that probe it: one GEMM per pair of blocks, then every candidate is scored again from
the stored fp16 vectors. That score is exact: products and sums of fp16 numbers below 1 fit into fp64 without rounding, so
no order of summation, block or machine can change it. Centroids are rounded to fp16 for the same reason: all tasks agree
on who is at home where, and each pair is written by one task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.copydescriptor import DIM, DescriptorConfig
from curation.dedup.describe import vectors_of
from curation.dedup.near import rows_at
from curation.schema import TABLES
from curation.stage import Config, ConfigError, Context, GlobalStage, Map, Task, TaskIO, keyed_folder

GEMM_MARGIN = 1e-3  # fp32 GEMM of unit vectors is off by less; candidates are scored again
BLOCK_ROWS = 4096
FLOOR_BELOW_THRESHOLD = 0.05


class EdgesConfig(Config):
    """How edges are searched, and from which cosine on they are stored."""

    floor: float | None = Field(None, gt=-1, lt=1)  # None = 0.05 below the descriptor's duplicate threshold
    reference_floor: float | None = Field(None, gt=-1, lt=1)  # None = 0.05 below its leakage threshold
    num_lists: int = Field(
        16, ge=1, le=65_536
    )  # 16 up to 50,000 pictures; about one for 3,000 above. One list = one task
    probes: int = Field(8, ge=1)  # lists that a pool picture probes
    reference_probes: int = Field(16, ge=1)  # lists that a benchmark picture probes; they are few, so all of 16
    fit_pictures: int = Field(20_000, ge=1)  # sample of the quantiser
    fit_shards: int = Field(64, ge=1)
    fit_seed: int = 0

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
            f"{key}: got {value}, allowed: {floor} (edges.{floor_key}) and above; set edges.{floor_key}={value} to search again"
        )
    return value


# --- pure functions -------------------------------------------------------------------------------------------------


class Members(NamedTuple):
    """Pictures with their vectors and what is needed to join them, sorted by id."""

    ids: np.ndarray  # int64 [N]
    vectors: np.ndarray  # float32 [N, D], the stored fp16 values
    home: np.ndarray  # int32 [N]
    probes: np.ndarray  # bool [N, L], the lists that a picture looks into; its home always


def exact_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of row i of ``a`` and row i of ``b``, float32 [N]; the rows hold fp16 values.

    Each product of fp16 values is a multiple of 2**-48 and the sums of unit vectors stay near 1, so fp64 adds them exactly.
    """
    left, right = a.astype(np.float64), b.astype(np.float64)
    dot, left_square, right_square = (left * right).sum(1), (left * left).sum(1), (right * right).sum(1)
    length = np.sqrt(left_square) * np.sqrt(right_square)
    return np.asarray(dot / np.maximum(length, 1e-12), np.float32)


def assign(vectors: np.ndarray, centroids: np.ndarray, num_probes: int) -> tuple[np.ndarray, np.ndarray]:
    """Home list and probed lists of each vector.

    Args:
        vectors: float [N, D], fp16 values.
        centroids: float [L, D], fp16 values.
        num_probes: lists to probe, cut to L.

    Returns:
        home, int32 [N], and probes, bool [N, L].
    """
    scores = vectors.astype(np.float64) @ centroids.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, : min(num_probes, len(centroids))]
    probes = np.zeros(scores.shape, bool)
    np.put_along_axis(probes, order, True, axis=1)
    return order[:, 0].astype(np.int32), probes


def _candidates(left: np.ndarray, right: np.ndarray, floor: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(left), BLOCK_ROWS):
        for other in range(0, len(right), BLOCK_ROWS):
            scores = left[start : start + BLOCK_ROWS] @ right[other : other + BLOCK_ROWS].T
            i, j = np.nonzero(scores >= floor - GEMM_MARGIN)
            yield i + start, j + other


def join_list(members: Members, list_number: int, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges that one list answers for: between its pictures at home and all that probe it.

    A pair whose homes probe each other is met by two lists; the one with the lower number writes it.

    Returns:
        a, b (int64, a < b), similarity (float32), sorted by (a, b).
    """
    at_home = np.flatnonzero(members.home == list_number)
    visitors = np.flatnonzero(members.probes[:, list_number])
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for i, j in _candidates(members.vectors[at_home], members.vectors[visitors], floor):
        left, right = at_home[i], visitors[j]
        other_home = members.home[right]
        elsewhere = (other_home < list_number) & members.probes[left, other_home]
        mine = np.where(other_home == list_number, members.ids[left] < members.ids[right], ~elsewhere)
        left, right = left[mine], right[mine]
        similarity = exact_similarity(members.vectors[left], members.vectors[right])
        high = similarity >= np.float32(floor)
        a, b = members.ids[left[high]], members.ids[right[high]]
        found.append((np.minimum(a, b), np.maximum(a, b), similarity[high]))
    a, b, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((b, a))
    return a[order], b[order], similarity[order]


def join_references(
    members: Members, references: Members, list_number: int, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges between the pool pictures at home in a list and the references that probe it.

    Returns:
        image_id, reference_id (int64), similarity (float32), sorted by (image_id, reference_id).
    """
    at_home = np.flatnonzero(members.home == list_number)
    visitors = np.flatnonzero(references.probes[:, list_number])
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for i, j in _candidates(members.vectors[at_home], references.vectors[visitors], floor):
        left, right = at_home[i], visitors[j]
        similarity = exact_similarity(members.vectors[left], references.vectors[right])
        high = similarity >= np.float32(floor)
        found.append((members.ids[left[high]], references.ids[right[high]], similarity[high]))
    ids, reference_ids, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((reference_ids, ids))
    return ids[order], reference_ids[order], similarity[order]


def edge_recall(
    vectors: np.ndarray, centroids: np.ndarray, *, floor: float, probes: int, sample: int = 1000, seed: int = 0
) -> tuple[int, int]:
    """How many edges of a sample the lists find, against an exact search of all pairs.

    Args:
        vectors: float32 [N, D], fp16 values.
        centroids: float32 [L, D].
        floor: cosine of an edge.
        probes: lists that a picture probes.
        sample: pictures to search for exactly, against all N.
        seed: of the draw.

    Returns:
        Edges found, edges there are; each counted from the sampled end.
    """
    home, seen = assign(vectors, centroids, probes)
    chosen = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(vectors))[:sample])
    found = total = 0
    for i, j in _candidates(vectors[chosen], vectors, floor):
        left, right = chosen[i], j
        apart = left != right
        left, right = left[apart], right[apart]
        edge = exact_similarity(vectors[left], vectors[right]) >= np.float32(floor)
        left, right = left[edge], right[edge]
        total += len(left)
        found += int((seen[left, home[right]] | seen[right, home[left]]).sum())
    return found, total


def fit_centroids(vectors: np.ndarray, num_lists: int, seed: int) -> np.ndarray:
    """Spherical k-means by Faiss on one thread; float32 [at most num_lists, D], rounded to fp16 values."""
    import faiss

    faiss.omp_set_num_threads(1)
    num_lists = max(1, min(num_lists, len(vectors)))
    if len(vectors) == 0:
        return np.zeros((1, vectors.shape[1]), np.float32)
    kmeans = faiss.Kmeans(vectors.shape[1], num_lists, niter=20, seed=seed, spherical=True, min_points_per_centroid=1)
    kmeans.train(np.ascontiguousarray(vectors, np.float32))
    return np.asarray(kmeans.centroids, np.float16).astype(np.float32)


# --- tasks ----------------------------------------------------------------------------------------------------------


def fit_quantiser(io: TaskIO, *, shards: list[int], num_pictures: int, num_lists: int, seed: int) -> pa.Table:
    """The table ``fit_quantiser`` from the vectors with the least sha256 in some shards."""
    names, vectors = np.empty(0, "U64"), np.empty((0, DIM), np.float32)
    for shard in shards:
        table = io.read(io.part("descriptors", shard))
        names = np.concatenate([names, np.array(table["sha256"].to_pylist(), "U64")])
        vectors = np.concatenate([vectors, vectors_of(table)])
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
            np.empty((0, DIM), np.float32),
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
    return pa.table(list(join_list(members, list_number, floor)), schema=schema)


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
    return pa.table(list(join_references(members, seen, list_number, floor)), schema=schema)


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
        """``fits/quantiser-KEY``: of the descriptors and of the fit."""
        del table
        descriptors = context.part("descriptors", 0).folder
        return f"fits/{keyed_folder('quantiser', 'kmeans', self.fingerprint_values(), descriptors).replace('/', '-')}"

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
    config: EdgesConfig

    def __init__(self, config: EdgesConfig, *, descriptor: DescriptorConfig) -> None:
        super().__init__(config)
        self.floor, self.reference_floor = config.floors(descriptor)

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its floors resolved."""
        return {**super().fingerprint_values(), "floor": self.floor, "reference_floor": self.reference_floor}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Two tasks a list."""
        shards, references = context.shards("pool"), context.shards("benchmark")
        pool_reads = (context.part("fit_quantiser", 0),) + tuple(
            context.part(table, shard) for table in ("near", "descriptors") for shard in shards
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
