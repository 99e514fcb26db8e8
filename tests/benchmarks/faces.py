"""Faces: how many are blurred, what is blurred besides, what a second look finds, and what the rest of a picture loses.

    make bench NAME=faces ARGS="--data FOLDER"

FOLDER holds faces_boxes.tar, the three pool_*.tar and weights/yunet_n_dynamic.onnx.

- recall: of the labelled faces of at least 16 px, those covered at least half by the dilated boxes (1.5).
- harm: share of pixels in such boxes, mean of the photos, and share of photos with one, over the pool photos that show
  neither people nor likenesses of people (pool_people.csv, judged by eye). `strict` counts photos of likenesses (drawn,
  carved, cast) as harmless too. Recall and harm of a line belong to one setting.
- halves: thresholds chosen on one half of the photos and judged on the other, both ways, so that nothing is judged on
  what it was chosen on.
- found again: the detectors of a setting look at what they have blurred, as it is stored, at the same thresholds. A
  blurred box is found again by a box whose middle is in it and whose area is a quarter of its own to four times it.
- PSNR: of the pixels outside the boxes, over the photos with a box, after encoding as the stage does.

- enlarged: the same photos, cubic, so many times as large, every third one of the pools: recall and harm.

CPU ms is process time a photo, one thread, decoding not included, mean of all photos that were looked at. Prints a
table, writes a JSON, and ends with a line for each goal.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from curation.safety.detector import Box, NudeNetDetector
from curation.safety.faces import (
    NUDENET_THRESHOLDS,
    YUNET_THRESHOLDS,
    FaceDetector,
    NudeNetFaces,
    Thresholds,
    YuNet,
    blur_faces,
    dilate,
    encode_blurred,
    merged,
    passes,
    psnr_db,
)
from curation.safety.look import LookConfig
from training.data.pixels import decode, encode_jpeg

POOLS = ("pool_imagenet_300.tar", "pool_coco_48.tar", "pool_caltech_background_80.tar")
LEAST_PX, COVERED, DILATION = 16, 0.5, 1.5
TIMES, ONE_OF_POOL = (2, 4), 3  # enlarged so many times; one photo of so many
LOWEST: Thresholds = (0.1, 0.1, 0.1, 0.1)
STEPS = {
    "yunet": [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9],
    "nudenet": [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6],
}
MOST_PIXELS, MOST_PHOTOS = 0.01, 0.08  # of harm, where thresholds are chosen
PACKAGES = ("numpy", "opencv-python-headless", "onnxruntime", "nudenet", "simplejpeg")


@dataclass
class Photo:
    """One photo: what is on it, and the boxes of each detector at the lowest thresholds."""

    name: str
    kind: str  # faces | person | likeness | nobody
    rgb: np.ndarray
    faces: list[list[float]]  # labelled ones that are large enough: x, y, width, height
    boxes: dict[str, list[Box]] = field(default_factory=dict)


Rule = Callable[[Photo], list[Box]]


def photos_of(folder: Path) -> list[Photo]:
    """All photos of faces_boxes.tar and of the pools."""
    with (Path(__file__).parent / "pool_people.csv").open() as lines:
        kinds = {row["file"]: row["kind"] for row in csv.DictReader(line for line in lines if line[0] != "#")}
    photos = []
    for name in ("faces_boxes.tar", *POOLS):
        with tarfile.open(folder / name) as tar:
            manifest = tar.extractfile("manifest.csv").read().decode().splitlines()
            for row in csv.DictReader(manifest):
                rgb = decode(tar.extractfile(row["file"]).read()).rgb
                is_pool = name in POOLS
                kind = kinds.get(row["file"], "nobody") if is_pool else "faces"
                labelled = [] if is_pool else json.loads(row["boxes_xywh_json"])
                photos.append(Photo(row["file"], kind, rgb, [box for box in labelled if min(box[2:]) >= LEAST_PX]))
    return photos


def covered(photo: Photo, boxes: Sequence[Box]) -> np.ndarray:
    """Pixels of dilated boxes, bool [H, W]."""
    height, width = photo.rgb.shape[:2]
    mask = np.zeros((height, width), bool)
    for found in boxes:
        box = dilate(found, DILATION, width_px=width, height_px=height)
        top, left = int(np.floor(box.y_px)), int(np.floor(box.x_px))
        mask[top : int(np.ceil(box.y_px + box.h_px)), left : int(np.ceil(box.x_px + box.w_px))] = True
    return mask


def judge(photos: Sequence[Photo], rule: Rule) -> dict[str, Any]:
    """Recall and harm of a rule."""
    hits: list[bool] = []
    heads: list[bool] = []
    harm: dict[str, list[float]] = {"nobody": [], "likeness": []}
    with_box: dict[str, list[bool]] = {"nobody": [], "likeness": []}
    for photo in photos:
        if photo.kind == "person":
            continue
        boxes = merged(rule(photo))  # as look does: a box that was joined to another covers nothing
        mask = covered(photo, boxes)
        if photo.kind != "faces":
            harm[photo.kind].append(float(mask.mean()))
            with_box[photo.kind].append(bool(boxes))
            continue
        for x, y, w, h in photo.faces:
            part = mask[max(0, round(y)) : round(y + h), max(0, round(x)) : round(x + w)]
            hits.append(part.size > 0 and float(part.mean()) >= COVERED)
            if photo.name.startswith("caltech"):
                heads.append(hits[-1])
    return {
        "faces": len(hits),
        "found": sum(hits),
        "recall": float(np.mean(hits)),
        "head_recall": float(np.mean(heads)),
        "photos": len(with_box["nobody"]),
        "photos_with_a_box": sum(with_box["nobody"]),
        "photo_harm": float(np.mean(with_box["nobody"])),
        "pixel_harm": float(np.mean(harm["nobody"])),
        "strict_photo_harm": float(np.mean(with_box["nobody"] + with_box["likeness"])),
        "strict_pixel_harm": float(np.mean(harm["nobody"] + harm["likeness"])),
    }


def rule_of(*parts: tuple[str, Thresholds]) -> Rule:
    """Boxes of some detectors, each at thresholds of its own."""
    return lambda photo: [box for name, limits in parts for box in photo.boxes[name] if passes(box, limits)]


def chosen(photos: Sequence[Photo], name: str, start: Thresholds) -> Thresholds:
    """Thresholds with the most recall at the allowed harm, one changed at a time until none gives more."""

    def worth(limits: Thresholds) -> tuple[float, float]:
        found = judge(photos, rule_of((name, limits)))
        over = max(0.0, found["pixel_harm"] - MOST_PIXELS) + max(0.0, found["photo_harm"] - MOST_PHOTOS)
        return (found["recall"] if over == 0 else -over, -found["photo_harm"])

    best, limits = worth(start), start
    while True:
        before = limits
        for place in range(len(start)):
            for step in STEPS[name]:
                tried = (*limits[:place], step, *limits[place + 1 :])
                if (value := worth(tried)) > best:
                    best, limits = value, tried
        if limits == before:
            return limits


def halves(photos: Sequence[Photo], name: str, start: Thresholds) -> dict[str, Any]:
    """Choose on one half, judge on the other, both ways."""
    parts = [photos[0::2], photos[1::2]]
    limits = [chosen(part, name, start) for part in parts]
    judged = [judge(parts[1 - half], rule_of((name, limits[half]))) for half in (0, 1)]
    faces, harmless = (sum(one[key] for one in judged) for key in ("faces", "photos"))
    return {
        "thresholds": limits,
        "recall": sum(one["found"] for one in judged) / faces,
        "pixel_harm": sum(one["pixel_harm"] * one["photos"] for one in judged) / harmless,
        "photo_harm": sum(one["photos_with_a_box"] for one in judged) / harmless,
    }


def again(photos: Sequence[Photo], rule: Rule, detectors: Sequence[FaceDetector]) -> dict[str, Any]:
    """What detectors find of the faces that they blurred, and what the rest of a picture lost."""
    quality = LookConfig().quality
    num_faces = num_again = 0
    psnr, growth = [], []
    for photo in photos:
        boxes = merged(rule(photo))
        if photo.kind not in ("faces", "person") or not boxes:
            continue
        height, width = photo.rgb.shape[:2]
        grown = [dilate(box, DILATION, width_px=width, height_px=height) for box in boxes]
        jpeg = encode_blurred(blur_faces(photo.rgb, grown), grown, quality)
        blurred = decode(jpeg).rgb
        found = [box for detector in detectors for box in detector.faces([blurred])[0]]
        num_faces += len(grown)
        num_again += sum(any(same_face(box, one) for one in found) for box in grown)
        outside = ~covered(photo, boxes)
        if outside.any():
            psnr.append(psnr_db(blurred[outside], photo.rgb[outside]))
            growth.append(len(jpeg) / len(encode_jpeg(photo.rgb, quality)))
    return {
        "faces": num_faces,
        "again": num_again,
        "share": num_again / num_faces,
        "psnr_min_db": min(psnr),
        "psnr_median_db": float(np.median(psnr)),
        "psnr_photos": len(psnr),
        "bytes_over_420": float(np.mean(growth)),
    }


def same_face(blurred: Box, found: Box) -> bool:
    """The found box has its middle in the blurred one, and is of a like size."""
    x, y = found.x_px + found.w_px / 2, found.y_px + found.h_px / 2
    inside = blurred.x_px <= x <= blurred.x_px + blurred.w_px and blurred.y_px <= y <= blurred.y_px + blurred.h_px
    areas = found.w_px * found.h_px / (blurred.w_px * blurred.h_px)
    return inside and 0.25 <= areas <= 4


def as_shipped(photos: Sequence[Photo], name: str, detector: FaceDetector) -> dict[str, Any]:
    """Recall and harm of a detector at its own thresholds.

    What the other rows say of them but for photos above NORMAL_PX: those rows judge all boxes in px of the picture.
    """
    for photo in photos:
        (photo.boxes[f"{name} as shipped"],) = detector.faces([photo.rgb])
    return judge(photos, lambda photo: photo.boxes[f"{name} as shipped"])


def enlarged(folder: Path, times: int, detector: FaceDetector) -> dict[str, Any]:
    """Recall and harm of a detector at its own thresholds, on enlarged photos."""
    import cv2

    photos = [photo for n, photo in enumerate(photos_of(folder)) if photo.kind == "faces" or n % ONE_OF_POOL == 0]
    spent = 0.0
    for photo in photos:
        photo.rgb = cv2.resize(photo.rgb, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
        photo.faces = [[value * times for value in box] for box in photo.faces]
        started = time.process_time()
        (photo.boxes["found"],) = detector.faces([photo.rgb])
        spent += time.process_time() - started
    return judge(photos, lambda photo: photo.boxes["found"]) | {"cpu_ms": 1000 * spent / len(photos)}


def measure(folder: Path) -> dict[str, Any]:
    """Look at all photos once with each detector; then everything is arithmetic but the second look."""
    photos = photos_of(folder)
    network, weights = NudeNetDetector(), str(folder / "weights" / "yunet_n_dynamic.onnx")
    sizes, scales = LookConfig().face_input_px, LookConfig().yunet_scales
    looks: dict[str, FaceDetector] = {
        "nudenet": NudeNetFaces(network, input_px=sizes, thresholds=LOWEST),
        "nudenet 320": NudeNetFaces(network, input_px=(320,), thresholds=LOWEST),
        "nudenet 640": NudeNetFaces(network, input_px=(640,), thresholds=LOWEST),
        "nudenet 960": NudeNetFaces(network, input_px=(960,), thresholds=LOWEST),
        "nudenet BGR": NudeNetFaces(network, input_px=sizes, thresholds=LOWEST),
        "yunet": YuNet(weights, scales=scales, thresholds=LOWEST),
        "yunet x1": YuNet(weights, scales=(1.0,), thresholds=LOWEST),
    }
    spent = {}
    for name, detector in looks.items():
        started = time.process_time()
        for photo in photos:
            rgb = np.ascontiguousarray(photo.rgb[:, :, ::-1]) if name.endswith("BGR") else photo.rgb
            (photo.boxes[name],) = detector.faces([rgb])
        spent[name] = 1000 * (time.process_time() - started) / len(photos)
        print(f"looked with {name}: {spent[name]:.0f} CPU ms a photo", flush=True)
    flat: Thresholds = (0.3, 0.3, 0.3, 0.3)
    nudenet, yunet = ("nudenet", NUDENET_THRESHOLDS), ("yunet", YUNET_THRESHOLDS)
    settings: dict[str, tuple[tuple[str, Thresholds], ...]] = {
        "nudenet 320, all >= .3": (("nudenet 320", flat),),
        "nudenet 640, all >= .3": (("nudenet 640", flat),),
        "nudenet 320 640 960, all >= .2": (("nudenet", (0.2, 0.2, 0.2, 0.2)),),
        "the same, shown BGR": (("nudenet BGR", (0.2, 0.2, 0.2, 0.2)),),
        "nudenet 320 640 960 by side": (nudenet,),
        "the same, no size skipped": tuple((f"nudenet {size}", NUDENET_THRESHOLDS) for size in sizes),
        "yunet x1 by side": (("yunet x1", YUNET_THRESHOLDS),),
        "yunet x1 x2, all >= .6": (("yunet", (0.6, 0.6, 0.6, 0.6)),),
        "yunet x1 x2 by side": (yunet,),
        "both by side": (nudenet, yunet),
    }
    table = {}
    for name, parts in settings.items():
        table[name] = judge(photos, rule_of(*parts)) | {"cpu_ms": sum(spent[part] for part, _ in parts)}
    second = {
        "nudenet": NudeNetFaces(network, input_px=sizes, thresholds=NUDENET_THRESHOLDS),
        "yunet": YuNet(weights, scales=scales, thresholds=YUNET_THRESHOLDS),
    }
    for name, detector in second.items():
        table[f"{name} as shipped"] = as_shipped(photos, name, detector) | {"cpu_ms": spent[name]}
    both = judge(photos, lambda photo: [box for name in second for box in photo.boxes[f"{name} as shipped"]])
    table["both as shipped"] = both | {"cpu_ms": sum(spent[name] for name in second)}
    for name, detector in second.items():
        for times in TIMES:
            table[f"{name}, photos enlarged {times} times"] = enlarged(folder, times, detector)
    return {
        "settings": table,
        "halves": {name: halves(photos, name, limits) for name, limits in (nudenet, yunet)},
        "again": {
            "nudenet": again(photos, rule_of(nudenet), [second["nudenet"]]),
            "yunet": again(photos, rule_of(yunet), [second["yunet"]]),
            "both": again(photos, rule_of(nudenet, yunet), list(second.values())),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of tars and weights")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/faces.json"))
    options = parser.parse_args()
    report = measure(options.data)
    for name, row in report["settings"].items():
        print(
            f"{name:<31} recall {row['recall']:.3f} ({row['found']} of {row['faces']}, heads {row['head_recall']:.2f})"
            f"  harm {row['pixel_harm']:.2%} of pixels, {row['photo_harm']:.1%} of photos "
            f"({row['photos_with_a_box']} of {row['photos']})"
            f"  strict {row['strict_pixel_harm']:.2%}, {row['strict_photo_harm']:.1%}  {row['cpu_ms']:.0f} CPU ms"
        )
    for name, row in report["halves"].items():
        print(
            f"{name}, chosen on the other half: recall {row['recall']:.3f}, harm {row['pixel_harm']:.2%} of pixels, "
            f"{row['photo_harm']:.1%} of photos; thresholds {row['thresholds']}"
        )
    for name, row in report["again"].items():
        print(
            f"{name}: {row['again']} of {row['faces']} blurred faces found again; PSNR outside the boxes of "
            f"{row['psnr_photos']} photos: least {row['psnr_min_db']:.1f} dB, median {row['psnr_median_db']:.1f} dB; "
            f"{row['bytes_over_420']:.2f} times the bytes of 4:2:0"
        )
    yunet, nudenet = (report["settings"][f"{name} as shipped"] for name in ("yunet", "nudenet"))
    most_again = max(row["share"] for row in report["again"].values())
    least_psnr = min(row["psnr_min_db"] for row in report["again"].values())
    results = {
        "yunet recall": (yunet["recall"], 0.88, yunet["recall"] >= 0.88),
        "yunet pixel harm": (yunet["pixel_harm"], 0.01, yunet["pixel_harm"] <= 0.01),
        "yunet photo harm": (yunet["photo_harm"], 0.13, yunet["photo_harm"] <= 0.13),
        "nudenet recall": (nudenet["recall"], 0.55, nudenet["recall"] >= 0.55),
        "found again": (most_again, 0.02, most_again <= 0.02),
        "psnr db": (least_psnr, 40, least_psnr >= 40),
    }
    report["values"] = {name: value for name, (value, _, _) in results.items()}
    report["goals"] = {name: goal for name, (_, goal, _) in results.items()}
    report["machine"] = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    report["versions"] = {name: version(name) for name in PACKAGES}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers in {options.json}")
    for name, (value, goal, reached) in results.items():
        print(f"faces {name} ratio {value:.4f} goal {goal} {'ok' if reached else 'short'}")
    return 0 if all(reached for _, _, reached in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
