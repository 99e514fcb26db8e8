"""Folders, tars and parquet files of pictures: which pictures are in them, without reading any."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from curation.ingest.rows import NOT_UTF8, SourceRow, is_utf8, open_parquet
from training.config import ConfigError
from training.data.tars import TarError, members, read_member

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"),
)
MANIFEST = "manifest.csv"
TWICE = "stands twice in the archive"
_BATCH_ROWS = 4096


def read_folder(folder: Path) -> Iterator[SourceRow]:
    """Pictures below a folder, by sorted relative path."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(paths):
        if is_picture(name):
            yield _local_row(name, None, paths[name].stat().st_size)


def read_tar(path: Path) -> Iterator[SourceRow]:
    """Pictures of a tar, in stored order. Of several members with one name only the first can be asked for.

    Raises:
        ConfigError: the tar is damaged.
    """
    seen: set[str] = set()
    try:
        labels = _manifest_labels(path)
        for member in members(path):
            if is_picture(member.name):
                row = _local_row(member.name, labels.get(member.name.removeprefix("./")), member.size)
                yield row._replace(error=row.error or TWICE) if member.name in seen else row
                seen.add(member.name)
    except TarError as error:
        raise ConfigError(f"location: {error}; give a tar that is whole") from None


def read_parquet(path: Path, image_column: str, columns: Mapping[str, str]) -> Iterator[SourceRow]:
    """Rows of a parquet file that holds pictures; ``columns`` maps url, page_url, alt_text and label to its names."""
    with open_parquet(path) as file:
        # The pictures are not read here. That they are still the same is seen from the size of each row group.
        sizes = _group_bytes(file.metadata, image_column)
        for batch in _parquet_texts(file, sorted(set(columns.values()))):
            for place, values in batch:
                found = {name: values.get(column) for name, column in columns.items()}
                text = {name: None if value is None else str(value) for name, value in found.items()}
                rest = (text.get("page_url"), text.get("alt_text"), text.get("label"))
                yield SourceRow(text.get("url"), f"{image_column}/{place}", *rest, None, sizes.get(place))


def parquet_header(path: Path, image_column: str) -> list[str]:
    """Names of the columns of a parquet file of pictures.

    Raises:
        ConfigError: the column of pictures is not there, or holds something else.
    """
    import pyarrow as pa

    with open_parquet(path) as file:
        schema = file.schema_arrow
    if image_column not in schema.names:
        names = ", ".join(schema.names)
        raise ConfigError(f"image_column: {str(path)!r} has no column {image_column!r}; its columns: {names}")
    kind = schema.field(image_column).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise ConfigError(f"image_column: {image_column!r} of {str(path)!r} is {kind}; it must hold bytes")
    return list(schema.names)


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture; names that begin with a dot are not."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def _local_row(name: str, label: str | None, num_bytes: int) -> SourceRow:
    if not is_utf8(name):
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return SourceRow(None, shown, None, None, None, NOT_UTF8, num_bytes)
    folders = PurePosixPath(name).parts[:-1]
    return SourceRow(None, name, None, None, label or (folders[0] if folders else None), None, num_bytes)


def _manifest_labels(path: Path) -> dict[str, str]:
    """Label by member name, from a ``manifest.csv`` inside the tar with columns file and class_name or label."""
    name = next((m.name for m in members(path) if m.name in (MANIFEST, f"./{MANIFEST}")), None)
    if name is None:
        return {}
    text = read_member(path, name).decode("utf-8-sig", "replace")
    labels = {}
    for values in csv.DictReader(io.StringIO(text)):
        label = values.get("class_name") or values.get("label")
        if values.get("file") and label:
            labels[values["file"].removeprefix("./")] = label
    return labels


def _group_bytes(metadata: Any, column: str) -> dict[int, int]:
    """Stored bytes of a column in each row group, by the number of the group's first row."""
    sizes, first = {}, 0
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        chunks = [part.column(place) for place in range(part.num_columns)]
        named = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
        sizes[first] = sum(chunk.total_compressed_size for chunk in named)
        first += part.num_rows
    return sizes


def _parquet_texts(file: Any, columns: list[str]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    first = 0
    if not columns:
        yield [(place, {}) for place in range(file.metadata.num_rows)]
        return
    for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
        yield [(first + place, values) for place, values in enumerate(batch.to_pylist())]
        first += batch.num_rows
