"""Bytes to pixels: the one decode policy. Curation and training decode through here, so they see the same picture.

| case | what comes out |
|---|---|
| EXIF orientation | applied; a broken EXIF block is ignored |
| CMYK, YCCK | RGB by Pillow's conversion |
| 16-bit, 32-bit integer | scaled to 8 bits, not clipped |
| palette, alpha | laid on white |
| grey | three equal channels |
| animated, multi-page | the first frame; the number of frames is told |
| cut off | ``decode_truncated``: never a picture with a grey rest |
| more pixels than allowed | ``decode_too_many_pixels``, from the header, before memory is asked for |
| longer than allowed | ``decode_timeout`` (in the main thread of a process, where workers decode) |
| format outside ``FORMATS``, or no picture | ``decode_unsupported`` |
| anything else that fails | ``decode_corrupt`` |
"""

from __future__ import annotations

import io
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
REASONS = (
    "decode_truncated",
    "decode_corrupt",
    "decode_unsupported",
    "decode_too_many_pixels",
    "decode_timeout",
)
MAX_PIXELS = 90_000_000
MAX_SECONDS = 10.0

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")
_CUT_OFF = ("truncat", "unexpected end", "end of file", "eof", "not enough image data", "premature")


class DecodeError(Exception):
    """The bytes give no picture; ``reason`` is one of ``REASONS``."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class _TimeoutError(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded picture."""

    rgb: np.ndarray  # uint8 [height_px, width_px, 3], after orientation
    format: str  # lower case: jpeg, png, …
    num_frames: int

    @property
    def width_px(self) -> int:
        """Width after orientation."""
        return int(self.rgb.shape[1])

    @property
    def height_px(self) -> int:
        """Height after orientation."""
        return int(self.rgb.shape[0])


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, max_seconds: float = MAX_SECONDS) -> Picture:
    """Decode a picture by the policy above.

    Args:
        data: the file.
        max_pixels: width times height allowed.
        max_seconds: wall time allowed; held between blocks of the decoder, and in main threads only.

    Raises:
        DecodeError: with the reason for the row.
    """
    try:
        with _time_limit(max_seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data, max_pixels)
    except DecodeError:
        raise
    except _TimeoutError:
        raise DecodeError("decode_timeout", f"took longer than {max_seconds:g} s") from None
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        cut_off = any(mark in text.lower() for mark in _CUT_OFF)
        raise DecodeError("decode_truncated" if cut_off else "decode_corrupt", text) from None


def _decode(data: bytes, max_pixels: int) -> Picture:
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # the limit below is ours, and comes before memory is asked for
    try:
        image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        known = data.startswith(_MAGIC)
        raise DecodeError(
            "decode_corrupt" if known else "decode_unsupported",
            "no decoder takes it" if known else "not a known format",
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError("decode_too_many_pixels", f"{width} x {height} pixels, {max_pixels:,} allowed")
    name = str(image.format or "").lower()
    num_frames = int(getattr(image, "n_frames", 1)) if name != "mpo" else 1
    image.seek(0)
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        image = image.copy()
    rgb = _to_rgb(image)
    return Picture(rgb=rgb, format="jpeg" if name == "mpo" else name, num_frames=num_frames)


def _to_rgb(image: Any) -> np.ndarray:
    """Any Pillow mode to uint8 [H, W, 3]."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        scale = 255.0 if image.mode == "F" else 65535.0
        grey = np.clip(np.rint(values * (255.0 / scale)), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(grey[:, :, None], 3, axis=2))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def encode_jpeg(rgb: np.ndarray, quality: int) -> bytes:
    """JPEG of uint8 [H, W, 3], 4:2:0, without any metadata."""
    import simplejpeg

    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
        )
    )
