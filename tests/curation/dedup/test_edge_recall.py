"""The recall of the edges of a run: an exact search of a sample against all pairs, whatever the cut."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from curation.dedup import edge_recall as module
from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.describe import vectors_table
from curation.dedup.edge_recall import EdgeRecall, Pairs, told_of_recall, wilson_lower
from curation.dedup.edges import Edges, EdgesConfig, FitQuantiser
from curation.retrieve import retrieve
from curation.retrieve.retrieve import drawn
from curation.schema import image_ids
from tests.curation.dedup.test_join import exact_similarity

DUPLICATE, LEAKAGE = 0.6, 0.5
DESCRIPTOR = DescriptorConfig(duplicate_threshold=DUPLICATE, leakage_threshold=LEAKAGE)
SHARDS = {2_000_000: 31, 2_000_001: 40, 2_000_002: 0, 2_000_003: 25}  # of the pool, with their pictures
BENCHMARKS = {0: 12, 1_000_000: 9}


def config(**values: Any) -> EdgesConfig:
    return EdgesConfig.model_validate({"num_lists": 12, "probes": 1, "reference_probes": 1, **values})


@pytest.fixture
def searched(memory_io: Any) -> Any:
    """Clusters of near vectors, near dropped every ninth picture; edges by one probe, so that some are missed."""
    draw = np.random.default_rng(3)
    bases = draw.standard_normal((20, 48))
    for shard, num in {**BENCHMARKS, **SHARDS}.items():
        rows = bases[draw.integers(0, len(bases), num)] + draw.standard_normal((num, 48)) * 0.75
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        ids, names = image_ids(shard, num), [f"{shard}-{row}" for row in range(num)]
        memory_io.roles[shard] = "benchmark" if shard in BENCHMARKS else "pool"
        columns = (pa.chunked_array([pa.array(ids)]), pa.chunked_array([pa.array(names, pa.string())]))
        memory_io.tables[memory_io.part("descriptors", shard)] = vectors_table(*columns, rows.astype(np.float32))
        keep = np.arange(num) % 9 != 4 if shard in SHARDS else np.ones(num, bool)
        kept_names = [name for name, one in zip(names, keep, strict=True) if one]
        for verdict in ("near", "safety"):
            memory_io.put(verdict, shard, image_id=ids, sha256=names, keep=keep)
            memory_io.keep(verdict, shard, ids[keep], kept_names)
    sources = {shard // 1_000_000: memory_io.roles[shard] for shard in memory_io.roles}
    memory_io.put("sources", 0, source_id=list(sources), name=list(map(str, sources)), role=list(sources.values()))
    return memory_io


def search(io: Any, edges: EdgesConfig) -> list[dict[str, Any]]:
    FitQuantiser(edges).run(io, io.map)
    Edges(edges, DESCRIPTOR).run(io, io.map)
    return measure(io, edges)


def measure(io: Any, edges: EdgesConfig) -> list[dict[str, Any]]:
    EdgeRecall(edges, DUPLICATE, LEAKAGE).run(io, io.map)
    assert not io.parts("recall_sample")
    rows: list[dict[str, Any]] = io.tables[io.part("edge_recall", 0)].to_pylist()
    return rows


def pictures(io: Any, shards: Any) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids, sha256 and vectors of what near kept."""
    ids, names, vectors = [], [], []
    for shard in shards:
        kept = io.kept("near", shard)
        table = io.tables[io.part("descriptors", shard)]
        mine = np.isin(table["image_id"].to_numpy(), kept["image_id"].to_numpy())
        ids.append(kept["image_id"].to_numpy())
        names += kept["sha256"].to_pylist()
        vectors += [row for row, one in zip(table["vector"].to_pylist(), mine, strict=True) if one]
    return np.concatenate(ids), names, np.array(vectors, np.float32)


def expected(io: Any, edges: EdgesConfig) -> list[tuple[int, int]]:
    """Pairs that there are and those that are stored, by all pairs: of the pool, of benchmarks."""
    ids, names, vectors = pictures(io, SHARDS)
    others, _, references = pictures(io, BENCHMARKS)
    sample = set(ids[np.argsort(drawn(edges.fit_seed, names))[: edges.recall_sample]].tolist())
    stored = {table: set() for table in ("edges", "reference_edges")}
    for table, (left, right) in {"edges": ("a", "b"), "reference_edges": ("image_id", "reference_id")}.items():
        for part in io.parts(table):
            rows = io.tables[part]
            stored[table] |= set(zip(rows[left].to_pylist(), rows[right].to_pylist(), strict=True))
    of_pool = {
        (int(ids[i]), int(ids[j]))
        for i in range(len(ids))
        for j in range(i + 1, len(ids))
        if {ids[i], ids[j]} & sample
        and exact_similarity(vectors[i : i + 1], vectors[j : j + 1])[0] >= np.float32(DUPLICATE)
    }
    of_benchmarks = {
        (int(one), int(other))
        for one, a in zip(ids, vectors, strict=True)
        for other, b in zip(others, references, strict=True)
        if one in sample and exact_similarity(a[None], b[None])[0] >= np.float32(LEAKAGE)
    }
    return [
        (len(of_pool), len(of_pool & stored["edges"])),
        (len(of_benchmarks), len(of_benchmarks & stored["reference_edges"])),
    ]


@pytest.mark.parametrize("num_sampled", [1, 20, 1000])
def test_what_all_pairs_say(searched: Any, num_sampled: int) -> None:
    edges = config(recall_sample=num_sampled)
    rows = search(searched, edges)
    assert [row["kind"] for row in rows] == ["pool", "benchmark"]
    assert [(row["num_edges"], row["num_found"]) for row in rows] == expected(searched, edges)
    num_kept = sum(len(searched.kept("near", shard)) for shard in SHARDS)
    for row, threshold in zip(rows, (DUPLICATE, LEAKAGE), strict=True):
        assert row["threshold"] == pytest.approx(threshold)
        assert (row["num_pictures"], row["num_sampled"]) == (num_kept, min(num_sampled, num_kept))
        if num_sampled > 1:
            assert 0 < row["num_found"] < row["num_edges"], "one probe misses some"
            assert row["recall"] == pytest.approx(row["num_found"] / row["num_edges"])
            assert (row["recall_at_least"] == row["recall"]) == (num_sampled == 1000)


def test_lists_that_are_all_probed_find_all(searched: Any) -> None:
    for row in search(searched, config(probes=12, reference_probes=12)):
        assert row["num_found"] == row["num_edges"] > 0
        assert row["recall"] == row["recall_at_least"] == 1


def test_a_lost_part_of_the_edges_is_seen(searched: Any) -> None:
    edges = config(probes=12, reference_probes=12)
    search(searched, edges)
    part = max(searched.parts("edges"), key=lambda one: len(searched.tables[one]))
    lost = len(searched.tables[part])
    searched.tables[part] = searched.tables[part][:0]
    rows = measure(searched, edges)
    assert rows[0]["num_edges"] - lost <= rows[0]["num_found"] < rows[0]["num_edges"]
    assert rows[1]["recall"] == 1


def test_the_cut_changes_no_byte(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = config(recall_sample=20)
    whole = search(searched, edges)
    pairs = searched.tables[searched.parts("recall_pairs")[0]]
    for part in searched.parts("recall_pairs"):
        del searched.tables[part]
    monkeypatch.setattr(retrieve, "GROUP_SHARDS", 1)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    assert measure(searched, edges) == whole
    assert len(searched.parts("recall_pairs")) == len(SHARDS) + len(BENCHMARKS)
    parts = pa.concat_tables([searched.tables[part] for part in searched.parts("recall_pairs")])
    assert parts.sort_by([("image_id", "ascending"), ("other_id", "ascending")]).equals(pairs)


def test_no_benchmark_and_no_sample(searched: Any) -> None:
    for shard in BENCHMARKS:
        del searched.roles[shard]
    assert [row["kind"] for row in search(searched, config())] == ["pool"]
    for part in searched.parts("edge_recall"):
        del searched.tables[part]
    stage = EdgeRecall(config(recall_sample=0), DUPLICATE, LEAKAGE)
    stage.run(searched, searched.map)
    assert not searched.parts("edge_recall")
    assert not list(stage.told(searched))


def test_a_low_recall_tells_what_to_raise(searched: Any) -> None:
    search(searched, config(recall_sample=20))
    lines = list(EdgeRecall(config(recall_sample=20), DUPLICATE, LEAKAGE).told(searched))
    assert lines[0].startswith("edges: ")
    assert "of the pictures with a cosine from 0.60 on to 20 sampled pictures found (" in lines[0]
    assert "with 95% confidence)" in lines[0]
    assert lines[0].endswith("; raise edges.probes above 1")
    assert lines[1].endswith("; raise edges.reference_probes above 1")
    full = config(probes=12, reference_probes=12)
    search(searched, full)
    lines = list(EdgeRecall(full, DUPLICATE, LEAKAGE).told(searched))
    assert lines[0].startswith("edges: 100.00% of the pictures with a cosine from 0.60 on to all 86 pictures found (")
    assert not any("raise" in line for line in lines)


def test_a_pool_without_copies_has_no_recall(searched: Any) -> None:
    edges = config()
    search(searched, edges)
    stage = EdgeRecall(edges, 0.9999, 0.9999)
    stage.run(searched, searched.map)
    row = searched.tables[searched.part("edge_recall", 0)].to_pylist()[0]
    assert (row["num_edges"], row["recall"], row["recall_at_least"]) == (0, None, None)
    assert told_of_recall(row) == (
        "recall is not known: an exact search found no pictures with a cosine from 1.00 on to 86 sampled pictures"
    )


@pytest.mark.parametrize(("num_found", "num"), [(0, 5), (1, 1), (412, 413), (9, 10), (137, 137)])
def test_the_lower_bound_is_wilsons(num_found: int, num: int) -> None:
    interval = binomtest(num_found, num, alternative="greater").proportion_ci(0.95, method="wilson")
    assert wilson_lower(num_found, num) == pytest.approx(interval.low, abs=1e-12)


def test_pairs_count_once_and_strangers_never() -> None:
    draw = np.random.default_rng(0)
    left, right = draw.integers(0, 50, (2, 300))
    met = draw.integers(-5, 60, (2, 400))
    pairs = Pairs(left, right)
    for block in np.split(met, 4, axis=1):
        pairs.meet(*block)
    wanted = set(zip(left.tolist(), right.tolist(), strict=True))
    assert (pairs.num, pairs.num_met) == (len(wanted), len(wanted & set(zip(*met.tolist(), strict=True))))
    empty = Pairs(left[:0], right[:0])
    empty.meet(*met)
    assert (empty.num, empty.num_met) == (0, 0)


def test_what_a_killed_run_left_goes(searched: Any) -> None:
    edges = config()
    search(searched, edges)
    searched.put("recall_sample", 9, image_id=[0])
    EdgeRecall(edges, DUPLICATE, LEAKAGE).run(searched, searched.map)
    assert not searched.parts("recall_sample")
