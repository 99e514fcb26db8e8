"""Views of pictures on one core: dinov2's Pillow pipeline beside ours; the goal is at least 4.0 times as fast.

    make bench NAME=augment ARGS="--data FOLDER [--dinov2 PATH]"

FOLDER holds ``pool_imagenet_300.tar``. Both sides read the same JPEGs and make 2 global crops of 224 px and 8 locals of
98 px, with the same operations, ranges, order and probabilities. dinov2 (its own DataAugmentationDINO where PATH is a
checkout, else the same torchvision transforms put together here) ends with normalised floats; ours with uint8, which
is normalised on the device. Rows are CPU milliseconds a picture; sides take turns, and each number is the median over
rounds.

    decode + views       what is judged: Image.open(...).convert("RGB") and pixels.decode, both at full size
    views                of pictures decoded beforehand
    crops only           ours with views.on_device: the photometric half is left to the device
    as floats            ours normalised too, on the same core
    large: ...           the same pictures enlarged to a shortest side of 2,000 px and stored again: photographs as
                         cameras make them. "reduced" decodes as a training run does, at a half, a quarter or an
                         eighth where every crop keeps as many pixels as it is resized to
                         (data.samples.decode_shortest_px)
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from training.config import ViewConfig
from training.data.augment import Crops, Views
from training.data.photometric import normalise
from training.data.pixels import decode
from training.data.samples import decode_shortest_px

GOAL = 4.0
LARGE_PX, NUM_LARGE = 2000, 8
PACKAGES = ("torch", "torchvision", "pillow", "opencv-python-headless", "numpy")
REPORT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "augment.json"


def pictures(path: Path, count: int) -> list[bytes]:
    """``count`` JPEGs, evenly over the tar."""
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.lower().endswith((".jpeg", ".jpg"))]
        chosen = [members[i * len(members) // count] for i in range(count)]
        return [tar.extractfile(member).read() for member in chosen]


def enlarged(data: bytes) -> bytes:
    """The picture at a shortest side of LARGE_PX."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = LARGE_PX / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    out = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=88)
    return out.getvalue()


def dinov2_views(checkout: Path | None, config: ViewConfig) -> Callable[[Image.Image], Any]:
    """Its augmentation."""
    if checkout is not None:
        sys.path.insert(0, str(checkout))
        from dinov2.data.augmentations import DataAugmentationDINO

        return DataAugmentationDINO(
            config.global_scale, config.local_scale, config.num_locals, config.global_px, config.local_px
        )
    bicubic = T.InterpolationMode.BICUBIC

    def geometric(side_px: int, scale: tuple[float, float]) -> T.Compose:
        return T.Compose([T.RandomResizedCrop(side_px, scale, interpolation=bicubic), T.RandomHorizontalFlip()])

    def blur(probability: float) -> T.RandomApply:
        return T.RandomApply([T.GaussianBlur(9, config.blur_sigma)], p=probability)

    jitter = T.Compose([T.RandomApply([T.ColorJitter(*config.jitter)], p=0.8), T.RandomGrayscale(0.2)])
    last = T.Compose([T.ToTensor(), T.Normalize(config.mean, config.std)])
    first, second, local = config.blur_probabilities
    whole, part = geometric(config.global_px, config.global_scale), geometric(config.local_px, config.local_scale)
    change_first = T.Compose([jitter, blur(first), last])
    change_second = T.Compose([jitter, blur(second), T.RandomSolarize(128, p=config.solarize), last])
    change_local = T.Compose([jitter, blur(local), last])

    def draw(picture: Image.Image) -> list[torch.Tensor]:
        views = [change_first(whole(picture)), change_second(whole(picture))]
        return views + [change_local(part(picture)) for _ in range(config.num_locals)]

    return draw


def measure(rows: dict[str, tuple[Callable[[Any, int], Any], list[Any]]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds a picture of each row; all rows once a round, in turn. The first round is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, (run, inputs) in rows.items():
            started = time.process_time()
            for i, one in enumerate(inputs):
                run(one, number * len(inputs) + i)
            if number:
                spent[name].append((time.process_time() - started) / len(inputs) * 1e3)
    return {name: statistics.median(values) for name, values in spent.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pool_imagenet_300.tar")
    parser.add_argument("--dinov2", type=Path, help="checkout of facebookresearch/dinov2")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=REPORT, help="where the numbers go")
    options = parser.parse_args()
    torch.set_num_threads(1)

    config = ViewConfig()
    theirs = dinov2_views(options.dinov2, config)
    ours, crops_only = Views(config), Views(config.model_copy(update={"on_device": True}))
    shortest_px = decode_shortest_px(config, None)
    stored = pictures(options.data / "pool_imagenet_300.tar", options.pictures)
    large = [enlarged(data) for data in stored[:: max(1, len(stored) // NUM_LARGE)][:NUM_LARGE]]
    decoded = [decode(data).rgb for data in stored]

    def pillow(data: bytes, _: int = 0) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def drawn(views: Views, rgb: np.ndarray, seed: int) -> Crops:
        return views.draw(rgb, np.random.default_rng(seed))

    def floats(crops: Crops) -> list[torch.Tensor]:
        return [normalise(part, config.mean, config.std) for part in (crops.global_crops, crops.local_crops)]

    torch.manual_seed(0)
    cost = measure(
        {
            "dinov2 decode + views": (lambda data, _: theirs(pillow(data)), stored),
            "ours decode + views": (lambda data, seed: drawn(ours, decode(data).rgb, seed), stored),
            "ours decode + views as floats": (lambda data, seed: floats(drawn(ours, decode(data).rgb, seed)), stored),
            "dinov2 views": (lambda picture, _: theirs(picture), [Image.fromarray(rgb) for rgb in decoded]),
            "ours views": (lambda rgb, seed: drawn(ours, rgb, seed), decoded),
            "ours decode + crops only": (lambda data, seed: drawn(crops_only, decode(data).rgb, seed), stored),
            "dinov2 decode": (pillow, stored),
            "ours decode": (lambda data, _: decode(data), stored),
            "dinov2 large: decode + views": (lambda data, _: theirs(pillow(data)), large),
            "ours large: decode + views": (lambda data, seed: drawn(ours, decode(data).rgb, seed), large),
            "ours large: reduced": (
                lambda data, seed: drawn(ours, decode(data, shortest_px=shortest_px).rgb, seed),
                large,
            ),
        },
        options.rounds,
    )
    against = {"large": "dinov2 large: decode + views", "ours views": "dinov2 views", "ours decode": "dinov2 decode"}
    ratios = {}
    for name, value in cost.items():
        peer = against.get(name) or (against["large"] if "large" in name else "dinov2 decode + views")
        text = ""
        if name.startswith("ours"):
            ratios[name] = cost[peer] / value
            text = f"{ratios[name]:>8.2f} x {peer}"
        print(f"{name:<30}{value:>9.2f} CPU ms a picture {1e3 / value:>8.1f} a core and second{text}")
    ratio = ratios["ours decode + views"]
    report = {
        "ratio": round(ratio, 3),
        "goal": GOAL,
        "cpu_ms_a_picture": {name: round(value, 3) for name, value in cost.items()},
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "peer": "dinov2's DataAugmentationDINO" if options.dinov2 else "the torchvision transforms of dinov2",
        "inputs": {
            "pictures": f"{len(stored)} of pool_imagenet_300.tar",
            "median_shortest_px": int(statistics.median(min(rgb.shape[:2]) for rgb in decoded)),
            "mean_bytes": round(sum(map(len, stored)) / len(stored)),
            "large": f"{len(large)} of them, enlarged to a shortest side of {LARGE_PX} px",
            "large_mean_bytes": round(sum(map(len, large)) / len(large)),
            "views": config.model_dump(),
            "rounds": options.rounds,
        },
        "machine": {"cpus": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers: {options.json}")
    print(f"augment ratio {ratio:.2f} goal {GOAL} {'ok' if ratio >= GOAL else 'short'}")
    return 0 if ratio >= GOAL else 1


def processor() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
