"""Photometric half of the views: jitter, grey, blur, solarise; on one crop in a worker, or batched on a device.

Both take the same parameters and keep to what torchvision does with Pillow pictures: the same operations in the same
order, each clipped and cut to 8 bits before the next. Each operation agrees with torchvision's to a grey level, hue on
a device to two. Hue in a worker is an exception: OpenCV's 8-bit HSV is up to 12 levels away from Pillow's, 0.3 on
average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import ViewConfig

# Columns of the parameters of a crop.
ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SIGMA, SOLARIZE = range(8)
NUM_PARAMETERS = 8
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))  # what ORDER, 0 to 23, stands for; -1: no jitter

_Operation = Callable[[Tensor, Tensor], Tensor]  # float [m, 3, s, s] and values [m, 1, 1, 1] -> like the first

_RADIUS = 4  # pixels: 9 taps
_CUT = 1e-4  # keeps a product that is a whole number up to rounding from being cut to the one below
_SOLARIZED = np.array([value if value < 128 else 255 - value for value in range(256)], np.uint8)


def draw_parameters(
    num: int, rng: np.random.Generator, config: ViewConfig, *, blur: float, solarize: float
) -> np.ndarray:
    """Parameters of crops.

    Args:
        num: crops, n.
        rng: gives 10 numbers a crop, whatever comes out.
        config: ranges and probabilities.
        blur: probability of blur as it takes effect.
        solarize: probability.

    Returns:
        float32 [n, NUM_PARAMETERS].
    """
    uniform = rng.random((num, 10))
    rows = np.zeros((num, NUM_PARAMETERS))
    rows[:, ORDER] = np.where(uniform[:, 0] < config.jitter_probability, np.floor(uniform[:, 1] * len(ORDERS)), -1)
    reach = np.array(config.jitter)
    low, high = 1 - reach, 1 + reach
    low[:3] = np.maximum(low[:3], 0)
    rows[:, BRIGHTNESS : HUE + 1] = low + (high - low) * uniform[:, 2:6]
    rows[:, HUE] -= 1
    rows[:, GREY] = uniform[:, 6] < config.grey
    least, most = config.blur_sigma
    rows[:, SIGMA] = np.where(uniform[:, 7] < blur, least + (most - least) * uniform[:, 8], 0)
    rows[:, SOLARIZE] = uniform[:, 9] < solarize
    return rows.astype(np.float32)


def normalise(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Grey levels to what the network takes.

    Args:
        crops: uint8 [n, 3, s, s] on any device.
        mean: of the three channels, 1 = white.
        std: likewise.

    Returns:
        float32 [n, 3, s, s].
    """
    shift = torch.tensor(mean, dtype=torch.float32).mul(255).view(3, 1, 1).to(crops.device, non_blocking=True)
    scale = torch.tensor(std, dtype=torch.float32).mul(255).reciprocal().view(3, 1, 1)
    return crops.float().sub_(shift).mul_(scale.to(crops.device, non_blocking=True))


# One crop, in a worker


def change(crop: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Jitter, grey, blur and solarise one crop.

    Args:
        crop: uint8 [s, s, 3]; may be overwritten.
        row: its parameters, float32 [NUM_PARAMETERS].

    Returns:
        uint8 [s, s, 3].
    """
    values = row.tolist()
    if values[ORDER] >= 0:
        for column in ORDERS[int(values[ORDER])]:
            crop = _JITTER[column](crop, values[column])
    if values[GREY]:
        crop = _grey(crop)
    if values[SIGMA]:
        kernel = _trimmed_taps(values[SIGMA])
        crop = cv2.sepFilter2D(crop, -1, kernel, kernel)  # borders are mirrored without their outermost pixel
    if values[SOLARIZE]:
        crop = cv2.LUT(crop, _SOLARIZED)
    return crop


# OpenCV rounds where Pillow cuts: hence half a level less.
_HALF = _CUT - 0.5


def _brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(cv2.convertScaleAbs(crop, alpha=factor, beta=_HALF))


def _contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return np.asarray(cv2.addWeighted(crop, factor, crop, 0, (1 - factor) * mean + _HALF))


def _saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(cv2.addWeighted(crop, factor, _grey(crop), 1 - factor, _HALF))


def _hue(crop: np.ndarray, turn: float) -> np.ndarray:
    if turn == 0:  # the range is empty: not even the way to HSV and back
        return crop
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


def _grey(crop: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


_JITTER = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}


def _trimmed_taps(sigma: float) -> np.ndarray:
    """Gaussian of at most 9 taps, float64 [2 r + 1]; taps that move no pixel by a hundredth of a level are left out."""
    taps = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / sigma) ** 2)
    taps = taps[taps > 1e-5 * taps.sum()]
    return np.asarray(taps / taps.sum())


# Batched, on a device


def apply(crops: Tensor, parameters: Tensor) -> Tensor:
    """Jitter, grey, blur and solarise crops together.

    Args:
        crops: uint8 [n, 3, s, s] on any device.
        parameters: float32 [n, NUM_PARAMETERS] in main memory, so that which crop takes which way is known without
            waiting for the device.

    Returns:
        uint8 [n, 3, s, s], on the device of ``crops``.
    """
    x = crops.float()
    orders = parameters[:, ORDER].long()
    columns = torch.tensor(ORDERS)[orders.clamp(min=0)]  # [n, 4]
    columns[orders < 0] = -1
    for place in range(4):
        for column, operation in _BATCHED.items():
            wanted = columns[:, place] == column
            if column == HUE:
                wanted &= parameters[:, HUE] != 0
            _change_some(x, wanted, operation, parameters[:, column])
    _change_some(x, parameters[:, GREY] > 0, lambda some, _: _luma(some).expand_as(some), parameters[:, GREY])
    _change_some(x, parameters[:, SIGMA] > 0, _blur_batch, parameters[:, SIGMA])
    _change_some(
        x, parameters[:, SOLARIZE] > 0, lambda some, _: torch.where(some < 128, some, 255 - some), parameters[:, 0]
    )
    return x.to(torch.uint8)


def _change_some(x: Tensor, wanted: Tensor, operation: _Operation, values: Tensor) -> None:
    """Replace the crops that are ``wanted``, bool [n] in main memory, in ``x``, float [n, 3, s, s]."""
    index = wanted.nonzero().flatten()
    if len(index) == 0:
        return
    factors = values[index].to(x.device, non_blocking=True).view(-1, 1, 1, 1)
    index = index.to(x.device, non_blocking=True)
    x.index_copy_(0, index, operation(x.index_select(0, index), factors))


def _cut(x: Tensor) -> Tensor:
    """To whole grey levels, as Pillow does when it blends."""
    return x.add(_CUT).clamp_(0, 255).floor_()


def _luma(x: Tensor) -> Tensor:
    """Pillow's grey, float [n, 1, s, s]: whole numbers below 2 ** 24, so float32 is exact."""
    red, green, blue = x.unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor_().unsqueeze(1)


def _contrast_batch(x: Tensor, factors: Tensor) -> Tensor:
    mean = (_luma(x).mean((1, 2, 3), keepdim=True) + 0.5).floor_()
    return _cut(mean + factors * (x - mean))


def _saturation_batch(x: Tensor, factors: Tensor) -> Tensor:
    grey = _luma(x)
    return _cut(grey + factors * (x - grey))


def _hue_batch(x: Tensor, turns: Tensor) -> Tensor:
    """To 8-bit HSV, turned, and back (Foley and van Dam; cut and rounded where Pillow does)."""
    value, least = x.amax(1), x.amin(1)  # [n, s, s]
    spread = value - least
    red, green, blue = ((value.unsqueeze(1) - x) / spread.clamp(min=1).unsqueeze(1)).unbind(1)
    hue = torch.where(x[:, 1] == value, 2 + red - blue, 4 + green - red)
    hue = torch.where(x[:, 0] == value, blue - green, hue)
    hue = hue / 6
    hue = torch.where(hue < 0, hue + 1, hue)
    # Colours in simple proportions are whole numbers here up to rounding, so it rounds where Pillow does.
    hue = (hue.double() * 255).floor_().float()
    hue = torch.where(spread == 0, 0, hue)
    saturation = (spread / value.clamp(min=1) * 255).floor_() / 255
    hue = (hue + (turns.squeeze(1) * 255).trunc()) % 256 * (6 / 255)
    sector = hue.floor()
    rest = hue - sector
    low = (value * (1 - saturation)).add_(0.5).floor_()
    falling = (value * (1 - saturation * rest)).add_(0.5).floor_()
    rising = (value * (1 - saturation * (1 - rest))).add_(0.5).floor_()
    choices = torch.stack([value, falling, low, low, rising, value])  # [6, n, s, s]: red by sector
    sector = sector.long() % 6
    shifted = [(sector + shift) % 6 for shift in (0, 4, 2)]  # green, blue: the same, two and four sectors later
    return torch.stack([choices.gather(0, one.unsqueeze(0))[0] for one in shifted], 1)


def _blur_batch(x: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussian of 9 taps; sums of shifted copies, since convolutions may round to TF32."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, device=x.device)
    taps = torch.exp(-0.5 * (offsets / sigmas.view(-1, 1)) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).view(len(x), -1, 1, 1, 1)  # [n, 9, 1, 1, 1]
    side = x.shape[-1]
    wide = F.pad(x, (_RADIUS, _RADIUS, 0, 0), mode="reflect")
    x = sum(taps[:, i] * wide[..., i : i + side] for i in range(2 * _RADIUS + 1))  # type: ignore[assignment]
    high = F.pad(x, (0, 0, _RADIUS, _RADIUS), mode="reflect")
    x = sum(taps[:, i] * high[..., i : i + side, :] for i in range(2 * _RADIUS + 1))  # type: ignore[assignment]
    return x.round_()


_BATCHED: dict[int, _Operation] = {
    BRIGHTNESS: lambda x, factors: _cut(x * factors),
    CONTRAST: _contrast_batch,
    SATURATION: _saturation_batch,
    HUE: _hue_batch,
}
