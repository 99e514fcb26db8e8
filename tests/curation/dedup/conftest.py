"""A TaskIO over tables in memory, and a runner that calls tasks one after the other: plain data for the tests here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.schema import TABLES, UNDER_WAY, Part
from curation.stage import DEFAULT_MEMORY_BYTES, ShardStage, Task
from curation.store import Within, rows_within


@dataclass
class MemoryIO:
    tables: dict[Part, pa.Table] = field(default_factory=dict)
    kept_ids: dict[tuple[str, int], pa.Table] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)
    shard: int = -1
    rows: Any = None
    role: Any = "pool"
    scratch: Path = Path()
    allowed: frozenset[Part] | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    device: Any = "cpu"

    def part(self, table: str, index: int) -> Part:
        return Part(TABLES[table].root, table, index)

    def read(self, part: Part, columns: Sequence[str] | None = None, *, within: Within | None = None) -> pa.Table:
        if self.allowed is not None:
            assert part in self.allowed or part.folder in UNDER_WAY, f"{part} is read but not named in reads"
        table = rows_within(self.tables[part], within)
        return table.select(columns) if columns else table

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        index = 0 if TABLES[name].parts == "single" else self.shard
        return self.read(self.part(name, index), columns)

    def kept(self, verdict: str, shard: int) -> pa.Table:
        if self.roles.get(shard, "pool") != "pool":
            verdict = "safety"
        if self.allowed is not None:
            assert self.part(verdict, shard) in self.allowed, f"{verdict} of {shard} is read but not named in reads"
        return self.kept_ids[verdict, shard]

    def blob(self, path: str, offset: int, size: int, root: str = "pool") -> bytes:
        return self.blobs[path][offset : offset + size]

    def put(self, table: str, index: int, **columns: Any) -> None:
        """Store a part of a table; columns not given are null."""
        schema = TABLES[table].schema
        num_rows = len(next(iter(columns.values())))
        arrays = [
            pa.array(list(columns[f.name]), f.type) if f.name in columns else pa.nulls(num_rows, f.type) for f in schema
        ]
        self.tables[self.part(table, index)] = pa.table(arrays, schema=schema)

    def keep(self, verdict: str, shard: int, ids: np.ndarray, sha256: Sequence[str]) -> None:
        self.kept_ids[verdict, shard] = pa.table(
            {"image_id": pa.array(ids, pa.int64()), "sha256": pa.array(sha256, pa.string())}
        )

    # --- Context

    def shards(self, *roles: str) -> list[int]:
        return sorted(shard for shard, role in self.roles.items() if role in roles)

    def sources(self) -> pa.Table:
        return self.tables[self.part("sources", 0)]

    def parts(self, table: str) -> list[Part]:
        return sorted(part for part in self.tables if part.folder == table)

    def digest(self, part: Part) -> str:
        return str(part)

    def num_rows(self, part: Part) -> int:
        return self.tables[part].num_rows

    def is_done(self, stage: Any, task: Task) -> bool:
        del stage, task
        return False

    def discard(self, parts: Any) -> None:
        for part in parts:
            del self.tables[part]

    def clear(self, tables: Any) -> None:
        for part in [part for part in self.tables if part.folder in tables]:
            del self.tables[part]

    # --- runner

    def map(self, tasks: Sequence[Task]) -> list[None]:
        for task in tasks:
            out = task.function(replace(self, allowed=frozenset(task.reads)), **task.args)
            tables = out if isinstance(out, tuple) else (out,)
            for part, table in zip((task.writes, *task.also), tables, strict=True):
                assert table.schema.equals(TABLES[part.folder].schema), part.folder
                self.tables[part] = table
        return []

    def verdict(self, stage: ShardStage, shard: int) -> pa.Table:
        """Run a verdict stage over what the verdict before it kept, and note what it keeps."""
        assert stage.after is not None
        rows = self.kept_ids[stage.after, shard]
        (name,) = stage.writes
        out = stage.run(shard, replace(self, shard=shard, rows=rows))[name]
        assert out.schema.equals(TABLES[name].schema)
        assert out["image_id"].to_pylist() == rows["image_id"].to_pylist()
        kept = out.filter(out["keep"])
        self.kept_ids[name, shard] = kept.select(["image_id", "sha256"])
        return out


@pytest.fixture
def memory_io() -> MemoryIO:
    return MemoryIO()


@pytest.fixture(scope="session")
def new_io() -> type[MemoryIO]:
    """For tests that need many."""
    return MemoryIO
