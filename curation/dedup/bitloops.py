"""The compiled loops of the pigeonhole join. Numba takes half a second to import: whoever needs one imports it there.

Codes are uint64 throughout, and so is all that meets them: numba makes a float of a signed and an unsigned one.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

_AT_ONCE = 32  # codes of a bucket whose least distance is looked at first
_ONE = np.uint64(1)


@intrinsic  # type: ignore[untyped-decorator]
def _popcount(typing_context: Any, value: Any) -> Any:
    """Number of bits that are set; one instruction, and vectorised where the processor has it."""
    del typing_context, value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.ctpop(arguments[0])

    return numba.types.uint64(numba.types.uint64), generate


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _mixed(value: np.uint64) -> np.uint64:
    """As ``pigeonhole.mixed``."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def moved(codes: np.ndarray, moves: np.ndarray, out: np.ndarray) -> None:
    """Codes with the bits of a key moved to their top.

    Args:
        codes: uint64 [N].
        moves: uint64 [6, 3], the pieces that a code is made of: bits to shift down by, mask, bits to shift up by.
        out: uint64 [N], may be ``codes``.
    """
    d0, m0, u0 = moves[0, 0], moves[0, 1], moves[0, 2]
    d1, m1, u1 = moves[1, 0], moves[1, 1], moves[1, 2]
    d2, m2, u2 = moves[2, 0], moves[2, 1], moves[2, 2]
    d3, m3, u3 = moves[3, 0], moves[3, 1], moves[3, 2]
    d4, m4, u4 = moves[4, 0], moves[4, 1], moves[4, 2]
    d5, m5, u5 = moves[5, 0], moves[5, 1], moves[5, 2]
    for n in range(len(codes)):
        code = codes[n]
        high = (((code >> d0) & m0) << u0) | (((code >> d1) & m1) << u1) | (((code >> d2) & m2) << u2)
        low = (((code >> d3) & m3) << u3) | (((code >> d4) & m4) << u4) | (((code >> d5) & m5) << u5)
        out[n] = high | low


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def of_range(codes: np.ndarray, mask: np.uint64, num_ranges: np.uint64, wanted: np.uint64, out: np.ndarray) -> int:
    """Copy the codes whose masked value belongs to a range; how many they are."""
    num = 0
    for n in range(len(codes)):
        out[num] = codes[n]
        num += ((_mixed(codes[n] & mask) >> np.uint64(32)) * num_ranges) >> np.uint64(32) == wanted
    return num


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def sift(codes: np.ndarray, shift: np.uint64, max_bucket: int, over: np.ndarray) -> tuple[int, int, int, int]:
    """Cut sorted codes into buckets of equal top bits, and keep those that hold two or more, in place.

    Args:
        codes: uint64 [N], ascending; changed.
        shift: bits below the key.
        max_bucket: codes of fuller buckets go to ``over``.
        over: uint64 [N].

    Returns:
        How many codes were kept, how many went to ``over``, how many buckets there are, and codes of the largest.
    """
    kept = num_over = num_buckets = largest = 0
    start, num = 0, len(codes)
    while start < num:
        top = codes[start] >> shift
        end = start + 1
        while end < num and codes[end] >> shift == top:
            end += 1
        size = end - start
        num_buckets += 1
        largest = max(largest, size)
        if size > max_bucket:
            over[num_over : num_over + size] = codes[start:end]
            num_over += size
        elif size > 1:
            for n in range(start, end):
                codes[kept] = codes[n]
                kept += 1
        start = end
    return kept, num_over, num_buckets, largest


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def add_compares(codes: np.ndarray, outer: np.uint64, inner: np.uint64, num: np.ndarray) -> None:
    """Add to each bucket the pairs that are to be compared when it is cut by further bits.

    Args:
        codes: uint64 [N], ascending.
        outer: bits below the key of the buckets.
        inner: bits below the further ones.
        num: int64 [B], added to.
    """
    bucket = size = 0
    for n in range(len(codes)):
        if n > 0 and codes[n] >> inner != codes[n - 1] >> inner:
            size = 0
            bucket += codes[n] >> outer != codes[n - 1] >> outer
        num[bucket] += size
        size += 1


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def compare(
    codes: np.ndarray, start: int, key: tuple[np.uint64, np.ndarray], radius: np.uint64, hits: np.ndarray
) -> tuple[int, int]:
    """Pairs of one bucket within the radius, from the code at ``start`` on, until all are seen or ``hits`` is full.

    Args:
        codes: uint64 [N], ascending.
        start: position of the first code whose later ones are looked at.
        key: how many bits are below it; and masks, uint64 [T]: a pair counts only if it differs in some bit of each,
            so that it has no earlier key.
        radius: most bits that may differ.
        hits: uint64 [H, 2], to be filled; H is at least the largest bucket.

    Returns:
        The position to go on from, N at the end, and the number of hits.
    """
    shift, differ = key
    found = end = 0
    num = len(codes)
    for n in range(start, num):
        code = codes[n]
        if n >= end:
            end = n + 1
            while end < num and codes[end] >> shift == code >> shift:
                end += 1
        if found + end - n > len(hits):
            return n, found
        other = n + 1
        while other < end:
            stop = min(other + _AT_ONCE, end)
            least = np.uint64(64)
            for m in range(other, stop):
                least = min(least, _popcount(codes[m] ^ code))
            if least <= radius:
                for m in range(other, stop):
                    apart = codes[m] ^ code
                    if _popcount(apart) <= radius:
                        first = True
                        for mask in differ:
                            first &= apart & mask != 0
                        if first:
                            hits[found, 0], hits[found, 1] = code, codes[m]
                            found += 1
            other = stop
    return num, found


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def index_of_tops(codes: np.ndarray, shift: np.uint64, starts: np.ndarray) -> None:
    """Where codes of each value of the top bits begin, uint32 [2 ** (64 - shift) + 1]; codes ascending."""
    at = 0
    for top in range(len(starts) - 1):
        starts[top] = at
        while at < len(codes) and codes[at] >> shift == np.uint64(top):
            at += 1
    starts[len(starts) - 1] = at


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _place(index: tuple[np.ndarray, np.ndarray, np.uint64], code: np.uint64) -> np.int64:
    """Position of a code that is there."""
    codes, starts, shift = index
    top = code >> shift
    low, high = np.int64(starts[top]), np.int64(starts[top + _ONE])
    while high - low > 1:
        middle = (low + high) >> 1
        if codes[middle] <= code:
            low = middle
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def least_rows(
    codes: np.ndarray, index: tuple[np.ndarray, np.ndarray, np.uint64], least: np.ndarray, before: np.ndarray
) -> None:
    """The first row of each distinct code, and of each row the one before it with the same code, -1 for the first.

    Args:
        codes: uint64 [N], in order of rows.
        index: distinct codes, uint64 [M], ascending; starts and shift of ``index_of_tops``.
        least: int32 [M], -1 throughout; filled.
        before: int32 [N], filled.
    """
    latest = np.empty(len(least), np.int32)
    for row in range(len(codes)):
        at = _place(index, codes[row])
        if least[at] < 0:
            least[at] = row
            before[row] = -1
        else:
            before[row] = latest[at]
        latest[at] = row


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def rows_of_hits(
    hits: np.ndarray, index: tuple[np.ndarray, np.ndarray, np.uint64], least: np.ndarray, out: np.ndarray
) -> None:
    """Pairs of rows as one number, the smaller row in the upper half, uint64 [H], of pairs of codes, uint64 [H, 2]."""
    for n in range(len(hits)):
        a = np.uint64(least[_place(index, hits[n, 0])])
        b = np.uint64(least[_place(index, hits[n, 1])])
        out[n] = (min(a, b) << np.uint64(32)) | max(a, b)
