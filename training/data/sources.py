"""The kinds of parts: a finished run, anybody's tars, a folder, parquet. Each gives shards, and the rows of a shard.

| kind | a shard is | its identity, which a checkpoint remembers |
|---|---|---|
| run | a tar of `lvd curate` | name, pictures, bytes, sha256 as told by the run |
| tars | a tar | name, pictures, bytes |
| folder | 1,000 pictures that follow one another by name | names and bytes of its files |
| parquet | a row group | name and bytes of the file, pictures |

Opening a part reads what tells how many pictures each shard holds. Where they lie is read shard by shard, in the worker
that needs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from training.config import ConfigError, PartConfig
from training.data.kinds.folder import FolderSource
from training.data.kinds.parquet import ParquetSource
from training.data.kinds.run import open_run, weights_of_run
from training.data.kinds.shard import Source
from training.data.kinds.tars import TarSource


def open_source(part: PartConfig, *, cache: Path | None = None) -> dict[str, Source]:
    """Open a part.

    Args:
        part: where it lies and of what kind it is.
        cache: folder that keeps what scans of tars found; None: they are scanned at every start and visit.

    Returns:
        One source named ``""``; of a run with ``split_by_part``, one for each of its parts, by name.

    Raises:
        ConfigError: it is not there, damaged, empty, or not as it says it is.
    """
    if part.kind != "parquet" and part.where is not None:
        raise ConfigError(f"{part.location}: `where` is for parquet, not for {part.kind}")
    if part.split_by_part and part.kind != "run":
        raise ConfigError(f"{part.location}: `split_by_part` is for a run, not for {part.kind}")
    if part.part_weights is not None and not part.split_by_part:
        raise ConfigError(f"{part.location}: `part_weights` are of the parts of a run; set `split_by_part` too")
    if part.kind == "run":
        sources: dict[str, Source] = dict(open_run(part.location, split=part.split_by_part))
    elif part.kind == "tars":
        sources = {"": TarSource(part.location, cache)}
    elif part.kind == "folder":
        sources = {"": FolderSource(part.location)}
    else:
        sources = {"": ParquetSource(part.location, part.column, part.where)}
    for source in sources.values():
        if not source.shards:
            raise ConfigError("; ".join([f"{part.location}: no picture in it", *source.notes[:1]]))
    return sources


def weights_of_parts(part: PartConfig, names: Collection[str]) -> dict[str, float | None]:
    """Weight of each of the sources of ``open_source``, None where nobody gives it one.

    Raises:
        ConfigError: the recipe weights a part that the run does not have, or the run's own recipe cannot be read.
    """
    if not part.split_by_part:
        return dict.fromkeys(names)
    given = part.part_weights
    unknown = sorted(set(given or ()) - set(names))
    if unknown:
        raise ConfigError(f"{part.location}: part_weights names {unknown[0]!r}; it has: {', '.join(sorted(names))}")
    weights = weights_of_run(part.location) if given is None else given
    return {name: weights.get(name) for name in names}


def pictures(
    part: PartConfig, label: str | None, max_rows: int | None = None
) -> Iterator[tuple[str, str | None, bytes]]:
    """Pictures of a part in stored order, for evaluation.

    Args:
        part: where they lie.
        label: column of parquet or of a run's manifest, field of the json in a tar, or ``folder``; pictures whose label
            is null are left out. None: pictures without labels.
        max_rows: at most so many, drawn from all of them, always the same ones. None: all.

    Yields:
        Key, label, file.

    Raises:
        ConfigError: see open_source; or there is no such label.
    """
    sources = open_source(part)
    places = [(source, shard) for source in sources.values() for shard in source.shards]
    total = sum(shard.num_samples for _, shard in places)
    taken = np.ones(total, bool)
    if max_rows is not None and max_rows < total:
        # Raw bits: they are the same in every version of numpy.
        order = np.argsort(np.random.PCG64(total).random_raw(total), kind="stable")
        taken[order[max_rows:]] = False
    first = 0
    for source, shard in places:
        chosen = np.flatnonzero(taken[first : first + shard.num_samples])
        first += shard.num_samples
        if not len(chosen):
            continue
        rows = source.rows(shard)
        keys = rows.keys
        labels = rows.labels(label) if label is not None else [None] * shard.num_samples
        for row in chosen.tolist():
            if label is None or labels[row] is not None:
                yield keys[row], labels[row], rows.read(row)
