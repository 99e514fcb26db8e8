"""A gzip file of many members, as web archives are packed: read through, and resumed behind damage."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

GZIP = b"\x1f\x8b\x08"  # what a member begins with
_PIECE_BYTES = 1 << 16
_SEARCH_BYTES = 1 << 20


class Members(io.RawIOBase):
    """What the members of a gzip file hold, one behind the other. It ends at damage, and can be resumed behind it."""

    def __init__(self, file: BinaryIO, is_wanted: Callable[[bytes], bool]) -> None:
        self._file = file
        self._is_wanted = is_wanted  # whether a member that begins like this is one to resume at
        self._data = b""
        self._start = 0  # of the member that is read
        self._place = 0  # of the first byte of _data
        self._unpack: Any = None
        self._is_at_end = False
        self.damage: str | None = None

    def readable(self) -> bool:  # noqa: D102 - see io.RawIOBase
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        view = memoryview(buffer)
        while self.damage is None and not self._is_at_end:
            if not self._data and not self._fill():
                self._is_at_end = True
                self.damage = None if self._unpack is None else "it is cut off"
                break
            if self._unpack is None:
                self._data, skipped = self._data.lstrip(b"\0"), len(self._data)  # tapes are filled up with zeros
                self._place += skipped - len(self._data)
                if not self._data:
                    continue
                self._unpack, self._start = zlib.decompressobj(31), self._place
            size = len(self._data)
            try:
                out = self._unpack.decompress(self._data, len(view))
            except zlib.error:
                self.damage = "its gzip member cannot be unpacked"
                break
            self._data = self._unpack.unused_data if self._unpack.eof else self._unpack.unconsumed_tail
            self._place += size - len(self._data)
            if self._unpack.eof:
                self._unpack = None
            if out:
                view[: len(out)] = out
                return len(out)
        return 0

    def _fill(self) -> bool:
        self._data = self._file.read(_PIECE_BYTES)
        return bool(self._data)

    def resume(self) -> bool:
        """Go to the next wanted member behind damage; False where there is none."""
        if self.damage is None:
            return False
        found = self._next_member(self._start + 1)
        self._file.seek(0, io.SEEK_END)
        self._data, self._unpack, self.damage = b"", None, None
        if found is None:
            return False
        self._file.seek(found)
        self._place, self._is_at_end = found, False
        return True

    def _next_member(self, start: int) -> int | None:
        self._file.seek(start)
        held = b""
        while block := self._file.read(_SEARCH_BYTES):
            held += block
            place = -1
            while (place := held.find(GZIP, place + 1)) >= 0:
                if self._is_member(start + place, held[place : place + _PIECE_BYTES]):
                    return start + place
            keep = len(GZIP) - 1
            start += max(0, len(held) - keep)
            held = held[-keep:]
        return None

    def _is_member(self, place: int, data: bytes) -> bool:
        if len(data) < 1024:  # it begins at the end of a block
            here = self._file.tell()
            self._file.seek(place)
            data = self._file.read(_PIECE_BYTES)
            self._file.seek(here)
        try:
            return self._is_wanted(zlib.decompressobj(31).decompress(data, _PIECE_BYTES))
        except zlib.error:
            return False
