"""Hierarchical k-means: its shape, its resampling step by step, and that it spreads a sample over what is rare."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.cluster import KMeans

from curation.represent import kmeans
from curation.represent.hierarchy import Level, check_levels, closest, fit_hierarchy, fit_level
from curation.retrieve.balance import allocate, choose
from training.config import ConfigError


def stored(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors as they are stored: fp16 values in float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def unit(seed: int, num: int, dim: int = 16) -> np.ndarray:
    return stored(np.random.default_rng(seed).normal(size=(num, dim)))


def level(num_clusters: int, sample_per_cluster: int = 3, resampling_steps: int = 2) -> Level:
    return Level(num_clusters=num_clusters, sample_per_cluster=sample_per_cluster, resampling_steps=resampling_steps)


def test_levels_have_their_shape_and_each_cluster_its_nearest_parent():
    vectors = unit(0, 600)
    tree = fit_hierarchy(vectors, [level(60), level(15), level(4)], iterations=6, seed=0)
    assert [one.shape for one in tree.centroids] == [(60, 16), (15, 16), (4, 16)]
    assert [one.shape for one in tree.parents] == [(60,), (15,)]
    for centroids in tree.centroids:
        assert centroids.dtype == np.float32
        assert np.array_equal(centroids, centroids.astype(np.float16))
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=2e-3)
    for parent, lower, upper in zip(tree.parents, tree.centroids[:-1], tree.centroids[1:], strict=True):
        assert parent.dtype == np.int32
        assert parent.tolist() == (lower.astype(np.float64) @ upper.astype(np.float64).T).argmax(axis=1).tolist()


def test_a_hierarchy_is_the_same_again():
    vectors = unit(1, 300)
    levels = [level(30), level(6)]
    first, second, other = (fit_hierarchy(vectors, levels, iterations=5, seed=seed) for seed in (0, 0, 1))
    assert [one.tobytes() for part in first for one in part] == [one.tobytes() for part in second for one in part]
    assert first.centroids[0].tobytes() != other.centroids[0].tobytes()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 40), st.integers(1, 6))
def test_closest_equals_a_loop_and_ties_go_to_the_least_number(seed, num_points, num):
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, 5, num_points).astype(np.int32)
    similarity = rng.integers(0, 4, num_points).astype(np.float32)
    wanted = []
    for one in range(5):
        members = np.flatnonzero(cluster == one).tolist()
        wanted += sorted(members, key=lambda member: (-similarity[member], member))[:num]
    assert closest(cluster, similarity, num).tolist() == sorted(wanted)


def test_resampling_is_a_refit_on_the_closest_points():
    points = unit(2, 400)
    plain = kmeans.fit(points, num_clusters=20, iterations=5, seed=4)
    assert fit_level(points, level(20, resampling_steps=0), iterations=5, seed=4).tobytes() == plain.tobytes()
    scores = points.astype(np.float64) @ plain.astype(np.float64).T
    sample = []
    for one in range(20):
        members = np.flatnonzero(scores.argmax(axis=1) == one)
        sample += members[np.argsort(-scores[members, one], kind="stable")][:4].tolist()
    once = kmeans.fit(points[sorted(sample)], num_clusters=20, iterations=5, seed=4)
    assert fit_level(points, level(20, 4, 1), iterations=5, seed=4).tobytes() == once.tobytes()


def test_equal_points_make_fewer_clusters_and_still_a_tree():
    vectors = np.repeat(unit(3, 8), 10, axis=0)
    tree = fit_hierarchy(vectors, [level(16, 1, 1), level(10, 1, 1)], iterations=5, seed=0)
    lower, upper = tree.centroids
    assert 1 <= len(upper) <= len(lower) <= 8
    assert len(tree.parents[0]) == len(lower)
    assert tree.parents[0].max() < len(upper)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "hierarchy.levels: none is given; a hierarchy needs at least one"),
        (
            [level(51), level(5)],
            "hierarchy.levels.0.num_clusters = 51: there are only 50 vectors; "
            "take at most 50 clusters, or a larger sample",
        ),
        (
            [level(40), level(20), level(20)],
            "hierarchy.levels.2.num_clusters = 20: the level below has 20, and each level needs "
            "fewer than that below it; take at most 19",
        ),
        (
            [level(10), level(11)],
            "hierarchy.levels.1.num_clusters = 11: the level below has 10, and each level needs "
            "fewer than that below it; take at most 9",
        ),
    ],
)
def test_levels_that_cannot_be_fitted(levels, message):
    with pytest.raises(ConfigError) as error:
        fit_hierarchy(unit(4, 50), levels, iterations=2, seed=0)
    assert str(error.value) == message


def test_levels_that_can_be_fitted():
    check_levels([level(50), level(49), level(1)], 50)
    for wrong in ({"num_clusters": 0}, {"sample_per_cluster": 0}, {"resampling_steps": -1}, {"size": 1}):
        with pytest.raises(ValidationError):
            Level(**{"num_clusters": 5, "sample_per_cluster": 2, "resampling_steps": 1, **wrong})


def entropy(member: np.ndarray, num: int) -> float:
    """Of the counts of the true clusters, as a share of that of a uniform sample."""
    counts = np.bincount(member, minlength=num)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(num))


def evenness(seed: int, levels: list[Level]) -> dict[str, float]:
    """Entropies of samples of 400 of 20 true clusters of 2400 to 26 vectors: random, by the tree, by its leaves."""
    rng = np.random.default_rng(seed)
    member = np.repeat(np.arange(20), (2400 / np.arange(1, 21) ** 1.5).astype(int))
    vectors = stored(unit(seed + 10, 20)[member] + 0.2 * rng.normal(size=(len(member), 16)))
    tree = fit_hierarchy(vectors, levels, iterations=10, seed=seed)
    cluster, _ = kmeans.assign(vectors, tree.centroids[0])
    sizes = np.bincount(cluster, minlength=len(tree.centroids[0]))
    order_key = rng.integers(0, 1 << 60, len(member))
    found = {"random": entropy(member[rng.choice(len(member), 400, replace=False)], 20)}
    for name, parents in (("tree", tree.parents), ("leaves", ())):
        quota = allocate(parents, sizes, 400, "key")
        places = choose(cluster, quota, order_key=order_key, image_id=np.arange(len(member)))
        assert len(places) == 400
        found[name] = entropy(member[places], 20)
    return found


def test_a_balanced_sample_is_more_even_over_unequal_clusters_than_a_random_one():
    runs = [evenness(seed, [level(150, 8, 10), level(20, 3, 10)]) for seed in range(3)]
    assert np.mean([run["tree"] for run in runs]) > np.mean([run["random"] for run in runs]) + 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_from_a_spread_start_resampling_makes_the_leaves_themselves_even(monkeypatch, seed):
    def fit(vectors, *, num_clusters, iterations, seed):
        num_clusters = min(num_clusters, len(vectors))
        found = KMeans(num_clusters, init="k-means++", n_init=1, max_iter=iterations, random_state=seed).fit(vectors)
        return stored(found.cluster_centers_)

    monkeypatch.setattr(kmeans, "fit", fit)
    plain = evenness(seed, [level(150, 8, 0), level(20, 3, 0)])
    resampled = evenness(seed, [level(150, 8, 4), level(20, 3, 4)])
    assert plain["random"] + 0.05 < plain["leaves"] < resampled["leaves"] - 0.1
    assert min(resampled["leaves"], resampled["tree"]) > 0.93  # 0.66 at random
