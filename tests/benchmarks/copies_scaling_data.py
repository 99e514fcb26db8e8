"""The pools of ``copies_scaling.py``: distinct pictures, planted copies, a benchmark, copies of that; and their end."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from copy_edits import EDITS

from curation.dedup.edges import is_copy
from curation.dedup.unionfind import connected_components
from training.data.tars import TarWriter

NUM_BENCHMARK = 200
COPIES_A_PICTURE = 0.1
COPIES_A_GROUP = 2  # in the mean: some pictures are copied once, some five times
PICTURES_A_LEAK = 500
SETS = ("tiny_imagenet_100c", "cifar10_jpg_22k")
TARS = (
    "pool_imagenet_300", "pool_coco_48", "pool_caltech_background_80", "curated_caltech101_6perclass",
    "curated_flowers5_17perclass", "faces_boxes",
)  # fmt: skip
# Those that pHash and the default descriptor together find in most of such small pictures (`--edits all` on 2,000: 116
# of 119). Of disc, rotation and crop .84 they find about half there, of crop .67 few, of what is pasted none.
FOUND_EDITS = ("jpeg q20", "half size", "grey", "flip", "blur", "caption", "colour")
WITHOUT = "caption"  # three texts over 64 pixels: what they have in common is the text

Named = tuple[str, bytes]


def distinct_pictures(data: Path) -> list[Named]:
    """Name and file of every picture, each content once, in an order that mixes the sets; seeded."""
    found: dict[str, Named] = {}
    for name, file in (*_of_parquet(data), *_of_tars(data)):
        found.setdefault(hashlib.sha256(file).hexdigest(), (name, file))
    pictures = [found[sha256] for sha256 in sorted(found)]
    random.Random(0).shuffle(pictures)
    return pictures


def _of_parquet(data: Path) -> Iterator[Named]:
    for name in SETS:
        for row, file in enumerate(pq.read_table(data / f"{name}.parquet", columns=["image"])["image"]):
            yield f"{name}-{row:05d}", file.as_py()


def _of_tars(data: Path) -> Iterator[Named]:
    """Photographs. Of Caltech's faces those of ``Faces`` only: the others are cuts of the same photographs."""
    for name in TARS:
        with tarfile.open(data / f"{name}.tar") as tar:
            manifest = tar.extractfile("manifest.csv")
            assert manifest is not None
            for row, line in enumerate(csv.DictReader(io.TextIOWrapper(manifest))):
                member = tar.extractfile(line["file"])
                assert member is not None
                if not line["file"].startswith(("Faces_easy", "caltech_")):
                    yield f"{name}-{row:05d}", member.read()


def copies_of(pictures: Sequence[Named], num: int, edits: Sequence[str], draw: random.Random) -> dict[str, bytes]:
    """Edited copies of drawn pictures, by ``EDIT-NUMBER-of-ORIGINAL``; spaces are underscores."""
    chosen = draw.sample(range(len(pictures)), min(len(pictures), max(1, num // COPIES_A_GROUP)))
    made = {}
    for number in range(num):
        name, file = pictures[draw.choice(chosen)]
        edit = edits[number % len(edits)]
        other = opened(pictures[draw.randrange(len(pictures))][1])
        made[f"{edit.replace(' ', '_')}-{number:05d}-of-{name}"] = EDITS[edit](opened(file), other, draw)
    return made


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def build(folder: Path, pictures: Sequence[Named], num: int, edits: Sequence[str]) -> dict[str, int]:
    """``pool.tar`` and ``benchmark.tar`` of one size; how many pictures they hold."""
    folder.mkdir(parents=True)
    draw = random.Random(num)
    benchmark, distinct = pictures[:NUM_BENCHMARK], pictures[NUM_BENCHMARK : NUM_BENCHMARK + num]
    if len(distinct) < num:
        sys.exit(f"--sizes: got {num:,}, --data holds {len(distinct):,} distinct pictures beside the benchmark")
    copies = copies_of(distinct, round(num * COPIES_A_PICTURE), edits, draw)
    leaks = copies_of(benchmark, num // PICTURES_A_LEAK, edits, draw)
    leaks = {f"leak-{name}": file for name, file in leaks.items()}
    members = [*distinct, *copies.items(), *leaks.items()]
    draw.shuffle(members)
    _write(folder / "pool.tar", members)
    _write(folder / "benchmark.tar", benchmark)
    return {"distinct": num, "copies": len(copies), "leaks": len(leaks), "benchmark": len(benchmark)}


def _write(path: Path, members: Sequence[Named]) -> None:
    writer = TarWriter(path)
    for name, file in members:
        writer.add(f"{name}.jpg", file)
    writer.close()


# --- what came of them ----------------------------------------------------------------------------------------------


def table(folder: Path, columns: list[str]) -> pd.DataFrame:
    """Some columns of all parts below a folder, by image_id."""
    parts = [pd.read_parquet(path, columns=["image_id", *columns]) for path in sorted(folder.rglob("*.parquet"))]
    return pd.concat(parts).set_index("image_id").sort_index()


def copies_found(folder: Path, threshold: float) -> dict[str, Any]:
    """Where the pictures of a run ended: near groups and components together.

    Args:
        folder: holds pool and run.
        threshold: from which on edges join.
    """
    urls = table(folder / "pool" / "urls", ["source", "location"]).query("source == 'pool'")
    near = table(folder / "run" / "near", ["representative_id"]).representative_id
    component = table(folder / "run" / "duplicates", ["component_id"]).component_id
    kept = table(folder / "run" / "leakage", ["keep"]).keep
    end = component[near].set_axis(near.index)
    leaking = set(component[kept.index[~kept]])

    pattern = r"^(?P<leak>leak-)?(?:(?P<edit>[^-]+)-\d+-of-)?(?P<original>.+)\.jpg$"
    named = urls.location.str.extract(pattern)
    edit, id_of = named.edit.str.replace("_", " "), {name[:-4]: image for image, name in urls.location.items()}
    edits = sorted(edit.dropna().unique())
    copies, leaks = {name: [0, 0, 0] for name in edits}, {name: [0, 0] for name in edits}
    for image in named.index[named.edit.notna()]:
        if pd.notna(named.leak[image]):
            counts = leaks[edit[image]]
            counts[1] += int(image in end and end[image] in leaking)
        else:
            counts, original = copies[edit[image]], id_of[named.original[image]]
            if image in end and original in end:
                counts[1] += int(near[image] == near[original])
                counts[2] += int(end[image] == end[original])
        counts[0] += 1

    original = named.original[near.index]
    groups = original.groupby(end).agg(["size", "nunique"])
    mixed = groups[groups["nunique"] > 1]["size"]
    without = original[edit[near.index] != WITHOUT]
    others = without.groupby(_joined(folder, near, without.index, threshold)).agg(["size", "nunique"])
    largest = groups.loc[groups["size"].idxmax()]
    planted = Counter(named.original[named.edit.notna()])
    return {
        "pictures": len(near),
        "largest": int(largest["size"]),
        "largest_origins": int(largest["nunique"]),
        "largest_mixed": int(mixed.max()) if len(mixed) else 0,
        "largest_without": int(others[others["nunique"] > 1]["size"].max()) if (others["nunique"] > 1).any() else 0,
        "largest_planted": max(planted.values(), default=0) + 1,
        "distinct_joined": int((groups["nunique"] - 1).sum()),
        "copies": copies,
        "leaks": leaks,
        "dropped_as_leaks": int((~kept).sum()),
    }


def _joined(folder: Path, near: pd.Series, among: pd.Index, threshold: float) -> np.ndarray:
    """Component of each of some pictures by near groups and edges among them, int64 [N]."""
    parts = [pq.read_table(path) for path in sorted((folder / "run" / "edges").glob("*.parquet"))]
    edges = pa.concat_tables(parts)
    edges = edges.filter(pa.array(is_copy(edges, threshold)))
    ends = [np.concatenate([edges[name].to_numpy(), more]) for name, more in (("a", near.index), ("b", near))]
    at = [among.get_indexer(one) for one in ends]
    inside = (at[0] >= 0) & (at[1] >= 0)
    return connected_components(len(among), at[0][inside], at[1][inside])
