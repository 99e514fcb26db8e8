"""The only door to disk and object store: objects and parquet parts.

A root (pool or run) is a folder or an ``s3://bucket/prefix``. Whatever is written is written beside and whole, then put
in place in one step: created only if absent (a hard link; a conditional put), or swapped for the version that was read
(a rename under the lease; a put that names the tag). So nothing half-written has a name that is ever read.

A parquet part is the commit of a task. Its footer holds where it came from (``Footer``). The content digest is the
sha256 of the encoded columns, the schema and the number of rows, so that it is the same whatever produced the rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.schema import Part
from training.config import ConfigError

_BESIDE = ".beside"  # folder for what is being written; emptied by the next driver
_ROW_GROUP_BYTES = 64 << 20  # in memory; a group holds fewer rows where they are long


class Store(Protocol):
    """Objects under one root."""

    location: str

    def exists(self, path: str) -> bool:
        """Whether an object is there."""

    def size(self, path: str) -> int:
        """Bytes of an object."""

    def read(self, path: str) -> bytes:
        """The whole object; FileNotFoundError where there is none."""

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``."""

    def tag(self, path: str) -> str | None:
        """What changes whenever the object does; None where there is none."""

    def modified(self, path: str) -> datetime:
        """When an object was written, in UTC."""

    def create(self, path: str, source: Path) -> bool:
        """Store a file under a name that nothing has; False when something has it."""

    def create_named(self, path: str, source: Path) -> None:
        """Store a file, however large, under a name that holds its digest: one that is there already is this one."""

    def replace(self, path: str, source: Path, tag: str | None) -> bool:
        """Swap the object for a file, if it is still the one with this tag; False when it is not."""

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def list(self, folder: str) -> Iterator[str]:
        """Paths of all objects below a folder, sorted."""

    def sweep(self) -> None:
        """Remove what a killed writer left beside."""


_PUT_BYTES = 16 << 20  # of a part; ten thousand of them are the largest object
_PUTS_AT_ONCE = 2


class LocalStore:
    """A root in a folder."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.path = Path(location)

    def exists(self, path: str) -> bool:  # noqa: D102 - see Store
        return (self.path / path).exists()

    def size(self, path: str) -> int:  # noqa: D102
        return (self.path / path).stat().st_size

    def read(self, path: str) -> bytes:  # noqa: D102
        return (self.path / path).read_bytes()

    def read_range(self, path: str, offset: int, size: int) -> bytes:  # noqa: D102
        with (self.path / path).open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def tag(self, path: str) -> str | None:  # noqa: D102
        try:
            stat = (self.path / path).stat()
        except FileNotFoundError:
            return None
        return f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"

    def modified(self, path: str) -> datetime:  # noqa: D102
        return datetime.fromtimestamp((self.path / path).stat().st_mtime, UTC)

    def create(self, path: str, source: Path) -> bool:  # noqa: D102
        beside, target = self._beside(path, source)
        try:
            os.link(beside, target)
        except FileExistsError:
            return False
        finally:
            beside.unlink()
        _sync_folder(target.parent)
        return True

    def create_named(self, path: str, source: Path) -> None:  # noqa: D102
        self.create(path, source)

    def replace(self, path: str, source: Path, tag: str | None) -> bool:  # noqa: D102
        beside, target = self._beside(path, source)
        if self.tag(path) != tag:
            beside.unlink()
            return False
        beside.replace(target)
        _sync_folder(target.parent)
        return True

    def delete(self, path: str) -> None:  # noqa: D102
        (self.path / path).unlink(missing_ok=True)

    def list(self, folder: str) -> Iterator[str]:  # noqa: D102
        root = self.path / folder
        yield from sorted(str(p.relative_to(self.path)) for p in root.rglob("*") if p.is_file())

    def sweep(self) -> None:  # noqa: D102
        for path in (self.path / _BESIDE).glob("*"):
            path.unlink(missing_ok=True)

    def _beside(self, path: str, source: Path) -> tuple[Path, Path]:
        """A synced copy of ``source`` on the disk of the root, and the place where it goes."""
        target = self.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path / _BESIDE / uuid.uuid4().hex
        beside.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.rename(beside)
        except OSError:  # another disk
            with source.open("rb") as read, beside.open("wb") as write:
                while block := read.read(1 << 22):
                    write.write(block)
            source.unlink()
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        return beside, target


class S3Store:
    """A root in a bucket. Credentials, region and endpoint come from the usual ``AWS_*`` variables."""

    def __init__(self, location: str) -> None:
        from obstore.store import S3Store as Client

        self.location = location
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        config = {"allow_http": "true"} if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") else {}
        self._client = Client(bucket, prefix=prefix or None, config=config)

    def exists(self, path: str) -> bool:  # noqa: D102
        return self.tag(path) is not None

    def size(self, path: str) -> int:  # noqa: D102
        import obstore

        return int(obstore.head(self._client, path)["size"])

    def read(self, path: str) -> bytes:  # noqa: D102
        import obstore

        return bytes(obstore.get(self._client, path).bytes())

    def read_range(self, path: str, offset: int, size: int) -> bytes:  # noqa: D102
        import obstore

        return bytes(obstore.get_range(self._client, path, start=offset, length=size)) if size else b""

    def tag(self, path: str) -> str | None:  # noqa: D102
        import obstore

        try:
            return str(obstore.head(self._client, path)["e_tag"])
        except FileNotFoundError:
            return None

    def modified(self, path: str) -> datetime:  # noqa: D102
        import obstore

        written: datetime = obstore.head(self._client, path)["last_modified"]
        return written.astimezone(UTC)

    def create(self, path: str, source: Path) -> bool:  # noqa: D102
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            obstore.put(self._client, path, source, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        finally:
            source.unlink(missing_ok=True)
        return True

    def create_named(self, path: str, source: Path) -> None:  # noqa: D102
        import obstore

        if source.stat().st_size <= _PUT_BYTES:
            self.create(path, source)
            return
        # One put would hold the file in memory, and ends at 5 GB. In parts nothing can be asked to be absent, and
        # nothing has to be: whoever writes this name writes these bytes.
        try:
            if not self.exists(path):
                obstore.put(
                    self._client, path, source, use_multipart=True, chunk_size=_PUT_BYTES, max_concurrency=_PUTS_AT_ONCE
                )
        finally:
            source.unlink(missing_ok=True)

    def replace(self, path: str, source: Path, tag: str | None) -> bool:  # noqa: D102
        import obstore
        from obstore.exceptions import PreconditionError

        if tag is None:
            return self.create(path, source)
        try:
            obstore.put(self._client, path, source, mode={"e_tag": tag}, use_multipart=False)
        except PreconditionError:
            return False
        finally:
            source.unlink(missing_ok=True)
        return True

    def delete(self, path: str) -> None:  # noqa: D102
        import obstore

        try:
            obstore.delete(self._client, path)
        except FileNotFoundError:
            return

    def list(self, folder: str) -> Iterator[str]:  # noqa: D102
        import obstore

        paths = [str(item["path"]) for batch in obstore.list(self._client, folder) for item in batch]
        yield from sorted(paths)

    def sweep(self) -> None:
        """Nothing lies beside: an unfinished put has no name."""


def open_store(location: str) -> Store:
    """The store of a root: ``s3://bucket/prefix`` or a folder."""
    if location.startswith("s3://"):
        return S3Store(location)
    if "://" in location:
        scheme = location.partition("://")[0]
        raise ConfigError(f"root {location!r}: scheme {scheme!r} is not known; give a folder or s3://bucket/prefix")
    return LocalStore(location)


def put_text(store: Store, path: str, text: str, scratch: Path) -> None:
    """Put a text in place in one step; one that is there already stays as it is."""
    if store.exists(path) and store.read(path) == text.encode():
        return
    file = scratch / "put"
    file.write_text(text, encoding="utf-8")
    store.replace(path, file, store.tag(path))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Parts


@dataclass(frozen=True, kw_only=True)
class Footer:
    """Where a part came from: who wrote it, from what, and a digest of what it holds."""

    stage: str
    version: int
    digest: str
    fingerprint: str
    inputs: dict[str, Any]  # what the fingerprint was made of, so that a change can be named
    num_rows: int


def write_part(
    table: pa.Table,
    path: Path,
    *,
    stage: str,
    version: int,
    fingerprint: str,
    inputs: dict[str, Any],
    row_group_rows: int = 65_536,
) -> Footer:
    """Write one part as a local file: the same bytes for the same rows and the same origin."""
    # A table that was read from a part carries that part's origin along; what it holds is the same without.
    table = table.combine_chunks().replace_schema_metadata(None)
    with pa.OSFile(str(path), "wb") as sink, pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        fitting = _ROW_GROUP_BYTES * table.num_rows // max(1, table.nbytes)
        writer.write_table(table, row_group_size=max(1, min(row_group_rows, fitting)) if table.num_rows else None)
        digest = hashlib.sha256(f"{table.schema.to_string(show_field_metadata=False)}\n{table.num_rows}\n".encode())
        num_bytes = sink.tell()
        with path.open("rb") as file:
            while num_bytes > 0 and (block := file.read(min(1 << 22, num_bytes))):
                digest.update(block)
                num_bytes -= len(block)
        footer = Footer(
            stage=stage,
            version=version,
            digest=digest.hexdigest(),
            fingerprint=fingerprint,
            inputs=inputs,
            num_rows=table.num_rows,
        )
        writer.add_key_value_metadata(
            {
                "lvd.stage": stage,
                "lvd.version": str(version),
                "lvd.digest": footer.digest,
                "lvd.fingerprint": fingerprint,
                "lvd.inputs": json.dumps(inputs, sort_keys=True),
            }
        )
    return footer


def read_footer(store: Store, part: Part) -> Footer | None:
    """The footer of a part; None where there is no part."""
    if not store.exists(part.path):
        return None
    try:
        metadata = pq.read_metadata(_ranged_source(store, part))
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{store.location}/{part.path} is damaged ({error}); remove it, it is made again") from None
    values = {key.decode(): value.decode() for key, value in (metadata.metadata or {}).items()}
    if "lvd.digest" not in values:
        raise ConfigError(f"{store.location}/{part.path}: not written by lvd; move it away or choose another folder")
    return Footer(
        stage=values["lvd.stage"],
        version=int(values["lvd.version"]),
        digest=values["lvd.digest"],
        fingerprint=values["lvd.fingerprint"],
        inputs=json.loads(values["lvd.inputs"]),
        num_rows=metadata.num_rows,
    )


Within = tuple[str, int, int]  # column, first value, value behind the last


def read_part(
    store: Store, part: Part, columns: Sequence[str] | None = None, *, within: Within | None = None
) -> pa.Table:
    """Rows of a part, in stored order; FileNotFoundError where there is none.

    Args:
        store: of the part's root.
        part: to be read.
        columns: all of them by default.
        within: only rows whose value of a column without nulls is in a range. Row groups that hold none of them are not
            read, so that a small range of a part that is sorted by the column costs little, however long the part.
    """
    if within is None and columns is None:
        return pq.ParquetFile(_whole_source(store, part)).read()
    if within is None:
        assert columns is not None
        return pq.ParquetFile(_ranged_source(store, part)).read(columns=list(columns)).select(columns)
    name, first, end = within
    wanted = None if columns is None else [*columns, *({name} - set(columns))]
    with pq.ParquetFile(_ranged_source(store, part)) as file:
        at = file.schema_arrow.get_field_index(name)
        groups = [n for n in range(file.num_row_groups) if _may_hold(file.metadata.row_group(n).column(at), first, end)]
        table = file.read_row_groups(groups, columns=wanted)
    table = rows_within(table, within)
    return table if columns is None else table.select(list(columns))


def rows_within(table: pa.Table, within: Within | None) -> pa.Table:
    """The rows of a table that lie in a range; all of them where there is none."""
    if within is None:
        return table
    name, first, end = within
    return table.filter(pc.and_(pc.greater_equal(table[name], first), pc.less(table[name], end)))


def _may_hold(column: Any, first: int, end: int) -> bool:
    """Whether a column chunk may hold a value of a range."""
    told = column.statistics
    return told is None or not told.has_min_max or (told.max >= first and told.min < end)


def _ranged_source(store: Store, part: Part) -> Any:
    """A part of which only some bytes will be read."""
    return store.path / part.path if isinstance(store, LocalStore) else pa.PythonFile(_RangeFile(store, part.path))


class _RangeFile(io.RawIOBase):
    """An object as a file: each read asks the store for its range and no more."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        self._store, self._path, self._size, self._at = store, path, store.size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._store.read_range(self._path, self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def _whole_source(store: Store, part: Part) -> Any:
    if isinstance(store, LocalStore):
        return store.path / part.path
    return pa.BufferReader(store.read(part.path))
