"""Small pictures for the page: which ones, and their bytes as data URIs.

They come from the intermediates of look, so faces are blurred. Which ones are shown follows the sha256 of their bytes:
a fair draw that is the same every time.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.data.pixels import DecodeError, decode, encode_jpeg

# Bytes of a range of an object of the pool: path, offset, size.
ReadRange = Callable[[str, int, int], bytes]

HEIGHT_PX = 96
MAX_WIDTH_PX = 240
_CELLS = 8  # of the longest side of a picture that is not to be seen
_QUALITY = 80

_CHOSEN = """
SELECT p.image_id, p.part AS label, p.query_id AS other_id, coalesce(u.url, u.location) AS address, p.part AS stage,
    NULL AS reason, p.similarity AS score, NULL AS threshold, d.small_object, d.small_offset, d.small_bytes,
    q.small_object AS other_object, q.small_offset AS other_offset, q.small_bytes AS other_bytes
FROM pictures p
JOIN urls u USING (image_id)
JOIN detections d USING (image_id)
LEFT JOIN detections q ON q.image_id = p.query_id
WHERE d.small_object IS NOT NULL
ORDER BY p.sha256, p.image_id
LIMIT ?
"""

_DROPPED = """
WITH others AS (
    SELECT image_id, 'near' AS stage, representative_id AS other_id FROM near
    UNION ALL SELECT image_id, 'duplicates', representative_id FROM duplicates
    UNION ALL SELECT image_id, 'leakage', reference_id FROM leakage
    UNION ALL SELECT image_id, 'semantic', nearest_id FROM semantic
    UNION ALL SELECT image_id, 'selection', reference_id FROM selection
),
ranked AS (
    SELECT e.*, coalesce(u.url, u.location) AS address, d.small_object, d.small_offset, d.small_bytes,
        count(*) OVER reasons AS num_pictures, row_number() OVER (reasons ORDER BY d.sha256, e.image_id) AS place
    FROM end_state e
    JOIN urls u USING (image_id)
    JOIN detections d USING (image_id)
    WHERE (e.role = 'pool' OR e.reason = 'test_match') AND e.reason IS NOT NULL AND d.small_object IS NOT NULL
    WINDOW reasons AS (PARTITION BY e.stage, e.reason)
)
SELECT r.image_id, r.stage, r.reason, r.score, r.threshold, r.address, r.num_pictures,
    r.small_object, r.small_offset, r.small_bytes, nullif(o.other_id, r.image_id) AS other_id,
    q.small_object AS other_object, q.small_offset AS other_offset, q.small_bytes AS other_bytes
FROM ranked r
LEFT JOIN others o ON o.image_id = r.image_id AND o.stage = r.stage
LEFT JOIN detections q ON q.image_id = nullif(o.other_id, r.image_id)
WHERE r.place <= ?
ORDER BY r.num_pictures DESC, r.stage, r.reason, r.place
"""


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """One picture of the page, and the one that it was held against."""

    image_id: int
    address: str
    stage: str  # verdict that dropped it; the part of the set where it was chosen
    reason: str | None
    score: float | None
    threshold: float | None
    source: str  # data URI
    other_id: int | None  # representative, benchmark picture, what it is too like, or query
    other_source: str | None


def chosen(connection: Any, read: ReadRange, num_pictures: int) -> list[Thumbnail]:
    """Up to ``num_pictures`` of the set, each with the query that asked for it."""
    return list(_thumbnails(connection, read, _CHOSEN, num_pictures))


def dropped(connection: Any, read: ReadRange, num_pictures: int) -> list[Thumbnail]:
    """Up to ``num_pictures`` of each reason that drops pictures that decoded; the commonest reason first."""
    return list(_thumbnails(connection, read, _DROPPED, num_pictures))


def _thumbnails(connection: Any, read: ReadRange, query: str, num_pictures: int) -> Iterator[Thumbnail]:
    cursor = connection.execute(query, [num_pictures])
    names = [column[0] for column in cursor.description]
    for values in cursor.fetchall():
        row = dict(zip(names, values, strict=True))
        hide = row["reason"] in ("nsfw", "nsfw_opinion")
        source = data_uri(read(row["small_object"], row["small_offset"], row["small_bytes"]), hide=hide)
        other = None
        if row["other_object"] is not None:
            other = data_uri(read(row["other_object"], row["other_offset"], row["other_bytes"]), hide=hide)
        yield Thumbnail(
            image_id=row["image_id"],
            address=row["address"] or "",
            stage=row["stage"],
            reason=row["reason"],
            score=row["score"],
            threshold=row["threshold"],
            source=source,
            other_id=row["other_id"],
            other_source=other,
        )


def data_uri(data: bytes, *, hide: bool = False) -> str:
    """A picture as a JPEG of at most ``MAX_WIDTH_PX`` x ``HEIGHT_PX``, in a data URI; empty where it does not decode.

    Args:
        data: the file.
        hide: keep a few cells only, so that nothing can be made out.
    """
    try:
        rgb = decode(data).rgb
    except DecodeError:
        return ""
    small = _shrunk(rgb, HEIGHT_PX, MAX_WIDTH_PX)
    if hide:
        cells = _shrunk(rgb, _CELLS, _CELLS)
        rows = np.arange(small.shape[0]) * cells.shape[0] // small.shape[0]
        columns = np.arange(small.shape[1]) * cells.shape[1] // small.shape[1]
        small = np.ascontiguousarray(cells[rows][:, columns])
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(small, _QUALITY)).decode()


def _shrunk(rgb: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """The whole picture, uint8 [H, W, 3], made to fit; never enlarged."""
    import cv2

    scale = min(height_px / rgb.shape[0], width_px / rgb.shape[1])
    if scale >= 1:
        return rgb
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA))
