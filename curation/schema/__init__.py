"""Every table of a pool and of a run: where it lies, what one row is, and its columns.

Identity. ``image_id = shard * 1_000_000 + row`` and ``shard = source_id * 1_000_000 + n``: an id follows from a
source and a position in it, before anything is judged, so no block list, threshold or further list ever moves one.
Part N of a per-image table holds ids of shard N only, so that joins per image never shuffle.

Kinds. ``facts`` depend on sources and models only and never say ``keep``; ``verdict`` tables say ``keep, reason,
score, threshold`` and cover exactly the rows that the verdict before them kept; ``output`` is everything else.
"""

from curation.schema import dedup, export, ingest, represent, retrieve, safety
from curation.schema.identity import (
    ROWS_PER_SHARD_LIMIT,
    SHARDS_PER_SOURCE_LIMIT,
    Part,
    Root,
    first_shard,
    groups_by_size,
    id_range,
    image_ids,
    part_of_group,
    shard_of,
    source_of_shard,
)
from curation.schema.safety import BOX
from curation.schema.table import Kind, Parts, Role, Table, vector_schema

__all__ = [
    "BOX",
    "LAST_VERDICT_OF_REFERENCES",
    "LOGS",
    "ROWS_PER_SHARD_LIMIT",
    "SHARDS_PER_SOURCE_LIMIT",
    "TABLES",
    "UNDER_WAY",
    "VECTOR_TABLES",
    "VERDICTS",
    "Kind",
    "Part",
    "Parts",
    "Role",
    "Root",
    "Table",
    "first_shard",
    "groups_by_size",
    "id_range",
    "image_ids",
    "part_of_group",
    "shard_of",
    "source_of_shard",
    "table_of",
    "vector_schema",
    "verdict_before",
]

# The verdicts in the order in which a row meets them. Each covers the rows kept by the one before it.
VERDICTS = ("screened", "fetched", "safety", "near", "duplicates", "leakage", "semantic", "selection")
# Shards of query sets and benchmarks meet only the verdicts up to this one, and there only broken lines, failed fetches
# and pictures that do not decode are dropped. What a later verdict would keep of them is what this one kept.
LAST_VERDICT_OF_REFERENCES = "safety"

_AREAS = (ingest, safety, dedup, represent, retrieve, export)
TABLES: dict[str, Table] = {table.name: table for area in _AREAS for table in area.TABLES}
# Their vectors have the length that the model gives; the schema of the table holds a nominal one.
VECTOR_TABLES = ("descriptors", "embeddings")
# In a run only while a stage is under way. They hold vectors, so they go with a takedown.
UNDER_WAY = (
    "kmeans_pieces",
    "kmeans_sums",
    "kmeans_centroids",
    "semantic_vectors",
    "edge_vectors",
    "edge_keypoints",
    "edge_proposals",
    "recall_sample",
)
# Tables of visits hold times: they are outside every comparison, and do not say which rows are done.
LOGS = ("fetch_log",)


def verdict_before(name: str) -> str | None:
    """The verdict whose kept rows the verdict ``name`` covers; None for the first."""
    place = VERDICTS.index(name)
    return VERDICTS[place - 1] if place else None


def table_of(part: Part) -> str:
    """Table of a part, whose folder is ``TABLE``, ``TABLE/MODEL-KEY`` or ``fits/TABLE/MODEL-KEY``."""
    folders = part.folder.split("/")
    return folders[1] if folders[0] == "fits" else folders[0]
