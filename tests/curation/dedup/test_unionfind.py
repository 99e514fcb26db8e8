"""Components of streamed edges against scipy's, and the numbers of pictures against sorted ids."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as scipy_components

from curation.dedup import unionfind
from curation.dedup.unionfind import Numbers, UnionFind, connected_components
from curation.schema import image_ids

graphs = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=80), st.randoms()
    )
)


def ends(edges: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(edges, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def by_scipy(num_nodes: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Least node of each component."""
    _, label = scipy_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(num_nodes, num_nodes)), directed=False)
    _, first = np.unique(label, return_index=True)
    return np.asarray(first[label])


def streamed(num_nodes: int, chunks: list[tuple[np.ndarray, np.ndarray]]) -> list[int]:
    found = UnionFind(num_nodes)
    for a, b in chunks:
        found.add(a, b)
    return found.labels().tolist()


@settings(max_examples=150)
@given(graphs)
def test_the_partition_is_scipys_in_whatever_order_the_parts_come(graph) -> None:
    num_nodes, edges, draw = graph
    expected = by_scipy(num_nodes, *ends(edges)).tolist()
    assert streamed(num_nodes, [ends(edges)]) == expected
    again = edges + [edges[0]] * 3 if edges else edges  # repeated ones
    shuffled = [pair if draw.random() < 0.5 else pair[::-1] for pair in draw.sample(again, len(again))]
    cuts = sorted(draw.randint(0, len(again)) for _ in range(3))
    parts = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(again)], strict=True)]
    assert streamed(num_nodes, [ends(part) for part in parts]) == expected
    assert connected_components(num_nodes, *ends(shuffled)).tolist() == expected


def test_the_partition_is_that_of_networkx() -> None:
    a, b = np.random.default_rng(5).integers(0, 300, (2, 200))
    labels = connected_components(300, a, b)
    for component in nx.connected_components(nx.Graph(zip(a.tolist(), b.tolist(), strict=True))):
        assert set(labels[list(component)].tolist()) == {min(component)}


def test_many_edges() -> None:
    rng = np.random.default_rng(0)
    for num_edges in (1_000, 10_000, 30_000):  # crumbs, about the threshold of a giant, one giant
        a, b = rng.integers(0, 20_000, (2, num_edges))
        parts = [(a[s : s + 999], b[s : s + 999]) for s in range(0, num_edges, 999)]
        assert streamed(20_000, parts[::-1]) == by_scipy(20_000, a, b).tolist()


@pytest.mark.parametrize("backwards", [False, True])
def test_a_chain_is_one_component(backwards: bool) -> None:
    nodes = np.arange(100_000)
    a, b = nodes[:-1], nodes[1:]
    chunk = (a[::-1], b[::-1]) if backwards else (b, a)
    assert not any(streamed(100_000, [chunk]))


def test_nothing() -> None:
    assert streamed(0, []) == []
    assert streamed(3, [ends([])]) == [0, 1, 2]
    assert streamed(2, [ends([(1, 1)])]) == [0, 1]


def test_which_edges_joined_what_was_apart() -> None:
    joined = UnionFind(4).add_apart(*ends([(3, 2), (2, 3), (1, 1), (1, 0), (0, 3), (1, 2)]))
    assert joined.tolist() == [True, False, False, True, True, False]


@pytest.mark.parametrize("end", [-1, 3, 2**32])
def test_an_edge_that_ends_at_no_node_is_refused(end: int) -> None:
    with pytest.raises(IndexError, match=f"an edge ends at node {end}, allowed: 0 to 2"):
        UnionFind(3).add(np.array([0, 1]), np.array([2, end]))


def test_more_nodes_than_fit_four_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="4,294,967,296 nodes, allowed: 4,294,967,295 and fewer"):
        UnionFind(2**32)
    monkeypatch.setattr(unionfind, "MOST_NODES", 2)
    numbers = Numbers([0], 10)
    numbers.see(np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="more than 2 pictures are in an edge"):
        numbers.close()


SHARDS = [0, 1, 2, 3_000_000, 3_000_001, 7_000_000]
ROWS = 130  # more than two words, and no whole number of them
anyone = st.tuples(st.sampled_from(SHARDS), st.integers(0, ROWS - 1)).map(lambda at: at[0] * 1_000_000 + at[1])


@settings(max_examples=100)
@given(st.lists(anyone, max_size=200), st.integers(1, 5))
def test_numbers_are_places_among_sorted_ids(seen, num_chunks) -> None:
    ids = np.array(seen, np.int64)
    numbers = Numbers(SHARDS, ROWS)
    for chunk in np.array_split(ids, num_chunks):
        numbers.see(chunk)
    numbers.close()
    expected = np.unique(ids)
    assert len(numbers) == len(expected)
    assert numbers.ids().tolist() == expected.tolist()
    np.testing.assert_array_equal(numbers.of(ids), np.searchsorted(expected, ids))
    assert numbers.of(ids).dtype == np.uint32
    for place, shard in enumerate(SHARDS):
        first, mine = numbers.of_shard(place)
        assert mine.tolist() == expected[expected // 1_000_000 == shard].tolist()
        assert len(mine) == 0 or expected[first] == mine[0]


def test_all_rows_of_all_shards() -> None:
    numbers = Numbers(SHARDS, ROWS)
    everyone = np.concatenate([image_ids(shard, ROWS) for shard in SHARDS])
    numbers.see(everyone[::-1])
    numbers.close()
    assert numbers.of(everyone).tolist() == list(range(len(everyone)))


@pytest.mark.parametrize("image_id", [3_000_000, 4_000_000_000_000, 8_000_000_000_000, 192])
def test_a_picture_of_no_shard_is_refused(image_id: int) -> None:
    with pytest.raises(LookupError, match=f"picture {image_id} is in an edge and lies in no shard of the pool"):
        Numbers(SHARDS, ROWS).see(np.array([1, image_id]))
