"""Views of a picture: random resized crops, flipped and changed (dinov2's data/augmentations.py; DINOv2, section 4).

Operations, ranges and order are those of torchvision on Pillow pictures, which dinov2 uses; each runs on a fast kernel
for 8-bit pixels. Crops stay uint8: ``photometric.normalise`` follows on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from training.config import Range, ViewConfig
from training.data import photometric

_TRIES = 10


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Crops(NamedTuple):
    """The views of one picture. G, l and g are the sides of global, local and gram crops; L is the number of locals."""

    global_crops: Tensor  # uint8 [2, 3, G, G]
    local_crops: Tensor  # uint8 [L, 3, l, l]
    gram_crops: Tensor | None  # uint8 [2, 3, g, g]: the global crops' boxes and flips, photometrically unchanged
    # float32 [2, P] and [L, P]: parameters of ``photometric.apply``; the crops are then photometrically unchanged
    photometric: tuple[Tensor, Tensor] | None


class Views:
    """Draws the views of pictures.

    Args:
        config: sides, ranges and probabilities.
        gram_px: side of the crops for a gram teacher; None: none.
    """

    def __init__(self, config: ViewConfig, *, gram_px: int | None = None) -> None:
        self.config = config
        self.gram_px = gram_px

    def draw(self, rgb: np.ndarray, rng: np.random.Generator) -> Crops:
        """The views of a picture: a function of its pixels and the state of ``rng`` only.

        Args:
            rgb: uint8 [H, W, 3].
            rng: of this sample; how much is taken from it does not depend on the picture.
        """
        cv2.setNumThreads(1)
        config = self.config
        first, second, local = config.blur_probabilities
        rows = np.concatenate(
            [
                photometric.draw_parameters(1, rng, config, blur=first, solarize=0),
                photometric.draw_parameters(1, rng, config, blur=second, solarize=config.solarize),
                photometric.draw_parameters(config.num_locals, rng, config, blur=local, solarize=0),
            ]
        )
        global_boxes = [draw_box(rgb.shape, config.global_scale, config.aspect, rng) for _ in range(2)]
        local_boxes = [draw_box(rgb.shape, config.local_scale, config.aspect, rng) for _ in range(config.num_locals)]
        flips = (rng.random(2 + config.num_locals) < config.flip).tolist()
        gram_crops = None
        if self.gram_px is not None:
            gram_crops = _crops(rgb, global_boxes, flips[:2], self.gram_px, None)
        changes = None if config.on_device else rows
        return Crops(
            global_crops=_crops(rgb, global_boxes, flips[:2], config.global_px, changes),
            local_crops=_crops(rgb, local_boxes, flips[2:], config.local_px, None if changes is None else changes[2:]),
            gram_crops=gram_crops,
            photometric=(torch.from_numpy(rows[:2]), torch.from_numpy(rows[2:])) if config.on_device else None,
        )


def draw_box(shape: Sequence[int], scale: Range, aspect: Range, rng: np.random.Generator) -> Box:
    """A random box, distributed as torchvision's RandomResizedCrop draws it.

    Args:
        shape: of the picture, (height, width, ...).
        scale: share of its area, uniform.
        aspect: width over height, uniform in the logarithm.
        rng: gives 22 numbers, whatever comes out.
    """
    height, width = shape[0], shape[1]
    uniform = rng.random(2 * _TRIES + 2).tolist()
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    for i in range(_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[2 * i])
        ratio = math.exp(log_low + (log_high - log_low) * uniform[2 * i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(uniform[-2] * (height - h + 1)), int(uniform[-1] * (width - w + 1)), h, w)
    w, h = width, height
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resized(rgb: np.ndarray, box: Box, side_px: int) -> np.ndarray:
    """A box of a picture at another size: bicubic, antialiased.

    Pillow's filter to a grey level, rows first. Pillow itself may take columns first; what overshoots black or white
    between the passes is then clipped elsewhere: up to 20 levels, at one value in some thousands.

    Args:
        rgb: uint8 [H, W, 3].
        box: what is cut out.
        side_px: s.

    Returns:
        uint8 [s, s, 3].
    """
    top, left, height, width = box
    cut = torch.from_numpy(rgb[top : top + height, left : left + width].copy())  # [h, w, 3]
    out = np.empty((side_px, side_px, 3), np.uint8)
    # Channels last on both sides is what its 8-bit kernel is fastest with; it gives that for `out=` only.
    target = torch.from_numpy(out).permute(2, 0, 1)[None]  # [1, 3, s, s]
    torch.ops.aten._upsample_bicubic2d_aa.out(
        cut.permute(2, 0, 1)[None], [side_px, side_px], False, None, None, out=target
    )
    return out


def _crops(
    rgb: np.ndarray, boxes: Sequence[Box], flips: Sequence[bool], side_px: int, rows: np.ndarray | None
) -> Tensor:
    """Crops uint8 [n, 3, s, s]; ``rows``, float32 [>= n, P], are what is changed in them, None: nothing."""
    crops = np.empty((len(boxes), 3, side_px, side_px), np.uint8)
    for i, (box, is_flipped) in enumerate(zip(boxes, flips, strict=True)):
        crop = resized(rgb, box, side_px)
        if is_flipped:
            crop = np.asarray(cv2.flip(crop, 1))
        if rows is not None:
            crop = photometric.change(crop, rows[i])
        cv2.split(crop, list(crops[i]))
    return torch.from_numpy(crops)
