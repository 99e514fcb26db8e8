"""The compiled loops of the union-find. Numba takes half a second to import: whoever needs one imports it there."""

from __future__ import annotations

import numba
import numpy as np

# Tallies of a graph, in the array that ``join`` keeps up to date.
COMPONENTS, PICTURES, LARGEST = 0, 1, 2  # components of two or more, nodes in them, size of the largest


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _root(parents: np.ndarray, node: int) -> int:
    """Root of a node; every second node of the path is hung up higher on the way (path halving)."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def join(parents: np.ndarray, sizes: np.ndarray, tallies: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Join the ends of edges; the lesser root stays a root, so the root of a component is its least node.

    Args:
        parents: int32 [N]; a root is its own parent.
        sizes: int32 [N], nodes below each root; of length 0 where nobody counts.
        tallies: int64 [3], see above; untouched where nobody counts.
        a: one end of each edge, int [E].
        b: the other end.
    """
    for edge in range(len(a)):
        left, right = _root(parents, a[edge]), _root(parents, b[edge])
        if left == right:
            continue
        if left > right:
            left, right = right, left
        parents[right] = left
        if len(sizes):
            num_left, num_right = sizes[left], sizes[right]
            sizes[left] = num_left + num_right
            tallies[COMPONENTS] += 1 - (num_left > 1) - (num_right > 1)
            tallies[PICTURES] += (num_left == 1) + (num_right == 1)
            tallies[LARGEST] = max(tallies[LARGEST], num_left + num_right)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def flatten(parents: np.ndarray) -> None:
    """Hang every node directly below its root. Parents are never greater than their nodes, so one pass does it."""
    for node in range(len(parents)):
        parents[node] = parents[parents[node]]
