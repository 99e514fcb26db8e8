"""The bytes behind every address: good pictures in many formats, copies of them, and files that are no good picture."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from pipelines.sample_web.photos import FACE_PX, HEAD_PX, Pixels, installed_photos

FACE_SIZES_PX = (24, 48, 80, 120, 160)  # height of the planted face
BASE_QUALITY = 92
_BOMB_SIDE_PX = 30_000
_SHORTEST_COPY_PX = 128

EXTENSIONS = {"png16": "png", "alpha_png": "png", "animated_gif": "gif", "webp": "webp", "bomb": "png", "tiny": "png"}
MIME_TYPES = {"jpg": "image/jpeg", "png": "image/png", "gif": "image/gif", "webp": "image/webp"}


def _jpeg(pixels: NDArray[np.uint8], quality: int, **options: object) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, **options)
    return stream.getvalue()


def encode(how: str, pixels: Pixels, rng: np.random.Generator) -> bytes:
    """A picture as the kind ``how`` stores it. Copies have at most the pixels and, with equal pixels, fewer bytes."""
    match how:
        case "reencoded":
            return _jpeg(pixels, int(rng.integers(35, 76)))
        case "resized":
            scale = max(0.5, _SHORTEST_COPY_PX / min(pixels.shape[:2]))
            return _jpeg(_resized(pixels, round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)), 85)
        case "crop":
            height, width = (round(side * rng.uniform(0.8, 0.9)) for side in pixels.shape[:2])
            top, left = (int(rng.integers(0, s - part)) for s, part in zip(pixels.shape, (height, width), strict=False))
            return _jpeg(pixels[top : top + height, left : left + width], 85)
        case "overlay":
            return _jpeg(_with_caption(pixels, rng), 80)
        case "truncated_file":
            data = _jpeg(pixels, BASE_QUALITY)
            return data[: int(len(data) * 0.6)]
        case _:
            return _in_format(how, pixels, rng)


def _in_format(how: str, pixels: Pixels, rng: np.random.Generator) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    match how:
        case "cmyk_jpeg":
            image.convert("CMYK").save(stream, "JPEG", quality=90)
        case "grey_jpeg":
            image.convert("L").save(stream, "JPEG", quality=90)
        case "png16":
            return _png16(pixels, grey=bool(rng.integers(2)))
        case "animated_gif":
            first = image.resize((image.width * 3 // 4, image.height * 3 // 4)).quantize(128)
            others = [first.rotate(angle) for angle in (90, 180)]
            first.save(stream, "GIF", save_all=True, append_images=others, duration=100, loop=0)
        case "exif_rotated":
            orientation = int(rng.choice([3, 6, 8]))
            stored = image.rotate({3: 180, 6: 90, 8: 270}[orientation], expand=True)  # undone by the tag
            exif = Image.Exif()
            exif[0x0112] = orientation
            stored.save(stream, "JPEG", quality=90, exif=exif)
        case "alpha_png":
            image.putalpha(Image.fromarray(_rounded(pixels.shape[0], pixels.shape[1])))
            image.save(stream, "PNG", compress_level=1)
        case "webp":
            image.save(stream, "WEBP", quality=85, method=2)
        case _:
            image.save(stream, "JPEG", quality=BASE_QUALITY)
    return stream.getvalue()


def _resized(pixels: Pixels, width: int, height: int) -> Pixels:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _with_caption(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """A bar with words over 10 to 15 % of the height, at the top or at the bottom."""
    import cv2

    out = pixels.copy()
    bar = round(out.shape[0] * rng.uniform(0.10, 0.15))
    top = 0 if rng.integers(2) else out.shape[0] - bar
    dark = bool(rng.integers(2))
    out[top : top + bar] = 20 if dark else 235
    words = "".join(chr(c) for c in rng.integers(97, 123, 14))
    ink = (240, 240, 240) if dark else (10, 10, 10)
    cv2.putText(out, words, (8, top + bar * 3 // 4), cv2.FONT_HERSHEY_SIMPLEX, bar / 45, ink, 2, cv2.LINE_AA)
    return out


def _rounded(height: int, width: int) -> NDArray[np.uint8]:
    """Alpha that is clear in the corners only, uint8 [height, width]."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return np.asarray(np.clip((2.6 - x**4 - y**4) * 255 / 0.8, 0, 255), np.uint8)


def with_face(pixels: Pixels, face_px: int, rng: np.random.Generator) -> tuple[Pixels, tuple[float, ...]]:
    """The astronaut's head set into a picture, her face ``face_px`` high; the picture and the face's x, y, w, h.

    A head that would not fit is made smaller.
    """
    x, y, w, h = HEAD_PX
    head = installed_photos()["astronaut"][y : y + h, x : x + w]
    scale = min(face_px / FACE_PX[3], 0.7 * pixels.shape[0] / h, 0.7 * pixels.shape[1] / w)
    width, height = round(w * scale), round(h * scale)
    head = _resized(head, width, height)
    face_x = FACE_PX[0] - x
    if rng.integers(2):
        head = head[:, ::-1]
        face_x = w - face_x - FACE_PX[2]
    left, top = int(rng.integers(0, pixels.shape[1] - width)), int(rng.integers(0, pixels.shape[0] - height))
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    alpha = np.clip((1.0 - rows**2 - columns**2) * 6, 0, 1)[..., None]
    out = pixels.copy()
    window = out[top : top + height, left : left + width]
    window[:] = (head * alpha + window * (1 - alpha)).round().astype(np.uint8)
    corner = (left + face_x * scale, top + (FACE_PX[1] - y) * scale)
    return out, (*corner, FACE_PX[2] * scale, FACE_PX[3] * scale)


# PNG, written by hand where Pillow cannot.


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *, depth: int, colour: int, stream: bytes, note: str = "") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    text = _chunk(b"tEXt", b"Comment\0" + note.encode()) if note else b""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + text + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")


def _png16(pixels: Pixels, *, grey: bool) -> bytes:
    """16 bits a channel, grey or colour; each value v stored as 257 v, so that 8 bits give v again."""
    values = pixels.mean(axis=2, keepdims=True).round().astype(">u2") if grey else pixels.astype(">u2")
    values = (values * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    height, width = pixels.shape[:2]
    return _png(width, height, depth=16, colour=0 if grey else 2, stream=zlib.compress(rows, 1))


@functools.cache
def _bomb_stream() -> bytes:
    """One bit a pixel, all black, as a zlib stream of about 110 kB."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (_BOMB_SIDE_PX + 7) // 8)
    return b"".join(packer.compress(row * 100) for _ in range(_BOMB_SIDE_PX // 100)) + packer.flush()


def _corrupt(noise: bytes, *, png: bool) -> bytes:
    """The first bytes of a picture, then noise."""
    if png:
        return _png(320, 240, depth=8, colour=2, stream=noise)
    jfif = b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
    return b"\xff\xd8\xff\xe0" + struct.pack(">H", 16) + jfif + b"\xff\xdb\x00\x43\x00" + noise


def bad_file(how: str, rng: np.random.Generator) -> bytes:
    """A file that a correct run drops for what it is: bomb, corrupt, tiny, wide, blank, html_as_jpg."""
    match how:
        case "bomb":
            side, note = _BOMB_SIDE_PX, str(rng.integers(1 << 40))
            return _png(side, side, depth=1, colour=0, stream=_bomb_stream(), note=note)
        case "corrupt":
            return _corrupt(rng.bytes(4000), png=bool(rng.integers(2)))
        case "tiny":
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            return _png(16, 16, depth=8, colour=2, stream=zlib.compress(b"".join(b"\0" + r.tobytes() for r in pixels)))
        case "wide":
            return _jpeg(_resized(rng.integers(0, 256, (12, 120, 3), dtype=np.uint8), 1600, 160), 85)
        case "blank":
            height, width = (int(side) for side in rng.integers(200, 400, 2))
            colour = rng.integers(0, 256, 3, dtype=np.uint8)
            return _jpeg(np.broadcast_to(colour, (height, width, 3)).copy(), 90)
        case _:
            return f"<!DOCTYPE html><title>gone</title><p>This picture has moved ({rng.integers(1 << 40)}).".encode()
