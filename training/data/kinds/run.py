"""What `lvd curate` made: a tar a shard, verified against the tables of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.compute as pc
import yaml

from training.config import ConfigError
from training.data.files import open_file, read_file, read_range, size_of
from training.data.kinds.parquet import read_parquet
from training.data.kinds.shard import OPEN_THREADS, Shard, as_label


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """Pictures of a run's tar by the offsets of its manifest."""

    path: str
    keys: Sequence[str]
    offsets: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int64 [n]
    manifest: str

    def read(self, row: int) -> bytes:  # noqa: D102 - see Rows
        return read_range(self.path, int(self.offsets[row]), int(self.sizes[row]))

    def labels(self, name: str) -> list[str | None]:  # noqa: D102
        table = read_parquet(self.manifest)
        if name not in table.column_names:
            raise ConfigError(f"{self.manifest}: no column {name!r}; it has: {', '.join(table.column_names)}")
        found = dict(zip(table["key"].to_pylist(), table[name].to_pylist(), strict=True))
        return [as_label(found[key]) for key in self.keys]


def open_run(location: str, *, split: bool) -> dict[str, RunSource]:
    """Open what `lvd curate` made; with ``split``, one source for each value of the manifest's column ``part``.

    Raises:
        ConfigError: it is no finished run, or its tars and manifest are not those that it lists.
    """
    root = location.rstrip("/")
    try:
        listed = read_parquet(f"{root}/shards/part-{0:09d}.parquet").to_pylist()
    except FileNotFoundError:
        raise ConfigError(
            f"{root}: no table `shards` in it: no run of `lvd curate`, or its export is not done"
        ) from None
    shards = []
    for number, row in enumerate(listed):
        shard = Shard(
            name=row["tar"],
            path=f"{root}/{row['tar']}",
            num_samples=row["num_samples"],
            num_bytes=row["num_bytes"],
            digest=row["sha256"],
            number=number,
        )
        shards.append(shard)
    with ThreadPoolExecutor(OPEN_THREADS) as pool:
        counts = list(pool.map(lambda shard: _check_tar(root, shard), shards))
    if not split:
        return {"": RunSource(root, shards, only=None)}
    names = sorted({name for count in counts for name in count})
    return {
        name: RunSource(
            root,
            [replace(shard, num_samples=n[name]) for shard, n in zip(shards, counts, strict=True) if name in n],
            only=name,
        )
        for name in names
    }


def weights_of_run(location: str) -> dict[str, float]:
    """Weights that a run's own recipe gives to its parts, as far as it does; a run without its recipe has none.

    Raises:
        ConfigError: the recipe cannot be read.
    """
    path = f"{location.rstrip('/')}/recipe.yaml"
    try:
        queries = (yaml.safe_load(read_file(path)) or {}).get("queries") or {}
        return {name: float(told["weight"]) for name, told in queries.items() if told.get("weight") is not None}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        raise ConfigError(f"{path}: is no recipe of `lvd curate`; run it again, or give part_weights") from None


def _manifest_path(root: str, shard: Shard) -> str:
    return f"{root}/manifest/part-{shard.number:09d}.parquet"


def _check_tar(root: str, shard: Shard) -> dict[str, int]:
    """Hold a tar against the tables that list it; its pictures by part."""
    found = size_of(shard.path)
    if found is None:
        raise ConfigError(f"{shard.path}: missing, though the run lists it")
    if found != shard.num_bytes:
        raise ConfigError(f"{shard.path}: {found:,} bytes, the run lists {shard.num_bytes:,}; make the run again")
    path = _manifest_path(root, shard)
    try:
        table = read_parquet(path, ["part", "tar"])
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing, though the run lists its tar {shard.name}") from None
    if len(table) != shard.num_samples:
        raise ConfigError(f"{path}: {len(table):,} rows, the run lists {shard.num_samples:,} pictures in {shard.name}")
    if pc.any(pc.not_equal(table["tar"], shard.name)).as_py():
        raise ConfigError(f"{path}: of another tar than {shard.name}")
    return {row["values"]: row["counts"] for row in pc.value_counts(table["part"]).to_pylist()}


class RunSource:
    """A run, or one of its parts."""

    def __init__(self, root: str, shards: list[Shard], *, only: str | None) -> None:
        self.shards = shards
        self.notes: list[str] = []
        self._root = root
        self._only = only

    def rows(self, shard: Shard) -> RunRows:  # noqa: D102 - see Source
        path = _manifest_path(self._root, shard)
        table = read_parquet(path, ["key", "offset", "size", "part"])
        if self._only is not None:
            table = table.filter(pc.equal(table["part"], self._only))
        if len(table) != shard.num_samples:
            raise ConfigError(f"{path}: {len(table):,} pictures, at the start it held {shard.num_samples:,}")
        return RunRows(
            path=shard.path,
            keys=table["key"].to_pylist(),
            offsets=table["offset"].to_numpy(),
            sizes=table["size"].to_numpy(),
            manifest=path,
        )

    def verify(self) -> list[str]:  # noqa: D102
        problems = []
        for shard in self.shards:
            digest = hashlib.sha256()
            with open_file(shard.path) as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            if digest.hexdigest() != shard.digest:
                problems.append(f"{shard.path}: sha256 is {digest.hexdigest()}, the run lists {shard.digest}")
        return problems
