"""The work of a recipe, stage by stage, before it is priced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from curation.stage import Stage
from pipelines.curate import CurateRecipe
from pipelines.estimate.computing import Use, uses_of
from pipelines.estimate.flow import LINES, Flow
from pipelines.estimate.rates import Rates
from pipelines.estimate.scale import Scale
from pipelines.estimate.storing import memory_bytes, read_bytes, written_bytes

CRAWL, REGISTER = "crawl", "register"  # what the driver does before the first stage


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one stage takes, before it is priced.

    Attributes:
        stage: its name.
        rows_in: rows that it goes through; of a fit, pictures that are fitted on.
        rows_out: rows that go on; None of a fit, which lets none through.
        uses: what it computes.
        num_jobs: parts that are committed.
        num_tasks: of these, how many may be done at once.
        on_gpu: a worker of it holds a GPU.
        read_bytes: from the two roots and from local sources.
        kept_bytes: written, and there at the end.
        scratch_bytes: written, and gone when the stage is through.
        download_bytes: from the web.
        visits: addresses that are waited for.
        polite_s: that one worker takes to ask the host of most of them, as often as it may.
        memory_bytes: of a worker at its largest task.
    """

    stage: str
    rows_in: float
    rows_out: float | None
    uses: tuple[Use, ...]
    num_jobs: float = 1
    num_tasks: float = 1
    on_gpu: bool = False
    read_bytes: float = 0
    kept_bytes: float = 0
    scratch_bytes: float = 0
    download_bytes: float = 0
    visits: float = 0
    polite_s: float = 0
    memory_bytes: float = 0


def works_of(recipe: CurateRecipe, stages: Sequence[Stage], flow: Flow, rates: Rates) -> list[Work]:
    """The work of all stages, and before them that of the driver."""
    scale = Scale(recipe, flow, rates)
    crawl = [_crawl(recipe, flow, rates)] if flow.crawled[0] else []
    return [*crawl, _registration(flow, rates), *(_work_of(scale, stage) for stage in stages)]


def _crawl(recipe: CurateRecipe, flow: Flow, rates: Rates) -> Work:
    """All crawls as one."""
    pages, of_host = flow.crawled
    return Work(
        stage=CRAWL,
        rows_in=pages,
        rows_out=None,
        uses=(Use("stages.crawl", pages),),
        kept_bytes=pages * rates["bytes.crawl"],
        download_bytes=pages * rates["page.web"],
        visits=pages,
        polite_s=of_host * recipe.fetch.per_host_interval_s,
        memory_bytes=1e6 * rates["memory.worker"],
    )


def _registration(flow: Flow, rates: Rates) -> Work:
    lines = flow.pool[LINES] + flow.num_references
    num_bytes, parts = lines * rates["bytes.register"], sum(flow.num_shards.values())
    return Work(
        stage=REGISTER,
        rows_in=lines,
        rows_out=lines,
        uses=(Use("stages.register", lines),),
        num_jobs=parts,
        read_bytes=num_bytes,
        kept_bytes=num_bytes + parts * rates["bytes.part"],
        memory_bytes=1e6 * rates["memory.worker"],
    )


def _work_of(scale: Scale, stage: Stage) -> Work:
    name, rates, flow = stage.name, scale.rates, scale.flow
    rows = scale.rows_in(stage)
    num_jobs, num_tasks = scale.tasks(stage)
    kept, scratch = written_bytes(scale, name, rows)
    visits, pictures = flow.web if name == "fetch" else (0.0, 0.0)
    return Work(
        stage=name,
        rows_in=rows,
        rows_out=scale.rows_out(stage, rows),
        uses=uses_of(scale, stage, rows),
        num_jobs=num_jobs,
        num_tasks=num_tasks,
        on_gpu=stage.resources.gpus > 0,
        read_bytes=read_bytes(scale, name, rows),
        kept_bytes=kept + num_jobs * rates["bytes.part"],
        scratch_bytes=scratch,
        download_bytes=pictures * flow.picture_bytes[0],
        visits=visits,
        polite_s=flow.busiest * scale.recipe.fetch.per_host_interval_s if visits else 0.0,
        memory_bytes=1e6 * rates["memory.worker"] + memory_bytes(scale, stage),
    )
