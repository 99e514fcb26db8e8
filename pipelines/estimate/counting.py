"""How many rows a source has: told by the pool, counted, or told from a sample; nothing is read to its end.

A list of a billion lines takes no longer than one of a thousand: of text the size and the mean line of a sample, of
parquet its metadata, of folders and tars what can be listed in a moment.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from curation.ingest.lists import list_suffix
from curation.ingest.packed import COMPRESSIONS
from curation.ingest.pictures import is_picture
from curation.ingest.rows import open_parquet
from curation.ingest.sources import SourceConfig, source_files
from training.config import ConfigError
from training.data.files import File, walk
from training.data.tars import DAMAGE, headers

_SAMPLE_BYTES = 1 << 20  # of a file, as it is stored
_UNPACKED_BYTES = 64 << 20  # of a sample that is packed: what it may unpack to
_SAMPLE_FILES = 5  # spread over a source of many
_METADATA_FILES = 64  # of parquet: read one by one up to so many
_LIST_S = 0.3  # for which a folder, or the tars of a source, are listed
_FIRST_ENTRY_S = 1.0  # the first entry of a folder, so that the others can be told by it
_PIECE_BYTES = 1 << 16
_HOST_PIECES = 32  # of a file, whose hosts are looked at
_HOST = re.compile(rb"""https?://([^\s/"',:?#\\]+)""", re.IGNORECASE)
_SIZED_FILES = 1000  # of a folder: pictures whose sizes are looked up


@dataclass(frozen=True, kw_only=True)
class Count:
    """Rows of a source.

    Attributes:
        rows: how many.
        picture_bytes: of one picture in the mean; None of addresses, and where it is not known.
        is_exact: false: told from a sample.
        busiest: share of the addresses that one host has, as in a sample; 0 where nobody looked.
        source: how it is known, in words.
    """

    rows: int
    picture_bytes: float | None = None
    is_exact: bool = True
    busiest: float = 0.0
    source: str


def count_source(key: str, config: SourceConfig) -> Count:
    """Rows of a source.

    Args:
        key: of the recipe, such as ``sources.crawl``, for messages.
        config: of the source.

    Raises:
        ConfigError: it is not there, or lies in a bucket, and the recipe does not say how many rows it will have.
    """
    try:
        files = _files(config)
    except ConfigError as error:
        if config.expected_rows is None:
            raise ConfigError(f"{key}.{error}; or say how many rows it will have: {key}.expected_rows=N") from None
        return Count(rows=config.expected_rows, is_exact=False, source="expected_rows of the recipe, not looked into")
    try:
        return _count(config, files)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from None


def _files(config: SourceConfig) -> list[File]:
    """Files of a source; of a folder none, which is listed later, and not to its end.

    Raises:
        ConfigError: nothing is there, it lies in a bucket, or is to be crawled.
    """
    if config.kind == "pages":
        raise ConfigError(f"location: {config.location!r} is to be crawled, and an estimate asks no network")
    if config.location.startswith("s3://"):
        raise ConfigError(f"location: {config.location!r} lies in a bucket, and an estimate asks no network")
    if config.kind == "folder" and Path(config.location).is_dir():
        return []
    return source_files(config)


def _count(config: SourceConfig, files: Sequence[File]) -> Count:
    if config.kind == "folder":
        return _count_folder(config)
    if config.kind == "parquet" or all(list_suffix(file.path) == ".parquet" for file in files):
        return _count_parquet(files, is_pictures=config.kind == "parquet")
    if config.kind == "list":
        return replace(_scaled(files, _lines_of, "size and mean line"), busiest=_busiest(files))
    if config.kind == "tar":
        return _count_tars(files)
    return _scaled(files, _rows_of_archive, "size and pictures a MB")


def count_crawl(config: SourceConfig) -> Count:
    """Pages that a crawl visits at most, and the share that one host has of the pages it begins with.

    Args:
        config: of a source of kind pages.
    """
    try:
        seeds = count_source("location", config.model_copy(update={"kind": "list"}))
    except ConfigError:  # one page, or a list that is not there
        seeds = Count(rows=1, busiest=1.0, source="")
    rows = min(config.max_pages, seeds.rows) if config.depth == 0 else config.max_pages
    of_host = max(config.max_pages_per_host, seeds.busiest * seeds.rows)
    return Count(rows=rows, busiest=min(seeds.busiest, of_host / rows), is_exact=False, source="max_pages")


# By size


def _spread(files: Sequence[File], most: int) -> list[File]:
    """At most so many of the files, evenly over them all."""
    step = max(1.0, len(files) / most)
    return [files[int(n * step)] for n in range(min(len(files), most))]


def _scaled(files: Sequence[File], rows_of: Callable[[str], _Seen], how: str) -> Count:
    """Rows of all files, as those of the first bytes of a few; exact where these were all the bytes there are."""
    found = [rows_of(file.path) for file in _spread(files, _SAMPLE_FILES)]
    rows, seen = sum(one.rows for one in found), sum(one.num_bytes for one in found)
    total = sum(file.num_bytes for file in files)
    if seen >= total:
        return Count(rows=rows, source="counted")
    return Count(rows=round(rows * total / max(seen, 1)), is_exact=False, source=f"about: {how} of a sample")


def _busiest(files: Sequence[File]) -> float:
    """Share of the host that has most addresses of text lists; pieces from all over them, as lists may be sorted.

    0 where a list is packed: only its beginning could be looked at.
    """
    hosts: Counter[bytes] = Counter()
    for one in _spread(files, _SAMPLE_FILES):
        if one.path.lower().endswith(COMPRESSIONS):
            return 0.0
        with Path(one.path).open("rb") as file:
            step = max(_PIECE_BYTES, one.num_bytes // _HOST_PIECES)
            for start in range(0, one.num_bytes, step):
                file.seek(start)
                hosts.update(match.lower() for match in _HOST.findall(file.read(_PIECE_BYTES)))
    return max(hosts.values()) / hosts.total() if hosts else 0.0


class _Seen(NamedTuple):
    """Rows in the first bytes of a file, and how many bytes these are as they are stored."""

    rows: int
    num_bytes: int


def _lines_of(path: str) -> _Seen:
    """Rows of a text list: its lines, without that of the header; elements of a JSON array by their braces."""
    with Path(path).open("rb") as file:
        stored = file.read(_SAMPLE_BYTES)
    text, num_bytes = _unpacked(path, stored)
    suffix = list_suffix(path)
    if suffix == ".json":
        return _Seen(text.count(b"{") or text.count(b'"') // 2, num_bytes)
    num_lines = text.count(b"\n")
    if num_bytes == len(stored) < _SAMPLE_BYTES and text and not text.endswith(b"\n"):
        num_lines += 1
    return _Seen(max(0, num_lines - (suffix in (".csv", ".tsv"))), num_bytes)


def _unpacked(path: str, stored: bytes) -> tuple[bytes, int]:
    """What the first bytes of a file hold, and how many of them hold it; of a packed one as much of it as they give."""
    name = path.lower()
    if not name.endswith((".gz", ".zst")):
        return stored, len(stored)
    pieces: list[bytes] = []
    left = _UNPACKED_BYTES
    if name.endswith(".zst"):
        import pyarrow as pa

        source = pa.BufferReader(stored)
        with contextlib.suppress(OSError), pa.CompressedInputStream(source, "zstd") as stream:
            while left > 0 and (piece := stream.read(min(left, _PIECE_BYTES))):
                pieces.append(piece)
                left -= len(piece)
            return b"".join(pieces), len(stored) if left > 0 else min(source.tell(), len(stored) - 1)
        return b"".join(pieces), len(stored)
    rest = stored
    with contextlib.suppress(zlib.error):
        while rest and left > 0:  # one member after the other
            unpack = zlib.decompressobj(zlib.MAX_WBITS | 16)
            pieces.append(unpack.decompress(rest, left))
            left -= len(pieces[-1])
            rest = unpack.unused_data or unpack.unconsumed_tail
    return b"".join(pieces), len(stored) if left > 0 else len(stored) - max(1, len(rest))


def _rows_of_archive(path: str) -> _Seen:
    """Pictures of the pages in the first bytes of a web archive."""
    from curation.ingest.archives import read_pages

    with Path(path).open("rb") as file:
        stored = file.read(_SAMPLE_BYTES)
    pages = (page for _, page in read_pages(io.BytesIO(stored)))
    return _Seen(sum(row.error is None for page in pages for row in page.images), len(stored))


# Parquet


def _count_parquet(files: Sequence[File], *, is_pictures: bool) -> Count:
    is_packed = any(file.path.lower().endswith(COMPRESSIONS) for file in files)
    sample = _spread(files, 1 if is_packed else _METADATA_FILES)  # a packed one has to be unpacked as a whole
    rows = sum(_rows_of_parquet(file.path) for file in sample)
    seen, total = (sum(file.num_bytes for file in some) for some in (sample, files))
    picture_bytes = seen / rows if is_pictures and rows else None
    if len(sample) == len(files):
        return Count(rows=rows, picture_bytes=picture_bytes, source="parquet metadata")
    how = f"about: parquet metadata of {len(sample)} of {len(files):,} files"
    return Count(rows=round(rows * total / seen), picture_bytes=picture_bytes, is_exact=False, source=how)


def _rows_of_parquet(path: str) -> int:
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


# Folders and tars


def _count_folder(config: SourceConfig) -> Count:
    """Pictures below a folder; where time runs out, as many in each of its entries as in those that were listed."""
    _, folders, names = next(walk(config.location), ("", [], []))
    entries = sorted([*folders, *names])
    sizes: list[int] = []
    rows = whole = listed = 0  # pictures; those of entries that were listed whole; such entries
    began = time.monotonic()
    for entry in entries:
        for path in _pictures_below(config.location, entry):
            if path is not None:
                rows += 1
                if len(sizes) < _SIZED_FILES:
                    sizes.append(os.stat(path).st_size)
            if time.monotonic() - began > (_LIST_S if listed else _FIRST_ENTRY_S):
                break
        else:
            listed, whole = listed + 1, rows
            continue
        break
    if not rows and listed == len(entries):
        source_files(config)  # says what is wrong
    picture_bytes = sum(sizes) / len(sizes) if sizes else None
    if listed == len(entries):
        return Count(rows=rows, picture_bytes=picture_bytes, source="listed")
    if not whole:
        return Count(
            rows=rows, picture_bytes=picture_bytes, is_exact=False, source="at least: listed until time ran out"
        )
    how = f"about: {listed:,} of {len(entries):,} entries listed"
    return Count(rows=round(whole * len(entries) / listed), picture_bytes=picture_bytes, is_exact=False, source=how)


def _pictures_below(location: str, entry: str) -> Iterator[str | None]:
    """Pictures of an entry of a folder; None behind those of each folder, so that the clock is looked at."""
    path = os.path.join(location, entry)
    if not os.path.isdir(path):
        if is_picture(entry):
            yield path
        return
    for top, _, names in walk(path, above=location):
        yield from (os.path.join(top, name) for name in names if is_picture(name))
        yield None


def _count_tars(files: Sequence[File]) -> Count:
    """Pictures of tars: members of some of them, as far as they can be gone through in a moment."""
    sample = _spread(files, _SAMPLE_FILES)
    found = [_members_of(file, _LIST_S / len(sample)) for file in sample]
    rows, picture_bytes, seen = (sum(column) for column in zip(*found, strict=True))
    total = sum(file.num_bytes for file in files)
    mean = picture_bytes / rows if rows else None
    if seen >= total:
        return Count(rows=rows, picture_bytes=mean, source="listed")
    how = "about: size and members of a sample"
    return Count(rows=round(rows * total / max(seen, 1)), picture_bytes=mean, is_exact=False, source=how)


def _members_of(tar_file: File, most_s: float) -> tuple[int, int, int]:
    """Pictures of a tar, their bytes, and the bytes of the file that they were found in."""
    rows = num_bytes = 0
    ends = time.monotonic() + most_s
    try:
        with Path(tar_file.path).open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            for info in headers(tar):
                if info.isfile() and is_picture(info.name):
                    rows, num_bytes = rows + 1, num_bytes + info.size
                if time.monotonic() > ends:
                    return rows, num_bytes, max(1, file.tell())
    except DAMAGE as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"location: {tar_file.path!r} is no tar: {why}") from None
    return rows, num_bytes, tar_file.num_bytes
