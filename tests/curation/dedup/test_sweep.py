"""The sweep against components made anew for each threshold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.dedup import sweep
from curation.dedup.sweep import Sweep, grid
from curation.dedup.unionfind import connected_components

similarities = st.integers(450, 1001).map(lambda value: float(np.float32(value / 1000)))
graphs = st.integers(2, 20).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), similarities), max_size=60),
        st.randoms(),
    )
)


def slow_row(num_nodes: int, edges: list[tuple[int, int, float]], threshold: float) -> dict[str, float]:
    high = [(a, b) for a, b, similarity in edges if np.float32(similarity) >= np.float32(threshold)]
    a, b = np.array(high, np.int64).reshape(-1, 2).T
    sizes = np.unique(connected_components(num_nodes, a, b), return_counts=True)[1]
    large = sizes[sizes > 1]
    return {
        "num_edges": len(high),
        "num_components": len(large),
        "num_pictures": large.sum(),
        "num_dropped": (large - 1).sum(),
        "largest": large.max(initial=0),
    }


@pytest.mark.parametrize("pending", [0, 7, 1 << 22])
def test_the_sweep_is_components_at_each_threshold(pending: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_PENDING", pending)

    @settings(max_examples=50)
    @given(graphs)
    def holds(graph) -> None:
        num_nodes, edges, draw = graph
        edges = [edge for edge in edges if edge[0] != edge[1]]
        thresholds = [0.5, 0.6, 0.61, 0.75, 0.9, 1.0]
        found = Sweep(num_nodes, thresholds)
        shuffled = draw.sample(edges, len(edges))
        for start in range(0, len(edges), 5):
            a, b, similarity = zip(*shuffled[start : start + 5], strict=True)
            found.add(np.array(a, np.uint32), np.array(b, np.uint32), np.array(similarity, np.float32))
        table = found.table(0.61).to_pylist()
        assert [row["threshold"] for row in table] == [float(np.float32(t)) for t in thresholds]
        assert [row["in_use"] for row in table] == [False, False, True, False, False, False]
        for row, threshold in zip(table, thresholds, strict=True):
            expected = slow_row(num_nodes, edges, threshold)
            assert {key: row[key] for key in expected} == expected

    holds()


def test_no_edge_at_all() -> None:
    (row,) = Sweep(0, [0.5]).table(0.5).to_pylist()
    assert row == {"threshold": 0.5, "in_use": True, "num_edges": 0, "num_components": 0, "num_pictures": 0,
                   "num_dropped": 0, "largest": 0}  # fmt: skip


def test_thresholds_are_the_floor_the_hundredths_above_it_and_the_one_in_use() -> None:
    assert grid(0.97, 0.98) == [0.97, 0.98, 0.99, 1.0]
    assert grid(0.975, 0.9783) == [0.975, 0.9783, 0.98, 0.99, 1.0]
    assert grid(0.25, 0.3)[:6] == [0.25, 0.26, 0.27, 0.28, 0.29, 0.3]
    assert grid(0.25, 0.3)[-1] == 1.0
    assert len(grid(-0.999, 0.5)) <= 256
