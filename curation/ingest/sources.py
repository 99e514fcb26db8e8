"""Sources: lists of addresses, folders, tars and parquet files of pictures, read row by row in a fixed order.

A line that cannot be used is a row that says why. What is read streams: a list of a billion lines needs no more memory
than one of a thousand.
"""

from __future__ import annotations

import glob
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from curation.ingest.lists import LIST_SUFFIXES, list_header, list_suffix, read_list
from curation.ingest.pictures import parquet_header, read_folder, read_parquet, read_tar
from curation.ingest.rows import SourceRow
from training.config import Config, ConfigError

SourceKind = Literal["list", "folder", "tar", "parquet"]


_LOCATION = "a file, a folder, or a glob of files, taken in sorted order"
_KIND = f"list: addresses in {', '.join(LIST_SUFFIXES)}, text also as .gz; parquet: pictures in a column"


class PlaceConfig(Config):
    """Where pictures lie. Columns that are named here must be there; the usual ones are taken where they are."""

    location: str | None = Field(default=None, min_length=1, description=_LOCATION)
    kind: SourceKind | None = Field(default=None, description=_KIND)
    url_column: str = "url"
    page_url_column: str | None = "page_url"
    alt_text_column: str | None = "alt_text"
    label_column: str | None = "label"
    image_column: str = Field(default="image", description="kind parquet: binary, or a struct that holds `bytes`")


class SourceConfig(PlaceConfig):
    """One source of pictures."""

    location: str = Field(min_length=1, description=_LOCATION)
    kind: SourceKind = Field(description=_KIND)


class QueryConfig(PlaceConfig):
    """A curated set that pictures are retrieved for (Oquab et al. 2023, section 3 and table 15).

    Mode ``balanced`` asks for no set of pictures but for the pool itself, so it names neither location nor kind.
    """

    mode: Literal["as_is", "sample", "cluster", "balanced"] = Field(
        default="sample",
        description="taken as it is; k nearest of each query; pictures of its clusters; of all clusters alike",
    )
    k: int = Field(default=4, ge=1, description="mode sample: neighbours of each query")
    drop_test_matches: bool | None = Field(
        default=None,
        description="mode as_is: leave out pictures that match a benchmark, by leakage.threshold; null: true there",
    )
    min_queries: int = Field(
        default=3, ge=0, description="mode cluster: clusters with more queries than this are taken"
    )
    per_cluster: int = Field(default=10_000, ge=1, description="mode cluster: pictures from each of them")
    cap: int = Field(default=1_000_000, ge=1, description="mode cluster: pictures of the whole set")
    total: int | None = Field(default=None, ge=1, description="mode balanced: pictures of the whole set")
    weight: float | None = Field(
        default=None,
        gt=0,
        description="share of its part in training, which a trainer that splits the run by part takes over, as its own "
        "data.parts.NAME.weight; null: by number of samples. It chooses no picture",
    )

    @model_validator(mode="after")
    def _keys_of_the_mode(self) -> QueryConfig:
        balanced = self.mode == "balanced"
        for key in ("location", "kind"):
            if balanced and getattr(self, key) is not None:
                raise ValueError(f"{key} is given, and mode balanced draws from the pool itself; leave {key} out")
            if not balanced and getattr(self, key) is None:
                raise ValueError(f"{key} is missing, and mode {self.mode} needs it; only mode balanced takes none")
        if self.mode != "as_is" and self.drop_test_matches is not None:
            raise ValueError(
                f"drop_test_matches is given, and mode {self.mode} takes none of its pictures; only mode as_is does"
            )
        if balanced and self.total is None:
            raise ValueError("total is missing, and mode balanced needs it: the pictures that are to be drawn")
        if not balanced and self.total is not None:
            raise ValueError(f"total is given, and mode {self.mode} takes none; only mode balanced does")
        return self

    @property
    def is_checked(self) -> bool:
        """Whether its pictures are taken, but for those that match a benchmark."""
        return self.mode == "as_is" and self.drop_test_matches is not False

    @property
    def source(self) -> SourceConfig | None:
        """Where its pictures come from; None in mode balanced."""
        if self.location is None:
            return None
        return SourceConfig(**{name: getattr(self, name) for name in PlaceConfig.model_fields})


def read_rows(config: SourceConfig) -> Iterator[SourceRow]:
    """Rows of a source, in an order that depends on its content only.

    Raises:
        ConfigError: nothing is there, or a file is damaged as a whole or cut off.
    """
    several = several_files(config.location)
    for path in source_files(config):
        match config.kind:
            case "list":
                rows = read_list(path, _columns(config, path))
            case "folder":
                rows = read_folder(path)
            case "tar":
                rows = read_tar(path)
            case "parquet":
                rows = read_parquet(path, config.image_column, _columns(config, path))
        rows = _to_the_end(path, rows)
        if several and config.kind != "list":
            prefix = path.relative_to(glob_base(config.location)).as_posix()
            yield from (row._replace(location=f"{prefix}::{row.location}") for row in rows)
        else:
            yield from rows


def _to_the_end(path: Path, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    """Rows of one file. What goes wrong with those who take them does not pass through here."""
    import pyarrow as pa

    try:
        yield from rows
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowInvalid) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"location {str(path)!r} cannot be read to its end: {why}") from None


def check_source(key: str, config: SourceConfig) -> None:
    """Check that a source is there and has its columns, without reading it.

    Raises:
        ConfigError: names ``key`` (``sources.NAME``) and the path.
    """
    try:
        paths = source_files(config)
        if config.kind in ("list", "parquet"):
            _columns(config, paths[0])
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
        if kind == "list" and list_suffix(path) not in LIST_SUFFIXES:
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


def _columns(config: SourceConfig, path: Path) -> dict[str, str]:
    """Which of url, page_url, alt_text, label stand in which column of a file."""
    is_list = config.kind == "list"
    there = list_header(path) if is_list else parquet_header(path, config.image_column)
    if list_suffix(path) == ".txt":
        return {"url": "url"}
    columns = {}
    for name in ("url", "page_url", "alt_text", "label"):
        key = f"{name}_column"
        column = getattr(config, key)
        if column is not None and (there is None or column in there):
            columns[name] = column
        elif column is not None and ((name == "url" and is_list) or column != name):  # a usual name may be absent
            names = ", ".join(there or []) or "none"
            raise ConfigError(f"{key}: {str(path)!r} has no column {column!r}; its columns: {names}")
    return columns
