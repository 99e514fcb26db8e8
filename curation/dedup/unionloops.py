"""The compiled loops of components and stars. Numba takes half a second to import: whoever needs one imports it there.

A node is uint32 throughout, and so is its parent. No parent is greater than its node, so a root is the least of its
component, and one pass upwards is enough to find all roots.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _tied(parent: np.ndarray, u: np.uint32, v: np.uint32) -> bool:
    """Join two nodes; whether they were apart.

    Rem's algorithm with splicing (Dijkstra 1976, page 161; Patwary, Blair and Manne 2010): both paths are climbed at
    once, always on the side whose parent is greater, and each node that is left is hung below the other side's parent.
    """
    above_u, above_v = parent[u], parent[v]
    while above_u != above_v:
        if above_u < above_v:
            u, v = v, u
            above_u, above_v = above_v, above_u
        parent[u] = above_v
        if u == above_u:
            return True
        u = above_u
        above_u = parent[u]
    return False


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def join(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Join the ends of all edges.

    Args:
        parent: uint32 [N], changed.
        a: one end, uint32 [E].
        b: the other end.
    """
    for n in range(len(a)):
        _tied(parent, a[n], b[n])


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def join_apart(parent: np.ndarray, a: np.ndarray, b: np.ndarray, joined: np.ndarray) -> None:
    """As ``join``; ``joined``, bool [E], says which edges joined what was apart before: a spanning forest."""
    for n in range(len(a)):
        joined[n] = _tied(parent, a[n], b[n])


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def flatten(parent: np.ndarray) -> None:
    """Make each node's parent its root."""
    for node in range(len(parent)):
        parent[node] = parent[parent[node]]


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _root(parent: np.ndarray, node: np.uint32) -> np.uint32:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def grow(parent: np.ndarray, size: np.ndarray, a: np.ndarray, b: np.ndarray, told: np.ndarray) -> None:
    """Join the ends of edges and keep count.

    Args:
        parent: uint32 [N], changed.
        size: of the component of each root, uint32 [N], 1 at first, changed.
        a: one end, uint32 [E].
        b: the other end.
        told: components of two or more, nodes in them, and the largest size, int64 [3], changed.
    """
    for n in range(len(a)):
        u, v = _root(parent, a[n]), _root(parent, b[n])
        if u == v:
            continue
        low, high = min(u, v), max(u, v)
        alone = np.int64(size[low] == 1) + np.int64(size[high] == 1)
        parent[high] = low
        size[low] += size[high]
        told[0] += alone - 1
        told[1] += alone
        told[2] = max(told[2], np.int64(size[low]))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def number_components(root: np.ndarray) -> int:
    """Put in place of each node's root, uint32 [N], the number of its component, by least node; how many there are."""
    num = 0
    for node in range(len(root)):
        if root[node] == node:
            root[node] = num
            num += 1
        else:
            root[node] = root[root[node]]  # its root comes before it and holds the number by now
    return num


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _is_less(name: np.ndarray, other: np.ndarray) -> bool:
    for word in range(len(name)):
        if name[word] != other[word]:
            return bool(name[word] < other[word])
    return False


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def elect(
    group: np.ndarray,
    first: int,
    candidates: tuple[np.ndarray, np.ndarray, np.ndarray],
    best: tuple[np.ndarray, np.ndarray, np.ndarray],
    node: np.ndarray,
) -> None:
    """Let nodes stand for their groups where they are better: most pixels, most bytes, least name, least node.

    Args:
        group: of consecutive nodes, uint32 [N].
        first: number of the first of them.
        candidates: their pixels, int64 [N], bytes, int64 [N], and names, uint64 [N, W].
        best: the same of who stands for each group so far, [G]; pixels of -1: nobody; changed.
        node: who that is, uint32 [G], changed.
    """
    pixels, num_bytes, name = candidates
    most_pixels, most_bytes, least_name = best
    for n in range(len(group)):
        g = group[n]
        better = pixels[n] > most_pixels[g]
        if pixels[n] == most_pixels[g]:
            better = num_bytes[n] > most_bytes[g]
            if num_bytes[n] == most_bytes[g]:
                better = _is_less(name[n], least_name[g])
        if better:
            most_pixels[g], most_bytes[g] = pixels[n], num_bytes[n]
            for word in range(name.shape[1]):
                least_name[g, word] = name[n, word]
            node[g] = first + n


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def raise_to(value: np.ndarray, a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> None:
    """Raise the values of both ends of each edge, float32 [N], to its weight, float32 [E]."""
    for n in range(len(a)):
        value[a[n]] = max(value[a[n]], weight[n])
        value[b[n]] = max(value[b[n]], weight[n])


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def count_ends(start: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Add the number of edges of each node to ``start``, int64 [N + 1]; the last entry stays."""
    for n in range(len(a)):
        start[a[n]] += 1
        start[b[n]] += 1


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def list_neighbours(start: np.ndarray, neighbour: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Write both ends of each edge into the lists of each other, from the end of a list to its beginning.

    Args:
        start: place behind what is still free of each node's list, int64 [N + 1], changed: its beginning, in the end.
        neighbour: uint32 [2 E], filled.
        a: one end, uint32 [E].
        b: the other end.
    """
    for n in range(len(a)):
        start[a[n]] -= 1
        neighbour[start[a[n]]] = b[n]
        start[b[n]] -= 1
        neighbour[start[b[n]]] = a[n]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def take_stars(order: np.ndarray, start: np.ndarray, neighbour: np.ndarray, centre: np.ndarray) -> None:
    """In their order, nodes that are free become centres and take their free neighbours.

    Args:
        order: of the nodes, [N].
        start: beginning of each node's list, int64 [N + 1].
        neighbour: uint32 [2 E].
        centre: uint32 [N]; N where a node is free; filled.
    """
    free = len(centre)
    for n in range(len(order)):
        node = order[n]
        if centre[node] != free:
            continue
        centre[node] = node
        for at in range(start[node], start[node + 1]):
            if centre[neighbour[at]] == free:
                centre[neighbour[at]] = node
