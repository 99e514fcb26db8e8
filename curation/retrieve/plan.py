"""Nominal counts: how many pictures each query set asks for, before anything is retrieved (table 15 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from curation.ingest.sources import QueryConfig


class Nominal(NamedTuple):
    """What one query set asks for."""

    retrieved: int | None  # None: as is, nothing is retrieved
    final: int


def nominal_as_is(num_images: int) -> Nominal:
    """Every picture of the set itself."""
    return Nominal(None, num_images)


def nominal_sample(num_queries: int, k: int) -> Nominal:
    """``k`` neighbours of each query; collisions counted each time, as the paper does."""
    return Nominal(k * num_queries, k * num_queries)


def nominal_cluster(num_qualifying: int, *, per_cluster: int = 10_000, cap: int = 1_000_000) -> Nominal:
    """``per_cluster`` pictures of each cluster that holds enough queries, at most ``cap`` a set."""
    retrieved = num_qualifying * per_cluster
    return Nominal(retrieved, min(retrieved, cap))


def nominal_balanced(total: int) -> Nominal:
    """As many as are asked for."""
    return Nominal(total, total)


def is_possible(num_images: int, num_qualifying: int, *, min_queries: int = 3) -> bool:
    """Whether a set of so many pictures can have so many clusters that hold more than ``min_queries`` of them."""
    return num_qualifying * (min_queries + 1) <= num_images


# The plan of a recipe


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What one query set asks for, as far as it is known."""

    query_set: str
    mode: str
    num_images: int | None  # None: not counted yet, or a set without pictures
    asks: str  # in words
    nominal: Nominal | None  # None: not known
    at_most: bool = False  # the nominal counts are bounds: it is not known yet which clusters hold enough queries
    problem: str | None = None  # why it cannot be


def planned(
    queries: Mapping[str, QueryConfig],
    *,
    images: Mapping[str, int],
    qualifying: Mapping[str, int] | None = None,
    num_clusters: int | None = None,
    num_pool: int | None = None,
) -> list[Planned]:
    """What each set asks for, in the order of the recipe.

    Args:
        queries: of the recipe.
        images: pictures of each set, as far as they are counted.
        qualifying: clusters that hold enough queries, of each set of mode cluster, once that is known.
        num_clusters: of the recipe, a bound on these.
        num_pool: pictures that the pool has at most.
    """
    return [
        _planned(
            name,
            query,
            num_images=images.get(name),
            num_qualifying=(qualifying or {}).get(name),
            num_clusters=num_clusters,
            num_pool=num_pool,
        )
        for name, query in queries.items()
    ]


def _planned(
    name: str,
    query: QueryConfig,
    *,
    num_images: int | None,
    num_qualifying: int | None,
    num_clusters: int | None,
    num_pool: int | None,
) -> Planned:
    problem, at_most = None, False
    nominal: Nominal | None = None
    if query.mode == "balanced":
        asks, nominal, wanted = "evenly from all clusters", nominal_balanced(query.total or 0), query.total or 0
        if num_pool is not None and wanted > num_pool:
            problem = f"asks for {wanted:,} of a pool of at most {num_pool:,}"
    elif query.mode == "as_is":
        asks = "its images themselves"
        nominal = None if num_images is None else nominal_as_is(num_images)
    elif query.mode == "sample":
        asks = f"{query.k:,} nearest of each image"
        nominal = None if num_images is None else nominal_sample(num_images, query.k)
        if num_pool is not None and query.k > num_pool:
            problem = f"asks for {query.k:,} neighbours of a pool of at most {num_pool:,}"
    else:
        asks = f"{query.per_cluster:,} of each cluster with more than {query.min_queries:,} images"
        asks += f", at most {query.cap:,}"
        at_most = num_qualifying is None
        if num_images is not None:
            most = num_images // (query.min_queries + 1)
            num = min(most, num_clusters or most) if num_qualifying is None else num_qualifying
            nominal = nominal_cluster(num, per_cluster=query.per_cluster, cap=query.cap)
            problem = _impossible(query, num_images, num_qualifying)
    return Planned(
        query_set=name,
        mode=query.mode,
        num_images=num_images if query.mode != "balanced" else None,
        asks=asks,
        nominal=nominal,
        at_most=at_most,
        problem=problem,
    )


def _impossible(query: QueryConfig, num_images: int, num_qualifying: int | None) -> str | None:
    least = query.min_queries + 1
    if num_qualifying is None and num_images < least:
        return f"no cluster can hold {least:,} of {num_images:,} images"
    if num_qualifying is not None and not is_possible(num_images, num_qualifying, min_queries=query.min_queries):
        return f"{num_qualifying:,} clusters cannot hold {least:,} of {num_images:,} images each"
    return None


def format_plan(rows: Sequence[Planned]) -> Iterator[str]:
    """The plan as a table of text; a count that is only a bound has ≤ before it."""
    if not rows:
        return
    cells = [("query set", "mode", "images", "asks for", "retrieved", "final")]
    for row in rows:
        retrieved = "" if row.nominal is None or row.nominal.retrieved is None else _count(row.nominal.retrieved, row)
        final = "" if row.nominal is None else _count(row.nominal.final, row)
        images = "" if row.num_images is None else f"{row.num_images:,}"
        cells.append((row.query_set, row.mode, images, row.asks, retrieved, final))
    finals = [row.nominal.final for row in rows if row.nominal is not None]
    if len(finals) == len(rows):
        bound = "≤ " if any(row.at_most for row in rows) else ""
        cells.append(("total", "", "", "", "", f"{bound}{sum(finals):,}"))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        padded = [
            text.rjust(width) if column in (2, 4, 5) else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield f"  {'  '.join(padded)}".rstrip()
    for row in rows:
        if row.problem is not None:
            yield f"  {row.query_set}: impossible: {row.problem}"


def _count(num: int, row: Planned) -> str:
    return f"{'≤ ' if row.at_most else ''}{num:,}"
