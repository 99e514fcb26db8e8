"""Decode and resize on one core: Pillow beside ours; goals are 2.2 times as fast at full size and 5 times scaled.

    make bench NAME=decode ARGS="--data FOLDER"

FOLDER holds ``pool_imagenet_300.tar``. Both sides make RGB with a shortest side of 256 px. Pillow decodes at full size
and resizes bicubic. Ours is pixels.decode and pixels.resize_shortest: at full size on the photographs as they are, and
with ``shortest_px`` on the same photographs enlarged to shortest sides of 1,400, 2,000 and 3,000 px and stored again at
quality 90. Rows are CPU milliseconds a picture; sides take turns, and each number is the median over rounds. The goal
of scaled decoding is that of all large photographs together, and its difference that of the worst one; each size is
told besides, and what a decode at 1/8 costs, which is hardly more than to read the compressed numbers: the limit.

    child: ...           pixels.decode in this process beside sandbox.DecoderProcess, in CPU time of both processes

Differences to Pillow's result are in grey levels.
"""

from __future__ import annotations

import argparse
import io
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

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from PIL import Image

from training.data.pixels import decode, resize_shortest
from training.data.sandbox import DecoderProcess

FULL_GOAL, SCALED_GOAL = 2.2, 5.0
FULL_MAX, SCALED_MEAN = 2, 1.0  # grey levels
TARGET_PX = 256
ALL_LARGE = "1400 px and more"
LARGE = {1400: 10, 2000: 6, 3000: 4}  # shortest side: how many
PACKAGES = ("numba", "pillow", "simplejpeg", "numpy")
REPORT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "decode.json"


def pictures(path: Path, count: int) -> list[bytes]:
    """``count`` JPEGs, evenly over those of the tar that are to be shrunk: ours enlarges none."""
    with tarfile.open(path) as tar:
        files = [tar.extractfile(one).read() for one in tar if one.name.lower().endswith((".jpeg", ".jpg"))]
    files = [data for data in files if min(Image.open(io.BytesIO(data)).size) > TARGET_PX]
    return [files[i * len(files) // count] for i in range(count)]


def size_of(width: int, height: int, shortest_px: int) -> tuple[int, int]:
    """Width and height at a shortest side."""
    scale = shortest_px / min(width, height)
    return round(width * scale), round(height * scale)


def enlarged(data: bytes, shortest_px: int) -> bytes:
    """The picture at a larger shortest side."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    out = io.BytesIO()
    size = size_of(*picture.size, shortest_px)
    picture.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=90)
    return out.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(picture.resize(size_of(*picture.size, TARGET_PX), Image.Resampling.BICUBIC))


def by_us(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return resize_shortest(decode(data).rgb, TARGET_PX)


def by_us_scaled(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    picture = decode(data, shortest_px=TARGET_PX)
    return resize_shortest(picture.rgb, TARGET_PX, picture.box)


class Clock:
    """CPU time of this process and of a child that still runs, in seconds."""

    def __init__(self, child: DecoderProcess) -> None:
        self._child = Path(
            f"/proc/{child.pid}/schedstat"
        )  # of a process that runs it may lag by a tick: this one waits

    def __call__(self) -> float:
        return time.process_time() + int(self._child.read_text().split()[0]) / 1e9


def measure(
    rows: dict[str, tuple[Callable[[bytes], object], list[bytes]]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median CPU milliseconds a picture of each row; all rows once a round, in turn. The first round is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, (run, inputs) in rows.items():
            started = clock()
            for data in inputs:
                run(data)
            if number:
                spent[name].append((clock() - started) / len(inputs) * 1e3)
    return {name: statistics.median(values) for name, values in spent.items()}


def differences(run: Callable[[bytes], np.ndarray], inputs: list[bytes]) -> dict[str, float]:
    """Difference to Pillow: the largest of any pixel, the mean of all pictures, and that of the worst picture."""
    found = [np.abs(run(data).astype(int) - by_pillow(data)) for data in inputs]
    means = [float(one.mean()) for one in found]
    return {
        "max": int(max(one.max() for one in found)),
        "mean": round(statistics.mean(means), 4),
        "mean_of_worst": round(max(means), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pool_imagenet_300.tar")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=REPORT, help="where the numbers go")
    options = parser.parse_args()

    stored = pictures(options.data / "pool_imagenet_300.tar", options.pictures)
    large = {
        side: [enlarged(data, side) for data in stored[:: len(stored) // count][:count]]
        for side, count in LARGE.items()
    }
    child = DecoderProcess()
    child.decode(stored[0])
    rows: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
        "pillow": (by_pillow, stored),
        "ours": (by_us, stored),
        "decode only: pillow": (lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), stored),
        "decode only: ours": (decode, stored),
        "child: ours": (child.decode, stored),
    }
    for side, inputs in large.items():
        rows[f"pillow {side} px"] = (by_pillow, inputs)
        rows[f"ours {side} px, full"] = (by_us, inputs)
        rows[f"ours {side} px, scaled"] = (by_us_scaled, inputs)
        rows[f"limit {side} px"] = (lambda data: decode(data, shortest_px=1), inputs)
    cost = measure(rows, options.rounds, Clock(child))
    child.close()
    for name, value in cost.items():
        print(f"{name:<24}{value:>9.3f} CPU ms a picture")
    overhead_ms = cost["child: ours"] - cost["decode only: ours"]
    share = overhead_ms / cost["decode only: ours"]
    print(f"the child process costs {overhead_ms:.3f} ms a picture, {share:.1%} of decode")

    off = {"full": differences(by_us, stored)}
    ratios = {"full": cost["pillow"] / cost["ours"]}
    for side, inputs in large.items():
        off[f"{side} px"] = differences(by_us_scaled, inputs)
        ratios[f"{side} px"] = cost[f"pillow {side} px"] / cost[f"ours {side} px, scaled"]
    together = [data for inputs in large.values() for data in inputs]
    off[ALL_LARGE] = differences(by_us_scaled, together)
    sums = [
        sum(cost[name.format(side)] * len(inputs) for side, inputs in large.items())
        for name in ("pillow {} px", "ours {} px, scaled")
    ]
    ratios[ALL_LARGE] = sums[0] / sums[1]
    held = {
        "full": ratios["full"] >= FULL_GOAL and off["full"]["max"] <= FULL_MAX,
        ALL_LARGE: ratios[ALL_LARGE] >= SCALED_GOAL and off[ALL_LARGE]["mean_of_worst"] <= SCALED_MEAN,
    }
    report = {
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "goals": {"full": FULL_GOAL, "scaled": SCALED_GOAL},
        "grey_levels_from_pillow": off,
        "cpu_ms_a_picture": {name: round(value, 3) for name, value in cost.items()},
        "child_overhead_ms": round(overhead_ms, 3),
        "inputs": {
            "pictures": f"{len(stored)} of pool_imagenet_300.tar",
            "median_shortest_px": int(statistics.median(min(decode(data).rgb.shape[:2]) for data in stored)),
            "mean_bytes": round(sum(map(len, stored)) / len(stored)),
            "large": {str(side): len(inputs) for side, inputs in large.items()},
            "target_px": TARGET_PX,
            "rounds": options.rounds,
        },
        "machine": {"cpus": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers: {options.json}")
    for name, ratio in ratios.items():
        goal = FULL_GOAL if name == "full" else SCALED_GOAL
        end = f" goal {goal} {'ok' if held[name] else 'short'}" if name in held else ""
        print(
            f"decode {name}, differences at most {off[name]['max']}, mean {off[name]['mean']}, "
            f"of the worst picture {off[name]['mean_of_worst']}: ratio {ratio:.2f}{end}"
        )
    return 0 if all(held.values()) else 1


def processor() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
