"""Lists of addresses: text, csv, tsv, JSON, JSON lines and parquet, read line by line."""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

from curation.ingest.csvs import MAX_LINE, Records
from curation.ingest.packed import COMPRESSIONS, open_unpacked
from curation.ingest.rows import NOT_UTF8, SourceRow, address_row, batch_values, broken_row, open_parquet
from training.config import ConfigError

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
Lines = Iterator[tuple[int, SourceRow]]  # number in the file, from 1

_BATCH_ROWS = 4096
_PIECE = 1 << 16  # letters of a JSON array that are looked at together
_MAX_LINE_BYTES = 16 << 20  # of text and JSON lines
_MAX_ELEMENT = 16 << 20  # letters of one element of a JSON array
_SPACE = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(r'[\[\]{}]|"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # a bracket; a string, which may be cut
_TOO_DEEP = object()  # in place of an element that Python does not read


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # longer than Python reads: it stays as it is written
        return digits


_JSON = json.JSONDecoder(parse_int=_integer)


def read_list(path: str, columns: Mapping[str, str]) -> Lines:
    """Rows of one file; ``columns`` maps url, page_url, alt_text and label to the names that they have in it."""
    match list_suffix(path):
        case ".txt":
            yield from _read_txt(path)
        case ".csv":
            yield from _read_csv(path, columns, ",")
        case ".tsv":
            yield from _read_csv(path, columns, "\t")
        case ".json":
            yield from _read_json(path, columns)
        case ".parquet":
            yield from _read_parquet(path, columns)
        case _:
            yield from _read_jsonl(path, columns)


def list_header(path: str) -> list[str] | None:
    """Names of the columns of a list; None for JSON, where every element has its own.

    Raises:
        ConfigError: the file is damaged, or JSON of another shape.
    """
    suffix = list_suffix(path)
    if suffix == ".txt":
        return ["url"]
    if suffix == ".parquet":
        with open_parquet(path) as file:
            return list(file.schema_arrow.names)
    if suffix not in (".csv", ".tsv", ".json"):
        return None
    try:
        with open_unpacked(path) as stream:
            if suffix == ".json":
                _array_start(path, _text(stream))
                return None
            return Records(_text_lines(stream), "," if suffix == ".csv" else "\t").header
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"location: {path!r} is no {suffix[1:]} file: {error}") from None


def list_suffix(path: str) -> str:
    """Suffix that says what a list is, without that of its compression."""
    name = PurePosixPath(path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return PurePosixPath(name).suffix


def _read_txt(path: str) -> Lines:
    with open_unpacked(path) as file:
        for place, line in enumerate(_lines(file), 1):
            if line is None:
                yield place, _too_long()
                continue
            try:
                url = line.decode("utf-8-sig" if place == 1 else "utf-8")
            except UnicodeDecodeError:
                broken = SourceRow(line.decode("utf-8", "replace").strip(), None, None, None, None, NOT_UTF8)
                yield place, broken
                continue
            yield place, address_row({"url": url.strip()}, {"url": "url"})


def _read_csv(path: str, columns: Mapping[str, str], delimiter: str) -> Lines:
    with open_unpacked(path) as file:
        records = Records(_text_lines(file), delimiter, columns.get("url"))
        for place, cells in records:
            if isinstance(cells, str):
                yield place, broken_row(f"not csv: {cells}")
            else:
                yield place, address_row(dict(zip(records.header, cells, strict=False)), columns)


def _read_jsonl(path: str, columns: Mapping[str, str]) -> Lines:
    with open_unpacked(path) as file:
        for place, line in enumerate(_lines(file), 1):
            if line is None:
                yield place, _too_long()
                continue
            if not line.strip():
                yield place, broken_row("empty line")
                continue
            try:
                values = _JSON.decode(line.decode("utf-8-sig" if place == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield place, broken_row(NOT_UTF8)
                continue
            except (ValueError, RecursionError):
                yield place, broken_row("not json")
                continue
            yield place, address_row(values if isinstance(values, dict) else {}, columns)


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines; None for one that is too long, of which no more is held than one may have."""
    while line := file.readline(_MAX_LINE_BYTES + 1):
        is_long = len(line) > _MAX_LINE_BYTES
        yield None if is_long else line
        while is_long and line and not line.endswith(b"\n"):
            line = file.readline(_MAX_LINE_BYTES)


def _too_long() -> SourceRow:
    return broken_row(f"a line of more than {_MAX_LINE_BYTES:,} bytes")


def _read_parquet(path: str, columns: Mapping[str, str]) -> Lines:
    place = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=sorted(set(columns.values()))):
            for values in batch_values(batch):
                place += 1
                yield place, address_row(values, columns)


# A JSON array, element by element


def _read_json(path: str, columns: Mapping[str, str]) -> Lines:
    """Elements are objects, or addresses as strings; anything else is a row without an address."""
    with open_unpacked(path) as file:
        for place, values in enumerate(_elements(path, _text(file)), 1):
            if values is _TOO_DEEP:
                yield place, broken_row("not json")
            elif isinstance(values, str):
                yield place, address_row({"url": values}, {"url": "url"})
            else:
                yield place, address_row(values if isinstance(values, dict) else {}, columns)


def _array_start(path: str, stream: IO[str]) -> str:
    """The text behind the bracket that opens an array."""
    text = ""
    while not text and (piece := stream.read(_PIECE)):
        text = piece.lstrip(" \t\r\n")
    if text[:1] != "[":
        what = "an object" if text[:1] == "{" else "no array"
        raise ConfigError(
            f"location: {path!r} is {what}; a .json list is an array of objects or of addresses, "
            "and objects line by line are .jsonl"
        )
    return text[1:]


def _elements(path: str, stream: IO[str]) -> Iterator[Any]:
    """The text in memory is that of an element and a piece. What stands behind an element says that it is whole."""
    text, place, wanted = _array_start(path, stream), 0, _PIECE
    first = True
    while True:
        place = _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too
        if first and text[place : place + 1] == "]":
            return
        try:
            value, end = _JSON.raw_decode(text, place)
            end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
            why = "neither , nor ] behind an element"
        except RecursionError as error:
            value, end, why = _TOO_DEEP, _element_end(text, place), str(error)
        except ValueError as error:
            value, end, why = None, len(text), str(error)
        if text[end : end + 1] not in (",", "]"):  # a string, or a number, may go on in the next piece
            piece = stream.read(wanted) if len(text) - place < _MAX_ELEMENT else ""
            if not piece:
                raise ConfigError(f"location {path!r} cannot be read to its end: damaged or cut off, {why}")
            text, place, wanted = text[place:] + piece, 0, 2 * wanted
            continue
        yield value
        if text[end] == "]":
            return
        place, first, wanted = end + 1, False, _PIECE


def _element_end(text: str, place: int) -> int:
    """Where an object or array is closed, and the space behind it; the end of the text where it is not."""
    depth = 0
    for token in _TOKEN.finditer(text, place):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return _SPACE.match(text, token.end()).end()  # type: ignore[union-attr]
    return len(text)


# Text


def _text_lines(file: IO[bytes]) -> Iterator[str]:
    """Lines of a text; of one that is too long for a record a letter more than it may have."""
    text, begun = _text(file), ""
    while line := begun if begun == "\r" else begun + text.readline(MAX_LINE + 1):
        yield line
        begun = ""
        while len(line) > MAX_LINE and not line.endswith("\n"):
            if line.endswith("\r"):  # cut behind it: what follows is the rest of this end of a line, or the next line
                begun = text.readline(1).removesuffix("\n")
                break
            line = text.readline(MAX_LINE + 1)


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
