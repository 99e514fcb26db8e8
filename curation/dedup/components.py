"""Components of copies, one picture kept for each: the paper's self-deduplication.

``component`` keeps one picture of each connected component, as DINOv2 does (arXiv:2304.07193, appendix A.3). ``star``
keeps every picture that is no copy of a kept one, so that a chain of copies does not swallow what is not alike.

Parts of ``edges`` are read one at a time, and no edge is held but with policy ``star``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.edges import EdgesConfig, checked_threshold, is_copy
from curation.dedup.near import rows_at
from curation.dedup.representatives import Election, Stars, picture_sizes, ranks_of
from curation.dedup.sweep import Sweep, grid
from curation.dedup.unionfind import Numbers, UnionFind
from curation.schema import TABLES, id_range
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, verdict_table
from training.config import EXECUTION, Config

Policy = Literal["component", "star"]
Counts = Callable[[pa.Table], np.ndarray]  # which edges count, bool [E]
Strength = Callable[[pa.Table], np.ndarray]  # up to which threshold an edge counts, float32 [E]
FEW = 20  # a component of fewer is never told: in a small pool some copies of one picture are a large share


class DuplicatesConfig(Config):
    """From which cosine on two pictures are copies, and who is kept."""

    threshold: float | None = Field(None, gt=-1, lt=1)  # None = the descriptor's
    policy: Policy = "component"
    # A larger component is told at the end of the stage: it hints at a threshold that is too low.
    max_component: int = Field(1000, ge=2, json_schema_extra=EXECUTION, description="pictures")
    max_share: float = Field(
        0.01, gt=0, le=1, json_schema_extra=EXECUTION, description="of what near kept; of 20 pictures at least"
    )

    def resolved_threshold(self, descriptor: DescriptorConfig, edges: EdgesConfig) -> float:
        """The threshold in use.

        Raises:
            ConfigError: it lies below the floor of the stored edges, or nobody knows one.
        """
        value = descriptor.thresholds().duplicate if self.threshold is None else self.threshold
        return checked_threshold("duplicates.threshold", value, edges.floors(descriptor)[0], "floor")


# --- reading --------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Some edges between different pictures, all of which count."""

    a: np.ndarray  # int64 [E], image_id; uint32 once numbered
    b: np.ndarray  # the same
    similarity: np.ndarray  # float32 [E]


def cosine(edges: pa.Table) -> np.ndarray:
    """Similarity of each edge, float32 [E]."""
    return np.asarray(edges["similarity"].to_numpy())


def chunks_of(io: TaskIO, num_parts: int, counts: Counts, strength: Strength = cosine) -> Iterator[Chunk]:
    """The edges that count, one part of ``edges`` after the other."""
    for index in range(num_parts):
        edges = io.read(io.part("edges", index))
        a, b = edges["a"].to_numpy(), edges["b"].to_numpy()
        at = np.flatnonzero(counts(edges) & (a != b))
        yield Chunk(a[at], b[at], strength(edges)[at])


class NumberedEdges:
    """Edges that count, with numbers in place of ids: parts are read once for the numbers, and once for each look."""

    def __init__(
        self,
        io: TaskIO,
        *,
        shards: list[int],
        shard_rows: int,
        num_parts: int,
        counts: Counts,
        strength: Strength = cosine,
    ) -> None:
        self._read: tuple[TaskIO, int, Counts, Strength] = (io, num_parts, counts, strength)
        self.numbers = Numbers(shards, shard_rows)
        for chunk in chunks_of(*self._read):
            self.numbers.see(chunk.a)
            self.numbers.see(chunk.b)
        self.numbers.close()

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in chunks_of(*self._read):
            yield Chunk(self.numbers.of(chunk.a), self.numbers.of(chunk.b), chunk.similarity)


# --- tasks ----------------------------------------------------------------------------------------------------------


def components_of_edges(
    io: TaskIO, *, shards: list[int], shard_rows: int, num_parts: int, threshold: float, policy: Policy
) -> tuple[pa.Table, pa.Table]:
    """The tables ``components`` and ``component_sizes`` from all parts of ``edges``.

    Memory: 4 bytes for each picture in a counted edge while components are found, and 0.2 for each row of the pool;
    with representatives and the table, whose row has 28 bytes, about 60 a picture, 140 with policy ``star``.
    """
    from curation.dedup.unionloops import number_components, raise_to

    edges = NumberedEdges(
        io, shards=shards, shard_rows=shard_rows, num_parts=num_parts, counts=lambda table: is_copy(table, threshold)
    )
    numbers = edges.numbers
    union, highest = UnionFind(len(numbers)), np.full(len(numbers), -1, np.float32)
    for chunk in edges:
        union.add(chunk.a, chunk.b)
        raise_to(highest, *chunk)
    component = union.labels()
    leasts = np.flatnonzero(component == np.arange(len(component), dtype=np.uint32)).astype(np.uint32)
    number_components(component)
    ids = numbers.ids()
    kept = _elected(io, numbers, component, len(leasts)) if policy == "component" else _centres(io, edges, ids)
    columns = [ids, ids[leasts][component], ids[kept], highest]
    table = pa.table([pa.array(column) for column in columns], schema=TABLES["components"].schema)
    num_pictures = sum(num_kept(io, shard) for shard in shards)
    return table, sizes_table(np.bincount(component), num_pictures)


def _elected(io: TaskIO, numbers: Numbers, component: np.ndarray, num_components: int) -> np.ndarray:
    """Node of the best picture of each node's component, uint32 [N]."""
    election = Election(num_components)
    for place, shard in enumerate(numbers.shards.tolist()):
        first, ids = numbers.of_shard(place)
        if len(ids):
            pixels, num_bytes, sha256 = picture_sizes(io, shard, ids)
            group = component[first : first + len(ids)]
            election.add(group, first, pixels=pixels, num_bytes=num_bytes, sha256=sha256)
    return np.asarray(election.node[component])


def _centres(io: TaskIO, edges: NumberedEdges, ids: np.ndarray) -> np.ndarray:
    """Node of the centre of each node's star, uint32 [N]."""
    rank, _ = ranks_of(io, ids, edges.numbers.shards.tolist())
    found = Stars(len(rank))
    for chunk in edges:
        found.count(chunk.a, chunk.b)
    for chunk in edges:
        found.list(chunk.a, chunk.b)
    return found.centres(rank)


def num_kept(io: TaskIO, shard: int) -> int:
    """Pictures of a shard that near left."""
    return int(np.count_nonzero(io.read(io.part("near", shard), ["keep"])["keep"].to_numpy()))


def sizes_table(sizes: np.ndarray, num_pictures: int) -> pa.Table:
    """The table ``component_sizes``.

    Args:
        sizes: of each component of two or more, int64 [C].
        num_pictures: of the pool, in a component or not.
    """
    size, num = np.unique(sizes, return_counts=True)
    num_alone = num_pictures - int(sizes.sum())
    if num_alone:
        size, num = np.concatenate([[1], size]), np.concatenate([[num_alone], num])
    return pa.table([pa.array(size, pa.int64()), pa.array(num, pa.int64())], schema=TABLES["component_sizes"].schema)


def sweep_of_edges(
    io: TaskIO, *, shards: list[int], shard_rows: int, num_parts: int, thresholds: list[float], in_use: float
) -> pa.Table:
    """The table ``component_sweep`` from all parts of ``edges``; about 60 bytes for each picture in an edge."""
    common: dict[str, Any] = {"shards": shards, "shard_rows": shard_rows, "num_parts": num_parts}
    edges = NumberedEdges(io, **common, counts=not_refuted, strength=up_to_which_it_counts)
    sweep = Sweep(len(edges.numbers), thresholds)
    for chunk in edges:
        sweep.add(*chunk)
    return sweep.table(in_use)


def up_to_which_it_counts(edges: pa.Table) -> np.ndarray:
    """Highest threshold at which each edge joins copies, float32 [E]: any, where local features agree."""
    agree = edges["verified"].fill_null(False).to_numpy()
    return np.asarray(np.where(agree, np.float32(1), cosine(edges)), np.float32)


def not_refuted(edges: pa.Table) -> np.ndarray:
    """Which edges local features agree on, or were not asked about, bool [E]."""
    return np.asarray(edges["verified"].fill_null(True).to_numpy(), bool)


# --- stages ---------------------------------------------------------------------------------------------------------


class Components(GlobalStage):
    """Who is a copy of whom, and what other thresholds would say."""

    name = "components"
    section = "duplicates"
    version = 2
    reads = ("edges", "near", "hashes", "images")
    writes: ClassVar[tuple[str, ...]] = ("components", "component_sizes", "component_sweep")
    config: DuplicatesConfig

    def __init__(self, config: DuplicatesConfig, descriptor: DescriptorConfig, edges: EdgesConfig) -> None:
        super().__init__(config)
        self.threshold = config.resolved_threshold(descriptor, edges)
        self.floor = edges.floors(descriptor)[0]
        self.num_parts = edges.num_lists
        self.verified, self.min_places = edges.verify != "none", edges.min_places

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its threshold resolved."""
        return {**super().fingerprint_values(), "threshold": self.threshold}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Two tasks over all edges."""
        shards = context.shards("pool")
        rows = [row["shard_rows"] for row in context.sources().to_pylist() if row["role"] == "pool"]
        edges = tuple(context.part("edges", index) for index in range(self.num_parts))
        facts = tuple(context.part(table, shard) for table in ("near", "hashes", "images") for shard in shards)
        common: dict[str, Any] = {"shards": shards, "shard_rows": max(rows, default=1), "num_parts": self.num_parts}
        components = Task(
            function=components_of_edges,
            args={**common, "threshold": self.threshold, "policy": self.config.policy},
            reads=(*edges, *facts),
            writes=context.part("components", 0),
            also=(context.part("component_sizes", 0),),
        )
        sweep = Task(
            function=sweep_of_edges,
            args={**common, "thresholds": grid(self.floor, self.threshold), "in_use": self.threshold},
            reads=edges,
            writes=context.part("component_sweep", 0),
        )
        map([components, sweep])

    def told(self, context: Context) -> Iterator[str]:
        """Whether a component is larger than copies of one picture would make it."""
        table = context.read(context.part("component_sizes", 0))
        size, num = table["size"].to_numpy(), table["num_components"].to_numpy()
        largest, num_pictures = int(size.max(initial=0)), int((size * num).sum())
        if largest > self.config.max_component or largest > max(FEW - 1, self.config.max_share * num_pictures):
            advice = [f"raise duplicates.threshold above {self.threshold:g}"]
            if self.verified:  # copies at any threshold
                advice = [f"raise edges.min_places above {self.min_places}"]
            if self.config.policy != "star":
                advice.append("set duplicates.policy=star")
            sweep = "" if self.verified else "; `lvd sql component_sweep` tells what other thresholds would do"
            yield (
                f"duplicates: the largest component holds {largest:,} of {num_pictures:,} pictures (alarm above "
                f"{self.config.max_component:,} or {self.config.max_share:.1%}): {', or '.join(advice)}{sweep}"
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
