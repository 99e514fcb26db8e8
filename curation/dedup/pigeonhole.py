"""All pairs of 64-bit codes within a radius, exactly, by pigeonhole.

The bits are cut into ``radius + 2`` blocks. Two codes within the radius differ in at most ``radius`` blocks, so they
agree on at least two: every choice of two blocks is a key, and only codes that agree on a key are compared. A pair
belongs to the first key on which its codes agree, and so it is found once over all keys.

Codes are written with the bits of the key first and sorted as they are: what agrees on the key stands together, and
nothing is carried along. Hits are written back and looked up at the end.

Real hashes cluster, and comparing is quadratic in a bucket. The codes of a bucket agree on the bits of its key, so that
what differs lies in the others; a bucket of more than ``max_bucket`` codes is cut again by these, into ``radius + 1``
blocks of which one is a key, and so on. That stays exact. Where it would not halve the comparing, most codes of the
bucket are near each other, and it is compared as it is: so no cut costs more than it saves, however deep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np

HASH_BITS = 64
BLOCKS_IN_KEY = 2
BLOCKS_IN_SUBKEY = 1
_HITS = 1 << 16  # pairs of codes that are looked up together


class TooManyPairsError(Exception):
    """There are more pairs than were allowed for."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """Some blocks of the lowest ``width`` bits of a code, and how they are moved to the top of these."""

    mask: int  # the bits of the key
    num_bits: int
    moves: np.ndarray  # uint64 [6, 3]: bits to shift down by, mask, bits to shift up by
    differ: tuple[int, ...]  # blocks in which two codes differ that agree on this key and on none before it


@dataclass(kw_only=True)
class KeyReport:
    """What became of the codes of one key. A code stands for all pictures that have it."""

    key: int
    num_codes: int = 0
    num_buckets: int = 0
    largest_bucket: int = 0
    num_rerouted: int = 0  # codes in buckets that were cut again
    num_pairs: int = 0  # of distinct codes


@dataclass(kw_only=True)
class Found:
    """Pairs of rows, the smaller one in the upper half of a number, sorted; and what was counted on the way."""

    pairs: np.ndarray  # uint64 [P]
    num_equal: int  # of them: rows chained to an earlier one with the same code
    keys: list[KeyReport] = field(default_factory=list)


def keys_of(width: int, radius_bits: int, blocks_in_key: int) -> list[Key]:
    """Keys over the lowest ``width`` bits: two codes within the radius agree on every bit of at least one of them."""
    num_blocks = radius_bits + blocks_in_key
    edges = [round(i * width / num_blocks) for i in range(num_blocks + 1)]
    masks = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    found = []
    for chosen in combinations(range(num_blocks), blocks_in_key):
        rest = _gaps([(edges[i], edges[i + 1]) for i in chosen], width)
        found.append(
            Key(
                mask=sum(masks[i] for i in chosen),
                num_bits=sum(edges[i + 1] - edges[i] for i in chosen),
                moves=_moves([*((edges[i], edges[i + 1]) for i in chosen), *rest], width),
                differ=tuple(masks[i] for i in range(chosen[-1]) if i not in chosen),
            )
        )
    return found


def _gaps(chosen: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """The runs of bits between and around ascending ones, empty ones left out."""
    lows, highs = [0, *(high for _, high in chosen)], [*(low for low, _ in chosen), width]
    return [(low, high) for low, high in zip(lows, highs, strict=True) if low < high]


def _moves(runs: Sequence[tuple[int, int]], width: int) -> np.ndarray:
    """Moves that put runs of bits one below the other from bit ``width`` down; the bits above stay where they are."""
    moves, top = [(width, (1 << (HASH_BITS - width)) - 1, width)] if width < HASH_BITS else [], width
    for low, high in runs:
        top -= high - low
        moves.append((low, (1 << (high - low)) - 1, top))
    moves += [(0, 0, 0)] * (6 - len(moves))
    return np.array(moves, np.uint64)


def mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: uint64 whose every bit depends on all bits of the value."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def range_of(keys: np.ndarray, key_ranges: int) -> np.ndarray:
    """Range that a masked code belongs to, int64; mixed, so that ranges are even."""
    share = (mixed(keys.astype(np.uint64)) >> np.uint64(32)) * np.uint64(key_ranges)
    return (share >> np.uint64(32)).astype(np.int64)


# The join


class Rows:
    """Codes by row, and which row stands for each distinct code."""

    def __init__(self, codes: np.ndarray) -> None:
        from curation.dedup import bitloops

        self.codes = codes
        ordered = np.sort(codes)
        first = np.ones(len(ordered), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        self.distinct = ordered[first]
        # An entry for every second code or so; one bit at least, for a shift by 64 is not defined.
        bits = max(1, len(self.distinct).bit_length() - 2)
        shift, starts = np.uint64(HASH_BITS - bits), np.empty((1 << bits) + 1, np.uint32)
        bitloops.index_of_tops(self.distinct, shift, starts)
        self._index = (self.distinct, starts, shift)
        self._least = np.full(len(self.distinct), -1, np.int32)
        self.before = np.empty(len(codes), np.int32)
        bitloops.least_rows(codes, self._index, self._least, self.before)

    def of_hits(self, hits: np.ndarray) -> np.ndarray:
        """Pairs of rows, uint64 [H], of pairs of codes, uint64 [H, 2]."""
        from curation.dedup import bitloops

        out = np.empty(len(hits), np.uint64)
        bitloops.rows_of_hits(hits, self._index, self._least, out)
        return out


def find_pairs(
    codes: np.ndarray,
    *,
    radius_bits: int,
    max_bucket: int,
    key_ranges: int = 1,
    key_range: int = 0,
    keys: Sequence[int] | None = None,
    most_pairs: int | None = None,
) -> Found:
    """Pairs of rows within the radius that belong to one range of keys; over all ranges each pair comes once.

    A key and its value fall into one range, and so whole buckets do. Of several rows with one code the pairs of that
    code are given for the first row; the others are chained to it, each to the one before.

    Memory: 45 bytes a row, up to 110 where most codes stand in over-full buckets, and 16 a pair.

    Args:
        codes: uint64 [N], all that the range needs; N below 2 ** 31.
        radius_bits: largest distance of a pair.
        max_bucket: buckets with more codes are cut again.
        key_ranges: number of ranges.
        key_range: the one to answer for.
        keys: only these of the ``keys_of``; all by default.
        most_pairs: that may be found.

    Raises:
        TooManyPairsError: more than ``most_pairs`` were found.
    """
    from curation.dedup import bitloops

    rows = Rows(np.ascontiguousarray(codes, np.uint64))
    all_keys = keys_of(HASH_BITS, radius_bits, BLOCKS_IN_KEY)
    found = Found(pairs=np.empty(0, np.uint64), num_equal=0)
    pieces: list[np.ndarray] = []
    buffer = np.empty(len(rows.distinct) + 1, np.uint64)
    for index in range(len(all_keys)) if keys is None else keys:
        key, mine, report = all_keys[index], rows.distinct, KeyReport(key=index)
        if key_ranges > 1:
            wanted = (np.uint64(key.mask), np.uint64(key_ranges), np.uint64(key_range))
            mine = buffer[: bitloops.of_range(rows.distinct, *wanted, buffer)]
        left = None if most_pairs is None else most_pairs - sum(len(piece) for piece in pieces)
        join = _Join(rows=rows, radius_bits=radius_bits, max_bucket=max_bucket, report=report, most_pairs=left)
        join.by_key(mine, key, HASH_BITS, _Trail(differ=np.empty(0, np.uint64), moves=()))
        pieces += join.pieces
        found.keys.append(report)
        if index == 0:  # equal codes agree on every key, the first one included
            again = np.flatnonzero(rows.before >= 0)
            again = again[range_of(rows.codes[again] & np.uint64(key.mask), key_ranges) == key_range]
            pieces.append((rows.before[again].astype(np.uint64) << np.uint64(32)) | again.astype(np.uint64))
            found.num_equal = len(again)
    found.pairs = np.concatenate([np.empty(0, np.uint64), *pieces])
    found.pairs.sort()
    return found


@dataclass(frozen=True, kw_only=True)
class _Trail:
    """How codes came to be written as they are: through which keys, the first one first."""

    differ: np.ndarray  # masks of the keys on the way, in the writing of now
    moves: tuple[np.ndarray, ...]

    def then(self, key: Key) -> _Trail:
        from curation.dedup import bitloops

        differ = np.concatenate([self.differ, np.array(key.differ, np.uint64)])
        bitloops.moved(differ, key.moves, differ)
        return _Trail(differ=differ, moves=(*self.moves, key.moves))

    def back(self, codes: np.ndarray) -> None:
        """Write codes as they were at first, in place."""
        from curation.dedup import bitloops

        for moves in reversed(self.moves):
            bitloops.moved(codes, np.ascontiguousarray(moves[:, ::-1]), codes)


@dataclass(kw_only=True)
class _Join:
    """The join of one key, and of what its buckets are cut into."""

    rows: Rows
    radius_bits: int
    max_bucket: int
    report: KeyReport
    most_pairs: int | None
    pieces: list[np.ndarray] = field(default_factory=list)

    def by_key(self, codes: np.ndarray, key: Key, width: int, trail: _Trail) -> None:
        """Pairs of codes that agree above bit ``width`` and on a key over the bits below it."""
        from curation.dedup import bitloops

        trail = trail.then(key)
        ordered = np.empty_like(codes)
        bitloops.moved(codes, key.moves, ordered)
        ordered.sort()
        below = width - key.num_bits
        # With so few bits left there is nothing to cut by: blocks would be empty.
        max_bucket = self.max_bucket if below > self.radius_bits else len(ordered)
        over = np.empty_like(ordered)
        kept, num_over, num_buckets, largest = bitloops.sift(ordered, np.uint64(below), max_bucket, over)
        if width == HASH_BITS:
            self.report.num_codes, self.report.num_buckets = len(codes), num_buckets
            self.report.largest_bucket, self.report.num_rerouted = largest, num_over
        self._compare(ordered[:kept], below, min(largest, max_bucket), trail)
        if num_over:
            over = over[:num_over].copy()
            del ordered
            self._cut_again(over, below, trail)

    def _cut_again(self, ordered: np.ndarray, below: int, trail: _Trail) -> None:
        """Pairs of codes in buckets of equal bits from ``below`` up, by further bits where that saves work."""
        from curation.dedup import bitloops

        subkeys = keys_of(below, self.radius_bits, BLOCKS_IN_SUBKEY)
        tops = ordered >> np.uint64(below)
        sizes = np.diff(np.flatnonzero(np.concatenate([[True], tops[1:] != tops[:-1], [True]])))
        num_compares = np.zeros(len(sizes), np.int64)
        written = np.empty_like(ordered)
        for subkey in subkeys:
            bitloops.moved(ordered, subkey.moves, written)
            written.sort()
            bitloops.add_compares(written, np.uint64(below), np.uint64(below - subkey.num_bits), num_compares)
        worth = np.repeat(2 * num_compares <= sizes * (sizes - 1) // 2, sizes)
        self._compare(ordered[~worth], below, int(sizes.max()), trail)
        ordered = ordered[worth]
        if len(ordered):
            for subkey in subkeys:
                self.by_key(ordered, subkey, below, trail)

    def _compare(self, ordered: np.ndarray, below: int, largest: int, trail: _Trail) -> None:
        from curation.dedup import bitloops

        hits = np.empty((max(_HITS, largest + 1), 2), np.uint64)
        start = 0
        while start < len(ordered):
            key = np.uint64(below), trail.differ
            start, num = bitloops.compare(ordered, start, key, np.uint64(self.radius_bits), hits)
            if not num:
                continue
            self.report.num_pairs += num
            if self.most_pairs is not None and self.report.num_pairs > self.most_pairs:
                raise TooManyPairsError
            trail.back(hits[:num].reshape(-1))
            self.pieces.append(self.rows.of_hits(hits[:num]))
