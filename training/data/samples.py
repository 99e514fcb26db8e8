"""Pictures of the stream, decoded; one that cannot be read is named and replaced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from training.config import ConfigError, DataConfig, ViewConfig
from training.data.index import Index
from training.data.kinds.shard import Rows
from training.data.pixels import DecodeError, decode
from training.data.stream import SampleRef, Stream

MISSING = "missing"  # beside pixels.REASONS: it was there when the run began


class DataError(ConfigError):
    """The pictures cannot be read: too many bad ones in a row, or their disk or bucket fails."""


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A picture that cannot be read."""

    part: str
    shard: str
    key: str
    reason: str  # one of pixels.REASONS, or missing

    def __str__(self) -> str:
        return f"{self.part}: {self.key} in {self.shard}: {self.reason}"


class Sample(NamedTuple):
    """What stands at a position of the stream."""

    rgb: np.ndarray  # uint8 [H, W, 3]
    key: str  # PART/KEY
    bad: list[BadSample]  # those that it replaces


class Reader:
    """Reads what stands at a position.

    Memory: where the pictures of as many shards lie as are mixed with each other (of parquet, their bytes), and with
    ``config.cache`` every picture that was decoded.

    Args:
        index: the pictures.
        config: of the data.
        seed: of the order.
        shortest_px: see pixels.decode; None: full size.
    """

    def __init__(self, index: Index, config: DataConfig, *, seed: int, shortest_px: int | None) -> None:
        self._index = index
        self._stream = Stream(index, config, seed=seed)
        self._max_bad = config.max_bad_in_row
        self._shortest_px = shortest_px
        self._kept: dict[tuple[int, int, int], tuple[np.ndarray, str]] | None = {} if config.cache else None
        num_open = sum(min(len(part.shards), config.shuffle_shards) for part in index.parts)
        self._rows = lru_cache(maxsize=num_open + 4)(self._open_rows)

    def read(self, position: int) -> Sample:
        """The picture at a position, or the first of its replacements that can be read.

        Raises:
            DataError: ``max_bad_in_row`` could not; or the disk or the bucket fails.
            ConfigError: a shard is no longer what it was when the run began.
        """
        bad: list[BadSample] = []
        for attempt in range(self._max_bad):
            found = self._picture(self._stream.locate(position, attempt))
            if not isinstance(found, BadSample):
                return Sample(*found, bad)
            bad.append(found)
        raise DataError(
            f"{self._max_bad:,} pictures in a row cannot be read (data.max_bad_in_row); the last one is {bad[-1]}"
        )

    def _picture(self, ref: SampleRef) -> tuple[np.ndarray, str] | BadSample:
        """Pixels uint8 [H, W, 3] and key, or what is wrong."""
        place = ref[:3]
        if self._kept is not None and place in self._kept:
            return self._kept[place]
        part = self._index.parts[ref.part]
        shard = part.shards[ref.shard]
        key = f"row {ref.row}"
        try:
            rows = self._rows(ref.part, ref.shard)
            key = rows.keys[ref.row]
            picture = decode(rows.read(ref.row), shortest_px=self._shortest_px)
        except DecodeError as error:
            return BadSample(part=part.name, shard=shard.name, key=key, reason=error.reason)
        except FileNotFoundError:
            return BadSample(part=part.name, shard=shard.name, key=key, reason=MISSING)
        except OSError as error:  # of the machine, not of a picture
            raise DataError(f"{shard.path}: {key} cannot be read: {error}") from None
        found = picture.rgb, f"{part.name}/{key}"
        if self._kept is not None:
            self._kept[place] = found
        return found

    def _open_rows(self, part: int, shard: int) -> Rows:
        opened = self._index.parts[part]
        return opened.source.rows(opened.shards[shard])


def decode_shortest_px(views: ViewConfig, gram_px: int | None) -> int:
    """Shortest side for pixels.decode: the one at which no crop loses resolution.

    The shortest side of a crop is at least sqrt(smallest area x smallest aspect) of the picture's. decode keeps twice
    what is asked for. So the smallest global crop still has twice its side in pixels to be resized from, and no local
    crop is blown up that would not be at full size.

    Args:
        views: crops.
        gram_px: side of the crops for the gram teacher, where there is one.
    """
    least_aspect = min(views.aspect[0], 1 / views.aspect[1])
    sides = [max(views.global_px, gram_px or 0) / math.sqrt(views.global_scale[0] * least_aspect)]
    if views.num_locals:
        sides.append(views.local_px / math.sqrt(views.local_scale[0] * least_aspect) / 2)
    return math.ceil(max(sides))
