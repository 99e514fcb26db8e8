"""Selection: the pictures that go into the set, for whom, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation.dedup.leakage import leaks_of_shard
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
        reference_id=pa.nulls(rows.num_rows, pa.int64()),
    )


class Selection(ShardStage):
    """Verdict over what semantic kept of the pool, and over the pictures of the query sets.

    Those of a set that is taken as it is are kept, but for what matches a picture of a benchmark: reason test_match.
    """

    name = "selection"
    section = ""
    version = 3
    kind = "verdict"
    after = "semantic"
    reads: ClassVar[tuple[str, ...]] = ("semantic", "offers", "clusters", "sources", "leaks")
    writes: ClassVar[tuple[str, ...]] = ("selection", "choices")
    roles = ("pool", "query")
    config: SelectConfig

    def __init__(self, config: SelectConfig, queries: Mapping[str, QueryConfig], leakage_threshold: float) -> None:
        super().__init__(config)
        self.queries = queries
        self.leakage_threshold = leakage_threshold

    def fingerprint_values(self) -> dict[str, Any]:
        """Modes of the sets, and how often a picture is taken; their order is that of ``offers``."""
        modes = {name: query.mode for name, query in self.queries.items()}
        told: dict[str, Any] = {"queries": modes, "select.multiset": self.config.multiset}
        own = {name: query for name, query in self.queries.items() if query.mode == "as_is"}
        told |= {f"queries.{name}.drop_test_matches": query.is_checked for name, query in own.items()}
        return told | ({"leakage.threshold": self.leakage_threshold} if own else {})

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
        query, num = self.queries[name], io.rows.num_rows
        nothing = {"query_id": pa.nulls(num, pa.int64()), "similarity": pa.nulls(num, pa.float32())}
        reason: Any = pa.array([None if query.mode == "as_is" else "not_retrieved"] * num, pa.string())
        told: dict[str, Any] = {"reference_id": pa.nulls(num, pa.int64())}
        if query.is_checked:
            matches = leaks_of_shard(io, shard)
            matches = matches.take(pc.index_in(io.rows["image_id"], value_set=matches["image_id"].combine_chunks()))
            reason = pc.if_else(pc.fill_null(matches["leaks"], False), "test_match", _NO_REASON).combine_chunks()
            threshold = pa.scalar(self.leakage_threshold, pa.float32())
            told = {"reference_id": matches["reference_id"], "score": matches["similarity"]}
            told["threshold"] = pc.if_else(matches["similarity"].is_null(), pa.scalar(None, pa.float32()), threshold)
        part = pc.if_else(reason.is_null(), name, _NO_REASON)
        selection = verdict_table("selection", io.rows, reason=reason, part=part, cluster=cluster, **nothing, **told)
        kept = selection.filter(selection["keep"])
        samples = {column: kept[column] for column in kept.column_names}
        samples |= {"copy": pa.array(np.zeros(len(kept), np.int32)), "query_label": pa.nulls(len(kept), pa.string())}
        return {"selection": selection, "choices": _samples(samples)}
