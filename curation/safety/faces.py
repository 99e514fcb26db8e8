"""Faces: found by NudeNet's face classes, by YuNet (OpenCV, file by path), or both; dilated; blurred for good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from curation.safety.detector import FACES, Box, NudeNetDetector, boxes_of
from training.data.pixels import MAX_BYTES, MOST_PIXELS, decode_into, encode_jpeg

# A detector has one least score for boxes whose shorter side is below each of these, in px of the picture, and one for
# the rest. False boxes on animals are large, and true faces that are small score low: docs/safety.md. A picture larger
# than NORMAL_PX is judged as if it had just that: a better camera must not cost the same scene its faces.
STEPS_PX = (16.0, 32.0, 64.0)
NORMAL_PX = 640
Thresholds = tuple[float, float, float, float]
NUDENET_THRESHOLDS: Thresholds = (0.2, 0.15, 0.15, 0.5)
YUNET_THRESHOLDS: Thresholds = (0.6, 0.45, 0.65, 0.85)

_MOST_ENLARGED = 2  # NudeNet at an input of more times the longest side finds one face of 327 more, for much time
_LONGEST_PX = 1920  # YuNet sees no side longer than this: its time and memory grow with the area
_SAME_FACE_IOU = 0.5
# A blurred face keeps three samples a side, smoothed on a grid so fine that no edge of a sample is left. With six and
# less smoothing YuNet found 15 of 100 blurred faces again, which three dark spots are enough for.
_CELLS, _GRID, _SIGMA = 3, 32, 8.0
LEAST_PSNR_DB = 40.0  # of a blurred picture outside its boxes, after encoding
_HIGHER_QUALITIES = (97, 99, 100)
_ROWS = 256  # of a picture that are compared at a time


class FaceDetector(Protocol):
    """What finds faces."""

    def faces(self, pictures: Sequence[np.ndarray]) -> list[list[Box]]:
        """Boxes of each picture that pass the threshold of their size; a face may have several.

        Args:
            pictures: uint8 [H, W, 3] each, RGB.
        """


class NudeNetFaces:
    """NudeNet's face classes at several input sizes; the network is shown RGB."""

    def __init__(self, network: NudeNetDetector, *, input_px: Sequence[int], thresholds: Thresholds) -> None:
        self._network = network
        self._sizes = sorted(set(input_px))
        self._thresholds = thresholds

    def faces(self, pictures: Sequence[np.ndarray]) -> list[list[Box]]:
        """Boxes of each picture at every size, the smallest size and those that enlarge it little."""
        found: list[list[Box]] = [[] for _ in pictures]
        for size in self._sizes:
            places = [
                place
                for place, rgb in enumerate(pictures)
                if size == self._sizes[0] or size <= _MOST_ENLARGED * max(rgb.shape[:2])
            ]
            outputs = self._network.outputs([pictures[place] for place in places], input_px=size)
            for place, output in zip(places, outputs, strict=True):
                height, width = pictures[place].shape[:2]
                boxes = boxes_of(
                    output, self._network.labels, only=FACES, width_px=width, height_px=height, input_px=size,
                    floor=min(self._thresholds),
                )  # fmt: skip
                found[place] += [box for box in boxes if passes(box, self._thresholds, unit=unit_of(pictures[place]))]
        return found


class YuNet:
    """YuNet through OpenCV, at several scales of the picture, one picture a time; it is shown BGR."""

    def __init__(self, path: str, *, scales: Sequence[float], thresholds: Thresholds) -> None:
        import cv2

        cv2.setNumThreads(1)
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        self._scales = tuple(scales)
        self._thresholds = thresholds
        self._detector: Any = cv2.FaceDetectorYN.create(path, "", (320, 320), min(thresholds), 0.3, 5000)

    def faces(self, pictures: Sequence[np.ndarray]) -> list[list[Box]]:
        """Boxes of each picture at every scale; of a large one also at those scales of it at its normal size."""
        return [self._boxes(rgb) for rgb in pictures]

    def _boxes(self, rgb: np.ndarray) -> list[Box]:
        import cv2

        height, width = rgb.shape[:2]
        boxes = []
        most, normal = _LONGEST_PX / max(height, width), unit_of(rgb)
        units = {min(scale, most): 1.0 for scale in self._scales}
        units |= {min(scale * normal, most): normal for scale in self._scales}
        for scale, unit in sorted(units.items()):
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            way = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
            scaled = rgb if scale == 1 else cv2.resize(rgb, size, interpolation=way)
            scaled = np.ascontiguousarray(scaled[:, :, ::-1])
            self._detector.setInputSize(size)
            _, found = self._detector.detect(scaled)
            rows = [] if found is None else found
            seen = [Box("FACE", float(row[14]), *(float(value) / scale for value in row[:4])) for row in rows]
            boxes += [box for box in seen if passes(box, self._thresholds, unit=unit)]
        return boxes


def unit_of(rgb: np.ndarray) -> float:
    """What a pixel of a picture is at its normal size: 1, less where its longest side is above ``NORMAL_PX``."""
    return float(min(1.0, NORMAL_PX / max(rgb.shape[:2])))


def passes(box: Box, thresholds: Thresholds, *, unit: float = 1.0) -> bool:
    """Whether its score is enough for a box of its size.

    Args:
        box: in px of the picture.
        thresholds: by the size of the box.
        unit: px in which it is judged, to one of the picture.
    """
    side = unit * min(box.w_px, box.h_px)
    return box.score >= thresholds[sum(side >= step for step in STEPS_PX)]


def merged(boxes: Sequence[Box]) -> list[Box]:
    """One box a face, where detectors or scales found it more than once: the one with the highest score."""
    import cv2

    ordered = sorted(boxes, key=lambda box: (-box.score, box[2:], box.label))
    if len(ordered) < 2:
        return ordered
    kept = cv2.dnn.NMSBoxes([list(box[2:]) for box in ordered], [box.score for box in ordered], 0.0, _SAME_FACE_IOU)
    return [ordered[i] for i in sorted(np.asarray(kept, np.int64).ravel().tolist())]


def dilate(box: Box, factor: float, *, width_px: int, height_px: int) -> Box:
    """The box grown about its middle by ``factor``, clipped to the picture."""
    middle_x, middle_y = box.x_px + box.w_px / 2, box.y_px + box.h_px / 2
    left, right = middle_x - box.w_px * factor / 2, middle_x + box.w_px * factor / 2
    top, bottom = middle_y - box.h_px * factor / 2, middle_y + box.h_px * factor / 2
    left, right = max(0.0, left), min(float(width_px), right)
    top, bottom = max(0.0, top), min(float(height_px), bottom)
    return Box(box.label, box.score, left, top, max(0.0, right - left), max(0.0, bottom - top))


def blur_faces(rgb: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """A copy with every box reduced to a few cells and smoothed; no pixel outside the boxes changes.

    Args:
        rgb: uint8 [H, W, 3].
        boxes: in pixels; fractions are rounded outwards.

    Returns:
        uint8 [H, W, 3].
    """
    import cv2

    out = rgb.copy()
    for rows, columns in _regions(boxes, *rgb.shape[:2]):
        region = out[rows, columns]
        height, width = region.shape[:2]
        few = cv2.resize(region, (min(_CELLS, width), min(_CELLS, height)), interpolation=cv2.INTER_AREA)
        grid = cv2.resize(few, (_GRID, _GRID), interpolation=cv2.INTER_LINEAR).astype(np.float32)
        smooth = cv2.GaussianBlur(grid, (0, 0), _SIGMA, borderType=cv2.BORDER_REPLICATE)
        wide = cv2.resize(smooth, (width, height), interpolation=cv2.INTER_LINEAR)
        out[rows, columns] = np.rint(wide).astype(np.uint8)
    return out


def encode_blurred(blurred: np.ndarray, boxes: Sequence[Box], quality: int) -> bytes:
    """JPEG of a blurred picture, 4:4:4, without metadata, of a quality at which what is no box keeps 40 dB.

    Args:
        blurred: uint8 [H, W, 3].
        boxes: that were blurred.
        quality: tried first; a higher one is taken where it is not enough, which noise in colour needs.
    """
    outside = np.ones(blurred.shape[:2], bool)
    for rows, columns in _regions(boxes, *blurred.shape[:2]):
        outside[rows, columns] = False
    jpeg = encode_jpeg(blurred, quality, subsampling="444")
    for lower in range(quality - 15, 0, -15):  # no reader takes a larger file
        if len(jpeg) <= MAX_BYTES:
            break
        jpeg = encode_jpeg(blurred, lower, subsampling="444")
    for higher in (step for step in _HIGHER_QUALITIES if step > quality):
        if psnr_db(_pixels(jpeg), blurred, outside) >= LEAST_PSNR_DB:
            break
        better = encode_jpeg(blurred, higher, subsampling="444")
        if len(better) > MAX_BYTES:
            break
        jpeg = better
    return jpeg


def _pixels(jpeg: bytes) -> np.ndarray:
    """Of a file that was just written: no limit is asked, uint8 [H, W, 3]."""
    new = lambda height, width: np.empty((height, width, 3), np.uint8)  # noqa: E731
    return decode_into(jpeg, new, max_bytes=len(jpeg), max_pixels=MOST_PIXELS).rgb


def psnr_db(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal to noise of uint8 arrays of one shape; infinite where they are equal.

    Args:
        a: of any shape; a block of rows of it is taken at a time.
        b: of the same shape.
        where: bool, of the leading axes of both; None: everywhere.
    """
    error = count = 0
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        apart = a[rows].astype(np.int32) - b[rows]
        apart = apart if where is None else apart[where[rows]]
        error += int(np.square(apart).sum(dtype=np.int64))
        count += apart.size
    return float(10 * np.log10(255**2 * count / error)) if error else float("inf")


def _regions(boxes: Sequence[Box], height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each box, fractions rounded outwards; none of a box that lies outside."""
    for box in boxes:
        left, top = max(0, int(np.floor(box.x_px))), max(0, int(np.floor(box.y_px)))
        right = min(width, int(np.ceil(box.x_px + box.w_px)))
        bottom = min(height, int(np.ceil(box.y_px + box.h_px)))
        if right > left and bottom > top:
            yield slice(top, bottom), slice(left, right)
