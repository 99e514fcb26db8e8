"""Anybody's tars: a tar a shard."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.config import ConfigError
from training.data.files import PICTURES, File, list_files, open_file, read_range
from training.data.kinds.shard import OPEN_THREADS, Shard, as_label
from training.data.tars import TarError, members

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # webdataset: a key ends at the first dot of the file's name


@dataclass(frozen=True, kw_only=True)
class TarRows:
    """Pictures of a tar by offset; a side is the json that goes with one."""

    path: str
    keys: Sequence[str]
    offsets: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int64 [n]
    side_offsets: np.ndarray  # int64 [n], -1 where a picture has no json
    side_sizes: np.ndarray  # int64 [n]

    def read(self, row: int) -> bytes:  # noqa: D102 - see Rows
        return read_range(self.path, int(self.offsets[row]), int(self.sizes[row]))

    def labels(self, name: str) -> list[str | None]:  # noqa: D102
        found: list[str | None] = []
        for key, offset, size in zip(self.keys, self.side_offsets, self.side_sizes, strict=True):
            if offset < 0:
                raise ConfigError(f"{self.path}: {key!r} has no json, so no label {name!r}")
            side = json.loads(read_range(self.path, int(offset), int(size)))
            if not isinstance(side, dict) or name not in side:
                allowed = ", ".join(sorted(side)) if isinstance(side, dict) else "none"
                raise ConfigError(f"{self.path}: the json of {key!r} has no field {name!r}; it has: {allowed}")
            found.append(as_label(side[name]))
        return found


class TarSource:
    """Anybody's tars: samples are members ``KEY.EXT`` that follow one another, a picture is the first that is one."""

    def __init__(self, location: str, cache: Path | None) -> None:
        self._cache = cache
        self._tags: dict[str, str] = {}
        self.notes: list[str] = []
        files = list_files(location, (".tar",))
        with ThreadPoolExecutor(OPEN_THREADS) as pool:
            counts = list(pool.map(lambda file: len(self._table(file)), files))
        self.shards: list[Shard] = []
        for file, count in zip(files, counts, strict=True):
            if count:
                self._tags[file.name] = file.tag
                self.shards.append(Shard(name=file.name, path=file.path, num_samples=count, num_bytes=file.num_bytes))
            else:
                self.notes.append(f"{file.path}: no picture in it, left out")

    def rows(self, shard: Shard) -> TarRows:  # noqa: D102 - see Source
        table = self._table(File(shard.name, shard.path, shard.num_bytes, self._tags[shard.name]))
        if len(table) != shard.num_samples:
            raise ConfigError(f"{shard.path}: {len(table):,} pictures, at the start it held {shard.num_samples:,}")
        return TarRows(
            path=shard.path,
            # Other tars may use the same keys.
            keys=[f"{shard.name}/{key}" for key in table["key"].to_pylist()],
            **{name: table[name].to_numpy() for name in ("offsets", "sizes", "side_offsets", "side_sizes")},
        )

    def verify(self) -> list[str]:  # noqa: D102
        return []  # opening it has read all that a tar tells of itself

    def _table(self, file: File) -> pa.Table:
        """Members of a tar, from the cache where it is known."""
        name = hashlib.sha256("\n".join((file.path, str(file.num_bytes), file.tag)).encode()).hexdigest()
        kept = None if self._cache is None else self._cache / f"{name}.parquet"
        if kept is not None and kept.exists():
            return pq.read_table(kept)
        table = scan_tar(file)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            beside = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            pq.write_table(table, beside)
            beside.replace(kept)
        return table


def scan_tar(file: File) -> pa.Table:
    """Pictures of a tar: key, offsets, sizes, side_offsets, side_sizes.

    Raises:
        ConfigError: no tar, compressed, or cut off, with the byte where it ends.
    """
    rows: list[list[Any]] = []
    before = None
    with open_file(file.path) as opened:
        if opened.read(6).startswith(_COMPRESSED):
            raise ConfigError(f"{file.path}: compressed tars cannot be read by offset; unpack it to a plain .tar")
        opened.seek(0)
        try:
            for member in members(file.path, opened):
                parts = _SAMPLE.fullmatch(member.name)
                if parts is None:
                    continue
                key, ext = parts[1], "." + parts[2].lower()
                if key != before:
                    rows.append([key, -1, 0, -1, 0])
                    before = key
                if ext.endswith(PICTURES) and rows[-1][1] < 0:
                    rows[-1][1:3] = member.offset, member.size
                elif ext.endswith(".json") and rows[-1][3] < 0:
                    rows[-1][3:] = member.offset, member.size
        except TarError as error:
            reason = str(error).splitlines()[0].rstrip(":")  # the rest tells of compressions that were tried
            raise ConfigError(f"{reason}; the file ends at byte {opened.seek(0, os.SEEK_END):,}") from None
    columns = list(zip(*(row for row in rows if row[1] >= 0), strict=True)) or [()] * 5
    names = ("key", "offsets", "sizes", "side_offsets", "side_sizes")
    kinds = (pa.string(), *[pa.int64()] * 4)
    return pa.table({name: pa.array(values, kind) for name, values, kind in zip(names, columns, kinds, strict=True)})
