"""Hierarchical k-means: clusters of clusters, whose lowest level covers rare pictures as well as common ones.

Plain k-means puts most of its centroids where most pictures are. Clustering the centroids again, and refitting each
level on equally many points of every cluster, spreads them over what there is to see (Vo et al. 2024, Automatic Data
Curation for Self-Supervised Learning).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from pydantic import Field

from curation.represent import kmeans
from training.config import Config, ConfigError


class Level(Config):
    """One level of the hierarchy."""

    num_clusters: int = Field(ge=1, description="fewer than on the level below")
    sample_per_cluster: int = Field(
        ge=1, description="points of each cluster that a refit sees; about half the mean cluster size in the paper"
    )
    resampling_steps: int = Field(ge=0, description="refits; 0 is plain k-means")


class Hierarchy(NamedTuple):
    """Levels from the lowest, whose clusters hold pictures, to the highest."""

    centroids: tuple[np.ndarray, ...]  # of each level: float32 [K_l, D], unit length, exact in fp16
    parents: tuple[np.ndarray, ...]  # of each level but the highest: int32 [K_l], the cluster one level up


def check_levels(levels: Sequence[Level], num_vectors: int) -> None:
    """Refuse levels that cannot be fitted.

    Args:
        levels: from the lowest.
        num_vectors: that the lowest level clusters.

    Raises:
        ConfigError: there is no level, one is not smaller than that below it, or the lowest exceeds the vectors.
    """
    if not levels:
        raise ConfigError("levels: none is given; a hierarchy needs at least one")
    if levels[0].num_clusters > num_vectors:
        raise ConfigError(
            f"levels.0.num_clusters = {levels[0].num_clusters}: there are only {num_vectors} vectors; "
            f"take at most {num_vectors} clusters, or a larger sample"
        )
    for number, (lower, upper) in enumerate(pairwise(levels), 1):
        if upper.num_clusters >= lower.num_clusters:
            raise ConfigError(
                f"levels.{number}.num_clusters = {upper.num_clusters}: the level below has {lower.num_clusters}, "
                f"and each level needs fewer than that below it; take at most {lower.num_clusters - 1}"
            )


def closest(cluster: np.ndarray, similarity: np.ndarray, num: int) -> np.ndarray:
    """The ``num`` points of each cluster that are closest to its centroid; ties go to the least number.

    Args:
        cluster: int32 [N].
        similarity: to the centroid of the cluster, float32 [N].
        num: a cluster that has fewer gives all.

    Returns:
        Places, int64 [P], ascending.
    """
    order = np.lexsort((-similarity, cluster))  # stable
    grouped = cluster[order]
    rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    return np.sort(order[rank < num])


def fit_level(points: np.ndarray, level: Level, *, iterations: int, seed: int) -> np.ndarray:
    """k-means, then refits on the points closest to each centroid.

    A refit sees as many points of a cluster in a dense region as of one in a sparse region, so that centroids leave the
    dense ones. Only a fit whose start is spread out (k-means++) lets them: Lloyd's iterations carry no centroid between
    groups that lie apart, and from random points each refit loses some of the rare groups.

    Args:
        points: float32 [N, D], unit length, fp16 values.
        level: of the hierarchy.
        iterations: of Lloyd's algorithm, in each fit.
        seed: of the start of each fit.

    Returns:
        Centroids, float32 [K, D]. K is less than ``level.num_clusters`` where a refit has fewer points than that: many
        clusters were empty, as where points are equal.
    """
    centroids = kmeans.fit(points, num_clusters=level.num_clusters, iterations=iterations, seed=seed)
    for _ in range(level.resampling_steps):
        sample = closest(*kmeans.assign(points, centroids), level.sample_per_cluster)
        centroids = kmeans.fit(points[sample], num_clusters=level.num_clusters, iterations=iterations, seed=seed)
    return centroids


def fit_hierarchy(vectors: np.ndarray, levels: Sequence[Level], *, iterations: int, seed: int) -> Hierarchy:
    """Hierarchical k-means, from the lowest level up: each level clusters the centroids of the one below.

    Args:
        vectors: float32 [N, D], unit length, fp16 values. A fit depends on the order of its rows; give them in one
            that follows from the pictures, as by sha256.
        levels: from the lowest.
        iterations: of Lloyd's algorithm, in each fit.
        seed: of the start of each fit.

    Returns:
        The hierarchy, the same for the same arguments.

    Raises:
        ConfigError: as ``check_levels``.
    """
    check_levels(levels, len(vectors))
    centroids = [fit_level(vectors, levels[0], iterations=iterations, seed=seed)]
    parents = []
    for level in levels[1:]:
        centroids.append(fit_level(centroids[-1], level, iterations=iterations, seed=seed))
        parents.append(kmeans.assign(centroids[-2], centroids[-1])[0])
    return Hierarchy(tuple(centroids), tuple(parents))
