"""Retrieval: what all its stages share, and the first of them, the queries with the clusters that they look into.

The stages in order: ``queries``; ``quotas``, how many pictures of which cluster (modes cluster and balanced);
``candidates``, what groups of shards of the pool offer each set; ``neighbours``, the best of them; ``offers``, the same
by picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.near import rows_at
from curation.ingest.sources import QueryConfig
from curation.retrieve.search import FEW_LISTS, nearest_lists, rank_in
from curation.schema import TABLES, first_shard, source_of_shard
from curation.stage import Context, GlobalStage, ShardStage, TaskIO
from training.config import Config

GROUP_SHARDS = 64  # shards of the pool that one task goes through, as long as there are few groups
MAX_GROUPS = 64  # groups of one set; more shards than these hold make the groups larger
_SOURCELESS = 999  # balanced sets have no source; their parts count down from the first shard of this one


class RetrieveConfig(Config):
    """How pictures are found and drawn; what each set asks for stands in ``queries``."""

    seed: int = Field(
        0, description="of the order in which pictures of a cluster are taken, and of the recall's sample"
    )
    # .995 of the 4 nearest among 1,000 clusters of hog-thumb embeddings: docs/recipes.md has more.
    probes: int = Field(
        256, ge=1, description=f"mode sample: nearest clusters that are searched; up to {FEW_LISTS} clusters: all"
    )
    recall_queries: int = Field(
        100, ge=0, description="mode sample: queries of a set that are searched in all clusters too, to tell the recall"
    )


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """One query set as its tasks are cut."""

    name: str
    query: QueryConfig
    place: int  # in the recipe, from 0
    first: int  # index of its parts: its first shard, or a number of its own where it has no source
    shards: list[int]


def first_parts(modes: Mapping[str, str], sources: Mapping[str, int]) -> dict[str, int]:
    """Index of the first part of each query set.

    Args:
        modes: of the sets, in the order of the recipe.
        sources: source_id of each set that has a source; a set of mode balanced has none.
    """
    sourceless = [name for name, mode in modes.items() if mode == "balanced"]
    return {
        name: first_shard(_SOURCELESS - sourceless.index(name) if mode == "balanced" else sources[name])
        for name, mode in modes.items()
    }


def set_plans(context: Context, queries: Mapping[str, QueryConfig]) -> list[SetPlan]:
    """The query sets of a run, in the order of the recipe."""
    sources = {row["name"]: row["source_id"] for row in context.sources().to_pylist()}
    first = first_parts({name: query.mode for name, query in queries.items()}, sources)
    shards: dict[int, list[int]] = {}
    for shard in context.shards("query"):
        shards.setdefault(first_shard(source_of_shard(shard)), []).append(shard)
    return [
        SetPlan(name=name, query=query, place=place, first=first[name], shards=shards.get(first[name], []))
        for place, (name, query) in enumerate(queries.items())
    ]


def groups_of(pool: Sequence[int]) -> list[list[int]]:
    """Shards of the pool in groups, each one task.

    An appended shard changes the last group only, but where a number of shards is passed that doubles all of them.
    """
    size = GROUP_SHARDS
    while len(pool) > size * MAX_GROUPS:
        size *= 2
    return [list(pool[start : start + size]) for start in range(0, len(pool), size)]


class SetsStage(GlobalStage):
    """A stage over the query sets. Each task holds what it needs to know of them, so the stage reads no more."""

    section = "retrieve"
    config: RetrieveConfig

    def __init__(self, config: RetrieveConfig, queries: Mapping[str, QueryConfig]) -> None:
        super().__init__(config)
        self.queries = queries

    def fingerprint_values(self) -> dict[str, Any]:
        """Nothing: a changed set is a changed task, and touches no other set."""
        return {}


class Queries(ShardStage):
    """The pictures of the query sets, with what their set asks for."""

    name = "queries"
    section = ""
    version = 2
    kind = "output"
    after = "leakage"
    reads: ClassVar[tuple[str, ...]] = ("leakage", "urls", "sources", "clusters", "embeddings", "fit_kmeans")
    by_content: ClassVar[tuple[str, ...]] = ("urls",)
    writes = ("queries",)
    roles = ("query",)
    config: RetrieveConfig

    def __init__(self, config: RetrieveConfig, queries: Mapping[str, QueryConfig]) -> None:
        super().__init__(config)
        self.queries = queries

    def fingerprint_values(self) -> dict[str, Any]:
        """Mode and k of each set that has pictures; how many clusters are searched."""
        sets = {name: query for name, query in self.queries.items() if query.source is not None}
        asked = {name: {"mode": query.mode, "k": query.k} for name, query in sets.items()}
        return {"queries": asked, "retrieve.probes": self.config.probes}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Rows of one shard of one set."""
        sources = io.table("sources", ["source_id", "name"]).to_pylist()
        query_set = next(row["name"] for row in sources if row["source_id"] == source_of_shard(shard))
        query = self.queries[query_set]
        ids = io.rows["image_id"].to_numpy()
        urls = io.table("urls", ["image_id", "label"])
        clusters = io.table("clusters", ["image_id", "cluster"])
        num = len(ids)
        probes = self._probes(shard, ids, io) if query.mode == "sample" else None
        columns = [
            io.rows["image_id"],
            pa.array([query_set] * num, pa.string()),
            pa.array([query.mode] * num, pa.string()),
            pa.array([query.k if query.mode == "sample" else None] * num, pa.int32()),
            urls["label"].take(pa.array(rows_at(urls["image_id"].to_numpy(), ids))),
            clusters["cluster"].take(pa.array(rows_at(clusters["image_id"].to_numpy(), ids))),
            pa.array([None] * num if probes is None else list(probes), pa.list_(pa.int32())),
        ]
        return {"queries": pa.table(columns, schema=TABLES["queries"].schema)}

    def _probes(self, shard: int, ids: np.ndarray, io: TaskIO) -> np.ndarray | None:
        """Clusters that each query looks into, int32 [Q, P]; None where it is all of them."""
        fitted = io.table("fit_kmeans")["vector"].combine_chunks()
        if len(fitted) <= max(FEW_LISTS, self.config.probes):
            return None
        centroids = np.asarray(fitted.flatten().to_numpy(zero_copy_only=False), np.float16).reshape(len(fitted), -1)
        return nearest_lists(vectors_at(io, shard, ids), centroids, self.config.probes)


# Rows


@dataclass(frozen=True)
class PoolRows:
    """Pictures of the pool, or found ones: arrays of one length, in any order."""

    image_id: np.ndarray  # int64 [N]
    tie: np.ndarray  # uint64 [N], what decides between equals
    cluster: np.ndarray  # int32 [N]
    similarity: np.ndarray  # float32 [N], to a centroid or a query

    def take(self, at: np.ndarray | slice) -> PoolRows:
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


def first_bytes(digests: Iterable[str]) -> np.ndarray:
    """First 8 bytes of hex digests, uint64: the order of the digests themselves."""
    return np.array([int(digest[:16], 16) for digest in digests], np.uint64)


def drawn(seed: int, sha256: Iterable[str]) -> np.ndarray:
    """Places of pictures in a seeded order, uint64.

    They depend on the bytes of each picture only, so that a longer draw begins with a shorter one.
    """
    return first_bytes(hashlib.sha256(f"{seed}|{one}".encode()).hexdigest() for one in sha256)


def rows_of_shard(io: TaskIO, shard: int) -> tuple[pa.Table, PoolRows]:
    """image_id, sha256 of what semantic kept in a shard, and its rows, ties by sha256."""
    kept = io.kept("semantic", shard)
    table = io.read(io.part("clusters", shard))
    ids = kept["image_id"].to_numpy()
    at = rows_at(table["image_id"].to_numpy(), ids)
    cluster, similarity = table["cluster"].to_numpy()[at], table["similarity"].to_numpy()[at]
    return kept, PoolRows(ids, first_bytes(kept["sha256"].to_pylist()), cluster, similarity)


def vectors_at(io: TaskIO, shard: int, ids: np.ndarray) -> np.ndarray:
    """Embeddings of some pictures of a shard as they are stored, float16 [N, D]."""
    table = io.read(io.part("embeddings", shard), ["image_id", "vector"])
    column = table["vector"].combine_chunks()
    stored = np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float16)
    at = rows_at(table["image_id"].to_numpy(), ids)
    return np.asarray(stored.reshape(len(table), column.type.list_size)[at])


def best_of(query: np.ndarray, rows: PoolRows, k: int) -> tuple[np.ndarray, PoolRows]:
    """The ``k`` best rows of each query, by query and rank: highest similarity, ties by sha256, then by id."""
    order = np.lexsort((rows.image_id, rows.tie, -rows.similarity, query))
    order = order[rank_in(query[order]) < k]
    return query[order], rows.take(order)


# Candidates as a table


def candidate_table(query_id: pa.Array, rows: PoolRows) -> pa.Table:
    """Rows of ``candidates``."""
    columns = [query_id, rows.image_id, rows.tie, rows.similarity, rows.cluster]
    return pa.table([pa.array(column) for column in columns], schema=TABLES["candidates"].schema)


def candidates_in(io: TaskIO, parts: Sequence[int]) -> Iterator[tuple[pa.Array, PoolRows]]:
    """query_id and rows of some parts of ``candidates``, one part after the other."""
    for index in parts:
        table = io.read(io.part("candidates", index)).combine_chunks()
        names = ("image_id", "order", "cluster", "similarity")
        yield table["query_id"].combine_chunks(), PoolRows(*(table[name].to_numpy() for name in names))
