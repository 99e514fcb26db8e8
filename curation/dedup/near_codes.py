"""Near-duplicates: each hash, written for every key range that has to compare it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from curation.dedup.near import NearConfig, blocked_distance, parse_hashes, rows_at
from curation.dedup.pcahash import hash_table
from curation.dedup.pigeonhole import BLOCKS_IN_KEY, HASH_BITS, keys_of, range_of
from curation.schema import TABLES, groups_by_size
from curation.stage import Context, GlobalStage, Map, Task, TaskIO

_ROWS_IN_GROUP = 1 << 23  # of `near_codes`, at most: 440 MB while they are sorted

# --- pure functions -------------------------------------------------------------------------------------------------


def rows_by_range(codes: np.ndarray, *, radius_bits: int, key_ranges: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows each range of keys needs: range (int32) and row (int64), sorted by both, each pair of them once.

    Of several rows with one code only the first goes into all its ranges, and the others into that of the first key,
    where they are chained to it.

    Args:
        codes: uint64 [N].
        radius_bits: largest distance of a pair.
        key_ranges: number of ranges.
    """
    rows = np.arange(len(codes), dtype=np.uint64)
    order = np.argsort(codes, kind="stable")
    first = np.ones(len(codes), bool)
    first[order[1:]] = codes[order[1:]] != codes[order[:-1]]
    found = []
    for index, key in enumerate(keys_of(HASH_BITS, radius_bits, BLOCKS_IN_KEY)):
        mine = rows[first] if index else rows
        into = range_of(codes[mine] & np.uint64(key.mask), key_ranges).astype(np.uint64)
        found.append((into << np.uint64(32)) | mine)
    pairs = np.concatenate(found)
    pairs.sort()
    once = np.ones(len(pairs), bool)
    once[1:] = pairs[1:] != pairs[:-1]
    pairs = pairs[once]
    return (pairs >> np.uint64(32)).astype(np.int32), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


# --- stage ----------------------------------------------------------------------------------------------------------


def codes_of(
    io: TaskIO, shard: int, hash_name: str = "phash", blocked: np.ndarray | None = None, radius_bits: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint64) and ids of what safety kept in a shard and has the hash, in id order.

    Args:
        io: of the task.
        shard: of the pool.
        hash_name: phash, dhash or pca_hash.
        blocked: pHashes; pictures within the radius of one are left out.
        radius_bits: for these.
    """
    kept = io.kept("safety", shard)["image_id"].to_numpy()
    codes, known = _hashes_of(io, shard, hash_name, kept)
    if blocked is not None and len(blocked):
        phash, has_phash = _hashes_of(io, shard, "phash", kept)
        known &= ~(has_phash & (blocked_distance(phash, blocked) <= radius_bits))
    return codes[known], kept[known]


def _hashes_of(io: TaskIO, shard: int, hash_name: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash (uint64) of pictures of a shard, and whether they have one (bool)."""
    table = hash_table(io, shard, hash_name)
    column = table[hash_name].take(pa.array(rows_at(table["image_id"].to_numpy(), ids)))
    return column.fill_null(0).to_numpy().astype(np.uint64), column.is_valid().to_numpy().copy()


def codes_by_range(
    io: TaskIO, *, shards: list[int], hash_name: str, radius_bits: int, key_ranges: int, blocked: list[str]
) -> pa.Table:
    """One part of ``near_codes``, of a group of shards. What is blocked is dropped, so it must not stand for a group.

    Memory: 52 bytes a row at most, whatever `execution.task_memory_mb` says: the groups are the same everywhere.
    """
    names = parse_hashes(blocked)
    pieces = [codes_of(io, shard, hash_name, names, radius_bits) for shard in shards]
    codes, ids = (np.concatenate(column) for column in zip(*pieces, strict=True))
    ranges, rows = rows_by_range(codes, radius_bits=radius_bits, key_ranges=key_ranges)
    return pa.table([ranges, codes[rows], ids[rows]], schema=TABLES["near_codes"].schema)


class NearCodes(GlobalStage):
    """The shuffle: the hash of each picture for every range of keys that has to compare it.

    A row is 20 bytes in memory and 13 as stored. With 15 keys (radius 4) a picture is in 6.9 of 8 ranges, 13.5 of 64,
    15 of 1,000 or more: 87, 170 or 194 bytes of disk a picture, 13 where its code repeats one of the same group.
    """

    name = "near_codes"
    section = "near"
    reads = ("safety", "hashes", "pca_hashes")
    writes = ("near_codes",)
    config: NearConfig

    def fingerprint_values(self) -> dict[str, Any]:
        """All but the cap, which is for ``near_pairs``."""
        return self.config.values_but_the_cap()

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One task a group of shards; an appended shard changes the last group only."""
        config = self.config
        num_keys = len(keys_of(HASH_BITS, config.radius_bits, BLOCKS_IN_KEY))
        most = _ROWS_IN_GROUP // min(num_keys, config.key_ranges)
        sizes = [(shard, context.num_rows(context.part("safety", shard))) for shard in context.shards("pool")]
        args = {
            "hash_name": config.hash,
            "radius_bits": config.radius_bits,
            "key_ranges": config.key_ranges,
            "blocked": list(config.blocked_hashes),
        }
        map(
            [
                Task(
                    function=codes_by_range,
                    args={"shards": shards, **args},
                    reads=tuple(context.part(table, shard) for table in self.reads for shard in shards),
                    writes=context.part("near_codes", shards[0]),
                )
                for shards in groups_by_size(sizes, most)
            ]
        )
