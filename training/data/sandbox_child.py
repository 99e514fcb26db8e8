"""The child of sandbox.py: takes pictures from its standard input, a socket, and answers there until its end.

    python -m training.data.sandbox_child MEMORY_BYTES DESCRIPTOR

DESCRIPTOR is of the memory that is shared with the parent.
"""

from __future__ import annotations

import array
import mmap
import os
import resource
import signal
import socket
import sys
from typing import Any

import numpy as np
import simplejpeg  # noqa: F401 - before the limit of memory, and before the first picture waits for it
from PIL import AvifImagePlugin, Image, ImageCms  # noqa: F401

from training.data.pixels import DecodeError, decode_into
from training.data.sandbox import (
    ANSWER,
    INPUT_BYTES,
    NO_PICTURE,
    OWN_MEMORY,
    REQUEST,
    SHARED_BYTES,
    SLOT_BYTES,
)


class _Output:
    """Where the pixels of one picture go: the slot that the parent named, or memory of their own."""

    def __init__(self, shared: mmap.mmap, slot: int) -> None:
        self._shared, self._wanted = shared, slot
        self.slot, self.descriptor = slot, -1

    def new(self, height: int, width: int) -> np.ndarray:
        """uint8 [H, W, 3]; a second call takes the place of the first."""
        self.close()
        size = height * width * 3
        if self._wanted >= 0 and size <= SLOT_BYTES:
            self.slot = self._wanted
            flat = np.frombuffer(self._shared, np.uint8, size, INPUT_BYTES + self.slot * SLOT_BYTES)
        else:
            self.slot = OWN_MEMORY
            self.descriptor = os.memfd_create("picture")
            os.ftruncate(self.descriptor, size)
            try:
                flat = np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)
            except OSError:  # the limit of memory
                raise MemoryError from None
        return flat.reshape(height, width, 3)

    def close(self) -> None:
        """Memory of its own is given back when the parent's and all arrays are gone too."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _read(link: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; ends the process where the parent is gone."""
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = link.recv_into(view[at:])
        if not got:
            sys.exit(0)
        at += got
    return bytes(data)


def _answer(data: bytes, limits: dict[str, Any], output: _Output) -> tuple[bytes, list[Any]]:
    """Decode one picture; the message of it, and what goes beside it."""
    try:
        picture = decode_into(data, output.new, max_bytes=len(data), **limits)
    except DecodeError as error:
        text = f"{error.reason} {error.detail}".encode(errors="replace")[:2000]
        return ANSWER.pack(NO_PICTURE, 0, 0, 0, False, 0, 0, 0, 0, 0, 0, b"", len(text)) + text, []
    size = picture.rgb.shape[:2]
    stored = picture.width_px, picture.height_px
    told = picture.num_frames, picture.shows_all
    message = ANSWER.pack(output.slot, *size, *told, *stored, *picture.box, picture.format.encode(), 0)
    if output.slot != OWN_MEMORY:
        return message, []
    return message, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [output.descriptor]))]


def main() -> None:
    """Serve until the parent closes its end or is gone."""
    memory_bytes, descriptor = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory_bytes = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.init()
    shared = mmap.mmap(descriptor, SHARED_BYTES)
    link = socket.socket(fileno=os.dup(0))
    link.sendall(b"\1")
    while True:
        size, max_pixels, shortest_px, max_seconds, slot = REQUEST.unpack(_read(link, REQUEST.size))
        data = shared[:size] if size <= INPUT_BYTES else _read(link, size)
        output = _Output(shared, slot)
        signal.setitimer(signal.ITIMER_PROF, max_seconds)
        message, beside = _answer(data, {"max_pixels": max_pixels, "shortest_px": shortest_px or None}, output)
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            sent = link.sendmsg([message], beside)
            link.sendall(message[sent:])
        except OSError:  # nobody listens any more
            sys.exit(0)
        output.close()


if __name__ == "__main__":
    main()
