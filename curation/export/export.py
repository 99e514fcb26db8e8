"""Export: the samples of the set in seeded order as webdataset tars, and the manifest that says what lies where.

The order is that of sha256(seed | sha256 of the bytes | id): a shuffle over the whole set that holds no picture. It is
made as tables are sorted that do not fit into memory: runs of sorted rows (``export_rows``), then ranges of the order,
each gathered from all runs (``export_plan``). So a tar reads a slice of one or two parts, whatever shards its pictures
come from, and a set of other tars (``export.samples_per_tar``) is cut from the same plan.

A sample is ``KEY.jpg`` (or what its format is) and ``KEY.json`` with its lineage; keys are positions in the shuffled
set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation.dedup.near import rows_at
from curation.schema import TABLES
from curation.stage import Context, GlobalStage, Map, Task, TaskIO
from training.config import Config

_BLOCK_BYTES = 1 << 23
# Samples in a part of export_rows and of export_plan: 70 MB where texts have 60 letters, 460 MB where they have 2,000.
# Each range is gathered from all runs, so there are at most so many of both: a set of 33 million has larger parts.
_ROWS, _PARTS = 1 << 16, 512
_TARS = 64  # tars that one task reads back
LINEAGE = (
    "url", "location", "page_url", "alt_text", "source", "label", "part", "query_id", "query_label", "similarity",
    "cluster", "sha256", "image_id", "width_px", "height_px", "blurred",
)  # fmt: skip
_FROM = {
    "urls": ("url", "location", "page_url", "alt_text", "source", "label"),
    "images": ("format", "object", "offset", "num_bytes"),
    "hashes": ("width_px", "height_px"),
    "detections": ("num_faces", "blurred_object", "blurred_offset", "blurred_bytes"),
}


class ExportConfig(Config):
    """How the set is written."""

    samples_per_tar: int = Field(1000, ge=1)
    seed: int = Field(0, description="of the shuffle")


# The order


def shuffle_key(seed: int, sha256: str, image_id: int, copy: int = 0) -> int:
    """Place of a sample in the shuffled set, of 62 bits; equal ones go by image_id and copy."""
    told = f"{seed}|{sha256}|{image_id}" + (f"|{copy}" if copy else "")
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 2


def key_range(number: int, num_ranges: int) -> tuple[int, int]:
    """First key of one of equal ranges of all keys, and the one behind its last."""
    first, end = ((n << 62) // num_ranges for n in (number, number + 1))
    return first, end


def in_shuffled_order(rows: pa.Table) -> pa.Table:
    """Rows of ``export_rows``, sorted."""
    order = np.lexsort([rows[name].to_numpy() for name in ("copy", "image_id", "shuffle_key")])
    return rows.take(pa.array(order))


def samples_of(io: TaskIO, shard: int, seed: int) -> pa.Table:
    """Rows of ``export_rows``: the samples of a shard, and all that the manifest and the bytes need of them."""
    chosen = io.read(io.part("choices", shard))
    columns = {name: chosen[name] for name in chosen.column_names}
    if not len(chosen):
        return TABLES["export_rows"].schema.empty_table()
    ids = chosen["image_id"].to_numpy()
    for table, names in _FROM.items():
        found = io.read(io.part(table, shard), ["image_id", *names])
        at = pa.array(rows_at(found["image_id"].to_numpy(), ids))
        columns |= {name: found[name].take(at) for name in names}
    keys = zip(chosen["sha256"].to_pylist(), ids.tolist(), chosen["copy"].to_pylist(), strict=True)
    # Without faces it is what was seen of a file that holds more: it stands in for an original that was purged.
    needed = pc.or_(pc.greater(columns["num_faces"], 0), pc.is_null(columns["object"]))
    blurred = pc.and_(pc.is_valid(columns["blurred_object"]), needed)
    extension = pc.if_else(pc.equal(columns["format"], "jpeg"), "jpg", columns["format"])
    columns |= {
        "shuffle_key": pa.array([shuffle_key(seed, *key) for key in keys], pa.int64()),
        "blurred": blurred,
        "ext": pc.if_else(blurred, "jpg", extension),
        "object": pc.if_else(blurred, columns["blurred_object"], columns["object"]),
        "object_offset": pc.if_else(blurred, columns["blurred_offset"], columns["offset"]),
        "num_bytes": pc.if_else(blurred, columns["blurred_bytes"], columns["num_bytes"]),
    }
    schema = TABLES["export_rows"].schema
    return pa.table([columns[name] for name in schema.names], schema=schema)


def sorted_rows(io: TaskIO, *, shards: list[int], seed: int) -> pa.Table:
    """A part of ``export_rows``: the samples of some shards, sorted."""
    return in_shuffled_order(pa.concat_tables([samples_of(io, shard, seed) for shard in shards]))


def planned_range(io: TaskIO, *, runs: list[int], number: int, num_ranges: int) -> pa.Table:
    """A part of ``export_plan``: the samples of a range of the order, gathered from all parts of ``export_rows``."""
    within = ("shuffle_key", *key_range(number, num_ranges))
    schema = TABLES["export_rows"].schema
    found = [io.read(io.part("export_rows", index), within=within) for index in runs]
    rows = in_shuffled_order(pa.concat_tables([schema.empty_table(), *found]))
    columns = {name: rows[name] for name in rows.column_names} | {"row": pa.array(np.arange(len(rows)))}
    schema = TABLES["export_plan"].schema
    return pa.table([columns[name] for name in schema.names], schema=schema)


# The tars


def write_tar(io: TaskIO, *, position: int, slices: list[tuple[int, int, int]]) -> pa.Table:
    """One tar of the set, and its part of ``manifest``.

    Args:
        io: of the task.
        position: of its first sample in the set.
        slices: what it holds, as (part of ``export_plan``, first row, row behind the last).
    """
    writer = io.tar("tars", root="run")
    rows: list[dict[str, Any]] = []
    for index, first, end in slices:
        for sample in io.read(io.part("export_plan", index), within=("row", first, end)).to_pylist():
            key = f"{position + len(rows):09d}"
            data = io.blob(sample["object"], sample["object_offset"], sample["num_bytes"])
            offset = writer.add(f"{key}.{sample['ext']}", data)
            lineage = {name: sample[name] for name in LINEAGE}
            writer.add(f"{key}.json", json.dumps(lineage, ensure_ascii=False, sort_keys=True).encode())
            rows.append({**sample, "key": key, "offset": offset, "size": len(data)})
    path = writer.close()
    names = TABLES["manifest"].schema.names
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in names} | {"tar": path} for row in rows], schema=TABLES["manifest"].schema
    )


def read_back(io: TaskIO, *, tars: list[int]) -> pa.Table:
    """A part of ``tar_digests``: what some tars hold, and their sha256 as read back."""
    rows = []
    for number in tars:
        manifest = io.read(io.part("manifest", number), ["tar"])
        path = manifest["tar"][0].as_py()
        size = io.size(path, root="run")
        digest = hashlib.sha256()
        for offset in range(0, size, _BLOCK_BYTES):
            digest.update(io.blob(path, offset, min(_BLOCK_BYTES, size - offset), root="run"))
        rows.append({"tar": path, "num_samples": manifest.num_rows, "num_bytes": size, "sha256": digest.hexdigest()})
    return pa.Table.from_pylist(rows, schema=TABLES["tar_digests"].schema)


def list_shards(io: TaskIO, *, groups: list[int]) -> pa.Table:
    """The table ``shards``: all tars, in order."""
    schema = TABLES["shards"].schema
    return pa.concat_tables([schema.empty_table(), *(io.read(io.part("tar_digests", index)) for index in groups)])


# The stage


def part_rows(total: int) -> int:
    """Samples in a part of the order of a set."""
    rows = _ROWS
    while total > rows * _PARTS:
        rows *= 2
    return rows


def runs_of(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Consecutive shards that are sorted together, given their numbers of samples: up to ``most`` of these, or one."""
    start, held = 0, 0
    for at, size in enumerate(sizes):
        if at > start and held + size > most:
            yield slice(start, at)
            start, held = at, 0
        held += size
    if len(sizes):
        yield slice(start, len(sizes))


def slices_of(sizes: Sequence[int], first: int, end: int) -> list[tuple[int, int, int]]:
    """Which rows of which part are the rows ``first`` to ``end`` of all parts, given their numbers of rows."""
    bounds = enumerate(pairwise(accumulate(sizes, initial=0)))
    return [(n, max(first, a) - a, min(end, b) - a) for n, (a, b) in bounds if max(first, a) < min(end, b)]


class Export(GlobalStage):
    """The shuffled order in two rounds, then one task a tar, then the list of tars."""

    name = "export"
    section = "export"
    version = 2
    reads = ("choices", "urls", "images", "hashes", "detections")
    # Where bytes lie changes when a purge writes tars of the pool again.
    by_content: ClassVar[tuple[str, ...]] = ("urls", "images", "detections")
    writes = ("export_rows", "export_plan", "manifest", "tar_digests", "shards")
    config: ExportConfig

    def fingerprint_values(self) -> dict[str, Any]:
        """Nothing: each task holds what it needs, so that other tars are cut from the same plan."""
        return {}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Four rounds of tasks and the list."""
        plan = self._planned(context, map)
        sizes = [context.num_rows(part) for part in plan]
        total, step = sum(sizes), self.config.samples_per_tar
        tars = []
        for number, position in enumerate(range(0, total, step)):
            slices = slices_of(sizes, position, min(total, position + step))
            tars.append(
                Task(
                    function=write_tar,
                    args={"position": position, "slices": [list(one) for one in slices]},
                    reads=tuple(plan[index] for index, _, _ in slices),
                    writes=context.part("manifest", number),
                )
            )
        map(tars)
        groups = []
        for number, start in enumerate(range(0, len(tars), _TARS)):
            some = range(start, min(len(tars), start + _TARS))
            groups.append(
                Task(
                    function=read_back,
                    args={"tars": list(some)},
                    reads=tuple(tars[n].writes for n in some),
                    writes=context.part("tar_digests", number),
                )
            )
        map(groups)
        args = {"groups": list(range(len(groups)))}
        reads = tuple(task.writes for task in groups)
        map([Task(function=list_shards, args=args, reads=reads, writes=context.part("shards", 0))])

    def _planned(self, context: Context, map: Map) -> list[Any]:  # noqa: A002
        """Have the order made; the parts of ``export_plan``."""
        shards = context.shards("pool", "query")
        sizes = [context.num_rows(context.part("choices", shard)) for shard in shards]
        runs = []
        most = part_rows(sum(sizes))
        for number, some in enumerate(runs_of(sizes, most)):
            reads = tuple(context.part(t, s) for t in ("choices", *_FROM) for s in shards[some])
            args: dict[str, Any] = {"shards": shards[some], "seed": self.config.seed}
            runs.append(Task(function=sorted_rows, args=args, reads=reads, writes=context.part("export_rows", number)))
        map(runs)
        num_ranges = max(1, -(-sum(sizes) // most))
        reads = tuple(task.writes for task in runs)
        plan = []
        for number in range(num_ranges):
            args = {"runs": list(range(len(runs))), "number": number, "num_ranges": num_ranges}
            writes = context.part("export_plan", number)
            plan.append(Task(function=planned_range, args=args, reads=reads, writes=writes))
        map(plan)
        return [task.writes for task in plan]
