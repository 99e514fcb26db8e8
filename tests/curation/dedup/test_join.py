"""The join by lists against all pairs: the same edges, each once, the same bits whatever the cut."""

import numpy as np
import pytest

from curation.dedup import join
from curation.dedup.join import (
    Members,
    assign,
    fit_centroids,
    join_list,
    join_references,
    nearest_in_list,
    pairs_between,
    similarities,
)
from curation.represent.nearest import MARGINS


def exact_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of rows as plain NumPy has them, float32 [N]."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    dot, left_square, right_square = (left * right).sum(1), (left * left).sum(1), (right * right).sum(1)
    return np.asarray(dot / np.maximum(np.sqrt(left_square) * np.sqrt(right_square), 1e-12), np.float32)


def unit_vectors(seed: int, num: int, copies: int = 3, dim: int = 64) -> np.ndarray:
    """Clusters of near vectors, fp16 values, float32 [num * copies, dim]."""
    draw = np.random.default_rng(seed)
    base = np.repeat(draw.standard_normal((num, dim)), copies, axis=0)
    rows = base + draw.standard_normal(base.shape) * draw.uniform(0.1, 1.2, (len(base), 1))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16).astype(np.float32)


def members(vectors: np.ndarray, centroids: np.ndarray, probes: int, ids: np.ndarray) -> Members:
    seen = assign(vectors, centroids, probes)
    return Members(ids, vectors, seen[:, 0], seen)


def all_edges(vectors: np.ndarray, ids: np.ndarray, floor: float) -> dict[tuple[int, int], float]:
    i, j = np.triu_indices(len(vectors), 1)
    similarity = exact_similarity(vectors[i], vectors[j])
    keep = similarity >= np.float32(floor)
    return {
        (min(a, b), max(a, b)): s
        for a, b, s in zip(ids[i[keep]].tolist(), ids[j[keep]].tolist(), similarity[keep].tolist(), strict=True)
    }


@pytest.mark.parametrize(("num_lists", "probes"), [(1, 1), (8, 8), (8, 3), (8, 1)])
def test_lists_find_what_they_say(num_lists: int, probes: int) -> None:
    vectors = unit_vectors(0, 80)
    ids = np.random.default_rng(1).permutation(1000)[: len(vectors)].astype(np.int64)
    centroids = fit_centroids(vectors, num_lists, seed=0)
    all_members = members(vectors, centroids, probes, ids)
    found: dict[tuple[int, int], float] = {}
    for number in range(num_lists):
        a, b, similarity = join_list(all_members, number, 0.5)
        assert (a < b).all()
        for pair in zip(a.tolist(), b.tolist(), similarity.tolist(), strict=True):
            assert pair[:2] not in found, "each edge is written by one list"
            found[pair[0], pair[1]] = pair[2]
    slow = all_edges(vectors, ids, 0.5)
    assert set(found) <= set(slow)
    assert all(slow[pair] == similarity for pair, similarity in found.items()), "the same bits"
    if probes == num_lists:
        assert found == slow


def test_order_and_neighbours_change_no_bit() -> None:
    vectors = unit_vectors(2, 50)
    ids = np.arange(len(vectors), dtype=np.int64)
    centroids = fit_centroids(vectors, 6, seed=0)
    shuffle = np.random.default_rng(3).permutation(len(vectors))
    part = shuffle[:70]
    for number in range(6):
        whole = join_list(members(vectors, centroids, 3, ids), number, 0.4)
        moved = join_list(members(vectors[shuffle], centroids, 3, ids[shuffle]), number, 0.4)
        for left, right in zip(whole, moved, strict=True):
            np.testing.assert_array_equal(left, right)
        a, b, similarity = join_list(members(vectors[part], centroids, 3, ids[part]), number, 0.4)
        keep = np.isin(whole[0], part) & np.isin(whole[1], part)
        np.testing.assert_array_equal(np.stack([a, b]), np.stack([whole[0][keep], whole[1][keep]]))
        np.testing.assert_array_equal(similarity, whole[2][keep])


@pytest.mark.parametrize("num_probes", [1, 3, 7, 8, 20])
def test_probes_are_the_best_lists_in_any_blocks(monkeypatch: pytest.MonkeyPatch, num_probes: int) -> None:
    vectors, centroids = unit_vectors(8, 20), unit_vectors(9, 8, copies=1)
    centroids[5] = centroids[2]  # equal scores
    scores = vectors.astype(np.float64) @ centroids.astype(np.float64).T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :num_probes]
    np.testing.assert_array_equal(assign(vectors, centroids, num_probes), expected)
    monkeypatch.setattr(join, "ASSIGN_SCORES", 30)
    np.testing.assert_array_equal(assign(vectors, centroids, num_probes), expected)


@pytest.mark.parametrize("floor", [0.5, 0.02, -0.2])
def test_no_precision_and_no_block_changes_a_bit(monkeypatch: pytest.MonkeyPatch, floor: float) -> None:
    vectors, centroids = unit_vectors(10, 60), unit_vectors(11, 9, copies=1)
    ids = np.arange(len(vectors))

    def joined() -> list[np.ndarray]:
        everyone = members(vectors, centroids, 4, ids)
        return [everyone.probes, *(column for number in range(9) for column in join_list(everyone, number, floor))]

    expected = joined()
    for precision, rows, columns, scores in (("fp32", 7, 9, 30), ("bf16", 512, 1024, 1 << 20), ("bf16", 7, 9, 30)):
        monkeypatch.setattr(join, "precision_for", lambda num_scores, precision=precision: precision)
        monkeypatch.setattr(join, "BLOCK_ROWS", rows)
        monkeypatch.setattr(join, "BLOCK_COLUMNS", columns)
        monkeypatch.setattr(join, "ASSIGN_SCORES", scores)
        assert [array.tobytes() for array in joined()] == [array.tobytes() for array in expected]


def test_bf16_is_off_by_less_than_its_margin() -> None:
    """Vectors that lie halfway between numbers of bf16, rounded the same way in every dimension."""
    halfway = np.full((1, 512), np.float16(2**-5 * (1 + 2.0**-8 + 2.0**-10)), np.float32)
    halfway = np.concatenate([halfway, np.full((1, 512), np.float16(2**-5 * (1 - 2.0**-9)), np.float32)])
    for vectors in (halfway, unit_vectors(12, 300, dim=512), unit_vectors(13, 100, dim=1024)):
        rounded = join._scores(vectors, vectors, "bf16")
        exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
        assert np.abs(rounded - exact).max() < MARGINS["bf16"]


def test_similarity_is_exact() -> None:
    """Permuting the dimensions changes the order of every sum, and no bit of the result."""
    vectors = unit_vectors(4, 100, dim=512)
    one = exact_similarity(vectors[:-1], vectors[1:])
    permuted = vectors[:, np.random.default_rng(0).permutation(512)]
    np.testing.assert_array_equal(one, exact_similarity(permuted[:-1], permuted[1:]))
    np.testing.assert_array_equal(exact_similarity(vectors, vectors), np.ones(len(vectors), np.float32))


@pytest.mark.parametrize("num_pairs", [0, 1, 1001])
def test_similarities_are_those_of_numpy(num_pairs: int) -> None:
    a, b = unit_vectors(6, 20), unit_vectors(7, 10)
    i, j = (np.random.default_rng(0).integers(0, num, num_pairs) for num in (60, 30))
    assert similarities(a, b, i, j).tobytes() == exact_similarity(a[i], b[j]).tobytes()


def test_pairs_without_lists_are_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(10, 40)
    ids = np.arange(len(vectors))
    monkeypatch.setattr(join, "BLOCK_ROWS", 11)
    i, j, similarity = pairs_between(vectors[::3], vectors, 0.5)
    found = {(3 * int(a), int(b)): s for a, b, s in zip(i, j, similarity, strict=True) if 3 * a < b}
    slow = all_edges(vectors, ids, 0.5)
    assert found == {pair: s for pair, s in slow.items() if pair[0] % 3 == 0}
    assert len(i) == sum((a % 3 == 0) + (b % 3 == 0) for a, b in slow) + len(vectors[::3])


def test_references_that_probe_all_lists_are_all_met() -> None:
    pool, benchmark = unit_vectors(5, 60), unit_vectors(5, 60)[::5]
    centroids = fit_centroids(pool, 8, seed=0)
    ids, reference_ids = np.arange(len(pool)), np.arange(len(benchmark)) + 10_000
    found = []
    for number in range(8):
        edges = join_references(
            members(pool, centroids, 1, ids), members(benchmark, centroids, 8, reference_ids), number, 0.6
        )
        found += list(zip(*(column.tolist() for column in edges), strict=True))
    i, j = np.meshgrid(np.arange(len(pool)), np.arange(len(benchmark)), indexing="ij")
    similarity = exact_similarity(pool[i.ravel()], benchmark[j.ravel()])
    keep = similarity >= np.float32(0.6)
    expected = zip(ids[i.ravel()[keep]], reference_ids[j.ravel()[keep]], similarity[keep], strict=True)
    assert sorted(found) == sorted((int(a), int(b), float(s)) for a, b, s in expected)


def test_a_fit_of_nothing_and_of_little() -> None:
    assert fit_centroids(np.empty((0, 8), np.float32), 16, seed=0).shape == (1, 8)
    assert fit_centroids(unit_vectors(0, 2, copies=1, dim=8), 16, seed=0).shape == (2, 8)
    vectors = unit_vectors(0, 50)
    np.testing.assert_array_equal(fit_centroids(vectors, 5, seed=3), fit_centroids(vectors, 5, seed=3))


@pytest.mark.parametrize("num_nearest", [0, 1, 5, 1000])
@pytest.mark.parametrize("rows", [7, 512])
def test_the_nearest_are_those_of_a_sorted_list(monkeypatch: pytest.MonkeyPatch, num_nearest: int, rows: int) -> None:
    monkeypatch.setattr(join, "BLOCK_ROWS", rows)
    monkeypatch.setattr(join, "BLOCK_COLUMNS", rows)
    vectors = unit_vectors(4, 40)
    vectors[50:60] = vectors[49]  # equally near: the least ids
    ids = np.random.default_rng(5).permutation(1000)[: len(vectors)].astype(np.int64)
    all_members = members(vectors, fit_centroids(vectors, 5, seed=0), 3, ids)
    num_home = 0
    for number in range(5):
        found = nearest_in_list(all_members, all_members, number, floor=0.2, num_nearest=num_nearest)
        pairs = list(zip(found.home.tolist(), found.other.tolist(), found.similarity.tolist(), strict=True))
        wanted = []
        looking = np.flatnonzero((all_members.probes == number).any(1))
        for home in np.flatnonzero(all_members.home == number):
            others = looking[looking != home]
            scores = exact_similarity(np.repeat(vectors[[home]], len(others), 0), vectors[others])
            order = [at for at in np.lexsort((ids[others], -scores)) if scores[at] >= np.float32(0.2)]
            wanted += [(home, others[at], scores[at]) for at in order[:num_nearest]]
            num_home += 1
        assert pairs == wanted
    assert num_home == len(vectors)


def test_what_a_device_proposes_holds_all_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "DEVICE_ROWS", 50)
    monkeypatch.setattr(join, "DEVICE_COLUMNS", 70)
    vectors = unit_vectors(6, 60)
    left, right = vectors[:110], vectors[40:]
    proposed = {
        (i, j)
        for rows in join.torch_candidates(left, right, 0.5, "cpu")
        for i, j in zip(*(r.tolist() for r in rows), strict=True)
    }
    i, j, _ = pairs_between(left, right, 0.5)
    edges = set(zip(i.tolist(), j.tolist(), strict=True))
    assert edges <= proposed
    assert len(proposed) < 1.2 * len(edges)
