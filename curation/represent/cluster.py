"""Clusters of meaning: the nearest centroid of every picture; ``curation/represent/fit_kmeans.py`` fits them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.describe import vectors_of
from curation.dedup.near import rows_at
from curation.represent import kmeans
from curation.schema import TABLES
from curation.stage import ShardStage, TaskIO
from training.config import Config


class ClusterConfig(Config):
    """How the pool is cut into clusters."""

    num_clusters: int = Field(1000, ge=1, description="fewer where the sample has fewer pictures; 100,000 in the paper")
    iterations: int = Field(20, ge=1)
    sample: int = Field(2_000_000, ge=1, description="pictures that the fit sees")
    seed: int = 0


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
        cluster, similarity = kmeans.assign(vectors_of(table)[at], centroids, device=io.device)
        schema = TABLES["clusters"].schema
        return {"clusters": pa.table([io.rows["image_id"], pa.array(cluster), pa.array(similarity)], schema=schema)}
