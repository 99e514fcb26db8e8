"""Folders on this machine's disk for what is under way; none outlives its process for longer than until the next run.

They may hold pictures before faces are blurred, so what a killed process left is removed by whichever starts next.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curation.lease import start_of
from curation.stage import digest_of


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder, gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_of_this_machine()}{os.getpid()}-{start_of(os.getpid())}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_scratch() -> None:
    """Remove the folders of processes of this machine that are gone."""
    prefix = _of_this_machine()
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        pid, _, rest = folder.name.removeprefix(prefix).partition("-")
        if pid.isdigit() and str(start_of(int(pid))) != rest.rpartition("-")[0]:
            shutil.rmtree(folder, ignore_errors=True)


def _of_this_machine() -> str:
    """Machines may share the folder, and each knows its own processes only."""
    return f"lvd-{digest_of(socket.gethostname())[:8]}-"
