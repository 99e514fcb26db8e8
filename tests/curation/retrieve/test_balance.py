"""Balanced sampling against a loop that takes one picture at a time, and the laws that a larger total must keep."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.retrieve.balance import allocate, choose, priority, water_level

sizes_of_clusters = st.lists(st.integers(0, 30), max_size=12)


def random_tree(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Parents and leaf sizes of one to four levels; some nodes have no child, some leaves no picture."""
    rng = np.random.default_rng(seed)
    num_nodes = np.sort(rng.integers(1, 14, rng.integers(1, 5)))[::-1]
    parents = [rng.integers(0, above, num).astype(np.int32) for num, above in pairwise(num_nodes)]
    return parents, (rng.pareto(0.7, num_nodes[0]) * 2).clip(0, 60).astype(np.int64)


def slow_fill(parents: list[np.ndarray], leaf_sizes: np.ndarray, key: str) -> list[list[int]]:
    """Quotas at each total: a picture goes down, at each node to the child that has least of those with some left."""
    root = np.zeros(int(parents[-1].max()) + 1 if parents else len(leaf_sizes), np.int32)
    up = [*parents, root]
    sizes = [leaf_sizes.tolist()]
    for level, parent in enumerate(parents):
        num_above = len(up[level + 1])
        sizes.append([sum(s for s, p in zip(sizes[-1], parent, strict=True) if p == node) for node in range(num_above)])
    taken = [[0] * len(size) for size in sizes]
    found = [list(taken[0])]
    for _ in range(int(leaf_sizes.sum())):
        node = 0
        for level in reversed(range(len(up))):
            children = [c for c, p in enumerate(up[level]) if p == node and taken[level][c] < sizes[level][c]]
            node = min(
                children,
                key=lambda c: (taken[level][c], hashlib.sha256(f"{key}|{level}|{c}".encode()).hexdigest()),
            )
            taken[level][node] += 1
        found.append(list(taken[0]))
    return found


def counts_above(parents: list[np.ndarray], counts: np.ndarray) -> list[np.ndarray]:
    """Counts of the nodes of each level, from the lowest."""
    found = [counts]
    for level, parent in enumerate(parents):
        num = len(parents[level + 1]) if level + 1 < len(parents) else int(parent.max()) + 1
        found.append(np.array([found[-1][parent == node].sum() for node in range(num)]))
    return found


# Water level


@given(sizes_of_clusters, st.integers(0, 400))
def test_water_level_is_the_largest_cut_that_the_total_pays_for(sizes, total):
    cut = water_level(np.array(sizes, np.int64), total)
    assert sum(min(cut, size) for size in sizes) <= total
    assert cut <= max(sizes, default=0)
    if cut < max(sizes, default=0):
        assert sum(min(cut + 1, size) for size in sizes) > total


@pytest.mark.parametrize(
    ("sizes", "total", "cut"),
    [([5, 1, 9], 9, 4), ([5, 1, 9], 10, 4), ([5, 1, 9], 11, 5), ([5, 1, 9], 99, 9), ([7], 3, 3), ([0, 0], 4, 0)],
)
def test_water_levels_by_hand(sizes, total, cut):
    assert water_level(np.array(sizes, np.int64), total) == cut


def test_water_level_of_a_web_size_pool_does_not_overflow():
    sizes = np.full(1_000_000, 1_000_000_000, np.int64)
    assert water_level(sizes, 3_000_000 * 1_000_000 + 17) == 3_000_000


# Allocation


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.text(max_size=3))
def test_allocation_equals_a_loop_over_pictures_and_only_grows(seed, key):
    parents, leaf_sizes = random_tree(seed)
    slow = slow_fill(parents, leaf_sizes, key)
    old = np.zeros(len(leaf_sizes), np.int64)
    for total, wanted in enumerate(slow):
        quota = allocate(parents, leaf_sizes, total, key)
        assert quota.dtype == np.int64
        assert quota.tolist() == wanted
        assert (quota - old).min(initial=0) == 0  # one more, and nobody has less
        old = quota
    assert old.tolist() == leaf_sizes.tolist()


@settings(max_examples=150)
@given(st.integers(0, 10_000), st.floats(0, 1.5))
def test_total_is_met_and_nobody_is_above_the_water_level(seed, share):
    parents, leaf_sizes = random_tree(seed)
    total = int(share * leaf_sizes.sum())
    quota = allocate(parents, leaf_sizes, total, "key")
    assert quota.sum() == min(total, leaf_sizes.sum())
    sizes, quotas = counts_above(parents, leaf_sizes), counts_above(parents, quota)
    up = [*parents, np.zeros(len(sizes[-1]), np.int32)]
    for level, parent in enumerate(up):
        assert (quotas[level] <= sizes[level]).all()
        for node in np.unique(parent):
            size, got = sizes[level][parent == node], quotas[level][parent == node]
            cut = water_level(size, int(got.sum()))
            assert set((got - np.minimum(size, cut)).tolist()) <= {0, 1}  # the level, or one of the remainder above it
            whole = got == size
            assert whole.all() or got[~whole].min() >= got.max() - 1  # no sibling goes short of what another has


def test_siblings_share_alike_whatever_lies_below_them():
    parents = [np.array([0, 0, 0, 0, 1], np.int32), np.array([0, 0], np.int32)]
    assert allocate(parents, np.array([100, 100, 100, 100, 100]), 80, "a").tolist() == [10, 10, 10, 10, 40]
    assert allocate(parents, np.array([100, 2, 100, 100, 10]), 80, "a")[[1, 4]].tolist() == [2, 10]
    assert allocate([], np.array([5, 1, 9]), 11, "a").tolist() == [5, 1, 5]


def test_a_highest_cluster_without_children_takes_nothing():
    parents = [np.array([2, 2, 0], np.int32), np.array([1, 1, 1], np.int32)]
    assert allocate(parents, np.array([8, 8, 8]), 12, "a").tolist() == [3, 3, 6]
    assert allocate(parents, np.array([0, 0, 0]), 12, "a").tolist() == [0, 0, 0]


def test_the_remainder_follows_the_key_and_no_other_thing():
    sizes = np.full(40, 10)
    first = allocate([], sizes, 45, "a")
    lucky = sorted(range(40), key=lambda cluster: priority("a", 0, cluster))[:5]
    assert np.flatnonzero(first == 2).tolist() == sorted(lucky)
    assert allocate([], sizes, 45, "a").tolist() == first.tolist()
    assert allocate([], sizes, 45, "b").tolist() != first.tolist()


def test_an_order_drawn_anew_for_each_total_would_take_pictures_away():
    sizes = np.full(10, 10)
    quotas = [allocate([], sizes, total, f"seed {total}") for total in range(100)]
    assert any((more < less).any() for less, more in pairwise(quotas))


# Choice


def pictures(seed: int, num_clusters: int, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters, keys that repeat, and ids."""
    rng = np.random.default_rng(seed)
    digests = np.array([hashlib.sha256(bytes([value])).hexdigest() for value in rng.integers(0, 9, num)], "U64")
    return rng.integers(0, num_clusters, num).astype(np.int32), digests, rng.permutation(num).astype(np.int64)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 60))
def test_choice_equals_a_loop_in_any_order_of_the_rows(seed, num):
    cluster, digests, ids = pictures(seed, 5, num)
    quota = np.random.default_rng(seed).integers(0, 12, 5)
    wanted = [
        image
        for one in range(5)
        for _, image in sorted((d, i) for c, d, i in zip(cluster, digests, ids, strict=True) if c == one)[: quota[one]]
    ]
    for turn in (np.arange(num), np.arange(num)[::-1], np.random.default_rng(seed).permutation(num)):
        places = choose(cluster[turn], quota, order_key=digests[turn], image_id=ids[turn])
        assert ids[turn][places].tolist() == wanted
    numbers = np.array([int(digest[:16], 16) for digest in digests.tolist()], np.uint64)
    assert ids[choose(cluster, quota, order_key=numbers, image_id=ids)].tolist() == wanted


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 80), st.integers(0, 80))
def test_a_larger_total_keeps_the_smaller_choice_as_the_beginning_of_each_leaf(seed, one, other):
    parents, leaf_sizes = random_tree(seed)
    cluster = np.repeat(np.arange(len(leaf_sizes)), leaf_sizes)
    rng = np.random.default_rng(seed)
    ids, keys = rng.permutation(len(cluster)), rng.integers(0, 50, len(cluster)).astype(np.uint64)
    small, large = (
        choose(cluster, allocate(parents, leaf_sizes, total, "key"), order_key=keys, image_id=ids)
        for total in sorted((one, other))
    )
    assert len(large) == min(max(one, other), len(cluster))
    for leaf in range(len(leaf_sizes)):
        of_small, of_large = (places[cluster[places] == leaf].tolist() for places in (small, large))
        assert of_large[: len(of_small)] == of_small


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(0, 60))
def test_choice_of_choices_is_the_choice_of_all(seed, num, at):
    cluster, digests, ids = pictures(seed, 5, num)
    quota = np.random.default_rng(seed).integers(0, 12, 5)
    rows = np.arange(num)
    kept = np.zeros(0, np.int64)
    for part in (rows[:at], rows[at:]):
        kept = np.concatenate([kept, part])
        kept = kept[choose(cluster[kept], quota, order_key=digests[kept], image_id=ids[kept])]
    assert kept.tolist() == choose(cluster, quota, order_key=digests, image_id=ids).tolist()
