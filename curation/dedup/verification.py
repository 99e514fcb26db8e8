"""Candidate pairs of copies, seen to the end: local features of the two pictures decide.

What a cosine proposes is compared keypoint by keypoint, on the 288-px pictures. Keypoints are larger than the pictures,
so they are stored only while edges are made; found anew for each pair they would cost ten times what comparing costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from curation.dedup.describe import PLACE, read_small
from curation.dedup.geometric import places_in_common
from curation.dedup.near import rows_at
from curation.dedup.siftvlad import NUM_KEYPOINTS, Keypoints, grey_of, keypoints_of
from curation.schema import ROWS_PER_SHARD_LIMIT, TABLES
from curation.stage import TaskIO

_SHARE_OF_MEMORY = 0.3  # of a task, for keypoints; the rest is for pairs, for what is read, and for libraries
_BYTES_A_PICTURE = NUM_KEYPOINTS * (128 + 2 * 4)
_ROWS_AT_ONCE = 512  # of edge_keypoints, read in one go: 28 MB


def keypoints_of_shard(io: TaskIO, *, shard: int) -> pa.Table:
    """One part of ``edge_keypoints``: those of a shard's pictures that near (of other roles: safety) kept."""
    ids = io.kept("near", shard)["image_id"].to_numpy()
    table = io.read(io.part("detections", shard), PLACE)
    places = table.take(pa.array(rows_at(table["image_id"].to_numpy(), ids))).to_pylist()
    rows = []
    for place in places:
        found = keypoints_of(grey_of(read_small(io, place)))
        row = {"image_id": place["image_id"], "width_px": found.width_px}
        rows.append(row | {"places": found.places.tobytes(), "sift": found.sift.tobytes()})
    return pa.Table.from_pylist(rows, schema=TABLES["edge_keypoints"].schema)


def _read_keypoints(io: TaskIO, ids: np.ndarray) -> dict[int, Keypoints]:
    """Keypoints of pictures, by image_id; ``ids`` int64 [N], ascending."""
    found: dict[int, Keypoints] = {}
    start = 0
    while start < len(ids):
        first = int(ids[start])
        shard = first // ROWS_PER_SHARD_LIMIT
        last = min(first + _ROWS_AT_ONCE, (shard + 1) * ROWS_PER_SHARD_LIMIT)
        end = int(np.searchsorted(ids, last))
        wanted = set(ids[start:end].tolist())
        for row in io.read(io.part("edge_keypoints", shard), within=("image_id", first, last)).to_pylist():
            if row["image_id"] in wanted:
                places = np.frombuffer(row["places"], np.float32).reshape(-1, 2)
                sift = np.frombuffer(row["sift"], np.uint8).reshape(-1, 128)
                found[row["image_id"]] = Keypoints(places, sift, row["width_px"])
        start = end
    return found


def _blocks(a: np.ndarray, b: np.ndarray, num_pictures: int) -> Iterator[slice]:
    """Consecutive pairs with at most so many pictures together, one pair at least."""
    start, held = 0, set[int]()
    for at, pair in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        if at > start and len(held) + sum(one not in held for one in pair) > num_pictures:
            yield slice(start, at)
            start, held = at, set()
        held.update(pair)
    if len(a):
        yield slice(start, len(a))


def _agree(one: Keypoints, other: Keypoints, min_places: int) -> bool:
    return places_in_common(one, other, at_least=min_places) >= min_places


def verify(io: TaskIO, a: np.ndarray, b: np.ndarray, *, min_places: int) -> pa.Array:
    """Whether pictures ``a`` and ``b``, image_ids int64 [E], show the same at the same places, bool [E].

    Null where nobody can tell: one of them does not agree even with itself, as it has too few keypoints or they are all
    alike.
    """
    from threadpoolctl import threadpool_limits

    verdicts: list[bool | None] = []
    limits: Any = threadpool_limits(1)
    with limits:
        for block in _blocks(a, b, int(io.memory_bytes * _SHARE_OF_MEMORY) // _BYTES_A_PICTURE):
            held = _read_keypoints(io, np.unique([a[block], b[block]]))
            tells: dict[int, bool] = {}
            for pair in zip(a[block].tolist(), b[block].tolist(), strict=True):
                agree = _agree(held[pair[0]], held[pair[1]], min_places)
                for image_id in pair if not agree else ():
                    if image_id not in tells:
                        tells[image_id] = _agree(held[image_id], held[image_id], min_places)
                can_tell = agree or all(tells[image_id] for image_id in pair)
                verdicts.append(agree if can_tell else None)
    return pa.array(verdicts, pa.bool_())
