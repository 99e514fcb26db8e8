"""The verdicts from hashes and vectors to leakage, over three pool shards and two benchmarks in memory."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.dedup import edges as edges_module
from curation.dedup.components import Components, Duplicates, DuplicatesConfig
from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.describe import vectors_table
from curation.dedup.edges import Edges, EdgesConfig, FitQuantiser
from curation.dedup.groups import Near, NearGroups
from curation.dedup.leakage import Leakage, LeakageConfig, Leaks
from curation.dedup.near import NearConfig, NearPairs
from curation.dedup.near_codes import NearCodes
from curation.dedup.unionfind import connected_components
from curation.schema import image_ids
from training.config import ConfigError

POOL, BENCHMARKS = [0, 1, 1_000_000], [2_000_000, 3_000_000]
NEAR = NearConfig(radius_bits=4, key_ranges=3)
EDGES = EdgesConfig(num_lists=4, probes=4, reference_probes=4)
DESCRIPTOR = DescriptorConfig(duplicate_threshold=0.6, leakage_threshold=0.5)


def hashes_in(io: Any, rows: dict[int, list[tuple[int, str, int]]]) -> None:
    """Per shard (phash, sha256, side in pixels); everything is safe."""
    for shard, pictures in rows.items():
        io.roles[shard] = "pool"
        ids = image_ids(shard, len(pictures))
        codes, names, sides = zip(*pictures, strict=True) if pictures else ((), (), ())
        io.put(
            "hashes",
            shard,
            image_id=ids,
            sha256=names,
            ok=[True] * len(ids),
            phash=codes,
            width_px=sides,
            height_px=sides,
        )
        io.put("images", shard, image_id=ids, sha256=names, num_bytes=[100] * len(ids))
        io.put("safety", shard, image_id=ids)
        io.keep("safety", shard, ids, names)
    sources_in(io, rows)


def sources_in(io: Any, rows: dict[int, Any]) -> None:
    """The sources of some shards; none has more than ten rows."""
    ids = [shard // 1_000_000 for shard in rows if shard % 1_000_000 == 0]
    roles = [io.roles[source * 1_000_000] for source in ids]
    io.put("sources", 0, source_id=ids, name=[f"set{i}" for i in ids], role=roles, shard_rows=[10] * len(ids))


def test_near_verdicts(memory_io: Any) -> None:
    big, far = 0x0F0F_0F0F_0F0F_0F0F, 0xFFFF_0000_FFFF_0000
    hashes_in(
        memory_io,
        {
            0: [(big, "a", 100), (big ^ 1, "b", 200), (far, "c", 50)],
            1: [(big, "a", 100), (0x1234, "d", 10)],
            1_000_000: [],
        },
    )
    near = NearConfig(radius_bits=4, key_ranges=3, blocked_hashes=(f"{far ^ 3:016x}",))
    NearCodes(near).run(memory_io, memory_io.map)
    NearPairs(near).run(memory_io, memory_io.map)
    NearGroups(near).run(memory_io, memory_io.map)
    first = memory_io.verdict(Near(near), 0)
    assert first["reason"].to_pylist() == ["near_duplicate", None, "blocked_hash"]
    assert first["score"].to_pylist() == [1, None, 2]
    assert first["threshold"].to_pylist() == [4, None, 4]
    assert first["representative_id"].to_pylist() == [1, 1, 2]
    second = memory_io.verdict(Near(near), 1)
    assert second["reason"].to_pylist() == ["near_duplicate", None]
    assert second["representative_id"].to_pylist() == [1, 1_000_001]
    assert memory_io.verdict(Near(near), 1_000_000).num_rows == 0


def test_equal_bytes_are_exact_duplicates_and_the_first_is_kept(memory_io: Any) -> None:
    hashes_in(memory_io, {0: [(7, "a", 100)], 1: [(7, "a", 100), (7, "a", 100)]})
    NearCodes(NEAR).run(memory_io, memory_io.map)
    NearPairs(NEAR).run(memory_io, memory_io.map)
    NearGroups(NEAR).run(memory_io, memory_io.map)
    assert memory_io.verdict(Near(NEAR), 0)["reason"].to_pylist() == [None]
    second = memory_io.verdict(Near(NEAR), 1)
    assert second["reason"].to_pylist() == ["exact_duplicate"] * 2
    assert second["score"].to_pylist() == [0, 0]
    assert second["representative_id"].to_pylist() == [0, 0]


def direction(seed: int, like: np.ndarray | None = None, similarity: float = 1.0) -> np.ndarray:
    """A random unit vector, or one at a given cosine to another."""
    row = np.random.default_rng(seed).standard_normal(512)
    if like is not None:
        row -= (row @ like) * like / (like @ like)
        row = similarity * like / np.linalg.norm(like) + np.sqrt(1 - similarity**2) * row / np.linalg.norm(row)
    return row / np.linalg.norm(row)


def vectors_in(io: Any, rows: dict[int, list[np.ndarray]]) -> None:
    """Vectors per shard; near and safety kept everything. Pictures of shard 0 are the largest."""
    for shard, vectors in rows.items():
        ids = image_ids(shard, len(vectors))
        names = [f"{shard}-{row}" for row in range(len(vectors))]
        sides = [1000 - shard % 999 - row for row in range(len(vectors))]
        io.roles[shard] = "pool" if shard in POOL else "benchmark"
        io.put("hashes", shard, image_id=ids, sha256=names, width_px=sides, height_px=sides)
        io.put("images", shard, image_id=ids, num_bytes=[1] * len(ids))
        for verdict in ("safety", "near"):
            io.put(verdict, shard, image_id=ids, keep=[True] * len(ids))
            io.keep(verdict, shard, ids, names)
        table = vectors_table(
            pa.chunked_array([pa.array(ids)]), pa.chunked_array([pa.array(names)]), np.array(vectors).reshape(-1, 512)
        )
        io.tables[io.part("descriptors", shard)] = table
    sources_in(io, rows)


def chain(io: Any) -> None:
    """Shard 0: x. Shard 1: a copy of x, and a copy of that copy which touches a benchmark. Then strangers."""
    x = direction(0)
    y = direction(1, x, 0.7)
    z = direction(2, y, 0.7)
    leak = direction(9)
    vectors_in(
        io,
        {
            0: [x],
            1: [y, z, direction(3)],
            1_000_000: [direction(4), direction(5, leak, 0.52), direction(6, leak, 0.48)],
            2_000_000: [direction(7, z, 0.8), direction(8)],
            3_000_000: [leak],
        },
    )
    FitQuantiser(EDGES).run(io, io.map)
    Edges(EDGES, DESCRIPTOR).run(io, io.map)


def verdicts(io: Any, duplicates: DuplicatesConfig, leakage: LeakageConfig) -> dict[int, str | None]:
    """The reason of each pool picture, None for what is left."""
    Components(duplicates, DESCRIPTOR, EDGES).run(io, io.map)
    Leaks(leakage, DESCRIPTOR, EDGES).run(io, io.map)
    reasons: dict[int, str | None] = {}
    for shard in POOL:
        for stage in (
            Duplicates(duplicates, DESCRIPTOR, EDGES),
            Leakage(leakage, DESCRIPTOR, EDGES),
        ):
            table = io.verdict(stage, shard)
            reasons |= dict(zip(table["image_id"].to_pylist(), table["reason"].to_pylist(), strict=True))
            for row in table.to_pylist():
                if row["reason"]:
                    assert row["score"] >= row["threshold"]
    return reasons


S1, S2 = 1_000_000, 1_000_000 * 1_000_000


def test_component_drops_the_chain_and_leaks_as_a_whole(memory_io: Any) -> None:
    chain(memory_io)
    got = verdicts(memory_io, DuplicatesConfig(), LeakageConfig())
    assert got == {0: "leak", S1: "copy", S1 + 1: "copy", S1 + 2: None, S2: None, S2 + 1: "leak", S2 + 2: None}
    components = memory_io.tables[memory_io.part("components", 0)]
    assert components["image_id"].to_pylist() == [0, S1, S1 + 1]
    assert components["component_id"].to_pylist() == [0, 0, 0]
    assert components["representative_id"].to_pylist() == [0, 0, 0]
    sizes = memory_io.tables[memory_io.part("component_sizes", 0)]
    assert sizes.to_pylist() == [{"size": 1, "num_components": 4}, {"size": 3, "num_components": 1}]


def test_the_sweep_tells_what_each_threshold_makes(memory_io: Any) -> None:
    chain(memory_io)
    stored = pa.concat_tables([memory_io.tables[memory_io.part("edges", number)] for number in range(4)])
    for refused in (False, True):
        if refused:  # local features refused every pair
            for number in range(4):
                part = memory_io.part("edges", number)
                table = memory_io.tables[part]
                no = pa.array([False] * len(table), pa.bool_())
                memory_io.tables[part] = table.set_column(3, "verified", no)
        Components(DuplicatesConfig(), DESCRIPTOR, EDGES).run(memory_io, memory_io.map)
        sweep = memory_io.tables[memory_io.part("component_sweep", 0)].to_pylist()
        assert sweep[0]["threshold"] == pytest.approx(EDGES.floors(DESCRIPTOR)[0])
        for row in sweep:
            high = stored.filter(stored["similarity"].to_numpy() >= np.float32(row["threshold"]))
            ids = np.unique(np.concatenate([high["a"].to_numpy(), high["b"].to_numpy()]))
            ends = (np.searchsorted(ids, high[end].to_numpy()) for end in ("a", "b"))
            _, sizes = np.unique(connected_components(len(ids), *ends), return_counts=True)
            expected = (len(high), len(sizes), len(ids), len(ids) - len(sizes), max(sizes, default=0))
            assert tuple(row.values())[2:] == ((0, 0, 0, 0, 0) if refused else expected)


def test_a_large_component_is_told(memory_io: Any) -> None:
    chain(memory_io)
    for config in (DuplicatesConfig(max_component=2), DuplicatesConfig(max_share=0.3)):  # three are too few for a share
        stage = Components(config, DESCRIPTOR, EDGES)
        stage.run(memory_io, memory_io.map)
        assert not list(Components(DuplicatesConfig(max_share=1), DESCRIPTOR, EDGES).told(memory_io))
        told = list(stage.told(memory_io))
        assert len(told) == (config.max_component == 2)
        assert all(line.startswith("duplicates: the largest component holds 3 of 7 pictures") for line in told)


def test_star_keeps_the_end_of_a_chain_and_direct_looks_at_own_edges(memory_io: Any) -> None:
    chain(memory_io)
    got = verdicts(memory_io, DuplicatesConfig(policy="star"), LeakageConfig(mode="direct"))
    assert got == {0: None, S1: "copy", S1 + 1: "leak", S1 + 2: None, S2: None, S2 + 1: "leak", S2 + 2: None}


def test_only_named_benchmarks_count(memory_io: Any) -> None:
    chain(memory_io)
    got = verdicts(memory_io, DuplicatesConfig(), LeakageConfig(benchmarks=("set3",)))
    assert got[0] is None
    assert got[S2 + 1] == "leak"
    Leaks(LeakageConfig(), DESCRIPTOR, EDGES).run(memory_io, memory_io.map)
    table = memory_io.verdict(Leakage(LeakageConfig(), DESCRIPTOR, EDGES), 0)
    assert table["reference_id"].to_pylist() == [2_000_000 * 1_000_000]
    assert table["benchmark"].to_pylist() == ["set2"]


def test_nothing_at_all(memory_io: Any) -> None:
    vectors_in(memory_io, {0: []})
    FitQuantiser(EDGES).run(memory_io, memory_io.map)
    Edges(EDGES, DESCRIPTOR).run(memory_io, memory_io.map)
    POOL_BEFORE = list(POOL)
    POOL[:] = [0]
    try:
        assert verdicts(memory_io, DuplicatesConfig(), LeakageConfig()) == {}
    finally:
        POOL[:] = POOL_BEFORE


def test_edges_do_not_depend_on_the_order_of_shards(memory_io: Any) -> None:
    chain(memory_io)
    parts = [memory_io.part("edges", number) for number in range(4)]
    before = [memory_io.tables[part] for part in parts]
    forwards = memory_io.shards
    memory_io.shards = lambda *roles: forwards(*roles)[::-1]
    Edges(EDGES, DESCRIPTOR).run(memory_io, memory_io.map)
    assert [memory_io.tables[part] for part in parts] == before


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_edges_do_not_depend_on_pieces_and_the_sorted_vectors_go(
    memory_io: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    chain(memory_io)
    wanted = {part: table for part, table in memory_io.tables.items() if part.folder in ("edges", "reference_edges")}
    assert sum(len(table) for table in wanted.values()) > 4
    monkeypatch.setattr(edges_module, "_PIECE_ROWS", rows)
    Edges(EDGES, DESCRIPTOR).run(memory_io, memory_io.map)
    assert {part: memory_io.tables[part] for part in wanted} == wanted
    assert not memory_io.parts("edge_vectors")


def test_as_is_sets_are_held_against_the_benchmarks(memory_io: Any) -> None:
    chain(memory_io)
    own, other = 4_000_000, 5_000_000
    leak = direction(9)
    for shard in (own, other):
        vectors_in(memory_io, {shard: [direction(40), direction(41, leak, 0.9)]})
        memory_io.roles[shard] = "query"
    memory_io.put("sources", 0, source_id=[0, 1, 2, 3, 4, 5], name=[f"set{i}" for i in range(6)])
    Edges(EDGES, DESCRIPTOR, ["set4"]).run(memory_io, memory_io.map)
    pairs = pa.concat_tables([memory_io.tables[memory_io.part("reference_edges", number)] for number in range(4)])
    found = pairs.filter(pairs["image_id"].to_numpy() >= own * 1_000_000)
    assert found["image_id"].to_pylist() == [own * 1_000_000 + 1]
    assert found["reference_id"].to_pylist() == [3_000_000 * 1_000_000]
    edges = pa.concat_tables([memory_io.tables[memory_io.part("edges", number)] for number in range(4)])
    assert max(edges["b"].to_pylist()) < own * 1_000_000, "they are no copies of the pool's"


def test_a_threshold_below_the_stored_edges_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"duplicates.threshold: got 0.3, allowed: 0.55 \(edges.floor\) and above; set edges.floor=0.3",
    ):
        Duplicates(DuplicatesConfig(threshold=0.3), DESCRIPTOR, EDGES)
    with pytest.raises(ConfigError, match=r"leakage\.threshold: got 0\.3, allowed: 0\.45"):
        Leakage(LeakageConfig(threshold=0.3), DESCRIPTOR, EDGES)
    loose = EdgesConfig(floor=0.2)
    assert Duplicates(DuplicatesConfig(threshold=0.3), DESCRIPTOR, loose).threshold == 0.3


def test_many_lists_need_a_large_sample() -> None:
    EdgesConfig(num_lists=64, fit_pictures=10)
    EdgesConfig(num_lists=65, fit_pictures=39 * 65)
    with pytest.raises(ValueError, match=r"edges.fit_pictures: got 2534, allowed with edges.num_lists=65: 2535"):
        EdgesConfig(num_lists=65, fit_pictures=39 * 65 - 1)
