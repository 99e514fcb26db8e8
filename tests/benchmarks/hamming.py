"""All pairs of a million 64-bit codes within 4 bits, against Faiss's IndexBinaryFlat; and codes that cluster.

    make bench NAME=hamming ARGS="--data FOLDER/tiny_imagenet_100c.parquet"

`--data` is a parquet file with a column `image` of encoded pictures. Three sets of codes:

- random: uniform, and 5 % of them are copies of others with 0 to 5 bits flipped;
- clustered: the pHashes of the pictures of `--data`, and for the rest of the million one of them with 0 to 16 bits
  flipped;
- narrow: only 40 bits vary, so that three keys have one bucket of everything. It shows what cutting again does and has
  no goal.

Ours is the join as tasks of `near_pairs` do it, from codes and ids to sorted pairs, one thread: `1 range`, one task
over all keys, and `8 ranges`, the default of a recipe, its eight tasks one after the other. What a run reads and writes
around it is left out. Faiss has two threads; a round searches 5,000 codes among all and counts for as many as there
are. Sides take turns; a ratio is one of medians of wall seconds, and the slower of our two ways is judged. The pairs of
these 5,000 codes are the same on both sides, in the random and in the clustered set.

Prints a row a side, writes a JSON, and ends with a line for each goal.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "2"

import faiss
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from curation.dedup.hashes import phash
from curation.dedup.near import NearConfig, near_pairs

RADIUS, THREADS = 4, 2
WAYS = {"1 range": 1, "8 ranges": 8}  # key ranges
GOAL, MOST_CLUSTERED = 100.0, 3.0
PACKAGES = ("numpy", "numba", "faiss-gpu", "imagehash", "pillow")
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


# Codes


def flipped(codes: np.ndarray, num_flips: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Codes with so many bits of each flipped, uint64 [N]."""
    places = np.argsort(draw.random((len(codes), 64), np.float32), axis=1).astype(np.uint64)
    out = codes.copy()
    for n in range(int(num_flips.max())):
        mine = num_flips > n
        out[mine] ^= np.uint64(1) << places[mine, n]
    return out


def random_codes(num: int) -> np.ndarray:
    """Uniform, with planted copies at the beginning."""
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 2**64, num, dtype=np.uint64)
    planted = num // 20
    codes[:planted] = flipped(codes[planted : 2 * planted], np.arange(planted) % 6, draw)
    return codes


def clustered_codes(num: int, bases: np.ndarray) -> np.ndarray:
    """Real codes, and mutations of them."""
    draw = np.random.default_rng(1)
    which = draw.integers(0, len(bases), num - len(bases))
    codes = np.concatenate([bases, flipped(bases[which], draw.integers(0, 17, len(which)), draw)])
    return draw.permutation(codes)


def narrow_codes(num: int) -> np.ndarray:
    """Codes whose upper bits are the same."""
    return np.random.default_rng(2).integers(0, 2**40, num, dtype=np.uint64)


def real_codes(path: Path) -> np.ndarray:
    """pHashes of the pictures of a parquet file."""
    pictures = pq.read_table(path, columns=["image"])["image"].to_pylist()
    opened = (np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures)
    return np.array([phash(rgb) for rgb in opened], np.uint64)


# Sides


def ours(codes: np.ndarray, key_ranges: int) -> tuple[list[Pairs], list[Any]]:
    """Pairs of each task, and what it counted of each key."""
    ids, cap = np.arange(len(codes)), NearConfig().max_bucket
    made = [
        near_pairs(codes, ids, radius_bits=RADIUS, max_bucket=cap, key_ranges=key_ranges, key_range=key_range)
        for key_range in range(key_ranges)
    ]
    return [one[:3] for one in made], [key for one in made for key in one[3]]


def by_faiss(index: Any, codes: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Query and row of each hit."""
    ends, _, rows = index.range_search(codes[queries].view(np.uint8).reshape(-1, 8), RADIUS + 1)
    return np.repeat(queries, np.diff(ends.astype(np.int64))), rows


def same_pairs(codes: np.ndarray, queries: np.ndarray, hits: tuple[np.ndarray, np.ndarray], made: list[Pairs]) -> int:
    """Compare pairs of different codes, and how often the code of each query is there; the number of pairs compared."""
    a, b, distance = (np.concatenate(column) for column in zip(*made, strict=True))
    asked = set(codes[queries].tolist())
    apart = distance > 0
    ends = codes[np.concatenate([a[apart], b[apart]])], codes[np.concatenate([b[apart], a[apart]])]
    of_ours = {pair for pair in zip(*(end.tolist() for end in ends), strict=True) if pair[0] in asked}
    near, row = codes[hits[0]], codes[hits[1]]
    other = near != row
    assert of_ours == set(zip(near[other].tolist(), row[other].tolist(), strict=True)), "pairs differ"
    again = Counter(codes[b[~apart]].tolist())
    equal = np.bincount(hits[0][~other], minlength=len(codes))
    assert all(equal[query] == 1 + again[int(codes[query])] for query in queries), "repeated codes differ"
    return len(of_ours)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All sides, in turns."""
    bases = real_codes(options.data)
    sets = {"random": random_codes(options.codes), "clustered": clustered_codes(options.codes, bases)}
    sets["narrow"] = narrow_codes(options.codes)
    queries = np.linspace(0, options.codes // 10, options.queries, endpoint=False).astype(np.int64)
    faiss.omp_set_num_threads(THREADS)
    ours(sets["random"][:1000], 2)  # compiled
    seconds: dict[str, list[float]] = {}
    told: dict[str, Any] = {"real": {"codes": len(bases), "different": len(np.unique(bases))}}
    for round_ in range(options.rounds):
        for name, codes in sets.items():
            if name == "narrow" and round_ > 0:
                continue
            for way, key_ranges in WAYS.items():
                started = time.perf_counter()
                made, keys = ours(codes, key_ranges)
                seconds.setdefault(f"{name}, {way}", []).append(time.perf_counter() - started)
            if name == "random" or (name == "clustered" and round_ == 0):
                index = faiss.IndexBinaryFlat(64)
                index.add(codes.view(np.uint8).reshape(-1, 8))
                started = time.perf_counter()
                hits = by_faiss(index, codes, queries)
                spent = (time.perf_counter() - started) * options.codes / options.queries
                seconds.setdefault(f"{name}, faiss", []).append(spent)
            if round_ == 0:
                told[name] = {
                    "pairs": sum(len(one[0]) for one in made),
                    "compared": same_pairs(codes, queries, hits, made) if name != "narrow" else 0,
                    "largest_bucket": max(key.largest_bucket for key in keys),
                    "rerouted": sum(key.num_rerouted for key in keys),
                }
    return {"seconds": seconds, "sets": told}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of pictures")
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/hamming.json"))
    options = parser.parse_args()
    report = measure(options)
    median = {name: statistics.median(values) for name, values in report["seconds"].items()}
    for name, seconds in median.items():
        print(f"{name:<20} {seconds:8.2f} s, fastest {min(report['seconds'][name]):8.2f}")
    for name in ("random", "clustered", "narrow"):
        told = report["sets"][name]
        print(
            f"{name}: {told['pairs']:,} pairs, {told['compared']:,} of different codes compared with faiss's; largest "
            f"bucket {told['largest_bucket']:,}; {told['rerouted']:,} codes, over all keys, in fuller ones than allowed"
        )
    more = report["sets"]["clustered"]["pairs"] - report["sets"]["random"]["pairs"]
    for way in WAYS:
        spent = median[f"clustered, {way}"] - median[f"random, {way}"]
        print(f"{way}: clustered takes {1e9 * spent / max(1, more):.0f} ns for each pair that it has more than random")
    faster = min(median["random, faiss"] / median[f"random, {way}"] for way in WAYS)
    clustered = max(median[f"clustered, {way}"] / median[f"random, {way}"] for way in WAYS)
    results = {"faiss/ours": (faster, GOAL, faster >= GOAL)}
    results["clustered/random"] = (clustered, MOST_CLUSTERED, clustered <= MOST_CLUSTERED)
    report["ratios"] = {name: ratio for name, (ratio, _, _) in results.items()}
    report["goals"] = {name: goal for name, (_, goal, _) in results.items()}
    report["inputs"] = {name: getattr(options, name) for name in ("codes", "queries", "rounds")}
    report["inputs"] |= {"radius_bits": RADIUS, "max_bucket": NearConfig().max_bucket, "faiss_threads": THREADS}
    report["machine"] = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    report["versions"] = {name: version(name) for name in PACKAGES}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers in {options.json}")
    for name, (ratio, goal, reached) in results.items():
        print(f"hamming {name} ratio {ratio:.2f} goal {goal} {'ok' if reached else 'short'}")
    return 0 if all(reached for _, _, reached in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
