"""Copies, for the page of a run: components by size, and what other thresholds would do, as a drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from curation.dedup.edge_recall import told_of_recall

_WIDTH, _HEIGHT, _GAP = 520, 250, 40  # of one of two drawings beside each other
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 44, 30  # margins inside it
_NUM_TICKS = 5

STYLE = """
.curve { fill: none; stroke: var(--fill); stroke-width: 2; stroke-linejoin: round; } .grid { stroke: var(--line); }
.mark { stroke: var(--ink); stroke-dasharray: 4 3; }
.dot { fill: var(--fill); stroke: var(--paper); stroke-width: 1.5; }
svg text { fill: var(--soft); font-size: 12px; } svg .title { fill: var(--ink); font-size: 13px; font-weight: 500; }
"""


def told_of_threshold(row: dict[str, Any]) -> str:
    """What a row of the report ``component_sweep`` says."""
    return (
        f"Two pictures are copies from {row['threshold']:.3g} on. Pairs: {row['num_edges']:,}; pictures in them: "
        f"{row['num_pictures']:,}; components: {row['num_components']:,}; the largest holds {row['largest']:,}, "
        f"{row['share_largest']:.2%} of the pictures that near left."
    )


def told_of_search(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows of the report ``edge_recall`` say, a sentence each."""
    return [f"Of the search: {told_of_recall(row)}." for row in rows]


def classes_of_sizes(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int, int, float]]:
    """Components of two or more by size, in classes that double: sizes, components, pictures, share of all pictures."""
    classes: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["size"] > 1:
            classes.setdefault((int(row["size"]) - 1).bit_length(), []).append(row)
    found = []
    for power in sorted(classes):
        low, high = 2 ** (power - 1) + 1, 2**power
        name = f"{low:,}" if low == high else f"{low:,} – {high:,}"
        sums = (sum(row[key] for row in classes[power]) for key in ("num_components", "num_pictures", "share"))
        found.append((name, *sums))
    return found


def sweep_svg(rows: Sequence[dict[str, Any]]) -> str:
    """Share that would be dropped, and size of the largest component, against the threshold; the one in use is marked.

    Args:
        rows: of the report ``component_sweep``, two at least.
    """
    dropped, largest = [row["share_dropped"] for row in rows], [max(1, row["largest"]) for row in rows]
    drawings = [
        _drawing("share dropped as copies, by threshold", rows, dropped, _linear),
        _drawing("pictures in the largest component, by threshold", rows, largest, _logarithmic),
    ]
    shifted = "".join(f'<g transform="translate({n * (_WIDTH + _GAP)} 0)">{one}</g>' for n, one in enumerate(drawings))
    return f'<svg width="100%" viewBox="0 0 {2 * _WIDTH + _GAP} {_HEIGHT}" role="img">{shifted}</svg>'


Axis = Callable[[float], tuple[Callable[[float], float], list[tuple[float, str]]]]


def _linear(most: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Of values up to ``most``: place in the drawing, 0 to 1, and ticks."""
    step = _round_step(most / _NUM_TICKS)
    top = step * max(1, math.ceil(most / step - 1e-9))
    digits = max(0, -math.floor(math.log10(step)) - 2)
    ticks = [step * n for n in range(round(top / step) + 1)]
    return (lambda value: value / top), [(tick, f"{tick:.{digits}%}") for tick in ticks]


def _logarithmic(most: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """The same of values from 1, by powers of ten; of two or five where there are few of them."""
    decades = max(1, math.ceil(math.log10(most) - 1e-9))
    factors = (1, 2, 5) if decades < 3 else (1,)
    ticks = [factor * 10**n for n in range(decades + 1) for factor in factors]
    top = next(tick for tick in ticks if tick >= most and tick > 1)
    scale = math.log(top)
    return (lambda value: math.log(value) / scale), [(tick, _short(tick)) for tick in ticks if tick <= top]


def _short(count: int) -> str:
    return f"{count:,}" if count < 1_000_000 else f"{count // 1_000_000:,}M"


def _round_step(least: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is no smaller."""
    if least <= 0:
        return 0.01
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _drawing(title: str, rows: Sequence[dict[str, Any]], values: Sequence[float], axis: Axis) -> str:
    thresholds: list[float] = [row["threshold"] for row in rows]
    first, last = thresholds[0], thresholds[-1]
    place, ticks = axis(max(values))

    def x(threshold: float) -> float:
        return _LEFT + (threshold - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - place(value) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text class="title" x="{_LEFT}" y="14">{escape(title)}</text>']
    for tick, name in ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{name}</text>'
        )
    step = _round_step((last - first) / 8)
    for n in range(math.ceil(first / step - 1e-6), math.floor(last / step + 1e-6) + 1):
        parts.append(f'<text x="{x(n * step):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{n * step:.4g}</text>')
    curve = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in zip(thresholds, values, strict=True))
    parts.append(f'<polyline class="curve" points="{curve}"/>')
    for row, value in zip(rows, values, strict=True):
        if row["in_use"]:
            at = x(row["threshold"])
            right = at > _WIDTH * 0.7
            parts.append(
                f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 15}" y2="{_HEIGHT - _BOTTOM}"/>'
                f'<circle class="dot" cx="{at:.1f}" cy="{y(value):.1f}" r="4"/>'
                f'<text x="{at + (-6 if right else 6):.1f}" y="{_TOP - 6}" text-anchor="{"end" if right else "start"}">'
                f"in use: {row['threshold']:.3g}</text>"
            )
    return "".join(parts)
