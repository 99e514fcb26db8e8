"""The stage components over parts of edges in memory, against slow references."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.dedup.components import Components, Duplicates, DuplicatesConfig
from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.edges import EdgesConfig
from curation.dedup.representatives import representative_rank, representatives, stars
from curation.dedup.unionfind import connected_components
from curation.schema import TABLES, image_ids

SHARDS, ROWS = [0, 1, 2, 5_000_000], 100
IDS = np.concatenate([image_ids(shard, ROWS) for shard in SHARDS])
DESCRIPTOR = DescriptorConfig(duplicate_threshold=0.6, leakage_threshold=0.5)
EDGES = EdgesConfig(num_lists=3)


def stars_in_rounds(rank: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Stars over all edges at once: a node is a centre as soon as no undecided neighbour ranks before it."""
    num_nodes = len(rank)
    node_of = np.argsort(rank, kind="stable")
    apart = a != b
    low = np.minimum(rank[a[apart]], rank[b[apart]])
    high = np.maximum(rank[a[apart]], rank[b[apart]])
    # From here on a node is its rank.
    undecided = np.ones(num_nodes, bool)
    centre = np.zeros(num_nodes, bool)
    from_, to = low, high
    while undecided.any():
        waits = np.zeros(num_nodes, bool)
        waits[to] = True
        new = undecided & ~waits
        centre |= new
        undecided &= ~new
        taken = to[new[from_]]
        undecided[taken] = False
        live = undecided[from_] & undecided[to]
        from_, to = from_[live], to[live]
    owner = np.where(centre, np.arange(num_nodes), num_nodes)
    holds = centre[low] & ~centre[high]
    np.minimum.at(owner, high[holds], low[holds])
    result = np.empty(num_nodes, np.int64)
    result[node_of] = node_of[owner]
    return result


def test_stars_of_many_edges() -> None:
    rng = np.random.default_rng(0)
    for num_edges in (2_000, 10_000, 60_000):
        a, b = rng.integers(0, 10_000, (2, num_edges))
        rank = rng.permutation(10_000)
        np.testing.assert_array_equal(stars(rank, a, b), stars_in_rounds(rank, a, b))


class Pool:
    """Facts of all pictures, many of them equal in some, and random edges."""

    def __init__(self, io: Any, num_edges: int, seed: int = 0) -> None:
        self.io, rng = io, np.random.default_rng(seed)
        self.side, self.num_bytes = rng.integers(1, 4, len(IDS)), rng.integers(1, 3, len(IDS))
        self.sha256 = np.array([f"{name:064x}" for name in rng.integers(0, 8, len(IDS))])
        self.keep = rng.random(len(IDS)) < 0.9
        for shard in SHARDS:
            at = np.flatnonzero(shard == IDS // 1_000_000)
            io.roles[shard] = "pool"
            facts = {"image_id": IDS[at], "sha256": self.sha256[at]}
            io.put("hashes", shard, **facts, width_px=self.side[at], height_px=self.side[at])
            io.put("images", shard, **facts, num_bytes=self.num_bytes[at])
            io.put("near", shard, **facts, keep=self.keep[at])
            io.keep("near", shard, IDS[at][self.keep[at]], self.sha256[at][self.keep[at]])
        io.put("sources", 0, source_id=[0, 5], name=["a", "b"], role=["pool"] * 2, shard_rows=[ROWS] * 2)
        kept = np.flatnonzero(self.keep)
        a, b = rng.choice(kept, (2, num_edges))
        self.a, self.b = np.minimum(a, b), np.maximum(a, b)
        self.similarity = rng.uniform(0.55, 1, num_edges).astype(np.float32)
        self.verified: list[bool | None] = [None] * num_edges

    def put_edges(self, order: np.ndarray) -> None:
        """Edges in three parts."""
        for part, at in enumerate(np.array_split(order, [len(order) // 5, len(order) // 2])):
            verified = [self.verified[n] for n in at]
            columns = {"a": IDS[self.a[at]], "b": IDS[self.b[at]], "similarity": self.similarity[at]}
            self.io.put("edges", part, **columns, verified=verified)

    def run(self, **config: Any) -> tuple[list[dict[str, Any]], ...]:
        """Rows of the three tables."""
        stage = Components(DuplicatesConfig(**config), DESCRIPTOR, EDGES)
        stage.run(self.io, self.io.map)
        return tuple(self.io.tables[self.io.part(table, 0)].to_pylist() for table in stage.writes)

    def expected(self, policy: str) -> list[dict[str, Any]]:
        high = (self.similarity >= np.float32(0.6)) & (self.a != self.b)
        a, b, similarity = self.a[high], self.b[high], self.similarity[high]
        component = connected_components(len(IDS), a, b)
        rank = representative_rank(IDS, self.side**2, self.num_bytes, self.sha256)
        kept = representatives(component, rank) if policy == "component" else stars_in_rounds(rank, a, b)
        return [
            {
                "image_id": int(IDS[node]),
                "component_id": int(IDS[component[node]]),
                "representative_id": int(IDS[kept[node]]),
                "similarity": float(similarity[(a == node) | (b == node)].max()),
            }
            for node in np.union1d(a, b)
        ]


@pytest.mark.parametrize("num_edges", [0, 30, 150, 600])
@pytest.mark.parametrize("policy", ["component", "star"])
def test_components_whatever_the_order_of_edges(memory_io: Any, policy: str, num_edges: int) -> None:
    pool = Pool(memory_io, num_edges)
    pool.put_edges(np.arange(num_edges))
    found = pool.run(policy=policy)
    components, sizes, sweep = found
    assert components == pool.expected(policy)
    pool.put_edges(np.random.default_rng(1).permutation(num_edges))
    assert pool.run(policy=policy) == found

    assert sum(row["size"] * row["num_components"] for row in sizes) == pool.keep.sum()
    (in_use,) = (row for row in sweep if row["in_use"])
    assert in_use["threshold"] == float(np.float32(0.6))
    large = [row for row in sizes if row["size"] > 1]
    assert in_use["num_components"] == sum(row["num_components"] for row in large)
    assert in_use["num_pictures"] == len(components)
    assert in_use["largest"] == max((row["size"] for row in large), default=0)
    assert in_use["num_dropped"] == len(components) - in_use["num_components"]
    assert [row["threshold"] for row in sweep] == [float(np.float32(n / 100)) for n in range(55, 101)]
    if num_edges:
        assert in_use["num_edges"] == ((pool.similarity >= np.float32(0.6)) & (pool.a != pool.b)).sum()


def test_where_local_features_were_compared_they_decide(memory_io: Any) -> None:
    pool = Pool(memory_io, 4)
    pool.a, pool.b = np.array([0, 1, 150, 250]), np.array([1, 2, 151, 251])
    pool.similarity = np.array([0.58, 0.9, 0.9, 0.58], np.float32)
    pool.verified = [True, False, None, None]
    pool.put_edges(np.arange(4))
    components, _, sweep = pool.run()
    assert [row["image_id"] for row in components] == [0, 1, 1_000_050, 1_000_051]
    edges = {round(row["threshold"], 2): row["num_edges"] for row in sweep}
    assert (edges[0.55], edges[0.58], edges[0.59], edges[0.9], edges[0.91]) == (3, 3, 2, 2, 1), (
        "verified copies are copies at any threshold"
    )


def test_a_giant_is_told_with_what_to_do(memory_io: Any) -> None:
    pool = Pool(memory_io, 1)
    kept = np.flatnonzero(pool.keep)

    def told(size: int, **config: Any) -> list[str]:
        pool.a, pool.b = kept[: size - 1], kept[1:size]
        pool.similarity, pool.verified = np.full(size - 1, 0.9, np.float32), [None] * (size - 1)
        pool.put_edges(np.arange(size - 1))
        stage = Components(DuplicatesConfig(**config), DESCRIPTOR, EDGES)
        stage.run(memory_io, memory_io.map)
        return list(stage.told(memory_io))

    assert told(19) == [], "copies of one picture are a large share of a small pool"
    (line,) = told(20)
    assert line == (
        f"duplicates: the largest component holds 20 of {len(kept)} pictures (alarm above 1,000 or 1.0%): raise "
        "duplicates.threshold above 0.6, or set duplicates.policy=star; `lvd sql component_sweep` tells what other "
        "thresholds would do"
    )
    assert told(20, max_share=0.1) == []
    (line,) = told(20, max_share=0.1, max_component=19, policy="star")
    assert "star" not in line


def test_a_shard_reads_its_own_rows(memory_io: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(memory_io, 150)
    pool.put_edges(np.arange(150))
    components, _, _ = pool.run()
    asked = []
    real = type(memory_io).read

    def read(self: Any, part: Any, columns: Any = None, *, within: Any = None) -> pa.Table:
        asked.append((part.folder, within))
        return real(self, part, columns, within=within)

    monkeypatch.setattr(type(memory_io), "read", read)
    dropped = set()
    for shard in SHARDS:
        table = memory_io.verdict(Duplicates(DuplicatesConfig(), DESCRIPTOR, EDGES), shard)
        dropped |= {row["image_id"] for row in table.to_pylist() if not row["keep"]}
    assert asked == [("components", ("image_id", shard * 1_000_000, (shard + 1) * 1_000_000)) for shard in SHARDS]
    assert dropped == {row["image_id"] for row in components if row["image_id"] != row["representative_id"]}
    assert TABLES["components"].row_group_rows < TABLES["duplicates"].row_group_rows
