"""Labelled files to squares of pixels."""

import io

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from training.config import ConfigError, EvalConfig, ViewConfig
from training.eval import pictures
from training.eval.pictures import Preparation, read_pictures


def png(rgb: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()


def noise(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rows():
    yield "a", "dog", png(noise(0))
    yield "b", "cat", b"no picture"
    yield "c", None, png(noise(1))
    yield "d", "cat", png(noise(2, 70, 30))


@pytest.mark.parametrize("size", [(40, 60), (61, 47), (24, 24)])
def test_a_square_is_that_of_torchvision(size):
    rgb = noise(3, *size)
    square = Preparation(image_px=28, resize_px=32)(png(rgb))
    transform = v2.Compose([v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(28)])
    expected = np.asarray(transform(Image.fromarray(rgb)))
    assert np.array_equal(square, expected)


def test_sizes_follow_from_the_global_crops():
    assert Preparation.of(EvalConfig(), ViewConfig(global_px=224)) == (224, 256)
    assert Preparation.of(EvalConfig(image_px=98), ViewConfig()) == (98, 112)
    with pytest.raises(ConfigError, match=r"evaluation\.resize_px: got 90; allowed: from image_px, 98"):
        Preparation.of(EvalConfig(image_px=98, resize_px=90), ViewConfig())


@pytest.mark.parametrize("kept_bytes", [2 << 30, 8 * 8 * 3])
def test_what_is_no_picture_is_counted_and_what_has_no_label_left_out(kept_bytes, monkeypatch):
    monkeypatch.setattr(pictures, "KEPT_BYTES", kept_bytes)
    prepare, calls = Preparation(image_px=8, resize_px=9), []

    def counted():
        calls.append(1)
        return rows()

    read = read_pictures(counted, prepare)
    assert read.names == ["dog", "cat"]
    assert read.num_bad == 1
    for _ in range(2):
        first, second = read.prepared()
        assert np.array_equal(first, prepare(png(noise(0))))
        assert np.array_equal(second, prepare(png(noise(2, 70, 30))))
    assert len(calls) == (1 if kept_bytes > 1000 else 3), "kept where they fit, read again where not"


@pytest.mark.slow
def test_processes_decode_the_same_in_the_same_order():
    many = [(str(i), str(i), png(noise(i, 20, 30)) if i % 5 else b"bad") for i in range(23)]
    prepare = Preparation(image_px=8, resize_px=9)
    one, two = (read_pictures(lambda: many, prepare, num_workers=number) for number in (0, 2))
    assert one.names == two.names
    assert one.num_bad == two.num_bad == 5
    assert all(np.array_equal(a, b) for a, b in zip(one.prepared(), two.prepared(), strict=True))
