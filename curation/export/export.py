"""Export: the chosen pictures in seeded order as webdataset tars, and the manifest that says what lies where.

The order is that of sha256(seed | sha256 of the bytes | id): a shuffle over the whole set that needs no picture in
memory. A sample is ``KEY.jpg`` (or what its format is) and ``KEY.json`` with its lineage; keys are positions in the
shuffled set.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.near import rows_at
from curation.schema import TABLES, shard_of
from curation.stage import Context, GlobalStage, Map, Task, TaskIO
from training.config import Config

_EXTENSIONS = {"jpeg": "jpg"}
_BLOCK_BYTES = 1 << 23
LINEAGE = (
    "url", "location", "page_url", "alt_text", "source", "label", "part", "query_id", "similarity", "cluster", "sha256",
    "image_id", "width_px", "height_px", "blurred",
)  # fmt: skip


class ExportConfig(Config):
    """How the set is written."""

    samples_per_tar: int = Field(1000, ge=1)
    seed: int = Field(0, description="of the shuffle")


def shuffle_key(seed: int, sha256: str, image_id: int) -> bytes:
    """Place of a picture in the shuffled set."""
    return hashlib.sha256(f"{seed}|{sha256}|{image_id}".encode()).digest()


def plan_export(io: TaskIO, *, shards: list[int], samples_per_tar: int, seed: int) -> pa.Table:
    """The table ``export_plan``: every chosen picture, in shuffled order."""
    keys, ids = [], []
    for shard in shards:
        rows = io.read(io.part("selection", shard), ["image_id", "sha256", "keep"])
        for row in rows.filter(rows["keep"]).to_pylist():
            keys.append(shuffle_key(seed, row["sha256"], row["image_id"]))
            ids.append(row["image_id"])
    order = sorted(range(len(keys)), key=lambda n: keys[n])
    position = np.arange(len(ids), dtype=np.int64)
    return pa.table(
        [
            pa.array(position),
            pa.array([ids[n] for n in order], pa.int64()),
            pa.array((position // samples_per_tar).astype(np.int32)),
        ],
        schema=TABLES["export_plan"].schema,
    )


def _rows(io: TaskIO, table: str, shard: int, ids: np.ndarray, columns: list[str]) -> list[dict[str, Any]]:
    found = io.read(io.part(table, shard), ["image_id", *columns])
    return list(found.take(pa.array(rows_at(found["image_id"].to_numpy(), ids))).to_pylist())


def samples_of(io: TaskIO, ids: np.ndarray) -> dict[int, dict[str, Any]]:
    """Everything that the manifest and the bytes need, by image_id; one shard in memory at a time."""
    samples: dict[int, dict[str, Any]] = {}
    for shard in sorted({shard_of(image_id) for image_id in ids}):
        mine = np.sort(ids[ids // 1_000_000 == shard])
        tables = (
            _rows(io, "urls", shard, mine, ["url", "location", "page_url", "alt_text", "source", "label"]),
            _rows(io, "images", shard, mine, ["sha256", "format", "object", "offset", "num_bytes"]),
            _rows(io, "hashes", shard, mine, ["width_px", "height_px"]),
            _rows(io, "detections", shard, mine, ["blurred_object", "blurred_offset", "blurred_bytes"]),
            _rows(io, "selection", shard, mine, ["part", "query_id", "similarity", "cluster"]),
        )
        for parts in zip(*tables, strict=True):
            sample = {key: value for row in parts for key, value in row.items()}
            samples[sample["image_id"]] = sample | {"blurred": sample["blurred_object"] is not None}
    return samples


def write_tar(io: TaskIO, *, tar: int) -> pa.Table:
    """One tar of the set, and its part of ``manifest``."""
    plan = io.read(io.part("export_plan", 0))
    plan = plan.filter(pa.compute.equal(plan["tar"], tar))
    samples = samples_of(io, plan["image_id"].to_numpy())
    writer = io.tar("tars", root="run")
    rows = []
    for position, image_id in zip(plan["position"].to_pylist(), plan["image_id"].to_pylist(), strict=True):
        sample, key = samples[image_id], f"{position:09d}"
        if sample["blurred"]:
            place, extension = ("blurred_object", "blurred_offset", "blurred_bytes"), "jpg"
        else:
            place, extension = ("object", "offset", "num_bytes"), _EXTENSIONS.get(sample["format"], sample["format"])
        data = io.blob(*(sample[name] for name in place))
        offset = writer.add(f"{key}.{extension}", data)
        lineage = {name: sample[name] for name in LINEAGE}
        writer.add(f"{key}.json", json.dumps(lineage, ensure_ascii=False, sort_keys=True).encode())
        rows.append({**sample, "key": key, "offset": offset, "size": len(data), "ext": extension})
    path = writer.close()
    names = TABLES["manifest"].schema.names
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in names} | {"tar": path} for row in rows], schema=TABLES["manifest"].schema
    )


def list_shards(io: TaskIO, *, num_tars: int) -> pa.Table:
    """The table ``shards``: what each tar holds, and its sha256 as read back."""
    rows = []
    for number in range(num_tars):
        manifest = io.read(io.part("manifest", number), ["tar"])
        path = manifest["tar"][0].as_py()
        size = io.size(path, root="run")
        digest = hashlib.sha256()
        for offset in range(0, size, _BLOCK_BYTES):
            digest.update(io.blob(path, offset, min(_BLOCK_BYTES, size - offset), root="run"))
        rows.append({"tar": path, "num_samples": manifest.num_rows, "num_bytes": size, "sha256": digest.hexdigest()})
    return pa.Table.from_pylist(rows, schema=TABLES["shards"].schema)


class Export(GlobalStage):
    """The shuffled order first, then one task a tar, then the list of tars."""

    name = "export"
    section = "export"
    reads = ("selection", "urls", "images", "hashes", "detections")
    by_content: ClassVar[tuple[str, ...]] = ("urls",)
    writes = ("export_plan", "manifest", "shards")
    config: ExportConfig

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Three rounds of tasks."""
        shards = context.shards("pool", "query")
        chosen = tuple(context.part("selection", shard) for shard in shards)
        plan = context.part("export_plan", 0)
        args: dict[str, Any] = {**self.config.fingerprint_values(), "shards": shards}
        map([Task(function=plan_export, args=args, reads=chosen, writes=plan)])
        num_tars = -(-context.num_rows(plan) // self.config.samples_per_tar)
        facts = tuple(context.part(t, s) for t in ("urls", "images", "hashes", "detections") for s in shards)
        manifest = [context.part("manifest", number) for number in range(num_tars)]
        map(
            [
                Task(function=write_tar, args={"tar": number}, reads=(plan, *chosen, *facts), writes=part)
                for number, part in enumerate(manifest)
            ]
        )
        shards_part = context.part("shards", 0)
        map([Task(function=list_shards, args={"num_tars": num_tars}, reads=tuple(manifest), writes=shards_part)])
