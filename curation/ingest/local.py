"""Pictures of folders, tars and parquet files, read by the place that registration gave them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from curation.ingest.sources import glob_base, several_files


def read_local(kind: str, location: str, places: Sequence[str]) -> Iterator[bytes | None]:
    """Bytes of each place inside a source, in the order given; None for what is not there any more.

    Places are those of ``SourceRow.location``. An archive is passed through twice, however many of its members are
    asked for, so they are best asked for in stored order.
    """
    if kind == "folder":
        for place in places:
            yield _read_file(Path(location) / place)
        return
    several = several_files(location)
    begin = 0
    while begin < len(places):  # a run of places in the same file
        name = places[begin].partition("::")[0] if several else ""
        end = begin + 1
        while end < len(places) and (not several or places[end].partition("::")[0] == name):
            end += 1
        path = glob_base(location) / name if several else Path(location)
        inside = [place.partition("::")[2] if several else place for place in places[begin:end]]
        yield from (_read_tar if kind == "tar" else _read_parquet)(path, inside)
        begin = end


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _read_tar(path: Path, names: Sequence[str]) -> Iterator[bytes | None]:
    wanted = set(names)
    there: dict[str, tarfile.TarInfo] = {}
    try:
        tar = tarfile.open(path, "r:*")  # noqa: SIM115 - closed below
    except (tarfile.TarError, EOFError, OSError):
        yield from (None for _ in names)
        return
    with tar:
        try:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header that it ever saw
                if info.isfile() and info.name in wanted:
                    there.setdefault(info.name, info)  # the first of a name: registration takes no other
        except (tarfile.TarError, EOFError, OSError):
            pass  # what stands before the damage is there
        for name in names:
            found = there.get(name)
            yield None if found is None else _extract(tar, found)


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | None:
    try:
        file = tar.extractfile(info)
        data = None if file is None else file.read()
    except (tarfile.TarError, EOFError, OSError):
        return None
    return data if data is not None and len(data) == info.size else None


def _read_parquet(path: Path, places: Sequence[str]) -> Iterator[bytes | None]:
    """Places are COLUMN/ROW. One row group's column is held at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError):
        yield from (None for _ in places)
        return
    with file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        held: tuple[str, int] | None = None
        values: Any = None
        for place in places:
            column, _, number = place.rpartition("/")
            row, group = int(number), 0
            while group < len(counts) and row >= counts[group]:
                row -= counts[group]
                group += 1
            if group == len(counts) or column not in file.schema_arrow.names:
                yield None
                continue
            if held != (column, group):
                values, held = file.read_row_group(group, columns=[column])[column], (column, group)
            value = values[row].as_py()
            yield value.get("bytes") if isinstance(value, dict) else value
