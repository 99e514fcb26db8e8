"""Tars: written the same bytes every time, read by offset.

ustar without owners, times or links: what goes in decides every byte. Samples for webdataset are members ``KEY.EXT``
that follow one another and share a key.
"""

from __future__ import annotations

import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_RECORD = 20 * _BLOCK
# What tarfile lets through when a tar, or the compression around it, is damaged; the last three of headers that hold
# no numbers, or numbers without end, or belong to headers that belong to headers, and so on.
DAMAGE = (
    *(tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError),
    *(ValueError, OverflowError, RecursionError),
)


class TarError(ValueError):
    """The file is no tar, or is damaged or cut off."""


class Member(NamedTuple):
    """One file inside a tar."""

    name: str
    offset: int  # of its first byte
    size: int  # bytes


class TarWriter:
    """Writes a tar to a path, member by member, and hashes it on the way."""

    def __init__(self, path: Path | str) -> None:
        self._file: BinaryIO = Path(path).open("wb")  # noqa: SIM115 - closed by close()
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self.num_members = 0

    def add(self, name: str, data: bytes) -> int:
        """Append one member.

        Returns:
            Offset of its first byte inside the tar.

        Raises:
            TarError: the name does not fit into a ustar header.
        """
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        try:
            header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        except (ValueError, UnicodeError) as error:
            raise TarError(f"{name!r} cannot be a member of a tar: {error}") from None
        self._write(header)
        offset = self.num_bytes
        self._write(data)
        self._write(b"\0" * (-len(data) % _BLOCK))
        self.num_members += 1
        return offset

    def close(self) -> None:
        """Write the end mark and close the file."""
        if self._file.closed:
            return
        self._write(b"\0" * (2 * _BLOCK))
        self._write(b"\0" * (-self.num_bytes % _RECORD))
        self._file.close()

    @property
    def sha256(self) -> str:
        """sha256 of what was written so far, hex."""
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)


def members(path: Path | str, file: BinaryIO | None = None) -> Iterator[Member]:
    """All regular files of an uncompressed or compressed tar, in stored order; offsets are of the uncompressed stream.

    Args:
        path: where the tar lies.
        file: the tar itself, opened by the caller, where it lies in no folder; ``path`` is then only its name.

    Raises:
        TarError: the file is no tar, or is damaged or cut off.
    """
    return (member for member, _ in read_members(path, lambda member: False, file))


def read_members(
    path: Path | str, wanted: Callable[[Member], bool], file: BinaryIO | None = None
) -> Iterator[tuple[Member, bytes | None]]:
    """The same, with the bytes of those that are wanted, in one pass; None for the others."""
    try:
        with tarfile.open(path, "r:*", fileobj=file) as tar:
            for info in headers(tar):
                if info.isfile():
                    member = Member(info.name, info.offset_data, info.size)
                    opened = tar.extractfile(info) if wanted(member) else None
                    yield member, None if opened is None else opened.read()
            # tarfile takes a damaged header, or the end of the file, for the end of the tar; only the end mark tells.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(_BLOCK) != b"\0" * _BLOCK:
                raise TarError(f"{path}: damaged or cut off, neither header nor end mark at byte {tar.offset:,}")
    except TarError:
        raise
    except DAMAGE as error:
        raise TarError(f"{path}: {error}") from None


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Headers of an open tar, in stored order, none of which is kept.

    Raises:
        One of ``DAMAGE``: the tar is damaged.
    """
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header that it ever saw
        if info.size < 0:  # tarfile would go back, and come here again
            raise tarfile.ReadError("a member of less than no bytes")
        yield info


def read_member(path: Path | str, name: str) -> bytes:
    """Bytes of one member by name.

    Raises:
        TarError: there is no such member, or the tar is damaged.
    """
    try:
        with tarfile.open(path, "r:*") as tar:
            file = tar.extractfile(name)
            if file is None:
                raise TarError(f"{path}: {name!r} is no file")
            return file.read()
    except KeyError:
        raise TarError(f"{path}: no member {name!r}") from None
    except TarError:
        raise
    except DAMAGE as error:
        raise TarError(f"{path}: {error}") from None
