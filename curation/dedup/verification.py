"""Candidate pairs of copies, seen to the end: local features of the two pictures decide.

What a cosine proposes is compared keypoint by keypoint, on the 288-px pictures. Keypoints are found anew where they are
needed: stored, they would be larger than the pictures.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa

from curation.dedup.describe import PLACE, read_small
from curation.dedup.geometric import places_in_common
from curation.dedup.near import rows_at
from curation.dedup.siftvlad import Keypoints, grey_of, keypoints_of
from curation.schema import ROWS_PER_SHARD_LIMIT
from curation.stage import TaskIO

_SHARE_OF_MEMORY = 0.4  # of a task, for keypoints; the rest is for pairs, places and libraries


class Gallery:
    """Keypoints of pictures by image_id; those used last are held, as many as memory allows."""

    def __init__(self, io: TaskIO, ids: np.ndarray) -> None:
        """``ids`` int64 [N], the pictures that will be asked for."""
        self._io = io
        self._places = _places_of(io, np.unique(ids))
        self._held: OrderedDict[int, Keypoints] = OrderedDict()
        self._bytes, self._most = 0, int(io.memory_bytes * _SHARE_OF_MEMORY)

    def keypoints(self, image_id: int) -> Keypoints:
        """Keypoints of one picture."""
        held = self._held.get(image_id)
        if held is not None:
            self._held.move_to_end(image_id)
            return held
        found = keypoints_of(grey_of(read_small(self._io, self._places[image_id])))
        self._held[image_id] = found
        self._bytes += _bytes_of(found)
        while self._bytes > self._most and len(self._held) > 1:
            self._bytes -= _bytes_of(self._held.popitem(last=False)[1])
        return found


def _bytes_of(keypoints: Keypoints) -> int:
    return int(keypoints.places.nbytes + keypoints.rows.nbytes)


def _places_of(io: TaskIO, ids: np.ndarray) -> dict[int, dict[str, Any]]:
    """Where the 288-px pictures lie, by image_id; ``ids`` ascending."""
    found: dict[int, dict[str, Any]] = {}
    shards = ids // ROWS_PER_SHARD_LIMIT
    for shard in np.unique(shards).tolist():
        mine = ids[shards == shard]
        table = io.read(io.part("detections", shard), PLACE)
        at = rows_at(table["image_id"].to_numpy(), mine)
        found |= {row["image_id"]: row for row in table.take(pa.array(at)).to_pylist()}
    return found


def verify(gallery: Gallery, a: np.ndarray, b: np.ndarray, *, min_places: int) -> pa.Array:
    """Whether pictures ``a`` and ``b``, image_ids int64 [E], show the same at the same places, bool [E].

    Null where one of them has fewer keypoints than that, so that nobody can tell.
    """
    from threadpoolctl import threadpool_limits

    verdicts: list[bool | None] = []
    limits: Any = threadpool_limits(1)
    with limits:
        for left, right in zip(a.tolist(), b.tolist(), strict=True):
            one, other = gallery.keypoints(left), gallery.keypoints(right)
            can_tell = min(len(one.rows), len(other.rows)) >= min_places
            verdicts.append(places_in_common(one, other) >= min_places if can_tell else None)
    return pa.array(verdicts, pa.bool_())
