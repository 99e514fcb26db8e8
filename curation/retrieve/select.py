"""Selection: the pictures that go into the set, each once, and for whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from curation.ingest.sources import QueryConfig
from curation.schema import TABLES, image_ids, source_of_shard
from curation.stage import ShardStage, TaskIO, verdict_table
from training.config import Config


class SelectConfig(Config):
    """One picture is taken once, by the first set that asks for it."""


def first_choice(rows: list[dict[str, Any]], order: Mapping[str, int]) -> dict[int, dict[str, Any]]:
    """Of each picture, the row of ``neighbours`` that takes it.

    The first set in recipe order; there the least rank, the highest similarity, the least query. Rows that a cap cut
    (rank -1) take a picture only when no other does.
    """

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["rank"] < 0, order[row["query_set"]], row["rank"], -row["similarity"], row["query_id"] or 0)

    chosen: dict[int, dict[str, Any]] = {}
    for row in rows:
        old = chosen.get(row["image_id"])
        if old is None or place(row) < place(old):
            chosen[row["image_id"]] = row
    return chosen


class Selection(ShardStage):
    """Verdict over what leakage kept of the pool, and over the query sets: those taken as they are, are taken whole."""

    name = "selection"
    section = ""
    kind = "verdict"
    after = "leakage"
    reads: ClassVar[tuple[str, ...]] = ("leakage", "neighbours", "clusters", "sources")
    writes: ClassVar[tuple[str, ...]] = ("selection", "choices")
    roles = ("pool", "query")

    def __init__(self, config: SelectConfig, queries: Mapping[str, QueryConfig]) -> None:
        super().__init__(config)
        self.queries = queries

    def fingerprint_values(self) -> dict[str, Any]:
        """Order and modes of the sets."""
        return {"queries": {name: query.mode for name, query in self.queries.items()}, "order": list(self.queries)}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Judge the rows of a shard."""
        clusters = io.table("clusters", ["image_id", "cluster"])
        cluster_of = dict(zip(clusters["image_id"].to_pylist(), clusters["cluster"].to_pylist(), strict=True))
        ids = io.rows["image_id"].to_pylist()
        if io.role == "query":
            sources = io.table("sources", ["source_id", "name"]).to_pylist()
            name = next(row["name"] for row in sources if row["source_id"] == source_of_shard(shard))
            as_is = self.queries[name].mode == "as_is"
            chosen: dict[int, dict[str, Any]] = {}
            reason = [None if as_is else "not_retrieved"] * len(ids)
            part = [name if as_is else None] * len(ids)
        else:
            chosen = first_choice(self._of_shard(shard, io), {name: n for n, name in enumerate(self.queries)})
            reason = [_reason(chosen.get(image)) for image in ids]
            part = [chosen[i]["query_set"] if r is None else None for i, r in zip(ids, reason, strict=True)]
        similarity = [chosen[image]["similarity"] if image in chosen else None for image in ids]
        query = [chosen[i]["query_id"] if i in chosen and r is None else None for i, r in zip(ids, reason, strict=True)]
        selection = verdict_table(
            "selection",
            io.rows,
            reason=reason,
            score=similarity,
            part=part,
            query_id=query,
            similarity=similarity,
            cluster=[cluster_of[image] for image in ids],
        )
        return {"selection": selection, "choices": _choices(selection)}

    @staticmethod
    def _of_shard(shard: int, io: TaskIO) -> list[dict[str, Any]]:
        first = int(image_ids(shard, 1)[0])
        rows: list[dict[str, Any]] = []
        for part in io.parts("neighbours"):
            table = io.read(part)
            inside = pc.and_(pc.greater_equal(table["image_id"], first), pc.less(table["image_id"], first + 1_000_000))
            rows += table.filter(inside).to_pylist()
        return rows


def _choices(selection: pa.Table) -> pa.Table:
    """A sample for each picture that is kept."""
    kept = selection.filter(selection["keep"])
    more = {"copy": pa.nulls(len(kept), pa.int32()).fill_null(0), "query_label": pa.nulls(len(kept), pa.string())}
    names = TABLES["choices"].schema.names
    return pa.table([more[name] if name in more else kept[name] for name in names], schema=TABLES["choices"].schema)


def _reason(row: dict[str, Any] | None) -> str | None:
    if row is None:
        return "not_retrieved"
    return "over_cap" if row["rank"] < 0 else None
