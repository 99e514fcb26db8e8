"""The models of a recipe as `lvd curate` names them before work: a line each, for stages that may have some left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from curation.stage import Stage
from pipelines.drive import PlanLine


def describe_models(stages: Sequence[Stage], lines: Sequence[PlanLine], device: str) -> Iterator[str]:
    """Stage, model, what it takes and gives, arithmetic, licence, file; nothing where no model is left to be run.

    Args:
        stages: of the recipe.
        lines: the plan.
        device: of the recipe.

    Raises:
        ConfigError: a library has no such model, or a file does not say what it holds.
    """
    left = {line.stage for line in lines if line.num_undone or not line.known}
    rows = [(stage.name, *facts.cells(device)) for stage in stages if stage.name in left for facts in stage.models()]
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    yield "models"
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()
