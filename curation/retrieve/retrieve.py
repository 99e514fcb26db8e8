"""Queries and what is retrieved for them: neighbours of each query, or pictures of the clusters that queries fill."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.describe import vectors_of
from curation.dedup.near import rows_at
from curation.ingest.sources import QueryConfig
from curation.represent import kmeans
from curation.schema import TABLES, source_of_shard
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO
from training.config import Config

_BLOCK_SCORES = 1 << 24  # similarities held at once; 64 MiB


class RetrieveConfig(Config):
    """How pictures are drawn; what each set asks for stands in ``queries``."""

    seed: int = Field(0, description="of the order in which pictures of a cluster are taken")


class Queries(ShardStage):
    """The pictures of the query sets, with what their set asks for."""

    name = "queries"
    section = ""
    kind = "output"
    after = "leakage"
    reads: ClassVar[tuple[str, ...]] = ("leakage", "urls", "sources", "clusters")
    by_content: ClassVar[tuple[str, ...]] = ("urls",)
    writes = ("queries",)
    roles = ("query",)

    def __init__(self, config: RetrieveConfig, queries: Mapping[str, QueryConfig]) -> None:
        super().__init__(config)
        self.queries = queries

    def fingerprint_values(self) -> dict[str, Any]:
        """Mode and k of each set."""
        return {"queries": {name: {"mode": query.mode, "k": query.k} for name, query in self.queries.items()}}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Rows of one shard of one set."""
        sources = io.table("sources", ["source_id", "name"]).to_pylist()
        query_set = next(row["name"] for row in sources if row["source_id"] == source_of_shard(shard))
        query = self.queries[query_set]
        ids = io.rows["image_id"].to_numpy()
        urls = io.table("urls", ["image_id", "label"])
        clusters = io.table("clusters", ["image_id", "cluster"])
        num = len(ids)
        columns = [
            io.rows["image_id"],
            pa.array([query_set] * num, pa.string()),
            pa.array([query.mode] * num, pa.string()),
            pa.array([query.k if query.mode == "sample" else None] * num, pa.int32()),
            urls["label"].take(pa.array(rows_at(urls["image_id"].to_numpy(), ids))),
            clusters["cluster"].take(pa.array(rows_at(clusters["image_id"].to_numpy(), ids))),
        ]
        return {"queries": pa.table(columns, schema=TABLES["queries"].schema)}


# Pictures of one pool shard that leakage kept


@dataclass(frozen=True)
class PoolRows:
    """Rows of a pool shard, or found pictures: arrays of one length, in any order."""

    image_id: np.ndarray  # int64 [N]
    tie: np.ndarray  # uint64 [N], what decides between equals
    cluster: np.ndarray  # int32 [N]
    similarity: np.ndarray  # float32 [N], to a centroid or a query

    def take(self, at: np.ndarray) -> PoolRows:
        """Rows at some places."""
        return PoolRows(self.image_id[at], self.tie[at], self.cluster[at], self.similarity[at])

    def __add__(self, other: PoolRows) -> PoolRows:
        """The rows of both."""
        return PoolRows(
            np.concatenate([self.image_id, other.image_id]),
            np.concatenate([self.tie, other.tie]),
            np.concatenate([self.cluster, other.cluster]),
            np.concatenate([self.similarity, other.similarity]),
        )


NO_ROWS = PoolRows(np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.float32))


def _first_bytes(digests: Iterable[str]) -> np.ndarray:
    """First 8 bytes of hex digests, uint64: the order of the digests themselves."""
    return np.array([int(digest[:16], 16) for digest in digests], np.uint64)


def drawn(seed: int, sha256: Iterable[str]) -> np.ndarray:
    """Places of pictures in a seeded order, uint64.

    They depend on the bytes of each picture only, so that a longer draw begins with a shorter one.
    """
    return _first_bytes(hashlib.sha256(f"{seed}|{one}".encode()).hexdigest() for one in sha256)


def _clustered(io: TaskIO, shard: int) -> tuple[pa.Table, PoolRows]:
    """image_id, sha256 of what leakage kept in a shard, and its clusters, ties by sha256."""
    kept = io.kept("leakage", shard)
    table = io.read(io.part("clusters", shard))
    ids = kept["image_id"].to_numpy()
    at = rows_at(table["image_id"].to_numpy(), ids)
    cluster, similarity = table["cluster"].to_numpy()[at], table["similarity"].to_numpy()[at]
    return kept, PoolRows(ids, _first_bytes(kept["sha256"].to_pylist()), cluster, similarity)


def _neighbours(query_set: str, query_id: pa.Array, rank: np.ndarray, rows: PoolRows) -> pa.Table:
    num = len(rows.image_id)
    columns = [
        pa.array([query_set] * num, pa.string()),
        query_id,
        pa.array(rows.image_id),
        pa.array(rank.astype(np.int32)),
        pa.array(rows.similarity),
        pa.array(rows.cluster),
    ]
    return pa.table(columns, schema=TABLES["neighbours"].schema)


# Nearest neighbours


def _rank_in(groups: np.ndarray) -> np.ndarray:
    """Place of each row within its group, from 0, where rows of a group stand together."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else np.zeros(0, np.int64)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


def best_of(query: np.ndarray, rows: PoolRows, k: int) -> tuple[np.ndarray, PoolRows]:
    """The ``k`` best rows of each query, by query and rank: highest similarity, ties by sha256, then by id."""
    order = np.lexsort((rows.image_id, rows.tie, -rows.similarity, query))
    order = order[_rank_in(query[order]) < k]
    return query[order], rows.take(order)


def candidates(queries: np.ndarray, pool: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs that may be among the ``k`` nearest, ties of the last one too.

    A GEMM proposes with a margin that its rounding cannot reach; the similarity of what it proposes is exact.

    Args:
        queries: float32 [Q, D], unit length, fp16 values.
        pool: float32 [N, D], the same.
        k: neighbours wanted.

    Returns:
        places in ``queries`` and in ``pool``, int64 [P], and similarity, float32 [P].
    """
    found = []
    block = max(1, _BLOCK_SCORES // max(1, len(pool)))
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ pool.T
        place = max(0, len(pool) - k)
        floor = np.partition(scores, place, axis=1)[:, place : place + 1] - 2 * kmeans.MARGIN
        at_query, at_pool = np.nonzero(scores >= floor)
        found.append((at_query + start, at_pool))
    at_query, at_pool = (np.concatenate([pair[side] for pair in found]) for side in (0, 1))
    return at_query, at_pool, kmeans.similarities(queries, pool, at_query, at_pool)


def sample_neighbours(io: TaskIO, *, query_set: str, query_shard: int, pool_shards: list[int], k: int) -> pa.Table:
    """The ``k`` nearest pool pictures of each query of a shard, exactly; one pool shard in memory at a time."""
    ids = io.read(io.part("queries", query_shard), ["query_id"])["query_id"].to_numpy()
    vectors = _vectors_at(io, query_shard, ids)
    query, best = np.zeros(0, np.int64), NO_ROWS
    for shard in pool_shards:
        _, rows = _clustered(io, shard)
        if len(rows.image_id) == 0 or len(ids) == 0:
            continue
        at_query, at_pool, similarity = candidates(vectors, _vectors_at(io, shard, rows.image_id), k)
        found = replace(rows.take(at_pool), similarity=similarity)
        query, best = best_of(np.concatenate([query, at_query]), best + found, k)
    return _neighbours(query_set, pa.array(ids[query], pa.int64()), _rank_in(query), best)


def _vectors_at(io: TaskIO, shard: int, ids: np.ndarray) -> np.ndarray:
    """Embeddings of some pictures of a shard, float32 [N, D]."""
    table = io.read(io.part("embeddings", shard), ["image_id", "vector"])
    return np.asarray(vectors_of(table)[rows_at(table["image_id"].to_numpy(), ids)])


# Clusters


def first_of_clusters(rows: PoolRows, per_cluster: int) -> PoolRows:
    """The first ``per_cluster`` rows of each cluster in the order of the draw (``tie``), by cluster and rank."""
    order = np.lexsort((rows.image_id, rows.tie, rows.cluster))
    return rows.take(order[_rank_in(rows.cluster[order]) < per_cluster])


def ranks_under_cap(rows: PoolRows, cap: int) -> np.ndarray:
    """Rank of each row within its cluster, -1 for those that the cap cuts, int64 [N].

    The cap takes the first of the whole set in the order of the draw, so that a larger one only adds pictures.

    Args:
        rows: by cluster and rank.
        cap: pictures taken for the set.
    """
    ranks = _rank_in(rows.cluster)
    ranks[np.lexsort((rows.image_id, rows.tie))[cap:]] = -1
    return ranks


def cluster_neighbours(
    io: TaskIO,
    *,
    query_set: str,
    query_shards: list[int],
    pool_shards: list[int],
    min_queries: int,
    per_cluster: int,
    cap: int,
    seed: int,
) -> pa.Table:
    """Pictures of the clusters that hold more than ``min_queries`` pictures of the set."""
    counts: Counter[int] = Counter()
    for shard in query_shards:
        counts.update(io.read(io.part("queries", shard), ["cluster"])["cluster"].to_pylist())
    wanted = np.array(sorted(cluster for cluster, num in counts.items() if num > min_queries), np.int32)
    chosen = NO_ROWS
    for shard in pool_shards:
        kept, rows = _clustered(io, shard)
        inside = np.flatnonzero(np.isin(rows.cluster, wanted))
        sha256 = kept["sha256"].take(pa.array(inside)).to_pylist()
        chosen = first_of_clusters(chosen + replace(rows.take(inside), tie=drawn(seed, sha256)), per_cluster)
    nobody = pa.nulls(len(chosen.image_id), pa.int64())
    return _neighbours(query_set, nobody, ranks_under_cap(chosen, cap), chosen)


class Neighbours(GlobalStage):
    """What each query set retrieves: one task for each shard of a ``sample`` set, one for a ``cluster`` set."""

    name = "neighbours"
    section = "retrieve"
    reads = ("queries", "embeddings", "clusters", "leakage")
    writes = ("neighbours",)
    config: RetrieveConfig

    def __init__(self, config: RetrieveConfig, queries: Mapping[str, QueryConfig]) -> None:
        super().__init__(config)
        self.queries = queries

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Plan the tasks of all sets."""
        pool = context.shards("pool")
        names = {row["source_id"]: row["name"] for row in context.sources().to_pylist()}
        of_pool = tuple(context.part(table, s) for table in ("leakage", "clusters") for s in pool)
        vectors = tuple(context.part("embeddings", s) for s in pool)
        tasks = []
        for query_set, query in self.queries.items():
            shards = [s for s in context.shards("query") if names[source_of_shard(s)] == query_set]
            own = tuple(context.part("queries", s) for s in shards)
            args = {"query_set": query_set, "pool_shards": pool}
            if query.mode == "sample":
                for shard, part in zip(shards, own, strict=True):
                    reads = (part, context.part("embeddings", shard), *of_pool, *vectors)
                    asked = {**args, "query_shard": shard, "k": query.k}
                    writes = context.part("neighbours", shard)
                    tasks.append(Task(function=sample_neighbours, args=asked, reads=reads, writes=writes))
            elif query.mode == "cluster" and shards:
                asked = {**args, "query_shards": shards, "seed": self.config.seed}
                asked |= {name: getattr(query, name) for name in ("min_queries", "per_cluster", "cap")}
                writes = context.part("neighbours", shards[0])
                tasks.append(Task(function=cluster_neighbours, args=asked, reads=own + of_pool, writes=writes))
        map(tasks)
