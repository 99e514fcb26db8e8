"""Sources: lists of addresses, folders, tars and parquet files of pictures, read row by row in a fixed order.

A line that cannot be used is a row that says why. What is read streams: a list of a billion lines needs no more memory
than one of a thousand.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

from pydantic import Field

from curation.ingest.address import address_error
from curation.stage import Config, ConfigError

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"),
)
MANIFEST = "manifest.csv"
_BATCH_ROWS = 4096
_NOT_UTF8 = "not utf-8"


class SourceConfig(Config):
    """One source of pictures. Columns that are named here must be there; the usual ones are taken where they are."""

    location: str = Field(min_length=1, description="a file, a folder, or a glob of files, taken in sorted order")
    kind: Literal["list", "folder", "tar", "parquet"] = Field(
        description=f"list: addresses in {', '.join(LIST_SUFFIXES)}, text also as .gz; parquet: pictures in a column"
    )
    url_column: str = "url"
    page_url_column: str | None = "page_url"
    alt_text_column: str | None = "alt_text"
    label_column: str | None = "label"
    image_column: str = Field(default="image", description="kind parquet: binary, or a struct that holds `bytes`")


class QueryConfig(SourceConfig):
    """A curated set that pictures are retrieved for (Oquab et al. 2023, section 3 and table 15)."""

    mode: Literal["as_is", "sample", "cluster"] = Field(
        default="sample", description="taken as it is; k nearest of each query; pictures of its clusters"
    )
    k: int = Field(default=4, ge=1, description="mode sample: neighbours of each query")
    min_queries: int = Field(
        default=3, ge=0, description="mode cluster: clusters with more queries than this are taken"
    )
    per_cluster: int = Field(default=10_000, ge=1, description="mode cluster: pictures from each of them")
    cap: int = Field(default=1_000_000, ge=1, description="mode cluster: pictures of the whole set")


class SourceRow(NamedTuple):
    """One line of a source.

    ``location`` is inside the source: a path of the folder, a member of the tar, COLUMN/ROW of the parquet file; with
    the file's name and ``::`` before it where the source is several files.
    """

    url: str | None
    location: str | None
    page_url: str | None
    alt_text: str | None
    label: str | None
    error: str | None
    num_bytes: int | None = None  # of a local picture; part of the source's digest, not of the table


def read_rows(config: SourceConfig) -> Iterator[SourceRow]:
    """Rows of a source, in an order that depends on its content only.

    Raises:
        ConfigError: nothing is there, or a file is damaged as a whole.
    """
    return _READERS[config.kind](config)


def check_source(key: str, config: SourceConfig) -> None:
    """Check that a source is there and has its columns, without reading it.

    Raises:
        ConfigError: names ``key`` (``sources.NAME``) and the path.
    """
    try:
        paths = source_files(config)
        if config.kind == "list":
            _list_columns(config, paths[0])
        elif config.kind == "parquet":
            _parquet_columns(config, paths[0])
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from None


def source_files(config: SourceConfig) -> list[Path]:
    """Files of a source in sorted order; the folder itself for kind folder.

    Raises:
        ConfigError: nothing is there, or it is of another kind.
    """
    location, kind = config.location, config.kind
    if "://" in location:
        raise ConfigError(
            f"location: {location!r}: sources are read from local paths; copy or mount it, and give its path"
        )
    path = Path(location)
    if kind == "folder":
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise ConfigError(f"location: {location!r} {what}; kind 'folder' takes a folder of pictures")
        return [path]
    if path.is_dir():
        raise ConfigError(
            f"location: {location!r} is a folder; kind {kind!r} takes a file or a glob, kind 'folder' a folder"
        )
    paths = (
        [path] if path.is_file() else sorted(Path(p) for p in glob.glob(location, recursive=True) if Path(p).is_file())
    )
    if not paths:
        raise ConfigError(f"location: {location!r} does not exist; give a file or a glob that matches files")
    for path in paths:
        if kind == "list" and _list_suffix(path) not in LIST_SUFFIXES:
            raise ConfigError(
                f"location: {str(path)!r}: a list ends in one of {', '.join(LIST_SUFFIXES)}, text also in .gz"
            )
    return paths


def several_files(location: str) -> bool:
    """Whether a location is a glob, so that rows name their file: ``FILE::PLACE``."""
    return not Path(location).exists()


def glob_base(location: str) -> Path:
    """The folder above the first wildcard of a glob; files are named relative to it."""
    base: list[str] = []
    for part in Path(location).parts:
        if glob.has_magic(part):
            break
        base.append(part)
    return Path(*base)


# Lists of addresses


def _read_list(config: SourceConfig) -> Iterator[SourceRow]:
    for path in source_files(config):
        columns = _list_columns(config, path)
        match _list_suffix(path):
            case ".txt":
                yield from _read_txt(path)
            case ".csv":
                yield from _read_csv(path, columns, ",")
            case ".tsv":
                yield from _read_csv(path, columns, "\t")
            case ".parquet":
                yield from _read_parquet_list(path, columns)
            case _:
                yield from _read_jsonl(path, columns)


def _read_txt(path: Path) -> Iterator[SourceRow]:
    with _open(path) as file:
        for place, line in enumerate(file):
            try:
                url = line.decode("utf-8-sig" if place == 0 else "utf-8")
            except UnicodeDecodeError:
                yield SourceRow(line.decode("utf-8", "replace").strip(), None, None, None, None, _NOT_UTF8)
                continue
            yield _address_row({"url": url.strip()}, {"url": "url"})


def _read_csv(path: Path, columns: Mapping[str, str], delimiter: str) -> Iterator[SourceRow]:
    with _open(path) as file:
        reader = csv.reader(_text(file), delimiter=delimiter)
        header = next(reader)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield SourceRow(None, None, None, None, None, f"not csv: {error}")
                continue
            yield _address_row(dict(zip(header, cells, strict=False)), columns)


def _read_jsonl(path: Path, columns: Mapping[str, str]) -> Iterator[SourceRow]:
    with _open(path) as file:
        for line in file:
            if not line.strip():
                yield SourceRow(None, None, None, None, None, "empty line")
                continue
            try:
                values = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield SourceRow(None, None, None, None, None, _NOT_UTF8)
                continue
            except (ValueError, RecursionError):
                yield SourceRow(None, None, None, None, None, "not json")
                continue
            yield _address_row(values if isinstance(values, dict) else {}, columns)


def _read_parquet_list(path: Path, columns: Mapping[str, str]) -> Iterator[SourceRow]:
    with _open_parquet(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=sorted(set(columns.values()))):
            for values in batch.to_pylist():
                yield _address_row(values, columns)


def _address_row(values: Mapping[str, Any], columns: Mapping[str, str]) -> SourceRow:
    """One line of a list; ``columns`` maps url, page_url, alt_text and label to names in ``values``."""
    broken = False
    texts: dict[str, str | None] = {}
    for name, column in columns.items():
        value = values.get(column)
        text = None if value is None else str(value)
        if text is not None and not _is_utf8(text):
            broken = broken or name == "url"
            text = text.encode("utf-8", "surrogateescape" if _is_escaped(text) else "replace").decode(
                "utf-8", "replace"
            )
        texts[name] = text or None
    url = texts.get("url")
    url = url.strip() if url else url
    error = _NOT_UTF8 if broken else address_error(url or "")
    return SourceRow(url, None, texts.get("page_url"), texts.get("alt_text"), texts.get("label"), error)


def _list_columns(config: SourceConfig, path: Path) -> dict[str, str]:
    """Which of url, page_url, alt_text, label stand in which column of a list."""
    match _list_suffix(path):
        case ".txt":
            return {"url": "url"}
        case ".csv" | ".tsv" as suffix:
            with _open(path) as file:
                try:
                    header = next(csv.reader(_text(file), delimiter="," if suffix == ".csv" else "\t"), [])
                except csv.Error as error:
                    raise ConfigError(f"location: {str(path)!r} is no {suffix[1:]} file: {error}") from None
            return _columns(config, path, header)
        case ".parquet":
            with _open_parquet(path) as file:
                return _columns(config, path, file.schema_arrow.names)
        case _:  # every line has its own keys
            names = ("url", "page_url", "alt_text", "label")
            columns = {name: getattr(config, f"{name}_column") for name in names}
            return {name: column for name, column in columns.items() if column is not None}


def _columns(config: SourceConfig, path: Path, there: Sequence[str], *, need_url: bool = True) -> dict[str, str]:
    columns = {}
    for name in ("url", "page_url", "alt_text", "label"):
        key = f"{name}_column"
        column = getattr(config, key)
        if column in there:
            columns[name] = column
        elif column is not None and ((name == "url" and need_url) or key in config.model_fields_set):
            raise ConfigError(
                f"{key}: {str(path)!r} has no column {column!r}; its columns: {', '.join(there) or 'none'}"
            )
    return columns


# Folders, tars and parquet files of pictures


def _read_folder(config: SourceConfig) -> Iterator[SourceRow]:
    (folder,) = source_files(config)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(paths):
        if is_picture(name):
            yield _local_row(name, None, paths[name].stat().st_size)


def _read_tar(config: SourceConfig) -> Iterator[SourceRow]:
    from training.data.tars import TarError, members

    several = several_files(config.location)
    for path in source_files(config):
        prefix = f"{path.relative_to(glob_base(config.location)).as_posix()}::" if several else ""
        try:
            labels = _manifest_labels(path)
            for member in members(path):
                if is_picture(member.name):
                    name = member.name.removeprefix("./")
                    row = _local_row(member.name, labels.get(name), member.size)
                    yield row._replace(location=f"{prefix}{row.location}")
        except TarError as error:
            raise ConfigError(f"location: {error}; give a tar that is whole") from None


def _read_parquet(config: SourceConfig) -> Iterator[SourceRow]:
    several = several_files(config.location)
    for path in source_files(config):
        prefix = f"{path.relative_to(glob_base(config.location)).as_posix()}::" if several else ""
        columns = _parquet_columns(config, path)
        with _open_parquet(path) as file:
            # The pictures are not read here. That they are still the same is seen from the size of each row group.
            sizes = _group_bytes(file.metadata, config.image_column)
            for batch in _parquet_texts(file, sorted(set(columns.values()))):
                for place, values in batch:
                    texts = {name: values.get(column) for name, column in columns.items()}
                    text = {name: None if value is None else str(value) for name, value in texts.items()}
                    location = f"{prefix}{config.image_column}/{place}"
                    rest = (text.get("page_url"), text.get("alt_text"), text.get("label"))
                    yield SourceRow(text.get("url"), location, *rest, None, sizes.get(place))


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture; names that begin with a dot are not."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def _local_row(name: str, label: str | None, num_bytes: int) -> SourceRow:
    if not _is_utf8(name):
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return SourceRow(None, shown, None, None, None, _NOT_UTF8, num_bytes)
    folders = PurePosixPath(name).parts[:-1]
    return SourceRow(None, name, None, None, label or (folders[0] if folders else None), None, num_bytes)


def _manifest_labels(path: Path) -> dict[str, str]:
    """Label by member name, from a ``manifest.csv`` inside the tar with columns file and class_name or label."""
    from training.data.tars import members, read_member

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


def _parquet_columns(config: SourceConfig, path: Path) -> dict[str, str]:
    import pyarrow as pa

    with _open_parquet(path) as file:
        schema = file.schema_arrow
    if config.image_column not in schema.names:
        names = ", ".join(schema.names)
        raise ConfigError(f"image_column: {str(path)!r} has no column {config.image_column!r}; its columns: {names}")
    kind = schema.field(config.image_column).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise ConfigError(f"image_column: {config.image_column!r} of {str(path)!r} is {kind}; it must hold bytes")
    return _columns(config, path, schema.names, need_url=False)


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


_READERS = {"list": _read_list, "folder": _read_folder, "tar": _read_tar, "parquet": _read_parquet}


# Files


def _list_suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"location: {str(path)!r} is no parquet file: {str(error).splitlines()[0]}") from None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_escaped(text: str) -> bool:
    return all("\udc80" <= char <= "\udcff" for char in text if "\ud800" <= char <= "\udfff")
