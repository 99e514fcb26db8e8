"""Squares of pictures: byte for byte those of the libraries' own transforms, in bounded memory for any shape."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.libraries import open_clip_preparation, ours, timm_about, timm_preparation
from curation.preparation import Preparation

SHAPES = [(64, 64), (288, 288), (288, 401), (433, 288), (57, 91), (320, 40), (10, 10), (1, 7), (500, 333)]
# centre with bicubic, centre with bilinear, both sides squashed, a ratio that leaves part of a pixel
TIMM = ("vit_base_patch16_224", "resnet18.tv_in1k", "convnext_tiny.in12k_ft_in1k_384", "efficientnet_b0.ra_in1k")
CLIP = (("ViT-B-32", "openai"), ("ViT-B-16-SigLIP", "webli"), ("MobileCLIP-S1", "datacompdr"))


def photograph(shape: tuple[int, int]) -> np.ndarray:
    """A photograph that scikit-image installs, cut and resized to a shape."""
    import skimage.data

    return np.asarray(Image.fromarray(skimage.data.astronaut()[40:460, 30:500]).resize(shape[::-1]))


def normalised(preparation: Preparation, rgb: np.ndarray) -> np.ndarray:
    """float [3, H, W]."""
    pixels = preparation.square(rgb).astype(np.float32) / 255
    return np.moveaxis((pixels - np.float32(preparation.mean)) / np.float32(preparation.std), 2, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TIMM)
def test_a_square_is_that_of_timm(name: str, shape: tuple[int, int]):
    import timm

    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    preparation, _ = timm_about(name, {}, None)
    rgb = photograph(shape)
    wanted = timm.data.create_transform(**data, is_training=False)(Image.fromarray(rgb)).numpy()
    np.testing.assert_allclose(normalised(preparation, rgb), wanted, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "tag"), CLIP)
def test_a_square_is_that_of_open_clip(name: str, tag: str, shape: tuple[int, int]):
    import open_clip

    cfg = open_clip.get_pretrained_cfg(name, tag)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    given = open_clip.transform.PreprocessCfg(**{k: cfg[k] for k in ("mean", "std", "interpolation", "resize_mode")})
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**{**vars(given), "size": size}), is_train=False
    )
    rgb = photograph(shape)
    found = normalised(open_clip_preparation(cfg, size), rgb)
    np.testing.assert_allclose(found, transform(Image.fromarray(rgb)).numpy(), atol=2e-6)


def test_what_the_models_of_the_libraries_ask_for_is_not_all_the_same():
    asked = [timm_about(name, {}, None)[0] for name in TIMM]
    assert [p.interpolation for p in asked] == ["bicubic", "bilinear", "bicubic", "bicubic"]
    assert [p.squash for p in asked] == [False, False, True, False]
    assert [p.resize_px for p in asked] == [248, 256, 384, 256]
    assert open_clip_preparation({"resize_mode": "squash"}, 224).squash


def test_our_own_files_are_shown_as_released_dinov2_is():
    assert ours({"img_size": "224"}, None).resize_px == 256
    assert ours({"img_size": "48", "mean": "[0.1, 0.2, 0.3]"}, None).mean == (0.1, 0.2, 0.3)
    assert (ours({"img_size": "48"}, 64).size_px, ours({"img_size": "48"}, 64).resize_px) == (64, 73)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"crop_mode": "border", "input_size": (3, 64, 64)}, r"it pads its pictures \(crop_mode 'border'\); allowed"),
        ({"input_size": (3, 64, 96)}, r"it takes pictures of 96 x 64 px; give size_px=N for squares"),
        ({"input_size": (3, 64, 64), "interpolation": "random"}, r"its interpolation is 'random'; allowed: bicubic"),
    ],
)
def test_what_is_not_made_here_is_refused(own: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        timm_preparation({"mean": (0,), "std": (1,), "interpolation": "bicubic"} | own, None)


def test_a_square_larger_than_what_it_is_cut_from_is_refused():
    with pytest.raises(
        ValueError, match="resize_px 60: the square of 64 px is cut out of what is resized; allowed: 64"
    ):
        Preparation(size_px=64, resize_px=60, mean=(0,), std=(1,))


@pytest.mark.parametrize("shape", [(2, 40_000), (40_000, 2), (1, 65_500)])
def test_a_thin_picture_needs_no_memory_and_shows_its_middle(shape, monkeypatch):
    sides = []
    resize = Image.Image.resize

    def seen(self, size, *args, **kwargs):
        sides.extend(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", seen)
    rgb = np.zeros((*shape, 3), np.uint8)
    rgb[tuple(slice(side // 2 - 30, side // 2 + 30) if side > 60 else slice(None) for side in shape)] = 200
    assert (Preparation(size_px=64, resize_px=73, mean=(0,), std=(1,)).square(rgb) == 200).all()
    assert max(sides) <= 9 * 80
