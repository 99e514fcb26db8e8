"""Neighbours: of all candidates those that a set gets, and what each set asked for and got."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.dedup.near import rows_at
from curation.retrieve.candidates import blocks_of, candidate_parts, first_of_clusters, quotas_of
from curation.retrieve.plan import Nominal, nominal_as_is, nominal_sample
from curation.retrieve.retrieve import (
    NO_ROWS,
    PoolRows,
    SetPlan,
    SetsStage,
    best_of,
    candidates_in,
    set_plans,
)
from curation.retrieve.search import rank_in
from curation.schema import TABLES, Part, id_range, part_of_group
from curation.stage import Context, Map, Task, TaskIO


def _table(query_set: str, query_id: pa.Array, query_label: pa.Array, *, rank: np.ndarray, rows: PoolRows) -> pa.Table:
    """A part, sorted by image_id so that ranges of it can be read; of one picture as the rows came."""
    columns = [
        pa.array([query_set]).take(pa.array(np.zeros(len(rows.image_id), np.int64))),
        query_id,
        query_label,
        pa.array(rows.image_id),
        pa.array(rank.astype(np.int32)),
        pa.array(rows.similarity),
        pa.array(rows.cluster),
    ]
    table = pa.table(columns, schema=TABLES["neighbours"].schema)
    return table.take(pa.array(np.argsort(rows.image_id, kind="stable")))


def nearest_of(io: TaskIO, parts: list[int], k: int) -> tuple[np.ndarray, PoolRows]:
    """query_id, int64 [P], and the ``k`` nearest of each among the candidates of some parts, by query and rank."""
    query, best = np.zeros(0, np.int64), NO_ROWS
    for ids, rows in candidates_in(io, parts):
        query, best = best_of(np.concatenate([query, ids.to_numpy()]), best + rows, k)
    return query, best


def sample_neighbours(
    io: TaskIO, *, query_set: str, query_shards: list[int], candidates: list[int], k: int
) -> pa.Table:
    """The ``k`` nearest of each query of a block, of what all groups offer."""
    query, best = nearest_of(io, candidates, k)
    asked = pa.concat_tables([io.read(io.part("queries", shard), ["query_id", "label"]) for shard in query_shards])
    label = asked["label"].take(pa.array(rows_at(asked["query_id"].to_numpy(), query)))
    return _table(query_set, pa.array(query), label, rank=rank_in(query), rows=best)


def ranks_under_cap(rows: PoolRows, cap: int | None) -> np.ndarray:
    """Rank of each row within its cluster, -1 for those that the cap cuts, int64 [N].

    The cap takes the first of the whole set in the order of the draw, so that a larger one only adds pictures.

    Args:
        rows: by cluster and rank.
        cap: pictures taken for the set; None takes all.
    """
    ranks = rank_in(rows.cluster)
    if cap is not None:
        ranks[np.lexsort((rows.image_id, rows.tie))[cap:]] = -1
    return ranks


def drawn_neighbours(io: TaskIO, *, query_set: str, candidates: list[int], quotas: int, cap: int | None) -> pa.Table:
    """The first of each cluster of what all groups offer, as many as its quota; at most ``cap`` for the set."""
    quota, chosen = quotas_of(io, quotas), NO_ROWS
    for _, rows in candidates_in(io, candidates):
        chosen = first_of_clusters(chosen + rows, quota)
    nobody, unlabelled = (pa.nulls(len(chosen.image_id), kind) for kind in (pa.int64(), pa.string()))
    return _table(query_set, nobody, unlabelled, rank=ranks_under_cap(chosen, cap), rows=chosen)


# What came of a set


def recall_of(io: TaskIO, neighbours: list[int], exact: list[int], k: int) -> tuple[int, float | None]:
    """Queries that were searched in all clusters too, and the share of their neighbours that the search found."""
    query, best = nearest_of(io, exact, k)
    wanted = set(zip(query.tolist(), best.image_id.tolist(), strict=True))
    if not wanted:
        return 0, None
    sampled, found = pa.array(np.unique(query)), 0
    for index in neighbours:
        table = io.read(io.part("neighbours", index), ["query_id", "image_id"])
        table = table.filter(pc.is_in(table["query_id"], value_set=sampled))
        pairs = zip(table["query_id"].to_pylist(), table["image_id"].to_pylist(), strict=True)
        found += sum(pair in wanted for pair in pairs)
    return len(sampled), found / len(wanted)


def retrieval(
    io: TaskIO,
    *,
    query_set: str,
    place: int,
    asked: dict[str, Any],
    query_shards: list[int],
    neighbours: list[int],
    exact: list[int],
    quotas: int | None,
    leaks: list[int] | None,
) -> pa.Table:
    """The row of one set.

    Args:
        io: of the task.
        query_set: name of the set.
        place: in the recipe.
        asked: of the set: mode, k, cap.
        query_shards: of the set.
        neighbours: parts of the set.
        exact: parts of ``candidates`` that hold the sample of its recall.
        quotas: part of the set; None where it draws from no cluster.
        leaks: parts that tell which of its pictures match a benchmark; None where none is left out for that.
    """
    mode, k, cap = asked["mode"], asked["k"], asked["cap"]
    num_queries = sum(io.read(io.part("queries", shard), ["query_id"]).num_rows for shard in query_shards)
    row: dict[str, Any] = {"query_set": query_set, "place": place, "mode": mode, "num_queries": num_queries}
    retrieved, taken, unique = _counts(io, neighbours)
    if mode == "as_is":
        nominal = nominal_as_is(num_queries)
        row["num_test_matches"] = sum(_num_leaks(io, part, query_shards) for part in leaks or ())
    elif mode == "sample":
        nominal = nominal_sample(num_queries, k)
        row["num_sampled"], row["recall"] = recall_of(io, neighbours, exact, k)
    else:
        table = io.read(io.part("quotas", quotas if quotas is not None else -1))
        num_asked = int(pc.sum(table["num_asked"]).as_py() or 0)
        if mode == "balanced":
            row["num_queries"], num_asked = None, asked["total"]
        nominal = Nominal(num_asked, num_asked if cap is None else min(num_asked, cap))
        row["num_clusters"] = table.num_rows
        row["num_short"] = int(pc.sum(pc.less(table["num_pictures"], table["num_asked"])).as_py() or 0)
    row |= {"num_nominal": nominal.retrieved, "num_final_nominal": nominal.final}
    if nominal.retrieved is not None:
        row |= {"num_retrieved": retrieved, "num_taken": taken, "num_unique": unique}
        row |= {"num_collisions": taken - unique, "shortfall": nominal.retrieved - retrieved}
    return pa.Table.from_pylist([row], schema=TABLES["retrieval"].schema)


def _num_leaks(io: TaskIO, part: int, query_shards: list[int]) -> int:
    """Pictures of a set that a part of ``leaks`` names as copies of benchmark pictures."""
    within = ("image_id", *id_range(query_shards[0], query_shards[-1]))
    return int(pc.sum(io.read(io.part("leaks", part), ["leaks"], within=within)["leaks"]).as_py() or 0)


def _counts(io: TaskIO, neighbours: list[int]) -> tuple[int, int, int]:
    """Rows of a set, those that its cap left, and different pictures of these."""
    num_rows, num_taken, seen = 0, 0, np.zeros(0, np.int64)
    for index in neighbours:
        table = io.read(io.part("neighbours", index), ["image_id", "rank"])
        taken = table["image_id"].to_numpy()[table["rank"].to_numpy() >= 0]
        num_rows, num_taken = num_rows + table.num_rows, num_taken + len(taken)
        seen = np.union1d(seen, taken)
    return num_rows, num_taken, len(seen)


class Neighbours(SetsStage):
    """One task for each block of a sample set, one for each other set; then one that tells what came of each set."""

    name = "neighbours"
    version = 4
    reads = ("queries", "quotas", "candidates", "leaks")
    writes: ClassVar[tuple[str, ...]] = ("neighbours", "retrieval")

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Plan the tasks of all sets."""
        plans = set_plans(context, self.queries)
        tasks = {plan.name: list(self._tasks(context, plan)) for plan in plans}
        map([task for own in tasks.values() for task in own])
        map([_retrieval_task(context, plan, [task.writes for task in tasks[plan.name]]) for plan in plans])

    @staticmethod
    def _tasks(context: Context, plan: SetPlan) -> list[Task]:
        query, tasks = plan.query, []
        if query.mode == "sample":
            for block, shards in enumerate(blocks_of(context, plan), 1):
                parts = candidate_parts(context, plan, block)
                args: dict[str, Any] = {"query_set": plan.name, "query_shards": shards, "k": query.k}
                args |= {"candidates": [part.index for part in parts]}
                reads = (*(context.part("queries", shard) for shard in shards), *parts)
                writes = context.part("neighbours", shards[0])
                tasks.append(Task(function=sample_neighbours, args=args, reads=reads, writes=writes))
        elif query.mode != "as_is":
            parts = candidate_parts(context, plan, 0)
            args = {"query_set": plan.name, "candidates": [part.index for part in parts], "quotas": plan.first}
            args |= {"cap": query.cap if query.mode == "cluster" else None}
            reads = (context.part("quotas", plan.first), *parts)
            writes = context.part("neighbours", plan.first)
            tasks.append(Task(function=drawn_neighbours, args=args, reads=reads, writes=writes))
        return tasks


def _retrieval_task(context: Context, plan: SetPlan, neighbours: list[Part]) -> Task:
    query = plan.query
    exact = candidate_parts(context, plan, 0) if query.mode == "sample" else []
    draws = query.mode in ("cluster", "balanced")
    asked = {"mode": query.mode, "k": query.k, "cap": query.cap if query.mode == "cluster" else None}
    leaks = sorted({part_of_group(context.parts("leaks"), s) for s in plan.shards}) if query.is_checked else []
    reads = [context.part("queries", shard) for shard in plan.shards] + neighbours + exact + leaks
    return Task(
        function=retrieval,
        args={
            "query_set": plan.name,
            "place": plan.place,
            "asked": asked | {"total": query.total},
            "query_shards": plan.shards,
            "neighbours": [part.index for part in neighbours],
            "exact": [part.index for part in exact],
            "quotas": plan.first if draws else None,
            "leaks": [part.index for part in leaks] if query.is_checked else None,
        },
        reads=(*reads, context.part("quotas", plan.first)) if draws else tuple(reads),
        writes=context.part("retrieval", plan.first),
    )
