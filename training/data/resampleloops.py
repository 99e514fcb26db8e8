"""The compiled loops of resample. Numba takes half a second to import, so whoever needs them imports them there.

The vectors are written out: 16 rows of the picture stand side by side while its columns are weighed, and 48 columns
while its rows are. What turns rows into such columns, and back, is a network of four interleavings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_LOW = [place for pair in zip(range(8), range(16, 24), strict=True) for place in pair]
_HIGH = [place + 8 for place in _LOW]
_PLACES = {number: numba.types.UniTuple(numba.intp, number) for number in (2, 4, 7)}


@intrinsic  # type: ignore[untyped-decorator]
def _columns_of(typing: Any, source: Any, out: Any, places: Any) -> Any:
    """16 rows of 16 bytes to float32 [16 bytes, 16 rows] at the front of ``out``.

    Places: of the first byte, and a row's length.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        source, out = (_pointer(context, builder, signature, values, k) for k in (0, 1))
        at, stride = cgutils.unpack_tuple(builder, values[2], 2)
        rows = []
        for _ in range(LANES):
            rows.append(_load(builder, source, at, _BYTES))
            at = builder.add(at, stride)
        for number, column in enumerate(_turned(builder, rows)):
            _store(builder, builder.uitofp(column, _FLOATS), out, at.type(number * LANES))
        return context.get_dummy_value()

    return numba.void(source, out, _PLACES[2]), generate


@intrinsic  # type: ignore[untyped-decorator]
def _weighed_columns(typing: Any, columns: Any, weights: Any, out: Any, places: Any) -> Any:
    """A pixel of 16 rows: uint8 [3 columns, 16 rows].

    Places: of the first of the columns, of their weights, how many pixels they are, and of the result.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        columns, weights, out = (_pointer(context, builder, signature, values, k) for k in (0, 1, 2))
        first, weight, count, to = cgutils.unpack_tuple(builder, values[3], 4)

        def place(number: Any) -> Any:
            return builder.add(first, builder.mul(number, first.type(3 * LANES)))

        for number, column in enumerate(_weighed(builder, columns, place, builder.gep(weights, [weight]), count)):
            _store(builder, column, out, builder.add(to, to.type(number * LANES)))
        return context.get_dummy_value()

    return numba.void(columns, weights, out, _PLACES[4]), generate


@intrinsic  # type: ignore[untyped-decorator]
def _rows_of(typing: Any, columns: Any, ring: Any, places: Any) -> Any:
    """uint8 [16 columns, 16 rows] into a ring of rows, float32.

    Places: the number of the first row, the mask that makes of a number one of the ring, a row's length, the column.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        columns, ring = (_pointer(context, builder, signature, values, k) for k in (0, 1))
        first, mask, stride, at = cgutils.unpack_tuple(builder, values[2], 4)
        loaded = [_load(builder, columns, at.type(k * LANES), _BYTES) for k in range(LANES)]
        for number, row in enumerate(_turned(builder, loaded)):
            in_ring = builder.and_(builder.add(first, at.type(number)), mask)
            _store(builder, builder.uitofp(row, _FLOATS), ring, builder.add(builder.mul(in_ring, stride), at))
        return context.get_dummy_value()

    return numba.void(columns, ring, _PLACES[4]), generate


@intrinsic  # type: ignore[untyped-decorator]
def _weighed_rows(typing: Any, ring: Any, weights: Any, out: Any, places: Any) -> Any:
    """48 columns of a row as bytes.

    Places: as of ``_rows_of``, then of the weights, how many rows they are of, and of the result.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        ring, weights, out = (_pointer(context, builder, signature, values, k) for k in (0, 1, 2))
        first, mask, stride, at, weight, count, to = cgutils.unpack_tuple(builder, values[3], 7)

        def place(number: Any) -> Any:
            in_ring = builder.and_(builder.add(first, number), mask)
            return builder.add(builder.mul(in_ring, stride), at)

        for number, part in enumerate(_weighed(builder, ring, place, builder.gep(weights, [weight]), count)):
            _store(builder, part, out, builder.add(to, to.type(number * LANES)))
        return context.get_dummy_value()

    return numba.void(ring, weights, out, _PLACES[7]), generate


def _weighed(builder: Any, inputs: Any, place: Callable[[Any], Any], weights: Any, count: Any) -> list[Any]:
    """Three vectors that lie together, summed over places 0, 1, … times weights; as bytes, rounded."""
    totals = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES)) for _ in range(3)]
    multiply_add = _of_vectors(builder, "fmuladd", 3)
    with cgutils.for_range(builder, count) as loop:
        weight = _broadcast(builder, builder.load(builder.gep(weights, [loop.index])))
        at = place(loop.index)
        for number, total in enumerate(totals):
            vector = _load(builder, inputs, builder.add(at, at.type(number * LANES)), _FLOATS)
            builder.store(builder.call(multiply_add, [vector, weight, builder.load(total)]), total)
    return [_rounded(builder, builder.load(total)) for total in totals]


def _turned(builder: Any, vectors: list[Any]) -> list[Any]:
    """16 vectors of 16 with rows and columns swapped."""
    numbers = ir.VectorType(ir.IntType(32), LANES)
    orders = [ir.Constant(numbers, order) for order in (_LOW, _HIGH)]
    for _ in range(4):
        pairs = zip(vectors[: LANES // 2], vectors[LANES // 2 :], strict=True)
        vectors = [builder.shuffle_vector(one, other, order) for one, other in pairs for order in orders]
    return vectors


def _broadcast(builder: Any, value: Any) -> Any:
    none = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(none, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _rounded(builder: Any, vector: Any) -> Any:
    """To bytes; what is below 0 or above 255 is cut off."""
    for name, bound in (("maxnum", 0.0), ("minnum", 255.0)):
        vector = builder.call(_of_vectors(builder, name, 2), [vector, ir.Constant(_FLOATS, [bound] * LANES)])
    vector = builder.fadd(vector, ir.Constant(_FLOATS, [0.5] * LANES))
    return builder.trunc(builder.fptosi(vector, ir.VectorType(ir.IntType(32), LANES)), _BYTES)


def _of_vectors(builder: Any, name: str, num_arguments: int) -> Any:
    """An operation of LLVM on vectors."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * num_arguments)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")


def _pointer(context: Any, builder: Any, signature: Any, values: Sequence[Any], number: int) -> Any:
    """To the first value of an array that is an argument."""
    return context.make_array(signature.args[number])(context, builder, values[number]).data


def _load(builder: Any, pointer: Any, place: Any, kind: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(pointer, [place]), kind.as_pointer()), align=1)


def _store(builder: Any, vector: Any, pointer: Any, place: Any) -> None:
    builder.store(vector, builder.bitcast(builder.gep(pointer, [place]), vector.type.as_pointer()), align=1)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def bicubic_weights(begin: float, end: float, num_out: int, num_in: int) -> tuple[np.ndarray, np.ndarray]:
    """What the pixels of a side are made of, where ``begin`` to ``end`` of ``num_in`` pixels become ``num_out``.

    Returns:
        int64 [N], the first pixel that goes into each, and float32 [N, k], the weights of k pixels from it on.
    """
    scale = (end - begin) / num_out
    support = 2 * scale
    num = 0
    first = np.empty(num_out, np.int64)
    for n in range(num_out):
        center = begin + (n + 0.5) * scale
        num = max(num, min(int(center + support + 0.5), num_in) - max(int(center - support + 0.5), 0))
    weights = np.zeros((num_out, num), np.float32)
    for n in range(num_out):
        center = begin + (n + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), num_in)
        first[n] = min(low, num_in - num)
        total = 0.0
        for place in range(low, high):
            x = abs(place + 0.5 - center) / scale
            weight = 0.0
            if x < 1:
                weight = (1.5 * x - 2.5) * x * x + 1
            elif x < 2:
                weight = ((-0.5 * x + 2.5) * x - 4) * x + 2
            weights[n, place - first[n]] = weight
            total += weight
        weights[n] /= np.float32(total)
    return first, weights


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _empty(size: int) -> np.ndarray:
    """float32 [size] that begins where a cache line does: no vector then stands in two."""
    found = np.empty(size + LANES, np.float32)
    skip = -(found.ctypes.data // 4) % LANES
    return found[skip : skip + size]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def resample(
    rgb: np.ndarray, columns: tuple[np.ndarray, np.ndarray], rows: tuple[np.ndarray, np.ndarray], out: np.ndarray
) -> None:
    """Columns first, then rows.

    Args:
        rgb: uint8 [H, W, 3]; H and W are at least 16.
        columns: ``bicubic_weights`` of w columns.
        rows: ``bicubic_weights`` of h rows.
        out: uint8 [h * w * 3 + 48], of which the last 48 are not part of the picture.
    """
    height, row_bytes = rgb.shape[0], rgb.shape[1] * 3
    source = rgb.reshape(-1)
    width, num_columns = columns[1].shape
    num_rows = rows[1].shape[1]
    column_weights, row_weights = columns[1].reshape(-1), rows[1].reshape(-1)
    num_groups = -(-width // LANES)
    stride = num_groups * 3 * LANES
    ring_rows = 2 * LANES
    while ring_rows < num_rows + LANES:
        ring_rows *= 2
    mask = ring_rows - 1
    band = _empty(row_bytes * LANES)  # 16 rows, a column after the other
    block = np.empty(3 * LANES * LANES, np.uint8)  # 16 pixels of them, weighed
    ring = _empty(ring_rows * stride)  # rows whose columns are weighed
    done = y = 0
    while done < height:
        top = min(done, height - LANES)
        at = 0
        for group in range(num_groups):
            last = min(group * LANES + LANES, width) - 1
            while at < (columns[0][last] + num_columns) * 3:  # no sooner: what was just written is near
                at = min(at, row_bytes - LANES)
                _columns_of(source, band[at * LANES :], (top * row_bytes + at, row_bytes))
                at += LANES
            for lane in range(LANES):
                x = min(group * LANES + lane, width - 1)
                first = columns[0][x] * 3 * LANES
                _weighed_columns(band, column_weights, block, (first, x * num_columns, num_columns, lane * 3 * LANES))
            for part in range(3):
                _rows_of(block[part * LANES * LANES :], ring, (top, mask, stride, (group * 3 + part) * LANES))
        done = top + LANES
        while y < len(rows[0]) and rows[0][y] + num_rows <= done:
            for group in range(num_groups):
                ring_places = (rows[0][y], mask, stride, group * 3 * LANES)
                to = (y * width + group * LANES) * 3
                _weighed_rows(ring, row_weights, out, (*ring_places, y * num_rows, num_rows, to))
            y += 1
