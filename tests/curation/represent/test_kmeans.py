"""k-means: what a fit must find, and an assignment that is exact and the same in any batch."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.represent import kmeans


def unit(seed: int, num: int, dim: int = 32) -> np.ndarray:
    """Unit vectors as they are stored: fp16 values in float32."""
    values = np.random.default_rng(seed).normal(size=(num, dim))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values.astype(np.float16).astype(np.float32)


def slow_assign(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One pair after the other, in Python's exact integers; ties to the least number."""
    a = np.rint(vectors.astype(np.float64) * 2**24).astype(object)
    b = np.rint(centroids.astype(np.float64) * 2**24).astype(object)
    scores = np.array([[np.float32(int((row * one).sum()) / 2**48) for one in b] for row in a])
    return scores.argmax(axis=1), scores.max(axis=1)


def test_fit_finds_separate_groups():
    centres = unit(0, 12)
    rng = np.random.default_rng(1)
    member = np.repeat(np.arange(12), 50)
    vectors = centres[member] + 0.02 * rng.normal(size=(600, 32)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    centroids = kmeans.fit(vectors, num_clusters=60, iterations=15, seed=3)
    cluster, similarity = kmeans.assign(vectors, centroids)
    assert len(np.unique(cluster)) > 40  # no cluster is left empty for long
    assert all(len(np.unique(member[cluster == one])) == 1 for one in np.unique(cluster))
    assert similarity.min() > 0.95
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=2e-3)
    assert np.array_equal(centroids, centroids.astype(np.float16))


def test_fit_is_the_same_again_and_never_larger_than_its_sample():
    vectors = unit(2, 300)
    first, second = (kmeans.fit(vectors, num_clusters=20, iterations=8, seed=0) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert kmeans.fit(vectors, num_clusters=20, iterations=8, seed=1).tobytes() != first.tobytes()
    assert kmeans.fit(vectors[:7], num_clusters=20, iterations=8, seed=0).shape == (7, 32)


def test_more_iterations_are_closer():
    vectors = unit(3, 800, 16)
    means = [
        float(kmeans.assign(vectors, kmeans.fit(vectors, num_clusters=25, iterations=num, seed=0))[1].mean())
        for num in (1, 3, 12)
    ]
    assert means[0] < means[1] < means[2]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 30))
def test_assign_equals_exact_integers(seed, num_vectors, num_centroids):
    vectors, centroids = unit(seed, num_vectors, 12), unit(seed + 1, num_centroids, 12)
    cluster, similarity = kmeans.assign(vectors, centroids)
    wanted, scores = slow_assign(vectors, centroids)
    assert cluster.dtype == np.int32
    assert cluster.tolist() == wanted.tolist()
    assert similarity.tolist() == scores.tolist()


def test_assign_equals_faiss():
    vectors, centroids = unit(4, 2000, 64), unit(5, 100, 64)
    index = faiss.IndexFlatIP(64)
    index.add(centroids)
    scores, nearest = index.search(vectors, 1)
    cluster, similarity = kmeans.assign(vectors, centroids)
    assert (cluster == nearest[:, 0]).mean() > 0.999
    np.testing.assert_allclose(similarity, scores[:, 0], atol=1e-6)


def test_ties_go_to_the_least_number_and_no_row_sees_another(monkeypatch):
    centroids = np.repeat(unit(6, 9), 3, axis=0)[np.random.default_rng(0).permutation(27)]
    vectors = unit(7, 500)
    cluster, similarity = kmeans.assign(vectors, centroids)
    for row in range(0, 500, 50):
        assert cluster[row] == np.flatnonzero((centroids == centroids[cluster[row]]).all(axis=1))[0]
    for block in (27, 27 * 7, 1):
        monkeypatch.setattr(kmeans, "_BLOCK_SCORES", block)
        again = kmeans.assign(vectors, centroids)
        assert again[0].tobytes() == cluster.tobytes()
        assert again[1].tobytes() == similarity.tobytes()
    monkeypatch.setattr(kmeans, "_BLOCK_PAIRS", 7)
    assert [column.tobytes() for column in kmeans.assign(vectors, centroids)] == [column.tobytes() for column in again]
    turned = kmeans.assign(vectors[::-1], centroids)
    assert turned[0][::-1].tolist() == cluster.tolist()
    # A dozen equal centroids are more than the GEMM proposes.
    many = np.concatenate([unit(8, 2), np.repeat(unit(9, 1), 12, axis=0)])
    assert kmeans.assign(unit(9, 1), many)[0].tolist() == [2]


@pytest.mark.parametrize("num_pairs", [0, 1, 9, 10, 1001])
def test_similarities_in_blocks_are_those_of_all_at_once(monkeypatch, num_pairs):
    monkeypatch.setattr(kmeans, "_BLOCK_PAIRS", 10)
    a, b = unit(10, 40), unit(11, 30)
    i, j = (np.random.default_rng(0).integers(0, num, num_pairs) for num in (40, 30))
    assert kmeans.similarities(a, b, i, j).tobytes() == kmeans.similarity(a[i], b[j]).tobytes()


def test_similarities_need_little_memory():
    import tracemalloc

    a = unit(12, 50, 1280)
    i = np.arange(40_000) % 50
    tracemalloc.start()
    kmeans.similarities(a, a, i, i[::-1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256 << 20  # at once it is 1.2 GB
