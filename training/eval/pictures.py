"""Labelled files to squares of pixels, once or anew for each measurement.

Letters: n pictures, S side of the square.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from training.config import ConfigError, EvalConfig, ViewConfig
from training.data.pixels import DecodeError, decode

Row = tuple[str, str | None, bytes]  # key, label, file
KEPT_BYTES = 2 << 30  # of cut pictures that are kept for the next measurement
_AHEAD = 4  # files a process that wait to be decoded


class Preparation(NamedTuple):
    """How a picture becomes a square."""

    image_px: int
    resize_px: int

    @classmethod
    def of(cls, config: EvalConfig, views: ViewConfig) -> Preparation:
        """As the recipe says; by default the square of the global crops, cut from 8/7 of it (224 from 256)."""
        image_px = config.image_px or views.global_px
        resize_px = config.resize_px or round(image_px * 8 / 7)
        if resize_px < image_px:
            raise ConfigError(f"evaluation.resize_px: got {resize_px}; allowed: from image_px, {image_px}, on")
        return cls(image_px, resize_px)

    def __call__(self, data: bytes) -> np.ndarray:
        """A file to uint8 [S, S, 3].

        Raises:
            DecodeError: it is no picture.
        """
        from PIL import Image

        picture = decode(data, shortest_px=self.resize_px)
        sides = picture.width_px, picture.height_px
        width, height = (side * self.resize_px // min(sides) for side in sides)  # rounded as torchvision does
        left, top = round((width - self.image_px) / 2), round((height - self.image_px) / 2)
        small = Image.fromarray(picture.rgb).resize((width, height), Image.Resampling.BICUBIC, box=picture.box)
        return np.array(small.crop((left, top, left + self.image_px, top + self.image_px)))


class Pictures(NamedTuple):
    """Labelled pictures that were read, and can be read again."""

    names: list[str]  # of the labels
    prepared: Callable[[], Iterator[np.ndarray]]  # each uint8 [S, S, 3], in the order of names
    num_bad: int


def read_pictures(rows: Callable[[], Iterable[Row]], prepare: Preparation, *, num_workers: int = 0) -> Pictures:
    """Decode labelled pictures once; they are kept while they fit ``KEPT_BYTES``, else decoded anew each time.

    Args:
        rows: gives them, the same ones each time it is called. One that is no picture, or has no label, is left out.
        prepare: to squares.
        num_workers: processes that decode; 0: this one.
    """
    names: list[str] = []
    kept: list[np.ndarray] = []
    num_bad, is_kept = 0, True
    for label, square in _decoded(rows(), prepare, num_workers):
        if square is None:
            num_bad += 1
            continue
        names.append(label)
        is_kept = len(names) * square.nbytes <= KEPT_BYTES
        if is_kept:
            kept.append(square)
        else:
            kept.clear()

    def again() -> Iterator[np.ndarray]:
        if is_kept:
            return iter(kept)
        return (square for _, square in _decoded(rows(), prepare, num_workers) if square is not None)

    return Pictures(names, again, num_bad)


def _decoded(rows: Iterable[Row], prepare: Preparation, num_workers: int) -> Iterator[tuple[str, np.ndarray | None]]:
    """Labels and squares in order; None for what is no picture."""
    labelled = ((str(label), data) for _, label, data in rows if label is not None)
    if num_workers == 0:
        yield from ((label, _square(prepare, data)) for label, data in labelled)
        return
    from multiprocessing import get_context

    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        waiting: deque[tuple[str, Future[np.ndarray | None]]] = deque()
        for label, data in labelled:
            waiting.append((label, pool.submit(_square, prepare, data)))
            if len(waiting) >= _AHEAD * num_workers:
                first, square = waiting.popleft()
                yield first, square.result()
        yield from ((label, square.result()) for label, square in waiting)


def _square(prepare: Preparation, data: bytes) -> np.ndarray | None:
    try:
        return prepare(data)
    except DecodeError:
        return None
