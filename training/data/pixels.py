"""Bytes to pixels: the one decode policy. Curation and training decode through here, so they see the same picture.

| case | what comes out |
|---|---|
| ordinary JPEG (grey, YCbCr or RGB, undamaged) | by simplejpeg: Pillow's pixels in every byte, faster |
| EXIF orientation | applied; a broken EXIF block is ignored |
| CMYK, YCCK with a CMYK profile | sRGB by that profile, perceptual |
| CMYK, YCCK without one, or with a broken one | RGB by Pillow's conversion |
| colour profile of RGB or grey | not applied: pixels are as stored, as the readers of other trainers take them |
| 16-bit grey | scaled to 8 bits, not clipped |
| 16-bit colour (PNG, TIFF) | the high byte |
| 32-bit integer | its own range scaled to 0..255; as 16-bit where it fits 0..65535 |
| float | the same, but 0..1 and 0..255 are scaled as such where it fits them; NaN and infinity are 0 |
| palette, alpha | laid on white |
| grey | three equal channels |
| animated, multi-page | the first frame; the number of frames is told, up to ``MAX_FRAMES`` |
| multi-picture (MPO) | a JPEG of one frame: its first picture |
| HEIF | as any other where the extra ``heif`` is installed, else ``decode_unsupported`` |
| cut off, a JPEG with an end mark set behind the cut among them | ``decode_truncated``: no picture with a grey rest |
| the same JPEG, and damaged before the cut | the rest is grey: libjpeg tells the first damage only |
| PNG whose compressed data say that they end early | the rest is black: Pillow does not tell it |
| more than ``max_bytes`` | ``decode_too_many_bytes`` |
| too many pixels, a side above ``MAX_SIDE_PX`` | ``decode_too_many_pixels``, told by the header alone |
| WebP, AVIF, HEIF, progressive JPEG above ``HEAVY_PIXELS`` | the same: their decoders hold a picture several times |
| longer than allowed | ``decode_timeout`` (here in the main thread of a process; see sandbox.py) |
| JPEG of more than ``MAX_SCANS`` scans | the same, untried: each goes over the whole picture |
| the decoder dies, or is out of memory | ``decode_crashed`` |
| format outside ``FORMATS``, or no picture | ``decode_unsupported`` |
| anything else that fails | ``decode_corrupt`` |
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from training.data.modes import all_opaque, write_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # and HEIF, where its plugin is installed
REASONS = (
    "decode_truncated",
    "decode_corrupt",
    "decode_unsupported",
    "decode_too_many_bytes",
    "decode_too_many_pixels",
    "decode_timeout",
    "decode_crashed",
)
MAX_BYTES = 100_000_000
MAX_PIXELS = 90_000_000
MOST_PIXELS = 178_956_970  # Pillow's own guard: no setting goes beyond it
HEAVY_PIXELS = 45_000_000
MAX_SIDE_PX = 65_500  # what a JPEG can hold
MAX_SCANS = 100  # encoders write about 10; of hundreds one small file takes many seconds
MAX_FRAMES = 1000  # stands for that many or more: the time to count all those that a file may hold has no limit
# Of CPU time. MAX_PIXELS of PNG take 3, a CMYK profile 4, HEAVY_PIXELS of noise as AVIF 5: only a file made to be slow
# is cut. Wall time in this process is not CPU time: it gets three times as much, for a crowded machine.
MAX_SECONDS = 10.0
MAX_WALL_SECONDS = 3 * MAX_SECONDS

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HEAVY = ("webp", "avif", "heif")
_CUT_OFF = ("truncat", "unexpected end", "end of file", "eof", "not enough image data", "premature")

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it finds wrong comes as a reason, not on the terminal


Box = tuple[float, float, float, float]  # left, top, right, bottom


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
    num_frames: int  # at most MAX_FRAMES
    shows_all: bool  # False: the file holds pixels that ``rgb`` does not show: other frames, or what alpha hides
    width_px: int  # as stored, after orientation
    height_px: int
    box: Box  # the part of ``rgb`` that shows the picture: all of it, but for a decoder's rounding up with shortest_px


def decode(
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_WALL_SECONDS,
    shortest_px: int | None = None,
) -> Picture:
    """Decode a picture by the policy above, in this process: for bytes that were decoded before.

    Bytes from anywhere belong into ``sandbox.DecoderProcess``.

    Args:
        data: the file.
        max_bytes: length of the file allowed.
        max_pixels: width times height allowed, at most ``MOST_PIXELS``.
        max_seconds: wall time allowed; held between blocks of the decoder, and in main threads only.
        shortest_px: shortest side that the caller will resize to. A JPEG is then decoded at 1/2, 1/4 or 1/8 while its
            shortest side stays at least twice that: faster, and what is shrunk from its ``box`` differs by some tenths
            of a grey level in the mean. None = full size.

    Raises:
        DecodeError: with the reason for the row.
    """
    try:
        with _time_limit(max_seconds):
            return decode_into(data, _new, max_bytes=max_bytes, max_pixels=max_pixels, shortest_px=shortest_px)
    except _TimeoutError:
        raise DecodeError("decode_timeout", f"took longer than {max_seconds:g} s") from None


def decode_into(
    data: bytes,
    new: Callable[[int, int], np.ndarray],
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    shortest_px: int | None = None,
) -> Picture:
    """Decode as ``decode`` does, without a time limit, into memory of the caller.

    Args:
        data: the file.
        new: from height and width to a contiguous uint8 [H, W, 3], once a picture.
        max_bytes: as in ``decode``.
        max_pixels: as in ``decode``.
        shortest_px: as in ``decode``.

    Raises:
        DecodeError: with the reason for the row.
    """
    from PIL import Image

    if len(data) > max_bytes:
        raise DecodeError("decode_too_many_bytes", f"{len(data):,} bytes, {max_bytes:,} allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data, new, max_pixels, shortest_px)
    except DecodeError:
        raise
    except MemoryError:
        raise DecodeError("decode_crashed", "out of memory") from None
    except Image.DecompressionBombError as error:
        raise DecodeError("decode_too_many_pixels", str(error)) from None
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        cut_off = any(mark in text.lower() for mark in _CUT_OFF) or _ends_early(data)
        raise DecodeError("decode_truncated" if cut_off else "decode_corrupt", text) from None


def _new(height: int, width: int) -> np.ndarray:
    return np.empty((height, width, 3), np.uint8)


def _decode(data: bytes, new: Callable[[int, int], np.ndarray], max_pixels: int, shortest_px: int | None) -> Picture:
    image = _opened(data)
    name = "jpeg" if image.format == "MPO" else str(image.format or "").lower()
    _check_size(image, name, max_pixels)
    width, height = image.size  # as stored
    orientation, rgb, is_opaque = 1, None, True
    if name == "jpeg":
        _check_scans(data)
        orientation = _orientation(image)
        rgb = _plain_jpeg(image, data, new, orientation, shortest_px)
    if rgb is None:
        if shortest_px is not None and name == "jpeg":
            image.draft(None, (2 * shortest_px, 2 * shortest_px))
        with _quiet() if name == "tiff" else nullcontext():
            image.load()
        if name != "jpeg":
            width, height = image.size  # Pillow turns a TIFF as it loads
            orientation = _orientation(image)  # of a PNG it loads the pixels too, and keeps quiet about what is wrong
        is_opaque = all_opaque(image)
        rgb = new(*(image.size if orientation in _SWAPS_SIDES else image.size[::-1]))
        write_rgb(image, _as_stored(rgb, orientation))
    if orientation in _SWAPS_SIDES:
        width, height = height, width
    num_frames = 1 if image.format == "MPO" else _num_frames(image)
    return Picture(
        rgb=rgb,
        format=name,
        num_frames=num_frames or 1,  # of what is broken behind its first frame, only that one can be used
        shows_all=num_frames == 1 and is_opaque and "mp" not in image.info,  # mp: a JPEG that names further pictures
        width_px=int(width),
        height_px=int(height),
        box=_box(rgb, int(width), int(height), orientation),
    )


def _opened(data: bytes) -> Any:
    """The picture with its header read, and no pixel."""
    from PIL import Image, UnidentifiedImageError

    Image.init()  # a format is known only once its plugin is loaded
    is_heif = data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and b"avif" not in data[8:64]  # mif1 may be either
    if is_heif and not _has_heif():
        raise DecodeError("decode_unsupported", "HEIF: pip install 'lvd[heif]'")
    try:
        formats = ["HEIF"] if is_heif else [name for name in FORMATS if name in Image.OPEN]
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        if not data.startswith(_MAGIC) and data[4:12] != b"ftypavif" and not is_heif:
            raise DecodeError("decode_unsupported", "not a known format") from None
        reason = "decode_truncated" if _ends_early(data) else "decode_corrupt"
        raise DecodeError(reason, "no decoder takes it") from None


def _has_heif() -> bool:
    """Whether Pillow reads HEIF now: registered on first use, where it is installed."""
    from PIL import Image

    if "HEIF" not in Image.OPEN and find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener(decode_threads=1)
    return "HEIF" in Image.OPEN


def _check_size(image: Any, name: str, max_pixels: int) -> None:
    width, height = image.size
    if name in _HEAVY or "progressive" in image.info:
        max_pixels = min(max_pixels, HEAVY_PIXELS)
    if width * height > max_pixels:
        raise DecodeError("decode_too_many_pixels", f"{width} x {height} pixels, {max_pixels:,} allowed")
    if max(width, height) > MAX_SIDE_PX:
        raise DecodeError("decode_too_many_pixels", f"{width} x {height} pixels, {MAX_SIDE_PX:,} a side allowed")


_SEGMENT = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")  # a marker that a length follows, or the end mark


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG of too many scans; bytes of metadata that look like one are passed over."""
    if data.count(b"\xff\xda") <= MAX_SCANS:
        return
    num_scans, place = 0, 2
    while (found := _SEGMENT.search(data, place)) and found[0] != b"\xff\xd9":
        num_scans += found[0] == b"\xff\xda"
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    if num_scans > MAX_SCANS:
        raise DecodeError("decode_timeout", f"{num_scans:,} scans, {MAX_SCANS:,} allowed")


def _plain_jpeg(
    image: Any, data: bytes, new: Callable[[int, int], np.ndarray], orientation: int, shortest_px: int | None
) -> np.ndarray | None:
    """Pixels of an ordinary JPEG by simplejpeg, upright; None where Pillow has to say what comes out."""
    if image.mode == "CMYK":
        _strictly(data, "CMYK", min_height=1, min_width=1)  # the smallest scale: only whether it is cut off
    if image.mode not in ("L", "RGB") or image.bits != 8 or "transparency" in image.info:
        return None
    width, height = image.size
    shrink = 1
    if shortest_px is not None and min(width, height) >= 16:  # below, other factors give the same size
        while shrink < 8 and min(width, height) // (2 * shrink) >= 2 * shortest_px:
            shrink *= 2
    stored = -(-height // shrink), -(-width // shrink)
    upright = stored[::-1] if orientation in _SWAPS_SIDES else stored
    rgb = new(*upright)
    into = rgb if orientation == 1 else _new(*stored)
    decoded = _strictly(
        data,
        "RGB",
        fastdct=False,
        fastupsample=False,
        min_height=stored[0] if shrink > 1 else 0,
        min_width=stored[1] if shrink > 1 else 0,
        buffer=into,
    )
    if decoded is None:
        return None
    if decoded.shape[:2] != stored:  # two headers that differ: the rest of the memory would stay as it was
        return None
    if orientation != 1:
        _as_stored(rgb, orientation)[...] = into
    return rgb


def _strictly(data: bytes, colours: str, **options: Any) -> np.ndarray | None:
    """A JPEG by simplejpeg; None where it is damaged, be it only a little. Of a cut off one Pillow fills the rest."""
    import simplejpeg

    try:
        return np.asarray(simplejpeg.decode_jpeg(data, colours, strict=True, **options))
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise DecodeError("decode_truncated", str(error)) from None
        return None


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
    if data[4:8] == b"ftyp":
        end = 0  # of the boxes that follow each other
        while end < len(data) and (size := int.from_bytes(data[end : end + 4], "big")) >= 8:
            end += size
        return end > len(data)
    return False


def _num_frames(image: Any) -> int | None:
    """Frames that can be reached, at most ``MAX_FRAMES``; None where a later one is broken."""
    frame = 1
    try:
        if image.format != "TIFF":
            return min(int(getattr(image, "n_frames", 1)), MAX_FRAMES)
        for frame in range(1, MAX_FRAMES):  # n_frames would read all, and look for each among all before it
            image.seek(frame)
    except EOFError:
        return frame
    except Exception:
        return None
    return MAX_FRAMES


_SWAPS_SIDES, _FROM_BOTTOM, _FROM_RIGHT = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)


def _orientation(image: Any) -> int:
    """EXIF (or XMP) orientation 1 to 8; a broken block says nothing about the pixels."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _as_stored(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """The upright picture seen in the order of the file (EXIF 2.3, tag 0x0112): what is written there is turned."""
    if orientation in _FROM_BOTTOM:
        rgb = rgb[::-1]
    if orientation in _FROM_RIGHT:
        rgb = rgb[:, ::-1]
    return rgb.transpose(1, 0, 2) if orientation in _SWAPS_SIDES else rgb


def _box(rgb: np.ndarray, width: int, height: int, orientation: int) -> Box:
    """Where a picture lies whose sides a scaled decode rounded up: at the side at which its rows and columns begin."""
    shrink = round(max(width / rgb.shape[1], height / rgb.shape[0]))
    left = rgb.shape[1] - width / shrink if orientation in _FROM_RIGHT else 0.0
    top = rgb.shape[0] - height / shrink if orientation in _FROM_BOTTOM else 0.0
    return left, top, left + width / shrink, top + height / shrink


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


def resize_shortest(rgb: np.ndarray, shortest_px: int, box: Box | None = None) -> np.ndarray:
    """Shrink to a shortest side of ``shortest_px``, antialiased bicubic; a smaller picture stays as it is.

    At most 2 grey levels from Pillow's BICUBIC, at a sixth of its time.

    Args:
        rgb: uint8 [H, W, 3].
        shortest_px: wanted length of the shortest side.
        box: the part to shrink, as ``Picture.box`` has it; None: all.

    Returns:
        uint8 [H', W', 3].
    """
    left, top, right, bottom = box or (0.0, 0.0, float(rgb.shape[1]), float(rgb.shape[0]))
    shortest = min(right - left, bottom - top)
    if shortest <= shortest_px:
        return rgb
    from training.data.resample import shrink

    scale = shortest_px / shortest
    width, height = (max(1, round(side * scale)) for side in (right - left, bottom - top))
    return shrink(rgb, width, height, (left, top, right, bottom))


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
