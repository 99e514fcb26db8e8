"""What a table is, and the columns that several have."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from curation.schema.identity import Root

Kind = Literal["facts", "verdict", "output"]
Role = Literal["pool", "query", "benchmark"]
# Parts of a table: one a shard, exactly one (part 0), one a task of the stage that writes it, or one a group of
# consecutive shards, of the pool unless its table says others, numbered by its first (``part_of_group``).
Parts = Literal["shard", "single", "task", "group"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: its root, its kind, what a row is, and its columns."""

    name: str
    root: Root
    kind: Kind
    row: str
    schema: pa.Schema
    parts: Parts = "shard"
    row_group_rows: int = 65_536  # of a parquet file; a range of rows is read in whole row groups
    roles: tuple[Role, ...] = ("pool",)  # of the shards in the groups of a table with one part a group


def columns(*fields: tuple[str, pa.DataType, str]) -> pa.Schema:
    """Columns, each with what it holds."""
    return pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in fields])


ID = ("image_id", pa.int64(), "shard * 1_000_000 + row")
SHA = ("sha256", pa.string(), "sha256 of the stored bytes, hex")
VERDICT = (
    ID,
    SHA,
    ("keep", pa.bool_(), "true: the row goes on"),
    ("reason", pa.string(), "why it was dropped; null where kept"),
    ("score", pa.float32(), "the number that was judged; null where none was"),
    ("threshold", pa.float32(), "what it was judged against"),
)


def vector_schema(dim: int) -> pa.Schema:
    """Schema of one descriptor or embedding table: unit vectors, fp16 [dim]."""
    return columns(ID, SHA, ("vector", pa.list_(pa.float16(), dim), "unit length"))
