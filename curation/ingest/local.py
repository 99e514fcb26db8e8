"""Pictures of folders, tars and parquet files, read by the place that registration gave them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal

from curation.ingest.sources import folder_of, several_files
from training.data.files import TooLargeError, open_file, raise_failure, read_file
from training.data.tars import DAMAGE, headers

TOO_LARGE: Literal["too_large"] = "too_large"
Read = bytes | Literal["too_large"] | None


def read_local(kind: str, location: str, places: Sequence[str], max_bytes: int | None = None) -> Iterator[Read]:
    """Bytes of each place inside a source, in the order given; None for what is not there any more.

    Places are those of ``SourceRow.location``. An archive is passed through twice, however many of its members are
    asked for, so they are best asked for in stored order. What has more than ``max_bytes`` is ``TOO_LARGE``: files and
    members of tars are not read then, however little they are stored in.

    Raises:
        OSError: a bucket does not answer.
    """
    folder = folder_of(location)
    if kind == "folder":
        for place in places:
            yield _read_file(folder + place, max_bytes)
        return
    several = several_files(location)
    begin = 0
    while begin < len(places):  # a run of places in the same file
        name = places[begin].partition("::")[0] if several else ""
        end = begin + 1
        while end < len(places) and (not several or places[end].partition("::")[0] == name):
            end += 1
        inside = [place.partition("::")[2] if several else place for place in places[begin:end]]
        yield from _read_archive(kind, folder + name if several else location, inside, max_bytes)
        begin = end


def _read_file(path: str, max_bytes: int | None) -> Read:
    try:
        return read_file(path, max_bytes)
    except TooLargeError:
        return TOO_LARGE
    except FileNotFoundError:
        return None
    except OSError:
        if path.startswith("s3://"):  # a disk has what it has; a bucket that does not answer is asked again
            raise
        return None


def _read_archive(kind: str, path: str, places: Sequence[str], max_bytes: int | None) -> Iterator[Read]:
    try:
        opened = open_file(path)
    except OSError as error:
        if path.startswith("s3://") and not isinstance(error, FileNotFoundError):
            raise
        yield from (None for _ in places)
        return
    with opened as file:
        for data in (_read_tar if kind == "tar" else _read_parquet)(file, places, max_bytes):
            if data is None:
                raise_failure(file)
            yield data


def _read_tar(file: BinaryIO, names: Sequence[str], max_bytes: int | None) -> Iterator[Read]:
    wanted = set(names)
    there: dict[str, tarfile.TarInfo] = {}
    try:
        tar = tarfile.open(fileobj=file, mode="r:*")  # noqa: SIM115 - closed below
    except DAMAGE:
        yield from (None for _ in names)
        return
    with tar:
        try:
            for info in headers(tar):
                if info.isfile() and info.name in wanted:
                    there.setdefault(info.name, info)  # the first of a name: registration takes no other
        except DAMAGE:
            pass  # what stands before the damage is there
        for name in names:
            found = there.get(name)
            yield None if found is None else _extract(tar, found, max_bytes)


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo, max_bytes: int | None) -> Read:
    if max_bytes is not None and info.size > max_bytes:
        return TOO_LARGE
    try:
        file = tar.extractfile(info)
        data = None if file is None else file.read()
    except DAMAGE:
        return None
    return data if data is not None and len(data) == info.size else None


def _read_parquet(file: BinaryIO, places: Sequence[str], max_bytes: int | None) -> Iterator[Read]:
    """Places are COLUMN/ROW. One row group's column is held at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError):
        yield from (None for _ in places)
        return
    counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
    held: tuple[str, int] | None = None
    values: Any = None
    for place in places:
        column, _, number = place.rpartition("/")
        row, group = int(number), 0
        while group < len(counts) and row >= counts[group]:
            row -= counts[group]
            group += 1
        if group == len(counts) or column not in parquet.schema_arrow.names:
            yield None
            continue
        if held != (column, group):
            held = (column, group)
            try:
                values = parquet.read_row_group(group, columns=[column])[column]
            except (pa.ArrowException, OSError):  # other groups may be whole
                values = None
        value = None if values is None else values[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        yield TOO_LARGE if max_bytes is not None and data is not None and len(data) > max_bytes else data
