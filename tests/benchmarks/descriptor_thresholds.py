"""Which cosine tells copies from other pictures: precision and recall of a copy descriptor at each threshold.

    python tests/benchmarks/descriptor_thresholds.py --data DIR [--descriptor NAME] [--weights FILE]

Judged: photographs of ``pool_imagenet_300.tar``, seeded edits of them, and distractors from ``pool_coco_48.tar``,
``pool_caltech_background_80.tar`` and ``tiny_imagenet_100c.parquet``; then the labelled groups of
``copies_pdq_imagededup.tar``. The fit sees other pictures only. Each picture is cut to the 288-px version that the
pipeline stores. A threshold is good at precision >= .99 over all pairs with less than .5 % of the distinct pictures in
a false pair; the last line names the lowest such one.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter, UnidentifiedImageError

from curation.dedup.copydescriptor import WEIGHT_FREE, DescriptorConfig, open_descriptor
from curation.dedup.siftvlad import fit_sift_vlad

Picture = Image.Image


def tar_pictures(path: Path) -> list[tuple[dict[str, str], Picture]]:
    """Rows of the manifest and their pictures; what Pillow cannot read is left out."""
    found = []
    with tarfile.open(path) as tar:
        manifest = tar.extractfile("manifest.csv")
        assert manifest is not None
        for row in csv.DictReader(io.TextIOWrapper(manifest)):
            member = tar.extractfile(row["file"])
            assert member is not None
            try:
                found.append((row, Image.open(io.BytesIO(member.read())).convert("RGB")))
            except UnidentifiedImageError:
                continue
    return found


def tiny_pictures(path: Path, count: int, skip: int) -> list[Picture]:
    """``count`` distinct pictures, evenly over the classes."""
    images = pq.read_table(path, columns=["image"])["image"]
    chosen = random.Random(0).sample(range(len(images)), count + skip)[skip:]
    return [Image.open(io.BytesIO(images[i].as_py())).convert("RGB") for i in chosen]


def jpeg(picture: Picture, quality: int = 88) -> Picture:
    """Through a JPEG file."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue())).convert("RGB")


def cropped(picture: Picture, side: float, draw: random.Random) -> Picture:
    """A window of ``side`` of both sides, at a random place."""
    width, height = picture.size
    w, h = round(width * side), round(height * side)
    x, y = draw.randint(0, width - w), draw.randint(0, height - h)
    return picture.crop((x, y, x + w, y + h))


def captioned(picture: Picture, draw: random.Random) -> Picture:
    """A bar of 18 % of the height with text, painted over the top or the bottom."""
    out = picture.copy()
    width, height = out.size
    bar = round(height * 0.18)
    y = 0 if draw.random() < 0.5 else height - bar
    pen = ImageDraw.Draw(out)
    pen.rectangle((0, y, width, y + bar), fill=draw.choice(["white", "black"]))
    pen.text((8, y + bar * 0.3), "breaking news today", fill="grey", font_size=max(10, bar // 2))
    return out


def edits(picture: Picture, draw: random.Random) -> dict[str, Picture]:
    """Seeded edits, each saved as a JPEG."""
    width, height = picture.size
    return {
        "jpeg q20": jpeg(picture, 20),
        "half size": jpeg(picture.resize((width // 2, height // 2), Image.Resampling.LANCZOS)),
        "crop .90 side": jpeg(cropped(picture, 0.90, draw)),
        "crop .84 side": jpeg(cropped(picture, 0.84, draw)),
        "crop .80 side": jpeg(cropped(picture, 0.80, draw)),
        "crop .70 side": jpeg(cropped(picture, 0.70, draw)),
        "caption bar": jpeg(captioned(picture, draw)),
        "grey": jpeg(picture.convert("L").convert("RGB")),
        "blur 2": jpeg(picture.filter(ImageFilter.GaussianBlur(2))),
    }


def small(picture: Picture) -> np.ndarray:
    """The 288-px version: shortest side at most 288, through a JPEG."""
    scale = min(1.0, 288 / min(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return np.asarray(jpeg(picture.resize(size, Image.Resampling.BICUBIC), 90))


def report(vectors: np.ndarray, group: np.ndarray, edit: np.ndarray, distinct: np.ndarray) -> float | None:
    """Print a line a threshold; the lowest good one.

    Args:
        vectors: float32 [N, 512].
        group: pictures of one group are copies of each other, int [N].
        edit: name of the edit, empty for an original.
        distinct: the unedited pictures, bool [N].
    """
    scores = vectors @ vectors.T
    upper = np.triu(np.ones(scores.shape, bool), 1)
    same = group[:, None] == group[None]
    false = np.where(same, -1, scores)
    nearest_false = false[np.ix_(distinct, distinct)].max(1)
    names = [name for name in dict.fromkeys(edit.tolist()) if name]
    original = {g: i for i, g in enumerate(group) if not edit[i]}
    to_original = np.array([scores[i, original[g]] if edit[i] else 1.0 for i, g in enumerate(group)])
    best = None
    for threshold in np.arange(0.20, 0.601, 0.01):
        hit = (scores >= threshold) & upper
        precision = float((hit & same).sum() / max(1, hit.sum()))
        wrong = float((nearest_false >= threshold).mean())
        recall = " ".join(f"{name} {(to_original[edit == name] >= threshold).mean():.3f}" for name in names)
        num_false = int((hit & ~same).sum())
        print(f"{threshold:.3f} precision {precision:.4f} false pairs {num_false} distinct hit {wrong:.4%} | {recall}")
        if best is None and precision >= 0.99 and wrong < 0.005:
            best = float(threshold)
    return best


def main() -> None:
    """Read, describe, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the picture sets")
    parser.add_argument("--descriptor", default=WEIGHT_FREE)
    parser.add_argument("--weights")
    parser.add_argument("--photos", type=int, default=200, help="photographs that are edited")
    parser.add_argument("--distractors", type=int, default=1100)
    args = parser.parse_args()

    # Thresholds of any value: this command is what chooses them.
    config = DescriptorConfig(
        name=args.descriptor, weights=args.weights, duplicate_threshold=0.5, leakage_threshold=0.5
    )
    fit: dict[str, np.ndarray] = {}
    if config.kind == WEIGHT_FREE:
        started = time.process_time()
        others = [
            p
            for name in ("curated_caltech101_6perclass", "curated_flowers5_17perclass")
            for _, p in tar_pictures(args.data / f"{name}.tar")
        ]
        others += tiny_pictures(
            args.data / "tiny_imagenet_100c.parquet", config.fit_pictures - len(others), skip=args.distractors
        )
        fit = fit_sift_vlad((small(picture) for picture in others), seed=0)
        print(
            f"fit on {len(others)} pictures: {time.process_time() - started:.1f} CPU s",
            {k: v.shape for k, v in fit.items()},
        )
    descriptor = open_descriptor(config, fit)

    draw = random.Random(7)
    photos = [p for _, p in tar_pictures(args.data / "pool_imagenet_300.tar")]
    draw.shuffle(photos)
    rows: list[tuple[int, str, Picture]] = []
    for group, picture in enumerate(photos):
        rows.append((group, "", picture))
        if group < args.photos:
            rows += [(group, name, copy) for name, copy in edits(picture, draw).items()]
    others = [
        p for name in ("pool_coco_48", "pool_caltech_background_80") for _, p in tar_pictures(args.data / f"{name}.tar")
    ]
    others += tiny_pictures(args.data / "tiny_imagenet_100c.parquet", args.distractors, skip=0)
    rows += [(len(photos) + i, "", picture) for i, picture in enumerate(others)]

    started = time.process_time()
    vectors = np.stack([descriptor.vector(small(picture)) for _, _, picture in rows])
    vectors = vectors.astype(np.float16).astype(np.float32)
    cost_ms = (time.process_time() - started) / len(rows) * 1e3
    print(f"{len(rows)} pictures, {len(photos) + len(others)} distinct, {cost_ms:.1f} CPU ms each")
    edit = np.array([row[1] for row in rows])
    chosen = report(vectors, np.array([row[0] for row in rows]), edit, edit == "")

    print("labelled groups of copies_pdq_imagededup.tar")
    labelled = tar_pictures(args.data / "copies_pdq_imagededup.tar")
    vectors = np.stack([descriptor.vector(small(picture)) for _, picture in labelled])
    originals = {row["group"]: i for i, (row, _) in enumerate(labelled) if row["role"] == "original"}
    for i, (row, _) in enumerate(labelled):
        if row["role"] == "copy" and row["group"] in originals:
            print(f"  {vectors[i] @ vectors[originals[row['group']]]:.3f} {row['group']} {row['edit']}")
    strange = np.array([[a["group"] != b["group"] for b, _ in labelled] for a, _ in labelled])
    print(f"  highest between groups: {np.where(strange, vectors @ vectors.T, -1).max():.3f}")
    lowest = "none" if chosen is None else f"{chosen:.2f}"
    print(f"{config.kind}: lowest threshold with precision >= .99 and < .5 % of distinct pictures hit: {lowest}")


if __name__ == "__main__":
    main()
