"""Where the pictures of the site come from: photographs of installed packages, or folders and tars that are given."""

from __future__ import annotations

import functools
import heapq
import importlib.util
import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.config import ConfigError

Pixels = NDArray[np.uint8]  # [height, width, 3]

# Photographs that scikit-image and scikit-learn install. motorcycle_right is left out: it is motorcycle_left again.
_INSTALLED = {
    "skimage/data": (
        *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png"),
        *("coins.png", "color.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
        *("motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
# The astronaut's head in astronaut.png (x, y, w, h): no tile is cut there, so her face is only where it is planted.
HEAD_PX = (150, 18, 150, 174)
FACE_PX = (183, 72, 84, 112)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_LONGEST_PX = 512  # a base picture's longer side, at most
_SHORTEST_PX = 160  # a base picture's shorter side, at least
_FLATTEST_STD = 10.0  # below, a tile shows nothing
_FEWEST_FEATURES = 20  # a piece with fewer cannot be told from others
_TWIN_SIMILARITY = 0.92  # of two local features: 0.4 apart
# Measured over 2,578 pairs of pieces: with a VLAD of SIFT, 25 look like copies, 23 of them above this.
_ALIKE_SHARE = 0.15
WHOLE = (0.0, 0.0, 1.0, 1.0)


class Tile(NamedTuple):
    """A square window of an installed photograph. No two tiles of a site overlap."""

    scene: str
    x_px: int
    y_px: int
    side_px: int


class Crop(NamedTuple):
    """A window of a given picture, in fractions of its sides. Windows of one picture never overlap."""

    scene: str
    file: str
    offset: int  # of the bytes in the file; 0 and size -1 for a whole file
    size: int
    box: tuple[float, float, float, float]  # left, top, right, bottom


def open_rgb(data: bytes | Path) -> Pixels:
    """Decode a trusted picture, oriented, alpha over white: uint8 [height, width, 3]."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.mode in ("RGBA", "LA", "P"):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))


@functools.cache
def installed_photos() -> dict[str, Pixels]:
    """Photographs of the installed packages by name. Read from their files; nothing is downloaded."""
    photos = {}
    for place, names in _INSTALLED.items():
        package, _, inside = place.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent / inside
        photos.update({Path(name).stem: open_rgb(folder / name) for name in names if (folder / name).exists()})
    if len(photos) < 8 or "astronaut" not in photos:
        raise ConfigError(
            f"sample_web.photos: only {len(photos)} photographs are installed with scikit-image and scikit-learn; "
            "install these packages whole, or name folders or tars of pictures"
        )
    return photos


def cut_tiles(photos: dict[str, Pixels], num_tiles: int, rng: np.random.Generator) -> dict[str, list[Tile]]:
    """Disjoint tiles by scene, in seeded order: the largest side for which at least ``num_tiles`` show something."""
    area_px = sum(pixels.shape[0] * pixels.shape[1] for pixels in photos.values())
    side_px = min(160, int((area_px / num_tiles) ** 0.5))
    while True:
        tiles = {name: _tiles_of(name, pixels, side_px) for name, pixels in photos.items()}
        if sum(len(found) for found in tiles.values()) >= num_tiles:
            break
        side_px = min(side_px - 1, int(side_px * 0.96))
        if side_px < 8:
            raise ConfigError(
                f"sample_web.urls: the installed photographs have no {num_tiles} tiles; lower it or name photos"
            )
    return {name: [found[i] for i in rng.permutation(len(found))] for name, found in tiles.items()}


def _tiles_of(name: str, pixels: Pixels, side_px: int) -> list[Tile]:
    height, width = pixels.shape[0] // side_px, pixels.shape[1] // side_px
    if height == 0 or width == 0:
        return []
    cells = pixels[: height * side_px, : width * side_px, 1].astype(np.float32)
    contrast = cells.reshape(height, side_px, width, side_px).std(axis=(1, 3))
    tiles = []
    for row, column in np.argwhere(contrast > _FLATTEST_STD):
        x, y = int(column) * side_px, int(row) * side_px
        left, top, w, h = HEAD_PX
        on_head = x < left + w and left < x + side_px and y < top + h and top < y + side_px
        if not (name == "astronaut" and on_head):
            tiles.append(Tile(name, x, y, side_px))
    return tiles


def given_crops(places: list[str], num_needed: int) -> list[Crop]:
    """One whole picture each where the pictures suffice; else they are halved, largest first, and halved again.

    Pictures that do not decode, show nothing or are small are left out. May return fewer than ``num_needed``.
    """
    heap: list[tuple[int, int, int, Crop, tuple[int, int]]] = []  # how often halved, size, order
    order = 0
    for place in places:
        for scene, file, offset, size in _members(Path(place)):
            crop = Crop(scene, file, offset, size, WHOLE)
            shape = _shape(crop)
            if shape is not None and min(shape) >= _SHORTEST_PX and max(shape) <= 4 * min(shape):
                heap.append((0, -max(shape), order, crop, shape))
                order += 1
    heapq.heapify(heap)
    whole: list[tuple[int, Crop]] = []
    while heap and len(heap) + len(whole) < num_needed:
        num_cuts, _, place_in_order, crop, (height, width) = heapq.heappop(heap)
        if max(height, width) < 2 * _SHORTEST_PX:
            whole.append((place_in_order, crop))
            continue
        left, top, right, bottom = crop.box
        if width >= height:
            middle = (left + right) / 2
            boxes, half = [(left, top, middle, bottom), (middle, top, right, bottom)], (height, width // 2)
        else:
            middle = (top + bottom) / 2
            boxes, half = [(left, top, right, middle), (left, middle, right, bottom)], (height // 2, width)
        for box in boxes:
            heapq.heappush(heap, (num_cuts + 1, -max(half), order, crop._replace(box=box), half))
            order += 1
    chosen = sorted([(place_in_order, crop) for _, _, place_in_order, crop, _ in heap] + whole)
    return [crop for _, crop in chosen]


def _members(place: Path) -> list[tuple[str, str, int, int]]:
    if place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in _SUFFIXES)
        return [(path.stem, str(path), 0, -1) for path in files]
    try:
        with tarfile.open(place, "r:") as archive:
            members = [member for member in archive.getmembers() if Path(member.name).suffix.lower() in _SUFFIXES]
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(
            f"sample_web.photos: {place} is no folder and no plain tar ({error}); give folders or uncompressed tars"
        ) from error
    return [(Path(m.name).stem, str(place), m.offset_data, m.size) for m in members if m.isfile()]


def read_crop(crop: Crop) -> Pixels:
    """Pixels of a window, scaled down so that its longer side is at most 512 px."""
    from PIL import Image

    pixels = open_rgb(_bytes_of(crop))
    height, width = pixels.shape[:2]
    left, top, right, bottom = crop.box
    pixels = pixels[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
    scale = _LONGEST_PX / max(pixels.shape[:2])
    if scale >= 1:
        return np.ascontiguousarray(pixels)
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def pieces_apart(crops: list[Crop]) -> list[tuple[Crop, Pixels]]:
    """Those windows of one picture that show something and cannot be taken for an earlier one of them.

    Two pieces of a brick wall share no pixel and still look like copies, to people and to copy detectors.
    """
    pieces = [(crop, read_crop(crop)) for crop in crops]
    pieces = [(crop, pixels) for crop, pixels in pieces if shows_something(pixels)]
    if len(crops) == 1:
        return pieces
    kept: list[tuple[Crop, Pixels]] = []
    features: list[NDArray[np.float32]] = []
    for crop, pixels in pieces:
        found = _local_features(pixels)
        if len(found) >= _FEWEST_FEATURES and all(_share_found(found, other) < _ALIKE_SHARE for other in features):
            kept.append((crop, pixels))
            features.append(found)
    return kept


def _local_features(pixels: Pixels) -> NDArray[np.float32]:
    """RootSIFT of the strongest 300 points at 256 px, float32 [N, 128], unit length."""
    import cv2

    scale = 256 / max(pixels.shape[:2])
    grey = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, found = cv2.SIFT.create(300).detectAndCompute(grey, None)
    if found is None:
        return np.zeros((0, 128), np.float32)
    return np.asarray(np.sqrt(found / (found.sum(axis=1, keepdims=True) + 1e-6)), np.float32)


def _share_found(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Share of the features of either piece that have a twin in the other, the larger of both."""
    twin = a @ b.T > _TWIN_SIMILARITY
    return float(max(twin.any(axis=1).mean(), twin.any(axis=0).mean()))


def _bytes_of(crop: Crop) -> bytes:
    with Path(crop.file).open("rb") as stream:
        stream.seek(crop.offset)
        return stream.read(crop.size)


def _shape(crop: Crop) -> tuple[int, int] | None:
    """Height and width of a whole picture; None when it does not decode or shows nothing."""
    try:
        pixels = open_rgb(_bytes_of(crop))
    except (OSError, ValueError, SyntaxError):
        return None
    return (pixels.shape[0], pixels.shape[1]) if shows_something(pixels) else None


def shows_something(pixels: Pixels) -> bool:
    """Whether half of the cells of a 4 x 4 grid have contrast, so that the picture can be told from others."""
    height, width = pixels.shape[0] // 4 * 4, pixels.shape[1] // 4 * 4
    cells = pixels[:height, :width, 1].reshape(4, height // 4, 4, width // 4).std(axis=(1, 3))
    return bool((cells > _FLATTEST_STD).mean() >= 0.5)
