"""Which benchmark picture decides about a picture: groups of shards against a slow rule over all edges at once."""

from typing import Any

import numpy as np
import pytest

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.edges import EdgesConfig
from curation.dedup.leakage import Leakage, LeakageConfig, Leaks
from curation.retrieve import retrieve
from curation.schema import ROWS_PER_SHARD_LIMIT, image_ids

POOL, BENCHMARKS, AS_IS = [0, 1, 2, 4_000_000], [1_000_000, 2_000_000], [3_000_000]
SOURCES = ["web", "first", "second", "flowers", "more"]
EDGES = EdgesConfig(num_lists=2)
DESCRIPTOR = DescriptorConfig(duplicate_threshold=0.6, leakage_threshold=0.5)
ROWS = 12  # of a shard


def tables_in(io: Any, seed: int) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Random edges with many ties, in two parts, and components over shards; the edges, and component by picture."""
    rng = np.random.default_rng(seed)
    for shard in (*POOL, *BENCHMARKS, *AS_IS):
        io.roles[shard] = "pool" if shard in POOL else "query" if shard in AS_IS else "benchmark"
        io.keep("duplicates", shard, image_ids(shard, ROWS), [f"{n:064x}" for n in range(ROWS)])
    io.put("sources", 0, source_id=range(5), name=SOURCES)
    pool = np.concatenate([image_ids(shard, ROWS) for shard in POOL])
    judged = np.concatenate([pool, image_ids(AS_IS[0], ROWS)])
    references = np.concatenate([image_ids(shard, 4) for shard in BENCHMARKS])
    edges = []
    for part in range(2):
        pairs = sorted({(int(rng.choice(judged)), int(rng.choice(references))) for _ in range(20)})
        mine = [
            {"image_id": a, "reference_id": b, "similarity": s, "verified": v}
            for (a, b), s, v in zip(
                pairs,
                rng.choice([0.46, 0.5, 0.55, 0.75], len(pairs)),
                rng.choice([None, True, False], len(pairs)),
                strict=True,
            )
        ]
        io.put("reference_edges", part, **{name: [row[name] for row in mine] for name in mine[0]})
        edges += mine
    component: dict[int, int] = {}
    for members in np.array_split(rng.permutation(pool)[:30], 12):
        component |= dict.fromkeys(members.tolist(), int(members.min()))
    ids = sorted(component)
    io.put("components", 0, image_id=ids, component_id=[component[one] for one in ids], representative_id=ids)
    return edges, component


def slow(edges: list[dict[str, Any]], component: dict[int, int], one: int) -> dict[str, Any] | None:
    """The rule for one picture: a copy of its own, else what its component touches: copies first, then the highest."""

    def says(edge: dict[str, Any]) -> tuple[Any, ...]:
        return not edge["leaks"], -edge["similarity"], edge["reference_id"], edge["image_id"]

    def is_copy(edge: dict[str, Any]) -> bool:
        return edge["similarity"] >= 0.5 if edge["verified"] is None else edge["verified"]

    judged = [{**edge, "leaks": is_copy(edge)} for edge in edges]
    own = sorted((edge for edge in judged if edge["image_id"] == one), key=says)
    unit = component.get(one, one)
    all_of_it = sorted((e for e in judged if component.get(e["image_id"], e["image_id"]) == unit), key=says)
    return own[0] if own and own[0]["leaks"] else all_of_it[0] if all_of_it else None


@pytest.mark.parametrize("mode", ["component", "direct"])
@pytest.mark.parametrize("benchmarks", [None, ("second",)])
@pytest.mark.parametrize("group_shards", [1, 2, 64])
@pytest.mark.parametrize("seed", range(3))
def test_leaks_are_those_of_the_slow_rule(memory_io, monkeypatch, seed, group_shards, benchmarks, mode):
    monkeypatch.setattr(retrieve, "GROUP_SHARDS", group_shards)
    edges, component = tables_in(memory_io, seed)
    if benchmarks is not None:
        edges = [edge for edge in edges if edge["reference_id"] // ROWS_PER_SHARD_LIMIT == BENCHMARKS[1]]
    if mode == "direct":
        component = {}
    config = LeakageConfig(mode=mode, benchmarks=benchmarks)
    Leaks(config, DESCRIPTOR, EDGES).run(memory_io, memory_io.map)
    found: dict[int, dict[str, Any]] = {}
    for part in memory_io.parts("leaks"):
        rows = memory_io.tables[part].to_pylist()
        assert [row["image_id"] for row in rows] == sorted(row["image_id"] for row in rows)
        assert {row["image_id"] // ROWS_PER_SHARD_LIMIT >= part.index for row in rows} <= {True}
        found |= {row["image_id"]: row for row in rows}
    for shard in (*POOL, *AS_IS):
        for one in image_ids(shard, ROWS).tolist():
            wanted, got = slow(edges, component, one), found.pop(one, None)
            assert (wanted is None) == (got is None), one
            if wanted is not None:
                assert got["via_id"] == wanted["image_id"]
                assert got["similarity"] == np.float32(wanted["similarity"])
                assert all(got[name] == wanted[name] for name in ("reference_id", "leaks"))
    assert not found
    for shard in POOL:
        for row in memory_io.verdict(Leakage(config, DESCRIPTOR, EDGES), shard).to_pylist():
            wanted = slow(edges, component, row["image_id"])
            assert row["keep"] == (wanted is None or not wanted["leaks"])
            assert row["reason"] == (None if row["keep"] else "leak")
            assert row["reference_id"] == (wanted and wanted["reference_id"])
            assert row["benchmark"] == (wanted and SOURCES[wanted["reference_id"] // 10**12])
            assert row["threshold"] == (None if wanted is None else 0.5)
