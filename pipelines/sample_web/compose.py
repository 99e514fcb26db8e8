"""One base picture: a tile of a photograph, warped and recoloured in several layers, with drawn textures and marks.

Content has to differ between base pictures for whole-image hashes and for local features alike: each has its own
tile, warps, colours, layout, textures and marks, all from one seed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.sample_web.photos import Pixels

Mask = NDArray[np.float32]  # [height, width], 0 to 1
_SIDES_PX = (272, 448)


def compose(tile: Pixels, rng: np.random.Generator) -> Pixels:
    """A picture of 272 to 447 px a side from one tile, uint8 [height, width, 3]."""
    import cv2

    height, width = (int(side) for side in rng.integers(*_SIDES_PX, size=2))
    size = (height, width)
    picture = _recoloured(_warped(tile, size, rng), rng)
    for drawn in rng.permutation([False, False, False, True, True]):
        fill = _texture(size, rng) if drawn else _recoloured(_warped(tile, size, rng), rng)
        mask = _mask(size, rng) * np.float32(rng.uniform(0.5, 0.9) if drawn else rng.uniform(0.8, 1.0))
        picture = cv2.blendLinear(fill, picture, mask, 1 - mask)
    _draw_marks(picture, rng)
    return picture


def _grid(size: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    return x, y


def _warped(tile: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """The tile enlarged 1.5 to 4 times, rotated, sheared and bent; mirrored on where it ends."""
    import cv2

    x, y = _grid(size)
    angle, enlarge = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(np.log(1.5), np.log(4.0)))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, rng.uniform(-0.4, 0.4)], [rng.uniform(-0.4, 0.4), 1.0]])
    mirror = np.diag([rng.choice([-1.0, 1.0]), rng.uniform(0.7, 1.4)])
    step = (turn @ shear @ mirror / enlarge).astype(np.float32)
    wave, phase = rng.uniform(0.01, 0.04, 2), rng.uniform(0, 2 * np.pi, 2)
    bend = np.float32(rng.uniform(4, 14))
    bent_x = x + bend * np.sin(y * np.float32(wave[0]) + np.float32(phase[0]))
    bent_y = y + bend * np.sin(x * np.float32(wave[1]) + np.float32(phase[1]))
    side = np.float32(tile.shape[0])
    start = rng.uniform(0, 2 * tile.shape[0], 2).astype(np.float32)
    from_x = step[0, 0] * bent_x + step[0, 1] * bent_y + start[0]
    from_y = step[1, 0] * bent_x + step[1, 1] * bent_y + start[1]
    # Folded here: OpenCV's own reflection turns into streaks a few tile lengths out.
    period = 2 * (side - 1)
    folded = [np.abs(at - period * np.floor(at / period + np.float32(0.5))) for at in (from_x, from_y)]
    return np.asarray(cv2.remap(tile, folded[0], folded[1], cv2.INTER_LINEAR), np.uint8)


def _recoloured(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Half its own colours, turned and stretched; half a ramp over its luma through four colours."""
    import cv2

    luma = cv2.equalizeHist(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
    stops = rng.uniform(0, 255, (4, 3))
    stops = stops[np.argsort(stops @ [0.3, 0.6, 0.1])]
    ramp = np.stack([np.interp(np.arange(256), [0, 85, 170, 255], stops[:, c]) for c in range(3)], axis=1)
    ramped = cv2.LUT(cv2.merge([luma] * 3), ramp.astype(np.uint8)[None])
    turned = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
    turned[..., 0] = (turned[..., 0].astype(np.int16) + int(rng.integers(180))) % 180
    turned = cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)
    share = rng.uniform(0.25, 0.75)
    return np.asarray(cv2.addWeighted(turned, share, ramped, 1 - share, 0), np.uint8)


def _noise(size: tuple[int, int], rng: np.random.Generator) -> Mask:
    """Smooth noise in three octaves, 0 to 1."""
    import cv2

    total = np.zeros(size, np.float32)
    first = int(rng.integers(2, 7))
    for octave in range(3):
        cells = first * 3**octave
        coarse = rng.random((cells, cells), dtype=np.float32)
        total += cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC) * np.float32(0.5**octave)
    return np.asarray((total - total.min()) / (total.max() - total.min()), np.float32)


def _texture(size: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """Drawn texture between two or three colours: stripes, rings, checks, cells or noise, bent by noise."""
    x, y = _grid(size)
    noise = _noise(size, rng)
    angle, period = rng.uniform(0, np.pi), rng.uniform(9, 70)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) + noise * np.float32(rng.uniform(0, 60))
    across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)) + noise * np.float32(rng.uniform(0, 60))
    match int(rng.integers(5)):
        case 0:
            value = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / period))
        case 1:
            centre = rng.uniform(0, 1, 2) * size
            radius = np.hypot(x - np.float32(centre[1]), y - np.float32(centre[0])) + noise * np.float32(40)
            value = 0.5 + 0.5 * np.sin(radius * np.float32(2 * np.pi / period))
        case 2:
            value = (
                (np.floor(along / period) + np.floor(across / (period * rng.uniform(0.5, 2)))) % 2
            ) * 0.8 + noise * 0.2
        case 3:
            value = np.abs(np.sin(along * np.float32(np.pi / period)) * np.sin(across * np.float32(np.pi / period)))
        case _:
            levels = rng.integers(3, 9)
            value = np.floor(noise * levels) / levels
    ramp = np.stack([np.interp(np.linspace(0, 1, 256), [0, 0.5, 1], rng.uniform(0, 255, 3)) for _ in range(3)], axis=1)
    return np.asarray(ramp.astype(np.uint8)[(value.clip(0, 1) * 255).astype(np.uint8)], np.uint8)


def _mask(size: tuple[int, int], rng: np.random.Generator) -> Mask:
    """Where a layer lies: a star-shaped polygon, an ellipse, a band or a cloud, its edge hard or soft."""
    import cv2

    height, width = size
    mask = np.zeros(size, np.float32)
    centre = rng.uniform(0.05, 0.95, 2) * (width, height)
    match int(rng.integers(4)):
        case 0:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(5, 12))))
            radii = rng.uniform(0.15, 0.6, len(angles)) * min(size)
            corners = centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
            cv2.fillPoly(mask, [corners.astype(np.int32)], 1.0, cv2.LINE_AA)
        case 1:
            axes = (rng.uniform(0.12, 0.45, 2) * min(size)).astype(int)
            middle = (int(centre[0]), int(centre[1]))
            cv2.ellipse(mask, middle, (int(axes[0]), int(axes[1])), rng.uniform(0, 180), 0, 360, 1.0, -1, cv2.LINE_AA)
        case 2:
            box = (tuple(centre), tuple(rng.uniform(0.2, 0.9, 2) * min(size)), rng.uniform(0, 180))
            cv2.fillPoly(mask, [cv2.boxPoints(box).astype(np.int32)], 1.0, cv2.LINE_AA)
        case _:
            mask = (_noise(size, rng) > rng.uniform(0.5, 0.65)).astype(np.float32)
    soft = int(rng.choice([0, 0, 3, 15]))
    return cv2.GaussianBlur(mask, (2 * soft + 1, 2 * soft + 1), 0) if soft else mask


def _draw_marks(picture: Pixels, rng: np.random.Generator) -> None:
    """Small sharp marks of its own: letters, lines and dots, so that local features have something to hold."""
    import cv2

    height, width = picture.shape[:2]
    for _ in range(int(rng.integers(8, 20))):
        at = (int(rng.integers(width)), int(rng.integers(height)))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        match int(rng.integers(4)):
            case 0:
                text = "".join(chr(c) for c in rng.integers(33, 127, int(rng.integers(1, 6))))
                font = int(rng.choice([cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX]))
                cv2.putText(
                    picture, text, at, font, rng.uniform(0.5, 1.8), colour, int(rng.integers(1, 4)), cv2.LINE_AA
                )
            case 1:
                to = (int(rng.integers(width)), int(rng.integers(height)))
                cv2.line(picture, at, to, colour, int(rng.integers(1, 5)), cv2.LINE_AA)
            case 2:
                cv2.circle(picture, at, int(rng.integers(3, 22)), colour, int(rng.choice([-1, 2, 3])), cv2.LINE_AA)
            case _:
                corners = (np.array(at) + rng.integers(-40, 40, (int(rng.integers(3, 6)), 2))).astype(np.int32)
                cv2.fillPoly(picture, [corners], colour, cv2.LINE_AA)
