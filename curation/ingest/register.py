"""Registration: every source gets its run of shards once, and keeps it. Ids follow from position in the source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curation.ingest.address import AddressError, parse_address
from curation.ingest.rows import SourceLine, SourceRow, short_row
from curation.ingest.sources import SourceConfig, check_source, read_lines, stamp
from curation.schema import SHARDS_PER_SOURCE_LIMIT, TABLES, Role, first_shard, image_ids
from training.config import ConfigError

SECTION_OF_ROLE = {"pool": "sources", "query": "queries", "benchmark": "benchmarks"}
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode
Write = Callable[[int, pa.Table], None]
Crawled = Callable[[str], Iterator[SourceLine]]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What the pool holds of a source already."""

    source_id: int
    num_rows: int = 0
    digest: str = hashlib.sha256().hexdigest()


def register(
    named: Sequence[tuple[str, Role, SourceConfig]],
    previous: pa.Table | None,
    *,
    shard_rows: int,
    write: Write,
    crawled: Crawled | None = None,
    stamps: dict[str, str],
) -> pa.Table:
    """Scan all sources and hand the shards that are new or have grown to ``write``; returns the new table ``sources``.

    A source keeps the number that it was given first, also when the recipe no longer names it. It may grow at its end:
    its first rows are held against the digest that they had. One shard is held in memory at a time.

    A source whose files are as they were when it was last read is not read again: ``stamps`` says by name what was
    read, and is kept up. ``crawled`` gives the rows of a source of kind pages: what its crawl found until now.

    Raises:
        ConfigError: a source changed instead of being extended, plays another role, or the pool has other shards.
    """
    rows = {} if previous is None else {row["name"]: row for row in previous.to_pylist()}
    for row in rows.values():
        if row["shard_rows"] != shard_rows:
            raise ConfigError(
                f"shard_rows: {shard_rows:,}, but this pool was made with {row['shard_rows']:,}; "
                "set it back, or name a new pool"
            )
    for name, role, config in named:
        check_source(f"{SECTION_OF_ROLE[role]}.{name}", config)
        old = rows.get(name)
        if old is not None and old["role"] != role:
            raise ConfigError(
                f"{SECTION_OF_ROLE[role]}.{name}: the pool knows {name!r} as one of its "
                f"{SECTION_OF_ROLE[old['role']]}; use a new name or a new pool"
            )
    for name, role, config in named:
        known = _known(rows.get(name), number=len(rows))
        try:
            files = stamp(config)  # as they are before they are read: what changes meanwhile is read again
            if files is not None and name in rows and stamps.get(name) == f"{known.digest} {files}":
                continue
            lines = crawled(name) if crawled is not None and config.kind == "pages" else read_lines(config)
            rows[name] = _scan((name, role, config), lines, known=known, shard_rows=shard_rows, write=write)
            stamps.pop(name, None)
            if files is not None:
                stamps[name] = f"{rows[name]['digest']} {files}"
        except ConfigError as error:
            raise ConfigError(f"{SECTION_OF_ROLE[role]}.{name}: {error}") from None
    ordered = sorted(rows.values(), key=lambda row: int(row["source_id"]))
    return pa.Table.from_pylist(ordered, schema=TABLES["sources"].schema)


def _known(row: dict[str, Any] | None, *, number: int) -> _Known:
    if row is None:
        return _Known(source_id=number)
    return _Known(source_id=row["source_id"], num_rows=row["num_rows"], digest=row["digest"])


def _scan(
    named: tuple[str, Role, SourceConfig],
    source: Iterator[SourceLine],
    *,
    known: _Known,
    shard_rows: int,
    write: Write,
) -> dict[str, Any]:
    """Read a source once: check what is known of it, write what is new, and return its row of ``sources``."""
    name, role, config = named
    digest = hashlib.sha256()
    num_rows = num_shards = 0

    def short_lines() -> Iterator[SourceLine]:
        for place, line in enumerate(source):
            if place == known.num_rows:
                _check_same(name, digest.hexdigest(), known)
            digest.update(_ENCODE(line.row).encode() + b"\n")  # as it was read: how much is kept of it may change
            yield line._replace(row=short_row(line.row))

    for lines in _shards(short_lines(), shard_rows):
        if num_shards == SHARDS_PER_SOURCE_LIMIT:
            raise ConfigError(f"more than {SHARDS_PER_SOURCE_LIMIT:,} shards; raise shard_rows in a new pool")
        shard = first_shard(known.source_id) + num_shards
        num_shards += 1
        if num_rows + len(lines) > known.num_rows:
            write(shard, _urls(name, lines, shard=shard, first_line=num_rows))
        num_rows += len(lines)
    if num_rows < known.num_rows:
        raise _changed(name, f"it has {num_rows:,} rows and had {known.num_rows:,}")
    if num_rows == known.num_rows:
        _check_same(name, digest.hexdigest(), known)
    return {
        "source_id": known.source_id,
        "name": name,
        "role": role,
        "kind": config.kind,
        "location": config.location,
        "digest": digest.hexdigest(),
        "num_rows": num_rows,
        "shard_rows": shard_rows,
        "num_shards": num_shards,
    }


def _check_same(name: str, digest: str, known: _Known) -> None:
    if digest != known.digest:
        raise _changed(name, f"its first {known.num_rows:,} rows are not those that were registered")


def _changed(name: str, how: str) -> ConfigError:
    return ConfigError(f"source {name!r} changed instead of being extended: {how}; use a new name or a new pool")


def _shards(source: Iterator[SourceLine], shard_rows: int) -> Iterator[list[SourceLine]]:
    lines: list[SourceLine] = []
    for line in source:
        lines.append(line)
        if len(lines) == shard_rows:
            yield lines
            lines = []
    if lines:
        yield lines


def _urls(name: str, lines: Sequence[SourceLine], *, shard: int, first_line: int) -> pa.Table:
    """One shard of the table ``urls``."""
    num_rows = len(lines)
    columns = {
        "image_id": image_ids(shard, num_rows),
        "source": [name] * num_rows,
        "line": range(first_line, first_line + num_rows),
        "file": [line.file for line in lines],
        "file_line": [line.file_line for line in lines],
        "url": [line.row.url for line in lines],
        "host": [_host(line.row) for line in lines],
        "location": [line.row.location for line in lines],
        "page_url": [line.row.page_url for line in lines],
        "alt_text": [line.row.alt_text for line in lines],
        "label": [line.row.label for line in lines],
        "error": [line.row.error for line in lines],
    }
    schema = TABLES["urls"].schema
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _host(row: SourceRow) -> str | None:
    if row.url is None or row.error is not None:
        return None
    try:
        return parse_address(row.url).host or None
    except AddressError:  # a local picture whose address is only a note
        return None
