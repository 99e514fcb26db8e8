"""Nominal counts: how many pictures each query set asks for, before anything is retrieved (table 15 of the paper)."""

from __future__ import annotations

from typing import NamedTuple


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


def is_possible(num_images: int, num_qualifying: int, *, min_queries: int = 3) -> bool:
    """Whether a set of so many pictures can have so many clusters that hold more than ``min_queries`` of them."""
    return num_qualifying * (min_queries + 1) <= num_images
