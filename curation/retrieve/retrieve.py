"""Queries and what is retrieved for them: nearest neighbours of each query, or pictures of the clusters that queries fill."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.near import rows_at
from curation.ingest.sources import QueryConfig
from curation.represent import kmeans
from curation.schema import TABLES, source_of_shard
from curation.stage import Config, Context, GlobalStage, Map, ShardStage, Task, TaskIO

_SLACK = 16  # candidates beyond k that a GEMM proposes; exact similarities decide among them


class RetrieveConfig(Config):
    """How pictures are drawn; what each set asks for stands in ``queries``."""

    seed: int = Field(0, description="of the order in which pictures of a cluster are taken")


def query_values(query: QueryConfig) -> dict[str, Any]:
    """What of a query set decides the retrieval."""
    return {name: getattr(query, name) for name in ("mode", "k", "min_queries", "per_cluster", "cap")}


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


# Nearest neighbours


def merge_top(similarity: np.ndarray, sha256: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Places of the ``k`` best of some candidates: highest similarity, ties by sha256, then by id."""
    return np.lexsort((ids, sha256, -similarity))[:k]


def sample_neighbours(io: TaskIO, *, query_set: str, query_shard: int, pool_shards: list[int], k: int) -> pa.Table:
    """The ``k`` nearest pool pictures of each query of a shard, exactly; one pool shard in memory at a time."""
    queries = io.read(io.part("queries", query_shard), ["query_id"])["query_id"].to_numpy()
    embedded = io.read(io.part("embeddings", query_shard))
    vectors = kmeans.vectors_of(embedded)[rows_at(embedded["image_id"].to_numpy(), queries)]
    best: list[list[tuple[float, str, int, int]]] = [[] for _ in queries]
    for shard in pool_shards:
        rows = io.kept("leakage", shard)
        if rows.num_rows == 0 or len(queries) == 0:
            continue
        table = io.read(io.part("embeddings", shard))
        pool = kmeans.vectors_of(table)[rows_at(table["image_id"].to_numpy(), rows["image_id"].to_numpy())]
        clusters = io.read(io.part("clusters", shard), ["image_id", "cluster"])
        cluster = clusters["cluster"].to_numpy()[rows_at(clusters["image_id"].to_numpy(), rows["image_id"].to_numpy())]
        sha256, ids = rows["sha256"].to_pylist(), rows["image_id"].to_numpy()
        num = min(k + _SLACK, len(pool))
        candidates = np.argpartition(-(vectors @ pool.T), num - 1, axis=1)[:, :num]
        for query, places in enumerate(candidates):
            exact = kmeans.similarity(vectors[query], pool[places])
            best[query] += [
                (-float(s), sha256[p], int(ids[p]), int(cluster[p])) for s, p in zip(exact, places, strict=True)
            ]
            best[query] = sorted(best[query])[:k]
    rows_out = [
        {"query_set": query_set, "query_id": int(query), "image_id": found[2], "rank": rank, "similarity": -found[0],
         "cluster": found[3]}
        for query, ranked in zip(queries, best, strict=True)
        for rank, found in enumerate(ranked)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows_out, schema=TABLES["neighbours"].schema)


# Clusters


def drawn(seed: int, sha256: str) -> bytes:
    """Place of a picture in a seeded order that depends on its bytes only, so that a longer draw begins with a shorter."""
    return hashlib.sha256(f"{seed}|{sha256}".encode()).digest()


def choose_from_clusters(
    members: Mapping[int, list[tuple[bytes, int, float]]], *, per_cluster: int, cap: int
) -> list[tuple[int, int, int, float]]:
    """Pictures drawn for one set: (cluster, rank, image_id, similarity); rank -1 for those that the cap cut.

    Args:
        members: of each qualifying cluster: (place in the draw, image_id, similarity).
        per_cluster: pictures taken from each, or all that it has.
        cap: pictures taken for the set.
    """
    taken = []
    for cluster, pictures in sorted(members.items()):
        ordered = sorted(pictures)[:per_cluster]
        taken += [(place, cluster, rank, image, score) for rank, (place, image, score) in enumerate(ordered)]
    taken.sort(key=lambda row: (row[0], row[3]))
    marked = [(row[1], row[2] if n < cap else -1, row[3], row[4]) for n, row in enumerate(taken)]
    return sorted(marked, key=lambda row: (row[0], row[1] < 0, row[1], row[2]))


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
    members: dict[int, list[tuple[bytes, int, float]]] = {c: [] for c, n in counts.items() if n > min_queries}
    wanted = pa.array(sorted(members), pa.int32())
    for shard in pool_shards:
        rows = io.kept("leakage", shard)
        sha256 = dict(zip(rows["image_id"].to_pylist(), rows["sha256"].to_pylist(), strict=True))
        table = io.read(io.part("clusters", shard))
        for row in table.filter(pa.compute.is_in(table["cluster"], value_set=wanted)).to_pylist():
            place = drawn(seed, sha256[row["image_id"]])
            members[row["cluster"]].append((place, row["image_id"], row["similarity"]))
    chosen = choose_from_clusters(members, per_cluster=per_cluster, cap=cap)
    rows_out = [
        {"query_set": query_set, "query_id": None, "image_id": image, "rank": rank, "similarity": score, "cluster": c}
        for c, rank, image, score in chosen
    ]
    return pa.Table.from_pylist(rows_out, schema=TABLES["neighbours"].schema)


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
        tasks = []
        for query_set, query in self.queries.items():
            shards = [s for s in context.shards("query") if names[source_of_shard(s)] == query_set]
            of_pool = tuple(context.part(table, s) for table in ("leakage", "clusters") for s in pool)
            if query.mode == "sample":
                vectors = tuple(context.part("embeddings", s) for s in pool)
                for shard in shards:
                    args = {"query_set": query_set, "query_shard": shard, "pool_shards": pool, "k": query.k}
                    own = (context.part("queries", shard), context.part("embeddings", shard))
                    part = context.part("neighbours", shard)
                    tasks.append(
                        Task(function=sample_neighbours, args=args, reads=own + of_pool + vectors, writes=part)
                    )
            elif query.mode == "cluster" and shards:
                args = {name: getattr(query, name) for name in ("min_queries", "per_cluster", "cap")}
                args |= {"query_set": query_set, "query_shards": shards, "pool_shards": pool, "seed": self.config.seed}
                own = tuple(context.part("queries", s) for s in shards)
                part = context.part("neighbours", shards[0])
                tasks.append(Task(function=cluster_neighbours, args=args, reads=own + of_pool, writes=part))
        map(tasks)
