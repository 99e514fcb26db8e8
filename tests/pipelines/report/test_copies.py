"""The drawing of the sweep: what stands where."""

import re
from typing import Any

import pytest

from pipelines.report.copies import classes_of_sizes, sweep_svg


def row(threshold: float, largest: int, dropped: float, in_use: bool = False) -> dict[str, Any]:
    return {"threshold": threshold, "largest": largest, "share_dropped": dropped, "in_use": in_use}


def test_curves_go_through_the_values_and_the_threshold_in_use_is_marked():
    text = sweep_svg([row(0.5, 1000, 0.5), row(0.75, 10, 0.25, in_use=True), row(1.0, 1, 0.0)])
    curves = [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in
              re.findall(r'points="([^"]+)"', text)]  # fmt: skip
    left, bottom, right, top = 56, 220, 508, 44
    middle = (left + right) / 2
    assert curves[0] == [(left, top), (middle, (top + bottom) / 2), (right, bottom)]
    assert curves[1] == [(left, top), (middle, pytest.approx(bottom - (bottom - top) / 3, abs=0.1)), (right, bottom)]
    assert text.count("in use: 0.75") == 2
    assert text.count(f'class="mark" x1="{middle:.1f}"') == 2
    for tick in (">0%<", ">50%<", ">1,000<", ">1<", ">0.6<"):
        assert tick in text


@pytest.mark.parametrize("largest", [1, 2, 7, 999, 1001, 10**9])
@pytest.mark.parametrize("dropped", [0.0, 1e-5, 0.0031, 0.99, 1.0])
def test_every_value_has_a_place(largest: int, dropped: float):
    text = sweep_svg([row(0.9999, largest, dropped, in_use=True), row(1.0, 1, 0.0)])
    for points in re.findall(r'points="([^"]+)"', text):
        for pair in points.split():
            _, y = map(float, pair.split(","))
            assert 44 <= y <= 220


def test_classes_of_sizes_double():
    sizes = [(1, 100), (2, 5), (3, 1), (4, 2), (5, 1), (9, 1)]
    rows = [{"size": s, "num_components": n, "num_pictures": s * n, "share": s * n / 1000} for s, n in sizes]
    found = classes_of_sizes(rows)
    assert [(name, n, m) for name, n, m, _ in found] == [
        ("2", 5, 10),
        ("3 – 4", 3, 11),
        ("5 – 8", 1, 5),
        ("9 – 16", 1, 9),
    ]
    assert found[0][3] == pytest.approx(0.01)
