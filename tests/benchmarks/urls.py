"""Lines of lists to the verdict of screening, at two sizes: CPU seconds a line, and the most memory held.

    make bench NAME=urls ARGS="--data FOLDER"

The lines are made from real ones (img2dataset's lists below FOLDER/urls): their hosts and paths with numbers put in,
so that one of twenty lines brings a new host. Of a hundred lines ten repeat an earlier one, most in another spelling,
three are of hosts on a block list, one holds a part or begins with an address that such a list names, and one is broken
or of another scheme. The block list has 100,000 hosts in the syntax of a hosts file, 5,000 parts and 5,000 addresses.
Four fifths of the lines are a parquet file with captions, the others a text file.

Then `lvd curate` does what it does up to the stage `screened`, in one process: registration into shards of 10,000,
rules, duplicates in tasks of `screen.memory_mb` = 100, verdict. A fresh process for each size, which reports its CPU
time beyond that of its start and the most memory that it ever held, libraries included (VmHWM). How many lines each
reason drops is known, and checked. What 1,000 lines take is taken off: reading block lists and importing libraries is
paid once, and would flatter the growth.

Of three rounds (--rounds) the least counts, since whatever else the machine did only adds. Prints rows, writes a JSON,
and ends with a line for each goal: memory, and 1.15 over the growth of the cost of a line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MOST_GROWTH, MOST_BYTES, GOAL = 1.15, 2e9, 1.0
PACKAGES = ("numpy", "pyarrow", "pyahocorasick", "tldextract", "pydantic")
SHARD_ROWS, BATCH, TXT_OF, FEW = 10_000, 50_000, 5, 1_000
MEMORY_MB = 100  # of screen.memory_mb, so that 5 million lines are eight ranges of keys
LISTED_HOSTS, LISTED_PARTS, LISTED_ADDRESSES, HOST_EVERY = 100_000, 5_000, 5_000, 20
# Shares of lines; what is left is new.
KINDS = {"duplicate_url": 0.10, "blocked_host": 0.03, "blocked_url": 0.01, "broken_line": 0.007, "scheme": 0.003}
BROKEN = ("", "no address", "http://", "https://a.test:port/x", "//cdn.test/x.jpg", "http://a b.test/x", "/x/y.jpg")

# --- making lists ---------------------------------------------------------------------------------------------------


class Maker:
    """Lines by number, each the same whenever it is asked for."""

    def __init__(self, data: Path, num: int) -> None:
        urls, texts = [], []
        for path, names in (("test_1000", ("URL", "TEXT")), ("sample_image", ("url", "txt"))):
            table = pq.read_table(data / "urls" / f"img2dataset_{path}.parquet", columns=list(names))
            urls += table[names[0]].to_pylist()
            texts += [text or "" for text in table[names[1]].to_pylist()]
        urls += (data / "urls" / "img2dataset_unique_images.txt").read_text().split("\n")
        halves = (url.partition("://") for url in urls if "://" in url)
        self.real = [(scheme, *rest.partition("/")[::2]) for scheme, _, rest in halves]
        self.texts = texts
        rng = np.random.default_rng(0)
        self.kind = rng.choice([*KINDS, "new"], num, p=[*KINDS.values(), 1 - sum(KINDS.values())])
        self.kind[0] = "new"
        self.new = np.flatnonzero(self.kind == "new")
        self.first = self.new[(rng.random(num) * np.searchsorted(self.new, np.arange(num))).astype(np.int64)]
        self.drawn = rng.integers(0, 1 << 30, num)

    def counts(self) -> dict[str, int]:
        """Lines by what becomes of them."""
        return {kind: int(np.count_nonzero(self.kind == kind)) for kind in (*KINDS, "new")}

    def new_line(self, number: int, path_part: str = "") -> str:
        draw = int(self.drawn[number])
        # Most lines are of few hosts, as on the web.
        host_number = draw // 7 % max(1, number // HOST_EVERY) if draw % 3 else draw % 97
        scheme, host, _ = self.real[host_number % len(self.real)]
        stem, dot, end = self.real[draw % len(self.real)][2].partition(".")
        return f"{scheme}://n{host_number}.{host}/{path_part}{stem}-{number}{dot}{end}"

    def line(self, number: int) -> str:
        kind, draw = self.kind[number], int(self.drawn[number])
        if kind == "new":
            return self.new_line(number)
        if kind == "duplicate_url":
            return respelled(self.new_line(int(self.first[number])), draw)
        if kind == "blocked_host":
            return f"https://cdn{draw % 5}.{listed_host(draw % LISTED_HOSTS)}/p/{number}.jpg"
        if kind == "blocked_url":
            part, address = listed_part(draw % LISTED_PARTS), listed_address(draw % LISTED_ADDRESSES)
            return f"{address}{number}.png" if draw % 2 else self.new_line(number, path_part=part[1:])
        if kind == "broken_line":
            return BROKEN[draw % len(BROKEN)]
        return f"data:image/png;base64,{number:x}" if draw % 2 else f"ftp://n{draw % 99}.test/{number}.jpg"

    def batches(self) -> Iterator[list[str]]:
        size = min(BATCH, -(-len(self.kind) // TXT_OF))
        for start in range(0, len(self.kind), size):
            yield [self.line(number) for number in range(start, min(start + size, len(self.kind)))]


def respelled(url: str, draw: int) -> str:
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    match draw % 6:
        case 0:
            return f"{scheme.upper()}://{host.upper()}/{path}"
        case 1:
            port = "" if ":" in host else ":443" if scheme == "https" else ":80"
            return f"{scheme}://{host}{port}/{path}"
        case 2:
            return f"{url.partition('#')[0]}#top"
        case 3:
            return f"{scheme}://{host}/a/../{path}"
        case 4:
            return f"{scheme}://{host}/%{ord(path[0]):02x}{path[1:]}" if path[0].isalnum() else url
        case _:
            return url


def listed_host(number: int) -> str:
    return f"ads{number}.listed{number % 1000}.test"


def listed_part(number: int) -> str:
    return f"/{random.Random(number).choice(('ad', 'banner', 'track', 'pixel'))}-{number:04x}/"


def listed_address(number: int) -> str:
    return f"https://shared{number % 500}.test/user-{number}/"


def make(folder: Path, data: Path, num: int) -> dict[str, int]:
    """The lists of one size; how many lines of each kind are in them."""
    folder.mkdir(parents=True)
    maker = Maker(data, num)
    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string())])
    with pq.ParquetWriter(folder / "list.parquet", schema) as writer, (folder / "list.txt").open("w") as txt:
        for number, lines in enumerate(maker.batches()):
            if number % TXT_OF == 0:
                txt.writelines(f"{line}\n" for line in lines)
                continue
            texts = [f"{maker.texts[at % len(maker.texts)]} {at}" for at in range(len(lines))]
            writer.write_table(pa.table([lines, texts], schema=schema))
    return maker.counts()


def make_block_list(path: Path) -> None:
    with path.open("w") as file:
        file.writelines(f"0.0.0.0 {listed_host(number)}\n" for number in range(LISTED_HOSTS))
        file.writelines(f"{listed_part(number)}\n" for number in range(LISTED_PARTS))
        file.writelines(f"{listed_address(number)}\n" for number in range(LISTED_ADDRESSES))


# --- in processes of their own --------------------------------------------------------------------------------------


def run(folder: Path, lists: Path, block_list: Path) -> dict[str, Any]:
    """What one run takes, from lists to verdicts; to be called in a fresh process."""
    from pipelines.curate import CurateRecipe
    from pipelines.preflight import Options
    from pipelines.session import curate

    web = {"kind": "list", "location": str(lists / "list.parquet"), "url_column": "URL", "alt_text_column": "TEXT"}
    recipe = CurateRecipe.model_validate(
        {
            "name": "urls",
            "pool": f"{folder}/pool",
            "run": f"{folder}/run",
            "shard_rows": SHARD_ROWS,
            "sources": {"web": web, "txt": {"kind": "list", "location": str(lists / "list.txt")}},
            "screen": {"block_list_files": [str(block_list)], "memory_mb": MEMORY_MB},
            "embed": {"name": "hog-thumb"},
            "execution": {"executor": "inline", "min_free_gb": 0.1},
        }
    )
    started, cpu = time.perf_counter(), time.process_time()
    outcome = curate(recipe, Options(until="screened"), lambda line: print(line, file=sys.stderr))
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    costs = {name: cost.cpu_s for name, cost in outcome.summary.costs.items()}
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    reasons = pq.read_table(f"{folder}/run/screened", columns=["reason"])["reason"].combine_chunks()
    counted = {row["values"]: row["counts"] for row in pc.value_counts(reasons).to_pylist()}
    return {
        "cpu_s": cpu_s,
        "seconds": seconds,
        "stages": {"register and plan": cpu_s - sum(costs.values()), **costs},
        "bytes": int(held.split()[1]) * 1024,
        "reasons": {reason or "new": num for reason, num in counted.items()},
    }


def measured(folder: Path, num: int) -> dict[str, Any]:
    """One run of one size in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--one", str(num)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(folder / "root")
    return told


# --- all of it ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("LVD_SHARED_DATA")
    parser.add_argument("--data", type=Path, default=shared, help="holds urls/; default: the folder LVD_SHARED_DATA")
    parser.add_argument("--folder", type=Path, help="for lists and pools, 3 GB, removed again")
    parser.add_argument("--sizes", type=int, nargs=2, default=[500_000, 5_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/urls.json"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        lists = options.folder / str(options.one)
        print(json.dumps(run(options.folder / "root", lists, options.folder / "blocked.txt")))
        return 0
    if options.data is None:
        parser.error("--data: name the folder of the shared lists, or set LVD_SHARED_DATA")
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_block_list(folder / "blocked.txt")
        sizes = [FEW, *options.sizes]
        made = {num: make(folder / str(num), options.data, num) for num in sizes}
        found: dict[int, list[dict[str, Any]]] = {num: [] for num in sizes}
        for _ in range(options.rounds):
            for num in sizes:
                found[num].append(measured(folder, num))
                assert found[num][-1]["reasons"] == made[num], (found[num][-1]["reasons"], made[num])
    return report(found, options)


def report(found: dict[int, list[dict[str, Any]]], options: argparse.Namespace) -> int:
    """Print the rows, write the JSON; 0 where both goals are met."""
    small, large = options.sizes
    best = {num: min(runs, key=lambda one: float(one["cpu_s"])) for num, runs in found.items()}
    once = best[FEW]
    print(f"{'CPU microseconds a line':<24}" + "".join(f"{num:>12,}" for num in options.sizes) + "   seconds once")
    for stage, fixed in once["stages"].items():
        costs = ((best[num]["stages"][stage] - fixed) / num for num in options.sizes)
        print(f"{stage:<24}" + "".join(f"{cost * 1e6:12.2f}" for cost in costs) + f"{fixed:15.2f}")
    unit = {num: (best[num]["cpu_s"] - once["cpu_s"]) / num for num in options.sizes}
    print(f"{'all of it':<24}" + "".join(f"{cost * 1e6:12.2f}" for cost in unit.values()) + f"{once['cpu_s']:15.2f}")
    print(f"{'seconds':<24}" + "".join(f"{best[num]['seconds']:12.1f}" for num in options.sizes))
    peaks = {num: max(one["bytes"] for one in runs) for num, runs in found.items()}
    print(f"{'peak MB':<24}" + "".join(f"{peaks[num] / 1e6:12,.0f}" for num in options.sizes))
    print(f"{'lines of each end':<24}" + ", ".join(f"{num:,} {name}" for name, num in best[large]["reasons"].items()))
    growth, peak = unit[large] / unit[small], max(peaks.values())
    ratio = MOST_GROWTH / growth
    told = {
        "runs": {str(num): runs for num, runs in found.items()},
        "cpu_us_a_line": {str(num): value * 1e6 for num, value in unit.items()},
        "cpu_s_once": once["cpu_s"],
        "growth": growth,
        "ratio": ratio,
        "goal": GOAL,
        "peak_bytes": peak,
        "most_bytes": MOST_BYTES,
        "inputs": {
            "sizes": options.sizes,
            "lines_once": FEW,
            "shares": KINDS,
            "shard_rows": SHARD_ROWS,
            "memory_mb": MEMORY_MB,
            "listed_hosts": LISTED_HOSTS,
            "listed_parts": LISTED_PARTS,
            "listed_addresses": LISTED_ADDRESSES,
            "lines_a_host": HOST_EVERY,
        },
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.json.write_text(json.dumps(told, indent=1) + "\n")
    print(f"numbers in {options.json}; the cost of a line grows {growth:.3f} times, allowed is {MOST_GROWTH}")
    print(f"urls peak {peak / 1e9:.2f} GB goal {MOST_BYTES / 1e9:g} GB {'ok' if peak <= MOST_BYTES else 'short'}")
    print(f"urls ratio {ratio:.2f} goal {GOAL} {'ok' if ratio >= GOAL else 'short'}")
    return 0 if ratio >= GOAL and peak <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
