"""k-means: what a fit must find, and an assignment that is exact and the same in any batch."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.represent import kmeans, nearest
from curation.represent.nearest import Centroids


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


@settings(max_examples=25)
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
    for rows in (1, 7, 499):
        monkeypatch.setitem(nearest._MOST_ROWS, "cpu", rows)
        monkeypatch.setitem(nearest._LEAST_ROWS, "cpu", rows)
        again = kmeans.assign(vectors, centroids)
        assert again[0].tobytes() == cluster.tobytes()
        assert again[1].tobytes() == similarity.tobytes()
    turned = kmeans.assign(vectors[::-1], centroids)
    assert turned[0][::-1].tolist() == cluster.tolist()
    # A dozen equal centroids are more than the GEMM proposes.
    many = np.concatenate([unit(8, 2), np.repeat(unit(9, 1), 12, axis=0)])
    assert kmeans.assign(unit(9, 1), many)[0].tolist() == [2]


def test_every_finite_fp16_value_is_widened_to_itself():
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)].reshape(2, -1)
    assert nearest.widened(values).tobytes() == values.astype(np.float32).tobytes()


@pytest.mark.parametrize("dim", [24, 96])
@pytest.mark.parametrize("spread", [1.0, 0.02])  # all over the sphere, and all alike: bf16 tells hardly any apart
def test_neither_precision_nor_engine_changes_a_byte(dim, spread):
    vectors, centroids = (
        (unit(20, 1, dim) + spread * unit(seed, num, dim)).astype(np.float16) for seed, num in ((21, 700), (22, 300))
    )
    vectors, centroids = (
        (a / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True)).astype(np.float16)
        for a in (vectors, centroids)
    )
    centroids[100:110] = centroids[5]  # ties
    wanted = Centroids(centroids, precision="fp32").of(vectors)
    exact = kmeans.similarities(vectors, centroids, *(a.ravel() for a in np.indices((700, 300)))).reshape(700, 300)
    assert wanted.cluster.tolist() == exact.argmax(axis=1).tolist()
    assert wanted.similarity.tolist() == exact.max(axis=1).tolist()
    for precision in ("fp32", "bf16"):
        by_torch = Centroids(centroids, precision="bf16")
        by_torch._margin = nearest.MARGINS[precision]
        if precision == "fp32":
            by_torch._held = by_torch._held_exactly
        for found in (
            Centroids(centroids, precision=precision).of(vectors),
            by_torch._by_torch(nearest.widened(vectors)),
        ):
            assert [column.tobytes() for column in found] == [column.tobytes() for column in wanted]


def test_bf16_gives_way_where_it_tells_too_few_apart():
    alike = (unit(23, 1, 64) + 0.01 * unit(24, 600, 64)).astype(np.float16)
    centroids = Centroids(alike[:200], precision="bf16")
    assert centroids._margin == nearest.MARGINS["bf16"]
    centroids.of(alike)
    assert centroids._margin == nearest.MARGINS["fp32"]
    apart = Centroids(unit(25, 200, 384), precision="bf16")
    apart.of(unit(26, 600, 384))
    assert apart._margin == nearest.MARGINS["bf16"]


def test_a_fit_reaches_what_faiss_and_scikit_learn_reach():
    """Same start, same number of iterations: the inertia of spherical k-means, within 0.1 %."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(5)
    vectors = unit(27, 60, 48)[rng.integers(0, 60, 6000)] + 0.7 * unit(28, 6000, 48)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    begin = vectors[:100]
    centroids = begin.astype(np.float16)
    for _ in range(10):
        sums = kmeans.Sums(100, 48)
        sums.add(vectors, Centroids(centroids))
        centroids = kmeans.directions(centroids, sums.total)
        kmeans.split(centroids, sums.count)
    ours = 2 - 2 * kmeans.assign(vectors, centroids)[1].mean()
    peer = faiss.Kmeans(48, 100, niter=10, spherical=True, max_points_per_centroid=6000)
    peer.train(vectors, init_centroids=begin)
    of_faiss = 2 - 2 * (vectors @ peer.centroids.T).max(axis=1).mean()
    assert abs(ours / of_faiss - 1) < 1e-3
    # Euclidean k-means of unit vectors ends elsewhere, but not far: its centres on the sphere are no better.
    sklearn = KMeans(100, init=begin, n_init=1, max_iter=10, random_state=0).fit(vectors).cluster_centers_
    sklearn /= np.linalg.norm(sklearn, axis=1, keepdims=True)
    assert ours < 1.005 * (2 - 2 * (vectors @ sklearn.T).max(axis=1).mean())


def test_the_start_is_spread_as_scikit_learns():
    """k-means++: among many seeds, groups that lie apart are left out as rarely as by scikit-learn's."""
    from sklearn.cluster import kmeans_plusplus

    rng = np.random.default_rng(6)
    member = rng.permutation(np.repeat(np.arange(12), 25))
    vectors = unit(29, 12, 24)[member] + 0.05 * unit(30, 300, 24)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    found, wanted = [], []
    for seed in range(40):
        rows = kmeans._spread(vectors.astype(np.float32), np.random.default_rng(seed).random(12))
        assert len(set(rows.tolist())) == 12
        found.append(len(np.unique(member[rows])))
        _, at = kmeans_plusplus(vectors.astype(np.float64), 12, random_state=seed, n_local_trials=1)
        wanted.append(len(np.unique(member[at])))
    assert np.mean(found) > np.mean(wanted) - 0.3


def test_the_start_holds_no_row_twice_and_equal_vectors_fill_up():
    for seed in range(20):
        vectors = unit(seed, 60, 16).astype(np.float32)
        rows = kmeans._spread(vectors, np.random.default_rng(seed).random(59))
        assert len(set(rows.tolist())) == 59
    vectors = np.repeat(unit(31, 3), 5, axis=0)
    rows = kmeans._spread(vectors, np.random.default_rng(0).random(8))
    assert len(rows) == len(set(rows.tolist())) == 8
    assert {row // 5 for row in rows[:3].tolist()} == {0, 1, 2}


def test_directions_are_the_same_in_any_block():
    total, centroids = np.random.default_rng(0).normal(size=(64, 384)), unit(33, 64, 384)
    whole = kmeans.directions(centroids, total)
    blocks = [kmeans.directions(centroids[n : n + 1], total[n : n + 1]) for n in range(64)]
    assert np.concatenate(blocks).tobytes() == whole.tobytes()


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_an_empty_cluster_gets_half_of_the_largest(seed, num):
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 4, num) * rng.integers(0, 2, num)
    before = unit(seed, num, 16).astype(np.float16)
    after = before.copy()
    kmeans.split(after, count)
    moved = np.flatnonzero((after != before).any(axis=1))
    empty = np.flatnonzero(count == 0)
    spare = int(np.maximum(count - 1, 0).sum())
    filled = [k for k in moved if k in empty]
    assert len(filled) == min(len(empty), spare)
    assert all(count[k] >= 2 for k in moved if k not in empty)
    np.testing.assert_allclose(np.linalg.norm(after.astype(np.float64), axis=1), 1, atol=2e-3)


def test_sums_do_not_depend_on_order_or_cut():
    vectors = unit(32, 900, 40).astype(np.float16)
    centroids = Centroids(vectors[:30])
    whole = kmeans.Sums(30, 40)
    whole.add(vectors, centroids)
    cut = kmeans.Sums(30, 40)
    for piece in np.array_split(vectors[np.random.default_rng(1).permutation(900)], 7):
        cut.add(piece, centroids)
    assert cut.total.tobytes() == whole.total.tobytes()
    assert cut.count.tolist() == whole.count.tolist()
    assert whole.count.sum() == 900


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
