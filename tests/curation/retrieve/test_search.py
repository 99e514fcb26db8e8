"""The search list by list against sorting all pairs, on the CPU and in torch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.represent import kmeans
from curation.retrieve import search


def unit(rng: np.random.Generator, num: int, dim: int) -> np.ndarray:
    values = rng.normal(size=(num, dim))
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float16)


def best(pairs: search.Pairs, k: int) -> dict[int, list[tuple[float, int]]]:
    """The k best of each query, ties by place."""
    found: dict[int, list[tuple[float, int]]] = {}
    for query, place, similarity in zip(*(column.tolist() for column in pairs), strict=True):
        found.setdefault(query, []).append((-similarity, place))
    assert all(len(set(rows)) == len(rows) for rows in found.values())
    return {query: sorted(rows)[:k] for query, rows in sorted(found.items())}


def sorted_pairs(queries, pool, k, seen=None) -> dict[int, list[tuple[float, int]]]:
    """The same by sorting all pairs that may be seen."""
    scores = (queries.astype(np.float64) @ pool.astype(np.float64).T).astype(np.float32)
    found = {}
    for query in range(len(queries)):
        places = range(len(pool)) if seen is None else np.flatnonzero(seen[query]).tolist()
        rows = sorted((-float(scores[query, place]), place) for place in places)[:k]
        if rows:
            found[query] = rows
    return found


@pytest.fixture(params=["numpy", "torch"])
def device(request, monkeypatch):
    """The scorer of each device, both on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(search, "scorer_on", lambda _, queries, pool: search.TorchScorer(queries, pool, "cpu"))
    return request.param


def test_all_lists_equal_sorting_all_pairs(device, monkeypatch):
    rng = np.random.default_rng(0)
    queries, pool = unit(rng, 40, 24), unit(rng, 300, 24)
    pool[100:160] = pool[100]
    queries[3] = pool[100]
    for name, size in (("_BLOCK_MEMBERS", 1 << 14), ("_BLOCK_MEMBERS", 37), ("_BLOCK_ROWS", 7)):
        monkeypatch.setattr(search, name, size)
        for k in (1, 5, 299, 1000):
            assert best(search.search_all(queries, pool, k=k), k) == sorted_pairs(queries, pool, k)


def test_ties_of_the_last_place_are_all_found(device):
    pool = np.repeat(unit(np.random.default_rng(1), 4, 8), 25, axis=0)
    pairs = search.search_all(pool[:1], pool, k=3)
    assert set(pairs.pool.tolist()) == set(range(25))
    assert len(set(pairs.similarity.tolist())) == 1


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    num_lists=st.integers(1, 12),
    probes=st.integers(1, 12),
    k=st.integers(1, 20),
    in_torch=st.booleans(),
)
def test_lists_find_the_nearest_of_what_they_hold(seed, num_lists, probes, k, in_torch):
    rng = np.random.default_rng(seed)
    queries, pool, centroids = unit(rng, 15, 8), unit(rng, int(rng.integers(0, 120)), 8), unit(rng, num_lists, 8)
    near = search.nearest_lists(queries, centroids, probes)
    assert near.shape == (15, min(probes, num_lists))
    cluster = np.sort(rng.integers(0, num_lists, len(pool)).astype(np.int32))
    with pytest.MonkeyPatch.context() as patch:
        if in_torch:
            patch.setattr(search, "scorer_on", lambda _, queries, pool: search.TorchScorer(queries, pool, "cpu"))
        pairs = search.search_lists(queries, pool, cluster=cluster, probes=near, k=k)
    seen = (near[:, :, None] == cluster[None, None, :]).any(axis=1)
    assert best(pairs, k) == sorted_pairs(queries, pool, k, seen)


def test_nearest_lists_are_those_of_sorting_all_centroids(monkeypatch):
    rng = np.random.default_rng(2)
    vectors, centroids = unit(rng, 200, 16), unit(rng, 30, 16)
    centroids[20:24] = centroids[4]  # the lesser number comes first
    ranked = sorted_pairs(vectors, centroids, 30)
    homes = kmeans.assign(vectors.astype(np.float32), centroids.astype(np.float32))[0]
    for block in (1 << 24, 100):
        monkeypatch.setattr(search, "_BLOCK_SCORES", block)
        for num in (1, 2, 7, 30, 99):
            near = search.nearest_lists(vectors, centroids, num)
            assert near[:, 0].tolist() == homes.tolist()
            assert (np.diff(near[:, 1:], axis=1) > 0).all()
            wanted = [sorted(place for _, place in ranked[query][:num]) for query in range(200)]
            assert np.sort(near, axis=1).tolist() == wanted


def test_every_score_is_exact():
    rng = np.random.default_rng(3)
    queries, pool = unit(rng, 20, 64), unit(rng, 50, 64)
    pairs = search.search_all(queries, pool, k=7)
    wanted = [kmeans.similarity(queries[q], pool[p]) for q, p in zip(pairs.query, pairs.pool, strict=True)]
    assert pairs.similarity.tolist() == np.array(wanted).tolist()
