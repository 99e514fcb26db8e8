"""Clusters of meaning: k-means fitted on a sample of the pool, then the nearest centroid of every picture."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.describe import vectors_of
from curation.dedup.near import rows_at
from curation.represent import kmeans
from curation.schema import TABLES
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, keyed_folder
from training.config import Config, ConfigError


class ClusterConfig(Config):
    """How the pool is cut into clusters."""

    num_clusters: int = Field(1000, ge=1, description="fewer where the sample has fewer pictures; 100,000 in the paper")
    iterations: int = Field(20, ge=1)
    sample: int = Field(2_000_000, ge=1, description="pictures that the fit sees")
    seed: int = 0


def fit_kmeans(
    io: TaskIO, *, shards: list[int], sample: int, num_clusters: int, iterations: int, seed: int
) -> pa.Table:
    """The table ``fit_kmeans`` from the embeddings with the least sha256 of some shards.

    Raises:
        ConfigError: there is no embedding at all.
    """
    ids, vectors = [np.array([], object)], []
    for shard in shards:
        table = io.read(io.part("embeddings", shard))
        ids.append(np.array(table["sha256"].to_pylist(), object))
        vectors.append(vectors_of(table).astype(np.float16))
    if not sum(len(part) for part in ids):
        raise ConfigError(
            "cluster: no picture of the sources is left to be clustered; `lvd funnel` shows where they went"
        )
    order = np.argsort(np.concatenate(ids), kind="stable")[:sample]
    centroids = kmeans.fit(
        np.concatenate(vectors)[order].astype(np.float32), num_clusters=num_clusters, iterations=iterations, seed=seed
    )
    return pa.table(
        [pa.array(np.arange(len(centroids), dtype=np.int32)), pa.array(list(centroids), pa.list_(pa.float32()))],
        schema=TABLES["fit_kmeans"].schema,
    )


class FitKmeans(GlobalStage):
    """Centroids, made once and kept: neither an appended list nor a changed threshold moves them.

    The sample is what the first shards hold embeddings of at that time. ``--redo fit_kmeans`` makes them anew.
    """

    name = "fit_kmeans"
    section = "cluster"
    reads = ("embeddings",)
    writes = ("fit_kmeans",)
    config: ClusterConfig

    def folder(self, table: str, context: Context) -> str:
        """``fits/fit_kmeans/kmeans-KEY``: of the settings and of the embedder's folder."""
        embedder = context.part("embeddings", 0).folder
        return f"fits/{keyed_folder(table, 'kmeans', self.version, self.config.fingerprint_values(), embedder)}"

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One fit over the first shards that hold the sample."""
        shards: list[int] = []
        num_rows = 0
        for shard in context.shards("pool"):
            if num_rows >= self.config.sample:
                break
            shards.append(shard)
            num_rows += context.num_rows(context.part("embeddings", shard))
        args = {**self.config.fingerprint_values(), "shards": shards}
        reads = tuple(context.part("embeddings", shard) for shard in shards)
        map([Task(function=fit_kmeans, args=args, reads=reads, writes=context.part("fit_kmeans", 0), once=True)])


class Clusters(ShardStage):
    """The nearest centroid of each picture that is left, and of each query picture."""

    name = "cluster"
    section = "cluster"
    kind = "output"
    after = "leakage"
    reads: ClassVar[tuple[str, ...]] = ("leakage", "embeddings", "fit_kmeans")
    writes = ("clusters",)
    roles = ("pool", "query")
    config: ClusterConfig

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Assign the rows of a shard."""
        table = io.table("embeddings")
        at = rows_at(table["image_id"].to_numpy(), io.rows["image_id"].to_numpy())
        fitted = io.table("fit_kmeans")["vector"].combine_chunks()
        dim = table.schema.field("vector").type.list_size
        centroids = np.asarray(fitted.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, dim)
        cluster, similarity = kmeans.assign(vectors_of(table)[at], centroids)
        schema = TABLES["clusters"].schema
        return {"clusters": pa.table([io.rows["image_id"], pa.array(cluster), pa.array(similarity)], schema=schema)}
