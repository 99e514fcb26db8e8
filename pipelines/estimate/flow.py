"""How many rows each stage sees: lines of the sources, and what each verdict is expected to let through.

A share comes from the recipe (``expected``), from what a sample web plants, or from ``rates.yaml``, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pyarrow as pa

from curation.ingest.register import SECTION_OF_ROLE
from curation.ingest.sources import SourceConfig
from curation.retrieve.plan import planned
from curation.schema import VERDICTS, Role
from curation.store import open_store, read_part
from pipelines.curate import CurateRecipe
from pipelines.estimate.counting import Count, count_crawl, count_source
from pipelines.estimate.rates import Rates
from pipelines.plan import SOURCES
from pipelines.preflight import named_sources
from pipelines.sample_web.config import SampleWebConfig
from pipelines.sample_web.plant import QUERIES_PER_SET, num_benchmark
from pipelines.sample_web.truth import KIND_OF, counts

LINES = "lines"  # before any verdict
_Roles = Mapping[str, tuple[Role, SourceConfig]]
_WEB_KINDS = ("list", "pages", "archive")  # sources of addresses; of the others the pictures are at hand
_BEFORE_BYTES = ("screened", "fetched")  # verdicts that pictures at hand pass


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a verdict is expected to keep, 0 to 1, and why."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Rows, before anything is done.

    Attributes:
        counts: of each source, by name.
        shares: of what each verdict keeps, ``selection`` apart.
        pool: rows of the pool that each verdict keeps; under ``LINES`` all of them.
        web: of these, addresses that are visited, and pictures that are had from them.
        busiest: of these addresses, those of one host.
        crawled: pages that are visited at most, and of these, those of one host.
        num_queries: pictures of query sets.
        num_benchmarks: pictures of benchmarks.
        num_shards: by role.
        picture_bytes: of one picture of the pool in the mean, and of one of the other sets.
        asked: pictures that each query set asks for, as is apart; a bound where clusters are not known.
        num_as_is: pictures that are taken as they are.
        num_samples: pictures of the finished set.
    """

    counts: Mapping[str, Count]
    shares: Mapping[str, Share]
    pool: Mapping[str, float]
    web: tuple[float, float]
    busiest: float
    crawled: tuple[float, float]
    num_queries: float
    num_benchmarks: float
    num_shards: Mapping[Role, int]
    picture_bytes: tuple[float, float]
    asked: Mapping[str, float]
    num_as_is: float
    num_samples: float

    @property
    def num_asked(self) -> float:
        """Pictures that all query sets ask of the pool."""
        return sum(self.asked.values())

    @property
    def num_references(self) -> float:
        """Pictures of query sets and benchmarks."""
        return self.num_queries + self.num_benchmarks


# Sources


def count_sources(recipe: CurateRecipe) -> dict[str, Count]:
    """Rows of all sources of a recipe, by name.

    Raises:
        ConfigError: one is not there, and nobody said how many rows it will have.
    """
    known = _registered(recipe.pool)
    found = {}
    for name, role, source in named_sources(recipe):
        rows = _planted(recipe.sample_web, source.location)
        if name in known:
            found[name] = Count(rows=known[name], source=f"table sources of {recipe.pool}")
        elif rows is not None:
            found[name] = Count(rows=rows, source="what the sample web plants")
        else:
            found[name] = count_source(f"{SECTION_OF_ROLE[role]}.{name}", source)
    return found


def _registered(pool: str) -> dict[str, int]:
    """Rows of the sources that a local pool knows; a bucket is not asked."""
    if pool.startswith("s3://") or not (Path(pool) / SOURCES.path).is_file():
        return {}
    table: pa.Table = read_part(open_store(pool), SOURCES, ["name", "num_rows"])
    return dict(zip(table["name"].to_pylist(), table["num_rows"].to_pylist(), strict=True))


def _planted(web: SampleWebConfig | None, location: str) -> int | None:
    """Rows of a source that is a part of the sample web."""
    if web is None or not Path(location).is_relative_to(web.path):
        return None
    within = Path(location).relative_to(web.path).parts
    if within == ("urls.csv",):
        return web.urls
    return {"queries": QUERIES_PER_SET, "benchmark": num_benchmark(web.urls)}.get(within[0])


# Shares


def shares_of(recipe: CurateRecipe, rates: Rates) -> dict[str, Share]:
    """What each verdict keeps of its rows, ``selection`` apart."""
    planted = _planted_shares(recipe.sample_web, rates) if recipe.sample_web is not None else {}
    found = {}
    for verdict in VERDICTS[:-1]:
        given: float | None = getattr(recipe.expected, verdict)
        if verdict == "semantic" and recipe.semdedup.eps is None:
            found[verdict] = Share(value=1.0, source="semdedup.eps is null")
        elif verdict == "leakage" and not recipe.benchmarks:
            found[verdict] = Share(value=1.0, source="there are no benchmarks")
        elif given is not None:
            found[verdict] = Share(value=given, source=f"expected.{verdict} of the recipe")
        elif verdict in planted:
            found[verdict] = Share(value=planted[verdict], source="what the sample web plants")
        else:
            found[verdict] = Share(value=rates[f"keep.{verdict}"], source=f"keep.{verdict} of rates.yaml")
    return found


def _planted_shares(web: SampleWebConfig, rates: Rates) -> dict[str, float]:
    """What verdicts keep of a sample web, from how many lines of each kind it has and where they end."""
    left: float = web.urls
    of_near = 1 - rates["keep.near_of_sample_web"]
    dropped = dict.fromkeys(("screened", "fetched", "safety", "near", "duplicates", "leakage"), 0.0)
    for name, count in counts(web.urls).items():
        end = KIND_OF[name].end_stage
        if end == "near|duplicates":
            dropped["near"] += count * of_near
            dropped["duplicates"] += count * (1 - of_near)
        elif end in dropped:
            dropped[end] += count
    shares = {}
    for verdict, lines in dropped.items():
        shares[verdict] = (left - lines) / left
        left -= lines
    return shares


# Rows


def flow_of(recipe: CurateRecipe, counted: Mapping[str, Count], rates: Rates) -> Flow:
    """Rows at every stage of a recipe."""
    shares = shares_of(recipe, rates)
    roles: _Roles = {name: (role, source) for name, role, source in named_sources(recipe)}
    rows: dict[str, float] = {name: count.rows for name, count in counted.items()}
    of_pool = [name for name, (role, _) in roles.items() if role == "pool"]
    lines: float = sum(rows[name] for name in of_pool)
    if recipe.execution.max_shards is not None and lines:
        most = min(lines, recipe.execution.max_shards * recipe.shard_rows)
        rows |= {name: rows[name] * most / lines for name in of_pool}
        lines = most
    addresses = sum(rows[name] for name in of_pool if roles[name][1].kind in _WEB_KINDS)
    pool, web, local = {LINES: lines}, addresses, lines - addresses
    visited = 0.0
    for verdict, share in shares.items():
        visited = web if verdict == "fetched" else visited
        web *= share.value
        local *= 1.0 if verdict in _BEFORE_BYTES else share.value
        pool[verdict] = web + local
    fetched = visited * shares["fetched"].value
    busiest = max((rows[name] * counted[name].busiest for name in of_pool), default=0.0) * shares["screened"].value
    crawls = [count_crawl(source) for _, source in roles.values() if source.kind == "pages"]
    images = {name: counted[name].rows for name, (role, _) in roles.items() if role == "query"}
    plans = planned(recipe.queries, images=images, num_clusters=recipe.cluster.num_clusters)
    finals = {plan.query_set: float(plan.nominal.final) if plan.nominal else 0.0 for plan in plans}
    as_is = sum(finals[plan.query_set] for plan in plans if plan.mode == "as_is")
    asked = {plan.query_set: finals[plan.query_set] for plan in plans if plan.mode != "as_is"}
    chosen = num_drawn(pool["semantic"], sum(asked.values()))
    return Flow(
        counts=counted,
        shares=shares,
        pool=pool | {"selection": chosen},
        web=(visited, fetched),
        busiest=busiest,
        crawled=(sum(one.rows for one in crawls), max((one.rows * one.busiest for one in crawls), default=0.0)),
        num_queries=_rows_of(roles, rows, "query"),
        num_benchmarks=_rows_of(roles, rows, "benchmark"),
        num_shards={role: _shards_of(roles, rows, role, recipe.shard_rows) for role in get_args(Role)},
        picture_bytes=(
            _picture_bytes(recipe, roles, counted, rates, of_pool=True),
            _picture_bytes(recipe, roles, counted, rates, of_pool=False),
        ),
        asked=asked,
        num_as_is=as_is,
        num_samples=as_is + (sum(asked.values()) if recipe.select.multiset else chosen),
    )


def num_drawn(num_pool: float, num_asked: float) -> float:
    """Different pictures among ``num_asked`` of a pool, as if each were drawn at random."""
    return num_pool * -math.expm1(-num_asked / num_pool) if num_pool else 0.0


def _rows_of(roles: _Roles, rows: Mapping[str, float], role: Role) -> float:
    return sum(rows[name] for name, (its, _) in roles.items() if its == role)


def _shards_of(roles: _Roles, rows: Mapping[str, float], role: Role, shard_rows: int) -> int:
    return sum(math.ceil(rows[name] / shard_rows) for name, (its, _) in roles.items() if its == role)


def _picture_bytes(
    recipe: CurateRecipe, roles: _Roles, counted: Mapping[str, Count], rates: Rates, *, of_pool: bool
) -> float:
    """Mean of one picture, over sources whose pictures were seen, and all others as the web has them."""
    otherwise = rates["picture.sample_web" if recipe.sample_web is not None else "picture.web"]
    mine = [counted[name] for name, (role, _) in roles.items() if (role == "pool") == of_pool]
    total = sum(count.rows for count in mine)
    known = sum(count.rows * (count.picture_bytes or otherwise) for count in mine)
    return known / total if total else otherwise
