"""Folders, tars and parquet files of pictures: which pictures are in them, without reading any."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from curation.ingest.lists import Lines
from curation.ingest.rows import NOT_UTF8, SourceLine, SourceRow, batch_values, is_utf8, open_parquet, utf8
from training.config import ConfigError
from training.data.files import File, open_file, raise_failure
from training.data.tars import Member, TarError, read_members

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"),
)
MANIFEST = "manifest.csv"
TWICE = "stands twice in the archive"
SIDECARS = ("json", "txt", "cls")
MAX_SIDECAR_BYTES = 16 << 20
_BATCH_ROWS = 4096
_BATCH_PICTURES = 16


def read_folder(files: Sequence[File]) -> Iterator[SourceLine]:
    """Pictures of a folder, by sorted relative path."""
    for file in files:
        if is_picture(file.name):
            row = _local_row(file.name, {}, file.num_bytes)
            yield SourceLine(str(row.location), None, row)


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture; names that begin with a dot are not."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def _local_row(name: str, texts: Mapping[str, str | None], num_bytes: int) -> SourceRow:
    if not is_utf8(name):
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return SourceRow(None, shown, None, None, None, NOT_UTF8, num_bytes)
    folders = PurePosixPath(name).parts[:-1]
    label = texts.get("label") or (folders[0] if folders else None)
    rest = (texts.get("page_url"), texts.get("alt_text"), label)
    return SourceRow(texts.get("url"), name, *rest, None, num_bytes)


# Tars


def read_tar(path: str, columns: Mapping[str, str]) -> Lines:
    """Pictures of a tar, in stored order. Of several members with one name only the first can be asked for.

    Members that follow one another and share a key, the name up to its first dot, belong together as webdataset has
    it: ``KEY.json`` gives what ``columns`` names, ``KEY.txt`` the alt text, ``KEY.cls`` the label.

    Raises:
        ConfigError: the tar is damaged.
    """
    seen: set[str] = set()
    with open_file(path) as file:
        try:
            labels = _manifest_labels(path, file)
            file.seek(0)
            found = enumerate(read_members(path, _is_sidecar, file), 1)
            for _, sample in itertools.groupby(found, lambda one: _key(one[1][0].name)):
                pictures: list[tuple[int, Member]] = []
                sidecars: dict[str, bytes | None] = {}
                for place, (member, data) in sample:
                    if is_picture(member.name):
                        pictures.append((place, member))
                    elif _extension(member.name) in SIDECARS:
                        sidecars.setdefault(_extension(member.name), data)
                texts, error = _sidecar_texts(sidecars, columns) if pictures else ({}, None)
                for place, member in pictures:
                    label = labels.get(member.name.removeprefix("./"))
                    row = _local_row(member.name, {**texts, "label": texts.get("label") or label}, member.size)
                    yield place, row._replace(error=row.error or (TWICE if member.name in seen else error))
                    seen.add(member.name)
        except TarError as damage:
            raise_failure(file)
            raise ConfigError(f"location: {damage}; give a tar that is whole") from None


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _is_sidecar(member: Member) -> bool:
    return _extension(member.name) in SIDECARS and member.size <= MAX_SIDECAR_BYTES


def _sidecar_texts(
    sidecars: Mapping[str, bytes | None], columns: Mapping[str, str]
) -> tuple[dict[str, str | None], str | None]:
    """What the files beside a picture say of it, and what is wrong with them."""
    texts: dict[str, str | None] = {}
    for extension, data in sidecars.items():
        if data is None:
            return {}, f"its .{extension} has more than {MAX_SIDECAR_BYTES:,} bytes"
    if (data := sidecars.get("json")) is not None:
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            return {}, "its .json is not json"
        if isinstance(values, dict):
            texts = {name: _as_text(values.get(column)) for name, column in columns.items()}
    for extension, name in (("txt", "alt_text"), ("cls", "label")):
        text = (sidecars.get(extension) or b"").decode("utf-8-sig", "replace").strip()
        texts[name] = texts.get(name) or text or None
    return texts, None


def _as_text(value: object) -> str | None:
    return utf8(str(value)) if isinstance(value, str | int | float) and value != "" else None


def _manifest_labels(path: str, file: BinaryIO) -> dict[str, str]:
    """Label by member name, from a ``manifest.csv`` inside the tar with columns file and class_name or label.

    One that is larger than a sidecar may be, or no csv, gives none.
    """
    found = read_members(path, _is_manifest, file)
    data = next((data for _, data in found if data is not None), b"")
    labels = {}
    try:
        for values in csv.DictReader(io.StringIO(data.decode("utf-8-sig", "replace"))):
            label = values.get("class_name") or values.get("label")
            if values.get("file") and label:
                labels[values["file"].removeprefix("./")] = label
    except csv.Error:
        return {}
    return labels


def _is_manifest(member: Member) -> bool:
    return member.name in (MANIFEST, f"./{MANIFEST}") and member.size <= MAX_SIDECAR_BYTES


# Parquet


def read_parquet(path: str, image_column: str, columns: Mapping[str, str]) -> Lines:
    """Rows of a parquet file that holds pictures; ``columns`` maps url, page_url, alt_text and label to its names."""
    with open_parquet(path, may_be_packed=False) as file:
        # The pictures are not read here. That they are still the same is seen from the size of each row group.
        sizes = _group_bytes(file.metadata, image_column)
        outside = _pictures_elsewhere(file, image_column)
        elsewhere = next(outside, None)
        for batch in _parquet_texts(file, sorted(set(columns.values()))):
            for place, values in batch:
                found = {name: values.get(column) for name, column in columns.items()}
                text = {name: None if value is None else utf8(str(value)) for name, value in found.items()}
                error = None
                if elsewhere is not None and elsewhere[0] == place:
                    error = f"the file holds no bytes of it, only its path {elsewhere[1]!r}"
                    elsewhere = next(outside, None)
                rest = (text.get("page_url"), text.get("alt_text"), text.get("label"))
                yield place + 1, SourceRow(text.get("url"), f"{image_column}/{place}", *rest, error, sizes.get(place))


def find_image_column(path: str, named: str | None) -> tuple[str, list[str]]:
    """The column that holds pictures, and the names of all: the one that is named, or the one that can be meant.

    Hugging Face writes a picture as a struct of ``bytes`` and ``path``.

    Raises:
        ConfigError: it is not there, holds something else, or several can be meant.
    """
    with open_parquet(path, may_be_packed=False) as file:
        schema = file.schema_arrow
    names = ", ".join(schema.names)
    nested = [field.name for field in schema if _is_nested(field.type)]
    if named is None:
        named = "image"
        if named not in [*nested, *(field.name for field in schema if _is_binary(field.type))] and nested:
            if len(nested) > 1:
                raise ConfigError(f"image_column: {path!r} has several columns of pictures; name one of {nested}")
            named = nested[0]
    if named not in schema.names:
        raise ConfigError(f"image_column: {path!r} has no column {named!r}; its columns: {names}")
    kind = schema.field(named).type
    if not _is_binary(kind.field("bytes").type if named in nested else kind):
        raise ConfigError(f"image_column: {named!r} of {path!r} is {kind}; it must hold bytes")
    return named, list(schema.names)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_nested(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _group_bytes(metadata: Any, column: str) -> dict[int, int]:
    """Stored bytes of a column in each row group, by the number of the group's first row."""
    sizes, first = {}, 0
    for group in range(metadata.num_row_groups):
        sizes[first] = sum(chunk.total_compressed_size for chunk in _chunks(metadata, group, column))
        first += metadata.row_group(group).num_rows
    return sizes


def _chunks(metadata: Any, group: int, column: str) -> list[Any]:
    part = metadata.row_group(group)
    chunks = [part.column(place) for place in range(part.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]


def _pictures_elsewhere(file: Any, column: str) -> Iterator[tuple[int, str]]:
    """Rows whose picture is a path and no bytes, in order. Only groups that can have such rows are read."""
    kind = file.schema_arrow.field(column).type
    if not _is_nested(kind) or kind.get_field_index("path") < 0:
        return
    first = 0
    for group in range(file.metadata.num_row_groups):
        chunk = next(c for c in _chunks(file.metadata, group, column) if c.path_in_schema == f"{column}.bytes")
        counted = chunk.is_stats_set and chunk.statistics.has_null_count
        if not counted or chunk.statistics.null_count:
            place = first
            for batch in file.iter_batches(_BATCH_PICTURES, row_groups=[group], columns=[column]):
                for value in batch.column(0):
                    if value.is_valid and not value["bytes"].is_valid and value["path"].is_valid:
                        yield place, str(value["path"].as_py())
                    place += 1
        first += file.metadata.row_group(group).num_rows


def _parquet_texts(file: Any, columns: list[str]) -> Iterable[list[tuple[int, dict[str, Any]]]]:
    first = 0
    if not columns:
        yield [(place, {}) for place in range(file.metadata.num_rows)]
        return
    for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
        yield [(first + place, values) for place, values in enumerate(batch_values(batch))]
        first += batch.num_rows
