"""Leakage: pool pictures that show what a benchmark shows are dropped, so that evaluation stays honest.

``component`` drops a whole component of copies when one of its pictures touches a benchmark picture, as DINOv2 does
(arXiv:2304.07193, appendix A.3); ``direct`` drops a picture for edges of its own only. Benchmarks drop pool pictures
and lose none themselves.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.edges import EdgesConfig, checked_threshold
from curation.schema import ROWS_PER_SHARD_LIMIT, SHARDS_PER_SOURCE_LIMIT
from curation.stage import ShardStage, TaskIO, verdict_table
from training.config import Config


class LeakageConfig(Config):
    """From which cosine on a pool picture leaks, and against which benchmarks."""

    threshold: float | None = Field(None, gt=-1, lt=1)  # None = the descriptor's
    mode: Literal["component", "direct"] = "component"
    benchmarks: tuple[str, ...] | None = None  # names of sources; None = all benchmarks of the recipe

    def resolved_threshold(self, descriptor: DescriptorConfig, edges: EdgesConfig) -> float:
        """The threshold in use.

        Raises:
            ConfigError: it lies below the floor of the stored edges, or nobody knows one.
        """
        value = descriptor.thresholds().leakage if self.threshold is None else self.threshold
        return checked_threshold("leakage.threshold", value, edges.floors(descriptor)[1], "reference_floor")


def best_reference(
    unit_of_row: np.ndarray, unit_of_edge: np.ndarray, reference_id: np.ndarray, similarity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Most similar reference that the unit (picture or component) of each row touches; ties go to the least id.

    Args:
        unit_of_row: id of the unit of each row, int64 [N].
        unit_of_edge: id of the unit of the pool end of each edge, int64 [E].
        reference_id: int64 [E].
        similarity: float32 [E].

    Returns:
        reference_id, int64 [N], -1 where none, and similarity, float32 [N], NaN where none.
    """
    reference = np.full(len(unit_of_row), -1, np.int64)
    score = np.full(len(unit_of_row), np.nan, np.float32)
    if len(unit_of_edge) == 0:
        return reference, score
    order = np.lexsort((reference_id, -similarity, unit_of_edge))
    units, first = np.unique(unit_of_edge[order], return_index=True)
    place = np.minimum(np.searchsorted(units, unit_of_row), len(units) - 1)
    touches = units[place] == unit_of_row
    best = order[first[place[touches]]]
    reference[touches], score[touches] = reference_id[best], similarity[best]
    return reference, score


class Leakage(ShardStage):
    """Drops pool pictures that are copies of benchmark pictures: reason leak."""

    name = "leakage"
    section = "leakage"
    kind = "verdict"
    after = "duplicates"
    reads: ClassVar[tuple[str, ...]] = ("duplicates", "components", "reference_edges", "sources")
    writes = ("leakage",)
    config: LeakageConfig

    def __init__(self, config: LeakageConfig, descriptor: DescriptorConfig, edges: EdgesConfig) -> None:
        super().__init__(config)
        self.threshold = config.resolved_threshold(descriptor, edges)
        self.num_parts = edges.num_lists

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its threshold resolved."""
        return {**super().fingerprint_values(), "threshold": self.threshold}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each picture that duplicates kept."""
        del shard
        ids = io.rows["image_id"].to_numpy()
        sources = io.table("sources", ["source_id", "name"])
        names = dict(zip(sources["source_id"].to_pylist(), sources["name"].to_pylist(), strict=True))

        edges = pa.concat_tables([io.read(io.part("reference_edges", index)) for index in range(self.num_parts)])
        pictures, references = edges["image_id"].to_numpy(), edges["reference_id"].to_numpy()
        similarity = edges["similarity"].to_numpy()
        if self.config.benchmarks is not None:
            benchmark = [names.get(source) for source in source_of(references)]
            keep = np.isin(np.array(benchmark, object), list(self.config.benchmarks))
            pictures, references, similarity = pictures[keep], references[keep], similarity[keep]

        row_unit, edge_unit = ids, pictures
        if self.config.mode == "component":
            components = io.table("components", ["image_id", "component_id"])
            members, component = components["image_id"].to_numpy(), components["component_id"].to_numpy()
            row_unit, edge_unit = component_of(ids, members, component), component_of(pictures, members, component)
        reference, score = best_reference(row_unit, edge_unit, references, similarity)
        touched = reference >= 0
        leaks = touched & (score >= np.float32(self.threshold))
        verdict = verdict_table(
            "leakage",
            io.rows,
            reason=["leak" if leak else None for leak in leaks],
            score=score,
            threshold=np.where(touched, np.float32(self.threshold), np.nan).astype(np.float32),
            reference_id=pa.array(reference, mask=~touched),
            benchmark=[names.get(s) if t else None for s, t in zip(source_of(reference), touched, strict=True)],
        )
        return {"leakage": verdict}


def source_of(ids: np.ndarray) -> list[int]:
    """``source_id`` of each picture."""
    return [int(source) for source in ids // ROWS_PER_SHARD_LIMIT // SHARDS_PER_SOURCE_LIMIT]


def component_of(ids: np.ndarray, members: np.ndarray, component: np.ndarray) -> np.ndarray:
    """Component of each picture, itself where it is in none; ``members`` ascending."""
    if len(members) == 0:
        return ids
    place = np.minimum(np.searchsorted(members, ids), len(members) - 1)
    return np.asarray(np.where(members[place] == ids, component[place], ids))
