"""Where pictures lie: folders and buckets, listed and read by range.

A location is a path or ``s3://bucket/key``; it names one file, a folder, or files by a pattern with ``* ? [ ]``
(``**`` for folders at any depth). Credentials, region and endpoint of a bucket come from the usual ``AWS_*`` variables.
"""

from __future__ import annotations

import functools
import glob
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from training.config import ConfigError

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_BLOCK_BYTES = 1 << 18  # read at once from a bucket while headers are looked for
_MAX_WAYS = 100  # into one folder, by links
_WILD = re.compile(r"[*?[]")


class File(NamedTuple):
    """One file of a part."""

    name: str  # below the folder that the location names: what stays when the set is moved
    path: str  # where it is now
    num_bytes: int
    tag: str  # changes when the file does


def list_files(location: str, suffixes: Collection[str]) -> list[File]:
    """Files of a location, sorted by name; hidden ones, and those in hidden folders, are left out.

    Args:
        location: file, folder or pattern. Of a folder, files at any depth are taken.
        suffixes: with the dot, lower case; which files of a folder are taken. What is named, or fits a pattern, is
            taken whatever it is called.

    Raises:
        ConfigError: nothing is there, or the scheme is not known.
        OSError: a bucket does not answer.
    """
    scheme, found, _ = location.partition("://")
    if found and scheme != "s3":
        raise ConfigError(f"location {location!r}: scheme {scheme!r} is not known; give a path or s3://bucket/key")
    if location.startswith("s3://"):
        with _as_os_error():
            files = _list_bucket(location, suffixes)
    else:
        files = _list_local(location, suffixes)
    if not files:
        raise ConfigError(
            f"{location}: no such file, no file fits the pattern, or no {' '.join(sorted(suffixes))} in it"
        )
    return sorted(files)


def read_range(path: str, offset: int, num_bytes: int) -> bytes:
    """Bytes ``offset`` to ``offset + num_bytes`` of a file; fewer where it ends before. FileNotFoundError as usual."""
    if path.startswith("s3://"):
        import obstore

        client, key = _client(path)
        with _as_os_error():
            return bytes(obstore.get_range(client, key, start=offset, length=num_bytes)) if num_bytes else b""
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, num_bytes, offset)
    finally:
        os.close(handle)


class TooManyWaysError(ConfigError):
    """Links lead into one folder again and again."""


class TooLargeError(ValueError):
    """A file has more bytes than it may."""


def read_file(path: str, max_bytes: int | None = None) -> bytes:
    """A whole file.

    Raises:
        TooLargeError: it has more than ``max_bytes``, and was not read.
    """
    if path.startswith("s3://"):
        import obstore

        client, key = _client(path)
        with _as_os_error():
            found = obstore.get(client, key)
            _check_size(path, int(found.meta["size"]), max_bytes)
            return bytes(found.bytes())
    with Path(path).open("rb") as file:
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)
        return file.read()


def _check_size(path: str, num_bytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and num_bytes > max_bytes:
        raise TooLargeError(f"{path}: {num_bytes:,} bytes, more than {max_bytes:,}")


def size_of(path: str) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        if path.startswith("s3://"):
            import obstore

            client, key = _client(path)
            with _as_os_error():
                return int(obstore.head(client, key)["size"])
        return Path(path).stat().st_size
    except FileNotFoundError:
        return None


def open_file(path: str, block_bytes: int = _BLOCK_BYTES) -> BinaryIO:
    """A file to seek in; of a bucket, only the blocks that are asked for are fetched."""
    if path.startswith("s3://"):
        size = size_of(path)
        if size is None:
            raise FileNotFoundError(path)
        return io.BufferedReader(_Ranges(path, size), block_bytes)
    return Path(path).open("rb")


def raise_failure(file: BinaryIO) -> None:
    """Raise what a bucket failed with while ``file`` was read: readers of formats take it for damage of the file."""
    raw = getattr(file, "raw", None)
    if isinstance(raw, _Ranges) and raw.failure is not None:
        raise raw.failure


class _Ranges(io.RawIOBase):
    """A file of a bucket, read by ranges."""

    def __init__(self, path: str, num_bytes: int) -> None:
        self._path, self._num_bytes, self._place = path, num_bytes, 0
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._num_bytes}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            data = read_range(self._path, self._place, max(0, min(len(view), self._num_bytes - self._place)))
        except OSError as error:
            self.failure = error
            raise
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


# Listing


def _is_hidden(name: str) -> bool:
    return any(step.startswith(".") for step in PurePosixPath(name).parts)


def split_pattern(location: str) -> tuple[str, str]:
    """The folder above the first wildcard, with a slash behind it, and the pattern below it; '' where there is none."""
    wild = _WILD.search(location)
    if wild is None:
        return location.rstrip("/") + "/", ""
    folder = location[: location.rfind("/", 0, wild.start()) + 1]
    return folder, location[len(folder) :]


def _list_local(location: str, suffixes: Collection[str]) -> list[File]:
    folder, pattern = split_pattern(location)
    if Path(location).is_dir():  # even one that is called a[1]
        folder = location
        paths = [path for path in _all_files(folder) if path.lower().endswith(tuple(suffixes))]
    elif Path(location).is_file():
        paths, folder = [location], f"{Path(location).parent}/"
    elif "**" in pattern.split("/"):  # glob would follow links round and round
        wanted = re.compile(_as_regex(pattern))
        paths = [path for path in _all_files(folder or ".") if wanted.fullmatch(os.path.relpath(path, folder or "."))]
    else:
        paths = glob.glob(location) if pattern else []
    files = []
    for path in paths:
        name = os.path.relpath(path, folder or ".")
        if _is_hidden(name) or not Path(path).is_file():
            continue
        stat = Path(path).stat()
        files.append(File(name, path, stat.st_size, str(stat.st_mtime_ns)))
    return files


def _all_files(folder: str) -> Iterator[str]:
    return (os.path.join(top, name) for top, _, names in walk(folder) for name in names)


def walk(folder: str, above: str | None = None) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders at any depth, each with the names of folders and of files in it, sorted; what is hidden is left out.

    Links are followed, but into no folder that they lie in: there they would go round and round. Those that lead
    nowhere, and folders that cannot be listed, are passed over.

    Args:
        folder: where to begin.
        above: a folder that ``folder`` was found in, and that no link may lead back to.

    Raises:
        TooManyWaysError: links lead into one folder by more than a hundred ways. Among twenty that link to each other
            there are 20!.
    """
    begin = frozenset() if above is None else frozenset([_identity(above)])
    to_list = [(folder, begin)]
    ways: Counter[tuple[int, int]] = Counter()
    while to_list:
        top, path = to_list.pop()
        folders, names = [], []
        try:
            here = _identity(top)
            if here in path:
                continue
            ways[here] += 1
            if ways[here] > _MAX_WAYS:
                raise TooManyWaysError(
                    f"{top}: links lead into this folder by more than {_MAX_WAYS} ways, and its files would be listed "
                    "as often; name folders without such links"
                )
            with os.scandir(top) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    is_link = entry.is_symlink()  # is_dir() of an entry fails at a link to itself
                    if os.path.isdir(entry.path) if is_link else entry.is_dir():
                        folders.append(entry.name)
                    elif os.path.isfile(entry.path) if is_link else entry.is_file():
                        names.append(entry.name)
        except OSError:
            continue
        folders.sort()
        yield top, folders, sorted(names)
        to_list.extend((os.path.join(top, name), path | {here}) for name in reversed(folders))


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _list_bucket(location: str, suffixes: Collection[str]) -> list[File]:
    import obstore

    folder, pattern = split_pattern(location)
    client, prefix = _client(folder)
    wanted = re.compile(_as_regex(pattern)) if pattern else None
    files = []
    for batch in obstore.list(client, prefix.rstrip("/") or None):
        for item in batch:
            name = str(item["path"])[len(prefix) :]
            fits = wanted.fullmatch(name) if wanted else name.lower().endswith(tuple(suffixes))
            if fits and not _is_hidden(name):
                files.append(File(name, folder + name, int(item["size"]), _tag(item)))
    if not files and not pattern:  # not a folder, perhaps a file
        path = location.rstrip("/")
        client, key = _client(path)
        try:
            head = obstore.head(client, key)
        except FileNotFoundError:
            return []
        files.append(File(PurePosixPath(key).name, path, int(head["size"]), _tag(head)))
    return files


def _tag(item: Any) -> str:
    return str(item["e_tag"] or item["last_modified"])  # some servers give no tag


def _as_regex(pattern: str) -> str:
    """A pattern of glob as a regular expression: ``*`` and ``?`` stop at a slash, ``**/`` does not."""
    steps = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return "".join(steps.get(p) or (p.replace("[!", "[^") if p.startswith("[") else re.escape(p)) for p in pieces)


def _client(path: str) -> tuple[Any, str]:
    """The bucket of an ``s3://`` path, and the key in it."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return _bucket(bucket, os.environ.get("AWS_ENDPOINT_URL", "")), key


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What a bucket fails with, after its client's own retries, as a disk's errors are; FileNotFoundError stays."""
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        raise OSError(str(error).splitlines()[0]) from None


@functools.lru_cache
def _bucket(name: str, endpoint: str) -> Any:
    from obstore.store import S3Store

    return S3Store(name, config={"allow_http": "true"} if endpoint.startswith("http://") else {})
