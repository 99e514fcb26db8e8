"""Files that may be packed with gzip or zstd, of any number of members or frames."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from training.config import ConfigError
from training.data.files import open_file

COMPRESSIONS = (".gz", ".zst")
_BLOCK_BYTES = 4 << 20  # read at once from a bucket


@contextmanager
def open_unpacked(path: str) -> Iterator[IO[bytes]]:
    """A file to be read from its beginning to its end, unpacked on the way."""
    with open_file(path, _BLOCK_BYTES) as file:
        name = path.lower()
        if name.endswith(".gz"):
            with gzip.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        elif name.endswith(".zst"):
            import pyarrow as pa

            with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as unpacked:
                yield io.BufferedReader(unpacked)
        else:
            yield file


@contextmanager
def open_copy(path: str) -> Iterator[IO[bytes]]:
    """A packed file to be read in any order: it is unpacked onto the disk, and gone when the block ends.

    Raises:
        ConfigError: it is damaged, or the disk is full.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            with open_unpacked(path) as packed:
                shutil.copyfileobj(packed, file, _BLOCK_BYTES)
            file.seek(0)
        except (OSError, EOFError, zlib.error) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"location: {path!r} cannot be unpacked: {why}") from None
        yield file
