"""Sources: lists of addresses, web archives, folders, tars and parquet files of pictures, read in a fixed order.

A line that cannot be used is a row that says why. What is read streams: a list of a billion lines needs no more memory
than one of a thousand. Of a tar the names of all pictures are held, since one that stands twice is told.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, model_validator

from curation.ingest.address import address_error
from curation.ingest.archives import ARCHIVE_SUFFIXES, read_archive
from curation.ingest.lists import LIST_SUFFIXES, Lines, list_header, list_suffix, read_list
from curation.ingest.packed import COMPRESSIONS
from curation.ingest.pictures import PICTURE_SUFFIXES, find_image_column, read_folder, read_parquet, read_tar
from curation.ingest.rows import SourceLine, utf8
from training.config import EXECUTION, Config, ConfigError
from training.data.files import File, TooManyWaysError, list_files, size_of, split_pattern

SourceKind = Literal["list", "pages", "archive", "folder", "tar", "parquet"]

_LOCATION = (
    "a file, a glob of files, or a folder and all below it but what is hidden; a path or s3://bucket/key. "
    "Files are taken in sorted order. Of kind pages it may be the address of a page"
)
_KIND = (
    f"list: addresses in {', '.join(LIST_SUFFIXES)}, each also as {' and '.join(COMPRESSIONS)}; pages: "
    "lists of pages, which are visited; their pictures are taken, and their links followed; archive: pages of "
    "Common Crawl and the like in .warc, .arc and .wat, also as .gz; folder: pictures; tar: pictures, with what lies "
    "beside them as webdataset has it; parquet: pictures in a column, as Hugging Face has it"
)
# What is taken of a folder. A file that is named, or fits a glob, may be called otherwise if it is a tar or parquet.
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "list": (*LIST_SUFFIXES, *(a + b for a in LIST_SUFFIXES for b in COMPRESSIONS)),
    "archive": ARCHIVE_SUFFIXES,
    "folder": PICTURE_SUFFIXES,
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"),
    "parquet": (".parquet",),
}
_SETTLED_S = 2.0  # more than clocks of file systems are coarse
_TEXTS = ("url", "page_url", "alt_text", "label")


class PlaceConfig(Config):
    """Where pictures lie. Columns that are named here must be there; the usual ones are taken where they are.

    In a tar they are keys of the JSON beside a picture. Archives have none.
    """

    location: str | None = Field(default=None, min_length=1, description=_LOCATION)
    kind: SourceKind | None = Field(default=None, description=_KIND)
    url_column: str = "url"
    page_url_column: str | None = "page_url"
    alt_text_column: str | None = "alt_text"
    label_column: str | None = "label"
    image_column: str | None = Field(
        default=None,
        description="kind parquet: binary, or a struct that holds `bytes`; null: `image`, or the only such struct",
    )
    depth: int = Field(
        default=0, ge=0, description="kind pages: links that are followed from a page, within its registrable domain"
    )
    max_pages: int = Field(default=10_000, ge=1, description="kind pages: pages in all, those of the list included")
    max_pages_per_host: int = Field(
        default=1_000, ge=1, description="kind pages: pages of one host, as far as they are found and not in the list"
    )
    expected_rows: int | None = Field(
        default=None,
        ge=0,
        json_schema_extra=EXECUTION,
        description="how many `lvd estimate` counts on where the source is not there yet",
    )


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


def read_lines(config: SourceConfig) -> Iterator[SourceLine]:
    """Rows of a source and where they stand, in an order that depends on its content only.

    Raises:
        ConfigError: nothing is there, or a file is damaged as a whole or cut off.
    """
    files = source_files(config)
    if config.kind == "folder":
        yield from read_folder(files)
        return
    in_files = config.kind in ("tar", "parquet") and several_files(config.location)
    for file in files:
        for line, row in _to_the_end(file.path, _read_file(config, file.path)):
            inside = row._replace(location=f"{file.name}::{row.location}") if in_files else row
            yield SourceLine(utf8(file.name), line, inside)


def read_seeds(config: SourceConfig) -> Iterator[str]:
    """Pages that a source of kind pages names, as it writes them; an empty text for a line without one.

    Raises:
        ConfigError: nothing is there, or a file is damaged as a whole or cut off.
    """
    if _is_page(config.location):
        yield config.location
        return
    for line in read_lines(_list_of_pages(config)):
        yield line.row.url or ""


def _is_page(location: str) -> bool:
    return location.lower().startswith(("http://", "https://"))


def _list_of_pages(config: SourceConfig) -> SourceConfig:
    return config.model_copy(update={"kind": "list"})


def _read_file(config: SourceConfig, path: str) -> Lines:
    match config.kind:
        case "list":
            yield from read_list(path, _columns(config, path, list_header(path)))
        case "archive":
            yield from read_archive(path)
        case "tar":
            yield from read_tar(path, _columns(config, path, None))
        case _:
            image_column, there = find_image_column(path, config.image_column)
            yield from read_parquet(path, image_column, _columns(config, path, there))


def _to_the_end(path: str, rows: Lines) -> Lines:
    """Rows of one file. What goes wrong with those who take them does not pass through here."""
    import pyarrow as pa

    try:
        yield from rows
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowInvalid) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"location {path!r} cannot be read to its end: {why}") from None


def check_source(key: str, config: SourceConfig) -> None:
    """Check that a source is there and has its columns, without reading it.

    Raises:
        ConfigError: names ``key`` (``sources.NAME``) and the path.
    """
    if config.kind == "pages":
        if not _is_page(config.location):
            check_source(key, _list_of_pages(config))
        elif (error := address_error(config.location)) is not None:
            raise ConfigError(f"{key}.location: {config.location!r} is the address of no page: {error}")
        return
    try:
        path = source_files(config)[0].path
        if config.kind == "list":
            _columns(config, path, list_header(path))
        elif config.kind == "parquet":
            _columns(config, path, find_image_column(path, config.image_column)[1])
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from None


def source_files(config: SourceConfig) -> list[File]:
    """Files of a source in sorted order.

    Raises:
        ConfigError: nothing is there, it is of another kind, or a bucket does not answer.
    """
    location, kind = config.location, config.kind
    scheme, is_address, _ = location.partition("://")
    if is_address and scheme != "s3":
        raise ConfigError(f"location: {location!r}: scheme {scheme!r} is not known; give a path or s3://bucket/key")
    try:
        files = list_files(location, _SUFFIXES[kind])
    except OSError as error:
        raise ConfigError(f"location: {location!r} cannot be listed: {error}") from None
    except TooManyWaysError as error:
        raise ConfigError(f"location: {error}") from None
    except ConfigError:
        raise ConfigError(_nothing_there(location, kind)) from None
    if kind == "folder":
        if split_pattern(location)[1] and not Path(location).is_dir():
            raise ConfigError(f"location: {location!r} does not exist; kind 'folder' takes a folder of pictures")
        if files[0].path == location:
            raise ConfigError(f"location: {location!r} is a file; kind 'folder' takes a folder of pictures")
        return files
    for file in files:
        if kind in ("list", "archive") and not file.path.lower().endswith(_SUFFIXES[kind]):
            suffixes = (
                f"{', '.join(LIST_SUFFIXES)}, each also in {' and '.join(COMPRESSIONS)}"
                if kind == "list"
                else ", ".join(ARCHIVE_SUFFIXES)
            )
            article = "a list" if kind == "list" else "an archive"
            raise ConfigError(f"location: {file.path!r}: {article} ends in one of {suffixes}")
    return sorted(files, key=lambda file: PurePosixPath(file.name))


def stamp(config: SourceConfig) -> str | None:
    """A digest that stays as long as the files of a source do, and the way they are read; None where nothing tells.

    Nothing does of pages, which are visited, and of folders of pictures, which are read by listing them. A file that
    changed a moment ago may do so once more without another time, so it is not relied upon yet.

    Raises:
        ConfigError: nothing is there, or a bucket does not answer.
    """
    if config.kind in ("pages", "folder"):
        return None
    digest = hashlib.sha256(config.model_dump_json(exclude={"expected_rows"}).encode())
    for file in source_files(config):
        if not file.path.startswith("s3://") and time.time() - int(file.tag) / 1e9 < _SETTLED_S:
            return None
        digest.update(repr((file.name, file.num_bytes, file.tag)).encode())
    return digest.hexdigest()


def _nothing_there(location: str, kind: SourceKind) -> str:
    is_folder = not location.startswith("s3://") and Path(location).is_dir()
    if kind == "folder":
        what = "holds no picture" if is_folder else "does not exist"
        return f"location: {location!r} {what}; kind 'folder' takes a folder of pictures"
    if is_folder:
        return f"location: {location!r} is a folder without a file for kind {kind!r}: {', '.join(_SUFFIXES[kind])}"
    return f"location: {location!r} does not exist; give a file or a glob that matches files, or a folder of them"


def several_files(location: str) -> bool:
    """Whether a location is a glob or a folder, so that rows name their file: ``FILE::PLACE``."""
    if location.startswith("s3://"):
        return bool(split_pattern(location)[1]) or size_of(location) is None
    return not Path(location).is_file()


def folder_of(location: str) -> str:
    """The folder that files of a glob or a folder are named in, with a slash behind it; '' for the one worked in."""
    return f"{location.rstrip('/')}/" if Path(location).is_dir() else split_pattern(location)[0]


def _columns(config: SourceConfig, path: str, there: list[str] | None) -> dict[str, str]:
    """Which of url, page_url, alt_text, label stand in which column of a file; None where each row has its own."""
    if config.kind == "list" and list_suffix(path) == ".txt":
        return {"url": "url"}
    columns = {}
    for name in _TEXTS:
        key = f"{name}_column"
        column = getattr(config, key)
        if column is not None and there is not None and (times := there.count(column)) > 1:
            once = ", ".join(one for one in there if there.count(one) == 1) or "none"
            raise ConfigError(f"{key}: {path!r} has {times} columns {column!r}; those that stand there once: {once}")
        if column is not None and (there is None or column in there):
            columns[name] = column
        elif column is not None and ((name == "url" and config.kind == "list") or column != name):  # may be absent
            names = ", ".join(there or []) or "none"
            raise ConfigError(f"{key}: {path!r} has no column {column!r}; its columns: {names}")
    return columns
