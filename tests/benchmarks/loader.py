"""From tars to batches, ours beside webdataset with torchvision's Pillow transforms (what dinov2 augments with).

    make bench NAME=loader ARGS="--data 'FOLDER/*.tar'"

Both sides read the same tars in one process and one thread, decode, make dinov2's views (two global crops of 224, eight
local ones of 98; the same operations with the same probabilities), and end with normalised float batches. Ours draws
masks too. webdataset reads in stored order, ours shuffles. Sides take turns; rows are medians of CPU seconds a batch.

Prints a row a side, writes a JSON, and ends with one line: ratio of medians, webdataset / ours.
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
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from training.config import PartConfig, Resolved, TrainRecipe, ViewConfig
from training.data import photometric
from training.data.files import PICTURES, list_files
from training.data.index import Index
from training.data.loader import Loader

GOAL = 4.0
PACKAGES = ("numpy", "torch", "torchvision", "pillow", "opencv-python-headless", "webdataset")
Crops = tuple[Tensor, Tensor]  # of a batch, normalised float: globals [2 B, 3, G, G], locals [L B, 3, l, l]


# Ours


def ours(part: PartConfig, views: ViewConfig, batch_size: int) -> Iterator[Crops]:
    """Batches of the loader, normalised as the step does it on its device."""
    recipe = TrainRecipe.model_validate(
        {
            "name": "bench",
            "run": "unused",
            "views": views.model_dump(),
            "data": {"parts": {"all": part.model_dump()}, "batch_size": batch_size, "num_workers": 0},
        }
    )
    resolved: Resolved = recipe.resolved("pretrain")
    with Loader(resolved, Index.open(resolved.data), rank=0, world=1, start_step=0) as loader:
        for batch in loader:
            assert batch.local_crops is not None
            shown = (batch.global_crops, batch.local_crops)
            yield tuple(photometric.normalise(crops, views.mean, views.std) for crops in shown)


# webdataset and torchvision


def transforms_of(views: ViewConfig) -> Callable[[Any], list[Tensor]]:
    """dinov2's views by torchvision's v1 transforms on a Pillow picture: two globals, then the locals."""
    from torchvision import transforms as v1

    bicubic = v1.InterpolationMode.BICUBIC

    def crop(side_px: int, scale: tuple[float, float]) -> v1.Compose:
        cut = v1.RandomResizedCrop(side_px, scale=scale, ratio=views.aspect, interpolation=bicubic)
        return v1.Compose([cut, v1.RandomHorizontalFlip(views.flip)])

    def change(blur: float, solarize: float) -> v1.Compose:
        return v1.Compose(
            [
                v1.RandomApply([v1.ColorJitter(*views.jitter)], p=views.jitter_probability),
                v1.RandomGrayscale(views.grey),
                v1.RandomApply([v1.GaussianBlur(9, views.blur_sigma)], p=blur),
                v1.RandomSolarize(128, p=solarize),
                v1.ToTensor(),
                v1.Normalize(views.mean, views.std),
            ]
        )

    first, second, local = views.blur_probabilities
    cut_global, cut_local = crop(views.global_px, views.global_scale), crop(views.local_px, views.local_scale)
    changes = (change(first, 0), change(second, views.solarize), change(local, 0))

    def views_of(picture: Any) -> list[Tensor]:
        shown = [changes[0](cut_global(picture)), changes[1](cut_global(picture))]
        return shown + [changes[2](cut_local(picture)) for _ in range(views.num_locals)]

    return views_of


def webdataset(part: PartConfig, views: ViewConfig, batch_size: int) -> Iterator[Crops]:
    """Batches of webdataset through a DataLoader with its default collate."""
    import webdataset as wds
    from PIL import Image

    views_of = transforms_of(views)

    def shown(sample: dict[str, Any]) -> list[Tensor]:
        data = next(data for ext, data in sample.items() if f".{ext}".endswith(PICTURES))
        return views_of(Image.open(io.BytesIO(data)).convert("RGB"))

    def is_picture(sample: dict[str, Any]) -> bool:
        return any(f".{ext}".endswith(PICTURES) for ext in sample)

    paths = [file.path for file in list_files(part.location, (".tar",))]
    read = wds.WebDataset(paths, shardshuffle=False).select(is_picture).map(shown).repeat()
    for crops in torch.utils.data.DataLoader(read, batch_size=batch_size, num_workers=0):
        yield torch.cat(crops[:2]), torch.cat(crops[2:])


# Measurement


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/smoke/run/tars", help="folder or pattern of tars; default: a run's")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("loader.json"), help="where the numbers go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part, views = PartConfig(kind="tars", location=options.data), ViewConfig()
    sides = {name: side(part, views, options.batch_size) for name, side in (("webdataset", webdataset), ("ours", ours))}
    for side in sides.values():
        next(side)  # opens files, loads libraries
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        shapes = []
        for name, side in sides.items():
            start = time.process_time()
            crops = next(side)
            spent[name].append(time.process_time() - start)
            shapes.append([(some.shape, some.dtype) for some in crops])
        assert shapes[0] == shapes[1], shapes
    medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
    for name, median in medians.items():
        print(f"{name:<12} {median:8.3f} CPU s a batch {options.batch_size / median:8.1f} pictures a CPU second")
    ratio = medians["webdataset"] / medians["ours"]
    report = {
        "batch_size": options.batch_size,
        "cpu_s": spent,
        "ratio": ratio,
        "goal": GOAL,
        "data": [[file.name, file.num_bytes] for file in list_files(options.data, (".tar",))],
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers in {options.json}")
    print(f"loader ratio {ratio:.2f} goal {GOAL} {'ok' if ratio >= GOAL else 'short'}")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
