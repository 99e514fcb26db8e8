"""Which copies each method finds: hashes, descriptors and the cascade of the pipeline, among 44,000 other pictures.

    make bench NAME=copies ARGS="--data DIR --peer PYTHON"
    make bench NAME=copies ARGS="--data DIR --descriptor timm:NAME --weights FILE"

DIR holds the picture sets, PYTHON runs imagededup in an environment of its own; without it these rows are left out.

Asked: twelve seeded edits of 200 photographs (tests/copy_edits.py), 2,400 pictures, and the labelled copies of
``copies_pdq_imagededup.tar``. Searched: all distinct pictures, that is 300 photographs, 44,000 pictures of Tiny-
ImageNet and CIFAR-10, and some more photographs. A pair of an edit and its photograph is true; the pair of a pasted
photograph and its background is left out, and so are the pairs of a photograph with the six pictures of Tiny-ImageNet
that show the same photograph (``SAME``, seen by eye); every other pair is false. Each method has the threshold with
the most recall at a precision of .99 over all pairs of edits and distinct pictures; the cascade has that of the
pipeline, and its candidates are exact: the lists of a run miss a few that are far. imagededup has its own rule, 10
bits, too, whatever the precision. Pairs among the distinct pictures are told apart, since CIFAR-10 has copies of its
own, and so are pairs of edits of different photographs. ``--descriptor`` measures another one: its row holds the
threshold that a recipe may set.

The cascade is what a run with ``edges.verify=sift`` does: pictures within ``near.radius_bits`` of the pHash, and of the
``edges.verify_nearest`` nearest by the descriptor those that local features agree on.

Milliseconds are of CPU on one thread, a picture; imagededup's with decoding, the others without. Prints a table, writes
a JSON, and ends with one line for the descriptor and one for the cascade: worst ratio of recall to what is asked for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from copies_data import Picture, Seen, fit_of, pictures_of, seen_by_all, untrained

from curation.dedup.copydescriptor import WEIGHT_FREE, DescriptorConfig
from curation.dedup.edges import EdgesConfig
from curation.dedup.geometric import places_in_common
from curation.dedup.hashes import pdq_words
from curation.dedup.join import Members, nearest_in_list
from curation.dedup.near import NearConfig

PRECISION = 0.99
PEER_RADIUS_BITS = 10  # imagededup's own rule
PACKAGES = ("numpy", "opencv-python-headless", "imagehash", "pdqhash", "timm")
SAME = {(61, 18927), (113, 693), (77, 11036), (252, 6643), (226, 16992), (290, 17964)}  # groups of Picture
GOALS_DESCRIPTOR = {"all": 0.87}
GOALS_CASCADE = {
    "all": 0.94,
    **dict.fromkeys(("jpeg q20", "half size", "grey", "flip"), 0.99),
    **dict.fromkeys(("caption", "colour", "disc", "rotate 12", "crop .84"), 0.98),
    "blur": 0.97,
    "crop .67": 0.95,
    "pasted": 0.30,
}
BLOCK = 200  # queries scored at once


class Task(NamedTuple):
    """Who is asked, who is searched, and which pairs are true or left out."""

    queries: np.ndarray  # int64 [Q], places of the edits among the pictures
    labelled: np.ndarray  # int64 [L], of labelled copies
    references: np.ndarray  # int64 [R], of distinct pictures
    own: np.ndarray  # int64 [Q + L], row in `references` of each one's original
    left_out: np.ndarray  # int64 [P, 2], query and row in `references`
    edits: np.ndarray  # str [Q]


def task_of(pictures: list[Picture]) -> Task:
    """The question."""
    edits = np.array([picture.edit for picture in pictures])
    references = np.flatnonzero(edits == "")
    labelled = np.flatnonzero(edits == "labelled")
    queries = np.flatnonzero((edits != "") & (edits != "labelled"))
    row = {pictures[at].group: n for n, at in enumerate(references)}
    asked = [*queries, *labelled]
    own = np.array([row[pictures[at].group] for at in asked])
    same: dict[int, list[int]] = {}
    for photo, other in SAME:
        same.setdefault(photo, []).append(other)
    left_out = []
    for n, at in enumerate(queries):
        picture = pictures[at]
        groups = [picture.group] if picture.background < 0 else [picture.group, picture.background]
        left_out += [(n, row[other]) for group in groups for other in same.get(group, [])]
        left_out += [(n, row[picture.background])] if picture.background >= 0 else []
    return Task(queries, labelled, references, own, np.array(left_out), edits[queries])


class Found(NamedTuple):
    """Scores of one method; the higher the more alike."""

    true: np.ndarray  # float32 [Q + L], of each query and its original
    false: np.ndarray  # float32 [F], of false pairs that may count, falling


def scored(task: Task, score: Callable[[np.ndarray, np.ndarray], np.ndarray], num_false: int = 4000) -> Found:
    """Scores of the true pairs, and the highest of the false ones.

    Args:
        task: the question.
        score: places of N pictures and of M, to float32 [N, M].
        num_false: false pairs to keep; many more than precision allows.
    """
    asked = np.concatenate([task.queries, task.labelled])
    true, false = np.empty(len(asked), np.float32), np.empty(0, np.float32)
    for first in range(0, len(asked), BLOCK):
        last = min(first + BLOCK, len(asked))
        scores = score(asked[first:last], task.references)
        rows = np.arange(last - first)
        true[first:last] = scores[rows, task.own[first:last]]
        scores[rows, task.own[first:last]] = -np.inf
        out = task.left_out[(task.left_out[:, 0] >= first) & (task.left_out[:, 0] < last)]
        scores[out[:, 0] - first, out[:, 1]] = -np.inf
        flat = scores.ravel()
        most = np.partition(flat, len(flat) - num_false)[-num_false:]
        false = np.sort(np.concatenate([false, most]))[::-1][:num_false]
    return Found(true, false)


def threshold_of(found: Found) -> float:
    """The lowest score of a true pair at and above which the precision is at least .99."""
    for value in np.unique(found.true):
        true = int((found.true >= value).sum())
        if true >= PRECISION * (true + int((found.false >= value).sum())):
            return float(value)
    return float("inf")


def row_of(task: Task, found: Found, threshold: float, cost_ms: float) -> dict[str, Any]:
    """One row of the table."""
    hit = found.true >= threshold
    num = len(task.queries)
    by_edit = {str(name): float(hit[:num][task.edits == name].mean()) for name in dict.fromkeys(task.edits)}
    num_false = int((found.false >= threshold).sum())
    return {
        "all": float(hit[:num].mean()),
        **by_edit,
        "labelled": float(hit[num:].mean()),
        "threshold": threshold,
        "false_pairs": num_false,
        "precision": float(hit.sum() / max(1, hit.sum() + num_false)),
        "ms": cost_ms,
    }


# --- methods --------------------------------------------------------------------------------------------------------


def by_bits(words: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Minus the bits that differ; ``words`` uint64 [N] or [N, 4]."""

    def score(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        columns = words.reshape(len(words), -1).T
        differ = [np.bitwise_count(column[left][:, None] ^ column[right][None]) for column in columns]
        return -np.sum(differ, axis=0, dtype=np.float32)

    return score


def by_cosine(vectors: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Cosine of unit vectors, float16 [N, D]."""
    wide = vectors.astype(np.float32)
    return lambda left, right: np.asarray(wide[left] @ wide[right].T)


_SEEN: list[Seen] = []


def _compare(pairs: np.ndarray) -> tuple[list[int], float]:
    import cv2
    from threadpoolctl import threadpool_limits

    cv2.setNumThreads(1)
    with threadpool_limits(1):
        started = time.thread_time()
        places = [places_in_common(_SEEN[a].keypoints, _SEEN[b].keypoints) for a, b in pairs.tolist()]
        return places, time.thread_time() - started


def places_of(seen: list[Seen], pairs: np.ndarray, processes: int) -> tuple[np.ndarray, float]:
    """Places in common of pairs int64 [P, 2], and CPU seconds a pair."""
    _SEEN[:] = seen
    chunks = [pairs[at : at + 512] for at in range(0, len(pairs), 512)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        parts = pool.map(_compare, chunks, 1)
    return np.array([one for places, _ in parts for one in places]), sum(s for _, s in parts) / max(1, len(pairs))


def nearest_of(task: Task, vectors: np.ndarray, config: EdgesConfig) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of each query and labelled copy.

    Returns:
        Row of the asked and row of the references, int64 [P, 2]; cosine, float32 [P].
    """
    asked = np.concatenate([task.queries, task.labelled])

    def members(at: np.ndarray) -> Members:
        home = np.zeros(len(at), np.int32)
        return Members(at, vectors[at].astype(np.float32), home, home[:, None])

    left, right = members(asked), members(task.references)
    near = nearest_in_list(left, right, 0, floor=config.verify_floor, num_nearest=config.verify_nearest)
    return np.stack([near.home, near.other], 1), near.similarity


# --- the peer -------------------------------------------------------------------------------------------------------


def by_imagededup(python: Path, pictures: list[Picture]) -> tuple[dict[str, np.ndarray], dict[str, float], str]:
    """Hashes of imagededup by method, uint64 [N], milliseconds a picture with decoding, and its version."""
    with tempfile.TemporaryDirectory() as folder:
        for at, picture in enumerate(pictures):
            (Path(folder) / f"{at:06d}.jpg").write_bytes(picture.data)
        script = Path(__file__).parent / "peer_imagededup.py"
        told = subprocess.run([python, script, folder], check=True, capture_output=True, text=True)
    found = json.loads(told.stdout.splitlines()[-1])
    hashes = {name: np.array([int(one, 16) for one in rows], np.uint64) for name, rows in found["hashes"].items()}
    return hashes, found["ms"], found["version"]


# --- report ---------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows."""
    pictures = pictures_of(options.data)
    task = task_of(pictures)
    descriptor, edges, near = DescriptorConfig(), EdgesConfig(verify="sift"), NearConfig()
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        other = untrained(cache / "untrained.pt")
        if options.descriptor is not None:
            given = {"duplicate_threshold": 0.5, "leakage_threshold": 0.5}  # what is wanted is a threshold
            other = DescriptorConfig(name=options.descriptor, weights=options.weights, **given)
        seen = seen_by_all(pictures, fit_of(options.data, descriptor.fit_pictures), other, cache, options.processes)
    ms = {name: 1e3 * float(np.mean([one.seconds[name] for one in seen])) for name in seen[0].seconds}
    vectors = np.stack([one.vector for one in seen])
    codes = np.array([one.phash for one in seen], np.uint64)
    methods = {
        "pHash": (by_bits(codes), ms["luma"] + ms["pHash"]),
        "dHash": (by_bits(np.array([one.dhash for one in seen], np.uint64)), ms["luma"] + ms["dHash"]),
        "PDQ": (by_bits(pdq_words([one.pdq for one in seen])), ms["PDQ"]),
        options.descriptor or f"{other.name}, untrained": (
            by_cosine(np.stack([one.other for one in seen])),
            ms["other"],
        ),
        WEIGHT_FREE: (by_cosine(vectors), ms["keypoints"] + ms["VLAD + DCT"]),
    }
    peer = None
    if options.peer is not None:
        hashes, peer_ms, peer = by_imagededup(options.peer, pictures)
        methods |= {f"imagededup {name}": (by_bits(words), peer_ms[name]) for name, words in hashes.items()}
    rows = {}
    scores = {}
    for name, (score, cost) in methods.items():
        scores[name] = scored(task, score)
        rows[name] = row_of(task, scores[name], threshold_of(scores[name]), cost)
        print(line_of(name, rows[name]), flush=True)
        own_rule = {WEIGHT_FREE: descriptor.thresholds().duplicate}.get(name, -PEER_RADIUS_BITS)
        if name == WEIGHT_FREE or name.startswith("imagededup"):
            ruled = f"{name}, own threshold"
            rows[ruled] = row_of(task, scores[name], own_rule, cost)
            print(line_of(ruled, rows[ruled]), flush=True)
    rows["cascade"], check = cascade(task, pictures, seen, scores, vectors, edges, near.radius_bits, options.processes)
    rows["cascade"]["ms"] += sum(rows[name]["ms"] for name in ("pHash", WEIGHT_FREE))
    print(line_of("cascade", rows["cascade"]), flush=True)
    check |= among_references(task, seen, vectors, descriptor.thresholds().duplicate, edges, options.processes)
    return {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES} | ({"imagededup": peer} if peer else {}),
        "pictures": {"asked": len(task.queries), "labelled": len(task.labelled), "searched": len(task.references)},
        "rows": rows,
        "check": check,
    }


def between_edits(
    task: Task, pictures: list[Picture], seen: list[Seen], vectors: np.ndarray, edges: EdgesConfig, processes: int
) -> tuple[int, int]:
    """Pairs of edits of different photographs, which may bear one caption: how many are checked, and how many pass."""
    groups = np.array([pictures[at].group for at in task.queries])
    backgrounds = np.array([pictures[at].background for at in task.queries])
    among = task._replace(labelled=task.queries[:0], references=task.queries)
    pairs, _ = nearest_of(among, vectors, edges)
    i, j = pairs.T
    apart = (i < j) & (groups[i] != groups[j]) & (groups[i] != backgrounds[j]) & (backgrounds[i] != groups[j])
    apart &= (backgrounds[i] != backgrounds[j]) | (backgrounds[i] < 0)
    places, _ = places_of(seen, task.queries[pairs[apart]], processes)
    return len(places), int((places >= edges.min_places).sum())


def cascade(
    task: Task,
    pictures: list[Picture],
    seen: list[Seen],
    scores: dict[str, Found],
    vectors: np.ndarray,
    edges: EdgesConfig,
    radius_bits: int,
    processes: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of the cascade, and what its check sees and costs."""
    pairs, similarity = nearest_of(task, vectors, edges)
    asked = np.concatenate([task.queries, task.labelled])
    places, seconds = places_of(seen, np.stack([asked[pairs[:, 0]], task.references[pairs[:, 1]]], 1), processes)
    few = np.array([len(one.keypoints.places) < edges.min_places for one in seen])
    cannot_tell = few[asked[pairs[:, 0]]] | few[task.references[pairs[:, 1]]]
    threshold = DescriptorConfig().thresholds().duplicate
    copy = np.where(cannot_tell, similarity >= threshold, places >= edges.min_places)
    is_own = task.own[pairs[:, 0]] == pairs[:, 1]
    key = task.left_out[:, 0] * len(task.references) + task.left_out[:, 1]
    counts = ~is_own & ~np.isin(pairs[:, 0] * len(task.references) + pairs[:, 1], key)
    true = np.zeros(len(asked), np.float32)
    true[pairs[copy & is_own, 0]] = 1
    true[scores["pHash"].true >= -radius_bits] = 1
    by_hash = int((scores["pHash"].false >= -radius_bits).sum())
    false = np.ones(int((copy & counts).sum()) + by_hash, np.float32)
    a_picture = len(pairs) / len(asked)
    row = row_of(task, Found(true, false), 1.0, 1e3 * seconds * a_picture)
    crossed, shared = between_edits(task, pictures, seen, vectors, edges, processes)
    check = {
        "nearest": edges.verify_nearest,
        "min_places": edges.min_places,
        "ms_a_pair": 1e3 * seconds,
        "pairs_a_picture": a_picture,
        "false_pairs_checked": int(counts.sum()),
        "false_pairs_passed": int((copy & counts).sum()),
        "pairs_of_edits_checked": crossed,
        "pairs_of_edits_passed": shared,
        "false_pairs_by_hash": by_hash,
        "true_pairs_above_threshold_refuted": int((is_own & (similarity >= threshold) & ~copy).sum()),
    }
    return row, check


def among_references(
    task: Task, seen: list[Seen], vectors: np.ndarray, threshold: float, edges: EdgesConfig, processes: int
) -> dict[str, Any]:
    """Pairs among the distinct pictures at and above a threshold, and how many of them local features agree on."""
    wide = vectors[task.references].astype(np.float32)
    found = []
    for start in range(0, len(wide), 2000):
        i, j = np.nonzero(wide[start : start + 2000] @ wide.T >= threshold)
        i += start
        found.append(np.stack([i, j], 1)[i < j])
    pairs = task.references[np.concatenate(found)]
    places, _ = places_of(seen, pairs, processes)
    num = len(wide) * (len(wide) - 1) // 2
    return {
        "pairs_among_distinct": num,
        "of_these_at_the_threshold": len(pairs),
        "of_these_verified": int((places >= edges.min_places).sum()),
        "pictures_in_a_refused_pair": len(np.unique(pairs[places < edges.min_places])),
        "threshold_false_a_picture_of_a_million": 1e6 * int((places < edges.min_places).sum()) / num,
    }


def line_of(name: str, row: dict[str, Any]) -> str:
    """A row for people."""
    cells = " ".join(f"{key} {row[key]:.3f}" for key in GOALS_CASCADE)
    tail = f"labelled {row['labelled']:.2f} threshold {row['threshold']:.3f} false {row['false_pairs']}"
    return f"{name}: {cells} {tail} {row['ms']:.2f} ms"


def main() -> int:
    """Measure, print, write; 0 where both goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the picture sets")
    parser.add_argument("--peer", type=Path, help="python of an environment with imagededup")
    parser.add_argument("--descriptor", help="another descriptor than an untrained network: timm:NAME, sscd:PATH, ...")
    parser.add_argument("--weights", help="its weights, where its name holds no path")
    parser.add_argument("--cache", type=Path, help="folder for what was seen, for a second look")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/copies.json"))
    options = parser.parse_args()
    report = measure(options)
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    rows, check = report["rows"], report["check"]
    print(
        f"check: {check['pairs_a_picture']:.0f} pairs a picture at {check['ms_a_pair']:.2f} ms; "
        f"{check['false_pairs_passed']} of {check['false_pairs_checked']:,} false pairs passed, and "
        f"{check['pairs_of_edits_passed']} of {check['pairs_of_edits_checked']:,} of edits of different photographs; "
        f"of {check['of_these_at_the_threshold']:,} pairs of distinct pictures at the threshold "
        f"{check['of_these_verified']:,} are verified; the others would be "
        f"{check['threshold_false_a_picture_of_a_million']:.1f} a picture of a pool of a million"
    )
    peers = [row for name, row in rows.items() if name.startswith("imagededup")]
    if peers:
        lead = min(rows["cascade"][key] - max(row[key] for row in peers) for key in GOALS_CASCADE)
        best = max(row["all"] for row in peers)
        print(f"imagededup: best {best:.3f}; the cascade's least lead over the best of its rows, by edit: {lead:.3f}")
    reached = []
    for name, label, goals in ((WEIGHT_FREE, "descriptor", GOALS_DESCRIPTOR), ("cascade", "cascade", GOALS_CASCADE)):
        ratio = min(rows[name][key] / goal for key, goal in goals.items())
        reached.append(ratio >= 1)
        print(f"copies {label} ratio {ratio:.3f} goal 1.0 {'ok' if ratio >= 1 else 'short'}")
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
