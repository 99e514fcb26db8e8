"""Near-duplicates by perceptual hash: every pair of pictures whose pHashes differ in few bits.

Pigeonhole: the 64 bits are cut into ``radius + 2`` blocks. Two codes within the radius differ in at most ``radius``
blocks, so they agree on at least two; every choice of two blocks is a key, codes are sorted by it and compared inside
a bucket. The result is exact. Equal codes are collapsed first and joined as a chain, so that a thousand copies of one
logo are 999 pairs and one code.

Work is cut by key: task ``p`` of ``key_ranges`` takes the keys whose mixed value is ``p`` modulo ``key_ranges``, and so
whole buckets. A pair belongs to the first key on which its codes agree, so it is written once over all tasks.
"""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from curation.schema import TABLES
from curation.stage import Context, GlobalStage, Map, Task, TaskIO
from training.config import Config

HASH_BITS = 64
BLOCKS_IN_KEY = 2


class NearConfig(Config):
    """What counts as a near-duplicate."""

    # pHash has 32 bits set, so distances are even. Among 22,000 distinct photographs (2.4e8 pairs) 0 pairs lie within 4
    # bits, 4 within 6, 23 within 8: with more than 20,000 pictures 4 is the last radius that merges nothing.
    radius_bits: int = Field(4, ge=0, le=16)
    hash: Literal["phash", "dhash", "pca_hash"] = Field(
        "phash", description="column of `hashes` that is compared; blocked_hashes are pHashes whatever it is"
    )
    key_ranges: int = Field(
        8, ge=1, le=4096
    )  # parts of `near_pairs`; a task holds about 1/key_ranges of the codes a key
    blocked_hashes: tuple[str, ...] = ()  # pHashes as 16 hex digits; pictures within the radius of one are dropped

    @field_validator("blocked_hashes")
    @classmethod
    def _hex(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not re.fullmatch(r"[0-9a-fA-F]{16}", text):
                raise ValueError(
                    f"blocked_hashes: got {text!r}, allowed are pHashes of 16 hex digits, as imagehash prints"
                )
        return tuple(sorted({text.lower() for text in value}))


# --- pure functions -------------------------------------------------------------------------------------------------


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of differing bits of uint64 codes, int16, broadcast over both shapes."""
    return np.asarray(np.bitwise_count(np.bitwise_xor(a, b)), dtype=np.int16)


def key_masks(radius_bits: int) -> list[int]:
    """Masks of the keys: two codes within the radius agree on every bit of at least one of them."""
    num_blocks = radius_bits + BLOCKS_IN_KEY
    edges = [round(i * HASH_BITS / num_blocks) for i in range(num_blocks + 1)]
    blocks = [(1 << edges[i + 1]) - (1 << edges[i]) for i in range(num_blocks)]
    return [sum(chosen) for chosen in combinations(blocks, BLOCKS_IN_KEY)]


def range_of(keys: np.ndarray, key_ranges: int) -> np.ndarray:
    """Range that a masked code belongs to, int64; mixed by the finaliser of splitmix64, so that ranges are even."""
    mixed = keys.astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(key_ranges)).astype(np.int64)


def blocked_distance(codes: np.ndarray, blocked: np.ndarray) -> np.ndarray:
    """Distance of each code to the closest blocked one, int16 [N]; 64 bits and more where none is blocked."""
    best = np.full(len(codes), HASH_BITS + 1, np.int16)
    for code in blocked:
        best = np.minimum(best, hamming(codes, code))
    return best


def equal_codes(codes: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Collapse equal codes: distinct codes, the least id of each, and the chain of pairs that joins equal ones.

    Args:
        codes: uint64 [N].
        ids: int64 [N].

    Returns:
        codes [M], least ids [M], then a and b of the chain with a < b, [N - M] each.
    """
    order = np.lexsort((ids, codes))
    codes, ids = codes[order], ids[order]
    first = np.ones(len(codes), bool)
    first[1:] = codes[1:] != codes[:-1]
    again = np.flatnonzero(~first)
    return codes[first], ids[first], ids[again - 1], ids[again]


def bucket_pairs(codes: np.ndarray, key_index: int, radius_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of distinct codes within the radius whose first common key is ``key_index``.

    Each step compares all codes with the one that lies ``step`` places further in the same bucket: memory stays linear
    in the number of codes however full a bucket is, and the result stays exact.

    Args:
        codes: uint64 [N], distinct.
        key_index: position in ``key_masks(radius_bits)``.
        radius_bits: largest distance of a pair.

    Returns:
        Positions i and j in ``codes`` of each pair, int64.
    """
    masks = [np.uint64(mask) for mask in key_masks(radius_bits)]
    keys = codes & masks[key_index]
    order = np.argsort(keys, kind="stable")
    keys, codes = keys[order], codes[order]
    left, right = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    alive = np.arange(len(codes))
    step = 0
    while len(alive):
        step += 1
        alive = alive[alive + step < len(codes)]
        alive = alive[keys[alive] == keys[alive + step]]
        other = codes[alive] ^ codes[alive + step]
        hit = np.bitwise_count(other) <= radius_bits
        for mask in masks[:key_index]:
            hit &= (other & mask) != 0
        left.append(order[alive[hit]])
        right.append(order[alive[hit] + step])
    return np.concatenate(left), np.concatenate(right)


def near_pairs(
    codes: np.ndarray, ids: np.ndarray, *, radius_bits: int, key_ranges: int = 1, key_range: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs within the radius that belong to one range of keys; over all ranges each pair comes once.

    Of several pictures with one code the pair of codes is given for the least id only; the chain of zero distances
    joins the others to it.

    Args:
        codes: uint64 [N].
        ids: int64 [N], distinct.
        radius_bits: largest distance of a pair.
        key_ranges: number of ranges.
        key_range: the one to answer for.

    Returns:
        a, b (int64, a < b) and distance_bits (int16), sorted by (a, b).
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for index, mask in enumerate(key_masks(radius_bits)):
        mine = range_of(codes & np.uint64(mask), key_ranges) == key_range
        distinct, least, chain_a, chain_b = equal_codes(codes[mine], ids[mine])
        i, j = bucket_pairs(distinct, index, radius_bits)
        parts.append((least[i], least[j], hamming(distinct[i], distinct[j])))
        if index == 0:  # equal codes agree on every key, the first one included
            parts.append((chain_a, chain_b, np.zeros(len(chain_a), np.int16)))
    a, b, distance = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    a, b = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((b, a))
    return a[order], b[order], distance[order]


def parse_hashes(blocked: list[str] | tuple[str, ...]) -> np.ndarray:
    """Hex digits to codes, uint64 [N]."""
    return np.array([int(text, 16) for text in blocked], np.uint64)


# --- stages ---------------------------------------------------------------------------------------------------------


def rows_at(table_ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions of ``wanted`` in ``table_ids``, both ascending.

    Raises:
        LookupError: an id is missing, so the table does not cover the rows it is read for.
    """
    place = np.searchsorted(table_ids, wanted)
    if len(wanted) and (place[-1] >= len(table_ids) or not np.array_equal(table_ids[place], wanted)):
        raise LookupError(
            f"{len(np.setdiff1d(wanted, table_ids))} of {len(wanted)} pictures have no row in the table read"
        )
    return place


def codes_of(io: TaskIO, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (pHash, uint64) and ids of what safety kept in a shard, in id order."""
    kept = io.kept("safety", shard)["image_id"].to_numpy()
    table = io.read(io.part("hashes", shard), ["image_id", "phash"])
    place = rows_at(table["image_id"].to_numpy(), kept)
    codes = table["phash"].take(pa.array(place)).combine_chunks()
    known = ~codes.is_null().to_numpy(zero_copy_only=False)
    return codes.fill_null(0).to_numpy().astype(np.uint64)[known], kept[known]


def near_pairs_of_range(
    io: TaskIO, *, shards: list[int], key_range: int, key_ranges: int, radius_bits: int, blocked: list[str]
) -> pa.Table:
    """One part of ``near_pairs``: reads the hashes one shard at a time and keeps the codes that fall into its range."""
    masks = [np.uint64(mask) for mask in key_masks(radius_bits)]
    all_codes, all_ids = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for shard in shards:
        codes, ids = codes_of(io, shard)
        keep = np.zeros(len(codes), bool)
        for mask in masks:
            keep |= range_of(codes & mask, key_ranges) == key_range
        # What is blocked is dropped for that reason, so it must not stand for a group.
        keep &= blocked_distance(codes, parse_hashes(blocked)) > radius_bits
        all_codes.append(codes[keep])
        all_ids.append(ids[keep])
    a, b, distance = near_pairs(
        np.concatenate(all_codes),
        np.concatenate(all_ids),
        radius_bits=radius_bits,
        key_ranges=key_ranges,
        key_range=key_range,
    )
    return pa.table([a, b, distance], schema=TABLES["near_pairs"].schema)


class NearPairs(GlobalStage):
    """All pairs of pool pictures whose pHashes lie within the radius."""

    name = "near_pairs"
    section = "near"
    reads = ("safety", "hashes")
    writes = ("near_pairs",)
    config: NearConfig

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One task a key range."""
        shards = context.shards("pool")
        reads = tuple(context.part(table, shard) for table in ("safety", "hashes") for shard in shards)
        args: dict[str, Any] = {
            "shards": shards,
            "key_ranges": self.config.key_ranges,
            "radius_bits": self.config.radius_bits,
            "blocked": list(self.config.blocked_hashes),
        }
        map(
            [
                Task(
                    function=near_pairs_of_range,
                    args={**args, "key_range": key_range},
                    reads=reads,
                    writes=context.part("near_pairs", key_range),
                )
                for key_range in range(self.config.key_ranges)
            ]
        )
