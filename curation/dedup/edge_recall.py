"""Edge recall: how many of the edges that there are the search of this run found, by an exact search of a sample.

The sample is drawn by a seeded digest of the bytes: shards and workers do not decide it, and it is another one than the
sample of the quantiser, which is the least sha256 themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.dedup.components import num_kept
from curation.dedup.describe import vectors_of
from curation.dedup.edges import EdgesConfig
from curation.dedup.join import pairs_between
from curation.dedup.near import rows_at
from curation.retrieve.retrieve import drawn, groups_of
from curation.schema import ROWS_PER_SHARD_LIMIT, TABLES, Part
from curation.stage import Context, GlobalStage, Map, Task, TaskIO

WANTED = 0.99  # with less the user is told what to raise
_BLOCK_ROWS = 1 << 15  # of a shard, read at once; with their row groups 0.9 GB where a vector has 1,024 numbers
_REFERENCE = ("image_id", "reference_id")

# --- pure functions -------------------------------------------------------------------------------------------------


def wilson_lower(num_found: int, num: int) -> float:
    """The share that lies below the true one with 95 % (Wilson 1927, one-sided), as if all trials were independent."""
    if num == 0:
        return 0.0
    share, z = num_found / num, NormalDist().inv_cdf(0.95)
    z2 = z * z
    spread = z * math.sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    return max(0.0, (share + z2 / (2 * num) - spread) / (1 + z2 / num))


class Pairs:
    """Different pairs of ids, and which of them were met; 25 bytes a pair."""

    def __init__(self, left: np.ndarray, right: np.ndarray) -> None:
        """Int64 [P], int64 [P]; a pair may be there twice."""
        self._ids = np.unique(np.concatenate([left, right]))
        self._codes = np.unique(self._codes_of(left, right))
        self._met = np.zeros(len(self._codes), bool)

    def meet(self, left: np.ndarray, right: np.ndarray) -> None:
        """Take note of pairs, int64 [E], int64 [E], others among them."""
        if len(self._codes) == 0:
            return
        known = np.isin(left, self._ids) & np.isin(right, self._ids)
        self._met |= np.isin(self._codes, self._codes_of(left[known], right[known]))

    def _codes_of(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ids, left) * len(self._ids) + np.searchsorted(self._ids, right)

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self._codes)

    @property
    def num_met(self) -> int:
        """How many were met."""
        return int(np.count_nonzero(self._met))


def told_of_recall(row: Mapping[str, Any]) -> str:
    """What a row of ``edge_recall`` says, as the end of a sentence about what was found."""
    what = "pictures" if row["kind"] == "pool" else "benchmark pictures"
    what = f"{what} with a cosine from {row['threshold']:.2f} on to"
    if row["recall"] is None:
        return f"recall is not known: an exact search found no {what} {row['num_sampled']:,} sampled pictures"
    counts = f"{row['num_found']:,} of {row['num_edges']:,} pairs"
    if row["num_sampled"] == row["num_pictures"]:
        return f"{row['recall']:.2%} of the {what} all {row['num_pictures']:,} pictures found ({counts})"
    at_least = f"at least {row['recall_at_least']:.2%} with 95% confidence"
    return f"{row['recall']:.2%} of the {what} {row['num_sampled']:,} sampled pictures found ({counts}; {at_least})"


# --- tasks ----------------------------------------------------------------------------------------------------------


def sample_of_group(io: TaskIO, *, shards: list[int], num_pictures: int, seed: int) -> pa.Table:
    """One part of ``recall_sample``: of some shards the pictures that are drawn first, with their vectors."""
    ids, order = np.empty(0, np.int64), np.empty(0, np.uint64)
    for shard in shards:
        kept = io.kept("near", shard)
        ids = np.concatenate([ids, kept["image_id"].to_numpy()])
        order = np.concatenate([order, drawn(seed, kept["sha256"].to_pylist())])
        first = np.lexsort((ids, order))[:num_pictures]
        ids, order = ids[first], order[first]
    by_id = np.argsort(ids)
    ids, order = ids[by_id], order[by_id]
    shard_of = ids // ROWS_PER_SHARD_LIMIT
    found = [vectors for shard in shards for _, vectors in blocks_of(io, shard, ids[shard_of == shard])]
    vectors = np.concatenate(found) if found else np.empty((0, 0), np.float32)
    ends = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * np.int32(vectors.shape[1]))
    lists = pa.ListArray.from_arrays(ends, pa.array(vectors.astype(np.float16).ravel()))
    return pa.table([pa.array(ids), pa.array(order), lists], schema=TABLES["recall_sample"].schema)


def blocks_of(io: TaskIO, shard: int, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids, int64 [N], and descriptors, float32 [N, D], of pictures of a shard, block by block; ``ids`` ascending."""
    part = io.part("descriptors", shard)
    for block in np.split(ids, np.flatnonzero(np.diff(ids // _BLOCK_ROWS)) + 1):
        if len(block):
            within = ("image_id", int(block[0]), int(block[-1]) + 1)
            table = io.read(part, ["image_id", "vector"], within=within)
            yield block, vectors_of(table.take(pa.array(rows_at(table["image_id"].to_numpy(), block))))


def sampled(io: TaskIO, groups: Sequence[int], num_pictures: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int64 [S], ascending, and descriptors, float32 [S, D], of the pictures drawn first of all groups."""
    best = TABLES["recall_sample"].schema.empty_table()
    for group in groups:
        both = pa.concat_tables([best, io.read(io.part("recall_sample", group))])
        best = both.sort_by([("order", "ascending"), ("image_id", "ascending")])[:num_pictures].combine_chunks()
    best = best.sort_by("image_id")
    vectors = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in best["vector"].chunks]
    flat = np.concatenate([np.empty(0, np.float16), *vectors]).astype(np.float32)
    return best["image_id"].to_numpy(), flat.reshape(len(best), -1 if len(flat) else 0)


def exact_pairs(
    io: TaskIO,
    *,
    shards: list[int],
    references: list[int],
    groups: list[int],
    num_pictures: int,
    thresholds: list[float],
) -> pa.Table:
    """One part of ``recall_pairs``: sampled pictures against all pictures of some shards.

    Holds the vectors of the sample and of a block, 16 MB of scores for each 4,096 of either, and 25 bytes a pair.

    Args:
        io: of the task.
        shards: of the pool.
        references: shards of benchmarks.
        groups: parts of ``recall_sample``.
        num_pictures: of the sample.
        thresholds: cosine from which on two pool pictures are copies, and a pool picture and a benchmark picture.
    """
    sample, vectors = sampled(io, groups, num_pictures)
    parts = [TABLES["recall_pairs"].schema.empty_table()]
    roles = [(shard, "near", False, thresholds[0]) for shard in shards]
    roles += [(shard, "safety", True, thresholds[1]) for shard in references]
    for shard, verdict, is_reference, threshold in roles:
        for ids, others in blocks_of(io, shard, io.kept(verdict, shard)["image_id"].to_numpy()):
            i, j, similarity = pairs_between(vectors, others, threshold)
            left, right = sample[i], ids[j]
            apart = left != right
            columns = [left[apart], right[apart], similarity[apart], np.full(int(apart.sum()), is_reference)]
            parts.append(pa.table([pa.array(column) for column in columns], schema=parts[0].schema))
    return pa.concat_tables(parts).sort_by([("image_id", "ascending"), ("other_id", "ascending")])


def recall_of_edges(
    io: TaskIO,
    *,
    shards: list[int],
    groups: list[int],
    edges: list[int],
    reference_edges: list[int],
    num_pictures: int,
    thresholds: dict[str, float],
) -> pa.Table:
    """The table ``edge_recall``; parts of edges are read one at a time, and about 100 bytes are held for each pair.

    Args:
        io: of the task.
        shards: of the pool.
        groups: parts of ``recall_pairs``.
        edges: parts of ``edges``.
        reference_edges: parts of ``reference_edges``.
        num_pictures: of the sample.
        thresholds: of ``pool``, and of ``benchmark`` where there is one.
    """
    pairs = pa.concat_tables([io.read(io.part("recall_pairs", group)) for group in groups])
    num_all = sum(num_kept(io, shard) for shard in shards)
    tables = {"pool": ("edges", edges, ("a", "b")), "benchmark": ("reference_edges", reference_edges, _REFERENCE)}
    rows = []
    for kind, threshold in thresholds.items():
        table, parts, names = tables[kind]
        mine = pairs["is_reference"].to_numpy() == (kind == "benchmark")
        left, right = pairs["image_id"].to_numpy()[mine], pairs["other_id"].to_numpy()[mine]
        if kind == "pool":  # two sampled pictures meet twice
            left, right = np.minimum(left, right), np.maximum(left, right)
        there = Pairs(left, right)
        for index in parts:
            stored = io.read(io.part(table, index), list(names))
            there.meet(*(stored[name].to_numpy() for name in names))
        recall = there.num_met / there.num if there.num else None
        is_whole = num_all <= num_pictures
        at_least = recall if is_whole or recall is None else wilson_lower(there.num_met, there.num)
        rows.append(
            {
                "kind": kind,
                "threshold": threshold,
                "num_pictures": num_all,
                "num_sampled": min(num_all, num_pictures),
                "num_edges": there.num,
                "num_found": there.num_met,
                "recall": recall,
                "recall_at_least": at_least,
            }
        )
    return pa.Table.from_pylist(rows, schema=TABLES["edge_recall"].schema)


# --- stage ----------------------------------------------------------------------------------------------------------


class EdgeRecall(GlobalStage):
    """What an exact search of ``edges.recall_sample`` pictures finds, and how much of it is in the stored edges.

    Three tasks in a small pool: a draw and a search for each group of shards, and one that looks the pairs up. A vector
    is read once and multiplied with the sample: 2e12 products for a sample of 1,000 and a million pictures of 1,024
    numbers. Nothing at all is done where the sample is 0.
    """

    name = "edge_recall"
    section = "edges"
    reads: ClassVar[tuple[str, ...]] = ("near", "safety", "descriptors", "edges", "reference_edges")
    writes: ClassVar[tuple[str, ...]] = ("edge_recall", "recall_pairs", "recall_sample")
    config: EdgesConfig

    def __init__(self, config: EdgesConfig, duplicate_threshold: float, leakage_threshold: float) -> None:
        super().__init__(config)
        self.thresholds = (duplicate_threshold, leakage_threshold)

    def fingerprint_values(self) -> dict[str, Any]:
        """The sample and the thresholds; how edges are searched is told by their content."""
        return {
            "recall_sample": self.config.recall_sample,
            "fit_seed": self.config.fit_seed,
            "thresholds": list(self.thresholds),
        }

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Draw, search exactly, look up; the sampled vectors go when they were searched for."""
        if self.config.recall_sample == 0:
            map([])
            return
        draw, search = self._tasks(context)
        is_done = all(context.is_done(self, task) for task in search)
        if not is_done:
            map(draw)
        map(search)
        # Also what a run that was killed left there: it holds vectors, which a takedown removes.
        context.clear(("recall_sample",))
        pool, benchmarks = context.shards("pool"), context.shards("benchmark")
        edges = {table: context.parts(table) for table in ("edges", "reference_edges")}
        pairs = [task.writes for task in search]
        args: dict[str, Any] = {"shards": pool, "groups": [part.index for part in pairs]}
        args |= {table: [part.index for part in parts] for table, parts in edges.items()}
        thresholds = dict(zip(("pool", "benchmark") if benchmarks else ("pool",), self.thresholds, strict=False))
        map(
            [
                Task(
                    function=recall_of_edges,
                    args={**args, "num_pictures": self.config.recall_sample, "thresholds": thresholds},
                    reads=(*pairs, *edges["edges"], *edges["reference_edges"], *_parts(context, ("near",), pool)),
                    writes=context.part("edge_recall", 0),
                )
            ]
        )

    def _tasks(self, context: Context) -> tuple[list[Task], list[Task]]:
        num_pictures = self.config.recall_sample
        pool, benchmarks = context.shards("pool"), set(context.shards("benchmark"))
        draw = [
            Task(
                function=sample_of_group,
                args={"shards": shards, "num_pictures": num_pictures, "seed": self.config.fit_seed},
                reads=_parts(context, ("near", "descriptors"), shards),
                writes=context.part("recall_sample", shards[0]),
            )
            for shards in groups_of(pool)
        ]
        search = []
        of_pool = _parts(context, ("near", "descriptors"), pool)  # the sample goes, so a task names where it came from
        for shards in groups_of(context.shards("pool", "benchmark")):
            references = [shard for shard in shards if shard in benchmarks]
            search.append(
                Task(
                    function=exact_pairs,
                    args={
                        "shards": [shard for shard in shards if shard not in benchmarks],
                        "references": references,
                        "groups": [task.writes.index for task in draw],
                        "num_pictures": num_pictures,
                        "thresholds": list(self.thresholds),
                    },
                    reads=(*of_pool, *_parts(context, ("safety", "descriptors"), references)),
                    writes=context.part("recall_pairs", shards[0]),
                )
            )
        return draw, search

    def told(self, context: Context) -> Iterator[str]:
        """The recall of this run, and what to raise where it is low."""
        if self.config.recall_sample == 0:
            return
        for row in context.read(context.part("edge_recall", 0)).to_pylist():
            key = "probes" if row["kind"] == "pool" else "reference_probes"
            probes = getattr(self.config, key)
            is_low = row["recall"] is not None and row["recall"] < WANTED and probes < self.config.num_lists
            yield f"edges: {told_of_recall(row)}" + (f"; raise edges.{key} above {probes:,}" if is_low else "")


def _parts(context: Context, tables: Sequence[str], shards: Sequence[int]) -> tuple[Part, ...]:
    return tuple(context.part(table, shard) for table in tables for shard in shards)
