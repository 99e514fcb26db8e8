"""Where bodies of a shard wait until all are there."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class Spool:
    """Bodies of a shard in one file, in the order in which they came: a file each costs more than the fetch itself."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._path = scratch / "bodies"
        self._file = self._path.open("w+b", buffering=0)
        self._places: dict[int, tuple[int, int]] = {}  # offset and size, by id
        self._end = 0

    def put(self, image_id: int, body: bytes) -> None:
        """Put a body down; a later one of the same row stands for it.

        Raises:
            OSError: there is no place for all of it.
        """
        num_written = 0
        while num_written < len(body):  # a disk that becomes full takes a part, and says so only when it is asked again
            num_written += os.pwrite(self._file.fileno(), memoryview(body)[num_written:], self._end + num_written)
        self._places[image_id] = (self._end, len(body))
        self._end += len(body)

    def get(self, image_id: int) -> bytes | None:
        """The body of a row; None where there is none.

        Raises:
            OSError: it is not there as it was put down.
        """
        place = self._places.get(image_id)
        if place is None:
            return None
        offset, size = place
        body = os.pread(self._file.fileno(), size, offset)
        if len(body) != size:
            raise OSError(errno.EIO, f"{len(body):,} of {size:,} bytes are left of a body", str(self._path))
        return body

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()
        self._path.unlink()
