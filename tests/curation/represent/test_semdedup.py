"""SemDeDup: the blocked rule and the stage, against ten slow lines."""

import hashlib
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.represent import semdedup
from curation.represent.alike import Before, in_order, ranked
from curation.schema import UNDER_WAY
from curation.store import open_store
from pipelines.runner import InlineExecutor

MADE = runpy.run_path(str(Path(__file__).parents[1] / "retrieve" / "conftest.py"))
unit, sha256_of = MADE["unit"], MADE["sha256_of"]
Rows = list[tuple[int, int, float, int]]  # image_id, nearest_id, similarity, representative_id


def exact_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of rows, float32 [N]."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    dot, left_square, right_square = (left * right).sum(1), (left * left).sum(1), (right * right).sum(1)
    return np.asarray(dot / np.maximum(np.sqrt(left_square) * np.sqrt(right_square), 1e-12), np.float32)


def slow(vectors: dict[int, np.ndarray], cluster: dict[int, int], near: dict[int, float], **config: Any) -> Rows:
    """The rule as it reads: cluster by cluster, each picture against all before it."""
    found: Rows = []
    for one in set(cluster.values()):
        members = [image for image in cluster if cluster[image] == one]

        def place(image: int) -> tuple[Any, ...]:
            sha256 = sha256_of(image)
            draw = hashlib.sha256(f"{config.get('seed', 0)}|{sha256}".encode()).hexdigest()
            which = config.get("which_to_keep", "hard")
            return (draw if which == "random" else near[image] if which == "hard" else -near[image]), sha256, image

        kept: dict[int, int] = {}
        for at, image in enumerate(ordered := sorted(members, key=place)):
            cosines = [exact_similarity(vectors[image][None], vectors[other][None])[0] for other in ordered[:at]]
            nearest = int(np.argmax(cosines)) if cosines else -1
            is_alike = nearest >= 0 and cosines[nearest] > np.float32(1 - config["eps"])
            kept[image] = kept[ordered[nearest]] if is_alike else image
            if is_alike:
                found.append((image, ordered[nearest], float(cosines[nearest]), kept[image]))
    return sorted(found)


# --- the rule -------------------------------------------------------------------------------------------------------


def test_of_a_chain_the_first_stays_whatever_else_goes():
    angles = np.array([0.0, 0.2, 0.4, 2.0])  # A ~ B ~ C, A is not near C
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    before = Before(4, eps=0.03)
    chain = ranked(np.arange(4), vectors)
    before.find(chain, chain)
    assert before.rank.tolist() == [-1, 0, 1, -1]
    assert before.kept().tolist() == [0, 0, 0, 3]
    assert before.similarity[[0, 3]].tolist() == [np.float32(0.97)] * 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eps", [1e-4, 0.05, 0.9, 2.0])
def test_blocks_in_any_order_find_the_same(seed, eps):
    rng = np.random.default_rng(seed)
    vectors = unit(rng, 90, 8)
    vectors[rng.integers(0, 90, 40)] = vectors[rng.integers(0, 90, 40)]  # ties
    vectors[5:9] = (vectors[4].astype(np.float32) * [[0.5], [0.9], [1.1], [2.0]]).astype(np.float16)
    whole = Before(90, eps)
    every = ranked(np.arange(90), vectors)
    whole.find(every, every)
    for row in range(90):
        cosines = exact_similarity(np.repeat(vectors[row : row + 1], row, 0), vectors[:row])
        nearest = int(np.argmax(cosines)) if row else -1
        assert whole.rank[row] == (nearest if row and cosines[nearest] > np.float32(1 - eps) else -1)
        assert whole.rank[row] < 0 or whole.similarity[row] == cosines[nearest]
    parts = [np.sort(part) for part in np.array_split(rng.permutation(90), 4)]
    cut = Before(90, eps)
    for left in parts:
        for right in parts:
            cut.find(ranked(left, vectors[left]), ranked(right, vectors[right]))
    assert np.array_equal(whole.rank, cut.rank)
    assert np.array_equal(whole.similarity, cut.similarity)


def test_order_of_a_cluster():
    rows = {"cluster": [1, 0, 0, 0, 0], "similarity": [0.1, 0.9, 0.5, 0.5, 0.5], "tie": [0, 1, 7, 3, 3]}
    columns = {name: np.array(values) for name, values in rows.items()} | {"image_id": np.array([1, 2, 3, 5, 4])}
    assert in_order("hard", **columns).tolist() == [4, 3, 2, 1, 0]
    assert in_order("easy", **columns).tolist() == [1, 4, 3, 2, 0]
    assert in_order("random", **columns).tolist() == [1, 4, 3, 2, 0]


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Three pool shards of 60 in 6 clusters, some pictures alike and some the same; a set of each mode that draws."""
    rng = np.random.default_rng(5)
    sets = {
        "near": {"mode": "sample", "k": 5},
        "filled": {"mode": "cluster", "min_queries": 1, "per_cluster": 40, "cap": 60},
        "even": {"mode": "balanced", "total": 60},
    }
    made = MADE["Made"](tmp_path, unit(rng, 6, 16), sets)
    pool = unit(rng, 180, 16)
    pool[20:60] = pool[rng.integers(0, 20, 40)]
    moved = pool[rng.integers(0, 60, 60)].astype(np.float64) + rng.normal(size=(60, 16)) * 0.02
    pool[60:120] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    pool = pool[rng.permutation(180)]
    made.add("web", [pool[:60], pool[60:120], pool[120:]])
    for name in ("near", "filled"):
        made.add(name, [unit(rng, 14, 16)])
    return made


def matches(made: Any) -> Rows:
    rows = made.rows("semantic_duplicates")
    return [(row["image_id"], row["nearest_id"], row["similarity"], row["representative_id"]) for row in rows]


def wanted(made: Any, **config: Any) -> Rows:
    ids = made.ids("web")
    near = {row["image_id"]: row["similarity"] for row in made.rows("clusters")}
    vectors = {one: made.vectors[one] for one in ids}
    return slow(vectors, {one: made.cluster[one] for one in ids}, {one: near[one] for one in ids}, **config)


@pytest.mark.parametrize("which", ["hard", "easy", "random"])
@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.5])
def test_the_stage_is_the_slow_rule(made, which, eps):
    config = {"eps": eps, "which_to_keep": which, "seed": 3}
    made.run(semdedup=config)
    expected = wanted(made, **config)
    assert matches(made) == expected
    assert 30 < len(expected) < 180
    verdicts = {row["image_id"]: row for row in made.rows("semantic")}
    assert list(verdicts) == made.ids("web")
    found = {row[0]: row for row in expected}
    for image, row in verdicts.items():
        alike = found.get(image)
        assert row["keep"] == (alike is None)
        assert row["reason"] == (None if alike is None else "semantic_duplicate")
        assert (row["nearest_id"], row["score"]) == ((None, None) if alike is None else alike[1:3])
        assert row["threshold"] == (None if alike is None else np.float32(1 - eps))
        assert row["representative_id"] == (image if alike is None else alike[3])
        assert verdicts[row["representative_id"]]["keep"]
    assert not [path for table in UNDER_WAY for path in open_store(f"{made.folder}/run").list(table)]


@pytest.mark.parametrize(
    ("piece_rows", "memory_mb", "group_shards"), [(60, 1500, 64), (120, 0.005, 1), (1000, 0.002, 2)]
)
def test_neither_pieces_nor_memory_nor_groups_change_a_byte(made, monkeypatch, piece_rows, memory_mb, group_shards):
    config = {"eps": 0.01}
    made.run(semdedup=config)
    before, verdicts = matches(made), made.digests("semantic")
    made.run()  # off: nothing is left of it
    monkeypatch.setattr(semdedup, "_PIECE_ROWS", piece_rows)
    monkeypatch.setattr("curation.retrieve.retrieve.GROUP_SHARDS", group_shards)
    made.run(semdedup=config, memory_mb=memory_mb)
    assert (matches(made), made.digests("semantic")) == (before, verdicts)


def test_off_it_lets_all_through_and_reads_no_vector(made, monkeypatch):
    monkeypatch.setattr(semdedup, "vectors_at", None)
    costs = made.run().costs
    assert "semantic_duplicates" not in costs
    assert all(row["keep"] and row["representative_id"] == row["image_id"] for row in made.rows("semantic"))


def test_retrieval_sees_only_what_is_kept(made):
    made.run(semdedup={"eps": 0.01})
    kept = {row["image_id"] for row in made.rows("semantic") if row["keep"]}
    assert kept < set(made.ids("web"))
    taken = made.rows("neighbours")
    assert {row["query_set"] for row in taken} == {"near", "filled", "even"}
    assert {row["image_id"] for row in taken} <= kept
    sizes: dict[int, int] = {}
    for one in kept:
        sizes[made.cluster[one]] = sizes.get(made.cluster[one], 0) + 1
    assert {row["cluster"]: row["num_pictures"] for row in made.rows("cluster_sizes")} == sizes
    judged = {row["image_id"] for row in made.rows("selection") if row["image_id"] in made.cluster}
    assert judged & set(made.ids("web")) == kept


def test_a_killed_run_goes_on_and_a_second_one_does_nothing(made, monkeypatch):
    monkeypatch.setattr(semdedup, "_PIECE_ROWS", 60)
    config = {"eps": 0.01}
    made.run(semdedup=config)
    before = matches(made)
    assert made.run(semdedup=config).num_jobs == 0
    submitted = []
    real = InlineExecutor.submit

    def submit(self: Any, job: Any, resources: Any) -> Any:
        if job.stage == "semantic_duplicates":
            submitted.append(job.label)
            if len(submitted) == 5:  # three sorts, one range, then death
                raise KeyboardInterrupt
        return real(self, job, resources)

    monkeypatch.setattr(InlineExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        made.run(semdedup={"eps": 0.02})
    assert list(open_store(f"{made.folder}/run").list("semantic_vectors"))
    made.run(semdedup={"eps": 0.02})
    assert len(submitted) == 5 + 2 + 1  # two ranges and the one group
    assert matches(made) == wanted(made, eps=0.02)
    assert not list(open_store(f"{made.folder}/run").list("semantic_vectors"))
    made.run(semdedup=config)
    assert matches(made) == before
