"""Leakage: pool pictures that show what a benchmark shows are dropped, so that evaluation stays honest.

``component`` drops a whole component of copies when one of its pictures touches a benchmark picture, as DINOv2 does
(arXiv:2304.07193, appendix A.3); ``direct`` drops a picture for edges of its own only. Benchmarks drop pool pictures
and lose none themselves. A picture of a set that is taken as it is and shows what a benchmark shows is left out of that
set by ``selection``; it stays a query, since what a query pulls in is the pictures beside it, which are judged here.

``touches`` and ``leaks`` are made by groups of shards, so that each edge is read once and a shard reads its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.edges import EdgesConfig, checked_threshold, is_copy
from curation.retrieve.retrieve import groups_of
from curation.schema import ROWS_PER_SHARD_LIMIT, SHARDS_PER_SOURCE_LIMIT, TABLES, id_range, part_of_group
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, verdict_table
from training.config import Config

_MAX_PENDING = 1 << 20  # edges gathered before the best of each picture are picked out


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


# --- pure functions -------------------------------------------------------------------------------------------------


class Touches(NamedTuple):
    """Edges to benchmark pictures, arrays of one length."""

    unit: np.ndarray  # int64 [E], the picture or component that is judged
    image_id: np.ndarray  # int64 [E], the picture that has the edge
    reference_id: np.ndarray  # int64 [E]
    similarity: np.ndarray  # float32 [E]
    leaks: np.ndarray  # bool [E], the edge joins copies

    def take(self, at: np.ndarray) -> Touches:
        """Edges at some places."""
        return Touches(*(column[at] for column in self))


NO_TOUCHES = Touches(*(np.zeros(0, kind) for kind in (np.int64, np.int64, np.int64, np.float32, bool)))


def joined(parts: Sequence[Touches]) -> Touches:
    """Edges of all parts."""
    return Touches(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def best_of_units(edges: Touches) -> Touches:
    """The edge of each unit that says most: copies before others, then the most similar, then the least ids.

    Returns:
        One edge a unit, units ascending.
    """
    order = np.lexsort((edges.image_id, edges.reference_id, -edges.similarity, ~edges.leaks, edges.unit))
    units = edges.unit[order]
    return edges.take(order[np.flatnonzero(np.diff(units, prepend=-1))])


def through_components(own: Touches, best: Touches, members: np.ndarray, component: np.ndarray) -> Touches:
    """The edge that decides about each touched picture: a copy of its own, else the best of its component.

    Args:
        own: best edges of pictures, by picture.
        best: best edges of components, by component.
        members: pictures that are in a component, int64 [M], ascending.
        component: of each of them, int64 [M].

    Returns:
        By picture, units ascending; ``image_id`` is the picture that has the edge.
    """
    place = np.minimum(np.searchsorted(best.unit, component), max(0, len(best.unit) - 1))
    touched = np.flatnonzero(best.unit[place] == component) if len(best.unit) else np.zeros(0, np.int64)
    through = best.take(place[touched])._replace(unit=members[touched])
    decides = own.leaks | ~np.isin(own.unit, members)
    through = through.take(np.flatnonzero(~np.isin(through.unit, own.unit[decides])))
    found = joined([own.take(np.flatnonzero(decides)), through])
    return found.take(np.argsort(found.unit, kind="stable"))


def component_of(ids: np.ndarray, members: np.ndarray, component: np.ndarray) -> np.ndarray:
    """Component of each picture, itself where it is in none; ``members`` ascending."""
    if len(members) == 0:
        return ids
    place = np.minimum(np.searchsorted(members, ids), len(members) - 1)
    return np.asarray(np.where(members[place] == ids, component[place], ids))


def source_of(ids: np.ndarray) -> np.ndarray:
    """``source_id`` of each picture, int64."""
    return np.asarray(ids // ROWS_PER_SHARD_LIMIT // SHARDS_PER_SOURCE_LIMIT)


# --- tasks ----------------------------------------------------------------------------------------------------------


def touched_pictures(
    io: TaskIO, *, shards: list[int], edges: list[int], components: bool, benchmarks: list[int] | None, threshold: float
) -> pa.Table:
    """One part of ``touches``: the best edge of each picture of a group of shards.

    Args:
        io: of the task.
        shards: of the group, ascending.
        edges: parts of ``reference_edges``; each is read by the range of the group.
        components: a picture stands for its component.
        benchmarks: source_ids that count; None: all.
        threshold: from which on an edge that nobody verified joins copies.
    """
    within = ("image_id", *id_range(shards[0], shards[-1]))
    best, pending, num = NO_TOUCHES, [NO_TOUCHES], 0
    for index in edges:
        table = io.read(io.part("reference_edges", index), within=within)
        pictures, references = table["image_id"].to_numpy(), table["reference_id"].to_numpy()
        found = Touches(pictures, pictures, references, table["similarity"].to_numpy(), is_copy(table, threshold))
        if benchmarks is not None:
            found = found.take(np.flatnonzero(np.isin(source_of(references), benchmarks)))
        pending.append(found)
        num += len(found.unit)
        if num > max(_MAX_PENDING, len(best.unit)):
            best, pending, num = best_of_units(joined([best, *pending])), [], 0
    best = best_of_units(joined([best, *pending]))
    component = component_of(best.image_id, *_members(io, shards)) if components else best.image_id
    columns = [best.image_id, component, best.reference_id, best.similarity, best.leaks]
    return pa.table([pa.array(column) for column in columns], schema=TABLES["touches"].schema)


def leaks_of_group(io: TaskIO, *, shards: list[int], components: bool, groups: list[int]) -> pa.Table:
    """One part of ``leaks``: what decides about each touched picture of a group of shards.

    Args:
        io: of the task.
        shards: of the group, ascending.
        components: pictures leak through their component.
        groups: parts of ``touches``: the own one, or all of them where a component may be touched from anywhere.
    """
    own = _touches(io, shards[0])
    found = own._replace(unit=own.image_id)
    if components:
        members, component = _members(io, shards)
        here = np.unique(component)
        best = NO_TOUCHES
        for group in groups:
            touches = _touches(io, group)
            best = best_of_units(joined([best, touches.take(np.flatnonzero(np.isin(touches.unit, here)))]))
        found = through_components(found, best, members, component)
    columns = [found.unit, found.reference_id, found.image_id, found.similarity, found.leaks]
    return pa.table([pa.array(column) for column in columns], schema=TABLES["leaks"].schema)


def _members(io: TaskIO, shards: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of a group that are in a component of two or more, ascending, and its id."""
    within = ("image_id", *id_range(shards[0], shards[-1]))
    table = io.read(io.part("components", 0), ["image_id", "component_id"], within=within)
    return table["image_id"].to_numpy(), table["component_id"].to_numpy()


def _touches(io: TaskIO, group: int) -> Touches:
    """Rows of a part of ``touches``, by component."""
    table = io.read(io.part("touches", group)).combine_chunks()
    names = ("component_id", "image_id", "reference_id", "similarity", "leaks")
    return Touches(*(table[name].to_numpy() for name in names))


# --- stages ---------------------------------------------------------------------------------------------------------


class Leaks(GlobalStage):
    """Which pictures a benchmark touches, and by which edge; of the pool and of sets that are taken as they are.

    Two tasks for each group of shards. One reads each part of ``reference_edges`` by its range and holds about 150
    bytes for each touched picture of the group. The other holds 16 bytes for each picture of the group that is in a
    component, and, one part after the other, the 29 bytes a row of ``touches``: all of them are read once a group, and
    there are at most 64 groups, so that the work grows with the pictures that are touched.
    """

    name = "leaks"
    section = "leakage"
    reads = ("reference_edges", "components")
    writes: ClassVar[tuple[str, ...]] = ("leaks", "touches")
    config: LeakageConfig

    def __init__(self, config: LeakageConfig, descriptor: DescriptorConfig, edges: EdgesConfig) -> None:
        super().__init__(config)
        self.threshold = config.resolved_threshold(descriptor, edges)

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its threshold resolved."""
        return {**super().fingerprint_values(), "threshold": self.threshold}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Edges by picture, then what they decide."""
        named = self.config.benchmarks
        sources = context.sources().to_pylist()
        benchmarks = None if named is None else [row["source_id"] for row in sources if row["name"] in named]
        components = self.config.mode == "component"
        groups = groups_of(context.shards(*TABLES["leaks"].roles))
        edges = context.parts("reference_edges")
        of_components = (context.part("components", 0),) if components else ()
        args: dict[str, Any] = {"edges": [part.index for part in edges], "components": components}
        args |= {"benchmarks": benchmarks, "threshold": self.threshold}
        touches = [
            Task(
                function=touched_pictures,
                args={"shards": shards, **args},
                reads=(*edges, *of_components),
                writes=context.part("touches", shards[0]),
            )
            for shards in groups
        ]
        map(touches)
        tasks = []
        for shards, own in zip(groups, (task.writes for task in touches), strict=True):
            reads = [task.writes for task in touches] if components else [own]
            args = {"shards": shards, "components": components, "groups": [part.index for part in reads]}
            writes = context.part("leaks", shards[0])
            tasks.append(Task(function=leaks_of_group, args=args, reads=(*reads, *of_components), writes=writes))
        map(tasks)


class Leakage(ShardStage):
    """Drops pool pictures that are copies of benchmark pictures: reason leak."""

    name = "leakage"
    section = "leakage"
    version = 2
    kind = "verdict"
    after = "duplicates"
    reads: ClassVar[tuple[str, ...]] = ("duplicates", "leaks", "sources")
    writes = ("leakage",)
    config: LeakageConfig

    def __init__(self, config: LeakageConfig, descriptor: DescriptorConfig, edges: EdgesConfig) -> None:
        super().__init__(config)
        self.threshold = config.resolved_threshold(descriptor, edges)

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its threshold resolved."""
        return {**super().fingerprint_values(), "threshold": self.threshold}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each picture that duplicates kept."""
        sources = io.table("sources", ["source_id", "name"])
        names = dict(zip(sources["source_id"].to_pylist(), sources["name"].to_pylist(), strict=True))
        rows = leaks_of_shard(io, shard)
        at = _places(rows["image_id"].to_numpy(), io.rows["image_id"].to_numpy())
        rows = rows.take(pa.array(at, mask=at < 0)).combine_chunks()  # nulls where a picture is touched by nothing
        reference = rows["reference_id"].to_pylist()
        leaks = rows["leaks"].fill_null(False).to_pylist()
        threshold = np.float32(self.threshold)
        verdict = verdict_table(
            "leakage",
            io.rows,
            reason=["leak" if leak else None for leak in leaks],
            score=rows["similarity"],
            threshold=[None if one is None else threshold for one in reference],
            reference_id=rows["reference_id"],
            benchmark=[None if one is None else names.get(int(source_of(one))) for one in reference],
        )
        return {"leakage": verdict}


def leaks_of_shard(io: TaskIO, shard: int) -> pa.Table:
    """Rows of ``leaks`` of one shard, by image_id."""
    part = part_of_group(io.parts("leaks"), shard)
    return io.read(part, within=("image_id", *id_range(shard, shard)))


def _places(there: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Place of each wanted id among ascending ones, int64; -1 where it is not there."""
    if len(there) == 0:
        return np.full(len(wanted), -1, np.int64)
    place = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    return np.where(there[place] == wanted, place, -1)
