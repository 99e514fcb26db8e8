"""Shrinking, held against Pillow's own, which is what it stands for."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from training.data.pixels import decode, resize_shortest
from training.data.resample import shrink


def by_pillow(rgb: np.ndarray, width: int, height: int, box: tuple[float, float, float, float]) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC, box=box)).astype(int)


@pytest.mark.parametrize(
    ("sides", "out"),
    [
        ((375, 500), (256, 341)),
        ((17, 16), (16, 16)),
        ((5, 3), (2, 1)),
        ((1, 40), (1, 7)),
        ((40, 1), (3, 1)),
        ((1, 1), (1, 1)),
        ((31, 2000), (2, 129)),
        ((2000, 31), (129, 2)),
        ((900, 33), (7, 33)),
        ((48, 48), (48, 48)),
        ((300, 97), (299, 96)),
        # where Pillow changes the order of its passes
        ((200, 100), (180, 90)),
        ((201, 100), (80, 40)),
        ((201, 100), (181, 90)),
        ((220, 100), (215, 95)),
        ((1000, 400), (720, 288)),
        ((400, 1000), (288, 720)),
        ((150, 100), (20, 90)),
    ],
)
def test_it_is_what_pillow_makes(sides: tuple[int, int], out: tuple[int, int]) -> None:
    rng = np.random.default_rng(sides[0] * 10_000 + sides[1])
    noise = rng.integers(0, 256, (*sides, 3), np.uint8)
    hard = (noise > 127).astype(np.uint8) * 255  # overshoots at every edge
    for rgb in (noise, hard, np.full_like(noise, 255), np.zeros_like(noise)):
        box = (0.0, 0.0, float(sides[1]), float(sides[0]))
        ours = shrink(rgb, out[1], out[0], box)
        assert ours.dtype == np.uint8
        assert ours.shape == (*out, 3)
        off = np.abs(ours.astype(int) - by_pillow(rgb, out[1], out[0], box))
        assert off.max() <= 2
        assert off.mean() < 0.1  # its weights are whole numbers: seen where many of them add up


@pytest.mark.parametrize("box", [(0.0, 0.0, 99.5, 60.0), (0.5, 0.75, 100.0, 61.0), (10.25, 3.0, 80.5, 60.125)])
def test_a_box_need_not_be_whole_pixels(box: tuple[float, float, float, float]) -> None:
    rgb = np.random.default_rng(3).integers(0, 256, (61, 100, 3), np.uint8)
    assert np.abs(shrink(rgb, 37, 23, box).astype(int) - by_pillow(rgb, 37, 23, box)).max() <= 1


def test_arrays_of_any_strides_and_read_only_ones() -> None:
    rgb = np.random.default_rng(4).integers(0, 256, (80, 120, 3), np.uint8)
    box = (0.0, 0.0, 80.0, 120.0)
    turned = rgb.transpose(1, 0, 2)
    expected = shrink(np.ascontiguousarray(turned), 20, 30, box)
    assert np.array_equal(shrink(turned, 20, 30, box), expected)
    kept = np.ascontiguousarray(turned)
    kept.flags.writeable = False
    assert np.array_equal(shrink(kept, 20, 30, box), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_decode_does_not_shift_the_picture(orientation: int) -> None:
    """Sides that no scale divides: the decoder rounds up, and what it adds is no part of the picture."""
    x, y = np.meshgrid(np.arange(1003), np.arange(805))
    rgb = np.stack([127 + 120 * np.sin(x / 9) * np.cos(y / 7), x * 255 // 1003, y * 255 // 805], 2).astype(np.uint8)
    out = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(out, "JPEG", quality=95, subsampling=0, exif=exif)
    full, scaled = decode(out.getvalue()), decode(out.getvalue(), shortest_px=100)
    assert max(scaled.rgb.shape) == 251
    assert full.box == (0, 0, full.width_px, full.height_px)
    left, top, right, bottom = scaled.box
    assert (right - left, bottom - top) == (full.width_px / 4, full.height_px / 4)
    expected = resize_shortest(full.rgb, 100).astype(int)
    height, width = expected.shape[:2]
    off = np.abs(resize_shortest(scaled.rgb, 100, scaled.box) - expected).mean()
    shifted = np.abs(by_pillow(scaled.rgb, width, height, (0.0, 0.0, *scaled.rgb.shape[1::-1])) - expected).mean()
    assert off < 0.6
    assert off < 0.5 * shifted
