"""Balanced sampling: a number of pictures shared out down a hierarchy of clusters, as evenly as their sizes allow.

Water-filling from the top (Vo et al. 2024, Automatic Data Curation for Self-Supervised Learning): each node
shares its quota among its children, all alike but for those that have less.

A larger total only adds pictures. Raise the quota of a node by one: either the level stays and one more child of the
node's fixed order gets one above it, or the last child of that order completes the round and the level rises by one.
Both give one child one more and take nothing from any other. So the quota of each child grows with that of its
parent, hence that of each leaf with the total, and a leaf's choice is the beginning of one fixed order. It would not
hold if the order changed with the total, as it does where remainders are drawn anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def water_level(sizes: np.ndarray, total: int) -> int:
    """The largest cut that, applied to each cluster, takes at most ``total`` pictures.

    Args:
        sizes: pictures of each cluster, int64 [K].
        total: at least 0.

    Returns:
        The largest integer x with sum(min(x, size)) <= total; the largest size where the total takes all there is.
    """
    ordered = np.sort(sizes)
    num = len(ordered)
    below = np.cumsum(ordered) - ordered  # pictures of the smaller clusters
    taken = below + ordered * np.arange(num, 0, -1)  # by a cut at each size
    num_whole = int(np.searchsorted(taken, total, side="right"))
    if num_whole == num:
        return int(ordered[-1]) if num else 0
    return int((total - below[num_whole]) // (num - num_whole))


def priority(key: str, level: int, cluster: int) -> str:
    """Place of a cluster among its siblings: of those above the water level, the least get the remainder."""
    return hashlib.sha256(f"{key}|{level}|{cluster}".encode()).hexdigest()


def _share(sizes: np.ndarray, parent: np.ndarray, totals: np.ndarray, *, key: str, level: int) -> np.ndarray:
    """Quota of each cluster of a level, int64 [K], from the quotas of their parents, int64 [P]."""
    quota = np.zeros(len(sizes), np.int64)
    ends = np.cumsum(np.bincount(parent, minlength=len(totals)))
    siblings = np.split(np.argsort(parent, kind="stable"), ends[:-1])
    for total, children in zip(totals.tolist(), siblings, strict=True):
        cut = water_level(sizes[children], total)
        quota[children] = np.minimum(sizes[children], cut)
        remainder = total - int(quota[children].sum())
        if remainder:
            larger = children[sizes[children] > cut].tolist()
            quota[sorted(larger, key=lambda child: priority(key, level, child))[:remainder]] += 1
    return quota


def allocate(parents: Sequence[np.ndarray], leaf_sizes: np.ndarray, total: int, key: str) -> np.ndarray:
    """Share a total out, from the highest level of a hierarchy down to the clusters that hold pictures.

    Args:
        parents: ``Hierarchy.parents``: of each level but the highest, from the lowest, int32 [K_l]; none where there is
            one level.
        leaf_sizes: pictures of each cluster of the lowest level, int64 [K_1].
        total: pictures wanted.
        key: seed of the order in which siblings get what does not divide.

    Returns:
        Quota of each cluster of the lowest level, int64 [K_1]. They sum to the total, or to all there is, and none
        falls when the total rises.
    """
    sizes = [np.asarray(leaf_sizes, np.int64)]
    num_above = [len(parent) for parent in parents[1:]] + [int(parent.max()) + 1 for parent in parents[-1:]]
    for parent, num in zip(parents, num_above, strict=True):
        above = np.zeros(num, np.int64)
        np.add.at(above, parent, sizes[-1])
        sizes.append(above)
    root = np.zeros(len(sizes[-1]), np.int32)
    quota = np.array([min(total, int(sizes[-1].sum()))], np.int64)
    for level, (size, parent) in reversed(list(enumerate(zip(sizes, [*parents, root], strict=True)))):
        quota = _share(size, parent, quota, key=key, level=level)
    return quota


def choose(cluster: np.ndarray, quota: np.ndarray, *, order_key: np.ndarray, image_id: np.ndarray) -> np.ndarray:
    """The first pictures of each cluster in a given order, as many as its quota.

    The first of what was chosen from two halves of the pool are the first of the whole, so that shards can be read one
    after the other.

    Args:
        cluster: of each picture, int32 [N].
        quota: of each cluster, int64 [K].
        order_key: what comes first, [N], of numbers or of strings: the sha256 of the bytes, or a hash of it.
        image_id: what decides between equal keys, int64 [N].

    Returns:
        Places of the chosen, int64 [P], by cluster and order.
    """
    order = np.lexsort((image_id, order_key, cluster))
    grouped = cluster[order]
    rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    return np.asarray(order[rank < quota[grouped]])
