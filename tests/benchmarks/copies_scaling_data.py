"""The pools of ``copies_scaling.py``: distinct pictures, planted copies, a benchmark, and copies of its pictures."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from copy_edits import EDITS

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
# Those that pHash or the default descriptor finds in most of such small pictures (`--edits all` on 2,000: 116 of 119).
# Of disc, rotation and crop .84 it finds about half there, of crop .67 few, of what is pasted none.
FOUND_EDITS = ("jpeg q20", "half size", "grey", "flip", "blur", "caption", "colour")

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
    """Edited copies of drawn pictures, by ``EDIT-NUMBER-of-ORIGINAL``."""
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
    """``pool.tar``, ``benchmark.tar`` and ``planted.json`` (copy -> original, edit) of one size; what they hold."""
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
    planted = {name: [name.partition("-of-")[2], edits[n % len(edits)]] for n, name in enumerate(copies)}
    (folder / "planted.json").write_text(json.dumps(planted))
    return {"distinct": num, "copies": len(copies), "leaks": len(leaks), "benchmark": len(benchmark)}


def _write(path: Path, members: Sequence[Named]) -> None:
    writer = TarWriter(path)
    for name, file in members:
        writer.add(f"{name}.jpg", file)
    writer.close()
