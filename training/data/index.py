"""What there is to read: the parts of a recipe as shards with counts, and whether it is what it was before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from training.config import ConfigError, DataConfig
from training.data.kinds.shard import Shard, Source
from training.data.sources import open_source, weights_of_parts


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of pictures."""

    name: str
    share: Fraction  # of all samples
    source: Source

    @property
    def shards(self) -> list[Shard]:
        """Its shards, in their order on disk."""
        return self.source.shards

    @cached_property
    def starts(self) -> np.ndarray:
        """Pictures in front of each shard, and of all: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards], dtype=np.int64)])

    @property
    def num_samples(self) -> int:
        """Its pictures."""
        return int(self.starts[-1])


class Index:
    """The parts of a set, and what identifies its content.

    A part named ``web`` of kind run with ``split_by_part`` comes as parts ``web.NAME``, which share its weight by
    weights of their own, if they have any, else by their number of pictures.
    """

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts

    @classmethod
    def open(cls, config: DataConfig, *, cache: Path | None = None) -> Index:
        """Look at all parts.

        Args:
            config: the parts.
            cache: folder that keeps what scans of tars found, for the next start and for the workers; None: nowhere.

        Raises:
            ConfigError: a part is missing, damaged, empty or not as it says it is; or weights do not add up.
        """
        opened = {name: open_source(part, cache=cache) for name, part in config.parts.items()}
        counts = {
            name: {sub: sum(shard.num_samples for shard in source.shards) for sub, source in sources.items()}
            for name, sources in opened.items()
        }
        weights = {name: part.weight for name, part in config.parts.items()}
        totals = {name: sum(count.values()) for name, count in counts.items()}
        shares = shares_of(weights, totals, key="data.parts")
        parts = []
        for name, sources in opened.items():
            inner = weights_of_parts(config.parts[name], sources)
            inner_shares = shares_of(inner, counts[name], key=f"data.parts.{name}.part_weights")
            for sub, source in sources.items():
                share = shares[name] * inner_shares[sub]
                parts.append(Part(name=f"{name}.{sub}" if sub else name, share=share, source=source))
        return cls(tuple(sorted(parts, key=lambda part: part.name)))

    @property
    def num_samples(self) -> int:
        """Pictures of all parts."""
        return sum(part.num_samples for part in self.parts)

    @property
    def notes(self) -> list[str]:
        """What was left out, one line each."""
        return [f"data.parts.{part.name}: {note}" for part in self.parts for note in part.source.notes]

    def summary(self) -> dict[str, Any]:
        """What identifies the content, to be kept with a checkpoint: of each part, its shards. Places are not in it."""
        return {
            part.name: [[shard.name, shard.num_samples, shard.num_bytes, shard.digest] for shard in part.shards]
            for part in self.parts
        }

    def shares(self) -> dict[str, str]:
        """Share of each part in all samples, exact: beside ``summary`` it fixes the order of the stream."""
        return {part.name: str(part.share) for part in self.parts}

    @cached_property
    def digest(self) -> str:
        """sha256 of the summary, hex."""
        return hashlib.sha256(json.dumps(self.summary(), sort_keys=True).encode()).hexdigest()

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """The first part or shard in which this set differs from the one that ``other`` is the summary of, in words."""
        mine = self.summary()
        for name in sorted(mine.keys() | other.keys()):
            if name not in other:
                return f"part {name!r} was added"
            if name not in mine:
                return f"part {name!r} was removed"
            difference = _difference(mine[name], other[name])
            if difference:
                return f"part {name!r}: {difference}"
        return None

    def check_same(self, other: Mapping[str, Any], shares: Mapping[str, str] | None = None) -> None:
        """Refuse another set than the one that ``other`` is the summary of, and other shares than ``shares``, if known.

        Raises:
            ConfigError: it names the first shard, or else the first part, that differs.
        """
        difference = self.difference(other)
        if difference:
            raise ConfigError(
                f"the data is not what the run began with, so its order is lost: {difference}; "
                "put it back, or start a new run (init.source takes the weights)"
            )
        for part in self.parts:
            before = part.share if shares is None else Fraction(shares[part.name])
            if part.share != before:
                raise ConfigError(
                    f"part {part.name!r} is {float(part.share):.4g} of all samples, and the run began with "
                    f"{float(before):.4g}: a weight changed; set it back (data.parts, or queries.NAME.weight where the "
                    "set was made), or start a new run"
                )

    def verify(self) -> list[str]:
        """Read all files and hold them against the digests that are known: what does not hold, one line each."""
        return [f"part {part.name!r}: {line}" for part in self.parts for line in part.source.verify()]


def _difference(mine: list[list[Any]], others: list[list[Any]]) -> str | None:
    names = ("pictures", "bytes", "digest")
    found, before = ({row[0]: list(row[1:]) for row in rows} for rows in (mine, others))
    for name in sorted(found.keys() | before.keys()):
        if name not in before:
            return f"shard {name} was added"
        if name not in found:
            return f"shard {name} was removed"
        for what, now, then in zip(names, found[name], before[name], strict=True):
            if now != then:
                return f"shard {name} changed: {what} {now}, was {then}"
    return None if [row[0] for row in mine] == [row[0] for row in others] else "its shards have another order"


def shares_of(weights: Mapping[str, float | None], counts: Mapping[str, int], *, key: str) -> dict[str, Fraction]:
    """Share of each part in all samples.

    Without any weight, by number of pictures. All with weights: in proportion to them. Where some have one, weights
    are shares of 1, and the others divide what is left by their number of pictures.

    Args:
        weights: of the parts, None where one has none.
        counts: pictures of each part.
        key: of the recipe, for messages.

    Raises:
        ConfigError: some have no weight, and nothing is left for them.
    """
    given = {name: Fraction(weight) for name, weight in weights.items() if weight is not None}
    total = sum(given.values(), Fraction(0))
    if len(given) == len(weights):
        return {name: weight / total for name, weight in given.items()}
    if total >= 1:
        without = sorted(set(weights) - set(given))
        raise ConfigError(
            f"{key}: weights add up to {float(total):g} and {without[0]!r} has none; "
            "give a weight to every part, or weights below 1 in all, so that the rest is left for the others"
        )
    num_others = sum(count for name, count in counts.items() if name not in given)
    return {
        name: given[name] if name in given else (1 - total) * Fraction(counts[name], num_others) for name in weights
    }
