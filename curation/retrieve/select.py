"""Selection: the pictures that go into the set, for whom, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation.dedup.near import rows_at
from curation.ingest.sources import QueryConfig
from curation.retrieve.search import rank_in
from curation.schema import TABLES, id_range, part_of_group, source_of_shard
from curation.stage import ShardStage, TaskIO, verdict_table
from training.config import Config

_NO_REASON = pa.scalar(None, pa.string())


class SelectConfig(Config):
    """How often a picture is taken that is asked for more than once."""

    multiset: bool = Field(
        default=False,
        description="one sample for each time that a set took a picture, as table 15 of the paper counts; "
        "false: one for the first set of the recipe that did",
    )


def choices(offers: pa.Table, rows: pa.Table, cluster: pa.ChunkedArray, *, multiset: bool) -> pa.Table:
    """Samples of the set, of pool pictures.

    Args:
        offers: rows of ``offers`` of these pictures, as sorted there.
        rows: image_id and sha256 of the pictures, in id order.
        cluster: of each of them.
        multiset: a sample for each time that a picture was taken; else for the first time only.
    """
    taken = offers.filter(pc.greater_equal(offers["rank"], 0))
    copy = rank_in(taken["image_id"].to_numpy())
    if not multiset:
        taken, copy = taken.filter(pa.array(copy == 0)), copy[copy == 0]
    at = pa.array(rows_at(rows["image_id"].to_numpy(), taken["image_id"].to_numpy()))
    return _samples(
        {
            **{name: taken[name] for name in ("image_id", "query_id", "query_label", "similarity")},
            "copy": pa.array(copy.astype(np.int32)),
            "sha256": rows["sha256"].take(at),
            "part": taken["query_set"],
            "cluster": cluster.take(at),
        }
    )


def _samples(columns: Mapping[str, Any]) -> pa.Table:
    schema = TABLES["choices"].schema
    return pa.table([columns[name] for name in schema.names], schema=schema)


def selected(offers: pa.Table, rows: pa.Table, cluster: pa.ChunkedArray) -> pa.Table:
    """The verdict over pool pictures: each is taken by its first offer, if that was not cut.

    Args:
        offers: rows of ``offers`` of these pictures, as sorted there.
        rows: image_id and sha256 of the pictures, in id order.
        cluster: of each of them.
    """
    first = offers.filter(pa.array(rank_in(offers["image_id"].to_numpy()) == 0))
    # A picture without any offer has nulls.
    at = pc.index_in(rows["image_id"], value_set=first["image_id"].combine_chunks())
    best = first.take(at).combine_chunks()
    is_cut = pc.less(best["rank"], 0)
    reason = pc.if_else(best["rank"].is_null(), "not_retrieved", pc.if_else(is_cut, "over_cap", _NO_REASON))
    is_kept = reason.is_null()
    return verdict_table(
        "selection",
        rows,
        reason=reason.combine_chunks(),
        score=best["similarity"],
        part=pc.if_else(is_kept, best["query_set"], None),
        query_id=pc.if_else(is_kept, best["query_id"], None),
        similarity=best["similarity"],
        cluster=cluster,
    )


class Selection(ShardStage):
    """Verdict over what leakage kept of the pool, and over the query sets: those taken as they are, are taken whole."""

    name = "selection"
    section = ""
    version = 2
    kind = "verdict"
    after = "leakage"
    reads: ClassVar[tuple[str, ...]] = ("leakage", "offers", "clusters", "sources")
    writes: ClassVar[tuple[str, ...]] = ("selection", "choices")
    roles = ("pool", "query")
    config: SelectConfig

    def __init__(self, config: SelectConfig, queries: Mapping[str, QueryConfig]) -> None:
        super().__init__(config)
        self.queries = queries

    def fingerprint_values(self) -> dict[str, Any]:
        """Modes of the sets, and how often a picture is taken; their order is that of ``offers``."""
        modes = {name: query.mode for name, query in self.queries.items()}
        return {"queries": modes, "select.multiset": self.config.multiset}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Judge the rows of a shard."""
        found = io.table("clusters", ["image_id", "cluster"])
        at = rows_at(found["image_id"].to_numpy(), io.rows["image_id"].to_numpy())
        cluster = found["cluster"].take(pa.array(at))
        if io.role == "query":
            return self._of_query_set(shard, io, cluster)
        part = part_of_group(io.parts("offers"), shard)
        offers = io.read(part, within=("image_id", *id_range(shard, shard)))
        return {
            "selection": selected(offers, io.rows, cluster),
            "choices": choices(offers, io.rows, cluster, multiset=self.config.multiset),
        }

    def _of_query_set(self, shard: int, io: TaskIO, cluster: pa.ChunkedArray) -> dict[str, pa.Table]:
        sources = io.table("sources", ["source_id", "name"]).to_pylist()
        name = next(row["name"] for row in sources if row["source_id"] == source_of_shard(shard))
        as_is, num = self.queries[name].mode == "as_is", io.rows.num_rows
        nothing = {"query_id": pa.nulls(num, pa.int64()), "similarity": pa.nulls(num, pa.float32())}
        selection = verdict_table(
            "selection",
            io.rows,
            reason=pa.array([None if as_is else "not_retrieved"] * num, pa.string()),
            part=pa.array([name if as_is else None] * num, pa.string()),
            cluster=cluster,
            **nothing,
        )
        kept = selection.filter(selection["keep"])
        samples = {name: kept[name] for name in kept.column_names}
        samples |= {"copy": pa.array(np.zeros(len(kept), np.int32)), "query_label": pa.nulls(len(kept), pa.string())}
        return {"selection": selection, "choices": _samples(samples)}
