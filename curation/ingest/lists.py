"""Lists of addresses: text, csv, tsv, JSON lines and parquet, read line by line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from curation.ingest.address import address_error
from curation.ingest.rows import NOT_UTF8, SourceRow, is_utf8, open_parquet
from training.config import ConfigError

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_BATCH_ROWS = 4096


def read_list(path: Path, columns: Mapping[str, str]) -> Iterator[SourceRow]:
    """Rows of one file; ``columns`` maps url, page_url, alt_text and label to the names that they have in it."""
    match list_suffix(path):
        case ".txt":
            yield from _read_txt(path)
        case ".csv":
            yield from _read_csv(path, columns, ",")
        case ".tsv":
            yield from _read_csv(path, columns, "\t")
        case ".parquet":
            yield from _read_parquet(path, columns)
        case _:
            yield from _read_jsonl(path, columns)


def list_header(path: Path) -> list[str] | None:
    """Names of the columns of a list; None for JSON lines, where every line has its own.

    Raises:
        ConfigError: the file is damaged.
    """
    suffix = list_suffix(path)
    if suffix == ".txt":
        return ["url"]
    if suffix == ".parquet":
        with open_parquet(path) as file:
            return list(file.schema_arrow.names)
    if suffix not in (".csv", ".tsv"):
        return None
    with _open(path) as stream:
        try:
            return next(csv.reader(_text(stream), delimiter="," if suffix == ".csv" else "\t"), [])
        except (csv.Error, OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"location: {str(path)!r} is no {suffix[1:]} file: {error}") from None


def list_suffix(path: Path) -> str:
    """Suffix that says what a list is, without that of its compression."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_txt(path: Path) -> Iterator[SourceRow]:
    with _open(path) as file:
        for place, line in enumerate(file):
            try:
                url = line.decode("utf-8-sig" if place == 0 else "utf-8")
            except UnicodeDecodeError:
                yield SourceRow(line.decode("utf-8", "replace").strip(), None, None, None, None, NOT_UTF8)
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
        for place, line in enumerate(file):
            if not line.strip():
                yield SourceRow(None, None, None, None, None, "empty line")
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if place == 0 else "utf-8"))
            except UnicodeDecodeError:
                yield SourceRow(None, None, None, None, None, NOT_UTF8)
                continue
            except (ValueError, RecursionError):
                yield SourceRow(None, None, None, None, None, "not json")
                continue
            yield _address_row(values if isinstance(values, dict) else {}, columns)


def _read_parquet(path: Path, columns: Mapping[str, str]) -> Iterator[SourceRow]:
    with open_parquet(path) as file:
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
        if text is not None and not is_utf8(text):
            broken = broken or name == "url"
            text = text.encode("utf-8", "surrogateescape" if _is_escaped(text) else "replace").decode(
                "utf-8", "replace"
            )
        texts[name] = text or None
    url = texts.get("url")
    url = url.strip() if url else url
    error = NOT_UTF8 if broken else address_error(url or "")
    return SourceRow(url, None, texts.get("page_url"), texts.get("alt_text"), texts.get("label"), error)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _is_escaped(text: str) -> bool:
    return all("\udc80" <= char <= "\udcff" for char in text if "\ud800" <= char <= "\udfff")
