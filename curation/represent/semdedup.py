"""Semantic deduplication (SemDeDup, Abbas et al. 2023, arXiv:2303.09540): of what means the same, one picture stays.

It works on embeddings within clusters, so it stands here and not with the copies in ``curation/dedup``. The rule itself
is in ``curation/represent/alike.py``.

Vectors lie by shard and are wanted by cluster. They are sorted once: ``semantic_vectors`` holds the pictures of some
shards by cluster, a task of ``semantic_matches`` reads its range of clusters out of all parts, and
``semantic_duplicates`` brings what was found back to the order of pictures. So every vector is written once and read
twice, however many pictures there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.near import rows_at
from curation.represent.alike import Before, WhichToKeep, in_order, ranked
from curation.retrieve.retrieve import drawn, first_bytes, groups_of, vectors_at
from curation.schema import TABLES, Part, id_range, part_of_group
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, verdict_table
from training.config import Config

_PIECE_ROWS = 1 << 17  # pictures of a part of semantic_vectors: 335 MB where a vector has 1,280 numbers, ...
_MAX_PIECES = 1024  # ... and more in pools of more than 134 million, so that ranges stay long enough to be read


class SemdedupConfig(Config):
    """Which pictures of a cluster are too like one another, and which of them stay."""

    eps: float | None = Field(
        None, gt=0, le=2, description="a picture goes whose cosine to one before it is above 1 - eps; null: none goes"
    )
    which_to_keep: WhichToKeep = Field(
        "hard", description="first in each cluster: hard: far from the centroid; easy: near to it; random: a draw"
    )
    seed: int = Field(0, description="of the draw")


# --- by cluster -----------------------------------------------------------------------------------------------------


def vectors_by_cluster(io: TaskIO, *, shards: list[int], seed: int | None) -> pa.Table:
    """One part of ``semantic_vectors``; ``seed`` is that of the draw, None where none is made."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for shard in shards:
        kept = io.kept("leakage", shard)
        table, ids = io.read(io.part("clusters", shard)), kept["image_id"].to_numpy()
        at = rows_at(table["image_id"].to_numpy(), ids)
        sha256 = kept["sha256"].to_pylist()
        order = first_bytes(sha256) if seed is None else drawn(seed, sha256)
        found = (table["cluster"].to_numpy()[at], ids, order, table["similarity"].to_numpy()[at])
        for column, values in zip(columns, found, strict=True):
            column.append(values)
    cluster, ids, order, similarity = (np.concatenate(column) for column in columns)
    by_cluster = np.argsort(cluster, kind="stable")
    vectors = _sorted_vectors(io, dict(zip(shards, columns[1], strict=True)), by_cluster)
    ends = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * np.int32(vectors.shape[1]))
    arrays = [pa.array(column[by_cluster]) for column in (cluster, ids, order, similarity)]
    lists = pa.ListArray.from_arrays(ends, pa.array(vectors.ravel()))
    return pa.table([*arrays, lists], schema=TABLES["semantic_vectors"].schema)


def _sorted_vectors(io: TaskIO, ids: Mapping[int, np.ndarray], order: np.ndarray) -> np.ndarray:
    """Embeddings of pictures by shard, in an order, float16 [N, D]; held once, beside those of one shard."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    vectors, start = np.zeros((len(order), 0), np.float16), 0
    for shard, mine in ids.items():
        stored = vectors_at(io, shard, mine)
        if not vectors.shape[1]:
            vectors = np.empty((len(order), stored.shape[1]), np.float16)
        vectors[place[start : start + len(mine)]] = stored
        start += len(mine)
    return vectors


class _Slice(NamedTuple):
    """Rows of one piece, counted within the range of clusters that is read."""

    piece: int
    start: int
    end: int


class _Range:
    """Pictures of a range of clusters without their vectors, each cluster in its order; vectors are read as asked."""

    def __init__(self, io: TaskIO, pieces: Sequence[int], clusters: tuple[int, int], which: WhichToKeep) -> None:
        self._io, self._pieces = io, pieces
        names = ["cluster", "image_id", "order", "similarity"]
        within = ("cluster", *clusters)
        tables = [io.read(io.part("semantic_vectors", piece), names, within=within) for piece in pieces]
        self._cluster = [table["cluster"].to_numpy() for table in tables]
        whole = pa.concat_tables(tables)
        cluster, ids, tie, similarity = (whole[name].to_numpy() for name in names)
        order = in_order(which, cluster=cluster, similarity=similarity, tie=tie, image_id=ids)
        self.image_id, self.cluster = ids[order], cluster[order]  # by rank
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        self._rank = np.split(rank, np.cumsum([len(one) for one in self._cluster])[:-1])  # of the rows of each piece

    def batches(self, most: int) -> Iterator[tuple[int, int]]:
        """First cluster, and the one behind the last, of clusters that hold at most ``most`` pictures, or are one."""
        numbers, sizes = np.unique(self.cluster, return_counts=True)
        first, held = 0, 0
        for at, size in enumerate(sizes.tolist()):
            if at > first and held + size > most:
                yield int(numbers[first]), int(numbers[at - 1]) + 1
                first, held = at, 0
            held += size
        if held:
            yield int(numbers[first]), int(numbers[-1]) + 1

    def blocks(self, first: int, end: int, most: int) -> list[list[_Slice]]:
        """Rows of some clusters in blocks of at most ``most``."""
        blocks: list[list[_Slice]] = [[]]
        held = 0
        for piece, cluster in zip(self._pieces, self._cluster, strict=True):
            num, start = int(np.diff(np.searchsorted(cluster, [first, end]))[0]), 0
            while start < num:
                if held == most:
                    blocks.append([])
                    held = 0
                taken = min(num - start, most - held)
                blocks[-1].append(_Slice(piece, start, start + taken))
                start, held = start + taken, held + taken
        return blocks

    def read(self, first: int, end: int, block: Sequence[_Slice]) -> tuple[np.ndarray, np.ndarray]:
        """Ranks of a block, ascending, int64 [N], and vectors, float16 [N, D]."""
        ranks, vectors = [], []
        for piece, start, stop in block:
            at = self._pieces.index(piece)
            before = int(np.searchsorted(self._cluster[at], first))
            ranks.append(self._rank[at][before + start : before + stop])
            part = self._io.part("semantic_vectors", piece)
            column = self._io.read(part, ["vector"], within=("cluster", first, end))["vector"].combine_chunks()
            stored = np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float16)
            vectors.append(stored.reshape(len(column), -1)[start:stop])
        rank = np.concatenate(ranks)
        order = np.argsort(rank)
        return rank[order], np.concatenate(vectors)[order]

    def dim(self) -> int:
        """Numbers of a vector; 0 where there is no picture."""
        for piece, cluster in zip(self._pieces, self._cluster, strict=True):
            if len(cluster):
                within = ("cluster", int(cluster[0]), int(cluster[0]) + 1)
                return len(self._io.read(self._io.part("semantic_vectors", piece), ["vector"], within=within)[0][0])
        return 0


def matches_of_range(
    io: TaskIO, *, pieces: list[int], clusters: list[int], eps: float, which_to_keep: WhichToKeep
) -> pa.Table:
    """One part of ``semantic_matches``.

    Args:
        io: of the task.
        pieces: parts of ``semantic_vectors``.
        clusters: first of the range, and the one behind its last.
        eps: a picture goes whose cosine to one before it is above 1 - eps.
        which_to_keep: order of a cluster.
    """
    rows = _Range(io, pieces, (clusters[0], clusters[1]), which_to_keep)
    before = Before(len(rows.image_id), eps)
    # A block is held as read, in fp16, as sorted, in fp16, and one of its clusters widened; there may be two blocks.
    most = max(1, io.memory_bytes // (20 * max(1, rows.dim())))
    for first, end in rows.batches(most):
        blocks = rows.blocks(first, end, most)
        for left in blocks:
            mine = rows.read(first, end, left)
            for right in blocks:
                others = mine if right is left else rows.read(first, end, right)
                _find(before, rows.cluster, mine, others)
    there = np.flatnonzero(before.rank >= 0)
    there = there[np.argsort(rows.image_id[there])]
    nearest, kept = before.rank[there], before.kept()[there]
    columns = [rows.image_id[there], rows.image_id[nearest], before.similarity[there], rows.image_id[kept]]
    return pa.table([pa.array(column) for column in columns], schema=TABLES["semantic_matches"].schema)


def _find(
    before: Before,
    cluster: np.ndarray,
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
) -> None:
    """Cluster by cluster of two blocks, each of ranks and vectors; several clusters are one block."""
    of_left, of_right = cluster[left[0]], cluster[right[0]]
    for one in np.unique(of_left).tolist():
        a, b = (slice(*np.searchsorted(of, [one, one + 1])) for of in (of_left, of_right))
        mine = ranked(left[0][a], left[1][a])
        before.find(mine, mine if right is left else ranked(right[0][b], right[1][b]))


def matches_of_pictures(io: TaskIO, *, shards: list[int], matches: list[int]) -> pa.Table:
    """One part of ``semantic_duplicates``: the matches of a group of shards, read by ranges, 32 bytes each."""
    within = ("image_id", *id_range(shards[0], shards[-1]))
    found = [io.read(io.part("semantic_matches", index), within=within) for index in matches]
    return pa.concat_tables([TABLES["semantic_duplicates"].schema.empty_table(), *found]).sort_by("image_id")


# --- stages ---------------------------------------------------------------------------------------------------------


class SemanticDuplicates(GlobalStage):
    """Pictures that are too like another of their cluster; nothing at all where ``semdedup.eps`` is null.

    A task that sorts holds its pictures' vectors once, one that compares as many as ``execution.task_memory_mb`` takes:
    a cluster that is larger is compared block by block.
    """

    name = "semantic_duplicates"
    section = "semdedup"
    reads = ("leakage", "embeddings", "clusters", "fit_kmeans")
    writes: ClassVar[tuple[str, ...]] = ("semantic_duplicates", "semantic_matches", "semantic_vectors")
    config: SemdedupConfig

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Sort by cluster, compare, sort by picture; the vectors go when what they were compared for stands."""
        if self.config.eps is None:
            map([])
            return
        sort, compare = self._tasks(context)
        is_done = all(context.is_done(self, task) for task in compare)
        if not is_done:
            map(sort)
        map(compare)
        if not is_done:
            context.discard(task.writes for task in sort)
        reads = tuple(task.writes for task in compare)
        matches = [part.index for part in reads]
        map(
            [
                Task(
                    function=matches_of_pictures,
                    args={"shards": shards, "matches": matches},
                    reads=reads,
                    writes=context.part("semantic_duplicates", shards[0]),
                )
                for shards in groups_of(context.shards("pool"))
            ]
        )

    def _tasks(self, context: Context) -> tuple[list[Task], list[Task]]:
        pieces = _pieces(context)
        seed = self.config.seed if self.config.which_to_keep == "random" else None
        sort = [
            Task(
                function=vectors_by_cluster,
                args={"shards": shards, "seed": seed},
                reads=_reads(context, shards),
                writes=context.part("semantic_vectors", number),
            )
            for number, shards in enumerate(pieces)
        ]
        num = context.num_rows(context.part("fit_kmeans", 0))
        num_ranges = min(num, len(pieces))
        args: dict[str, Any] = {"pieces": list(range(len(pieces))), "eps": self.config.eps}
        args |= {"which_to_keep": self.config.which_to_keep}
        # The sorted vectors go, so a task names what they were made from.
        reads = _reads(context, context.shards("pool"))
        compare = [
            Task(
                function=matches_of_range,
                args={**args, "clusters": [num * n // num_ranges, num * (n + 1) // num_ranges]},
                reads=reads,
                writes=context.part("semantic_matches", n),
            )
            for n in range(num_ranges)
        ]
        return sort, compare


def _pieces(context: Context) -> list[list[int]]:
    """Shards of the pool in pieces; no byte depends on them."""
    counts = {shard: context.num_rows(context.part("clusters", shard)) for shard in context.shards("pool")}
    most = max(_PIECE_ROWS, -(-sum(counts.values()) // _MAX_PIECES))
    pieces: list[list[int]] = []
    held = 0
    for shard, num in counts.items():
        if not pieces or held + num > most:
            pieces.append([])
            held = 0
        pieces[-1].append(shard)
        held += num
    return pieces


def _reads(context: Context, shards: Sequence[int]) -> tuple[Part, ...]:
    return tuple(context.part(table, shard) for table in ("leakage", "clusters", "embeddings") for shard in shards)


class Semantic(ShardStage):
    """Drops pictures that mean what another one of their cluster means: reason semantic_duplicate."""

    name = "semantic"
    section = "semdedup"
    kind = "verdict"
    after = "leakage"
    reads: ClassVar[tuple[str, ...]] = ("leakage", "semantic_duplicates")
    writes = ("semantic",)
    config: SemdedupConfig

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each picture that leakage kept."""
        ids = io.rows["image_id"].to_numpy()
        num = len(ids)
        reason, score, threshold = np.full(num, None, object), np.full(num, np.nan, np.float32), None
        nearest, kept = np.full(num, -1, np.int64), ids.copy()
        if self.config.eps is not None:
            part = part_of_group(io.parts("semantic_duplicates"), shard)
            table = io.read(part, within=("image_id", *id_range(shard, shard)))
            at = rows_at(ids, table["image_id"].to_numpy())
            reason[at], score[at] = "semantic_duplicate", table["similarity"].to_numpy()
            nearest[at], kept[at] = table["nearest_id"].to_numpy(), table["representative_id"].to_numpy()
            threshold = np.where(np.isnan(score), np.nan, np.float32(1 - self.config.eps)).astype(np.float32)
        verdict = verdict_table(
            "semantic",
            io.rows,
            reason=list(reason),
            score=score,
            threshold=threshold,
            nearest_id=pa.array(nearest, mask=nearest < 0),
            representative_id=kept,
        )
        return {"semantic": verdict}
