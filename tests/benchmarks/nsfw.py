"""Harmless pictures that the default thresholds drop as explicit, for both orders of channels.

    make bench NAME=nsfw ARGS="--data FOLDER"

FOLDER holds nsfw_negative_index.csv, what it names, and the three pool_*.tar. All pictures are harmless, so each one
that a threshold drops is a false drop; recall is not measured, for want of explicit pictures. The largest score of each
class at 320 px is judged, as the stage `safety` judges it. The index names 15 photos of a pool: they count once.

On 200 of them, evenly spread, each class's score is compared with that of nudenet's own
preprocessing and session, on the same array and the same order of channels.

Prints counts, writes a JSON, and ends with a line for each goal.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from nudenet import NudeDetector
from nudenet import nudenet as package

from curation.safety.detector import EXPLICIT, Channels, NudeNetDetector, class_scores_of
from curation.safety.verdict import SafetyConfig, judge_nsfw
from training.data.pixels import decode

POOLS = ("pool_imagenet_300.tar", "pool_coco_48.tar", "pool_caltech_background_80.tar")
LIMITS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
NUM_COMPARED, MOST_APART = 200, 1e-3
MOST_OF_ALL, MOST_OF_POOL = 0.003, 0.007
PACKAGES = ("numpy", "opencv-python-headless", "onnxruntime", "nudenet")


def pictures_of(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Set, name and pixels of the photos of the pools, then of what the index names beyond them."""
    for name in POOLS:
        with tarfile.open(folder / name) as tar:
            for row in csv.DictReader(tar.extractfile("manifest.csv").read().decode().splitlines()):
                yield name, row["file"], decode(tar.extractfile(row["file"]).read()).rgb
    with (folder / "nsfw_negative_index.csv").open() as lines:
        index = [row for row in csv.DictReader(lines) if row["set"] not in POOLS]
    for name in sorted({row["set"] for row in index}):
        table = pq.read_table(folder / name, columns=["key", "image"])
        images = dict(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True))
        for row in index:
            if row["set"] == name:
                yield name, row["file_or_key"], decode(images[row["file_or_key"]]).rgb


def theirs(detector: Any, rgb: np.ndarray, channels: Channels) -> dict[str, float]:
    """Largest score of each class by nudenet's own code. It shows the network an array in the order it is given."""
    shown = rgb if channels == "rgb" else np.ascontiguousarray(rgb[:, :, ::-1])
    prepared = package._read_image(shown, detector.input_width)[0]
    (output,) = detector.onnx_session.run(None, {detector.input_name: prepared})
    return class_scores_of(output[0], vars(package)["__labels"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the index, tars and parquet files")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/nsfw.json"))
    options = parser.parse_args()
    ours, other = NudeNetDetector(), NudeDetector()
    thresholds = SafetyConfig().nsfw_threshold
    pictures = list(pictures_of(options.data))
    compared = set(np.linspace(0, len(pictures) - 1, NUM_COMPARED).astype(int).tolist())
    is_pool = np.array([name in POOLS for name, _, _ in pictures])
    report: dict[str, Any] = {"thresholds": thresholds, "pictures": len(pictures), "pool": int(is_pool.sum())}
    orders: tuple[Channels, ...] = ("bgr", "rgb")
    most_apart = 0.0
    for channels in orders:
        scores = []
        for place, (_, _, rgb) in enumerate(pictures):
            (output,) = ours.outputs([rgb], channels=channels)
            scores.append(class_scores_of(output, ours.labels))
            if place in compared:
                expected = theirs(other, rgb, channels)
                most_apart = max(most_apart, *(abs(scores[-1][label] - score) for label, score in expected.items()))
        judged = [judge_nsfw(one, thresholds)[0] is not None for one in scores]
        dropped = np.array(judged)
        names = [f"{name}: {key}" for (name, key, _), drops in zip(pictures, judged, strict=True) if drops]
        table = {}
        print(f"{channels}: largest score at least, pool + index")
        for label in (*EXPLICIT, "MALE_BREAST_EXPOSED"):
            column = np.array([one[label] for one in scores])
            counts = {limit: [int((column[part] >= limit).sum()) for part in (is_pool, ~is_pool)] for limit in LIMITS}
            table[label] = counts
            cells = "  ".join(f"{limit}: {pool}+{index}" for limit, (pool, index) in counts.items())
            print(f"  {label:<26} {cells}")
        report[channels] = {
            "dropped": names,
            "dropped_of_pool": int(dropped[is_pool].sum()),
            "of_all": float(dropped.mean()),
            "of_pool": float(dropped[is_pool].mean()),
            "counts": table,
        }
        print(
            f"  dropped at the default thresholds: {dropped.sum()} of {len(pictures):,} ({dropped.mean():.2%}), "
            f"of pool photos {dropped[is_pool].sum()} of {is_pool.sum()} ({dropped[is_pool].mean():.2%}): {names}"
        )
    used = report["bgr"]
    results = {
        "all": (used["of_all"], MOST_OF_ALL, used["of_all"] <= MOST_OF_ALL),
        "pool": (used["of_pool"], MOST_OF_POOL, used["of_pool"] <= MOST_OF_POOL),
        "apart": (most_apart, MOST_APART, most_apart <= MOST_APART),
    }
    report["compared"] = {"pictures": len(compared), "most_apart": most_apart}
    report["goals"] = {name: goal for name, (_, goal, _) in results.items()}
    report["machine"] = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    report["versions"] = {name: version(name) for name in PACKAGES}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers in {options.json}")
    for name, (value, goal, reached) in results.items():
        print(f"nsfw {name} ratio {value:.2g} goal {goal} {'ok' if reached else 'short'}")
    return 0 if all(reached for _, _, reached in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
