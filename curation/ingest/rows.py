"""A row of a source, as it is before it has an id."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from training.config import ConfigError

NOT_UTF8 = "not utf-8"


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


def is_utf8(text: str) -> bool:
    """Whether a text can be stored: it holds no stray surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_parquet(path: Path) -> Any:
    """A parquet file of a source.

    Raises:
        ConfigError: it is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"location: {str(path)!r} is no parquet file: {str(error).splitlines()[0]}") from None
