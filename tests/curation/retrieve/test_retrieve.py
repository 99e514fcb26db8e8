"""Retrieval and selection over a pool in memory, against references of a few lines."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import faiss
import numpy as np
import pyarrow as pa
import pytest

from curation.ingest.sources import QueryConfig
from curation.retrieve import retrieve
from curation.retrieve.retrieve import Neighbours, Queries, RetrieveConfig
from curation.retrieve.select import SelectConfig, Selection
from curation.schema import TABLES, Part, first_shard, image_ids, shard_of, vector_schema
from curation.stage import Task

DIM = 16
POOL = [first_shard(0), first_shard(0) + 1, first_shard(0) + 2]
SETS = {
    "owned": QueryConfig(location="a", kind="folder", mode="as_is"),
    "near": QueryConfig(location="b", kind="folder", mode="sample", k=5),
    "filled": QueryConfig(location="c", kind="folder", mode="cluster", min_queries=2, per_cluster=9, cap=20),
}
QUERY = {name: first_shard(1 + n) for n, name in enumerate(SETS)}


@dataclass
class Tables:
    """Parts in memory; a TaskIO, a Context and a runner of tasks in one."""

    held: dict[Part, pa.Table] = field(default_factory=dict)
    kept_rows: dict[int, pa.Table] = field(default_factory=dict)
    allowed: tuple[Part, ...] | None = None
    tasks: list[Task] = field(default_factory=list)
    shard: int = -1
    role: str = "pool"

    @property
    def rows(self):
        return self.kept_rows[self.shard]

    def part(self, table, index):
        return Part(TABLES[table].root, table, index)

    def parts(self, table):
        return sorted(part for part in self.held if part.folder == table)

    def read(self, part, columns=None):
        assert self.allowed is None or part in self.allowed, f"{part} is read but not named in reads"
        return self.held[part].select(columns) if columns else self.held[part]

    def table(self, name, columns=None):
        return self.read(self.part(name, 0 if TABLES[name].parts == "single" else self.shard), columns)

    def kept(self, verdict, shard):
        assert self.allowed is None or self.part(verdict, shard) in self.allowed
        return self.kept_rows[shard]

    def shards(self, *roles):
        return (POOL if "pool" in roles else []) + (list(QUERY.values()) if "query" in roles else [])

    def sources(self):
        return self.held[self.part("sources", 0)]

    def map(self, tasks):
        for task in tasks:
            self.tasks.append(task)
            self.allowed = task.reads
            table = task.function(self, **task.args)
            assert table.schema == TABLES["neighbours"].schema
            self.allowed, self.held[task.writes] = None, table

    def run(self, stage, shard, role):
        self.shard, self.role = shard, role
        (table,) = stage.run(shard, self).values()
        self.held[self.part(stage.writes[0], shard)] = table
        return table


def unit(rng, num):
    values = rng.normal(size=(num, DIM))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def column(vectors):
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)


@pytest.fixture
def tables() -> Tables:
    """Three pool shards of 80 rows, of which 60 are kept; three query sets of 24 pictures; 10 clusters."""
    rng = np.random.default_rng(0)
    tables = Tables()
    centroids = unit(rng, 10)
    for shard, num, num_kept in [(s, 80, 60) for s in POOL] + [(s, 24, 24) for s in QUERY.values()]:
        ids, vectors = image_ids(shard, num), unit(rng, num)
        if shard == POOL[1]:
            vectors[10:40] = vectors[10]  # thirty equals: only ties tell them apart
        if shard == QUERY["near"]:
            vectors[0] = tables.held[tables.part("embeddings", POOL[1])]["vector"][10].as_py()
        sha256 = [hashlib.sha256(str(one).encode()).hexdigest() for one in ids]
        at = np.sort(rng.permutation(num)[:num_kept])
        kept = pa.table({"image_id": pa.array(ids[at]), "sha256": pa.array(sha256).take(pa.array(at))})
        tables.kept_rows[shard] = kept
        scores = vectors.astype(np.float64)[at] @ centroids.astype(np.float64).T
        cluster = [pa.array(ids[at]), pa.array(scores.argmax(1).astype(np.int32)), pa.array(scores.max(1).astype("f4"))]
        tables.held[tables.part("clusters", shard)] = pa.table(cluster, schema=TABLES["clusters"].schema)
        embedded = [pa.array(ids), pa.array(sha256), column(vectors)]
        tables.held[tables.part("embeddings", shard)] = pa.table(embedded, schema=vector_schema(DIM))
        urls = [{"image_id": int(one), "label": f"class {one % 3}"} for one in ids]
        tables.held[tables.part("urls", shard)] = pa.Table.from_pylist(urls, schema=TABLES["urls"].schema)
    sources = [{"source_id": n, "name": name} for n, name in enumerate(["web", *SETS])]
    tables.held[tables.part("sources", 0)] = pa.Table.from_pylist(sources, schema=TABLES["sources"].schema)
    return tables


def retrieved(tables: Tables, sets=None, seed: int = 0) -> list[dict]:
    sets = sets or SETS
    for name in sets:
        table = tables.run(Queries(RetrieveConfig(), sets), QUERY[name], "query")
        assert table.schema == TABLES["queries"].schema
    Neighbours(RetrieveConfig(seed=seed), sets).run(tables, tables.map)
    return [row for part in tables.parts("neighbours") for row in tables.held[part].to_pylist()]


def vectors_of(tables: Tables, shards) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Vectors, ids and sha256 of what was kept in some shards."""
    rows = []
    for shard in shards:
        table = tables.held[tables.part("embeddings", shard)].to_pylist()
        kept = set(tables.kept_rows[shard]["image_id"].to_pylist())
        rows += [row for row in table if row["image_id"] in kept]
    ids = np.array([row["image_id"] for row in rows])
    return np.array([row["vector"] for row in rows], np.float32), ids, [row["sha256"] for row in rows]


def test_queries_say_what_their_set_asks_for(tables):
    retrieved(tables)
    near = tables.held[tables.part("queries", QUERY["near"])].to_pylist()
    assert near[4] == {
        "query_id": int(image_ids(QUERY["near"], 5)[4]),
        "query_set": "near",
        "mode": "sample",
        "k": 5,
        "label": f"class {int(image_ids(QUERY['near'], 5)[4]) % 3}",
        "cluster": tables.held[tables.part("clusters", QUERY["near"])]["cluster"][4].as_py(),
    }
    assert set(tables.held[tables.part("queries", QUERY["filled"])]["k"].to_pylist()) == {None}


def test_sample_equals_sorting_all_pairs(tables):
    found = [row for row in retrieved(tables) if row["query_set"] == "near"]
    queries, query_ids, _ = vectors_of(tables, [QUERY["near"]])
    pool, ids, sha256 = vectors_of(tables, POOL)
    wanted = []
    for query, vector in zip(query_ids, queries.astype(np.float64), strict=True):
        scores = (pool * vector).sum(axis=1).astype(np.float32)
        ranked = sorted(range(len(ids)), key=lambda at: (-scores[at], sha256[at], ids[at]))[:5]
        wanted += [(int(query), int(ids[at]), rank, float(scores[at])) for rank, at in enumerate(ranked)]
    assert [(r["query_id"], r["image_id"], r["rank"], r["similarity"]) for r in found] == wanted


def test_sample_equals_faiss(tables):
    found = [row for row in retrieved(tables) if row["query_set"] == "near"]
    queries, query_ids, _ = vectors_of(tables, [QUERY["near"]])
    pool, ids, _ = vectors_of(tables, POOL)
    index = faiss.IndexFlatIP(DIM)
    index.add(pool)
    scores, nearest = index.search(queries, 5)
    place = {int(image): at for at, image in enumerate(ids)}
    for n, query in enumerate(query_ids):
        ours = [row for row in found if row["query_id"] == query]
        # Vectors, not ids: thirty pictures are equal, and Faiss takes any of them.
        assert pool[[place[row["image_id"]] for row in ours]].tolist() == pool[nearest[n]].tolist()
        np.testing.assert_allclose([row["similarity"] for row in ours], scores[n], atol=1e-6)


def test_no_block_or_order_of_shards_changes_what_is_found(tables, monkeypatch):
    first = retrieved(tables)
    monkeypatch.setattr(retrieve, "_BLOCK_SCORES", 100)
    assert retrieved(tables) == first
    for task in tables.tasks[-2:]:
        shuffled = task.function(tables, **{**task.args, "pool_shards": POOL[::-1]})
        assert shuffled.equals(tables.held[task.writes])


def test_a_pool_smaller_than_k(tables):
    few = {name: query.model_copy(update={"k": 1000}) for name, query in SETS.items()}
    counts = Counter(row["query_id"] for row in retrieved(tables, few) if row["query_set"] == "near")
    assert set(counts.values()) == {180}


def reference_clusters(tables: Tables, query: QueryConfig, seed: int) -> tuple[set[int], set[int]]:
    """Ids taken and ids that the cap cut, as the paper words it."""
    clusters = {s: tables.held[tables.part("clusters", s)].to_pylist() for s in [*POOL, QUERY["filled"]]}
    counts = Counter(row["cluster"] for row in clusters[QUERY["filled"]])
    sha256 = {i: s for shard in POOL for i, s in zip(*tables.kept_rows[shard].to_pydict().values(), strict=True)}
    drawn = sorted(sha256, key=lambda one: hashlib.sha256(f"{seed}|{sha256[one]}".encode()).hexdigest())
    cluster = {row["image_id"]: row["cluster"] for shard in POOL for row in clusters[shard]}
    taken = []
    for one, num in counts.items():
        if num > query.min_queries:
            members = [image for image in drawn if cluster[image] == one]
            taken += members[: min(query.per_cluster, len(members))]
    taken.sort(key=drawn.index)
    return set(taken[: query.cap]), set(taken[query.cap :])


@pytest.mark.parametrize("changes", [{}, {"cap": 5}, {"cap": 10_000}, {"per_cluster": 10_000}, {"min_queries": 3}])
def test_clusters_equal_the_words_of_the_paper(tables, changes):
    query = SETS["filled"].model_copy(update=changes)
    rows = [row for row in retrieved(tables, {**SETS, "filled": query}, seed=7) if row["query_set"] == "filled"]
    taken, cut = reference_clusters(tables, query, 7)
    assert {row["image_id"] for row in rows if row["rank"] >= 0} == taken
    assert {row["image_id"] for row in rows if row["rank"] < 0} == cut
    assert len(taken) <= query.cap
    assert all(row["query_id"] is None for row in rows)


def test_a_longer_draw_begins_with_a_shorter(tables):
    chosen = []
    for changes in ({"cap": 8}, {"cap": 15}, {"cap": 1000}):
        sets = {**SETS, "filled": SETS["filled"].model_copy(update=changes)}
        rows = retrieved(tables, sets)
        chosen.append({row["image_id"] for row in rows if row["query_set"] == "filled" and row["rank"] >= 0})
    assert chosen[0] < chosen[1] < chosen[2]
    other = retrieved(tables, {**SETS, "filled": SETS["filled"].model_copy(update={"cap": 8})}, seed=1)
    assert {row["image_id"] for row in other if row["query_set"] == "filled" and row["rank"] >= 0} != chosen[0]


def test_each_picture_once_for_the_first_set_that_asks(tables):
    rows = retrieved(tables)
    stage = Selection(SelectConfig(), SETS)
    selected = [row for shard in POOL for row in tables.run(stage, shard, "pool").to_pylist()]
    assert [row["image_id"] for row in selected] == vectors_of(tables, POOL)[1].tolist()
    for row in selected:
        asked = [one for one in rows if one["image_id"] == row["image_id"]]
        near = [one for one in asked if one["query_set"] == "near"]
        filled = [one for one in asked if one["query_set"] == "filled" and one["rank"] >= 0]
        if near:
            best = min(near, key=lambda one: (one["rank"], -one["similarity"], one["query_id"]))
            assert (row["keep"], row["part"], row["query_id"]) == (True, "near", best["query_id"])
            assert row["similarity"] == best["similarity"]
        elif filled:
            assert (row["keep"], row["part"], row["query_id"]) == (True, "filled", None)
        else:
            assert (row["keep"], row["part"]) == (False, None)
            assert row["reason"] == ("over_cap" if asked else "not_retrieved")
    assert {row["reason"] for row in selected} == {None, "over_cap", "not_retrieved"}
    assert {row["part"] for row in selected} == {None, "near", "filled"}


def test_the_order_of_the_recipe_decides(tables):
    turned = {name: SETS[name] for name in ("filled", "near", "owned")}
    rows = retrieved(tables, turned)
    both = {r["image_id"] for r in rows if r["query_set"] == "near"} & {
        r["image_id"] for r in rows if r["query_set"] == "filled" and r["rank"] >= 0
    }
    assert both
    for sets, first in ((SETS, "near"), (turned, "filled")):
        stage = Selection(SelectConfig(), sets)
        parts = {r["image_id"]: r["part"] for s in POOL for r in tables.run(stage, s, "pool").to_pylist()}
        assert {parts[image] for image in both} == {first}
        assert (
            stage.fingerprint_values() != Selection(SelectConfig(), dict(reversed(sets.items()))).fingerprint_values()
        )


def test_sets_as_they_are_are_taken_whole(tables):
    retrieved(tables)
    stage = Selection(SelectConfig(), SETS)
    owned = tables.run(stage, QUERY["owned"], "query").to_pylist()
    assert {(row["keep"], row["part"], row["reason"]) for row in owned} == {(True, "owned", None)}
    for name in ("near", "filled"):
        rows = tables.run(stage, QUERY[name], "query").to_pylist()
        assert {(row["keep"], row["part"], row["reason"]) for row in rows} == {(False, None, "not_retrieved")}
    assert all(shard_of(row["image_id"]) == QUERY["owned"] for row in owned)


def test_an_empty_pool_retrieves_nothing(tables):
    for shard in POOL:
        tables.kept_rows[shard] = tables.kept_rows[shard].slice(0, 0)
        part = tables.part("clusters", shard)
        tables.held[part] = tables.held[part].slice(0, 0)
    assert retrieved(tables) == []
    assert tables.run(Selection(SelectConfig(), SETS), POOL[0], "pool").num_rows == 0
