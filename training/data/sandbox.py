"""Decoding in a child process: a file made to harm costs a row, not a worker.

The child (sandbox_child.py) imports NumPy, Pillow and simplejpeg only and writes nothing to the terminal. It ends when
its parent does: its standard input is a socket whose other end only the parent holds.

| what happens | the row |
|---|---|
| a picture takes ``max_seconds`` of CPU time | the kernel ends the child, also inside C: ``decode_timeout`` |
| no answer for ``wall_limit_s`` | the parent ends the child: ``decode_timeout`` |
| the child dies, or its memory is used up | once more in a fresh child, then ``decode_crashed`` |

The second try is there so that a row tells of its picture alone: not of a child that others left half broken, nor of
one that somebody killed. CPU time does not depend on what else the machine does; wall time is a backstop.

Bytes and pixels lie in memory that both processes map, so nothing is copied: a file where ``INPUT_BYTES`` hold it (else
it goes through the socket), and a picture in one of a few slots, which is used again once no array stands on it (a
picture that is larger, or finds no slot free, gets memory of its own).
"""

from __future__ import annotations

import array
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from training.data.pixels import MAX_BYTES, MAX_PIXELS, MAX_SECONDS, DecodeError, Picture

INPUT_BYTES = SLOT_BYTES = 1 << 24
NUM_SLOTS = 3  # the picture in hand, the one before it, and one to spare
SHARED_BYTES = INPUT_BYTES + NUM_SLOTS * SLOT_BYTES
OWN_MEMORY, NO_PICTURE = -1, -2  # in place of a slot
REQUEST = struct.Struct("<qqqdi")  # bytes of the file, max_pixels, shortest_px or 0, max_seconds, slot
# Slot, H, W, frames, whether all is shown, stored width and height, box, format, bytes of text that follow.
ANSWER = struct.Struct("<iqqq?qqdddd8sI")
_ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_START_S = 120.0


class _DeadError(Exception):
    """The child is gone; ``timed_out`` tells whether a limit of time was the cause."""

    def __init__(self, detail: str, *, timed_out: bool) -> None:
        self.timed_out = timed_out
        super().__init__(detail)


class DecoderProcess:
    """``pixels.decode`` in a child process, which is started on first use and again after it died.

    Args:
        max_bytes: length of a file allowed.
        max_pixels: width times height allowed.
        max_seconds: CPU time of a picture.
        memory_bytes: address space of the child; None: enough for every picture of ``max_pixels``.
    """

    def __init__(
        self,
        *,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        max_seconds: float = MAX_SECONDS,
        memory_bytes: int | None = None,
    ) -> None:
        self._max_bytes, self._max_pixels, self._max_seconds = max_bytes, max_pixels, max_seconds
        # 8 bytes a pixel: 4 of Pillow's picture, 3 of the pixels that come out, 1 to spare
        self._memory_bytes = memory_bytes or 300_000_000 + 2 * max_bytes + 8 * max_pixels
        self.wall_limit_s = 10 * max_seconds + 10
        self.deaths = 0
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return self._child.process.pid if self._child is not None else None

    def decode(self, data: bytes, *, shortest_px: int | None = None) -> Picture:
        """Decode a picture.

        Args:
            data: the file.
            shortest_px: as in ``pixels.decode``.

        Raises:
            DecodeError: with the reason for the row.
        """
        if len(data) > self._max_bytes:
            raise DecodeError("decode_too_many_bytes", f"{len(data):,} bytes, {self._max_bytes:,} allowed")
        try:
            return self._decode(data, shortest_px or 0)
        except DecodeError as error:
            if error.reason != "decode_crashed":
                raise
        return self._decode(data, shortest_px or 0)  # by a fresh child

    def close(self) -> None:
        """End the child; the next picture starts another one."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _decode(self, data: bytes, shortest_px: int) -> Picture:
        if self._child is None:
            self._child = _Child(self._memory_bytes, self.wall_limit_s)
        try:
            return self._child.decode(data, (self._max_pixels, shortest_px, self._max_seconds))
        except _DeadError as error:
            self.close()
            self.deaths += 1
            raise DecodeError("decode_timeout" if error.timed_out else "decode_crashed", str(error)) from None
        except DecodeError as error:
            if error.reason == "decode_crashed":  # out of memory: what others left there may be why
                self.close()
            raise
        except BaseException:  # its answer may still come, and would be taken for that of the next picture
            self.close()
            raise


class _Child:
    """One process, and the memory that is shared with it."""

    def __init__(self, memory_bytes: int, wall_limit_s: float) -> None:
        link, its_link = socket.socketpair()
        descriptor = os.memfd_create("pictures")
        os.ftruncate(descriptor, SHARED_BYTES)
        path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path)}
        command = [sys.executable, "-P", "-m", "training.data.sandbox_child", str(memory_bytes), str(descriptor)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=its_link.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[descriptor],
                env=environment,
            )
            self._memory = mmap.mmap(descriptor, SHARED_BYTES)
        finally:
            its_link.close()
            os.close(descriptor)
        self._link = link
        self._free = set(range(NUM_SLOTS))
        self.end = weakref.finalize(self, _end, self.process, link)
        _set_timeout(link, _START_S)
        try:
            greeting = link.recv(1)
        except OSError:
            greeting = b""
        _set_timeout(link, wall_limit_s)
        if not greeting:
            self.end()
            raise RuntimeError(f"the decoder does not start: {' '.join(command)}: {_why_not(command, environment)}")

    def decode(self, data: bytes, limits: tuple[int, int, float]) -> Picture:
        """Ask for a picture; ``limits`` are max_pixels, shortest_px and max_seconds."""
        slot = min(self._free, default=OWN_MEMORY)
        is_shared = len(data) <= INPUT_BYTES
        if is_shared:
            self._memory[: len(data)] = data
        try:
            self._link.sendall(REQUEST.pack(len(data), *limits, slot))
            if not is_shared:
                self._link.sendall(data)
            return self._answer()
        except BlockingIOError:
            raise _DeadError("no answer within the limit of wall time", timed_out=True) from None
        except ConnectionError:
            raise self._died(limits[2]) from None
        except (ValueError, IndexError, struct.error) as error:
            raise _DeadError(f"the decoder answers nonsense ({error})", timed_out=False) from None

    def _answer(self) -> Picture:
        received, descriptors = bytearray(), array.array("i")
        wanted = ANSWER.size
        while len(received) < wanted:
            part, beside, _, _ = self._link.recvmsg(4096, socket.CMSG_SPACE(descriptors.itemsize))
            for _, _, content in beside:
                descriptors.frombytes(content)
            if not part:
                raise ConnectionError
            received += part
            if wanted == ANSWER.size <= len(received):
                wanted += ANSWER.unpack_from(received)[-1]
        slot, height, width, num_frames, shows_all, width_px, height_px, *box, name, _ = ANSWER.unpack_from(received)
        if slot == NO_PICTURE:
            reason, _, detail = received[ANSWER.size :].decode(errors="replace").partition(" ")
            raise DecodeError(reason, detail)
        return Picture(
            rgb=self._pixels(slot, descriptors, height * width * 3).reshape(height, width, 3),
            format=name.rstrip(b"\0").decode(),
            num_frames=num_frames,
            shows_all=shows_all,
            width_px=width_px,
            height_px=height_px,
            box=(box[0], box[1], box[2], box[3]),
        )

    def _pixels(self, slot: int, descriptors: array.array[int], size: int) -> np.ndarray:
        """uint8 [size]; all that is made of it without a copy keeps it alive."""
        if slot == OWN_MEMORY:
            try:
                pixels = np.frombuffer(mmap.mmap(descriptors[0], size), np.uint8)
                # A map holds a descriptor, and thousands of small pictures may wait together.
                return pixels.copy() if size <= SLOT_BYTES else pixels
            finally:
                os.close(descriptors[0])
        pixels = np.frombuffer(self._memory, np.uint8, size, INPUT_BYTES + slot * SLOT_BYTES)
        self._free.discard(slot)
        weakref.finalize(pixels, self._free.add, slot).atexit = False
        return pixels

    def _died(self, max_seconds: float) -> _DeadError:
        """What ended the child."""
        try:
            status = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return _DeadError("the decoder closed its connection", timed_out=False)
        if status == -signal.SIGPROF:
            return _DeadError(f"took longer than {max_seconds:g} s of CPU time", timed_out=True)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return _DeadError(f"the decoder ended by {how}", timed_out=False)


def _why_not(command: list[str], environment: dict[str, str]) -> str:
    """The last line of what a child that does not start writes: it is run once more, without a link to serve."""
    try:
        ended = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=_START_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (ended.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {ended.returncode}"])[-1]


def _set_timeout(link: socket.socket, seconds: float) -> None:
    """Of each single call, held by the kernel: the timeout of a Python socket costs two more system calls each."""
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _end(process: subprocess.Popen[Any], link: socket.socket) -> None:
    link.close()
    process.kill()
    process.wait()
