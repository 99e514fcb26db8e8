"""Tables of the set as it is written."""

import pyarrow as pa

from curation.schema.table import ID, SHA, Table, columns

_TAR = (
    ("tar", pa.string(), "path inside the run"),
    ("num_samples", pa.int64(), "pictures"),
    ("num_bytes", pa.int64(), "size of the tar"),
    ("sha256", pa.string(), "of the tar"),
)
# What the manifest tells of a sample, before it lies in a tar, and where its bytes lie.
_SAMPLE = (
    ("shuffle_key", pa.int64(), "its place in the shuffle; equal ones go by image_id and copy"),
    ID,
    ("copy", pa.int32(), "number among the samples of this picture, from 0"),
    ("url", pa.string(), "where it came from; null for local files"),
    ("location", pa.string(), "local file inside its source; null for addresses"),
    ("page_url", pa.string(), "page that shows it"),
    ("alt_text", pa.string(), "text that came with it"),
    ("source", pa.string(), "list, folder or set"),
    ("label", pa.string(), "class, where the source is labelled"),
    SHA,
    ("width_px", pa.int32(), "after orientation"),
    ("height_px", pa.int32(), "after orientation"),
    ("blurred", pa.bool_(), "faces were blurred, or the original was purged for what else it holds"),
    ("part", pa.string(), "query set that chose it"),
    ("query_id", pa.int64(), "query that chose it"),
    ("query_label", pa.string(), "class of that query, where its set is labelled"),
    ("similarity", pa.float32(), "to it"),
    ("cluster", pa.int32(), "its cluster"),
    ("ext", pa.string(), "extension of the picture inside the tar"),
    ("object", pa.string(), "tar of the pool that holds it, its blurred version where there is one"),
    ("object_offset", pa.int64(), "of its first byte there"),
    ("num_bytes", pa.int64(), "its size"),
)
TABLES = (
    Table(
        name="export_rows",
        root="run",
        kind="output",
        parts="task",
        row="one sample of some shards, sorted by its place in the shuffle",
        schema=columns(*_SAMPLE),
        row_group_rows=1024,  # it is read by small ranges
    ),
    Table(
        name="export_plan",
        root="run",
        kind="output",
        parts="task",
        row="one sample of the set, in the order of the seeded shuffle; part = range of it",
        schema=columns(("row", pa.int64(), "place in the part, from 0"), *_SAMPLE),
        row_group_rows=1024,
    ),
    Table(
        name="tar_digests",
        root="run",
        kind="output",
        parts="task",
        row="one tar, as it was read back; part = group of 64",
        schema=columns(*_TAR),
    ),
    Table(
        name="shards",
        root="run",
        kind="output",
        parts="single",
        row="one tar, in order",
        schema=columns(*_TAR),
    ),
    Table(
        name="manifest",
        root="run",
        kind="output",
        parts="task",
        row="one sample of one tar; part = tar",
        schema=columns(
            ("key", pa.string(), "sample key inside the tar, sorted"),
            ID,
            ("url", pa.string(), "where it came from; null for local files"),
            ("location", pa.string(), "local file inside its source; null for addresses"),
            ("page_url", pa.string(), "page that shows it"),
            ("alt_text", pa.string(), "text that came with it"),
            ("source", pa.string(), "list, folder or set"),
            ("label", pa.string(), "class, where the source is labelled"),
            ("sha256", pa.string(), "of the original bytes; where blurred, the bytes in the tar are others"),
            ("width_px", pa.int32(), "after orientation"),
            ("height_px", pa.int32(), "after orientation"),
            ("blurred", pa.bool_(), "faces were blurred, or the original was purged for what else it holds"),
            ("part", pa.string(), "query set that chose it"),
            ("query_id", pa.int64(), "query that chose it"),
            ("query_label", pa.string(), "class of that query, where its set is labelled"),
            ("similarity", pa.float32(), "to it"),
            ("cluster", pa.int32(), "its cluster"),
            ("tar", pa.string(), "path inside the run"),
            ("offset", pa.int64(), "of the picture's first byte inside the tar"),
            ("size", pa.int64(), "bytes of the picture as stored in the tar"),
            ("ext", pa.string(), "extension inside the tar"),
        ),
    ),
)
