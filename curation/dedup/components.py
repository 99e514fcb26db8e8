"""Components of copies, one picture kept for each: the paper's self-deduplication.

``component`` keeps one picture of each connected component, as DINOv2 does (arXiv:2304.07193, appendix A.3). ``star``
keeps every picture that is no copy of a kept one, so that a chain of copies does not swallow what is not alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.edges import EdgesConfig, checked_threshold, is_copy
from curation.dedup.groups import ranks_of, representatives, stars
from curation.dedup.near import rows_at
from curation.dedup.unionfind import UnionFind
from curation.schema import TABLES, id_range
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, verdict_table
from training.config import EXECUTION, Config

Policy = Literal["component", "star"]


class DuplicatesConfig(Config):
    """From which cosine on two pictures are copies, and who is kept."""

    threshold: float | None = Field(None, gt=-1, lt=1)  # None = the descriptor's
    policy: Policy = "component"
    # A larger component is told at the end of a run: it hints at a threshold that is too low.
    max_component: int = Field(1000, ge=2, json_schema_extra=EXECUTION, description="pictures")
    max_share: float = Field(0.01, gt=0, le=1, json_schema_extra=EXECUTION, description="of what near kept")

    def resolved_threshold(self, descriptor: DescriptorConfig, edges: EdgesConfig) -> float:
        """The threshold in use.

        Raises:
            ConfigError: it lies below the floor of the stored edges, or nobody knows one.
        """
        value = descriptor.thresholds().duplicate if self.threshold is None else self.threshold
        return checked_threshold("duplicates.threshold", value, edges.floors(descriptor)[0], "floor")


# --- pure functions -------------------------------------------------------------------------------------------------


def component_sizes(component: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sizes that components of two or more have, ascending, and how many components have each, int64.

    Args:
        component: number of the component of each node, int64 [N].
    """
    _, size = np.unique(component, return_counts=True)
    sizes, num = np.unique(size[size > 1], return_counts=True)
    return sizes.astype(np.int64), num.astype(np.int64)


def sweep_thresholds(floor: float, in_use: float) -> np.ndarray:
    """The floor, every hundredth above it up to 1, and the threshold in use, float64 [T], ascending."""
    hundredths = np.arange(int(np.floor(floor * 100)) + 1, 101) / 100
    return np.unique(np.round([floor, in_use, *hundredths], 6))


# --- tasks ----------------------------------------------------------------------------------------------------------


class _Edges:
    """Edges of a run, part by part, their ends as positions among the pictures that have any, int32.

    Holds 8 bytes for each such picture, and one part at a time.
    """

    def __init__(self, io: TaskIO, num_parts: int, threshold: float) -> None:
        self._io, self._num_parts, self._threshold = io, num_parts, threshold
        self.ids = np.empty(0, np.int64)
        for a, b, _ in self._parts():
            self.ids = np.union1d(self.ids, np.concatenate([a, b]))

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for a, b, similarity in self._parts():
            yield *(np.searchsorted(self.ids, end).astype(np.int32) for end in (a, b)), similarity  # type: ignore[misc]

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for index in range(self._num_parts):
            edges = self._io.read(self._io.part("edges", index))
            edges = edges.filter(pa.array(is_copy(edges, self._threshold)))
            yield edges["a"].to_numpy(), edges["b"].to_numpy(), edges["similarity"].to_numpy()


def components_of_edges(
    io: TaskIO, *, shards: list[int], num_parts: int, threshold: float, policy: Policy
) -> tuple[pa.Table, pa.Table]:
    """The tables ``components`` and ``component_sizes``.

    Edges are read twice, part by part. Policy ``component`` holds 16 bytes for each picture that has one, ``star`` 8
    more for each edge; then both hold what ranks the pictures (``ranks_of``).
    """
    edges = _Edges(io, num_parts, threshold)
    ids = edges.ids
    graph, best = UnionFind(len(ids)), np.full(len(ids), -1, np.float32)
    held: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int32), np.empty(0, np.int32))]
    for a, b, similarity in edges:
        graph.add(a, b)
        for end in (a, b):
            np.maximum.at(best, end, similarity)
        if policy == "star":
            held.append((a, b))
    component = graph.labels().astype(np.int64)
    rank, _ = ranks_of(io, ids, shards)
    if policy == "star":
        representative = stars(rank, *(np.concatenate(column) for column in zip(*held, strict=True)))
    else:
        representative = representatives(component, rank)
    columns = [ids, ids[component], ids[representative], best]
    return (
        pa.table(columns, schema=TABLES["components"].schema),
        pa.table(list(component_sizes(component)), schema=TABLES["component_sizes"].schema),
    )


def sweep_of_edges(io: TaskIO, *, num_parts: int, floor: float, threshold: float) -> pa.Table:
    """The table ``component_sweep``: components at every threshold, from one pass that adds edges from the highest on.

    Holds 9 bytes an edge and 16 for each picture that has one.
    """
    edges = _Edges(io, num_parts, floor)
    thresholds = sweep_thresholds(floor, threshold)
    limits = thresholds.astype(np.float32)
    steps = [(np.searchsorted(limits, s, "right").astype(np.uint8), a, b) for a, b, s in edges]
    nothing = (np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0, np.int32))
    step, a, b = (np.concatenate(column) for column in zip(nothing, *steps, strict=True))
    graph, num_edges, rows = UnionFind(len(edges.ids), counts=True), 0, []
    for place in range(len(thresholds), 0, -1):
        mine = step == place
        graph.add(a[mine], b[mine])
        num_edges += int(mine.sum())
        tally = graph.tally()
        dropped = tally.num_nodes - tally.num_components
        at = thresholds[place - 1]
        in_use = bool(at == round(threshold, 6))
        rows.append((at, num_edges, tally.num_components, tally.num_nodes, dropped, tally.largest, in_use))
    columns = [pa.array(column) for column in zip(*reversed(rows), strict=True)]
    schema = TABLES["component_sweep"].schema
    return pa.table([column.cast(kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)


# --- stages ---------------------------------------------------------------------------------------------------------


class Components(GlobalStage):
    """Who is a copy of whom."""

    name = "components"
    section = "duplicates"
    reads = ("edges", "near", "hashes", "images")
    writes = ("components", "component_sizes", "component_sweep")
    version = 2
    config: DuplicatesConfig

    def __init__(self, config: DuplicatesConfig, descriptor: DescriptorConfig, edges: EdgesConfig) -> None:
        super().__init__(config)
        self.threshold = config.resolved_threshold(descriptor, edges)
        self.floor = edges.floors(descriptor)[0]
        self.num_parts = edges.num_lists

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its threshold resolved."""
        return {**super().fingerprint_values(), "threshold": self.threshold}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One task over all edges, and one that sweeps the threshold over them."""
        shards = context.shards("pool")
        edges = tuple(context.part("edges", index) for index in range(self.num_parts))
        pictures = tuple(context.part(table, shard) for table in ("near", "hashes", "images") for shard in shards)
        args = {"shards": shards, "threshold": self.threshold, "policy": self.config.policy}
        map(
            [
                Task(
                    function=components_of_edges,
                    args={**args, "num_parts": self.num_parts},
                    reads=edges + pictures,
                    writes=context.part("components", 0),
                    also=(context.part("component_sizes", 0),),
                ),
                Task(
                    function=sweep_of_edges,
                    args={"num_parts": self.num_parts, "floor": self.floor, "threshold": self.threshold},
                    reads=edges,
                    writes=context.part("component_sweep", 0),
                ),
            ]
        )

    def told(self, context: Context) -> Iterator[str]:
        """Whether the largest component is too large."""
        sizes = context.read(context.part("component_sizes", 0), ["size"])["size"].to_pylist()
        largest = max(sizes, default=1)
        num_pictures = sum(context.num_rows(context.part("near", shard)) for shard in context.shards("pool"))
        most = min(self.config.max_component, max(2, int(self.config.max_share * num_pictures)))
        if largest > most:
            yield (
                f"duplicates: the largest component holds {largest:,} pictures of {num_pictures:,} (alarm above "
                f"{most:,}); raise duplicates.threshold above {self.threshold:g} (lvd sql component_sweep tells what "
                "each would do), or set duplicates.policy=star"
            )


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
        ids = io.rows["image_id"].to_numpy()
        table = io.read(io.part("components", 0), within=("image_id", *id_range(shard, shard)))
        place = rows_at(ids, table["image_id"].to_numpy())
        component, representative = ids.copy(), ids.copy()
        component[place] = table["component_id"].to_numpy()
        representative[place] = table["representative_id"].to_numpy()
        score = np.full(len(ids), np.nan, np.float32)
        score[place] = table["similarity"].to_numpy()
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
