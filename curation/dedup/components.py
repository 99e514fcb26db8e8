"""Components of copies, one picture kept for each: the paper's self-deduplication.

``component`` keeps one picture of each connected component, as DINOv2 does (arXiv:2304.07193, appendix A.3). ``star``
keeps every picture that is no copy of a kept one, so that a chain of copies does not swallow what is not alike.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.edges import EdgesConfig, checked_threshold, is_copy
from curation.dedup.groups import connected_components, ranks_of, representatives, stars
from curation.dedup.near import rows_at
from curation.schema import TABLES
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, verdict_table
from training.config import EXECUTION, Config

Policy = Literal["component", "star"]


class DuplicatesConfig(Config):
    """From which cosine on two pictures are copies, and who is kept."""

    threshold: float | None = Field(None, gt=-1, lt=1)  # None = the descriptor's
    policy: Policy = "component"
    # A larger component is reported: it hints at a threshold that is too low.
    max_component: int = Field(1000, ge=2, json_schema_extra=EXECUTION)

    def resolved_threshold(self, descriptor: DescriptorConfig, edges: EdgesConfig) -> float:
        """The threshold in use.

        Raises:
            ConfigError: it lies below the floor of the stored edges, or nobody knows one.
        """
        value = descriptor.thresholds().duplicate if self.threshold is None else self.threshold
        return checked_threshold("duplicates.threshold", value, edges.floors(descriptor)[0], "floor")


# --- pure functions -------------------------------------------------------------------------------------------------


def group_copies(a: np.ndarray, b: np.ndarray, *, rank: np.ndarray, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """Component and representative of each node.

    Args:
        a: node, int64 [E].
        b: node, int64 [E].
        rank: rank as representative, int64 [N], distinct.
        policy: who is kept.

    Returns:
        Least node of the component, and node of the representative, int64 [N] each.
    """
    component = connected_components(len(rank), a, b)
    return component, representatives(component, rank) if policy == "component" else stars(rank, a, b)


def highest_similarity(num_nodes: int, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Highest similarity of an edge of each node, float32 [N]; -1 where it has none."""
    best = np.full(num_nodes, -1, np.float32)
    np.maximum.at(best, a, similarity)
    np.maximum.at(best, b, similarity)
    return best


def component_sizes(component: np.ndarray) -> dict[int, int]:
    """Histogram: size of a component to the number of components of that size."""
    _, size = np.unique(component, return_counts=True)
    return {int(n): int(count) for n, count in zip(*np.unique(size, return_counts=True), strict=True)}


# --- stages ---------------------------------------------------------------------------------------------------------


def components_of_edges(
    io: TaskIO, *, shards: list[int], num_parts: int, threshold: float, policy: Policy, max_component: int
) -> pa.Table:
    """The table ``components`` from all parts of ``edges``."""
    edges = pa.concat_tables([io.read(io.part("edges", index)) for index in range(num_parts)])
    similarity = edges["similarity"].to_numpy()
    high = is_copy(edges, threshold)
    a, b, similarity = edges["a"].to_numpy()[high], edges["b"].to_numpy()[high], similarity[high]
    ids = np.unique(np.concatenate([a, b]))
    a, b = np.searchsorted(ids, a), np.searchsorted(ids, b)
    rank, _ = ranks_of(io, ids, shards)
    component, representative = group_copies(a, b, rank=rank, policy=policy)
    largest = int(np.bincount(component).max()) if len(ids) else 0
    if largest > max_component:
        logging.getLogger(__name__).warning(
            "duplicates: the largest component holds %d pictures (alarm at %d); raise duplicates.threshold above %g, "
            "or set duplicates.policy=star",
            largest,
            max_component,
            threshold,
        )
    best = highest_similarity(len(ids), a, b, similarity)
    return pa.table([ids, ids[component], ids[representative], best], schema=TABLES["components"].schema)


class Components(GlobalStage):
    """Who is a copy of whom."""

    name = "components"
    section = "duplicates"
    reads = ("edges", "near", "hashes", "images")
    writes = ("components",)
    config: DuplicatesConfig

    def __init__(self, config: DuplicatesConfig, descriptor: DescriptorConfig, edges: EdgesConfig) -> None:
        super().__init__(config)
        self.threshold = config.resolved_threshold(descriptor, edges)
        self.num_parts = edges.num_lists

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its threshold resolved."""
        return {**super().fingerprint_values(), "threshold": self.threshold}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One task over all edges."""
        shards = context.shards("pool")
        args = {
            "shards": shards,
            "num_parts": self.num_parts,
            "threshold": self.threshold,
            "policy": self.config.policy,
            "max_component": self.config.max_component,
        }
        reads = tuple(context.part("edges", index) for index in range(self.num_parts)) + tuple(
            context.part(table, shard) for table in ("near", "hashes", "images") for shard in shards
        )
        writes = context.part("components", 0)
        map([Task(function=components_of_edges, args=args, reads=reads, writes=writes)])


class Duplicates(ShardStage):
    """Drops copies: every picture that another one stands for."""

    name = "duplicates"
    section = "duplicates"
    kind = "verdict"
    after = "near"
    reads: ClassVar[tuple[str, ...]] = ("near", "components")
    writes = ("duplicates",)
    config: DuplicatesConfig

    def __init__(self, config: DuplicatesConfig, descriptor: DescriptorConfig, edges: EdgesConfig) -> None:
        super().__init__(config)
        self.threshold = config.resolved_threshold(descriptor, edges)

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its threshold resolved."""
        return {**super().fingerprint_values(), "threshold": self.threshold}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each picture that near kept."""
        del shard
        ids = io.rows["image_id"].to_numpy()
        table = io.table("components")
        mine = np.flatnonzero(np.isin(table["image_id"].to_numpy(), ids))
        place = rows_at(ids, table["image_id"].to_numpy()[mine])
        component, representative = ids.copy(), ids.copy()
        component[place] = table["component_id"].to_numpy()[mine]
        representative[place] = table["representative_id"].to_numpy()[mine]
        score = np.full(len(ids), np.nan, np.float32)
        score[place] = table["similarity"].to_numpy()[mine]
        threshold = np.where(np.isnan(score), np.nan, np.float32(self.threshold)).astype(np.float32)
        verdict = verdict_table(
            "duplicates",
            io.rows,
            reason=[None if one == own else "copy" for one, own in zip(representative, ids, strict=True)],
            score=score,
            threshold=threshold,
            component_id=component,
            representative_id=representative,
        )
        return {"duplicates": verdict}
