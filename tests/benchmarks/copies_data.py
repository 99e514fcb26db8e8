"""Pictures of the benchmark of copies, and what each method sees of them; see copies.py."""

from __future__ import annotations

import csv
import io
import pickle
import random
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from copy_edits import EDITS
from PIL import Image, UnidentifiedImageError

from curation.dedup import hashes
from curation.dedup.copydescriptor import Descriptor, DescriptorConfig, open_descriptor
from curation.dedup.siftvlad import Keypoints, SiftVladDct, fit_sift_vlad, grey_of, keypoints_of
from training.data.pixels import decode, encode_jpeg, resize_shortest

SMALL_PX = 288
NUM_PHOTOS = 200
UNTRAINED = "mobilenetv3_small_050"
FIT_SETS = ("curated_caltech101_6perclass", "curated_flowers5_17perclass")
DISTRACTOR_TARS = ("pool_coco_48", "pool_caltech_background_80")
DISTRACTOR_SETS = ("tiny_imagenet_100c", "cifar10_jpg_22k")


class Picture(NamedTuple):
    """One file and what it shows."""

    data: bytes
    group: int  # pictures of one group are copies
    edit: str = ""  # empty for a distinct picture
    background: int = -1  # group of the photograph that it was pasted into


def tar_files(path: Path) -> list[tuple[dict[str, str], bytes]]:
    """Rows of the manifest and their files; what Pillow cannot read is left out."""
    found = []
    with tarfile.open(path) as tar:
        manifest = tar.extractfile("manifest.csv")
        assert manifest is not None
        for row in csv.DictReader(io.TextIOWrapper(manifest)):
            member = tar.extractfile(row["file"])
            assert member is not None
            data = member.read()
            try:
                Image.open(io.BytesIO(data)).load()
            except (UnidentifiedImageError, OSError):
                continue
            found.append((row, data))
    return found


def rows_of(path: Path) -> list[bytes]:
    """Files in a parquet file."""
    return [data.as_py() for data in pq.read_table(path, columns=["image"])["image"]]


def pictures_of(folder: Path) -> list[Picture]:
    """Photographs, their edits, distractors, and the labelled groups, in a fixed order."""
    draw = random.Random(7)
    files = [data for _, data in tar_files(folder / "pool_imagenet_300.tar")]
    draw.shuffle(files)
    photos = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    found = [Picture(data, group) for group, data in enumerate(files)]
    for group, photo in enumerate(photos[:NUM_PHOTOS]):
        other = NUM_PHOTOS + draw.randrange(len(photos) - NUM_PHOTOS)
        for name, edit in EDITS.items():
            background = other if name == "pasted" else -1
            found.append(Picture(edit(photo, photos[other], draw), group, name, background))
    distractors = [data for name in DISTRACTOR_TARS for _, data in tar_files(folder / f"{name}.tar")]
    distractors += [data for name in DISTRACTOR_SETS for data in rows_of(folder / f"{name}.parquet")]
    found += [Picture(data, len(files) + at) for at, data in enumerate(distractors)]
    first, groups = len(files) + len(distractors), {}
    for row, data in tar_files(folder / "copies_pdq_imagededup.tar"):
        group = groups.setdefault(row["group"], first + len(groups))
        edit = "labelled" if row["role"] == "copy" else ""
        found.append(Picture(data, group, edit))
    return found


def small_of(data: bytes) -> np.ndarray:
    """The 288-px version, as the pipeline stores it, RGB uint8 [H, W, 3]."""
    rgb: np.ndarray = decode(encode_jpeg(resize_shortest(decode(data).rgb, SMALL_PX), 90)).rgb
    return rgb


def fit_of(folder: Path, num_pictures: int) -> dict[str, np.ndarray]:
    """The weight-free descriptor's fit on curated photographs and on distractors; none of the edited photographs."""
    files = [data for name in FIT_SETS for _, data in tar_files(folder / f"{name}.tar")]
    others = rows_of(folder / "tiny_imagenet_100c.parquet")
    chosen = random.Random(0).sample(range(len(others)), max(0, num_pictures - len(files)))
    files += [others[at] for at in chosen]
    return fit_sift_vlad((small_of(data) for data in files[:num_pictures]), seed=0)


# --- features -------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What the methods see of one picture."""

    phash: int
    dhash: int
    pdq: str
    vector: np.ndarray  # float16 [1024]
    other: np.ndarray  # float16 [D], by a network
    keypoints: Keypoints
    seconds: dict[str, float]  # of CPU


_STATE: dict[str, Any] = {}


def untrained(path: Path) -> DescriptorConfig:
    """A tiny timm model with weights drawn from a seed, for want of trained ones."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model(UNTRAINED, pretrained=False, num_classes=0).state_dict(), path)
    return DescriptorConfig(name=f"timm:{UNTRAINED}", weights=str(path), duplicate_threshold=0.5, leakage_threshold=0.5)


def _start(fit: dict[str, np.ndarray], other: DescriptorConfig) -> None:
    _STATE.update(own=SiftVladDct(fit), other=open_descriptor(other, {}))


def see(data: bytes) -> Seen:
    """All methods on one picture."""
    seconds = {}

    def timed(name: str, run: Any, *args: Any) -> Any:
        started = time.thread_time()
        found = run(*args)
        seconds[name] = time.thread_time() - started
        return found

    rgb = decode(data).rgb
    luma = timed("luma", hashes.luma, rgb)
    phash, dhash = timed("pHash", hashes.phash, luma), timed("dHash", hashes.dhash, luma)
    pdq, _ = timed("PDQ", hashes.pdq, rgb)
    small = small_of(data)
    own: SiftVladDct = _STATE["own"]
    other: Descriptor = _STATE["other"]
    grey = grey_of(small)
    keypoints = timed("keypoints", keypoints_of, grey)
    vector = timed("VLAD + DCT", own.vector_of, grey, keypoints.rows)
    features = timed("other", other.vector, small)
    return Seen(
        phash,
        dhash,
        pdq,
        vector.astype(np.float16),
        features.astype(np.float16),
        keypoints,
        seconds,
    )


def seen_by_all(
    pictures: list[Picture], fit: dict[str, np.ndarray], other: DescriptorConfig, cache: Path, processes: int
) -> list[Seen]:
    """What all methods see of all pictures, kept in a folder so that a second look is quick."""
    path = cache / "seen.pickle"
    if path.exists():
        found: list[Seen] = pickle.loads(path.read_bytes())
        return found
    with ProcessPoolExecutor(processes, initializer=_start, initargs=(fit, other)) as pool:
        found = list(pool.map(see, (picture.data for picture in pictures), chunksize=64))
    path.write_bytes(pickle.dumps(found, protocol=5))
    return found
