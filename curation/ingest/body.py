"""The body of an answer: unpacked and looked at as it comes, and no further than it looks like a picture and fits."""

from __future__ import annotations

import zlib
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType

from curation.ingest.magic import SNIFF_BYTES, sniff_format

CODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's window bits
_HELD_BYTES = 1 << 20  # of one body in memory; a larger one waits on disk


class PictureBody:
    """A body that should be a picture, piece by piece.

    Args:
        coding: its Content-Encoding, ``identity`` or one of ``CODINGS``, although it was asked for plain.
        limit_bytes: that it may have, as it comes and unpacked.
        scratch: folder for what is not held in memory.
    """

    def __init__(self, coding: str, limit_bytes: int, scratch: Path | None) -> None:
        self._limit = limit_bytes
        self._unpacker = zlib.decompressobj(CODINGS[coding]) if coding in CODINGS else None
        folder = None if scratch is None else str(scratch)
        self._file = SpooledTemporaryFile(_HELD_BYTES, dir=folder)  # noqa: SIM115 - closed with this
        self._head = b""
        self._num_come = 0
        self._num_bytes = 0

    def __enter__(self) -> PictureBody:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, piece: bytes) -> str | None:
        """Take what came next; the failure class of a body that is not to be read on."""
        self._num_come += len(piece)
        try:
            # At most one byte more than allowed: a bomb is told and never unpacked.
            data = (
                piece if self._unpacker is None else self._unpacker.decompress(piece, self._limit + 1 - self._num_bytes)
            )
        except zlib.error:
            return "not_an_image"
        self._num_bytes += len(data)
        if max(self._num_come, self._num_bytes) > self._limit:
            return "too_large"
        if len(self._head) < SNIFF_BYTES:
            self._head += data[: SNIFF_BYTES - len(self._head)]
            if len(self._head) == SNIFF_BYTES and sniff_format(self._head) is None:
                return "not_an_image"
        self._file.write(data)
        return None

    @property
    def is_cut(self) -> bool:
        """Whether what packs it has not come to its end, although nothing more comes."""
        return self._unpacker is not None and not self._unpacker.eof

    def end(self) -> tuple[str, bytes] | None:
        """Format and bytes; None where it is no picture."""
        found = sniff_format(self._head)
        if found is None:
            return None
        self._file.seek(0)
        return found, self._file.read()


def unpacked_start(data: bytes, coding: str, limit_bytes: int) -> tuple[bytes, bool]:
    """A small body: at most ``limit_bytes + 1`` bytes of it, and whether it is whole.

    Raises:
        zlib.error: it is damaged, or packed in another way than was said, or in one that is not known here.
    """
    if coding == "identity":
        return data, True
    if coding not in CODINGS:
        raise zlib.error(f"Content-Encoding {coding!r}")
    unpacker = zlib.decompressobj(CODINGS[coding])
    text = unpacker.decompress(data, limit_bytes + 1)
    return text, unpacker.eof and not unpacker.unused_data
