"""Nearest neighbours of queries in a pool of a million, list by list, against Faiss's exact search.

    make bench NAME=retrieve
    make bench NAME=retrieve ARGS="--pictures FILE"

The pool is made: a million unit vectors of 384 numbers in fp16, drawn around 2,000 centres whose shares have a heavy
tail, spread within each centre as widely as the centres are apart; 10,000 queries are drawn alike. k = 4. Ours looks
into the lists of `retrieve.probes` centroids of 4,096, choice of the lists and exact scores counted in; k-means and the
assignment to lists are not, and have rows of their own. Faiss's IndexFlatIP searches a thousand other queries a round,
and its time is scaled to all; recall is counted on these thousands. Faiss has two threads, ours two processes of one
thread with half of the queries each, as two workers of a run have. They take turns.

With `--pictures` it measures nothing against Faiss, but prints the recall of hog-thumb embeddings of the pictures of a
parquet file by number of clusters and probes: 2,000 pictures asked, the others searched. `retrieve.probes` was chosen
by these.

Prints rows, writes a JSON, and ends with one line: Faiss's seconds over ours, where the recall is at least 0.99.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "2"
os.environ["OPENBLAS_NUM_THREADS"] = "2"

import faiss
import numpy as np
import threadpoolctl

from curation.represent import handmade, kmeans
from curation.retrieve import search
from curation.retrieve.retrieve import RetrieveConfig

THREADS = 2
GOAL, GOAL_RECALL = 5.0, 0.99
PACKAGES = ("numpy", "faiss-gpu")
DIM, LATENT, NUM_CENTRES = 384, 48, 2000
SPREAD, NOISE = 0.6, 0.15  # around a centre, in the latent space; around that, in all dimensions


def made_vectors(num: int, rng: np.random.Generator, centres: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Clustered unit vectors, float16 [num, 384].

    Args:
        num: of vectors.
        rng: the draw.
        centres: float32 [2000, 48].
        shares: of each centre, float64 [2000].
    """
    lift = np.random.default_rng(1).standard_normal((LATENT, DIM)).astype(np.float32) / 7
    vectors = np.empty((num, DIM), np.float16)
    for start in range(0, num, 100_000):
        rows = min(100_000, num - start)
        at = rng.choice(len(centres), rows, p=shares)
        latent = centres[at] + SPREAD * rng.standard_normal((rows, LATENT), np.float32)
        block = latent @ lift + NOISE * rng.standard_normal((rows, DIM), np.float32)
        vectors[start : start + rows] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def nearest_places(pairs: search.Pairs, k: int, num_queries: int) -> np.ndarray:
    """Places of the k nearest of each query, int64 [Q, k]; -1 where fewer were found."""
    order = np.lexsort((pairs.pool, -pairs.similarity, pairs.query))
    rank = search.rank_in(pairs.query[order])
    order, rank = order[rank < k], rank[rank < k]
    places = np.full((num_queries, k), -1, np.int64)
    places[pairs.query[order], rank] = pairs.pool[order]
    return places


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact neighbours [Q, k] that were found [Q, k]."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


def lists_of(pool: np.ndarray, num: int, *, sample: int, iterations: int) -> tuple[np.ndarray, ...]:
    """Centroids float16 [num, D], order of the pool by list int64 [N], lists in that order int32 [N], seconds."""
    started = time.perf_counter()
    at = np.sort(np.random.default_rng(2).permutation(len(pool))[:sample])
    centroids = kmeans.fit(pool[at].astype(np.float32), num_clusters=num, iterations=iterations, seed=0)
    fitted = time.perf_counter()
    blocks = range(0, len(pool), 100_000)
    cluster = np.concatenate([kmeans.assign(pool[s : s + 100_000].astype(np.float32), centroids)[0] for s in blocks])
    order = np.argsort(cluster, kind="stable")
    seconds = np.array([fitted - started, time.perf_counter() - fitted])
    return centroids.astype(np.float16), order, cluster[order], seconds


_HELD: dict[str, Any] = {}  # what the two processes search; they are forked from this one


def _search(queries: slice) -> tuple[np.ndarray, float, float]:
    """One process's part: places of the nearest [Q, k], seconds to choose lists, CPU seconds."""
    started, cpu = time.perf_counter(), time.process_time()
    asked = _HELD["queries"][queries]
    probes = search.nearest_lists(asked, _HELD["centroids"], _HELD["probes"])
    chosen = time.perf_counter() - started
    pairs = search.search_lists(asked, _HELD["pool"], cluster=_HELD["cluster"], probes=probes, k=_HELD["k"])
    return nearest_places(pairs, _HELD["k"], len(asked)), chosen, time.process_time() - cpu


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on the made pool, in turns."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((NUM_CENTRES, LATENT)).astype(np.float32)
    shares = rng.pareto(1.2, NUM_CENTRES) + 0.05
    shares /= shares.sum()
    pool = made_vectors(options.pool, rng, centres, shares)
    queries = made_vectors(options.queries, rng, centres, shares)
    centroids, order, cluster, setup = lists_of(pool, options.lists, sample=40 * options.lists, iterations=5)
    pool = pool[order]
    _HELD.update(queries=queries, pool=pool, cluster=cluster, centroids=centroids, probes=options.probes, k=options.k)
    halves = [slice(0, len(queries) // 2), slice(len(queries) // 2, len(queries))]
    part = options.queries // 10
    seconds: dict[str, list[float]] = {"ours": [], "lists": [], "faiss": [], "ours_cpu": [], "faiss_cpu": []}
    recalls = []
    limits = threadpoolctl.threadpool_limits
    with multiprocessing.get_context("fork").Pool(THREADS, initializer=limits, initargs=(1,)) as workers:
        faiss.omp_set_num_threads(THREADS)  # the fit sets one
        flat = faiss.IndexFlatIP(DIM)
        flat.add(pool.astype(np.float32))
        for turn in range(options.rounds):
            started = time.perf_counter()
            places, lists, cpu = zip(*workers.map(_search, halves, chunksize=1), strict=True)
            seconds["ours"].append(time.perf_counter() - started)
            seconds["lists"].append(max(lists))
            seconds["ours_cpu"].append(sum(cpu))
            asked = slice(turn * part, (turn + 1) * part)
            block = queries[asked].astype(np.float32)
            started, cpu_before = time.perf_counter(), time.process_time()
            _, exact = flat.search(block, options.k)
            seconds["faiss"].append((time.perf_counter() - started) * options.queries / part)
            seconds["faiss_cpu"].append((time.process_time() - cpu_before) * options.queries / part)
            recalls.append(recall(np.concatenate(places)[asked], exact))
    probes = search.nearest_lists(queries[:part], centroids, options.probes)
    sizes = np.bincount(cluster, minlength=options.lists)
    return {
        "seconds": seconds,
        "recall": float(np.mean(recalls)),
        "recall_of_rounds": recalls,
        "queries_of_recall": part * options.rounds,
        "share_of_pool_scored": float(sizes[probes].sum(axis=1).mean() / len(pool)),
        "largest_list": int(sizes.max()),
        "fit_s": float(setup[0]),
        "assign_s": float(setup[1]),
    }


def recall_of_pictures(path: Path, k: int) -> None:
    """Recall of hog-thumb embeddings by clusters and probes, as a table."""
    import pandas as pd
    from PIL import Image

    pictures = (np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in pd.read_parquet(path)["image"])
    hogs, thumbs = (np.stack(half) for half in zip(*map(handmade.features, pictures), strict=True))
    arrays = handmade.fit(hogs[::10], thumbs[::10])
    vectors = np.stack([handmade.project(hog, thumb, arrays) for hog, thumb in zip(hogs, thumbs, strict=True)])
    vectors = vectors.astype(np.float16)
    order = np.random.default_rng(0).permutation(len(vectors))
    queries, pool = vectors[order[:2000]], vectors[order[2000:]]
    exact = nearest_places(search.search_all(queries, pool, k=k), k, len(queries))
    for num in (100, 300, 1000):
        centroids, by_list, cluster, _ = lists_of(pool, num, sample=len(pool), iterations=10)
        for probes in (32, 64, 128, 256, 384):
            if probes > num:
                continue
            near = search.nearest_lists(queries, centroids, probes)
            pairs = search.search_lists(queries, pool[by_list], cluster=cluster, probes=near, k=k)
            found = by_list[nearest_places(pairs, k, len(queries))]
            share = np.bincount(cluster, minlength=num)[near].sum(axis=1).mean() / len(pool)
            told = f"recall@{k} {recall(found, exact):.4f}  {share:6.1%} of the pool scored"
            print(f"{len(pool):,} pictures, {num:,} clusters, {probes} probes: {told}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--lists", type=int, default=4096)
    parser.add_argument("--probes", type=int, default=RetrieveConfig().probes)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, help="parquet with a column image")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/retrieve.json"))
    options = parser.parse_args()
    if options.pictures is not None:
        recall_of_pictures(options.pictures, options.k)
        return 0
    report = measure(options)
    median = {name: statistics.median(values) for name, values in report["seconds"].items()}
    print(f"k-means    {report['fit_s']:8.1f} s   {options.lists:,} lists, not counted")
    print(f"assignment {report['assign_s']:8.1f} s   {options.pool:,} vectors, not counted")
    told = f"{median['ours_cpu']:.1f} CPU s; {options.queries:,} queries; {median['lists']:.1f} s to choose lists"
    print(f"ours       {median['ours']:8.1f} s   {told}")
    told = f"{median['faiss_cpu']:.1f} CPU s; IndexFlatIP, a tenth of the queries a round, scaled"
    print(f"faiss      {median['faiss']:8.1f} s   {told}")
    told = f"{report['queries_of_recall']:,} queries; {report['share_of_pool_scored']:.1%} of the pool scored"
    print(f"recall@{options.k}   {report['recall']:8.4f}     {told}")
    report["inputs"] = {
        name: getattr(options, name) for name in ("pool", "queries", "lists", "probes", "k", "rounds")
    } | {"dim": DIM, "centres": NUM_CENTRES, "threads": THREADS}
    report["machine"] = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    report["versions"] = {name: version(name) for name in PACKAGES}
    ratio = median["faiss"] / median["ours"]
    report |= {"ratio": ratio, "goal": GOAL, "goal_recall": GOAL_RECALL}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    ok = ratio >= GOAL and report["recall"] >= GOAL_RECALL
    print(f"retrieve ratio {ratio:.2f} goal {GOAL} {'ok' if ok else 'short'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
