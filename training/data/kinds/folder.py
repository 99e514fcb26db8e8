"""A folder: pictures at any depth, 1,000 of them a shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from training.config import ConfigError
from training.data.files import PICTURES, list_files, read_file
from training.data.kinds.shard import Shard

_SHARD_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class FolderRows:
    """Pictures that are files."""

    root: str
    keys: Sequence[str]  # paths below the folder
    paths: Sequence[str]

    def read(self, row: int) -> bytes:  # noqa: D102 - see Rows
        return read_file(self.paths[row])

    def labels(self, name: str) -> list[str | None]:  # noqa: D102
        if name != "folder":
            raise ConfigError(f"{self.root}: label {name!r} is not known of a folder; allowed: folder")
        return [PurePosixPath(key).parent.name or None for key in self.keys]


class FolderSource:
    """Pictures at any depth of a folder."""

    def __init__(self, location: str) -> None:
        self.notes: list[str] = []
        self.shards: list[Shard] = []
        self._root = location
        self._files = list_files(location, PICTURES)
        for first in range(0, len(self._files), _SHARD_ROWS):
            files = self._files[first : first + _SHARD_ROWS]
            content = "".join(f"{file.name}\n{file.num_bytes}\n" for file in files)
            self.shards.append(
                Shard(
                    name=files[0].name,
                    path=location,
                    num_samples=len(files),
                    num_bytes=sum(file.num_bytes for file in files),
                    digest=hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest(),
                    number=first // _SHARD_ROWS,
                )
            )

    def rows(self, shard: Shard) -> FolderRows:  # noqa: D102 - see Source
        first = shard.number * _SHARD_ROWS
        files = self._files[first : first + shard.num_samples]
        return FolderRows(root=self._root, keys=[file.name for file in files], paths=[file.path for file in files])

    def verify(self) -> list[str]:  # noqa: D102
        return []  # nothing tells what a file should hold
