"""Near-duplicates by perceptual hash: every pair of pictures whose hashes differ in few bits.

Work is cut by key (``pigeonhole``): a key and its value fall into one of ``key_ranges`` ranges, so whole buckets do.
``near_codes`` reads each hash once and writes it for every range that one of its keys falls into; a task of
``near_pairs`` then reads the rows of its range out of all parts. A pair belongs to the first key on which its codes
agree, so it is written once over all ranges.

Equal codes are collapsed first and joined as a chain, so that a thousand copies of one logo are 999 pairs and one code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from curation.dedup.pigeonhole import (
    BLOCKS_IN_KEY,
    HASH_BITS,
    KeyReport,
    TooManyPairsError,
    find_pairs,
    keys_of,
    range_of,
)
from curation.schema import TABLES
from curation.stage import Context, GlobalStage, Map, Task, TaskIO
from training.config import Config, ConfigError

_BYTES_OF_CODE = 128  # of a row of `near_codes` while its range is joined, at most
_BYTES_OF_PAIR = 48  # of a pair until it is written


class NearConfig(Config):
    """What counts as a near-duplicate."""

    # pHash has 32 bits set, so distances are even. Among 22,000 distinct photographs (2.4e8 pairs) 0 pairs lie within 4
    # bits, 4 within 6, 23 within 8: with more than 20,000 pictures 4 is the last radius that merges nothing.
    radius_bits: int = Field(4, ge=0, le=16)
    hash: Literal["phash", "dhash", "pca_hash"] = Field(
        "phash", description="column of `hashes` that is compared; blocked_hashes are pHashes whatever it is"
    )
    key_ranges: int = Field(
        8, ge=1, le=4096, description="parts of `near_pairs`: a task holds about 1/key_ranges of the codes a key"
    )
    # From 256 to 2,048 codes the time is the same within 15 %, also where one bucket holds a million codes.
    max_bucket: int = Field(1024, ge=2, description="fuller buckets are cut again by other bits; changes no pair")
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

    def values_but_the_cap(self) -> dict[str, Any]:
        """What decides pairs and groups."""
        return {name: value for name, value in self.fingerprint_values().items() if name != "max_bucket"}


# --- pure functions -------------------------------------------------------------------------------------------------


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of differing bits of uint64 codes, int16, broadcast over both shapes."""
    return np.asarray(np.bitwise_count(np.bitwise_xor(a, b)), dtype=np.int16)


def blocked_distance(codes: np.ndarray, blocked: np.ndarray) -> np.ndarray:
    """Distance of each code to the closest blocked one, int16 [N]; 64 bits and more where none is blocked."""
    best = np.full(len(codes), HASH_BITS + 1, np.int16)
    for code in blocked:
        best = np.minimum(best, hamming(codes, code))
    return best


def parse_hashes(blocked: list[str] | tuple[str, ...]) -> np.ndarray:
    """Hex digits to codes, uint64 [N]."""
    return np.array([int(text, 16) for text in blocked], np.uint64)


def near_pairs(
    codes: np.ndarray, ids: np.ndarray, *, radius_bits: int, max_bucket: int = 1024, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[KeyReport]]:
    """Pairs of pictures within the radius that belong to one range of keys; over all ranges each pair comes once.

    Of several pictures with one code the pair of codes is given for the least id only; the chain of zero distances
    joins the others to it.

    Args:
        codes: uint64 [N].
        ids: int64 [N], distinct.
        radius_bits: largest distance of a pair.
        max_bucket: buckets with more codes are cut again.
        options: ``key_ranges``, ``key_range``, ``keys``, ``most_pairs`` of ``find_pairs``.

    Returns:
        a, b (int64, a < b) and distance_bits (int16), sorted by (a, b); then what was counted of each key.

    Raises:
        TooManyPairsError: more than ``most_pairs`` were found.
    """
    if (ids[1:] < ids[:-1]).any():
        order = np.argsort(ids)
        codes, ids = codes[order], ids[order]
    found = find_pairs(codes, radius_bits=radius_bits, max_bucket=max_bucket, **options)
    low, high = found.pairs >> np.uint64(32), found.pairs & np.uint64(0xFFFFFFFF)
    return ids[low], ids[high], hamming(codes[low], codes[high]), found.keys


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


def pairs_of_range(
    io: TaskIO, *, groups: list[int], key_range: int, key_ranges: int, radius_bits: int, max_bucket: int
) -> tuple[pa.Table, pa.Table]:
    """One part of ``near_pairs``, and one of ``near_report``.

    Half of the task's memory is for codes: where those of the range are more, its keys are gone through in several
    passes, each over the codes that its keys need. The other half is for pairs.

    Raises:
        ConfigError: the pairs of the range do not fit into the task.
    """
    half = io.memory_bytes // 2
    parts = [io.part("near_codes", group) for group in groups]
    within = ("range", key_range, key_range + 1)
    num_rows = sum(io.read(part, ["range"], within=within).num_rows for part in parts)
    keys = keys_of(HASH_BITS, radius_bits, BLOCKS_IN_KEY)
    num_passes = min(len(keys), -(-max(1, num_rows) // (half // _BYTES_OF_CODE)))
    most_pairs = half // _BYTES_OF_PAIR
    pieces: list[list[np.ndarray]] = []
    reports: list[KeyReport] = []
    for chosen in np.array_split(np.arange(len(keys)), num_passes):
        needed = np.array([keys[index].mask for index in chosen], np.uint64) if num_passes > 1 else None
        codes, ids = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for part in parts:
            table = io.read(part, ["code", "image_id"], within=within)
            rows = table["code"].to_numpy(), table["image_id"].to_numpy()
            if needed is not None:
                mine = np.zeros(len(rows[0]), bool)
                for mask in needed:
                    mine |= range_of(rows[0] & mask, key_ranges) == key_range
                rows = rows[0][mine], rows[1][mine]
            codes.append(rows[0])
            ids.append(rows[1])
        try:
            *found, report = near_pairs(
                np.concatenate(codes),
                np.concatenate(ids),
                radius_bits=radius_bits,
                max_bucket=max_bucket,
                key_ranges=key_ranges,
                key_range=key_range,
                keys=chosen.tolist(),
                most_pairs=most_pairs - sum(len(piece[0]) for piece in pieces),
            )
        except TooManyPairsError:
            raise ConfigError(
                f"near.radius_bits: more than {most_pairs:,} pairs within {radius_bits} bits in one of {key_ranges:,} "
                f"key ranges, allowed with execution.task_memory_mb={io.memory_bytes // 10**6:,}; raise "
                "near.key_ranges or execution.task_memory_mb, or lower near.radius_bits"
            ) from None
        pieces.append(found)
        reports += report
    return _pairs_table(pieces), _report_table(reports)


def _pairs_table(pieces: Sequence[Sequence[np.ndarray]]) -> pa.Table:
    a, b, distance = pieces[0]
    if len(pieces) > 1:
        a, b, distance = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
        order = np.lexsort((b, a))
        a, b, distance = a[order], b[order], distance[order]
    return pa.table([a, b, distance], schema=TABLES["near_pairs"].schema)


def _report_table(reports: Sequence[KeyReport]) -> pa.Table:
    schema = TABLES["near_report"].schema
    return pa.table([[getattr(report, name) for report in reports] for name in schema.names], schema=schema)


class NearPairs(GlobalStage):
    """All pairs of pool pictures whose hashes lie within the radius."""

    name = "near_pairs"
    section = "near"
    version = 2
    reads = ("near_codes",)
    writes: ClassVar[tuple[str, ...]] = ("near_pairs", "near_report")
    config: NearConfig

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One task a key range."""
        reads = tuple(context.parts("near_codes"))
        args = {
            "groups": [part.index for part in reads],
            "key_ranges": self.config.key_ranges,
            "radius_bits": self.config.radius_bits,
            "max_bucket": self.config.max_bucket,
        }
        map(
            [
                Task(
                    function=pairs_of_range,
                    args={**args, "key_range": key_range},
                    reads=reads,
                    writes=context.part("near_pairs", key_range),
                    also=(context.part("near_report", key_range),),
                )
                for key_range in range(self.config.key_ranges)
            ]
        )

    def told(self, context: Context) -> Iterator[str]:
        """Whether buckets were cut again."""
        columns = ["num_rerouted", "largest_bucket", "num_pairs"]
        parts = [context.read(part, columns).to_pydict() for part in context.parts("near_report")]
        rerouted, largest, pairs = ([one for part in parts for one in part[name]] for name in columns)
        if any(rerouted):
            yield (
                f"near_pairs: buckets of more than {self.config.max_bucket:,} codes, {sum(rerouted):,} codes over all "
                f"keys and {max(largest):,} in the largest, were cut again and compared in full: {sum(pairs):,} pairs "
                "of different hashes; table near_report"
            )
