"""Any Pillow picture to RGB in row blocks: what a conversion holds is small beside a large picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BLOCK_PIXELS = 1 << 22
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_CMYK_SPACE = b"CMYK"  # bytes 16 to 20 of a profile


def write_rgb(image: Any, out: np.ndarray) -> None:
    """Convert a loaded picture.

    Args:
        image: of any mode.
        out: uint8 [H, W, 3], any strides; H and W are the picture's.
    """
    convert = _converter(image)
    for top, bottom in _blocks(*image.size):
        whole = bottom - top == image.height
        out[top:bottom] = convert(image if whole else image.crop((0, top, image.width, bottom)))


def all_opaque(image: Any) -> bool:
    """Whether no pixel of a loaded picture is hidden; one with a transparent colour or palette entry may hide some."""
    if "transparency" in image.info:
        return False
    return image.mode not in _ALPHA or image.getchannel(image.getbands()[-1]).getextrema()[0] == 255


def _blocks(width: int, height: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_PIXELS // max(1, width))
    for top in range(0, height, step):
        yield top, min(height, top + step)


def _converter(image: Any) -> Callable[[Any], np.ndarray]:
    """From a block of the picture to uint8 [h, W, 3] or [h, W, 1]."""
    if image.mode.startswith("I") or image.mode == "F":
        scaled = _scaler(image)
        return lambda block: scaled(np.asarray(block))[:, :, None]
    if image.mode in _ALPHA or "transparency" in image.info:
        return _on_white
    profile = _cmyk_transform(image) if image.mode == "CMYK" else None
    if profile is not None:
        return lambda block: np.asarray(profile.apply(block))
    return lambda block: np.asarray(block.convert("RGB"))


def _on_white(block: Any) -> np.ndarray:
    from PIL import Image

    block = block.convert("RGBA")
    white = Image.new("RGBA", block.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, block).convert("RGB"))


def _cmyk_transform(image: Any) -> Any | None:
    """From the embedded CMYK profile to sRGB; None without one that works.

    Perceptual is what such profiles hold tables for first of all. Pillow has turned the inverted values of Adobe's
    files already, so 0 is no ink, as the profile takes it.
    """
    data = image.info.get("icc_profile")
    if not isinstance(data, bytes) or data[16:20] != _CMYK_SPACE:
        return None
    from PIL import ImageCms

    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(data)),
            ImageCms.createProfile("sRGB"),
            "CMYK",
            "RGB",
            renderingIntent=ImageCms.Intent.PERCEPTUAL,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _scaler(image: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Grey of more than 8 bits, any type [h, W], to uint8 [h, W]; the range is that of the whole picture."""

    def parts() -> Iterator[np.ndarray]:
        for top, bottom in _blocks(*image.size):
            yield np.asarray(image.crop((0, top, image.width, bottom)))

    if image.mode.startswith("I;16"):
        # round(v * 255 / 65535) in whole numbers
        return lambda values: ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low = min(float(_finite(part).min()) for part in parts())
    high = max(float(_finite(part).max()) for part in parts())
    limits = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    fitting = [limit for limit in limits if low >= 0 and high <= limit]
    if fitting:
        low, high = 0.0, fitting[0]
    factor = 255.0 / max(high - low, 1e-30)
    return lambda values: np.rint((_finite(values) - low) * factor).astype(np.uint8)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
