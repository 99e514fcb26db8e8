"""Labelled pictures that a run of the sample web kept and did not choose: what a trainer of its tars never saw."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from curation.store import open_store
from pipelines.results import opened
from training.config import ConfigError

NAME = "held_out.parquet"

# Kept by every verdict but the last; one row a picture, labelled by the photograph that it was composed from.
_SQL = """
    SELECT e.image_id, t.scene, row_number() OVER (PARTITION BY t.scene ORDER BY e.image_id) AS number,
           d.small_object, d.small_offset, d.small_bytes
    FROM end_state e
    JOIN urls u USING (image_id)
    JOIN detections d USING (image_id)
    JOIN read_parquet(?) t ON t.line = e.line AND t.url = u.url
    WHERE e.role = 'pool' AND e.stage = 'selection' AND t.scene IS NOT NULL AND d.small_object IS NOT NULL
    QUALIFY number <= 30  -- so that no scene is the best guess
    ORDER BY e.image_id
"""


def write_held_out(run: str) -> Path:
    """Write ``RUN/held_out.parquet``: key, image (bytes, faces blurred, at most 288 px), scene, split (train, test).

    Raises:
        ConfigError: the run was not made from a sample web, so nobody knows what its pictures show.
    """
    with opened(run) as database:
        if database.truth is None or not database.truth.is_file():
            raise ConfigError(
                f"{run} was not made from a sample web, so nothing labels its pictures; name labelled sets of your own "
                "under evaluation.sets"
            )
        rows = database.connection.sql(_SQL, params=[str(database.truth)]).to_arrow_table().to_pylist()
        pool = open_store(database.pool)
        images = [pool.read_range(row["small_object"], row["small_offset"], row["small_bytes"]) for row in rows]
    table = pa.table(
        {
            "key": [str(row["image_id"]) for row in rows],
            "image": pa.array(images, pa.binary()),
            "scene": [row["scene"] for row in rows],
            "split": ["train" if row["number"] % 2 else "test" for row in rows],
        }
    )
    path = Path(run) / NAME
    beside = path.with_suffix(".tmp")
    pq.write_table(table, beside)
    beside.replace(path)
    return path
