"""Quotas: how many pictures a set draws from which cluster, in the modes cluster and balanced.

Mode cluster asks the same of each cluster that holds enough queries (Oquab et al. 2023, section 3); mode balanced
shares a total out among all clusters as evenly as their sizes allow (Vo et al. 2024). A cluster that holds fewer than
is asked of it gives what it has: the shortfall is told here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.dedup.near import rows_at
from curation.ingest.sources import QueryConfig
from curation.represent.hierarchy import parents_of
from curation.retrieve.balance import allocate
from curation.retrieve.plan import format_plan, planned
from curation.retrieve.retrieve import SetsStage, groups_of, set_plans
from curation.schema import TABLES
from curation.stage import Context, Map, Task, TaskIO


def count_clusters(io: TaskIO, *, pool_shards: list[int]) -> pa.Table:
    """One part of ``cluster_sizes``."""
    counts = np.zeros(0, np.int64)
    for shard in pool_shards:
        table = io.read(io.part("clusters", shard), ["image_id", "cluster"])
        at = rows_at(table["image_id"].to_numpy(), io.kept("semantic", shard)["image_id"].to_numpy())
        cluster = table["cluster"].to_numpy()[at]
        counts = _added(counts, np.bincount(cluster, minlength=len(counts)))
    held = np.flatnonzero(counts)
    return pa.table([held.astype(np.int32), counts[held]], schema=TABLES["cluster_sizes"].schema)


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of two counts of clusters, int64; the longer one's length."""
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def _sizes(io: TaskIO, groups: list[int]) -> np.ndarray:
    """Pictures of each cluster in the pool, int64 [at most K]."""
    sizes = np.zeros(0, np.int64)
    for group in groups:
        table = io.read(io.part("cluster_sizes", group))
        cluster, num = table["cluster"].to_numpy(), table["num_pictures"].to_numpy()
        part = np.zeros(int(cluster.max(initial=-1)) + 1, np.int64)
        part[cluster] = num
        sizes = _added(sizes, part)
    return sizes


def _table(query_set: str, cluster: np.ndarray, *, num_queries: Any, asked: np.ndarray, sizes: np.ndarray) -> pa.Table:
    held = np.zeros(max(len(sizes), int(cluster.max(initial=-1)) + 1), np.int64)
    held[: len(sizes)] = sizes
    columns = [
        pa.array([query_set] * len(cluster), pa.string()),
        pa.array(cluster.astype(np.int32)),
        num_queries,
        pa.array(asked.astype(np.int64)),
        pa.array(held[cluster]),
        pa.array(np.minimum(asked, held[cluster]).astype(np.int64)),
    ]
    return pa.table(columns, schema=TABLES["quotas"].schema)


def cluster_quotas(
    io: TaskIO, *, query_set: str, query_shards: list[int], groups: list[int], min_queries: int, per_cluster: int
) -> pa.Table:
    """``per_cluster`` of each cluster that holds more than ``min_queries`` queries of the set."""
    counts = np.zeros(0, np.int64)
    for shard in query_shards:
        counts = _added(counts, np.bincount(io.read(io.part("queries", shard), ["cluster"])["cluster"].to_numpy()))
    wanted = np.flatnonzero(counts > min_queries)
    asked = np.full(len(wanted), per_cluster, np.int64)
    return _table(query_set, wanted, num_queries=pa.array(counts[wanted]), asked=asked, sizes=_sizes(io, groups))


def balanced_quotas(io: TaskIO, *, query_set: str, groups: list[int], total: int, seed: int) -> pa.Table:
    """A total shared out down the hierarchy; over all clusters alike where there is none."""
    parents = parents_of(io.read(io.part("fit_hierarchy", 0), ["level", "cluster", "parent"]))
    sizes = _sizes(io, groups)
    leaves = np.zeros(len(parents[0]) if parents else len(sizes), np.int64)
    leaves[: len(sizes)] = sizes
    quota = allocate(parents, leaves, total, str(seed)) if len(leaves) else leaves
    given = np.flatnonzero(quota)
    nobody = pa.nulls(len(given), pa.int64())
    return _table(query_set, given, num_queries=nobody, asked=quota[given], sizes=sizes)


class Quotas(SetsStage):
    """Sizes of the clusters, then one task for each set that draws from them."""

    name = "quotas"
    version = 2
    reads = ("semantic", "clusters", "queries", "fit_hierarchy")
    writes: ClassVar[tuple[str, ...]] = ("quotas", "cluster_sizes")

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Count, then share out."""
        plans = [one for one in set_plans(context, self.queries) if one.query.mode in ("cluster", "balanced")]
        groups = list(enumerate(groups_of(context.shards("pool")))) if plans else []
        counts = []
        for number, shards in groups:
            reads = tuple(context.part(table, shard) for table in ("semantic", "clusters") for shard in shards)
            writes = context.part("cluster_sizes", number)
            counts.append(Task(function=count_clusters, args={"pool_shards": shards}, reads=reads, writes=writes))
        map(counts)
        tasks = []
        for one in plans:
            args: dict[str, Any] = {"query_set": one.name, "groups": [number for number, _ in groups]}
            reads = tuple(task.writes for task in counts)
            writes = context.part("quotas", one.first)
            if one.query.mode == "cluster":
                args |= {"query_shards": one.shards}
                args |= {key: getattr(one.query, key) for key in ("min_queries", "per_cluster")}
                reads += tuple(context.part("queries", shard) for shard in one.shards)
                tasks.append(Task(function=cluster_quotas, args=args, reads=reads, writes=writes))
            else:
                args |= {"total": one.query.total, "seed": self.config.seed}
                reads += (context.part("fit_hierarchy", 0),)
                tasks.append(Task(function=balanced_quotas, args=args, reads=reads, writes=writes))
        map(tasks)

    def told(self, context: Context) -> Iterator[str]:
        """What the sets ask for, now that it is known which clusters hold enough of them."""
        plans = set_plans(context, self.queries)
        images = {one.name: sum(context.num_rows(context.part("queries", s)) for s in one.shards) for one in plans}
        yield "query sets, now that the clusters are known"
        yield from format_plan(planned(self.queries, images=images, qualifying=num_qualifying(context, self.queries)))


def num_qualifying(context: Context, queries: Mapping[str, QueryConfig]) -> dict[str, int]:
    """Clusters that each set of mode cluster draws from, once the stage ``quotas`` is done."""
    plans = [one for one in set_plans(context, queries) if one.query.mode == "cluster"]
    return {one.name: context.num_rows(context.part("quotas", one.first)) for one in plans}
