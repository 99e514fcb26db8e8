"""Retrieval and selection, run as a command runs them on a made store, against references of a few lines."""

import hashlib
from collections import Counter
from itertools import pairwise

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.retrieve import candidates, retrieve, search
from curation.schema import shard_of

# --- sample ---------------------------------------------------------------------------------------------------------


def found_for(made, name: str) -> list[dict]:
    """By query and rank; the table itself stands by picture."""
    rows = [row for row in made.rows("neighbours") if row["query_set"] == name]
    return sorted(rows, key=lambda row: (row["query_id"] or 0, row["rank"]))


def nearest(made, name: str, k: int) -> list[tuple[int, int, int, float]]:
    """query_id, image_id, rank and similarity by sorting all pairs."""
    pool = np.array([made.vectors[one] for one in made.ids("web")], np.float64)
    wanted = []
    for query in made.ids(name):
        scores = (pool * made.vectors[query].astype(np.float64)).sum(axis=1).astype(np.float32)
        ids = made.ids("web")
        sha256 = [hashlib.sha256(str(one).encode()).hexdigest() for one in ids]
        order = sorted(range(len(ids)), key=lambda at: (-scores[at], sha256[at], ids[at]))[:k]
        wanted += [(query, ids[at], rank, float(scores[at])) for rank, at in enumerate(order)]
    return wanted


def as_tuples(rows: list[dict]) -> list[tuple[int, int, int, float]]:
    return [(row["query_id"], row["image_id"], row["rank"], row["similarity"]) for row in rows]


def test_queries_say_what_their_set_asks_for(made):
    made.run()
    near = [row for row in made.rows("queries") if row["query_set"] == "near"]
    query = made.ids("near")[4]
    assert near[4] == {
        "query_id": query,
        "query_set": "near",
        "mode": "sample",
        "k": 5,
        "label": f"class {query % 3}",
        "cluster": made.cluster[query],
        "probes": None,
    }
    assert {row["k"] for row in made.rows("queries") if row["query_set"] == "filled"} == {None}


def test_sample_equals_sorting_all_pairs(made):
    made.run()
    assert as_tuples(found_for(made, "near")) == nearest(made, "near", 5)


def test_sample_equals_faiss(made):
    made.run()
    pool = np.array([made.vectors[one] for one in made.ids("web")], np.float32)
    index = faiss.IndexFlatIP(16)
    index.add(pool)
    queries = np.array([made.vectors[one] for one in made.ids("near")], np.float32)
    scores, at = index.search(queries, 5)
    place = {image: n for n, image in enumerate(made.ids("web"))}
    for n, query in enumerate(made.ids("near")):
        ours = [row for row in found_for(made, "near") if row["query_id"] == query]
        # Vectors, not ids: thirty pictures are equal, and Faiss takes any of them.
        assert pool[[place[row["image_id"]] for row in ours]].tolist() == pool[at[n]].tolist()
        np.testing.assert_allclose([row["similarity"] for row in ours], scores[n], atol=1e-6)


def test_neither_memory_nor_block_changes_a_byte(made, monkeypatch):
    made.run()
    tables = ("queries", "quotas", "cluster_sizes", "candidates", "neighbours", "retrieval", "offers", "selection")
    tables = (*tables, "choices")
    before = {name: made.digests(name) for name in tables}
    for path in (made.folder / "run").glob("*/part-*.parquet"):
        if path.parent.name in tables:
            path.unlink()
    monkeypatch.setattr(search, "_BLOCK_SCORES", 100)
    monkeypatch.setattr(search, "_BLOCK_ROWS", 3)
    monkeypatch.setattr(search, "_BLOCK_MEMBERS", 7)
    monkeypatch.setattr(candidates, "_MAX_PENDING", 1)
    made.run(memory_mb=1e-6)  # one shard at a time
    assert {name: made.digests(name) for name in tables} == before


def in_any_order(made, name: str) -> list[dict]:
    """Rows of ``neighbours`` stand by block; those of the other tables in the order in which they are stored."""
    rows = made.rows(name)
    return sorted(rows, key=lambda row: [str(value) for value in row.values()]) if name == "neighbours" else rows


def test_neighbours_stand_by_picture_with_the_label_of_their_query(made):
    made.run()
    for table in made.parts("neighbours").values():
        ids = table["image_id"].to_pylist()
        assert ids == sorted(ids)
        for row in table.to_pylist():
            assert row["query_label"] == (None if row["query_id"] is None else f"class {row['query_id'] % 3}")


def test_groups_and_blocks_of_tasks_do_not_change_what_is_found(made, monkeypatch):
    made.run()
    tables = ("neighbours", "retrieval", "offers", "selection", "choices")
    before = {name: in_any_order(made, name) for name in tables}
    assert len(made.parts("candidates")) == 4  # near and its sample, filled, even: one group each
    monkeypatch.setattr(retrieve, "GROUP_SHARDS", 1)
    monkeypatch.setattr(candidates, "BLOCK_QUERIES", 1)
    made.run()
    assert len(made.parts("candidates")) == 3 * 5
    assert list(made.parts("offers")) == made.shards["web"]
    assert len([index for index in made.parts("neighbours") if index in made.shards["near"]]) == 2
    assert {name: in_any_order(made, name) for name in tables} == before


def test_more_shards_make_larger_groups(monkeypatch):
    assert [len(group) for group in retrieve.groups_of(range(130))] == [64, 64, 2]
    assert [len(group) for group in retrieve.groups_of(range(64 * 64))] == [64] * 64
    assert [len(group) for group in retrieve.groups_of(range(64 * 64 + 1))] == [128] * 32 + [1]
    assert retrieve.groups_of([]) == []


def test_a_pool_smaller_than_k(made):
    made.sets["near"]["k"] = 1000
    made.run()
    counts = Counter(row["query_id"] for row in found_for(made, "near"))
    assert set(counts.values()) == {180}
    (row,) = (row for row in made.rows("retrieval") if row["query_set"] == "near")
    assert (row["num_nominal"], row["num_retrieved"], row["shortfall"]) == (24_000, 24 * 180, 24_000 - 24 * 180)
    assert row["recall"] == 1.0


def test_few_probes_are_told_by_the_recall(made, monkeypatch):
    monkeypatch.setattr(retrieve, "FEW_LISTS", 0)
    recalls = []
    for probes in (1, 3, 9):
        made.run(retrieve={"probes": probes})
        looked_into = [row["probes"] for row in made.rows("queries") if row["query_set"] == "near"]
        assert all(len(lists) == probes for lists in looked_into)
        inside = {query: set(lists) for query, lists in zip(made.ids("near"), looked_into, strict=True)}
        wanted = [one for one in nearest(made, "near", 180) if made.cluster[one[1]] in inside[one[0]]]
        ours = found_for(made, "near")
        best = [row for query in inside for row in [one for one in wanted if one[0] == query][:5]]
        assert [row["image_id"] for row in ours] == [one[1] for one in best]
        exact = {one[:2] for one in nearest(made, "near", 5)}
        found = {(row["query_id"], row["image_id"]) for row in ours}
        (row,) = (row for row in made.rows("retrieval") if row["query_set"] == "near")
        assert row["num_sampled"] == 24
        assert row["recall"] == pytest.approx(len(exact & found) / len(exact))
        recalls.append(row["recall"])
    assert recalls[0] < recalls[1] < recalls[2]


def test_the_recall_is_of_a_seeded_sample_of_all_shards(made):
    made.run(retrieve={"recall_queries": 7})
    (first, *_) = (index for index in made.parts("candidates") if index in made.shards["near"])
    sampled = set(made.parts("candidates")[first]["query_id"].to_pylist())
    assert Counter(shard_of(one) for one in sampled) == {made.shards["near"][0]: 3, made.shards["near"][1]: 4}
    made.run(retrieve={"recall_queries": 0})
    (row,) = (row for row in made.rows("retrieval") if row["query_set"] == "near")
    assert (row["num_sampled"], row["recall"]) == (0, None)


# --- cluster --------------------------------------------------------------------------------------------------------


def reference_clusters(made, name: str, seed: int) -> tuple[set[int], set[int]]:
    """Ids taken and ids that the cap cut, as the paper words it."""
    query = made.recipe().queries[name]
    counts = Counter(made.cluster[one] for one in made.ids(name))
    sha256 = {one: hashlib.sha256(str(one).encode()).hexdigest() for one in made.ids("web")}
    drawn = sorted(sha256, key=lambda one: hashlib.sha256(f"{seed}|{sha256[one]}".encode()).hexdigest())
    taken = []
    for cluster, num in counts.items():
        if num > query.min_queries:
            members = [one for one in drawn if made.cluster[one] == cluster]
            taken += members[: min(query.per_cluster, len(members))]
    taken.sort(key=drawn.index)
    return set(taken[: query.cap]), set(taken[query.cap :])


@pytest.mark.parametrize("changes", [{}, {"cap": 5}, {"cap": 10_000}, {"per_cluster": 10_000}, {"min_queries": 3}])
def test_clusters_equal_the_words_of_the_paper(made, changes):
    made.sets["filled"] |= changes
    made.run(retrieve={"seed": 7})
    rows = found_for(made, "filled")
    taken, cut = reference_clusters(made, "filled", 7)
    assert {row["image_id"] for row in rows if row["rank"] >= 0} == taken
    assert {row["image_id"] for row in rows if row["rank"] < 0} == cut
    assert all(row["query_id"] is None for row in rows)
    quotas = [row for row in made.rows("quotas") if row["query_set"] == "filled"]
    sizes = Counter(made.cluster[one] for one in made.ids("web"))
    asked = made.sets["filled"]["per_cluster"]
    for row in quotas:
        assert (row["num_asked"], row["num_pictures"]) == (asked, sizes[row["cluster"]])
        assert row["num_taken"] == min(asked, sizes[row["cluster"]])
        assert row["num_queries"] > made.sets["filled"]["min_queries"]
    (told,) = (row for row in made.rows("retrieval") if row["query_set"] == "filled")
    assert told["num_clusters"] == len(quotas)
    assert told["num_nominal"] == asked * len(quotas)
    assert told["shortfall"] == asked * len(quotas) - len(taken) - len(cut)
    assert told["num_short"] == sum(row["num_taken"] < asked for row in quotas)
    assert (told["num_retrieved"], told["num_taken"]) == (len(taken) + len(cut), len(taken))


def test_a_longer_draw_begins_with_a_shorter(made):
    chosen = []
    for cap in (8, 15, 1000):
        made.sets["filled"]["cap"] = cap
        made.run()
        chosen.append({row["image_id"] for row in found_for(made, "filled") if row["rank"] >= 0})
    assert chosen[0] < chosen[1] < chosen[2]
    made.sets["filled"]["cap"] = 8
    made.run(retrieve={"seed": 1})
    assert {row["image_id"] for row in found_for(made, "filled") if row["rank"] >= 0} != chosen[0]


# --- balanced -------------------------------------------------------------------------------------------------------

LEVELS = {"levels": [{"num_clusters": 4, "sample_per_cluster": 2, "resampling_steps": 1}], "iterations": 5}


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(totals=st.lists(st.integers(1, 250), min_size=2, max_size=2), levels=st.booleans())
def test_balanced_meets_its_total_and_only_grows(pool, totals, levels):
    sizes = Counter(pool.cluster[one] for one in pool.ids("web"))
    chosen = []
    for total in sorted(totals):
        pool.sets["even"]["total"] = total
        pool.run(hierarchy=LEVELS if levels else {})
        taken = [row["image_id"] for row in found_for(pool, "even")]
        assert len(taken) == len(set(taken)) == min(total, 180)
        chosen.append(set(taken))
        counts = Counter(pool.cluster[one] for one in taken)
        parent = parents(pool) if levels else dict.fromkeys(sizes, 0)
        for siblings in ([c for c in sizes if parent[c] == node] for node in set(parent.values())):
            # No leaf lies above the water level of its siblings: it has at most one more than any that is not empty.
            level = min((counts[c] for c in siblings if counts[c] < sizes[c]), default=None)
            assert level is None or all(counts[c] <= level + 1 for c in siblings)
        (told,) = pool.rows("retrieval")
        assert (told["num_nominal"], told["shortfall"], told["num_queries"]) == (total, max(0, total - 180), None)
    assert all(smaller <= larger for smaller, larger in pairwise(chosen))


def parents(made) -> dict[int, int]:
    rows = made.rows("fit_hierarchy")
    assert {row["level"] for row in rows} == {0, 1}
    assert all((row["parent"] is None) == (row["level"] == 1) for row in rows)
    return {row["cluster"]: row["parent"] for row in rows if row["level"] == 0}


def test_each_leaf_gives_the_first_of_one_seeded_order(made):
    made.run(retrieve={"seed": 3})
    taken = {row["image_id"] for row in found_for(made, "even")}
    sha256 = {one: hashlib.sha256(str(one).encode()).hexdigest() for one in made.ids("web")}
    drawn = sorted(sha256, key=lambda one: hashlib.sha256(f"3|{sha256[one]}".encode()).hexdigest())
    for cluster in range(10):
        members = [one for one in drawn if made.cluster[one] == cluster]
        inside = [one for one in members if one in taken]
        assert inside == members[: len(inside)]


# --- selection ------------------------------------------------------------------------------------------------------


def test_each_picture_once_for_the_first_set_that_asks(made):
    made.run()
    rows = made.rows("neighbours")
    selected = [row for row in made.rows("selection") if row["image_id"] in set(made.ids("web"))]
    assert [row["image_id"] for row in selected] == made.ids("web")
    for row in selected:
        asked = [one for one in rows if one["image_id"] == row["image_id"]]
        near = [one for one in asked if one["query_set"] == "near"]
        taken = [one["query_set"] for one in asked if one["rank"] >= 0 and one["query_set"] != "near"]
        if near:
            best = min(near, key=lambda one: (one["rank"], -one["similarity"], one["query_id"]))
            assert (row["keep"], row["part"], row["query_id"]) == (True, "near", best["query_id"])
            assert row["similarity"] == best["similarity"]
        elif taken:
            part = "filled" if "filled" in taken else "even"
            assert (row["keep"], row["part"], row["query_id"]) == (True, part, None)
        else:
            assert (row["keep"], row["part"]) == (False, None)
            assert row["reason"] == ("over_cap" if asked else "not_retrieved")
    assert {row["part"] for row in selected} == {None, "near", "filled", "even"}


def test_sets_as_they_are_are_taken_whole(made):
    made.run()
    selected = {row["image_id"]: row for row in made.rows("selection")}
    for one in made.ids("owned"):
        assert (selected[one]["keep"], selected[one]["part"], selected[one]["reason"]) == (True, "owned", None)
    for one in [*made.ids("near"), *made.ids("filled")]:
        assert (selected[one]["keep"], selected[one]["part"]) == (False, None)
    (told,) = (row for row in made.rows("retrieval") if row["query_set"] == "owned")
    assert (told["num_queries"], told["num_final_nominal"], told["num_nominal"]) == (24, 24, None)


def test_an_empty_pool_retrieves_nothing(made):
    for shard in made.shards["web"]:
        made.put("leakage", shard, [])
        made.put("clusters", shard, [])
    made.run()
    assert made.rows("neighbours") == []
    assert {row["query_set"]: row["num_retrieved"] for row in made.rows("retrieval")} == {
        "owned": None,
        "near": 0,
        "filled": 0,
        "even": 0,
    }


def test_what_is_done_is_not_done_again_and_a_changed_set_redoes_itself_only(made):
    made.run()
    assert made.run().num_jobs == 0
    made.sets["filled"]["cap"] = 3
    costs = made.run().costs
    assert costs["neighbours"].num_jobs == 2  # what it gets, and what is told of it
    assert not {"queries", "quotas", "candidates"} & set(costs)
