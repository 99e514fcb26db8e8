"""The graph of near copies among 200,000 vectors of 512 numbers, list by list, against Faiss's IndexIVFFlat.

    make bench NAME=knn ARGS="--data DIR --cache FILE"

Two sets of vectors (tests/benchmarks/knn_vectors.py). `made`: clustered, a fifth of them copies of others at cosines of
0.4 to 0.99; edges at SSCD's thresholds of duplicates and of leakage. `real`: weight-free descriptors of the pictures of
`--data` and of seeded edits of them, cut to 512 numbers; edges at its one threshold. Making them takes 40 minutes of a
core, so they are kept in `--cache`; given that alone, its rows up to the first one missing are measured. With neither,
only the made ones are.

Each picture keeps its 64 nearest edges. Recall is counted from 5,000 rows that are searched exactly; an edge counts as
found where either of its ends has the other, on both sides. For each number of lists the least number of probes that
reaches a recall of 0.99 is taken, by the same rows, and each side gets the number of lists that it is fastest with.

Both sides are given the same centroids, and the time of their fit counts on both. Ours is, then, what tasks of `edges`
do, from vectors to sorted edges: assign, sort by list, join each list; and the cut to 64. What a run reads and writes
in between is left out. Faiss's is adding to the index and searching it, by `range_search` or by `search` for 65
neighbours, whichever is faster; a round searches the 5,000 rows and counts for as many as there are. Both have one
thread, as a task has, and take turns; the fit is timed once. A ratio is one of medians of CPU seconds, since a machine
may have other work; wall seconds are printed, too. The bare GEMMs are those of our join alone, in its precision.

Prints rows, writes a JSON, and ends with a line for each goal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import faiss
import numpy as np
from knn_vectors import DIM, ROWS, described, held_rows, made_vectors

from curation.dedup import join
from curation.dedup.copydescriptor import KNOWN_THRESHOLDS, WEIGHT_FREE
from curation.dedup.join import BLOCK_COLUMNS, BLOCK_ROWS, Members, assign, fit_centroids, join_list, similarities
from curation.dedup.siftvlad import unit

MOST = 64  # edges of a picture
GOAL, GOAL_RECALL = 5.0, 0.99
WAYS = ("range_search", "search")
TRIED = 500  # rows that Faiss searches to find its best number of lists
PACKAGES = ("numpy", "numba", "torch", "faiss-gpu", "opencv-python-headless")
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


class Case(NamedTuple):
    """Vectors, where an edge begins, and rows that are searched exactly."""

    vectors: np.ndarray  # fp16 values, float32 [N, 512]
    unit: np.ndarray  # the same at length 1, for Faiss, whose products are then the cosines of ours
    threshold: float
    asked: np.ndarray  # int64 [Q]
    truth: Edges  # of these rows: row, other row, cosine; at most 64 a row


class Clock:
    """CPU and wall seconds since the last call."""

    def __init__(self) -> None:
        self.at = time.process_time(), time.perf_counter()

    def __call__(self) -> np.ndarray:
        before, self.at = self.at, (time.process_time(), time.perf_counter())
        return np.subtract(self.at, before)


def cut_to_most(row: np.ndarray, other: np.ndarray, cosine: np.ndarray) -> Edges:
    """The nearest 64 of each row; equal ones by the lower number."""
    if len(row) == 0 or np.bincount(row).max() <= MOST:
        return row, other, cosine
    full = np.bincount(row)[row] > MOST
    at = np.flatnonzero(full)
    order = at[np.lexsort((other[at], -cosine[at], row[at]))]
    rank = np.arange(len(order)) - np.searchsorted(row[order], row[order])
    kept = np.concatenate([np.flatnonzero(~full), order[rank < MOST]])
    return row[kept], other[kept], cosine[kept]


def case_of(vectors: np.ndarray, threshold: float, num_asked: int) -> Case:
    """Search some rows exactly."""
    asked = np.sort(np.random.default_rng(1).permutation(len(vectors))[:num_asked])
    found = []
    for start in range(0, num_asked, 500):
        block = asked[start : start + 500]
        i, j = np.nonzero(vectors[block] @ vectors.T >= threshold - 1e-3)
        i, j = block[i][block[i] != j], j[block[i] != j]
        cosine = similarities(vectors, vectors, i, j)
        edge = cosine >= np.float32(threshold)
        found.append(cut_to_most(i[edge], j[edge], cosine[edge]))
    row, other, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
    return Case(vectors, unit(vectors), threshold, asked, (row, other, cosine))


def least_probes(case: Case, centroids: np.ndarray) -> int:
    """How many lists to look into, so that 0.99 of the edges are found from one end or the other."""
    row, other, _ = case.truth
    ends = np.unique(np.concatenate([row, other]))
    lists = np.argsort(case.vectors[ends] @ -centroids.T, axis=1)
    rank = np.argsort(lists, axis=1)
    left, right = np.searchsorted(ends, row), np.searchsorted(ends, other)
    needed = np.sort(np.minimum(rank[left, lists[right, 0]], rank[right, lists[left, 0]])) + 1
    return int(needed[int(np.ceil(GOAL_RECALL * len(needed))) - 1])


# Sides


def by_list(seen: np.ndarray, num_lists: int) -> list[np.ndarray]:
    """Rows that look into each list."""
    lists = seen.ravel()
    order = np.argsort(lists, kind="stable")
    ends = np.searchsorted(lists[order], np.arange(1, num_lists))
    return np.split(order // seen.shape[1], ends)


def ours(case: Case, centroids: np.ndarray, probes: int) -> tuple[Edges, dict[str, np.ndarray]]:
    """Both directions of each edge, and CPU and wall seconds of each part."""
    clock = Clock()
    seen = assign(case.vectors, centroids, probes)
    seconds = {"assign": clock()}
    made = []
    lists = by_list(seen, len(centroids))
    held = np.empty((max(map(len, lists)), DIM), np.float32)  # new memory for each list costs more than copying does
    for number, rows in enumerate(lists):
        vectors = np.take(case.vectors, rows, axis=0, out=held[: len(rows)], mode="clip")
        made.append(join_list(Members(rows, vectors, seen[rows, 0], seen[rows]), number, case.threshold))
    a, b, cosine = (np.concatenate(column) for column in zip(*made, strict=True))
    seconds["join"] = clock()
    edges = cut_to_most(np.concatenate([a, b]), np.concatenate([b, a]), np.concatenate([cosine, cosine]))
    seconds["cut"] = clock()
    return edges, seconds | {"all": sum(seconds.values(), np.zeros(2))}


def bare_gemms(case: Case, centroids: np.ndarray, probes: int) -> tuple[np.ndarray, int]:
    """CPU and wall seconds of the join's GEMMs alone, and how many scores they make."""
    import torch

    seen = assign(case.vectors, centroids, probes)
    seconds, num_scores = np.zeros(2), 0
    for number, rows in enumerate(by_list(seen, len(centroids))):
        visitors = torch.from_numpy(case.vectors[rows])
        at_home = visitors[torch.from_numpy(seen[rows, 0] == number)]
        num_scores += len(at_home) * len(visitors)
        if join.precision_for(len(at_home) * len(visitors)) == "bf16":
            at_home, visitors = at_home.bfloat16(), visitors.bfloat16()
        clock = Clock()
        for left in at_home.split(BLOCK_ROWS):
            for right in visitors.split(BLOCK_COLUMNS):
                torch.mm(left, right.T)
        seconds += clock()
    return seconds, num_scores


def faiss_index(case: Case, centroids: np.ndarray, probes: int) -> Any:
    """An index that holds all vectors."""
    quantizer = faiss.IndexFlatIP(DIM)
    quantizer.add(centroids)
    index = faiss.IndexIVFFlat(quantizer, DIM, len(centroids), faiss.METRIC_INNER_PRODUCT)
    index.nprobe = probes
    index.add(case.unit)
    return index


def faiss_edges(index: Any, case: Case, rows: np.ndarray, way: str) -> Edges:
    """Edges that rows find, not cut where `range_search` finds more."""
    if way == "range_search":
        ends, cosine, other = index.range_search(case.unit[rows], case.threshold)
        row = np.repeat(rows, np.diff(ends.astype(np.int64)))
    else:
        near, found = index.search(case.unit[rows], MOST + 1)
        i, j = np.nonzero((near >= case.threshold) & (found >= 0))
        row, other, cosine = rows[i], found[i, j], near[i, j]
    apart = row != other
    return row[apart], other[apart], cosine[apart]


def search_seconds(case: Case, centroids: np.ndarray, probes: int, *, rows: np.ndarray, way: str) -> np.ndarray:
    """CPU and wall seconds of adding all and of searching as many as there are, judged by some rows."""
    clock = Clock()
    index = faiss_index(case, centroids, probes)
    added = clock()
    cut_to_most(*faiss_edges(index, case, rows, way))
    return added + clock() * len(case.vectors) / len(rows)


# Recall


def missing(case: Case, edges: Edges) -> np.ndarray:
    """Which of the true edges are in none of the lists given, bool [E]."""
    row, other, _ = case.truth
    num = len(case.vectors)
    keys = edges[0] * num + edges[1]
    return ~(np.isin(row * num + other, keys) | np.isin(other * num + row, keys))


def recall_of_faiss(case: Case, centroids: np.ndarray, probes: int, way: str) -> float:
    """Of the asked rows; where one misses an edge, its other end is asked, too, and what both find is cut to 64.

    A true edge is among the 64 nearest of its row, so that cut takes none of them.
    """
    index = faiss_index(case, centroids, probes)
    found = faiss_edges(index, case, case.asked, way)
    others = np.unique(case.truth[1][missing(case, found)])
    if len(others):
        more = faiss_edges(index, case, others, way)
        found = tuple(np.concatenate(columns) for columns in zip(found, more, strict=True))
    return 1 - float(missing(case, found).mean())


# All of it


Fits = dict[int, tuple[np.ndarray, float]]  # by number of lists: centroids, and CPU seconds of their fit


def tried(case: Case, num_lists: int, fits: Fits) -> dict[str, Any]:
    """What both sides take with so many lists."""
    if num_lists not in fits:
        clock = Clock()
        step = max(1, len(case.vectors) // max(20_000, 40 * num_lists))
        fits[num_lists] = fit_centroids(case.vectors[::step], num_lists, seed=0), float(clock()[0])
    centroids, fit = fits[num_lists]
    probes = least_probes(case, centroids)
    told: dict[str, Any] = {"lists": num_lists, "probes": probes, "fit": fit}
    told["ours"] = float(ours(case, centroids, probes)[1]["all"][0])
    for way in WAYS:
        told[way] = float(search_seconds(case, centroids, probes, rows=case.asked[:TRIED], way=way)[0])
    print("  " + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items()), flush=True)
    return told


def measure(case: Case, options: argparse.Namespace, fits: Fits) -> dict[str, Any]:
    """Both sides with the number of lists that suits each best, in turns."""
    tries = [tried(case, number, fits) for number in options.lists]
    mine = min(tries, key=lambda told: told["fit"] + told["ours"])
    way = min(WAYS, key=lambda way: min(told["fit"] + told[way] for told in tries))
    peer = min(tries, key=lambda told: told["fit"] + told[way])
    args = {name: (fits[t["lists"]][0], t["probes"]) for name, t in (("ours", mine), ("faiss", peer))}
    taken: dict[str, list[list[float]]] = {}
    for _ in range(options.rounds):
        edges, parts = ours(case, *args["ours"])
        gemms, num_scores = bare_gemms(case, *args["ours"])
        of_faiss = search_seconds(case, *args["faiss"], rows=case.asked, way=way)
        for name, seconds in {**parts, "gemm": gemms, "faiss": of_faiss}.items():
            taken.setdefault(name, []).append(seconds.tolist())
    cpu, wall = ({name: statistics.median(s[i] for s in all_) for name, all_ in taken.items()} for i in (0, 1))
    return {
        "vectors": len(case.vectors),
        "threshold": case.threshold,
        "tries": tries,
        "ours": {key: mine[key] for key in ("lists", "probes", "fit")},
        "faiss": {key: peer[key] for key in ("lists", "probes", "fit")} | {"way": way},
        "edges": len(edges[0]) // 2,
        "edges_asked": len(case.truth[0]),
        "recall": {
            "ours": 1 - float(missing(case, edges).mean()),
            "faiss": recall_of_faiss(case, *args["faiss"], way),
        },
        "seconds": taken,  # CPU and wall, of each round
        "cpu_s": cpu,
        "wall_s": wall,
        "ratio": (peer["fit"] + cpu["faiss"]) / (mine["fit"] + cpu["all"]),
        "ratio_without_fit": cpu["faiss"] / cpu["all"],
        "ratio_without_fit_wall": wall["faiss"] / wall["all"],
        "ratio_without_fit_best": min(t[way] for t in tries for way in WAYS) / min(t["ours"] for t in tries),
        "share_of_gemm": cpu["gemm"] / cpu["all"],
        "share_of_pairs_scored": num_scores / len(case.vectors) ** 2,
        "gemm_gflops": 2 * DIM * num_scores / cpu["gemm"] / 1e9,
        "gemm": join.precision_for(num_scores // mine["lists"]),
    }


def show(name: str, told: dict[str, Any]) -> None:
    """Rows for people."""
    cpu, wall = told["cpu_s"], told["wall_s"]
    fewer = "" if told["vectors"] == ROWS else f" instead of {ROWS:,}"
    print(f"{name}: {told['vectors']:,} vectors{fewer}, {told['edges']:,} edges of at most {MOST} a row")
    for side, key in (("ours", "all"), ("faiss", "faiss")):
        at = told[side]
        print(
            f"  {side:<6}{cpu[key]:8.1f} CPU s {wall[key]:8.1f} s, fit {at['fit']:5.1f} CPU s   {at['probes']} of "
            f"{at['lists']} lists, edge recall {told['recall'][side]:.4f} {at.get('way', '')}"
        )
    parts = ", ".join(f"{part} {cpu[part]:.1f}" for part in ("assign", "join", "cut"))
    print(
        f"  of ours: {parts} CPU s; bare GEMMs {cpu['gemm']:.1f} ({told['share_of_gemm']:.0%}; {told['gemm']}, "
        f"{told['gemm_gflops']:.0f} GFLOP/s), {told['share_of_pairs_scored']:.1%} of all pairs"
    )
    print(
        f"  without the fit the ratio is {told['ratio_without_fit']:.1f} ({told['ratio_without_fit_wall']:.1f} by "
        f"wall), and {told['ratio_without_fit_best']:.1f} with the lists that were fastest so"
    )


def cases(options: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, float, Fits]]:
    """Names, vectors, thresholds and fits, one after the other."""
    fits: Fits = {}
    sscd, own = KNOWN_THRESHOLDS["sscd"], KNOWN_THRESHOLDS[WEIGHT_FREE]
    made = made_vectors(options.rows)
    yield "made, duplicates", made, sscd.duplicate, fits
    yield "made, leakage", made, sscd.leakage, fits
    del made
    if options.cache:
        fits = {}
        real = described(options.data, options.cache, options.rows) if options.data else held_rows(options.cache)
        if own.duplicate == own.leakage:
            yield "real, duplicates and leakage", real, own.duplicate, fits
        else:
            yield "real, duplicates", real, own.duplicate, fits
            yield "real, leakage", real, own.leakage, fits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the picture sets")
    parser.add_argument("--cache", type=Path, help=".npy of the real vectors")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--asked", type=int, default=5_000)
    parser.add_argument("--lists", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/knn.json"))
    options = parser.parse_args()
    if options.data and not options.cache:
        parser.error("--data needs --cache")
    report: dict[str, Any] = {"cases": {}}
    for name, vectors, threshold, fits in cases(options):
        told = measure(case_of(vectors, threshold, options.asked), options, fits)
        report["cases"][name] = told
        show(name, told)
    report |= {"goal": GOAL, "goal_recall": GOAL_RECALL, "most_edges_of_a_row": MOST, "threads": 1}
    report["inputs"] = {name: getattr(options, name) for name in ("rows", "asked", "lists", "rounds")} | {"dim": DIM}
    report["machine"] = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    report["versions"] = {name: version(name) for name in PACKAGES}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers in {options.json}")
    reached = []
    for name, told in report["cases"].items():
        reached.append(told["ratio"] >= GOAL and min(told["recall"].values()) >= GOAL_RECALL)
        print(f"knn {name} ratio {told['ratio']:.2f} goal {GOAL} {'ok' if reached[-1] else 'short'}")
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
