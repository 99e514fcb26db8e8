"""Who takes a picture: the vectorised rule against a slow one, and runs in which sets ask for the same pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.retrieve import retrieve
from curation.retrieve.offers import in_order_of_choice
from curation.retrieve.select import choices, selected
from curation.schema import TABLES, Part, part_of_group

SETS = ("b", "a", "c")  # in the order of the recipe
PICTURES = 6
CLUSTER = pa.chunked_array([pa.array(range(10, 10 + PICTURES), pa.int32())])
ROWS = pa.table({"image_id": range(PICTURES), "sha256": [f"{one:064x}" for one in range(PICTURES)]})


def offered(rows: Sequence[Mapping[str, Any]], image: int) -> list[Mapping[str, Any]]:
    """What asks for a picture, the first taker first: the rule as a comparison of rows."""

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return (row["rank"] < 0, SETS.index(row["query_set"]), row["rank"], -row["similarity"], row["query_id"] or 0)

    return sorted((row for row in rows if row["image_id"] == image), key=place)


def slow_choices(rows: Sequence[Mapping[str, Any]], *, multiset: bool) -> list[dict[str, Any]]:
    samples = []
    for image in range(PICTURES):
        taken = [row for row in offered(rows, image) if row["rank"] >= 0]
        for copy, row in enumerate(taken if multiset else taken[:1]):
            told = {key: row[key] for key in ("query_id", "query_label", "similarity")}
            told |= {"part": row["query_set"], "cluster": 10 + image, "sha256": f"{image:064x}"}
            samples.append({"image_id": image, "copy": copy, **told})
    return samples


def slow_selection(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    verdicts = []
    for image in range(PICTURES):
        first = next(iter(offered(rows, image)), None)
        reason = "not_retrieved" if first is None else "over_cap" if first["rank"] < 0 else None
        similarity = None if first is None else first["similarity"]
        told = {"part": first["query_set"], "query_id": first["query_id"]} if first and reason is None else {}
        told |= {"score": similarity, "similarity": similarity, "cluster": 10 + image, "sha256": f"{image:064x}"}
        told |= {"image_id": image, "keep": reason is None, "reason": reason}
        verdicts.append({name: told.get(name) for name in TABLES["selection"].schema.names})
    return verdicts


@st.composite
def asked(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of ``neighbours`` with many ties; no two are equal in all that decides."""
    row = st.builds(
        dict,
        image_id=st.integers(0, PICTURES - 1),
        query_set=st.sampled_from(SETS),
        query_id=st.none() | st.integers(1, 3),
        rank=st.integers(-1, 1),
        similarity=st.sampled_from([-0.5, 0.0, 0.25]),
    )
    rows = draw(st.lists(row, max_size=40, unique_by=lambda row: tuple(row.values())))
    return [{**row, "query_label": row["query_id"] and f"class {row['query_id']}", "cluster": 0} for row in rows]


@given(rows=asked(), multiset=st.booleans())
def test_choices_are_those_of_the_slow_rule(rows, multiset):
    table = pa.Table.from_pylist(rows, schema=TABLES["neighbours"].schema).select(TABLES["offers"].schema.names)
    ordered = in_order_of_choice(table, SETS)
    assert ordered.to_pylist() == [
        {name: row[name] for name in table.column_names} for image in range(PICTURES) for row in offered(rows, image)
    ]
    assert choices(ordered, ROWS, CLUSTER, multiset=multiset).to_pylist() == [
        {name: row[name] for name in TABLES["choices"].schema.names} for row in slow_choices(rows, multiset=multiset)
    ]
    assert selected(ordered, ROWS, CLUSTER).to_pylist() == slow_selection(rows)


def test_a_shard_finds_the_part_of_its_group():
    parts = [Part("run", "offers", index) for index in (3_000_000, 3_000_064, 5_000_000)]
    wanted = {3_000_000: 0, 3_000_063: 0, 3_000_064: 1, 3_000_100: 1, 5_000_000: 2, 5_000_007: 2}
    assert {shard: parts.index(part_of_group(parts, shard)) for shard in wanted} == wanted


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(made):
    """Two sampled sets with the same first queries, before one that is drawn and cut: many pictures asked for twice."""
    made.sets["again"] = {"mode": "sample", "k": 7}
    near = [np.stack([made.vectors[one] for one in made.ids("near") if one // 10**6 == s]) for s in made.shards["near"]]
    made.add("again", near)
    return made


def counts_of(made) -> dict[str, tuple[int, int]]:
    """num_taken and num_unique of each set that retrieves."""
    rows = made.rows("retrieval")
    return {row["query_set"]: (row["num_taken"], row["num_unique"]) for row in rows if row["num_taken"] is not None}


def test_a_multiset_has_a_sample_for_each_time_that_a_picture_was_taken(crowded):
    crowded.run(select={"multiset": True})
    samples, counts = crowded.rows("choices"), counts_of(crowded)
    assert Counter(row["part"] for row in samples) == {
        **{name: taken for name, (taken, _) in counts.items()},
        "owned": len(crowded.ids("owned")),
    }
    assert any(taken > unique for taken, unique in counts.values())  # queries of one set ask for the same, too
    taken = [row for row in crowded.rows("neighbours") if row["rank"] >= 0]
    assert Counter((row["image_id"], row["part"], row["query_id"]) for row in samples if row["part"] != "owned") == (
        Counter((row["image_id"], row["query_set"], row["query_id"]) for row in taken)
    )
    copies: dict[int, list[dict[str, Any]]] = {}
    for row in samples:
        copies.setdefault(row["image_id"], []).append(row)
    assert all([row["copy"] for row in rows] == list(range(len(rows))) for rows in copies.values())
    selection = [row for row in crowded.rows("selection") if row["keep"]]
    assert [row["image_id"] for row in selection] == list(copies)
    for row in selection:
        first = copies[row["image_id"]][0]
        assert all(row[name] == first[name] for name in ("sha256", "part", "query_id", "similarity", "cluster"))
    labels = {row["query_id"]: row["label"] for row in crowded.rows("queries")}
    assert all(row["query_label"] == labels.get(row["query_id"]) for row in samples)


def test_the_selection_is_the_same_in_both_modes_and_only_choices_differ(crowded):
    crowded.run()
    selection, single = crowded.rows("selection"), crowded.rows("choices")
    assert [row["image_id"] for row in single] == [row["image_id"] for row in selection if row["keep"]]
    costs = crowded.run(select={"multiset": True}).costs
    assert set(costs) == {"selection"}
    assert crowded.rows("selection") == selection
    several = crowded.rows("choices")
    assert len(several) > len(single)
    assert [row for row in several if row["copy"] == 0] == single


@pytest.mark.parametrize("multiset", [False, True])
def test_neither_groups_nor_memory_change_a_sample(crowded, monkeypatch, multiset):
    crowded.run(select={"multiset": multiset})
    before = {name: crowded.digests(name) for name in ("selection", "choices")}
    offers = crowded.rows("offers")
    monkeypatch.setattr(retrieve, "GROUP_SHARDS", 2)
    crowded.run(select={"multiset": multiset}, memory_mb=1e-6)
    assert list(crowded.parts("offers")) == [crowded.shards["web"][0], crowded.shards["web"][2]]
    assert {name: crowded.digests(name) for name in before} == before
    assert crowded.rows("offers") == offers


def test_a_changed_part_of_offers_is_judged_again_by_its_own_shards_only(crowded, monkeypatch):
    monkeypatch.setattr(retrieve, "GROUP_SHARDS", 1)
    crowded.run()
    before = crowded.digests("offers")
    crowded.sets["even"]["total"] += 1  # one picture more
    costs = crowded.run().costs
    changed = [index for index, digest in crowded.digests("offers").items() if digest != before[index]]
    assert costs["offers"].num_jobs == 3
    assert costs["selection"].num_jobs == len(changed) == 1


def test_a_weight_touches_no_selection(crowded):
    crowded.run()
    crowded.sets["near"]["weight"] = 0.25
    assert crowded.run().num_jobs == 0
