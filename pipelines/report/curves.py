"""Curves of the page about a run: inline SVG, in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 480, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 12, 12, 30, 24  # margins that hold the words

STYLE = """
.curves { display: flex; flex-wrap: wrap; gap: 24px; } .curves svg { max-width: 100%; height: auto; }
.curves text { fill: var(--soft); font-size: 12px; } .curves .name { fill: var(--ink); font-size: 13px; }
.curves polyline { fill: none; stroke: var(--fill); stroke-width: 1.5; } .curves circle { fill: var(--fill); }
.curves line { stroke: var(--line); } .curves .mark { stroke: var(--ink); stroke-dasharray: 3 3; }
"""


def curve(name: str, points: Sequence[tuple[float, float]], *, marked: float | None) -> str:
    """One curve from 0 up, with its highest value and a line where it is marked.

    Args:
        name: what is drawn.
        points: x ascending, and y of 0 and above; one at least.
        marked: x of one of the points.
    """
    first, last = points[0][0], points[-1][0]
    most = max(y for _, y in points) or 1
    base = _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + (x - first) / ((last - first) or 1) * (_WIDTH - _LEFT - _RIGHT)

    places = [(across(x), base - y / most * (base - _TOP)) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{at:.1f}" cy="{height:.1f}" r="2"><title>{x:g}: {y:,.0f}</title></circle>'
        for (at, height), (x, y) in zip(places, points, strict=True)
    )
    words = [
        f'<text class="name" x="{_LEFT}" y="14">{escape(name)}, up to {most:,.0f}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 7}">{first:g}</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 7}" text-anchor="end">{last:g}</text>',
    ]
    mark = ""
    if marked is not None:
        at = across(marked)
        mark = f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 8}" y2="{base}"/>'
        value = next(y for x, y in points if x == marked)
        side, shift = ("end", -5) if at > _WIDTH / 2 else ("start", 5)
        words.append(
            f'<text x="{at + shift:.1f}" y="{_TOP + 2}" text-anchor="{side}">in use, {marked:g}: {value:,.0f}</text>'
        )
    axis = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
    drawn = f'{axis}{mark}<polyline points="{line}"/>{dots}{"".join(words)}'
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{drawn}</svg>'


def curves(drawn: Sequence[str]) -> str:
    """Several side by side."""
    return f'<div class="curves">{"".join(drawn)}</div>'
