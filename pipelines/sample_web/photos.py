"""Where the pictures of the site come from: photographs of installed packages, or folders and tars that are given."""

from __future__ import annotations

import heapq
import importlib.util
import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from curation.stage import ConfigError

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
_SHORTEST_PX = 176  # a base picture's shorter side, at least
_FLATTEST_STD = 10.0  # below, a tile shows nothing


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
            crop = Crop(scene, file, offset, size, (0.0, 0.0, 1.0, 1.0))
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
    """Whether a given picture has contrast in more than one corner of itself, and so can be told from others."""
    height, width = pixels.shape[0] // 4 * 4, pixels.shape[1] // 4 * 4
    cells = pixels[:height, :width, 1].reshape(4, height // 4, 4, width // 4).std(axis=(1, 3))
    return bool((cells > _FLATTEST_STD).mean() >= 0.5)
