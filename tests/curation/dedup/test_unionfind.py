"""Components from edges in pieces: scipy's partition, whatever the order and the cut."""

import networkx as nx
import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as scipy_components

from curation.dedup.components import component_sizes, sweep_thresholds
from curation.dedup.unionfind import UnionFind, connected_components


def graph_of(seed: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Random edges with self edges, repeats, a chain and a star."""
    draw = np.random.default_rng(seed)
    num_nodes = int(draw.integers(1, 400))
    num_edges = int(draw.integers(0, 2 * num_nodes))
    a, b = draw.integers(0, num_nodes, (2, num_edges))
    if num_nodes > 40 and seed % 2:
        chain = draw.permutation(num_nodes)[:20]
        a, b = np.concatenate([a, chain[:-1], a[:5], [3, 3]]), np.concatenate([b, chain[1:], b[:5], [3, 3]])
    return num_nodes, a, b


@pytest.mark.parametrize("seed", range(12))
def test_the_partition_is_scipys_for_every_order_and_cut(seed: int) -> None:
    num_nodes, a, b = graph_of(seed)
    _, expected = scipy_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(num_nodes, num_nodes)), directed=False)
    least = np.full(expected.max() + 1, num_nodes)
    np.minimum.at(least, expected, np.arange(num_nodes))
    draw = np.random.default_rng(seed)
    for pieces in (1, 3, 7):
        order = draw.permutation(len(a))
        graph = UnionFind(num_nodes, counts=True)
        for piece in np.array_split(order, pieces):
            swapped = draw.random(len(piece)) < 0.5
            graph.add(np.where(swapped, b[piece], a[piece]), np.where(swapped, a[piece], b[piece]))
        np.testing.assert_array_equal(graph.labels(), least[expected])
        _, sizes = np.unique(expected, return_counts=True)
        grouped = sizes[sizes > 1]
        assert graph.tally() == (len(grouped), grouped.sum(), max(grouped, default=0))
    np.testing.assert_array_equal(connected_components(num_nodes, a, b), least[expected])


def test_chains_giants_and_nothing() -> None:
    assert len(connected_components(0, np.empty(0, np.int64), np.empty(0, np.int64))) == 0
    for path in (np.arange(100_000), np.arange(100_000)[::-1].copy()):
        np.testing.assert_array_equal(connected_components(len(path), path[:-1], path[1:]), 0)
    leaves = np.arange(1, 1000)
    np.testing.assert_array_equal(connected_components(1001, leaves, np.full(999, 1000)), [0] + [1] * 1000)


def test_the_partition_is_that_of_networkx() -> None:
    num_nodes, a, b = graph_of(5)
    graph = nx.Graph(zip(a.tolist(), b.tolist(), strict=True))
    labels = connected_components(num_nodes, a, b)
    for component in nx.connected_components(graph):
        assert set(labels[list(component)].tolist()) == {min(component)}


def test_sizes_and_thresholds() -> None:
    sizes, num = component_sizes(np.array([0, 0, 0, 3, 4, 4, 6, 6]))
    assert (sizes.tolist(), num.tolist()) == ([2, 3], [2, 1])
    assert sweep_thresholds(0.955, 0.975).tolist() == [0.955, 0.96, 0.97, 0.975, 0.98, 0.99, 1.0]
    assert len(sweep_thresholds(0.55, 0.6)) == 46
