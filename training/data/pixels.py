"""Bytes to pixels: the one decode policy. Curation and training decode through here, so they see the same picture.

| case | what comes out |
|---|---|
| EXIF orientation | applied; a broken EXIF block is ignored |
| CMYK, YCCK | RGB by Pillow's conversion |
| 16-bit | scaled to 8 bits, not clipped |
| 32-bit integer | its own range scaled to 0..255; as 16-bit where it fits 0..65535 |
| float | the same, but 0..1 and 0..255 are scaled as such where it fits them; NaN and infinity are 0 |
| colour profile | not applied: pixels are as stored |
| palette, alpha | laid on white |
| grey | three equal channels |
| animated, multi-page | the first frame; the number of frames is told |
| cut off | ``decode_truncated``: never a picture with a grey rest |
| too many pixels, a side above ``MAX_SIDE_PX`` | ``decode_too_many_pixels``, told by the header alone |
| longer than allowed | ``decode_timeout`` (in the main thread of a process, where workers decode) |
| format outside ``FORMATS``, or no picture | ``decode_unsupported`` |
| anything else that fails | ``decode_corrupt`` |
"""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
REASONS = (
    "decode_truncated",
    "decode_corrupt",
    "decode_unsupported",
    "decode_too_many_pixels",
    "decode_timeout",
)
MAX_PIXELS = 90_000_000
MOST_PIXELS = 178_956_970  # Pillow's own guard: no setting goes beyond it
MAX_SIDE_PX = 65_500  # what a JPEG can hold
MAX_SECONDS = 30.0  # MAX_PIXELS of PNG take 3: only a file made to be slow is cut, even on a crowded machine

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_CUT_OFF = ("truncat", "unexpected end", "end of file", "eof", "not enough image data", "premature")

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it finds wrong comes as a reason, not on the terminal


class DecodeError(Exception):
    """The bytes give no picture; ``reason`` is one of ``REASONS``."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class _TimeoutError(BaseException):
    """Outside Exception, so that no handler inside a decoder swallows it."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded picture."""

    rgb: np.ndarray  # uint8 [H, W, 3], contiguous, after orientation; H, W are smaller than below only with shortest_px
    format: str  # lower case: jpeg, png, …
    num_frames: int
    width_px: int  # as stored, after orientation
    height_px: int


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_seconds: float = MAX_SECONDS, shortest_px: int | None = None
) -> Picture:
    """Decode a picture by the policy above.

    Args:
        data: the file.
        max_pixels: width times height allowed, at most ``MOST_PIXELS``.
        max_seconds: wall time allowed; held between blocks of the decoder, and in main threads only.
        shortest_px: shortest side that the caller will resize to. A JPEG is then decoded at 1/2, 1/4 or 1/8 while its
            shortest side stays at least twice that: faster, at most 2 grey levels away. None = full size.

    Raises:
        DecodeError: with the reason for the row.
    """
    from PIL import Image

    try:
        with _time_limit(max_seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data, max_pixels, shortest_px)
    except DecodeError:
        raise
    except _TimeoutError:
        raise DecodeError("decode_timeout", f"took longer than {max_seconds:g} s") from None
    except Image.DecompressionBombError as error:
        raise DecodeError("decode_too_many_pixels", str(error)) from None
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        cut_off = any(mark in text.lower() for mark in _CUT_OFF) or _ends_early(data)
        raise DecodeError("decode_truncated" if cut_off else "decode_corrupt", text) from None


def _decode(data: bytes, max_pixels: int, shortest_px: int | None) -> Picture:
    from PIL import Image, UnidentifiedImageError

    Image.init()  # a format is known only once its plugin is loaded
    try:
        image: Any = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        if not data.startswith(_MAGIC) and data[4:12] != b"ftypavif":
            raise DecodeError("decode_unsupported", "not a known format") from None
        reason = "decode_truncated" if _ends_early(data) else "decode_corrupt"
        raise DecodeError(reason, "no decoder takes it") from None
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError("decode_too_many_pixels", f"{width} x {height} pixels, {max_pixels:,} allowed")
    if max(width, height) > MAX_SIDE_PX:
        raise DecodeError("decode_too_many_pixels", f"{width} x {height} pixels, {MAX_SIDE_PX:,} a side allowed")
    name = str(image.format or "").lower()
    if shortest_px is not None and name == "jpeg":
        image.draft(None, (2 * shortest_px, 2 * shortest_px))
    if name == "tiff":
        with _quiet():
            image.load()
        width, height = image.size  # Pillow turns a TIFF as it loads
    else:
        image.load()
    orientation = _orientation(image)
    if orientation in _SWAPS_SIDES:
        width, height = height, width
    rgb = _turned(_to_rgb(image), orientation)
    return Picture(
        rgb=rgb,
        format="jpeg" if name == "mpo" else name,
        num_frames=1 if name == "mpo" else _num_frames(image),
        width_px=int(width),
        height_px=int(height),
    )


def _ends_early(data: bytes) -> bool:
    """Whether the bytes stop before the format's own end: asked only about files that did not decode."""
    for start, end_mark in ((b"\xff\xd8\xff", b"\xff\xd9"), (b"GIF8", b";")):
        if data.startswith(start):
            return not data.rstrip(b"\0").endswith(end_mark)
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith((b"II*\0", b"MM\0*")):
        directory = int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big")
        return directory + 2 > len(data)
    if data[4:12] == b"ftypavif":
        end = 0  # of the boxes that follow each other
        while end < len(data) and (size := int.from_bytes(data[end : end + 4], "big")) >= 8:
            end += size
        return end > len(data)
    return False


def _num_frames(image: Any) -> int:
    """Frames that can be reached; 1 where a later frame is broken, as only the first one is used."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:
        return 1


_SWAPS_SIDES = (5, 6, 7, 8)


def _orientation(image: Any) -> int:
    """EXIF (or XMP) orientation 1 to 8; a broken block says nothing about the pixels."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """The picture upright: EXIF 2.3, tag 0x0112."""
    if orientation in _SWAPS_SIDES:
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


def _to_rgb(image: Any) -> np.ndarray:
    """Any Pillow mode to uint8 [H, W, 3]."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        grey = _scaled(np.asarray(image))
        return np.ascontiguousarray(np.repeat(grey[:, :, None], 3, axis=2))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits, any type [H, W], to uint8 [H, W]."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        # round(v * 255 / 65535) in whole numbers
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min()), float(finite.max())
    limits = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (65535.0,)
    fitting = [limit for limit in limits if low >= 0 and high <= limit]
    if fitting:
        low, high = 0.0, fitting[0]
    return np.rint((finite - low) * (255.0 / max(high - low, 1e-30))).astype(np.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the terminal: libtiff writes what it finds wrong to file descriptor 2, past Python's warnings."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no terminal to keep quiet
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ``_TimeoutError`` in the block after ``seconds``; a timer that was set before keeps its time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    is_armed = True

    def stop(number: int, frame: object) -> None:
        if is_armed:  # an alarm that comes while the block is being left is too late to matter
            raise _TimeoutError

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


def resize_shortest(rgb: np.ndarray, shortest_px: int) -> np.ndarray:
    """Shrink to a shortest side of ``shortest_px``, antialiased; a smaller picture stays as it is.

    Args:
        rgb: uint8 [H, W, 3].
        shortest_px: wanted length of the shortest side.

    Returns:
        uint8 [H', W', 3].
    """
    import cv2

    height, width = rgb.shape[:2]
    if min(height, width) <= shortest_px:
        return rgb
    scale = shortest_px / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA))


def encode_jpeg(rgb: np.ndarray, quality: int, *, subsampling: Literal["420", "444"] = "420") -> bytes:
    """JPEG of uint8 [H, W, 3] without any metadata.

    Args:
        rgb: uint8 [H, W, 3].
        quality: 1 to 100.
        subsampling: of the chroma: 420 halves both its sides, 444 keeps them.
    """
    import simplejpeg

    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling=subsampling, fastdct=False
        )
    )
