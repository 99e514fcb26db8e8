"""CPU seconds a url, from fetch to export, at two sizes of the sample web: must grow at most 1.15 times.

    python tests/benchmarks/unit_cost.py --folder FOLDER --sizes 2000 20000

Fits have a fixed size, so they are counted apart. Prints one row a stage, writes a JSON, and ends with one line.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

GOAL = 1.15
BEFORE_FETCH = ("screen_keys", "url_duplicates", "screened")
PACKAGES = ("numpy", "pyarrow", "ray", "opencv-python-headless", "onnxruntime", "pillow")


def measure(folder: Path, num_urls: int, more: list[str]) -> dict:
    """One run on a fresh pool; what `lvd curate --json` says of it."""
    web = folder / f"web-{num_urls}"
    root = folder / f"run-{num_urls}"
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "curate",
        "smoke",
        "--json",
        f"pool={root}/pool",
        f"run={root}/run",
    ]
    command += [f"sample_web.path={web}", f"sample_web.urls={num_urls}", f"sources.web.location={web}/urls.csv"]
    command += [f"queries.{name}.location={web}/queries/{name}" for name in ("as_is", "sample", "cluster")]
    command += [f"benchmarks.benchmark.location={web}/benchmark", *more]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode not in (0, 1):
        sys.exit(f"the run of {num_urls:,} urls failed")
    return json.loads(result.stdout.splitlines()[-1])


def seconds(facts: dict, *, fits: bool) -> float:
    """CPU seconds of the stages after screening, of fits or of all else."""
    costs = {name: cost for name, cost in facts["costs"].items() if name not in BEFORE_FETCH}
    return sum(cost["cpu_s"] for name, cost in costs.items() if name.startswith("fit_") == fits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for sites, pools and runs")
    parser.add_argument("--sizes", type=int, nargs=2, default=[2000, 20000])
    parser.add_argument("--json", type=Path, help="where the numbers go; default: FOLDER/unit_cost.json")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    found = {size: measure(options.folder, size, options.overrides) for size in options.sizes}
    for stage in found[options.sizes[1]]["costs"]:
        row = [found[size]["costs"].get(stage, {"cpu_s": 0.0})["cpu_s"] / size * 1000 for size in options.sizes]
        print(f"{stage:<16} {row[0]:>10.3f} {row[1]:>10.3f} CPU ms a url")
    unit = [seconds(found[size], fits=False) / size for size in options.sizes]
    report = {
        "sizes": options.sizes,
        "cpu_s_a_url": unit,
        "fits_cpu_s": [seconds(found[size], fits=True) for size in options.sizes],
        "wall_s": [found[size]["wall_s"] for size in options.sizes],
        "driver_peak_bytes": [found[size]["driver_peak_bytes"] for size in options.sizes],
        "worker_peak_bytes": [found[size]["worker_peak_bytes"] for size in options.sizes],
        "score": [found[size]["score"]["overall"] for size in options.sizes],
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    path = options.json or options.folder / "unit_cost.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    peak = report["driver_peak_bytes"][1] / 1e6
    print(
        f"{unit[0]:.4f} and {unit[1]:.4f} CPU s a url; driver peak {peak:.0f} MB at {options.sizes[1]:,} urls; {path}"
    )
    ratio = unit[1] / unit[0]
    print(f"unit_cost ratio {ratio:.3f} goal {GOAL} {'ok' if ratio <= GOAL else 'short'}")
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
