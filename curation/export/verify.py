"""Verify: read every tar of a run and hold it against the tables that describe it."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curation.export.export import LINEAGE
from curation.export.objects import parts_of
from curation.schema import Part
from curation.store import Store, read_part
from training.data.pixels import DecodeError, decode

_BLOCK_BYTES = 8 << 20
_HEADER_BYTES = 512  # of a ustar header, and the grain to which members are padded


def verify(run: Store) -> tuple[list[str], int]:
    """Read all tars of a run.

    What must hold: each tar has the digest and size that ``shards`` says; its members are the samples of its part of
    ``manifest``, picture then json, keys sorted and without a gap over all tars; each json is the lineage that
    the manifest tells; pictures that were not blurred have their sha256; all decode; no image is there more often than
    it was chosen; no tar lies in ``tars/`` that no table names.

    Args:
        run: store of the run.

    Returns:
        What does not hold, one line each, and the number of samples read.
    """
    shards = read_part(run, Part("run", "shards", 0)).to_pylist()
    problems: list[str] = []
    ids: list[np.ndarray] = [np.empty(0, np.int64)]
    num_before = 0
    for tar, shard in enumerate(shards):
        part = Part("run", "manifest", tar)
        if not run.exists(part.path):
            problems.append(f"{part.path}: missing")
            continue
        manifest = read_part(run, part)
        ids.append(manifest["image_id"].to_numpy())
        problems += _verify_tar(run, shard, manifest, num_before)
        num_before += len(manifest)
    found = np.concatenate(ids)
    problems += _too_often(run, found)
    told = {shard["tar"] for shard in shards}
    problems += [f"{path}: no table names it" for path in run.list("tars") if path not in told]
    named = {Part("run", "manifest", tar).path for tar in range(len(shards))}
    problems += [f"{path}: of no tar in shards" for path in run.list("manifest") if path not in named]
    return problems, len(found)


def _too_often(run: Store, image_ids: np.ndarray) -> list[str]:
    """Pictures that are in the set more often than they were chosen; where ``choices`` is gone, more than once."""
    unique, counts = np.unique(image_ids, return_counts=True)
    parts = parts_of(run, "choices")
    chosen = np.full(len(unique), 0 if parts else 1)
    for part in parts:
        ids = read_part(run, part, ["image_id"])["image_id"].to_numpy()
        ids = ids[np.isin(ids, unique)]
        np.add.at(chosen, np.searchsorted(unique, ids), 1)
    return [
        f"image {unique[at]}: in the set {counts[at]} times, chosen {chosen[at]}"
        for at in np.flatnonzero(counts > chosen)
    ]


def _verify_tar(run: Store, shard: Mapping[str, Any], manifest: pa.Table, num_before: int) -> list[str]:
    path = shard["tar"]
    if not run.exists(path):
        return [f"{path}: missing"]
    problems = []
    num_bytes = run.size(path)
    if num_bytes != shard["num_bytes"]:
        problems.append(f"{path}: {num_bytes:,} bytes, shards says {shard['num_bytes']:,}")
    if manifest.num_rows != shard["num_samples"]:
        problems.append(f"{path}: {manifest.num_rows:,} rows in manifest, shards says {shard['num_samples']:,}")
    digest = _digest(run, path, num_bytes)
    if digest != shard["sha256"]:
        problems.append(f"{path}: sha256 is {digest}, shards says {shard['sha256']}")
    header = 0  # where the header of the next member stands
    for place, row in enumerate(manifest.to_pylist()):
        where = f"{path} {row['key']}"
        if row["key"] != f"{num_before + place:09d}":
            problems.append(f"{where}: the key should be {num_before + place:09d}")
        if row["tar"] != path:
            problems.append(f"{where}: manifest says it is in {row['tar']}")
            continue
        header, more = _verify_sample(run, row, header)
        problems += [f"{where}: {text}" for text in more]
    return problems


def _digest(run: Store, path: str, num_bytes: int) -> str:
    digest = hashlib.sha256()
    for offset in range(0, num_bytes, _BLOCK_BYTES):
        digest.update(run.read_range(path, offset, min(_BLOCK_BYTES, num_bytes - offset)))
    return digest.hexdigest()


def _verify_sample(run: Store, row: Mapping[str, Any], header: int) -> tuple[int, list[str]]:
    """Problems of one sample, whose first header should stand at ``header``, and where the next one should stand."""
    problems = []
    if row["offset"] != header + _HEADER_BYTES:
        problems.append(f"offset {row['offset']}, should be {header + _HEADER_BYTES}")
    next_header = row["offset"] + _padded(row["size"])
    data = b""
    try:
        head = run.read_range(row["tar"], row["offset"] - _HEADER_BYTES, _HEADER_BYTES + row["size"])
        data = head[_HEADER_BYTES:]
        problems += _verify_header(head, f"{row['key']}.{row['ext']}", row["size"])
        side = tarfile.TarInfo.frombuf(run.read_range(row["tar"], next_header, _HEADER_BYTES), "utf-8", "strict")
        told = json.loads(run.read_range(row["tar"], next_header + _HEADER_BYTES, side.size))
        if side.name != f"{row['key']}.json":
            problems.append(f"{side.name} follows it in the tar")
        problems += _verify_lineage(told, row)
        next_header += _HEADER_BYTES + _padded(side.size)
    except (tarfile.TarError, ValueError, OSError) as error:
        problems.append(f"the tar cannot be read there: {error}")
    if not row["blurred"] and hashlib.sha256(data).hexdigest() != row["sha256"]:
        problems.append("its bytes have another sha256")
    try:
        picture = decode(data)
        if (picture.width_px, picture.height_px) != (row["width_px"], row["height_px"]):
            problems.append(f"is {picture.width_px} x {picture.height_px}, manifest says otherwise")
    except DecodeError as error:
        problems.append(f"does not decode: {error}")
    return next_header, problems


def _verify_header(head: bytes, name: str, size: int) -> list[str]:
    info = tarfile.TarInfo.frombuf(head[:_HEADER_BYTES], "utf-8", "strict")
    return [] if (info.name, info.size) == (name, size) else [f"the tar holds {info.name} of {info.size} bytes there"]


def _verify_lineage(told: Any, row: Mapping[str, Any]) -> list[str]:
    """Problems of a sample's json: it has the keys of ``LINEAGE`` and no others, and the manifest's values."""
    if not isinstance(told, dict):
        return [f"json is no object: {told!r:.50}"]
    differing = [name for name in LINEAGE if name in told and told[name] != row[name]]
    return (
        [f"json lacks {name}" for name in LINEAGE if name not in told]
        + [f"json says {name} {told[name]!r}, manifest {row[name]!r}" for name in differing]
        + [f"json holds {name!r}, which is no lineage" for name in told if name not in LINEAGE]
    )


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _HEADER_BYTES
