"""Ids of pictures and shards, and parts of tables."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ROWS_PER_SHARD_LIMIT = 1_000_000
SHARDS_PER_SOURCE_LIMIT = 1_000_000

Root = Literal["pool", "run"]


@dataclass(frozen=True, order=True)
class Part:
    """One parquet file of a table: ``<root>/<folder>/part-<index>.parquet``."""

    root: Root
    folder: str
    index: int

    @property
    def path(self) -> str:
        """Path of the part inside its root."""
        return f"{self.folder}/part-{self.index:09d}.parquet"


def image_ids(shard: int, num_rows: int) -> np.ndarray:
    """Ids of rows 0 to ``num_rows - 1`` of a shard, int64 [num_rows]."""
    return shard * ROWS_PER_SHARD_LIMIT + np.arange(num_rows, dtype=np.int64)


def shard_of(image_id: int) -> int:
    """Shard that holds an image."""
    return int(image_id) // ROWS_PER_SHARD_LIMIT


def id_range(first: int, last: int) -> tuple[int, int]:
    """First id of shard ``first``, and the one behind the ids of shard ``last``."""
    return first * ROWS_PER_SHARD_LIMIT, (last + 1) * ROWS_PER_SHARD_LIMIT


def part_of_group(parts: Sequence[Part], shard: int) -> Part:
    """Of the parts of a table with one part a group, the one whose group holds a shard.

    Args:
        parts: of the table, in order of index.
        shard: of one of the roles of the table.
    """
    return parts[bisect_right([part.index for part in parts], shard) - 1]


def groups_by_size(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[list[int]]:
    """Consecutive shards, given with their rows, that hold at most ``most`` rows together, or are one.

    An appended shard changes the last group only.
    """
    group: list[int] = []
    held = 0
    for shard, num_rows in sizes:
        if group and held + num_rows > most:
            yield group
            group, held = [], 0
        group.append(shard)
        held += num_rows
    if group:
        yield group


def source_of_shard(shard: int) -> int:
    """``source_id`` of the source that a shard belongs to."""
    return int(shard) // SHARDS_PER_SOURCE_LIMIT


def first_shard(source_id: int) -> int:
    """Number of the first shard of a source."""
    return source_id * SHARDS_PER_SOURCE_LIMIT
