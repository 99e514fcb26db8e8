"""A row of a source, as it is before it has an id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from curation.ingest.address import address_error
from curation.ingest.packed import COMPRESSIONS, open_copy
from training.config import ConfigError
from training.data.files import open_file

NOT_UTF8 = "not utf-8"
MAX_LETTERS = 8192  # of an address; a longer text is cut


class SourceRow(NamedTuple):
    """One line of a source. Its digest, by which a source is known again, is over these fields.

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


class SourceLine(NamedTuple):
    """A row, and where it stands; a source may be moved and cut into other files, so that is in no digest."""

    file: str  # below the folder that the location names
    file_line: int | None  # from 1: line, row, member or record of that file; None where the file is the picture
    row: SourceRow


def broken_row(error: str, page_url: str | None = None) -> SourceRow:
    """A row that only says what could not be read."""
    return SourceRow(None, None, None if page_url is None else utf8(page_url), None, None, error)


def address_row(values: Mapping[str, Any], columns: Mapping[str, str]) -> SourceRow:
    """A row of an address; ``columns`` maps url, page_url, alt_text and label to names in ``values``."""
    broken = False
    texts: dict[str, str | None] = {}
    for name, column in columns.items():
        value = values.get(column)
        text = None if value is None else str(value)
        if text is not None and not is_utf8(text):
            broken = broken or name == "url"
            text = utf8(text)
        texts[name] = text or None
    url = texts.get("url")
    url = url.strip() if url else url
    error = NOT_UTF8 if broken else address_error(url or "")
    return SourceRow(url, None, texts.get("page_url"), texts.get("alt_text"), texts.get("label"), error)


def too_long_address() -> str:
    """What is wrong with an address of more than ``MAX_LETTERS``."""
    return f"an address of more than {MAX_LETTERS:,} letters"


def short_row(row: SourceRow) -> SourceRow:
    """A row with its texts cut after ``MAX_LETTERS``; that of a longer address says so."""
    url, _, page_url, alt_text, label, error, _ = row
    texts = (url or "", page_url or "", alt_text or "", label or "", error or "")
    if max(map(len, texts)) <= MAX_LETTERS:
        return row
    if len(texts[0]) > MAX_LETTERS:
        error = too_long_address()
    cut: dict[str, Any] = {"url": url, "page_url": page_url, "alt_text": alt_text, "label": label, "error": error}
    return row._replace(**{name: text and text[:MAX_LETTERS] for name, text in cut.items()})


def is_utf8(text: str) -> bool:
    """Whether a text can be stored: it holds no stray surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def utf8(text: str) -> str:
    """A text that can be stored: bytes that were kept as surrogates, and stray surrogates, are replaced."""
    stray = [char for char in text if "\ud800" <= char <= "\udfff"]
    escaped = all("\udc80" <= char <= "\udcff" for char in stray)
    return text.encode("utf-8", "surrogateescape" if escaped else "replace").decode("utf-8", "replace")


@contextmanager
def open_parquet(path: str, *, may_be_packed: bool = True) -> Iterator[Any]:
    """A parquet file of a source, ``pyarrow.parquet.ParquetFile``.

    Args:
        path: of the file.
        may_be_packed: once more, as a whole; then it is unpacked onto the disk while it is open.

    Raises:
        ConfigError: it is none, or cannot be unpacked.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_packed = may_be_packed and path.lower().endswith(COMPRESSIONS)
    with open_copy(path) if is_packed else open_file(path) as file:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=False)  # else it holds all that is asked for of a whole file
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"location: {path!r} is no parquet file: {str(error).splitlines()[0]}") from None
        yield parquet


def batch_values(batch: Any) -> list[dict[str, Any]]:
    """Rows of a batch of parquet by column. Bytes are text, too, and those that are no UTF-8 are kept as surrogates."""
    import pyarrow as pa

    if not any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in batch.schema.types):
        try:
            return list(batch.to_pylist())
        except UnicodeDecodeError:
            pass  # a writer need not check that a text is one
    cells = [_decoded(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*cells, strict=True)]


def _decoded(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    values = column.to_pylist()
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value for value in values]
