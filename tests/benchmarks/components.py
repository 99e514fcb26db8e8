"""Connected components of random edges: ours, from chunks, against scipy's csgraph. Time, and memory beside the input.

    make bench NAME=components

10 million edges over 12 million nodes, int64, are at hand for both. Ours takes them a million at a time; scipy gets a
sparse matrix made of them, which is part of its time. The two take turns in one process, one thread each, the loops
compiled before the clock starts. Memory is measured in a process of each: its peak, less what it held once the edges
and the libraries were there. Then 100 million edges over 120 million nodes, of which only one chunk is ever there.
The partitions are compared. Writes a JSON and ends with lines of ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from curation.dedup.unionfind import UnionFind

CHUNK = 1_000_000
GOAL_TIME, GOAL_MEMORY, GOAL_PEAK_GB = 1.0, 0.5, 4.0
SIDES = ("ours", "scipy")


def chunks_of(num_edges: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Seeded random edges over 1.2 times as many nodes, a chunk at a time."""
    for number in range(num_edges // CHUNK):
        draw = np.random.default_rng(number)
        yield tuple(draw.integers(0, num_edges * 6 // 5, (2, CHUNK)))  # type: ignore[misc]


def ours(num_nodes: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Least node of each component."""
    graph = UnionFind(num_nodes)
    for start in range(0, len(a), CHUNK):
        graph.add(a[start : start + CHUNK], b[start : start + CHUNK])
    return graph.labels()


def scipys(num_nodes: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of each component, in int32 where that is enough, as scipy itself would make it."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = (a.astype(np.int32), b.astype(np.int32))
    matrix = coo_matrix((np.ones(len(a), np.int8), ends), shape=(num_nodes, num_nodes)).tocsr()
    return np.asarray(connected_components(matrix, directed=False)[1])


def held_bytes(what: str) -> int:
    """Resident memory of this process: VmRSS now, VmHWM at its highest (a child inherits ru_maxrss, so not that)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def warm() -> None:
    """Compile and import."""
    one = np.zeros(1, np.int64)
    ours(2, one, one)
    scipys(2, one, one)


def one_memory(side: str, num_edges: int) -> None:
    """Print the bytes that one side needs beside its input; in a process of its own."""
    warm()
    ends = np.empty((2, num_edges), np.int64)  # filled in place, so that no peak comes from making the input
    for number, (a, b) in enumerate(chunks_of(num_edges)):
        ends[:, number * CHUNK : (number + 1) * CHUNK] = a, b
    before = held_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    (ours if side == "ours" else scipys)(num_edges * 6 // 5, *ends)
    print(held_bytes("VmHWM") - before)


def one_stream(num_edges: int) -> None:
    """Print seconds without those of making edges, and the peak of the whole process."""
    warm()
    graph, seconds = UnionFind(num_edges * 6 // 5), 0.0
    for a, b in chunks_of(num_edges):
        started = time.perf_counter()
        graph.add(a, b)
        seconds += time.perf_counter() - started
    num = len(np.unique(graph.labels()[::1000]))
    print(seconds, held_bytes("VmHWM"), num)


def child(*args: str) -> list[float]:
    """What one of the above prints."""
    done = subprocess.run([sys.executable, __file__, *args], check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    """Take turns, then memory, then the long stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--stream", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/components.json"))
    parser.add_argument("--one", help="for itself")
    args = parser.parse_args()
    if args.one == "stream":
        return one_stream(args.stream)
    if args.one:
        return one_memory(args.one, args.edges)

    warm()
    num_nodes = args.edges * 6 // 5
    a, b = (np.concatenate(ends) for ends in zip(*chunks_of(args.edges), strict=True))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    labels = {}
    for _ in range(args.rounds):
        for side, run in zip(SIDES, (ours, scipys), strict=True):
            started = time.perf_counter()
            labels[side] = run(num_nodes, a, b)
            seconds[side].append(time.perf_counter() - started)
    least = np.full(int(labels["scipy"].max()) + 1, num_nodes)
    np.minimum.at(least, labels["scipy"], np.arange(num_nodes))
    assert np.array_equal(least[labels["scipy"]], labels["ours"]), "not the same partition"
    del a, b, least, labels

    edges = f"--edges={args.edges}"
    memory = {side: child("--one", side, edges)[0] for side in SIDES}
    stream_s, stream_peak, _ = child("--one", "stream", f"--stream={args.stream}")
    for side in SIDES:
        print(f"{side:6} {statistics.median(seconds[side]):6.2f} s   {memory[side] / 1e6:7.0f} MB beside the edges")
    print(f"{args.stream:,} edges in chunks: {stream_s:.1f} s, peak {stream_peak / 1e9:.2f} GB of the whole process")
    ratio = statistics.median(seconds["scipy"]) / statistics.median(seconds["ours"])
    share = memory["ours"] / memory["scipy"]
    report = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "numba", "scipy")},
        "inputs": {"edges": args.edges, "nodes": num_nodes, "stream": args.stream, "chunk": CHUNK, "threads": 1},
        "seconds": seconds,
        "bytes": memory,
        "stream": {"seconds": stream_s, "peak_bytes": stream_peak},
        "goals": {"time": GOAL_TIME, "memory": GOAL_MEMORY, "peak_gb": GOAL_PEAK_GB},
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    lines = (
        ("components scipy/ours", ratio, GOAL_TIME, ratio >= GOAL_TIME),
        ("components memory ours/scipy", share, GOAL_MEMORY, share <= GOAL_MEMORY),
        ("components stream GB", stream_peak / 1e9, GOAL_PEAK_GB, stream_peak / 1e9 < GOAL_PEAK_GB),
    )
    for name, value, goal, holds in lines:
        print(f"{name} ratio {value:.2f} goal {goal} {'ok' if holds else 'short'}")
    sys.exit(not all(holds for *_, holds in lines))


if __name__ == "__main__":
    main()
