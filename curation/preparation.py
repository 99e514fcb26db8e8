"""A picture of any shape to the square that a model takes, as the model's own library makes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_ASPECT = 8  # of what is resized: the square, and what the filter sees beyond it even where a side is one pixel
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a model wants its pictures.

    Attributes:
        size_px: side of the square.
        resize_px: side that a picture is resized to before the square is cut out: the shortest, or both (``squash``).
        mean: of each channel, of pixels in 0 to 1; subtracted.
        std: of each channel; divided by.
        interpolation: of the resize, antialiased.
        squash: both sides are resized to ``resize_px``, whatever the aspect.
    """

    size_px: int
    resize_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    squash: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: names the value.
        """
        if self.resize_px < self.size_px:
            raise ValueError(
                f"resize_px {self.resize_px}: the square of {self.size_px} px is cut out of what is resized; "
                f"allowed: {self.size_px} and above"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"its interpolation is {self.interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")

    def square(self, rgb: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [size_px, size_px, 3], rounded to whole pixels as torchvision does.

        A strip is cut to its middle first: 2 x 40,000 pixels would become 256 x 5,120,000.
        """
        from PIL import Image

        if not self.squash:
            longest = MAX_ASPECT * min(rgb.shape[:2])
            top, left = (max(0, (side - longest) // 2) for side in rgb.shape[:2])
            rgb = rgb[top : rgb.shape[0] - top, left : rgb.shape[1] - left]
        shortest = min(rgb.shape[:2])
        height, width = (
            self.resize_px if self.squash or side == shortest else int(self.resize_px * side / shortest)
            for side in rgb.shape[:2]
        )
        way = Image.Resampling[self.interpolation.upper()]
        resized = np.asarray(Image.fromarray(rgb).resize((width, height), way))
        top, left = (round((side - self.size_px) / 2.0) for side in (height, width))
        return np.ascontiguousarray(resized[top : top + self.size_px, left : left + self.size_px])
