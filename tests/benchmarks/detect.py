"""NudeNet's detector on one picture after another, against `nudenet.NudeDetector().detect`.

    make bench NAME=detect ARGS="--data FOLDER"

FOLDER holds faces_boxes.tar and pool_imagenet_300.tar. Both sides are given the same decoded arrays, and both networks
see the same order of channels, that of the array. Theirs is taken as it comes, with as many threads as there are CPUs;
ours has one. Sides take turns over the same pictures; the ratio is one of medians of CPU seconds (all threads of the
process). Boxes from 0.25 on, nudenet's own floor, must be the same on both sides: class, score within 0.001, IoU at
least 0.99.

Prints a row a side, writes a JSON, and ends with a line for the goal.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nudenet import NudeDetector

from curation.safety.detector import Box, NudeNetDetector
from training.data.pixels import decode

GOAL, FLOOR = 2.0, 0.25
PACKAGES = ("numpy", "opencv-python-headless", "onnxruntime", "nudenet")


def pictures_of(folder: Path, num: int) -> list[np.ndarray]:
    """Half of them photographs of people, half of anything, evenly spread over their archives."""
    pictures = []
    for name in ("faces_boxes.tar", "pool_imagenet_300.tar"):
        with tarfile.open(folder / name) as tar:
            rows = list(csv.DictReader(tar.extractfile("manifest.csv").read().decode().splitlines()))
            for row in rows[:: len(rows) // (num // 2)][: num // 2]:
                pictures.append(decode(tar.extractfile(row["file"]).read()).rgb)
    return pictures


def overlap(ours: Box, theirs: list[int]) -> float:
    """IoU with their box, whose corner and size have their fractions cut off, as ours is cut here."""
    x, y, w, h = (int(value) for value in ours[2:])
    across = min(x + w, theirs[0] + theirs[2]) - max(x, theirs[0])
    down = min(y + h, theirs[1] + theirs[3]) - max(y, theirs[1])
    shared = max(0, across) * max(0, down)
    union = w * h + theirs[2] * theirs[3] - shared
    return shared / union if union else 1.0


def compared(ours: list[list[Box]], theirs: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Boxes of both sides, one by one, the highest score first."""
    num, least_iou, most_apart = 0, 1.0, 0.0
    for mine, other in zip(ours, theirs, strict=True):
        kept = [box for box in mine if box.score >= FLOOR]
        assert [box.label for box in kept] == [box["class"] for box in other], "classes differ"
        for box, expected in zip(kept, other, strict=True):
            num += 1
            least_iou = min(least_iou, overlap(box, expected["box"]))
            most_apart = max(most_apart, abs(box.score - expected["score"]))
    assert least_iou >= 0.99, least_iou
    assert most_apart <= 1e-3, most_apart
    return {"boxes": num, "least_iou": least_iou, "most_apart": most_apart}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of tars")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/detect.json"))
    options = parser.parse_args()
    pictures = pictures_of(options.data, options.pictures)
    ours, theirs = NudeNetDetector(), NudeDetector()
    sides: dict[str, Callable[[np.ndarray], Any]] = {"ours": ours.detect, "nudenet": theirs.detect}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, list[Any]] = {}
    for detect in sides.values():
        detect(pictures[0])  # warm
    for _ in range(options.rounds):
        for name, detect in sides.items():
            started = time.process_time()
            found[name] = [detect(rgb) for rgb in pictures]
            seconds[name].append(time.process_time() - started)
    same = compared(found["ours"], found["nudenet"])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name:<8} {1000 * value / len(pictures):6.1f} CPU ms a picture")
    print(
        f"{same['boxes']} boxes on both sides: least IoU {same['least_iou']:.3f}, scores at most "
        f"{same['most_apart']:.1e} apart"
    )
    ratio = median["nudenet"] / median["ours"]
    report = {"cpu_seconds": seconds, "same": same, "ratio": ratio, "goal": GOAL}
    report["inputs"] = {"pictures": len(pictures), "rounds": options.rounds}
    report["machine"] = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    report["versions"] = {name: version(name) for name in PACKAGES}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers in {options.json}")
    print(f"detect ratio {ratio:.2f} goal {GOAL} {'ok' if ratio >= GOAL else 'short'}")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
