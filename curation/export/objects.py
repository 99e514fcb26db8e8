"""Stored objects and the columns that name them: which nothing names, and tars and parts that are written again."""

from __future__ import annotations

import tarfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from curation.lease import LeaseLostError
from curation.schema import TABLES, Part
from curation.store import Store, read_footer, read_part, write_part
from training.data.tars import TarWriter

_HEADER_BYTES = 512  # of a ustar member, before its first byte


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder of tars, and the columns of a table that say which bytes of them belong to a row."""

    folder: str
    table: str
    object: str
    offset: str
    size: str


BYTES = Place(folder="bytes", table="images", object="object", offset="offset", size="num_bytes")
BLURRED = Place(
    folder="blurred", table="detections", object="blurred_object", offset="blurred_offset", size="blurred_bytes"
)
SMALL = Place(folder="small", table="detections", object="small_object", offset="small_offset", size="small_bytes")
TARS = Place(folder="tars", table="manifest", object="tar", offset="offset", size="size")
OF_POOL = (BYTES, BLURRED, SMALL)


def parts_of(store: Store, table: str) -> list[Part]:
    """All parts of a table in a root, whatever model's folder they lie in, by path."""
    found = []
    for path in store.list(table):
        if path.endswith(".parquet"):
            folder, _, file = path.rpartition("/")
            found.append(Part(TABLES[table].root, folder, int(file[5:14])))
    return found


def unnamed_objects(store: Store, place: Place) -> list[str]:
    """Objects of a folder that no part of its table names."""
    named: set[str | None] = set()
    for part in parts_of(store, place.table):
        named.update(read_part(store, part, [place.object])[place.object].unique().to_pylist())
    return [path for path in store.list(place.folder) if path not in named]


def rewritten(store: Store, place: Place, table: pa.Table, dropped: pa.Array, *, shard: int, scratch: Path) -> pa.Table:
    """Write the tars that hold dropped rows again without them, beside the old ones.

    Args:
        store: where the tars lie.
        place: which columns of ``table`` name them.
        table: a part of ``place.table``; all rows that name one of its tars are in it.
        dropped: bool [N], rows whose bytes go.
        shard: for the names of the new tars.
        scratch: an empty folder on this disk.

    Returns:
        The table, its kept rows naming the new tars; what dropped rows name is left to the caller.
    """
    paths, offsets = table[place.object].to_pylist(), table[place.offset].to_pylist()
    sizes, gone = table[place.size].to_pylist(), dropped.to_pylist()
    for old in sorted({path for path, goes in zip(paths, gone, strict=True) if goes and path is not None}):
        rows = [row for row, path in enumerate(paths) if path == old and not gone[row]]
        if not rows:
            continue
        file = scratch / f"{uuid.uuid4().hex}.tar"
        writer = TarWriter(file)
        for row in sorted(rows, key=lambda row: offsets[row]):
            member = store.read_range(old, offsets[row] - _HEADER_BYTES, _HEADER_BYTES + sizes[row])
            name = tarfile.TarInfo.frombuf(member[:_HEADER_BYTES], "utf-8", "strict").name
            offsets[row] = writer.add(name, member[_HEADER_BYTES:])
        writer.close()
        new = f"{place.folder}/{shard:09d}-{writer.sha256[:16]}.tar"
        store.create_named(new, file)
        for row in rows:
            paths[row] = new
    for name, values in ((place.object, paths), (place.offset, offsets)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    return table


def swap(store: Store, part: Part, table: pa.Table, scratch: Path, **note: str) -> None:
    """Replace a part by a mended one of the same origin, which so stays done.

    Args:
        store: where it lies.
        part: that is there.
        table: of its schema.
        scratch: a folder on this disk.
        note: added to what the part says of its origin: the rule that it was mended by.

    Raises:
        LeaseLostError: somebody else replaced it meanwhile.
    """
    footer, tag = read_footer(store, part), store.tag(part.path)
    assert footer is not None
    path = scratch / "mended.parquet"
    write_part(
        table,
        path,
        stage=footer.stage,
        version=footer.version,
        fingerprint=footer.fingerprint,
        inputs={**footer.inputs, **note},
    )
    if not store.replace(part.path, path, tag):
        raise LeaseLostError(f"{store.location}/{part.path} changed meanwhile; another driver works on the pool")


def any_of(*masks: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Rows that one of the masks names, bool [N]; a null names none."""
    found = pc.fill_null(masks[0], False)
    for mask in masks[1:]:
        found = pc.or_(found, pc.fill_null(mask, False))
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
