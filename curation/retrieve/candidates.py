"""Candidates: what groups of shards of the pool offer each query set; ``neighbours`` chooses the best of all groups.

A task goes through one group of shards for one block of queries, as many shards at a time as its memory takes. What it
finds is exact among the clusters that it searches, ties by sha256, so that neither the group nor the memory shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.retrieve import search
from curation.retrieve.balance import choose
from curation.retrieve.retrieve import (
    MAX_GROUPS,
    NO_ROWS,
    PoolRows,
    SetPlan,
    SetsStage,
    best_of,
    candidate_table,
    drawn,
    groups_of,
    rows_of_shard,
    set_plans,
    vectors_at,
)
from curation.schema import Part
from curation.stage import Context, Map, Task, TaskIO

BLOCK_QUERIES = 1 << 16  # of one task; in fp16 and fp32, 500 MB at D = 1280
BLOCK_FOUND = 1 << 22  # rows of one part: queries times k
_MAX_PENDING = 1 << 20  # rows drawn before the first of each cluster are picked out


# --- sample: nearest neighbours -------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """Queries of a block, and the clusters that they look into."""

    ids: np.ndarray  # int64 [Q]
    vectors: np.ndarray  # float16 [Q, D]
    probes: np.ndarray | None  # int32 [Q, P]; None: all clusters


def sample_candidates(
    io: TaskIO, *, query_set: str, query_shards: list[int], pool_shards: list[int], k: int
) -> pa.Table:
    """The ``k`` nearest of a group of the pool for each query of a block, among the clusters that it looks into."""
    del query_set  # tells two tasks apart
    return _nearest(io, (_asked(io, shard) for shard in query_shards), pool_shards, k)


def exact_candidates(
    io: TaskIO, *, query_set: str, sample: list[list[int]], pool_shards: list[int], k: int, seed: int
) -> pa.Table:
    """The ``k`` nearest of a group of the pool for a seeded sample of the queries, among all clusters.

    Args:
        io: of the task.
        query_set: name of the set.
        sample: shard and how many of its queries.
        pool_shards: of the group.
        k: neighbours wanted.
        seed: of the sample.
    """
    del query_set
    return _nearest(io, (_sampled(io, shard, num, seed) for shard, num in sample), pool_shards, k)


def _sampled(io: TaskIO, shard: int, num: int, seed: int) -> _Asked:
    kept = io.kept("semantic", shard)
    chosen = np.sort(np.argsort(drawn(seed, kept["sha256"].to_pylist()), kind="stable")[:num])
    ids = kept["image_id"].to_numpy()[chosen]
    return _Asked(ids, vectors_at(io, shard, ids), None)


def _asked(io: TaskIO, shard: int) -> _Asked:
    table = io.read(io.part("queries", shard), ["query_id", "probes"])
    ids = table["query_id"].to_numpy()
    lists = table["probes"].combine_chunks()
    searches_all = len(ids) == 0 or lists.null_count > 0
    probes = None if searches_all else np.asarray(lists.flatten()).reshape(len(ids), -1)
    return _Asked(ids, vectors_at(io, shard, ids), probes)


def _nearest(io: TaskIO, asked: Iterable[_Asked], pool_shards: Sequence[int], k: int) -> pa.Table:
    found = [(pa.nulls(0, pa.int64()), NO_ROWS)]
    for queries in _blocks(asked, io.memory_bytes // 9):
        query, best = np.zeros(0, np.int64), NO_ROWS
        most = io.memory_bytes // 3 // (2 * queries.vectors.shape[1])  # as read, and sorted by cluster
        for rows, vectors in _pool_blocks(io, pool_shards, most):
            if queries.probes is None:
                pairs = search.search_all(queries.vectors, vectors, k=k, device=io.device)
            else:
                pairs = search.search_lists(
                    queries.vectors, vectors, cluster=rows.cluster, probes=queries.probes, k=k, device=io.device
                )
            near = replace(rows.take(pairs.pool), similarity=pairs.similarity)
            query, best = best_of(np.concatenate([query, pairs.query]), best + near, k)
        found.append((pa.array(queries.ids[query]), best))
    ids = pa.concat_arrays([one for one, _ in found])
    return candidate_table(ids, _joined([rows for _, rows in found]))


def _joined(rows: Sequence[PoolRows]) -> PoolRows:
    return PoolRows(*(np.concatenate([getattr(one, name) for one in rows]) for name in vars(NO_ROWS)))


def _blocks(asked: Iterable[_Asked], num_bytes: int) -> Iterator[_Asked]:
    """Queries together, in fp16 at most so many bytes at once; a shard is not cut."""
    block: list[_Asked] = []
    for one in chain((one for one in asked if len(one.ids)), (None,)):
        held = sum(other.vectors.nbytes for other in block)
        if block and (one is None or held + one.vectors.nbytes > num_bytes):
            ids, vectors, probes = zip(*block, strict=True)
            together = None if probes[0] is None else np.concatenate(probes)
            yield _Asked(np.concatenate(ids), np.concatenate(vectors), together)
            block = []
        if one is not None:
            block.append(one)


def _pool_blocks(io: TaskIO, shards: Sequence[int], most: int) -> Iterator[tuple[PoolRows, np.ndarray]]:
    """Pictures of the pool by cluster, with their vectors, float16 [N, D]; N is at most ``most``, or one shard."""
    block: list[tuple[int, PoolRows]] = []
    num = 0
    for shard in [*shards, None]:
        rows = NO_ROWS if shard is None else rows_of_shard(io, shard)[1]
        if block and (shard is None or num + len(rows.image_id) > most):
            yield _sorted_block(io, block)
            block, num = [], 0
        if shard is not None and len(rows.image_id):
            block.append((shard, rows))
            num += len(rows.image_id)


def _sorted_block(io: TaskIO, block: Sequence[tuple[int, PoolRows]]) -> tuple[PoolRows, np.ndarray]:
    rows = _joined([one for _, one in block])
    order = np.argsort(rows.cluster, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    vectors, start = np.zeros((0, 0), np.float16), 0
    for shard, one in block:
        stored = vectors_at(io, shard, one.image_id)
        if not len(vectors):
            vectors = np.empty((len(order), stored.shape[1]), np.float16)
        vectors[place[start : start + len(stored)]] = stored
        start += len(stored)
    return rows.take(order), vectors


# --- cluster and balanced: a draw -----------------------------------------------------------------------------------


def quotas_of(io: TaskIO, index: int) -> np.ndarray:
    """Pictures asked of each cluster, int64 [at most K], from one part of ``quotas``."""
    table = io.read(io.part("quotas", index), ["cluster", "num_asked"])
    cluster, asked = table["cluster"].to_numpy(), table["num_asked"].to_numpy()
    quota = np.zeros(int(cluster.max(initial=-1)) + 1, np.int64)
    quota[cluster] = asked
    return quota


def first_of_clusters(rows: PoolRows, quota: np.ndarray) -> PoolRows:
    """The first rows of each cluster in the order of the draw (``tie``), as many as its quota, by cluster and rank."""
    return rows.take(choose(rows.cluster, quota, order_key=rows.tie, image_id=rows.image_id))


def drawn_candidates(io: TaskIO, *, query_set: str, quotas: int, pool_shards: list[int], seed: int) -> pa.Table:
    """The first pictures of each cluster in a group of the pool, in a seeded order, as many as its quota."""
    del query_set
    quota = quotas_of(io, quotas)
    chosen, pending, num = NO_ROWS, [NO_ROWS], 0
    for shard in pool_shards:
        kept, rows = rows_of_shard(io, shard)
        inside = np.flatnonzero(rows.cluster < len(quota))
        inside = inside[quota[rows.cluster[inside]] > 0]
        sha256 = kept["sha256"].take(pa.array(inside)).to_pylist()
        pending.append(replace(rows.take(inside), tie=drawn(seed, sha256)))
        num += len(inside)
        if num > max(_MAX_PENDING, len(chosen.image_id)):
            chosen, pending, num = first_of_clusters(_joined([chosen, *pending]), quota), [], 0
    chosen = first_of_clusters(_joined([chosen, *pending]), quota)
    return candidate_table(pa.nulls(len(chosen.image_id), pa.int64()), chosen)


# --- stage ----------------------------------------------------------------------------------------------------------


def blocks_of(context: Context, plan: SetPlan) -> list[list[int]]:
    """Shards of a sample set in blocks, each one task a group; an appended shard changes the last one only."""
    blocks: list[list[int]] = []
    held = 0
    most = min(BLOCK_QUERIES, max(1, BLOCK_FOUND // plan.query.k))
    for shard in plan.shards:
        num = context.num_rows(context.part("queries", shard))
        if not blocks or held + num > most:
            blocks.append([])
            held = 0
        blocks[-1].append(shard)
        held += num
    return blocks


def candidate_parts(context: Context, plan: SetPlan, block: int) -> list[Part]:
    """Parts of ``candidates`` of a block of a set, one a group; block 0 of a sample set is the sample of its recall."""
    first = plan.first + block * MAX_GROUPS
    return [context.part("candidates", first + group) for group in range(len(groups_of(context.shards("pool"))))]


def recall_sample(plan: SetPlan, num: int) -> list[list[int]]:
    """Shard and how many of its queries, for a sample spread over all shards of a set."""
    ends = [num * place // max(1, len(plan.shards)) for place in range(len(plan.shards) + 1)]
    counts = [end - start for start, end in pairwise(ends)]
    return [[shard, count] for shard, count in zip(plan.shards, counts, strict=True) if count]


class Candidates(SetsStage):
    """For each set, one task a group of shards of the pool; for a sample set, one a block of its queries too."""

    name = "candidates"
    reads = ("queries", "quotas", "embeddings", "clusters", "semantic")
    writes = ("candidates",)

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Plan the tasks of all sets."""
        groups = groups_of(context.shards("pool"))
        of_pool = {
            shards[0]: tuple(context.part(table, s) for table in ("semantic", "clusters") for s in shards)
            for shards in groups
        }
        vectors = {shards[0]: tuple(context.part("embeddings", s) for s in shards) for shards in groups}
        tasks: list[Task] = []
        for plan in set_plans(context, self.queries):
            if plan.query.mode == "as_is":
                continue
            own: list[tuple[Any, dict[str, Any], tuple[Part, ...]]]
            if plan.query.mode == "sample":
                own = [self._exact(context, plan), *self._blocks(context, plan)]
            else:
                drawn_by = {"query_set": plan.name, "quotas": plan.first, "seed": self.config.seed}
                own = [(drawn_candidates, drawn_by, (context.part("quotas", plan.first),))]
            for block, (function, args, reads) in enumerate(own):
                for shards, writes in zip(groups, candidate_parts(context, plan, block), strict=True):
                    more = vectors[shards[0]] if plan.query.mode == "sample" else ()
                    tasks.append(
                        Task(
                            function=function,
                            args={**args, "pool_shards": shards},
                            reads=(*reads, *of_pool[shards[0]], *more),
                            writes=writes,
                        )
                    )
        map(tasks)

    def _exact(self, context: Context, plan: SetPlan) -> tuple[Any, dict[str, Any], tuple[Part, ...]]:
        sample = recall_sample(plan, self.config.recall_queries)
        args = {"query_set": plan.name, "sample": sample, "k": plan.query.k, "seed": self.config.seed}
        reads = tuple(context.part(table, shard) for table in ("semantic", "embeddings") for shard, _ in sample)
        return exact_candidates, args, reads

    @staticmethod
    def _blocks(context: Context, plan: SetPlan) -> Iterator[tuple[Any, dict[str, Any], tuple[Part, ...]]]:
        for shards in blocks_of(context, plan):
            args = {"query_set": plan.name, "query_shards": shards, "k": plan.query.k}
            yield sample_candidates, args, tuple(context.part(t, s) for t in ("queries", "embeddings") for s in shards)
