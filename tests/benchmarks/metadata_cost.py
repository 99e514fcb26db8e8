"""CPU seconds a picture from embeddings to the plan of the tars, at three sizes of the pool: at most 1.2 times more.

    make bench NAME=metadata_cost ARGS="--folder FOLDER"

The pools are made: tables of pictures without bytes, in shards of 10,000, with clustered unit vectors of 384 numbers.
2,000 queries ask for 4 neighbours each, and 2,000 others for a tenth of the pool, by clusters. Run are k-means on a
sample of 100,000 (counted apart: its size is fixed), the assignment to 1,000 clusters, retrieval, selection, and of the
export what holds no bytes: the order of the samples with all that the manifest says. Stages, driver and tables are
those of `lvd curate`, tasks one after the other in one process of one thread, a fresh one for each size.

Memory: the peak of that process less what it had when the run began, against `execution.task_memory_mb`.

Prints a row a stage and size, writes a JSON, and ends with two lines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import psutil
import pyarrow as pa

from curation.export.export import Export
from curation.represent import loops  # noqa: F401 - so that Numba counts among the libraries
from curation.schema import TABLES, Part, Role, first_shard, image_ids, vector_schema
from curation.store import open_store, write_part
from pipelines.curate import CurateRecipe, build_stages
from pipelines.drive import Driver
from pipelines.plan import Ledger
from pipelines.runner import InlineExecutor
from pipelines.work import Where

GOAL = 1.2
PACKAGES = ("numpy", "pyarrow", "numba")
STAGES = (
    "fit_kmeans", "fit_hierarchy", "cluster", "queries", "quotas", "candidates", "neighbours", "offers", "selection",
)  # fmt: skip
SHARD, QUERIES, CLUSTERS, SAMPLE = 10_000, 2_000, 1_000, 100_000
DIM, LATENT, NUM_CENTRES = 384, 48, 2000


class OrderOnly(Export):
    """Export as far as it holds no bytes."""

    writes = ("export_rows", "export_plan")

    def run(self, context: Any, map: Any) -> None:  # noqa: A002
        self._planned(context, map)


class Made:
    """A pool and a run of made tables under a folder."""

    def __init__(self, folder: Path, num: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(0)
        self.centres = self.rng.standard_normal((NUM_CENTRES, LATENT)).astype(np.float32)
        shares = self.rng.pareto(1.2, NUM_CENTRES) + 0.05
        self.shares = shares / shares.sum()
        self.lift = self.rng.standard_normal((LATENT, DIM)).astype(np.float32) / 7
        self.sources: list[dict[str, Any]] = []
        for name, role, size in (("near", "query", QUERIES), ("filled", "query", QUERIES), ("web", "pool", num)):
            self.add(name, role, size)

    def add(self, name: str, role: Role, num: int) -> None:
        source, shards = len(self.sources), -(-num // SHARD)
        self.sources.append({"source_id": source, "name": name, "role": role, "num_shards": shards, "num_rows": num})
        for n in range(shards):
            self.shard(first_shard(source) + n, role, name, min(SHARD, num - n * SHARD))

    def shard(self, shard: int, role: Role, name: str, num: int) -> None:
        ids = image_ids(shard, num)
        sha256 = [hashlib.sha256(str(one).encode()).hexdigest() for one in ids.tolist()]
        at = self.rng.choice(NUM_CENTRES, num, p=self.shares)
        latent = self.centres[at] + 0.6 * self.rng.standard_normal((num, LATENT), np.float32)
        vectors = latent @ self.lift + 0.15 * self.rng.standard_normal((num, DIM), np.float32)
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
        key = {"image_id": ids, "sha256": sha256}
        self.put("embeddings", shard, pa.table([pa.array(ids), pa.array(sha256), column], schema=vector_schema(DIM)))
        for verdict in ("leakage", "semantic") if role == "pool" else ("safety",):
            self.put(verdict, shard, key | {"keep": [True] * num})
        urls = {"url": [f"https://host-{one % 977}.example/pictures/{one}.jpg" for one in ids.tolist()]}
        text = {"alt_text": [f"a picture, one of many, number {one}" for one in range(num)], "source": [name] * num}
        self.put("urls", shard, {"image_id": ids, **urls, **text, "label": [f"class {one % 9}" for one in range(num)]})
        place = {"object": [f"bytes/{shard:09d}.tar"] * num, "offset": np.arange(num), "num_bytes": [1000] * num}
        self.put("images", shard, key | place | {"format": ["jpeg"] * num})
        self.put("hashes", shard, key | {"width_px": [640] * num, "height_px": [480] * num})
        self.put("detections", shard, key)

    def put(self, name: str, index: int, columns: Any) -> None:
        table = TABLES[name]
        if not isinstance(columns, pa.Table):
            num = len(next(iter(columns.values())))
            arrays = [
                pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(num, f.type) for f in table.schema
            ]
            columns = pa.table(arrays, schema=table.schema)
        path = self.folder / "written"
        write_part(columns, path, stage=name, version=1, fingerprint=name, inputs={})
        open_store(f"{self.folder}/{table.root}").create(Part(table.root, name, index).path, path)


class Peak:
    """The largest resident size of this process while it runs, less that at its beginning, looked at every 5 ms."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.before = self.most = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.most = max(self.most, self._process.memory_info().rss)

    def take(self) -> int:
        """The largest since it was last taken."""
        most, self.most = self.most, self._process.memory_info().rss
        return most - self.before

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def run_one(folder: Path, num: int, memory_mb: int) -> dict[str, Any]:
    """A run on a made pool of one size: CPU seconds by stage, seconds, peak bytes."""
    folder.mkdir(parents=True)
    made = Made(folder, num)
    made.put("sources", 0, {key: [row[key] for row in made.sources] for key in made.sources[0]})
    source = {"kind": "folder", "location": "made"}
    recipe = CurateRecipe.model_validate(
        {
            "name": "made",
            "pool": f"{folder}/pool",
            "run": f"{folder}/run",
            "sources": {"web": source},
            "queries": {
                "near": source | {"mode": "sample", "k": 4},
                "filled": source | {"mode": "cluster", "min_queries": 1, "per_cluster": num // 4000, "cap": num // 10},
            },
            "cluster": {"num_clusters": CLUSTERS, "iterations": 5, "sample": SAMPLE},
        }
    )
    stages = [*(stage for stage in build_stages(recipe) if stage.name in STAGES), OrderOnly(recipe.export)]
    ledger = Ledger(
        stores={"pool": open_store(recipe.pool), "run": open_store(recipe.run)},
        stages=stages,
        registered=pa.Table.from_pylist(made.sources, schema=TABLES["sources"].schema),
        source_ids={row["name"]: row["source_id"] for row in made.sources},
    )
    where = Where(
        pool=recipe.pool,
        run=recipe.run,
        pool_token="",
        run_token="",
        recipe=recipe.model_dump_json(),
        roles=ledger.roles(),
        memory_bytes=memory_mb * 1_000_000,
    )
    started, peak = time.perf_counter(), Peak()
    peaks: dict[str, int] = {}

    def say(line: str) -> None:
        if (stage := line.split(maxsplit=1)[0]) in {one.name for one in stages} and "CPU s" in line:
            peaks[stage] = peak.take()

    summary = Driver(ledger, stages, lambda: InlineExecutor(where), say).run()
    seconds = time.perf_counter() - started
    peak.close()
    return {
        "cpu_s": {name: cost.cpu_s for name, cost in summary.costs.items()},
        "jobs": {name: cost.num_jobs for name, cost in summary.costs.items()},
        "samples": sum(ledger.num_rows(part) for part in ledger.parts("export_plan")),
        "seconds": seconds,
        "peak_bytes": peaks,
        "libraries_bytes": peak.before,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for pools and runs; 2 GB, removed again")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--task-memory-mb", type=int, default=1500)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/metadata_cost.json"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run_one(options.folder, options.one, options.task_memory_mb)))
        return 0
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in options.sizes}
    for turn in range(options.rounds):
        for size in options.sizes:
            folder = options.folder / f"{size}-{turn}"
            more = ["--folder", str(folder), "--one", str(size), "--task-memory-mb", str(options.task_memory_mb)]
            told = subprocess.run([sys.executable, __file__, *more], stdout=subprocess.PIPE, check=True, text=True)
            found[size].append(json.loads(told.stdout.splitlines()[-1]))
            shutil.rmtree(folder)
    return report(found, options)


def report(found: dict[int, list[dict[str, Any]]], options: argparse.Namespace) -> int:
    """Print the rows, write the JSON; 0 where both goals are met."""
    stages = list(found[options.sizes[0]][0]["cpu_s"])
    # Of several rounds the least: whatever else the machine did only adds.
    cost = {
        size: {stage: min(one["cpu_s"][stage] for one in runs) / size * 1e6 for stage in stages}
        for size, runs in found.items()
    }
    print(f"{'CPU seconds a million':<24}" + "".join(f"{size:>12,}" for size in options.sizes))
    for stage in stages:
        print(f"{stage:<24}" + "".join(f"{cost[size][stage]:12.2f}" for size in options.sizes))
    total = {
        size: sum(value for stage, value in by_stage.items() if not stage.startswith("fit_"))
        for size, by_stage in cost.items()
    }
    print(f"{'all but the fits':<24}" + "".join(f"{total[size]:12.2f}" for size in options.sizes))
    peaks = {size: max(max(one["peak_bytes"].values()) for one in runs) for size, runs in found.items()}
    print("peak MB over libraries")
    for stage in stages:
        most = (max(one["peak_bytes"].get(stage, 0) for one in found[size]) / 1e6 for size in options.sizes)
        print(f"{stage:<24}" + "".join(f"{one:12.0f}" for one in most))
    print(f"{'samples':<24}" + "".join(f"{found[size][0]['samples']:12,}" for size in options.sizes))
    ratio, worst = total[options.sizes[-1]] / total[options.sizes[0]], max(peaks.values()) / 1e6
    told = {
        "runs": {str(size): runs for size, runs in found.items()},
        "cpu_s_a_million": {str(size): value for size, value in total.items()},
        "ratio": ratio,
        "goal": GOAL,
        "task_memory_mb": options.task_memory_mb,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.json.write_text(json.dumps(told, indent=1) + "\n")
    fits = worst <= options.task_memory_mb
    print(f"metadata_cost peak {worst:.0f} MB goal {options.task_memory_mb} {'ok' if fits else 'over'}")
    print(f"metadata_cost ratio {ratio:.3f} goal {GOAL} {'ok' if ratio <= GOAL else 'over'}")
    return 0 if fits and ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
