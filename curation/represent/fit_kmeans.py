"""The stage that fits the clusters: spherical k-means of a sample that need not fit into memory.

A sample of few pictures is one task. A larger one is frozen first and cut into pieces by ``image_id``; then each
iteration is one task a piece, which adds up the vectors of each cluster, and one that moves the centroids. Sums are
exact (``curation/represent/kmeans.py``), so the centroids are the same however it is cut. The tables between are
temporary: they lie in the run, let a fit that was killed go on where it was, and are gone when it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from curation.represent import kmeans
from curation.represent.cluster import ClusterConfig
from curation.represent.nearest import Centroids
from curation.schema import ROWS_PER_SHARD_LIMIT, TABLES
from curation.stage import Context, GlobalStage, Map, Task, TaskIO, keyed_folder
from training.config import ConfigError

AT_ONCE = 1 << 17  # pictures of a sample that is one task: 100 MB where a vector has 384 numbers
_PIECE_ROWS = 1 << 17  # pictures of a piece of a larger one, ...
_PIECE_ROWS_PER_CLUSTER = 16  # ... or so many for each cluster, that the sums are not longer than what they sum
_SPARE_BYTES = 1 << 28  # of a task, for one shard of vectors and a block of similarities


def piece_rows(num_clusters: int) -> int:
    """Pictures of a piece; no byte of a fit depends on it."""
    return max(_PIECE_ROWS, _PIECE_ROWS_PER_CLUSTER * num_clusters)


# The sample


def sampled(io: TaskIO, shards: list[int], sample: int) -> np.ndarray:
    """Ids of the pictures with the least sha256 among the embeddings of some shards, ascending, int64 [N].

    Raises:
        ConfigError: there is no embedding at all.
    """
    ids, first_bytes = [], []
    for shard in shards:
        table = io.read(io.part("embeddings", shard), ["image_id", "sha256"])
        ids.append(table["image_id"].to_numpy())
        first_bytes.append(np.array([int(sha256[:16], 16) for sha256 in table["sha256"].to_pylist()], np.uint64))
    if not sum(len(some) for some in ids):
        raise ConfigError(
            "cluster: no picture of the sources is left to be clustered; `lvd funnel` shows where they went"
        )
    every = np.concatenate(ids)
    return np.sort(every[np.lexsort((every, np.concatenate(first_bytes)))[:sample]])


def vectors_of_shards(io: TaskIO, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Embeddings of pictures, shard by shard, float16 [N, D]; one that was taken down since is passed over.

    Args:
        io: of the task.
        ids: ascending, int64.
    """
    for shard in np.unique(ids // ROWS_PER_SHARD_LIMIT).tolist():
        table = io.read(io.part("embeddings", shard), ["image_id", "vector"])
        wanted = ids[ids // ROWS_PER_SHARD_LIMIT == shard]
        column = table.filter(pa.array(np.isin(table["image_id"].to_numpy(), wanted)))["vector"]
        yield _rows(column, table.schema.field("vector").type.list_size, np.float16)


def _all_vectors(io: TaskIO, ids: np.ndarray, dim: int) -> np.ndarray:
    """All of them at once, float16 [N, D]."""
    held, num = np.empty((len(ids), dim), np.float16), 0
    for vectors in vectors_of_shards(io, ids):
        held[num : num + len(vectors)] = vectors
        num += len(vectors)
    return held[:num]


def _dim(io: TaskIO, ids: np.ndarray) -> int:
    """Length of the embeddings."""
    part = io.part("embeddings", int(ids[0]) // ROWS_PER_SHARD_LIMIT)
    return int(io.read(part, ["vector"], within=("image_id", 0, 0)).schema.field("vector").type.list_size)


def _centroid_table(centroids: np.ndarray) -> pa.Table:
    """The table ``fit_kmeans``."""
    number, vectors = np.arange(len(centroids), dtype=np.int32), centroids.astype(np.float32)
    return pa.table([pa.array(number), _lists(vectors)], schema=TABLES["fit_kmeans"].schema)


def _lists(rows: np.ndarray) -> pa.Array:
    """A row of a matrix [N, D] each, as a list."""
    ends = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * np.int32(rows.shape[1]))
    return pa.ListArray.from_arrays(ends, pa.array(np.ascontiguousarray(rows).ravel()))


def _rows(column: pa.ChunkedArray, dim: int, kind: type) -> np.ndarray:
    """The reverse of ``_lists``, [N, dim]."""
    return np.asarray(column.combine_chunks().flatten().to_numpy(zero_copy_only=False), kind).reshape(-1, dim)


# A sample that fits into memory


def fit_at_once(
    io: TaskIO, *, shards: list[int], sample: int, num_clusters: int, iterations: int, seed: int
) -> pa.Table:
    """The table ``fit_kmeans`` from the embeddings of a few shards."""
    ids = sampled(io, shards, sample)
    vectors = _all_vectors(io, ids, _dim(io, ids))
    made = kmeans.fit(vectors, num_clusters=num_clusters, iterations=iterations, seed=seed, device=io.device)
    return _centroid_table(made)


# A larger one


def cut_pieces(
    io: TaskIO, *, shards: list[int], sample: int, num_clusters: int, rows: int, takedowns: str | None
) -> pa.Table:
    """The table ``kmeans_pieces``: the sample, frozen, in pieces of so many rows.

    Raises:
        ConfigError: there is no embedding at all, or the sums of an iteration do not fit into a task.
    """
    del takedowns  # another list is another sample
    ids = sampled(io, shards, sample)
    dim = _dim(io, ids)
    needed = 24 * num_clusters * dim + _SPARE_BYTES
    if needed > io.memory_bytes:
        raise ConfigError(
            f"cluster.num_clusters: {num_clusters:,} clusters of {dim:,} dimensions take {needed // 10**6 + 1:,} MB; "
            f"execution.task_memory_mb is {io.memory_bytes // 10**6:,}"
        )
    piece = np.arange(len(ids)) // rows
    return pa.table([pa.array(piece.astype(np.int32)), pa.array(ids)], schema=TABLES["kmeans_pieces"].schema)


def _piece(io: TaskIO, piece: int) -> np.ndarray:
    table = io.read(io.part("kmeans_pieces", 0), within=("piece", piece, piece + 1))
    return np.asarray(table["image_id"].to_numpy())


def _sums_table(cluster: np.ndarray, num: np.ndarray, vectors: np.ndarray) -> pa.Table:
    columns = [
        pa.array(cluster.astype(np.int32)),
        pa.array(num.astype(np.int64)),
        _lists(vectors.astype(np.float64, copy=False)),
    ]
    return pa.table(columns, schema=TABLES["kmeans_sums"].schema)


def starts_of_piece(io: TaskIO, *, piece: int, first: int, num_sampled: int, num_clusters: int, seed: int) -> pa.Table:
    """Those vectors of a piece among which the start is drawn, in the form of sums; ``first`` is its first place."""
    ids = _piece(io, piece)
    dim = _dim(io, ids)
    rows = kmeans.start_rows(num_sampled, num_clusters=num_clusters, dim=dim, seed=seed)
    vectors = _all_vectors(io, ids[rows[(rows >= first) & (rows < first + len(ids))] - first], dim)
    return _sums_table(np.arange(len(vectors)), np.ones(len(vectors)), vectors)


def first_centroids(io: TaskIO, *, sums: list[int], num_clusters: int, seed: int) -> pa.Table:
    """The table ``kmeans_centroids`` to begin with, from the drawn vectors of all pieces."""
    found = [io.read(io.part("kmeans_sums", index), ["vector"])["vector"] for index in sums]
    dim = len(next(column[0].as_py() for column in found if len(column)))
    vectors = np.concatenate([_rows(column, dim, np.float16) for column in found])
    return _moving_table(kmeans.start(vectors, num_clusters=num_clusters, seed=seed))


def _moving_table(centroids: np.ndarray) -> pa.Table:
    number = pa.array(np.arange(len(centroids), dtype=np.int32))
    return pa.table([number, _lists(centroids)], schema=TABLES["kmeans_centroids"].schema)


def _centroids(io: TaskIO, iteration: int) -> np.ndarray:
    """Centroids after some iterations, float16 [K, D]."""
    column = io.read(io.part("kmeans_centroids", iteration), ["vector"])["vector"]
    return _rows(column, len(column[0].as_py()), np.float16)


def sums_of_piece(io: TaskIO, *, piece: int, iteration: int) -> pa.Table:
    """The table ``kmeans_sums``: what a piece adds to each cluster in an iteration."""
    held = _centroids(io, iteration)
    sums, centroids = kmeans.Sums(*held.shape), Centroids(held, device=io.device)
    for vectors in vectors_of_shards(io, _piece(io, piece)):
        sums.add(vectors, centroids)
    there = np.flatnonzero(sums.count)
    total = sums.total if len(there) == len(held) else sums.total[there]
    return _sums_table(there, sums.count[there], total)


def moved_centroids(io: TaskIO, *, iteration: int, sums: list[int]) -> pa.Table:
    """The table ``kmeans_centroids`` after a further iteration, some clusters at a time."""
    held = _centroids(io, iteration).copy()
    num, dim = held.shape
    count = np.zeros(num, np.int64)
    num_rows = max(1, io.memory_bytes // (128 * dim))  # each takes its sum, that of a piece, and what is made of them
    for first in range(0, num, num_rows):
        block = held[first : first + num_rows]
        total = np.zeros(block.shape, np.float64)
        for index in sums:
            table = io.read(io.part("kmeans_sums", index), within=("cluster", first, first + num_rows))
            there = table["cluster"].to_numpy()
            total[there - first] += _rows(table["vector"], dim, np.float64)
            count[there] += table["num"].to_numpy()
        held[first : first + num_rows] = kmeans.directions(block, total)
    kmeans.split(held, count)
    return _moving_table(held)


def last_centroids(io: TaskIO, *, iteration: int) -> pa.Table:
    """The table ``fit_kmeans``."""
    return _centroid_table(_centroids(io, iteration))


def _digest_of_takedowns(context: Context) -> str | None:
    try:
        return context.digest(context.part("takedowns", 0))
    except LookupError:
        return None


class FitKmeans(GlobalStage):
    """Centroids, made once and kept: neither an appended list nor a changed threshold moves them.

    The sample is what the first shards hold embeddings of at that time. ``--redo fit_kmeans`` makes them anew.
    """

    name = "fit_kmeans"
    section = "cluster"
    version = 2
    reads = ("embeddings",)
    writes = ("fit_kmeans", "kmeans_pieces", "kmeans_sums", "kmeans_centroids")
    config: ClusterConfig

    def folder(self, table: str, context: Context) -> str:
        """``fits/fit_kmeans/kmeans-KEY``: of the settings and of the embedder's folder."""
        if table != "fit_kmeans":
            return table
        embedder = context.part("embeddings", 0).folder
        return f"fits/{keyed_folder(table, 'kmeans', self.version, self.config.fingerprint_values(), embedder)}"

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One fit over the first shards that hold the sample."""
        shards, num_rows = self._shards(context)
        reads = tuple(context.part("embeddings", shard) for shard in shards)
        made = context.part("fit_kmeans", 0)
        sample: dict[str, Any] = {"shards": shards, "sample": self.config.sample}
        if num_rows <= AT_ONCE:
            args = {**self.config.fingerprint_values(), **sample}
            map([Task(function=fit_at_once, args=args, reads=reads, writes=made, once=True)])
            return
        last = Task(function=last_centroids, args={"iteration": 0}, writes=made, once=True)
        if context.is_done(self, last):  # whatever it was made from is gone
            map([last])
            return
        pieces = context.part("kmeans_pieces", 0)
        num_clusters = self.config.num_clusters
        args = {**sample, "num_clusters": num_clusters, "rows": piece_rows(num_clusters)}
        # A fit that is under way holds vectors, so a new rule of the takedown list has its sample drawn anew.
        args["takedowns"] = _digest_of_takedowns(context)
        map([Task(function=cut_pieces, args=args, reads=reads, writes=pieces)])
        iteration = _Lloyd(self, context, map, context.num_rows(pieces)).run()
        map([Task(function=last_centroids, args={"iteration": iteration}, writes=made, once=True)])
        context.discard([pieces, context.part("kmeans_centroids", iteration)])

    def _shards(self, context: Context) -> tuple[list[int], int]:
        """The first shards of the pool that hold the sample, and the rows that they hold."""
        shards: list[int] = []
        num_rows = 0
        for shard in context.shards("pool"):
            if num_rows >= self.config.sample:
                break
            shards.append(shard)
            num_rows += context.num_rows(context.part("embeddings", shard))
        return shards, num_rows


class _Lloyd:
    """The iterations of one fit, as tasks."""

    def __init__(self, stage: FitKmeans, context: Context, map: Map, num_sampled: int) -> None:  # noqa: A002
        self._stage, self._context, self._map = stage, context, map
        config = stage.config
        self._asked = {"num_clusters": min(config.num_clusters, num_sampled), "seed": config.seed}
        self._num_sampled, self._rows = num_sampled, piece_rows(config.num_clusters)
        self._num_pieces = -(-num_sampled // self._rows)
        # Embeddings enter a fingerprint by their folder, whatever the part.
        self._reads = (context.part("kmeans_pieces", 0), context.part("embeddings", 0))

    def run(self) -> int:
        """Do what is not done; the number of the last iteration."""
        context, iterations = self._context, self._stage.config.iterations
        reached = (n for n in range(iterations, -1, -1) if context.is_done(self._stage, self._centroids(n)))
        first = next(reached, None)
        if first is None:
            first = 0
            self._map([self._sums(-1, piece) for piece in range(self._num_pieces)])
            self._map([self._centroids(0)])
            context.discard(self._sums(-1, piece).writes for piece in range(self._num_pieces))
        for iteration in range(first, iterations):
            self._map([self._sums(iteration, piece) for piece in range(self._num_pieces)])
            self._map([self._centroids(iteration + 1)])
            before, after = (context.part("kmeans_centroids", iteration + n) for n in (0, 1))
            stands = context.digest(before) == context.digest(after)
            context.discard([before, *(self._sums(iteration, piece).writes for piece in range(self._num_pieces))])
            if stands:
                return iteration + 1
        return iterations

    def _sums(self, iteration: int, piece: int) -> Task:
        """What a piece adds in an iteration; before the first one, the vectors among which the start is drawn."""
        writes = self._context.part("kmeans_sums", self._index(iteration, piece))
        if iteration >= 0:
            args = {"piece": piece, "iteration": iteration}
            return Task(function=sums_of_piece, args=args, reads=self._reads, writes=writes)
        args = {"piece": piece, "first": piece * self._rows, "num_sampled": self._num_sampled, **self._asked}
        return Task(function=starts_of_piece, args=args, reads=self._reads, writes=writes)

    def _index(self, iteration: int, piece: int) -> int:
        return (iteration + 1) * self._num_pieces + piece

    def _centroids(self, iteration: int) -> Task:
        """After so many iterations. It names no sums among what it reads: they go, and follow from the pieces."""
        writes = self._context.part("kmeans_centroids", iteration)
        args: dict[str, Any] = {"sums": [self._index(iteration - 1, piece) for piece in range(self._num_pieces)]}
        if iteration > 0:
            args |= {"iteration": iteration - 1}
            return Task(function=moved_centroids, args=args, reads=self._reads, writes=writes)
        return Task(function=first_centroids, args=args | self._asked, reads=self._reads, writes=writes)
