"""Connected components of edges that come in pieces: union-find (Tarjan 1975), 4 bytes a node, no edge held.

The partition and the number of a component depend on the set of edges only, never on their order or their pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Tally(NamedTuple):
    """What a graph looks like so far."""

    num_components: int  # of two or more nodes
    num_nodes: int  # in them
    largest: int  # nodes of the largest; 0 where there is no edge


class UnionFind:
    """Components of the nodes 0 to ``num_nodes - 1``.

    Args:
        num_nodes: fewer than 2^31.
        counts: keep ``tally`` up to date, for another 4 bytes a node.
    """

    def __init__(self, num_nodes: int, *, counts: bool = False) -> None:
        self._parents = np.arange(num_nodes, dtype=np.int32)
        self._sizes = np.ones(num_nodes if counts else 0, np.int32)
        self._tallies = np.zeros(3, np.int64)

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join the ends of some edges, int [E] each; self edges and repeated ones are allowed."""
        from curation.dedup.unionloops import join

        join(self._parents, self._sizes, self._tallies, a, b)

    def tally(self) -> Tally:
        """Of the edges so far; needs ``counts``."""
        return Tally(*(int(value) for value in self._tallies))

    def labels(self) -> np.ndarray:
        """Least node of the component of each node, int32 [num_nodes]; valid until more is added."""
        from curation.dedup.unionloops import flatten

        flatten(self._parents)
        return self._parents


def connected_components(num_nodes: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Least node of the component of each node, int64 [num_nodes], of edges that are all at hand.

    Args:
        num_nodes: nodes are 0 to ``num_nodes - 1``.
        a: one end of each edge, int64 [E]; self edges and repeated ones are allowed.
        b: the other end.
    """
    components = UnionFind(num_nodes)
    components.add(a, b)
    return components.labels().astype(np.int64)
