"""Parquet: a column of encoded pictures, a row group a shard."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training.config import ConfigError
from training.data.files import File, list_files, open_file
from training.data.kinds.shard import OPEN_THREADS, Shard, as_label


@dataclass(frozen=True, kw_only=True)
class ColumnRows:
    """Pictures of a row group, held in memory: parquet cannot be read by row."""

    keys: Sequence[str]
    column: pa.ChunkedArray  # binary
    path: str
    group: int
    chosen: np.ndarray | None  # int64, rows of the group that were taken; None: all

    def read(self, row: int) -> bytes:  # noqa: D102 - see Rows
        value = self.column[row].as_py()
        return b"" if value is None else bytes(value)

    def labels(self, name: str) -> list[str | None]:  # noqa: D102
        with open_file(self.path) as file:
            opened = open_parquet(self.path, file)
            if name not in opened.schema_arrow.names:
                raise ConfigError(f"{self.path}: no column {name!r}; it has: {', '.join(opened.schema_arrow.names)}")
            column = opened.read_row_group(self.group, columns=[name])[name]
        values = column if self.chosen is None else column.take(pa.array(self.chosen))
        return [as_label(value) for value in values.to_pylist()]


class ParquetSource:
    """A column of encoded pictures: bytes, or a struct with a field ``bytes`` as Hugging Face writes it."""

    def __init__(self, location: str, column: str, where: str | None) -> None:
        self.notes: list[str] = []
        self._column = column
        self._where = where
        with ThreadPoolExecutor(OPEN_THREADS) as pool:
            found = list(pool.map(self._groups, list_files(location, (".parquet",))))
        self.shards: list[Shard] = [shard for shards in found for shard in shards]
        if where is not None and not self.shards:
            self.notes.append(f"no row has the split {where!r}")

    def _groups(self, file: File) -> list[Shard]:
        with open_file(file.path) as opened:
            parquet = open_parquet(file.path, opened)
            names = parquet.schema_arrow.names
            wanted = [self._column] + (["split"] if self._where is not None else [])
            for name in wanted:
                if name not in names:
                    raise ConfigError(f"{file.path}: no column {name!r}; it has: {', '.join(names)}")
            kind = parquet.schema_arrow.field(self._column).type
            if not _is_bytes(kind) and not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
                raise ConfigError(f"{file.path}: column {self._column!r} is {kind}; it must be bytes, or hold `bytes`")
            shards = []
            for group in range(parquet.num_row_groups):
                chosen = self._chosen(parquet, group)
                num = parquet.metadata.row_group(group).num_rows if chosen is None else len(chosen)
                if num:
                    name = f"{file.name}#{group}"
                    shards.append(
                        Shard(name=name, path=file.path, num_samples=num, num_bytes=file.num_bytes, number=group)
                    )
        return shards

    def _chosen(self, parquet: pq.ParquetFile, group: int) -> np.ndarray | None:
        if self._where is None:
            return None
        values = parquet.read_row_group(group, columns=["split"])["split"].to_pylist()
        return np.flatnonzero([as_label(value) == self._where for value in values])

    def rows(self, shard: Shard) -> ColumnRows:  # noqa: D102 - see Source
        with open_file(shard.path) as file:
            parquet = open_parquet(shard.path, file)
            chosen = self._chosen(parquet, shard.number)
            column = parquet.read_row_group(shard.number, columns=[self._column])[self._column]
        if chosen is not None:
            column = column.take(pa.array(chosen))
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")
        if len(column) != shard.num_samples:
            raise ConfigError(f"{shard.path}: {len(column):,} pictures, at the start it held {shard.num_samples:,}")
        numbers = range(len(column)) if chosen is None else chosen
        return ColumnRows(
            keys=[f"{shard.name}/{number}" for number in numbers],
            column=column,
            path=shard.path,
            group=shard.number,
            chosen=chosen,
        )

    def verify(self) -> list[str]:  # noqa: D102
        return []  # nothing tells what a row should hold


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def open_parquet(path: str, file: BinaryIO) -> pq.ParquetFile:
    """The parquet in an opened file; ConfigError where it is none."""
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path}: no parquet, damaged or cut off ({str(error).splitlines()[0]})") from None


def read_parquet(path: str, columns: list[str] | None = None) -> pa.Table:
    """A whole parquet; FileNotFoundError where there is none."""
    with open_file(path) as file:
        return open_parquet(path, file).read(columns=columns)
