"""Does it learn? kNN by features that were trained without labels, against the same network trained at rate 0.

    python tests/benchmarks/learning.py --data tiny_imagenet_100c.parquet --folder FOLDER

Readout fixed beforehand: class token and mean patch, each of length 1, joined; k = 20, cosine, votes
exp(similarity / 0.07); 20,000 pictures in the bank, 2,000 asked; the last checkpoint. Several seeds; then each part of
the objective switched off for a tenth of the length. Runs already finished in FOLDER are taken as they are, so it may
be interrupted. Writes a JSON and ends with one line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

GOAL_KNN, GOAL_GAIN = 0.14, 0.05
ABLATIONS = {
    "all": [],
    "no DINO": ["objective.dino.weight=0"],
    "no iBOT": ["objective.ibot.weight=0"],
    "no KoLeo": ["objective.koleo.weight=0"],
    "centring for Sinkhorn": ["objective.centering=ema"],
}


def run(folder: Path, options: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Train, or read what a finished run says: its last record, its wall and CPU seconds."""
    told = folder / "told.json"
    if told.exists():
        return json.loads(told.read_text())
    sets = "evaluation.sets.val"
    command = [sys.executable, "-m", "pipelines.cli", "train", "tiny_imagenet", "--json", f"run={folder}"]
    command += [f"data.parts.train.location={options.data}", f"{sets}.train.location={options.data}"]
    command += [f"{sets}.test.location={options.data}", *options.overrides, *overrides]
    started, before = time.monotonic(), os.times()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{folder.name}: the run failed")
    after = os.times()
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    record = list(stages.values())[-1]
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    record |= {"wall_s": time.monotonic() - started, "cpu_s": cpu_s}
    told.write_text(json.dumps(record))
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--without-ablations", action="store_true")
    parser.add_argument("--json", type=Path, help="where the numbers go; default: FOLDER/learning.json")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    trained, still = [], []
    for seed in range(options.seeds):
        trained.append(run(options.folder / f"seed{seed}", options, [f"seed={seed}"]))
        still.append(
            run(
                options.folder / f"seed{seed}-rate0",
                options,
                [f"seed={seed}", "optim.lr=0", "schedule.length=1", "schedule.warmup=0"],
            )
        )
        for name, record in (("trained", trained[-1]), ("rate 0", still[-1])):
            shown = "  ".join(f"{key} {100 * record[key]:.2f}" for key in ("knn_val", "knn_val_cls", "knn_val_mean"))
            print(f"seed {seed}  {name:<8} {shown}  {record['cpu_s'] / 60:.1f} CPU min", flush=True)
    table = {}
    length = int(trained[0]["num_steps"])
    for name, overrides in ABLATIONS.items() if not options.without_ablations else ():
        short = [f"schedule.length={length // 10}", f"schedule.warmup={length // 100}"]
        table[name] = run(options.folder / name.replace(" ", "-"), options, [*short, *overrides])
        print(f"{length // 10} steps, {name:<22} kNN {100 * table[name]['knn_val']:.2f}", flush=True)
    worst = min(record["knn_val"] for record in trained)
    gain = min(one["knn_val"] - other["knn_val"] for one, other in zip(trained, still, strict=True))
    facts = {
        "machine": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "trained": trained,
        "rate_0": still,
        "ablations": table,
        "median_knn": statistics.median(record["knn_val"] for record in trained),
    }
    path = options.json or options.folder / "learning.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    is_ok = worst >= GOAL_KNN and gain >= GOAL_GAIN
    print(f"worst kNN {100 * worst:.2f}, goal {100 * GOAL_KNN:.0f}")
    print(f"worst gain {100 * gain:.2f}, goal {100 * GOAL_GAIN:.0f}")
    print(f"learning ratio {worst / GOAL_KNN:.2f} goal 1.0 {'ok' if is_ok else 'short'}")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
