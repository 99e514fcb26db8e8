"""What every kind of part gives: shards, and the rows of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

OPEN_THREADS = 16  # that wait for a disk or a bucket while a part is opened


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Pictures that lie together."""

    name: str  # inside the part; stays when the set is moved
    path: str  # where it is now
    num_samples: int
    num_bytes: int
    digest: str | None = None  # of what it holds, where that is known without reading it
    number: int = 0  # of the manifest's part, the folder's slice or the row group


class Rows(Protocol):
    """The pictures of one shard."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the pictures, unique in the part unless the part itself repeats one."""

    def read(self, row: int) -> bytes:
        """The file of a picture. FileNotFoundError where it is gone; fewer bytes where the file ends early."""

    def labels(self, name: str) -> list[str | None]:
        """Label of every picture; ConfigError where there is no such label."""


class Source(Protocol):
    """An opened part."""

    shards: list[Shard]
    notes: list[str]  # what was left out, one line each

    def rows(self, shard: Shard) -> Rows:
        """Where the pictures of a shard lie."""

    def verify(self) -> list[str]:
        """Read everything and hold it against what is known of it: what does not hold, one line each."""


def as_label(value: Any) -> str | None:
    """A label as text; null stays null."""
    return None if value is None else str(value)
