"""Connected components of streamed edges, against scipy's.

    make bench NAME=components

A random graph: 10 million edges over 12 million nodes, as int64 arrays that both sides are given. Ours take them in
chunks of a million, as parts of ``edges`` come; scipy needs them whole, and its way from coordinates to rows is part of
its time, as it is part of a user's. Sides take turns, and both make the partition: it is compared. Numba's compiler ran
before, as it does once on a machine; scipy was called once before, too.

Memory is measured in a process for each side: the most that it held while it worked (VmHWM of /proc, reset when the
arrays and all libraries were there) less what it held before. Then 100 million edges over 120 million nodes, each chunk
made from a seed when it is its turn: the most that the whole process held, libraries included.

Beside that, for people: what numbering pictures takes by bits and by sorted ids, and the sweep of thresholds.

Prints rows, writes a JSON, and ends with a line for each goal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from curation.dedup.sweep import Sweep, grid
from curation.dedup.unionfind import Numbers, UnionFind
from curation.schema import ROWS_PER_SHARD_LIMIT

CHUNK, SHARD_ROWS = 1_000_000, 10_000
GOAL_TIME, GOAL_MEMORY, MOST_BYTES = 1.0, 2.0, 4e9
PACKAGES = ("numpy", "scipy", "numba")


def made_edges(num_edges: int) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of random edges, int64; there are 1.2 nodes an edge."""
    rng = np.random.default_rng(0)
    num_nodes = num_edges * 6 // 5
    return rng.integers(0, num_nodes, num_edges), rng.integers(0, num_nodes, num_edges)


def cut(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    for start in range(0, len(arrays[0]), CHUNK):
        yield tuple(array[start : start + CHUNK] for array in arrays)


def ours(a: np.ndarray, b: np.ndarray, num_nodes: int) -> np.ndarray:
    found = UnionFind(num_nodes)
    for chunk in cut(a, b):
        found.add(*chunk)
    return found.labels()


def by_scipy(a: np.ndarray, b: np.ndarray, num_nodes: int) -> np.ndarray:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = a.astype(np.int32), b.astype(np.int32)
    graph = coo_matrix((np.ones(len(a), np.int8), ends), shape=(num_nodes, num_nodes)).tocsr()
    return np.asarray(connected_components(graph, directed=False)[1])


def numbers_by_bits(a: np.ndarray, b: np.ndarray, num_nodes: int) -> np.ndarray:
    """Numbers of the first ends; ends are ids of pictures."""
    numbers = Numbers(range(-(-num_nodes // SHARD_ROWS)), SHARD_ROWS)
    for chunk in cut(a, b):
        for ids in chunk:
            numbers.see(ids)
    numbers.close()
    return np.concatenate([numbers.of(ids) for (ids,) in cut(a)])


def numbers_by_ids(a: np.ndarray, b: np.ndarray, num_nodes: int) -> np.ndarray:
    del num_nodes
    ids, fresh, num_fresh = np.empty(0, np.int64), [np.empty(0, np.int64)], 0
    for chunk in cut(a, b):
        fresh.append(np.unique(np.concatenate(chunk)))
        num_fresh += len(fresh[-1])
        if num_fresh > len(ids):  # so that all merges together take no longer than a few of the whole
            ids, fresh, num_fresh = np.unique(np.concatenate([ids, *fresh])), [], 0
    ids = np.unique(np.concatenate([ids, *fresh]))
    return np.concatenate([np.searchsorted(ids, one).astype(np.uint32) for (one,) in cut(a)])


def swept(a: np.ndarray, b: np.ndarray, num_nodes: int) -> np.ndarray:
    found = Sweep(num_nodes, grid(0.25, 0.3))
    rng = np.random.default_rng(1)
    for one, other in cut(a, b):
        similarity = rng.uniform(0.25, 1, len(one)).astype(np.float32)
        found.add(one.astype(np.uint32), other.astype(np.uint32), similarity)
    return found.table(0.3)["num_components"].to_numpy()


SIDES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "ours": ours,
    "scipy": by_scipy,
    "numbers, bits": numbers_by_bits,
    "numbers, sorted ids": numbers_by_ids,
    "sweep": swept,
}


def as_ids(ends: np.ndarray) -> np.ndarray:
    """Node n as the picture of row n % 10,000 of shard n // 10,000."""
    shard, row = np.divmod(ends, SHARD_ROWS)
    return np.asarray(shard * ROWS_PER_SHARD_LIMIT + row)


# In processes of their own


def _status(key: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def alone(side: str, num_edges: int) -> dict[str, float]:
    """What one side takes; to be called in a fresh process."""
    few = as_ids(np.arange(4)) if "numbers" in side else np.arange(4)
    SIDES[side](few, few[::-1].copy(), 4)  # compiled, imported
    a, b = made_edges(num_edges)
    if "numbers" in side:
        a, b = as_ids(a), as_ids(b)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    started = time.perf_counter()
    SIDES[side](a, b, num_edges * 6 // 5)
    return {"seconds": time.perf_counter() - started, "bytes": _status("VmHWM") - before}


def streamed(num_edges: int) -> dict[str, float]:
    """Edges made chunk by chunk; to be called in a fresh process."""
    num_nodes = num_edges * 6 // 5
    ours(np.arange(4), np.arange(4), 4)
    started = time.perf_counter()
    found = UnionFind(num_nodes)
    adding = 0.0
    for number in range(-(-num_edges // CHUNK)):
        rng = np.random.default_rng([7, number])
        a, b = rng.integers(0, num_nodes, (2, min(CHUNK, num_edges - number * CHUNK)))
        began = time.perf_counter()
        found.add(a, b)
        adding += time.perf_counter() - began
    label = found.labels()
    seconds = time.perf_counter() - started
    num_components = 0
    for start in range(0, num_nodes, CHUNK):  # so that the peak is not that of counting
        part = label[start : start + CHUNK]
        num_components += int(np.count_nonzero(part == np.arange(start, start + len(part))))
    return {"seconds": seconds, "adding": adding, "bytes": _status("VmHWM"), "components": num_components}


def in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(told)
    return result


# All of it


def least(label: np.ndarray) -> np.ndarray:
    """Least node of the component of each node, whatever the labels."""
    first = np.full(int(label.max()) + 1, len(label), np.int64)
    np.minimum.at(first, label, np.arange(len(label)))
    return np.asarray(first[label])


def in_turns(num_edges: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of both sides."""
    a, b = made_edges(num_edges)
    num_nodes = num_edges * 6 // 5
    sides = {"ours": ours, "scipy": by_scipy}
    for side in sides.values():
        side(np.arange(4), np.arange(4)[::-1], 4)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds):
        made = {}
        for name, side in sides.items():
            started = time.perf_counter()
            made[name] = side(a, b, num_nodes)
            seconds[name].append(time.perf_counter() - started)
        if round_ == 0:
            assert np.array_equal(made["ours"], least(made["scipy"])), "partitions differ"
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--streamed-edges", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/components.json"))
    parser.add_argument("--alone", choices=[*SIDES, "streamed"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        streams = options.alone == "streamed"
        print(json.dumps(streamed(options.edges) if streams else alone(options.alone, options.edges)))
        return 0
    seconds = in_turns(options.edges, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    taken = {name: in_process("--alone", name, "--edges", str(options.edges)) for name in SIDES}
    for name, one in taken.items():
        spent = f"median {median[name]:5.2f} s in turns" if name in median else f"{one['seconds']:5.2f} s, once"
        print(f"{name:<20} {spent:<24} {one['bytes'] / 1e6:7,.0f} MB beside its input")
    large = in_process("--alone", "streamed", "--edges", str(options.streamed_edges))
    print(
        f"{options.streamed_edges:,} edges, streamed: {large['bytes'] / 1e9:.2f} GB in all, {large['components']:,.0f} "
        f"components, {large['adding']:.1f} s joining, {large['seconds']:.1f} s with making the edges"
    )
    results = {
        "scipy/ours time": (median["scipy"] / median["ours"], GOAL_TIME),
        "scipy/ours memory": (taken["scipy"]["bytes"] / taken["ours"]["bytes"], GOAL_MEMORY),
        "4 GB/streamed memory": (MOST_BYTES / large["bytes"], 1.0),
    }
    report: dict[str, Any] = {"seconds": seconds, "alone": taken, "streamed": large}
    report["ratios"] = {name: ratio for name, (ratio, _) in results.items()}
    report["goals"] = {name: goal for name, (_, goal) in results.items()}
    report["inputs"] = {"edges": options.edges, "streamed_edges": options.streamed_edges, "rounds": options.rounds}
    report["inputs"] |= {"nodes_per_edge": 1.2, "chunk": CHUNK, "shard_rows": SHARD_ROWS}
    report["machine"] = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    report["versions"] = {name: version(name) for name in PACKAGES}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers in {options.json}; partitions are equal")
    for name, (ratio, goal) in results.items():
        print(f"components {name} ratio {ratio:.2f} goal {goal} {'ok' if ratio >= goal else 'short'}")
    return 0 if all(ratio >= goal for ratio, goal in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
