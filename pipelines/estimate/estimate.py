"""An estimate of a recipe: counted, multiplied, added up, and what it rests on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.schema import Role
from curation.stage import Stage
from pipelines.curate import CurateRecipe, build_stages
from pipelines.estimate.counting import Count
from pipelines.estimate.flow import Flow, count_sources, flow_of
from pipelines.estimate.rates import Rates, load_rates
from pipelines.estimate.storing import tar_bytes_of
from pipelines.estimate.sums import Cluster, Cost, Total, cost_of, machines_for, total_of
from pipelines.estimate.work import Work, works_of
from pipelines.preflight import named_sources

_LEAST_EFFECT = 0.01  # of an assumption that is named


@dataclass(frozen=True, kw_only=True)
class Line:
    """One stage."""

    work: Work
    cost: Cost
    num_machines: int | None  # that do this stage alone in the hours asked for; None: no number does


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """A rate that nobody measured, and what becomes of the totals where it is twice as much."""

    name: str
    value: float
    unit: str
    source: str
    usd_factor: float
    wall_factor: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a recipe will take."""

    recipe: str
    references: Mapping[str, Role]  # sets that are not of the pool
    flow: Flow
    cluster: Cluster
    cluster_is_this_machine: bool  # nobody said how many workers there are
    hours: float
    lines: list[Line]
    total: Total
    num_machines: int | None
    assumptions: list[Assumption]  # those that matter, the largest effect first
    rates: Rates


def estimate(recipe: CurateRecipe, *, hours: float, overrides: Sequence[str] = ()) -> Estimate:
    """Estimate a recipe. Starts, writes, loads nothing and asks no network.

    Args:
        recipe: to be run.
        hours: in which it is to be done, for the number of machines.
        overrides: ``NAME=VALUE`` laid over the rates.

    Raises:
        ConfigError: a source is not there and has no ``expected_rows``, or a rate is not known.
    """
    rates = load_rates(overrides)
    counted = count_sources(recipe)
    stages = build_stages(recipe)
    cluster = cluster_of(recipe, rates)
    flow, works, costs, total = _priced(recipe, stages, counted, cluster, rates)
    lines = [
        Line(work=work, cost=cost, num_machines=machines_for([work], cluster, rates, hours=hours))
        for work, cost in zip(works, costs, strict=True)
    ]
    return Estimate(
        recipe=recipe.name,
        references={name: role for name, role, _ in named_sources(recipe) if role != "pool"},
        flow=flow,
        cluster=cluster,
        cluster_is_this_machine=recipe.execution.executor != "inline" and recipe.execution.workers is None,
        hours=hours,
        lines=lines,
        total=total,
        num_machines=machines_for(works, cluster, rates, hours=hours),
        assumptions=_assumptions(recipe, stages, counted, cluster, rates, total=total),
        rates=rates,
    )


def cluster_of(recipe: CurateRecipe, rates: Rates) -> Cluster:
    """What the recipe's ``execution`` names; where it names nothing, what this machine has."""
    execution = recipe.execution
    inline = execution.executor == "inline"
    gpus = max(1, len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]))
    is_web = recipe.sample_web is None
    return Cluster(
        workers=1 if inline else execution.workers or os.cpu_count() or 1,
        fetchers=1 if inline else execution.fetchers,
        gpu_workers=1 if inline else execution.gpu_workers or gpus,
        visits=recipe.fetch.concurrency,
        gbit=rates["machine.gbit"] if is_web else None,
        wait="wait.visit" if is_web else "wait.sample_web",
    )


def _priced(
    recipe: CurateRecipe, stages: Sequence[Stage], counted: Mapping[str, Count], cluster: Cluster, rates: Rates
) -> tuple[Flow, list[Work], list[Cost], Total]:
    flow = flow_of(recipe, counted, rates)
    works = works_of(recipe, stages, flow, rates)
    costs = [cost_of(work, cluster, rates) for work in works]
    return flow, works, costs, total_of(works, costs, cluster, rates, tar_bytes=tar_bytes_of(flow, rates))


def _assumptions(
    recipe: CurateRecipe,
    stages: Sequence[Stage],
    counted: Mapping[str, Count],
    cluster: Cluster,
    rates: Rates,
    *,
    total: Total,
) -> list[Assumption]:
    """Rates that were asked for and not measured, each doubled in turn; machines, which change no total, apart."""
    found = []
    for name, rate in list(rates.used.items()):
        if rate.measured or name.startswith("machine."):
            continue
        twice = rate.value * 2 if rate.unit != "share" else min(1.0, rate.value * 2)
        *_, other = _priced(recipe, stages, counted, cluster, rates.with_value(name, twice))
        usd, wall = _factor(other.usd, total.usd), _factor(other.wall_s, total.wall_s)
        if max(abs(usd - 1), abs(wall - 1)) >= _LEAST_EFFECT:
            found.append(
                Assumption(
                    name=name, value=rate.value, unit=rate.unit, source=rate.source, usd_factor=usd, wall_factor=wall
                )
            )
    return sorted(found, key=lambda one: -max(abs(one.usd_factor - 1), abs(one.wall_factor - 1)))


def _factor(other: float, this: float) -> float:
    return other / this if this else 1.0


# For programs


def as_json(found: Estimate) -> dict[str, Any]:
    """The estimate as JSON-able values."""
    return {
        "recipe": found.recipe,
        "hours": found.hours,
        "cluster": vars(found.cluster),
        "sources": {name: vars(count) for name, count in found.flow.counts.items()},
        "shares": {verdict: vars(share) for verdict, share in found.flow.shares.items()},
        "stages": [_stage_json(line) for line in found.lines],
        "total": {**vars(found.total), "usd": found.total.usd, "num_machines": found.num_machines},
        "assumptions": [vars(one) for one in found.assumptions],
        "rates": {name: rate.model_dump() for name, rate in found.rates.used.items()},
    }


def _stage_json(line: Line) -> dict[str, Any]:
    values = {name: value for name, value in vars(line.work).items() if name != "uses"}
    uses = [vars(use) for use in line.work.uses]
    return {**values, **vars(line.cost), "num_machines": line.num_machines, "uses": uses}
