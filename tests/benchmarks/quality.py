"""What retrieval is worth: real pictures found for queries by each embedder, judged by their classes.

    make bench NAME=quality ARGS="--data tiny_imagenet_100c.parquet --checkpoint network.safetensors"

Pool: the 20,000 pictures of the split `train`, less those with the bytes of a query. Queries: pictures of the split
`val`, of 20 classes drawn by seed, and of all 100. Pictures are 64 px and given to the embedder as they are decoded; a
run of `lvd curate` would read JPEGs of at most 288 px instead, with faces blurred. Vectors are unit length, fp16.

precision@4: share of the four nearest pool pictures that have the class of the query (chance 1 %), with the standard
error over queries. Purity: share of the pool in the commonest class of its cluster (k-means, 200 clusters); beside it
the same with the classes shuffled. Cluster mode: the 400 queries of a draw are one set; share of the pictures in
clusters with more than three queries that are of the 20 classes (chance 20 %). Recall: of the search in lists against
all similarities in fp64, by default (so few lists are all looked into) and with 64 of the 200 lists. Writes a
JSON and a picture of eight queries, the first of each of the first eight classes drawn.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from learning import machine
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits

from curation.backbones import BackboneConfig, open_backbone
from curation.libraries import metadata_of
from curation.represent import handmade, kmeans
from curation.represent.embed import EmbedConfig
from curation.retrieve.retrieve import PoolRows, RetrieveConfig, best_of
from curation.retrieve.search import nearest_lists, rank_in, search_lists
from curation.weights import file_sha256
from training.data.pixels import decode
from training.export import export, read_network

GOAL_RECALL = 0.99
K = 4
NUM_CLUSTERS, ITERATIONS, MIN_QUERIES = 200, 20, 3
FEWER_PROBES = 64  # lists; by default so few clusters are all looked into
NUM_CLASSES, DRAWS = 20, (0, 1)
NUM_SHOWN = 8
RIGHT, WRONG, INK, GREY = "#0072b2", "#d55e00", "#1a1a1a", "#6b6b6b"
TILE_PX, FRAME_PX, GAP_PX, LABEL_PX, TOP_PX = 64, 3, 14, 118, 66


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures with their classes."""

    rgb: list[np.ndarray]  # uint8 [H, W, 3] each
    label: np.ndarray  # [N]
    name: np.ndarray  # of the class, [N]
    tie: np.ndarray  # uint64 [N]: the first bytes of sha256


@dataclass(frozen=True)
class Embedder:
    """One row of the table."""

    name: str
    embed: Callable[[list[np.ndarray]], np.ndarray]  # pictures to float [N, D]
    is_shown: bool = False


def read(data: str) -> tuple[Pictures, Pictures, int]:
    """Pool and queries, and how many pictures were kept out of the pool because a query has their bytes."""
    table = pd.read_parquet(data)
    queries = table[table.split == "val"]
    pool = table[table.split == "train"]
    kept = pool[~pool.sha256.isin(set(queries.sha256))]
    made = []
    for part in (kept, queries):
        tie = np.array([int(digest[:16], 16) for digest in part.sha256], np.uint64)
        rgb = [decode(bytes(image)).rgb for image in part.image]
        made.append(Pictures(rgb, part.label.to_numpy(), part.class_name.to_numpy(), tie))
    return made[0], made[1], len(pool) - len(kept)


# Embedders


def hog_thumb(pool: Pictures) -> Embedder:
    """The embedded default, fitted as the stage does: on the pool's pictures with the least sha256."""
    sample = np.argsort(pool.tie, kind="stable")[: EmbedConfig().fit_pictures]
    with threadpool_limits(1):
        pairs = [handmade.features(pool.rgb[row]) for row in sample]
        fit = handmade.fit(*(np.stack([pair[half] for pair in pairs]) for half in (0, 1)))

    def embed(pictures: list[np.ndarray]) -> np.ndarray:
        with threadpool_limits(1):
            return np.stack([handmade.project(*handmade.features(rgb), fit) for rgb in pictures])

    return Embedder(EmbedConfig().name, embed, is_shown=True)


def backbone(title: str, *, is_shown: bool = False, **values: Any) -> Embedder:
    """A model by its name in a recipe."""
    model = open_backbone(BackboneConfig(**values))

    def embed(pictures: list[np.ndarray]) -> np.ndarray:
        blocks = (pictures[start : start + 256] for start in range(0, len(pictures), 256))
        return np.concatenate([model.embed(np.stack([model.prepare(rgb) for rgb in block])) for block in blocks])

    return Embedder(f"{title}, {model.size_px} px", embed, is_shown)


def untrained(checkpoint: Path, path: Path) -> str:
    """The network of a checkpoint with the weights it might have begun with, as a checkpoint of its own."""
    held = read_network(checkpoint, with_heads=False)
    torch.manual_seed(0)
    held.network.backbone.init_weights()
    save_file(dict(held.network.backbone.state_dict()), str(path), metadata_of(checkpoint) | {"format": "pt"})
    return f"checkpoint:{path}"


def embedders(options: argparse.Namespace, pool: Pictures, folder: Path) -> Iterator[Embedder]:
    """The rows, one loaded at a time."""
    yield hog_thumb(pool)
    weights = options.timm or export(options.checkpoint, "timm", folder / "timm.safetensors")[0]
    name = f"timm:{metadata_of(weights)['architecture']}"
    yield backbone("timm, class token", name=name, weights=str(weights), is_shown=True)
    name = f"checkpoint:{options.checkpoint}"
    yield backbone("checkpoint, class token", name=name)
    whole = {"size_px": 64, "resize_px": 64, "pooling": "cls_mean"}  # the readout of the learning benchmark
    yield backbone("checkpoint, class token and mean patch", name=name, is_shown=True, **whole)
    start = untrained(options.checkpoint, folder / "untrained.safetensors")
    yield backbone("the same, untrained", name=start, **whole)


def unit(vectors: np.ndarray) -> np.ndarray:
    """As the stage stores them, and as every search reads them: float32 of fp16, unit length."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray((vectors / np.maximum(norms, 1e-12)).astype(np.float16), np.float32)


# Search


def search(
    queries: np.ndarray, pool: np.ndarray, *, centroids: np.ndarray, cluster: np.ndarray, tie: np.ndarray, probes: int
) -> np.ndarray:
    """The four nearest by the project's own search in lists, int64 [Q, 4]; -1 where the lists hold fewer."""
    order = np.argsort(cluster, kind="stable")  # pictures of a list together
    asked, lists = queries.astype(np.float16), centroids.astype(np.float16)
    looked = nearest_lists(asked, lists, probes)
    pairs = search_lists(asked, pool[order].astype(np.float16), cluster=cluster[order], probes=looked, k=K)
    at = order[pairs.pool]
    query, best = best_of(pairs.query, PoolRows(at, tie[at], cluster[at], pairs.similarity), K)
    found = np.full((len(queries), K), -1)
    found[query, rank_in(query)] = best.image_id
    return found


def recall_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the neighbours that were found, both int64 [Q, 4]."""
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, wanted, strict=True)]))


def exact(queries: np.ndarray, pool: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """The four nearest by all similarities in fp64, int64 [Q, 4]; ties as in the project."""
    found = []
    for start in range(0, len(queries), 500):
        scores = (queries[start : start + 500].astype(np.float64) @ pool.T.astype(np.float64)).astype(np.float32)
        found += [np.lexsort((tie, -row))[:K] for row in scores]
    return np.stack(found)


# Judgement


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Mean over queries and its standard error."""
    return {"mean": float(values.mean()), "error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def drawn_classes(labels: np.ndarray, seed: int) -> np.ndarray:
    """Classes of a draw, in its order."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(np.unique(labels))[:NUM_CLASSES]


def purity(cluster: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures in the commonest class of their cluster."""
    counts = pd.crosstab(cluster, labels).to_numpy()
    return float(counts.max(axis=1).sum() / counts.sum())


def in_clusters(pool: Pictures, cluster: np.ndarray, asked: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """What a set of queries with these clusters gets in cluster mode, and the share that is of its classes."""
    numbers, counts = np.unique(asked, return_counts=True)
    taken = np.isin(cluster, numbers[counts > MIN_QUERIES])
    right = np.isin(pool.label[taken], classes)
    return {"num_pictures": int(taken.sum()), "precision": float(right.mean()) if taken.any() else 0.0}


def judged(embedder: Embedder, pool: Pictures, queries: Pictures) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """A row of the table, the neighbours of all queries [Q, 4], and their precision each [Q]."""
    started = time.process_time()
    found = embedder.embed(pool.rgb)
    cpu_s = time.process_time() - started
    vectors, asked = unit(found), unit(embedder.embed(queries.rgb))
    centroids = kmeans.fit(vectors, num_clusters=NUM_CLUSTERS, iterations=ITERATIONS, seed=0)
    cluster, of_queries = kmeans.assign(vectors, centroids)[0], kmeans.assign(asked, centroids)[0]
    lists: dict[str, Any] = {"centroids": centroids, "cluster": cluster, "tie": pool.tie}
    near = search(asked, vectors, probes=RetrieveConfig().probes, **lists)
    fewer = search(asked, vectors, probes=FEWER_PROBES, **lists)
    wanted = exact(asked, vectors, pool.tie)
    hits = (pool.label[near] == queries.label[:, None]).mean(axis=1)  # [Q]
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(pool.label)
    row: dict[str, Any] = {
        "embedder": embedder.name,
        "dim": vectors.shape[1],
        "cpu_s_per_1000": 1000 * cpu_s / len(pool.rgb),
        "precision_all_classes": mean_and_error(hits),
        "purity": purity(cluster, pool.label),
        "purity_shuffled": purity(cluster, shuffled),
        "recall": recall_of(near, wanted),
        f"recall_{FEWER_PROBES}_lists": recall_of(fewer, wanted),
        "draws": [],
    }
    for seed in DRAWS:
        classes = drawn_classes(queries.label, seed)
        mine = np.isin(queries.label, classes)
        mode = in_clusters(pool, cluster, of_queries[mine], classes)
        row["draws"].append({"seed": seed, "precision": mean_and_error(hits[mine]), "cluster_mode": mode})
    return row, near, hits


def shown(row: dict[str, Any]) -> str:
    """A row as the line of a table in a page."""
    draws = [f"{100 * d['precision']['mean']:.1f} ± {100 * d['precision']['error']:.1f}" for d in row["draws"]]
    every = f"{100 * row['precision_all_classes']['mean']:.1f} ± {100 * row['precision_all_classes']['error']:.1f}"
    mode = [
        f"{100 * d['cluster_mode']['precision']:.1f} of {d['cluster_mode']['num_pictures']:,}" for d in row["draws"]
    ]
    fewer = row[f"recall_{FEWER_PROBES}_lists"]
    cells = [row["embedder"], f"{row['dim']}", *draws, every, f"{100 * row['purity']:.1f}"]
    cells += [
        f"{100 * row['purity_shuffled']:.1f}",
        *mode,
        f"{row['recall']:.4f}, {fewer:.4f}",
        f"{row['cpu_s_per_1000']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


# The picture


def draw(found: list[tuple[str, np.ndarray]], rows: list[int], pool: Pictures, queries: Pictures, path: Path) -> None:
    """Queries down, the four neighbours of each embedder across, framed by whether the class is right."""
    side = TILE_PX + 2 * FRAME_PX
    step = side + 3
    group = K * step
    width = LABEL_PX + side + len(found) * (GAP_PX + group) + GAP_PX
    sheet = Image.new("RGB", (width, TOP_PX + len(rows) * (side + 5) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(size=14), ImageFont.load_default(size=11)
    pen.text((8, 8), "Queries and their four nearest pool pictures", INK, title)
    x = 8
    for colour, text in ((RIGHT, "class of the query"), (WRONG, "another class")):
        pen.rectangle((x, 32, x + 10, 42), outline=colour, width=FRAME_PX)
        pen.text((x + 15, 31), text, GREY, small)
        x += 30 + int(pen.textlength(text, small))
    pen.text((LABEL_PX + FRAME_PX, TOP_PX - 18), "query", INK, small)
    for column, (name, _) in enumerate(found):
        left = LABEL_PX + side + GAP_PX + column * (GAP_PX + group)
        pen.text((left + 2, TOP_PX - 18), name, INK, small)

    def tile(rgb: np.ndarray, left: int, top: int, colour: str | None) -> None:
        if colour:
            pen.rectangle((left, top, left + side - 1, top + side - 1), fill=colour)
        picture = Image.fromarray(rgb).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + FRAME_PX, top + FRAME_PX))

    for line, row in enumerate(rows):
        top = TOP_PX + line * (side + 5)
        words = queries.name[row].split(",")[0].replace("_", " ").split()
        for place, word in enumerate(words[:3]):
            pen.text((8, top + 20 + 13 * place), word, INK, small)
        tile(queries.rgb[row], LABEL_PX, top, None)
        for column, (_, near) in enumerate(found):
            left = LABEL_PX + side + GAP_PX + column * (GAP_PX + group)
            for place, at in enumerate(near[row]):
                is_right = pool.label[at] == queries.label[row]
                tile(pool.rgb[at], left + place * step, top, RIGHT if is_right else WRONG)
    sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="network.safetensors of a learning run")
    parser.add_argument(
        "--timm", type=Path, help="its weights as lvd export --to timm wrote them; default: written here"
    )
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/quality.json"), help="and .png beside it")
    options = parser.parse_args()
    pool, queries, num_kept_out = read(options.data)
    print(f"pool {len(pool.rgb):,} pictures ({num_kept_out} kept out), {len(queries.rgb):,} queries", flush=True)
    rows, pictures, hits = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for embedder in embedders(options, pool, Path(folder)):
            row, near, hits[embedder.name] = judged(embedder, pool, queries)
            rows.append(row)
            pictures += [(embedder.name, near)] if embedder.is_shown else []
            print(shown(row), flush=True)
    first = hits[rows[0]["embedder"]]
    for row in rows[1:]:
        row["above_first"] = mean_and_error(hits[row["embedder"]] - first)
        gain, error = (100 * row["above_first"][part] for part in ("mean", "error"))
        print(f"{row['embedder']}: {gain:+.1f} ± {error:.1f} points of precision@4 against {rows[0]['embedder']}")
    classes = drawn_classes(queries.label, DRAWS[0])[:NUM_SHOWN]
    draw(
        pictures,
        [int(np.flatnonzero(queries.label == c)[0]) for c in classes],
        pool,
        queries,
        options.json.with_suffix(".png"),
    )
    about = {"num_pool": len(pool.rgb), "num_kept_out": num_kept_out, "num_queries": len(queries.rgb)}
    about |= {"checkpoint_sha256": file_sha256(options.checkpoint, key="checkpoint"), "num_clusters": NUM_CLUSTERS}
    options.json.write_text(json.dumps(machine() | about | {"rows": rows}, indent=1) + "\n")
    recall = min(row["recall"] for row in rows)
    print(f"quality ratio {recall / GOAL_RECALL:.3f} goal 1.0 {'ok' if recall >= GOAL_RECALL else 'short'}")
    return 0 if recall >= GOAL_RECALL else 1


if __name__ == "__main__":
    sys.exit(main())
