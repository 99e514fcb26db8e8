"""The endless order of samples: a pure function of seed and position, so that a resume needs nothing but a number.

Position p of the stream is one picture. Batch b of B pictures is positions b B to (b + 1) B, whatever the number of
ranks, micro-batches or workers.

- Parts are mixed by their shares, with exact quotas: of any ``_SLOTS`` positions that begin at a multiple of it, a part
  with share w has w ``_SLOTS`` rounded down or up, and of ``_SLOTS * _BLOCKS`` exactly that (systematic sampling; each
  block is then shuffled).
- A part is read in passes, each a permutation of its pictures: shards are permuted, cut into groups of about
  ``shuffle_shards``, and the pictures of a group permuted. Memory and open shards are those of a group.

Permutations come from the raw bits of PCG64, which numpy promises not to change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from training.config import ConfigError, DataConfig
from training.data.index import Index, Part

_SLOTS = 1024  # positions of a block
_BLOCKS = 1024  # after which quotas are exact to 1 / (_SLOTS * _BLOCKS)
_MIX, _SHARDS, _PICTURES, _REPLACE = 1, 2, 3, 4  # purposes of randomness


class SampleRef(NamedTuple):
    """One picture of the index."""

    part: int  # place in index.parts
    shard: int  # place in the part's shards
    row: int  # of the shard
    epoch: int  # pass over the part in which it comes


class Stream:
    """Which picture stands at which position.

    Args:
        index: the pictures.
        config: batch_size (with ``homogeneous``), shuffle_shards.
        seed: of all permutations.
    """

    def __init__(self, index: Index, config: DataConfig, *, seed: int) -> None:
        self._parts = index.parts
        self._tags = [int.from_bytes(hashlib.sha256(part.name.encode()).digest()[:8], "big") for part in index.parts]
        self._unit = config.batch_size if config.homogeneous else 1  # positions that are of one part together
        self._shuffle_shards = config.shuffle_shards
        self._seed = seed % 2**64
        self._mix = _Mix(index.parts, self._seed)
        self._pass = lru_cache(maxsize=2 * len(index.parts) + 2)(self._shuffled_pass)
        self._group = lru_cache(maxsize=2 * len(index.parts) + 2)(self._shuffled_group)

    def locate(self, position: int, attempt: int = 0) -> SampleRef:
        """The picture at a position.

        Args:
            position: 0 or more, without end.
            attempt: 0; or n for the n-th replacement of a picture that cannot be read, drawn from the same part.
        """
        unit, within = divmod(position, self._unit)
        number, ordinal = self._mix.at(unit)
        part = self._parts[number]
        epoch, place = divmod(ordinal * self._unit + within, part.num_samples)
        if attempt:
            drawn = _raw(1, self._seed, _REPLACE, position, attempt)[0] % np.uint64(part.num_samples)
            shard = int(np.searchsorted(part.starts, int(drawn), side="right")) - 1
            return SampleRef(number, shard, int(drawn) - int(part.starts[shard]), epoch)
        _, group_starts = self._pass(number, epoch)
        group = int(np.searchsorted(group_starts, place, side="right")) - 1
        shards, rows = self._group(number, epoch, group)
        within_group = place - int(group_starts[group])
        return SampleRef(number, int(shards[within_group]), int(rows[within_group]), epoch)

    def _shuffled_pass(self, number: int, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Groups of a pass, each the shards in it, int64 [s], and the pictures in front of each: int64 [groups]."""
        part = self._parts[number]
        order = shuffled(len(part.shards), self._seed, _SHARDS, self._tags[number], epoch)
        # Equal groups, so that none at the end is left alone with one shard.
        groups = np.array_split(order, -(-len(order) // self._shuffle_shards))
        sizes = np.diff(part.starts)
        counts = [int(sizes[group].sum()) for group in groups]
        return groups, np.concatenate([[0], np.cumsum(counts[:-1], dtype=np.int64)])

    def _shuffled_group(self, number: int, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Pictures of a group in their order: shards int32 [n], rows int32 [n]."""
        part = self._parts[number]
        members = self._pass(number, epoch)[0][group]
        sizes = np.diff(part.starts)[members]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        order = shuffled(int(starts[-1]), self._seed, _PICTURES, self._tags[number], epoch, group)
        which = np.searchsorted(starts, order, side="right") - 1
        return members[which].astype(np.int32), (order - starts[which]).astype(np.int32)


class _Mix:
    """Which part has which position, and the how-manieth of the part it is.

    The line from 0 to ``_SLOTS * _BLOCKS`` is cut into an interval a part, as long as its share. Block b takes the
    points r, r + _BLOCKS, r + 2 _BLOCKS, …, with r running through 0 to _BLOCKS - 1 in bit-reversed order: each block
    hits every interval as often as it should, rounded, and _BLOCKS of them hit every point once.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self._seed = seed
        ends = [0]
        reached = parts[0].share * 0
        for part in parts:
            reached += part.share
            ends.append(round(reached * _SLOTS * _BLOCKS))
            if ends[-1] == ends[-2]:
                raise ConfigError(
                    f"data.parts.{part.name}: its share is {float(part.share):.1e}; below one in a million it would "
                    "hardly ever be seen; give it a weight, or put its pictures into another part"
                )
        width = _BLOCKS.bit_length() - 1
        offsets = np.array([int(f"{b:0{width}b}"[::-1], 2) for b in range(_BLOCKS)])
        hits = -((offsets[:, None] - np.array(ends)) // _BLOCKS)  # ceil((end - offset) / _BLOCKS): [blocks, parts + 1]
        self._counts = np.diff(hits, axis=1)  # int64 [blocks, parts]
        self._before = np.cumsum(self._counts, axis=0) - self._counts
        self._totals = np.diff(ends)
        self._block = lru_cache(maxsize=16)(self._mixed_block)

    def at(self, position: int) -> tuple[int, int]:
        """Part of a position, and how many positions of that part lie in front of it."""
        if len(self._totals) == 1:
            return 0, position
        block, slot = divmod(position, _SLOTS)
        parts, ordinals = self._block(block)
        return int(parts[slot]), int(ordinals[slot])

    def _mixed_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        rounds, row = divmod(block, _BLOCKS)
        counts = self._counts[row]
        in_order = np.repeat(np.arange(len(counts)), counts)  # [_SLOTS]
        ordinals = np.concatenate([np.arange(count) for count in counts])
        ordinals += (rounds * self._totals + self._before[row])[in_order]
        # The slots of a part take its pictures in order, so that a pass is not torn.
        slots = np.argsort(in_order[shuffled(_SLOTS, self._seed, _MIX, block)], kind="stable")
        parts, places = np.empty_like(in_order), np.empty_like(ordinals)
        parts[slots], places[slots] = in_order, ordinals
        return parts, places


def shuffled(num: int, *entropy: int) -> np.ndarray:
    """Permutation of 0 to num - 1, int64 [num]."""
    return np.argsort(_raw(num, *entropy), kind="stable")


def _raw(num: int, *entropy: int) -> np.ndarray:
    return np.asarray(np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(num))
