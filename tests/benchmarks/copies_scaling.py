"""CPU milliseconds a picture from hashes to leakage, at three sizes of a pool with copies: at most 1.3 times more.

    make bench NAME=copies_scaling ARGS="--data DIR"

DIR holds tiny_imagenet_100c and cifar10_jpg_22k (44,000 small pictures) and tars of photographs; see
copies_scaling_data.py. A pool of 5,000 is 5,000 distinct pictures in a seeded order that mixes the sets, 500 edited
copies of some of them, and 10 of pictures of a benchmark. The benchmark has 200 at each size.

`lvd curate --until leakage` runs on each in a fresh process of one thread, tasks one after the other, once a small run
has loaded all libraries. Counted are the stages from `look` (decoding, hashes, the 288-px version; no detectors) to
`leakage`, over all pictures that they are given. Fits are counted apart: their samples do not grow with the pool. So is
what comes before look.

Told besides: the largest component against the largest planted group, planted copies that ended with their original,
distinct pictures that fell to another one, and the peak of memory by stage. Captions have one of three texts, which
small pictures then share: the largest component is told without captioned pictures, too.

Prints tables, writes a JSON, and ends with two lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import yaml
from copies_scaling_data import FOUND_EDITS, WITHOUT, build, copies_found, distinct_pictures
from copy_edits import EDITS

from pipelines.curate import CurateRecipe
from pipelines.preflight import Options
from pipelines.recipe import load_recipe
from pipelines.session import curate

GOAL, MOST_SHARE, FEW = 1.3, 0.01, 20
WARM_UP = 300
BEFORE = ("screen_keys", "url_duplicates", "screened", "fetch", "fetched")
PACKAGES = ("numpy", "numba", "pyarrow", "opencv-python-headless", "imagehash", "pdqhash", "faiss-gpu", "pillow")


# --- one run, in a process of its own -------------------------------------------------------------------------------


def write_recipe(folder: Path) -> Path:
    """The recipe of a run on what ``build`` made there."""
    values = {
        "name": "copies_scaling",
        "pool": f"{folder}/pool",
        "run": f"{folder}/run",
        "sources": {"pool": {"kind": "tar", "location": f"{folder}/pool.tar"}},
        "benchmarks": {"benchmark": {"kind": "tar", "location": f"{folder}/benchmark.tar"}},
        "look": {"detector": "none"},
        "safety": {"min_shortest_px": 8},  # half of 32 px is to stay
        "execution": {"executor": "inline"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def status_bytes(key: str) -> int:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew


def run_one(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Costs by stage, peaks of memory, and what came of the copies."""
    quiet = Options(until="leakage")
    curate(load_recipe(CurateRecipe, str(write_recipe(folder / "warm")), overrides), quiet, lambda text: None)
    recipe = load_recipe(CurateRecipe, str(write_recipe(folder)), overrides)
    before = status_bytes("VmRSS")
    peaks: dict[str, int] = {}

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if "CPU s" in line:  # of several stages that work shard by shard the first takes the peak of all
            peaks[line.split(maxsplit=1)[0]] = status_bytes("VmHWM")
            reset_peak()

    reset_peak()
    started = time.process_time()
    outcome = curate(recipe, quiet, say)
    cpu_s = time.process_time() - started
    costs = {name: vars(cost) for name, cost in outcome.summary.costs.items()}
    found = {"costs": costs, "cpu_s": cpu_s, "wall_s": outcome.wall_s}
    found |= {"libraries_bytes": before, "peak_bytes": peaks}
    return found | copies_found(folder, recipe.duplicates.resolved_threshold(recipe.descriptor, recipe.edges))


# --- report ---------------------------------------------------------------------------------------------------------


def report(found: dict[int, dict[str, Any]], options: argparse.Namespace) -> int:
    """Print the tables, write the JSON; 0 where both goals are met."""
    sizes = list(found)
    given = {size: sum(one["planted"].values()) for size, one in found.items()}
    stages = [stage for stage in found[sizes[-1]]["costs"] if stage not in BEFORE]

    def cost_of(size: int, stage: str) -> float:
        return float(found[size]["costs"].get(stage, {"cpu_s": 0.0})["cpu_s"]) / given[size] * 1000

    def row(name: str, values: list[float], more: str = "") -> None:
        print(f"{name:<34}" + "".join(f"{value:12.3f}" for value in values) + more)

    print(f"{'CPU ms a picture':<34}" + "".join(f"{size:>12,}" for size in sizes) + "   last/first")
    counted = [stage for stage in stages if not stage.startswith("fit_")]
    for stage in counted:
        values = [cost_of(size, stage) for size in sizes]
        row(stage, values, f"{values[-1] / values[0]:12.2f}" if values[0] > 0.0005 else "")
    unit = [sum(cost_of(size, stage) for stage in counted) for size in sizes]
    ratio = unit[-1] / unit[0]
    row("sum", unit, f"{ratio:12.3f}")
    for name, linear in (("without look", ("look",)), ("without look and describe", ("look", "describe"))):
        rest = [sum(cost_of(size, stage) for stage in counted if stage not in linear) for size in sizes]
        row(name, rest, f"{rest[-1] / rest[0]:12.2f}")
    print("not in the sum, CPU s of the run")
    for stage in [*BEFORE, *(stage for stage in stages if stage.startswith("fit_"))]:
        row(stage, [found[size]["costs"].get(stage, {"cpu_s": 0.0})["cpu_s"] for size in sizes])
    driver = {size: one["cpu_s"] - sum(cost["cpu_s"] for cost in one["costs"].values()) for size, one in found.items()}
    row("the driver, with registration", list(driver.values()))
    row("wall s of the run, all in", [found[size]["wall_s"] for size in sizes])
    peaks = {size: {stage: one["peak_bytes"].get(stage, 0) / 1e6 for stage in stages} for size, one in found.items()}
    print("peak MB of the process")
    for stage in stages:
        row(stage, [peaks[size][stage] for size in sizes])
    row("when the run began", [found[size]["libraries_bytes"] / 1e6 for size in sizes])
    report_copies(found, sizes)

    told: dict[str, Any] = {
        "sizes": {str(size): one for size, one in found.items()},
        "cpu_ms_a_picture": dict(zip(map(str, sizes), unit, strict=True)),
        "ratio": ratio,
        "goal": GOAL,
        "edits": options.edits,
        "overrides": options.overrides,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.json.write_text(json.dumps(told, indent=1) + "\n")
    shares = [one["largest_mixed"] / one["pictures"] for one in found.values()]
    fits = all(
        share <= MOST_SHARE or one["largest_mixed"] < FEW for share, one in zip(shares, found.values(), strict=True)
    )
    print(
        f"copies_scaling largest component that was not planted {max(shares):.2%} of the pool "
        f"goal {MOST_SHARE:.0%} {'ok' if fits else 'short'}"
    )
    print(f"copies_scaling ratio {ratio:.3f} goal {GOAL} {'ok' if ratio <= GOAL else 'short'}")
    return 0 if fits and ratio <= GOAL else 1


def report_copies(found: dict[int, dict[str, Any]], sizes: list[int]) -> None:
    """What came of the copies, in numbers of pictures."""

    def row(name: str, values: list[str]) -> None:
        print(f"{name:<34}" + "".join(f"{value:>12}" for value in values))

    ones = [found[size] for size in sizes]
    for title, kind, column in (("planted copies with their original", "copies", 2), ("planted leaks", "leaks", 1)):
        print(title)
        for edit in ones[-1][kind]:
            row(edit, [f"{one[kind][edit][column]}/{one[kind][edit][0]}" for one in ones])
        sums = [[sum(counts) for counts in zip(*one[kind].values(), strict=True)] for one in ones]
        row("all", [f"{counts[column]}/{counts[0]}" for counts in sums])
        if kind == "copies":
            row("  by hash alone", [str(by_near) for _, by_near, _ in sums])
    row("pictures dropped as leaks", [str(one["dropped_as_leaks"]) for one in ones])
    row("largest planted group", [str(one["largest_planted"]) for one in ones])
    row("largest component", [str(one["largest"]) for one in ones])
    row("  share of the pool", [f"{one['largest'] / one['pictures']:.3%}" for one in ones])
    row("  originals in it", [str(one["largest_origins"]) for one in ones])
    row("largest of several originals", [str(one["largest_mixed"]) for one in ones])
    row(f"  without pictures of {WITHOUT}", [str(one["largest_without"]) for one in ones])
    row("distinct that fell to another", [str(one["distinct_joined"]) for one in ones])
    row("  share of the pool", [f"{one['distinct_joined'] / one['pictures']:.3%}" for one in ones])


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the picture sets")
    parser.add_argument("--sizes", type=numbers, default=[5000, 15_000, 45_000], help="distinct pictures, as A,B,C")
    parser.add_argument("--edits", choices=("found", "all"), default="found", help="of the planted copies")
    parser.add_argument("--folder", type=Path, help="for pools and runs, kept; default: a temporary one")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/copies_scaling.json"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run_one(options.one, options.overrides)))
        return 0
    if options.data is None:
        parser.error("--data: which folder holds the picture sets?")
    edits = FOUND_EDITS if options.edits == "found" else tuple(EDITS)
    pictures = distinct_pictures(options.data)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for size in options.sizes:
            folder = (options.folder or Path(temporary)) / str(size)
            planted = build(folder, pictures, size, edits)
            build(folder / "warm", pictures, WARM_UP, edits)
            command = [sys.executable, __file__, "--one", str(folder), *options.overrides]
            told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found[size] = {"planted": planted, **json.loads(told.stdout.splitlines()[-1])}
    return report(found, options)


if __name__ == "__main__":
    sys.exit(main())
