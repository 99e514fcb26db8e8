"""Components, stars and representatives against slow references."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.dedup.groups import NearGroups, near_groups
from curation.dedup.near import NearConfig, NearPairs, near_pairs
from curation.dedup.near_codes import NearCodes
from curation.dedup.representatives import representative_rank, representatives, stars
from curation.dedup.unionfind import connected_components
from curation.schema import image_ids

graphs = st.integers(1, 25).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=60),
        st.permutations(range(n)),
    )
)


def ends(edges: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(edges, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def slow_components(num_nodes: int, edges: list[tuple[int, int]]) -> list[int]:
    """Union by repeated relabelling."""
    label = list(range(num_nodes))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(label[a], label[b])
            if label[a] != low or label[b] != low:
                label[a] = label[b] = low
                changed = True
    return label


def slow_stars(rank: list[int], edges: list[tuple[int, int]]) -> list[int]:
    """The greedy loop."""
    near = {node: {b for a, b in edges if a == node} | {a for a, b in edges if b == node} for node in range(len(rank))}
    centre: dict[int, int] = {}
    for node in sorted(range(len(rank)), key=rank.__getitem__):
        if node not in centre:
            centre[node] = node
            for other in near[node]:
                centre.setdefault(other, node)
    return [centre[node] for node in range(len(rank))]


@settings(max_examples=100)
@given(graphs)
def test_components_equal_the_slow_ones(graph) -> None:
    num_nodes, edges, _ = graph
    assert connected_components(num_nodes, *ends(edges)).tolist() == slow_components(num_nodes, edges)


@settings(max_examples=100)
@given(graphs, st.randoms())
def test_stars_equal_the_greedy_loop(graph, draw) -> None:
    _, edges, permutation = graph
    rank = np.array(permutation, np.int64)
    got = stars(rank, *ends(edges))
    assert got.tolist() == slow_stars(list(permutation), edges)
    shuffled = [pair if draw.random() < 0.5 else pair[::-1] for pair in draw.sample(edges, len(edges))]
    assert stars(rank, *ends(shuffled)).tolist() == got.tolist()


def test_representative_has_most_pixels_then_bytes_then_least_sha256_then_id() -> None:
    ids = np.array([5, 6, 7, 8, 9])
    pixels = np.array([10, 20, 20, 20, 20])
    num_bytes = np.array([99, 1, 2, 2, 2])
    sha256 = np.array(["0", "0", "b", "a", "a"])
    rank = representative_rank(ids, pixels, num_bytes, sha256)
    assert np.argsort(rank).tolist() == [3, 4, 2, 1, 0]
    assert representatives(np.array([0, 0, 2, 2, 2]), rank).tolist() == [1, 1, 3, 3, 3]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**12 - 1), min_size=2, max_size=25), st.integers(1, 4), st.randoms())
def test_every_member_lies_within_the_radius_of_its_representative(codes, radius, draw) -> None:
    """Twelve bits spread over the code: chains everywhere."""
    values = np.array([sum(((code >> bit) & 1) << (5 * bit) for bit in range(12)) for code in codes], np.uint64)
    ids = np.arange(len(values))
    rank = np.array(draw.sample(range(len(values)), len(values)), np.int64)
    a, b, bits, _ = near_pairs(values, ids, radius_bits=radius)
    centre, distance = near_groups(a, b, bits, rank=rank)
    true = np.bitwise_count(values ^ values[centre])
    np.testing.assert_array_equal(distance, true)
    assert (true <= radius).all()
    assert (rank[centre] <= rank).all(), "the better one is kept"
    kept = np.flatnonzero(centre == ids)
    apart = np.bitwise_count(values[kept][:, None] ^ values[kept][None])
    assert (apart[np.triu_indices(len(kept), 1)] > radius).all(), "what is kept is no near-duplicate of what is kept"


@pytest.mark.parametrize("radius", [0, 4])
def test_groups_do_not_depend_on_how_pairs_are_cut(memory_io: Any, radius: int) -> None:
    draw = np.random.default_rng(0)
    memory_io.put("sources", 0, source_id=[0], name=["pool"], role=["pool"], shard_rows=[60])
    for shard in (0, 1):
        ids = image_ids(shard, 60)
        codes = draw.integers(0, 4, 60, dtype=np.uint64) * np.uint64(2**40 + 2**20 + 1)
        codes ^= np.uint64(1) << draw.integers(0, 64, 60, dtype=np.uint64)
        names = [str(number) for number in draw.permutation(60)]
        sides = draw.integers(1, 9, 60)
        columns = {"image_id": ids, "sha256": names}
        memory_io.roles[shard] = "pool"
        memory_io.put("hashes", shard, **columns, phash=codes, width_px=sides, height_px=sides)
        memory_io.put("images", shard, **columns, num_bytes=[1] * 60)
        memory_io.put("safety", shard, **columns)
        memory_io.keep("safety", shard, ids, names)
    made = []
    for key_ranges in (1, 7):
        config = NearConfig(radius_bits=radius, key_ranges=key_ranges)
        for stage in (NearCodes(config), NearPairs(config), NearGroups(config)):
            stage.run(memory_io, memory_io.map)
        made.append(memory_io.tables[memory_io.part("near_groups", 0)])
    assert made[0] == made[1]
    assert made[0].num_rows > 20
    assert (np.diff(made[0]["image_id"].to_numpy()) > 0).all()
