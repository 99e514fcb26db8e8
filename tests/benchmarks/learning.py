"""Does it learn? kNN by features that were trained without labels, against the same network trained at rate 0.

    make bench NAME=learning ARGS="--data tiny_imagenet_100c.parquet --folder FOLDER"

Readout fixed beforehand: class token and mean patch, each of length 1, joined; k = 20, cosine, votes
exp(similarity / 0.07); 20,000 pictures in the bank, 2,000 asked; the last checkpoint. Several seeds; then each part of
the objective switched off for a short while, beside all of it for as long. Each run has one thread; two run at once.
Runs already finished in FOLDER are taken as they are, so it may be interrupted. Writes a JSON and ends with one line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.train import load_training_recipe

GOAL_KNN, GOAL_GAIN = 0.14, 0.05
HAND_MADE = 17.85  # kNN % of HOG with pixels on the same bank, the best of the hand-made features
RATE_0 = ["optim.lr=0", "schedule.length=1", "schedule.warmup=0"]
SHORT = ["schedule.length=200", "schedule.warmup=10", "evaluation.every=200", "checkpoint.every=200"]
ABLATIONS = {
    "all": [],
    "no DINO": ["objective.dino.weight=0"],
    "no iBOT": ["objective.ibot.weight=0"],
    "no KoLeo": ["objective.koleo.weight=0"],
    "centring for Sinkhorn": ["objective.centering=ema"],
}


def run(folder: Path, data: str, overrides: Sequence[str]) -> dict[str, float]:
    """Train, or read what a finished run says: its last record, its wall and CPU seconds."""
    told = folder / "told.json"
    if told.exists():
        return json.loads(told.read_text())
    sets = "evaluation.sets.val"
    command = [sys.executable, "-m", "pipelines.cli", "train", "tiny_imagenet", "--json", f"run={folder}"]
    command += [f"data.parts.train.location={data}", f"{sets}.train.location={data}", f"{sets}.test.location={data}"]
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *overrides], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    shown = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{folder.name}: the run failed")
    record = list(json.loads(shown.splitlines()[-1])["stages"].values())[-1]
    record |= {"wall_s": time.monotonic() - started, "cpu_s": used.ru_utime + used.ru_stime}
    record |= {"peak_mib": used.ru_maxrss / 1024}
    told.write_text(json.dumps(record))
    return record


def run_all(
    runs: dict[str, list[str]], folder: Path, data: str, overrides: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Runs by name, two at a time."""
    pool = ThreadPoolExecutor(2)
    asked = {
        name: pool.submit(run, folder / name.replace(" ", "-"), data, [*overrides, *own]) for name, own in runs.items()
    }
    found = {}
    try:
        for name, future in asked.items():
            record = found[name] = future.result()
            shown = "  ".join(f"{key} {100 * record[key]:.2f}" for key in ("knn_val", "knn_val_cls", "knn_val_mean"))
            print(f"{name:<28} {shown}  {record['cpu_s'] / 60:.1f} CPU min", flush=True)
    except RuntimeError as error:
        sys.exit(str(error))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def machine() -> dict[str, Any]:
    """What a number was measured on."""
    return {
        "machine": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def curve(folder: Path) -> list[dict[str, float]]:
    """Every measurement of a run."""
    lines = (json.loads(line) for line in (folder / "pretrain" / "log.jsonl").read_text().splitlines())
    names = ("knn_val", "knn_val_cls", "knn_val_mean", "dino", "ibot", "rank_me_val")
    return [
        {"num_steps": line["step"] + 1} | {name: line[name] for name in names if name in line}
        for line in lines
        if "knn_val" in line
    ]


def draw(facts: dict[str, Any], path: Path) -> None:
    """kNN over pictures seen, a line a seed, with what it is held against."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlelocation": "left"}
    with pyplot.rc_context(style | {"axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True}):
        figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        rate_0 = statistics.fmean(record["knn_val"] for record in facts["rate_0"])
        for seed, points in enumerate(facts["curves"]):
            seen = [0, *(point["num_steps"] * facts["batch_size"] / 1000 for point in points)]
            measured = [100 * facts["rate_0"][seed]["knn_val"], *(100 * point["knn_val"] for point in points)]
            axes.plot(seen, measured, marker="o", markersize=3, label=f"seed {seed}")
        for name, value in {"the same network at rate 0": 100 * rate_0, "HOG and pixels, by hand": HAND_MADE}.items():
            axes.axhline(value, color="#6b6b6b", linestyle="--", linewidth=1)
            axes.annotate(
                name, (1, value), (0, 3), ("axes fraction", "data"), "offset points", color="#6b6b6b", ha="right"
            )
        axes.set(xlabel="thousand pictures seen, of 20,000", ylim=(0, 20))
        axes.set_title("kNN top-1 % of 2,000 pictures in 100 classes (chance: 1)")
        axes.legend(loc="lower right", frameon=False)
        figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--without-ablations", action="store_true")
    parser.add_argument("--json", type=Path, help="where the numbers go; default: FOLDER/learning.json")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    data = os.path.abspath(options.data)
    runs = {f"seed{seed}": [f"seed={seed}"] for seed in range(options.seeds)}
    runs |= {f"seed{seed}-rate0": [f"seed={seed}", *RATE_0] for seed in range(options.seeds)}
    found = run_all(runs, options.folder, data, options.overrides)
    trained, still = ([found[f"seed{seed}{end}"] for seed in range(options.seeds)] for end in ("", "-rate0"))
    table = {}
    if not options.without_ablations:
        short = {f"short {name}": [*SHORT, *own] for name, own in ABLATIONS.items()}
        table = run_all(short, options.folder, data, options.overrides)
    worst = min(record["knn_val"] for record in trained)
    gain = min(one["knn_val"] - other["knn_val"] for one, other in zip(trained, still, strict=True))
    facts = machine() | {
        "batch_size": load_training_recipe("tiny_imagenet", options.overrides).data.batch_size,
        "trained": trained,
        "curves": [curve(options.folder / f"seed{seed}") for seed in range(options.seeds)],
        "rate_0": still,
        "ablations": table,
        "median_knn": statistics.median(record["knn_val"] for record in trained),
    }
    path = options.json or options.folder / "learning.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    draw(facts, path.with_suffix(".png"))
    is_ok = worst >= GOAL_KNN and gain >= GOAL_GAIN
    print(f"worst kNN {100 * worst:.2f}, goal {100 * GOAL_KNN:.0f}")
    print(f"worst gain {100 * gain:.2f}, goal {100 * GOAL_GAIN:.0f}")
    print(f"learning ratio {worst / GOAL_KNN:.2f} goal 1.0 {'ok' if is_ok else 'short'}")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
