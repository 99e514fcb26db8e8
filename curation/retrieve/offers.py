"""Offers: the rows of ``neighbours`` by picture, in the order that decides who takes one.

``neighbours`` stands by query set. A task of this stage gathers what names the pictures of one group of shards, so that
``selection`` reads its own rows only. Parts of ``neighbours`` are sorted by image_id: of each a task reads the row
groups of its range, so that all tasks together read each row about twice: once to count, once to sort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.retrieve.retrieve import SetsStage, groups_of
from curation.schema import ROWS_PER_SHARD_LIMIT, TABLES, id_range
from curation.stage import Context, Map, Task, TaskIO

_BYTES_OF_ROW = 200  # of a row while its block is sorted: as read, the keys of the sort, and as written


def in_order_of_choice(rows: pa.Table, order: Sequence[str]) -> pa.Table:
    """Rows sorted by image_id, and of each picture the row that takes it first.

    That is: a row that no cap cut (rank -1) before those that one did, then the set that stands first in the recipe;
    there the least rank, the highest similarity, the least query.

    Args:
        rows: of ``neighbours`` or ``offers``.
        order: names of the sets, as in the recipe.
    """
    place = pc.index_in(rows["query_set"], value_set=pa.array(order, pa.string())).to_numpy()
    rank, similarity = rows["rank"].to_numpy(), rows["similarity"].to_numpy()
    query = pc.fill_null(rows["query_id"], 0).to_numpy()
    return rows.take(pa.array(np.lexsort((query, -similarity, rank, place, rank < 0, rows["image_id"].to_numpy()))))


def offers(io: TaskIO, *, pool_shards: list[int], neighbours: list[int], order: list[str]) -> pa.Table:
    """One part: what is offered of the pictures of a group of shards.

    Args:
        io: of the task.
        pool_shards: of the group, ascending.
        neighbours: parts of that table.
        order: names of the sets, as in the recipe.
    """
    schema = TABLES["offers"].schema
    counts = np.zeros(len(pool_shards), np.int64)
    for index in neighbours:
        ids = io.read(
            io.part("neighbours", index),
            ["image_id"],
            within=("image_id", *id_range(pool_shards[0], pool_shards[-1])),
        )["image_id"].to_numpy()
        counts += np.bincount(np.searchsorted(pool_shards, ids // ROWS_PER_SHARD_LIMIT), minlength=len(counts))
    blocks = []
    for first, last in _blocks(counts, io.memory_bytes // _BYTES_OF_ROW):
        within = ("image_id", *id_range(pool_shards[first], pool_shards[last]))
        parts = [io.read(io.part("neighbours", index), schema.names, within=within) for index in neighbours]
        blocks.append(in_order_of_choice(pa.concat_tables(parts), order))
    return pa.concat_tables([schema.empty_table(), *blocks])


def _blocks(counts: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """First and last of consecutive shards that hold at most ``most`` rows together, or are one."""
    first, held = 0, 0
    for at, num in enumerate(counts.tolist()):
        if at > first and held + num > most:
            yield first, at - 1
            first, held = at, 0
        held += num
    if held:
        yield first, len(counts) - 1


class Offers(SetsStage):
    """One task for each group of shards of the pool."""

    name = "offers"
    reads = ("neighbours",)
    writes = ("offers",)

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Plan the tasks of all groups."""
        reads = tuple(context.parts("neighbours"))
        args = {"neighbours": [part.index for part in reads], "order": list(self.queries)}
        map(
            [
                Task(
                    function=offers,
                    args={"pool_shards": shards, **args},
                    reads=reads,
                    writes=context.part("offers", shards[0]),
                )
                for shards in groups_of(context.shards("pool"))
            ]
        )
