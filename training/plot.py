"""A log as a picture: losses, measurements, rates, gradient norms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LOSSES = {"dino": "DINO", "ibot": "iBOT", "koleo": "KoLeo", "gram": "Gram", "feature": "feature"}
COLOURS = ("#3b6ea8", "#d1782c", "#4b9a6a", "#8b6bb1", "#b5495b", "#6b6b6b")
MAX_POINTS = 2000


def plot(log_path: Path, png_path: Path) -> None:
    """Draw a log: losses with that of no knowledge, measurements, rates, gradient norms and alarms.

    Args:
        log_path: of a ``Log``; ``recipe.json`` beside it tells K.
        png_path: written whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, alarms = _columns(log_path)
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlelocation": "left"}
    with pyplot.rc_context(style | {"axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True}):
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.6), sharex=True, layout="constrained")
        _draw_losses(axes[0, 0], columns, _ignorant(log_path.with_name("recipe.json")))
        _draw_measured(axes[0, 1], columns)
        _draw_schedules(axes[1, 0], columns)
        _draw_norms(axes[1, 1], columns, alarms)
        for axis in axes[1]:
            axis.set_xlabel("step")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        beside = png_path.with_name(f".{png_path.name}")
        figure.savefig(beside, dpi=130, format="png")
        pyplot.close(figure)
    beside.replace(png_path)


Columns = dict[str, tuple[list[float], list[float]]]  # of each value, steps and values


def _columns(log_path: Path) -> tuple[Columns, list[int]]:
    """Values by name, and steps of alarms."""
    columns: Columns = {}
    alarms: list[int] = []
    with log_path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            step = record.pop("step")
            if "alarm" in record:
                alarms.append(step)
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    return columns, alarms


def _ignorant(recipe_path: Path) -> float | None:
    """Ln K of DINO's head: cross-entropy of a student that knows nothing."""
    if not recipe_path.exists():
        return None
    return math.log(json.loads(recipe_path.read_text())["objective"]["dino"]["head"]["num_prototypes"])


def _thinned(column: tuple[list[float], list[float]]) -> tuple[list[float], list[float], list[float]]:
    """At most ``MAX_POINTS`` means of steps, values, and values smoothed over a fiftieth of the run."""
    steps, values = column
    size = -(-len(values) // MAX_POINTS)
    cut = range(0, len(values), size)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in cut]
    half = max(len(means) // 100, 1)
    smooth = [sum(part) / len(part) for part in (means[max(i - half, 0) : i + half + 1] for i in range(len(means)))]
    return [steps[i] for i in cut], means, smooth


def _draw_losses(axis: Any, columns: Columns, level: float | None) -> None:
    shown = [name for name in LOSSES if name in columns]
    for name, colour in zip(shown, COLOURS, strict=False):
        steps, means, smooth = _thinned(columns[name])
        axis.plot(steps, means, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth, color=colour, linewidth=1.6, label=LOSSES[name])
    if level is not None and "dino" in columns:
        axis.axhline(level, color="#888888", linestyle=(0, (4, 3)), linewidth=1)
        axis.annotate("ln K", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#666666")
    axis.set_title("loss")
    if shown:
        axis.legend(frameon=False)


def _draw_measured(axis: Any, columns: Columns) -> None:
    shown = sorted(name for name in columns if name.startswith(("knn_", "linear_")))
    for name, colour in zip(shown, COLOURS * 4, strict=False):
        steps, values = columns[name]
        axis.plot(steps, values, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=name.replace("_", " "))
    axis.set_title("top-1 accuracy of the teacher")
    if shown:
        axis.legend(frameon=False)
        axis.set_ylim(0, None)
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="#888888")


def _draw_schedules(axis: Any, columns: Columns) -> None:
    if "lr" in columns:
        steps, means, _ = _thinned(columns["lr"])
        axis.plot(steps, means, color=COLOURS[0], linewidth=1.6)
    axis.set_title("learning rate", color=COLOURS[0])
    axis.yaxis.set_major_formatter("{x:g}")
    if "momentum" in columns:
        other = axis.twinx()
        steps, means, _ = _thinned(columns["momentum"])
        other.plot(steps, means, color=COLOURS[1], linewidth=1.6)
        other.set_title("momentum of the teacher", loc="right", color=COLOURS[1])
        other.grid(False)
        other.spines["right"].set_visible(True)


def _draw_norms(axis: Any, columns: Columns, alarms: list[int]) -> None:
    shown = [name for name in columns if name.startswith("norm_") and any(value > 0 for value in columns[name][1])]
    for name, colour in zip(shown, COLOURS, strict=False):
        steps, _, smooth = _thinned(columns[name])
        axis.plot(steps, smooth, color=colour, linewidth=1.4, label=name.removeprefix("norm_").replace("_", " "))
    for index, step in enumerate(alarms[:200]):
        axis.axvline(step, color="#b5495b", alpha=0.5, linewidth=0.8, label="alarm" if index == 0 else None)
    axis.set_title("gradient norm before clipping")
    if shown:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axis.legend(frameon=False)
