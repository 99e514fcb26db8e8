"""Hierarchical k-means: clusters of clusters, whose lowest level covers rare pictures as well as common ones.

Plain k-means puts most of its centroids where most pictures are. Clustering the centroids again, and refitting each
level on equally many points of every cluster, spreads them over what there is to see (Vo et al. 2024, Automatic Data
Curation for Self-Supervised Learning).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.represent import kmeans
from curation.schema import TABLES
from curation.stage import Context, GlobalStage, Map, Task, TaskIO, keyed_folder
from training.config import Config, ConfigError


class Level(Config):
    """One level of the hierarchy."""

    num_clusters: int = Field(ge=1, description="fewer than on the level below")
    sample_per_cluster: int = Field(
        ge=1, description="points of each cluster that a refit sees; about half the mean cluster size in the paper"
    )
    resampling_steps: int = Field(ge=0, description="refits; 0 is plain k-means")


class HierarchyConfig(Config):
    """Levels above the clusters, for query sets of mode balanced; without any, all clusters are siblings."""

    levels: list[Level] = Field(default_factory=list, description="from the lowest, which clusters the centroids")
    iterations: int = Field(default=20, ge=1, description="of Lloyd's algorithm, in each fit")
    seed: int = 0


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
        raise ConfigError("hierarchy.levels: none is given; a hierarchy needs at least one")
    if levels[0].num_clusters > num_vectors:
        raise ConfigError(
            f"hierarchy.levels.0.num_clusters = {levels[0].num_clusters}: there are only {num_vectors} vectors; "
            f"take at most {num_vectors} clusters, or a larger sample"
        )
    for number, (lower, upper) in enumerate(pairwise(levels), 1):
        if upper.num_clusters >= lower.num_clusters:
            raise ConfigError(
                f"hierarchy.levels.{number}.num_clusters = {upper.num_clusters}: the level below has "
                f"{lower.num_clusters}, and each level needs fewer than that below it; "
                f"take at most {lower.num_clusters - 1}"
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


# The stage


def hierarchy_table(clusters: np.ndarray, levels: Sequence[Level], *, iterations: int, seed: int) -> pa.Table:
    """The table ``fit_hierarchy`` over the centroids of ``fit_kmeans``, float32 [K, D]; no row without levels."""
    schema = TABLES["fit_hierarchy"].schema
    if not levels:
        return schema.empty_table()
    made = fit_hierarchy(clusters, levels, iterations=iterations, seed=seed)
    parents = [kmeans.assign(clusters, made.centroids[0])[0], *made.parents]
    tables = []
    for level, vectors in enumerate([None, *made.centroids]):
        num = len(clusters) if vectors is None else len(vectors)
        columns = [
            pa.array([level] * num, pa.int32()),
            pa.array(np.arange(num, dtype=np.int32)),
            pa.array(parents[level], pa.int32()) if level < len(parents) else pa.nulls(num, pa.int32()),
            pa.array([None] * num if vectors is None else list(vectors), pa.list_(pa.float32())),
        ]
        tables.append(pa.table(columns, schema=schema))
    return pa.concat_tables(tables)


def parents_of(table: pa.Table) -> list[np.ndarray]:
    """Parents of each level but the highest, from the clusters of ``fit_kmeans`` up, int32 [K_l]; none without levels.

    Args:
        table: columns level, cluster, parent of ``fit_hierarchy``.
    """
    level, parent = table["level"].to_numpy(), table["parent"]
    highest = int(level.max(initial=0))
    return [parent.filter(pa.array(level == number)).to_numpy().astype(np.int32) for number in range(highest)]


def fit_levels(io: TaskIO, *, levels: list[dict[str, Any]], iterations: int, seed: int) -> pa.Table:
    """The table ``fit_hierarchy``."""
    fitted = io.read(io.part("fit_kmeans", 0), ["vector"])["vector"].combine_chunks()
    centroids = np.asarray(fitted.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(len(fitted), -1)
    asked = [Level.model_validate(level) for level in levels]
    return hierarchy_table(centroids, asked, iterations=iterations, seed=seed)


class FitHierarchy(GlobalStage):
    """The levels above the clusters, made once and kept like the clusters themselves."""

    name = "fit_hierarchy"
    section = "hierarchy"
    version = 2
    reads = ("fit_kmeans",)
    writes = ("fit_hierarchy",)
    config: HierarchyConfig

    def folder(self, table: str, context: Context) -> str:
        """``fits/fit_hierarchy/levels-KEY``: of the settings and of the clusters."""
        clusters = context.digest(context.part("fit_kmeans", 0))
        return f"fits/{keyed_folder(table, 'levels', self.version, self.config.fingerprint_values(), clusters)}"

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One fit."""
        reads = (context.part("fit_kmeans", 0),)
        args = self.config.fingerprint_values()
        map([Task(function=fit_levels, args=args, reads=reads, writes=context.part("fit_hierarchy", 0), once=True)])
