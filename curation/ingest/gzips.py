"""A gzip file of many members, as web archives are packed: read through, and resumed behind damage."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

GZIP = b"\x1f\x8b\x08"  # what a member begins with
_PIECE_BYTES = 1 << 16
_SEARCH_BYTES = 1 << 20
_TRY_BYTES = 1 << 10  # of a member that may be none; it holds more than its header
_RESERVED_FLAGS, _EXTRA_FLAG = 0xE0, 0x04  # RFC 1952, section 2.3.1


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
        self.is_in_record = False  # set by who reads: then it ends before a member that begins another one
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
                if self.is_in_record and self._begins_another():
                    break
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

    def _begins_another(self) -> bool:
        if len(self._data) < _PIECE_BYTES:
            self._data += self._file.read(_PIECE_BYTES)
        return self._is_member(memoryview(self._data)[:_PIECE_BYTES])

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
        while True:
            block = self._file.read(_SEARCH_BYTES)
            held += block
            end = max(0, len(held) - _PIECE_BYTES) if block else len(held)  # a member behind it may not be here yet
            view = memoryview(held)
            place = held.find(GZIP)
            while 0 <= place < end:
                if self._is_member(view[place : place + _PIECE_BYTES]):
                    return start + place
                place = held.find(GZIP, place + 1)
            if not block:
                return None
            start, held = start + end, held[end:]

    def _is_member(self, data: memoryview) -> bool:
        """Whether a wanted member begins here; most places that look like one are none, and that is seen at once."""
        if len(data) < 12 or data[3] & _RESERVED_FLAGS:
            return False
        if data[3] & _EXTRA_FLAG and int.from_bytes(data[10:12], "little") > _TRY_BYTES:
            return False
        for size in (_TRY_BYTES, _PIECE_BYTES):
            try:
                out = zlib.decompressobj(31).decompress(data[:size], size)
            except zlib.error:
                return False
            if not out or b"\n" in out or size >= len(data):
                return bool(out) and self._is_wanted(out)
        return self._is_wanted(out)  # it begins with a long line
