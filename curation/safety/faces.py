"""Faces: found by NudeNet's face classes, by YuNet (OpenCV, file by path), or both; dilated; blurred for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from curation.safety.detector import FACES, Box, NudeNetDetector, boxes_of

# A detector has one least score for boxes whose shorter side is below each of these, in px of the picture, and one for
# the rest. False boxes on animals are large, and true faces that are small score low: docs/safety.md.
STEPS_PX = (16.0, 32.0, 64.0)
Thresholds = tuple[float, float, float, float]
NUDENET_THRESHOLDS: Thresholds = (0.2, 0.15, 0.15, 0.5)
YUNET_THRESHOLDS: Thresholds = (0.6, 0.45, 0.65, 0.85)

_MOST_ENLARGED = 2  # NudeNet at an input so many times the longest side finds no further face
_LONGEST_PX = 1920  # YuNet sees no side longer than this: its time and memory grow with the area
_SAME_FACE_IOU = 0.5
_CELLS = 6  # a blurred face keeps at most so many samples a side: nothing to sharpen back


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
                found[place] += [box for box in boxes if passes(box, self._thresholds)]
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
        """Boxes of each picture at every scale."""
        return [self._boxes(rgb) for rgb in pictures]

    def _boxes(self, rgb: np.ndarray) -> list[Box]:
        import cv2

        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        height, width = bgr.shape[:2]
        boxes = []
        for scale in sorted({min(scale, _LONGEST_PX / max(height, width)) for scale in self._scales}):
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            way = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
            scaled = bgr if scale == 1 else cv2.resize(bgr, size, interpolation=way)
            self._detector.setInputSize(size)
            _, found = self._detector.detect(scaled)
            rows = [] if found is None else found
            boxes += [Box("FACE", float(row[14]), *(float(value) / scale for value in row[:4])) for row in rows]
        return [box for box in boxes if passes(box, self._thresholds)]


def passes(box: Box, thresholds: Thresholds) -> bool:
    """Whether its score is enough for a box of its size."""
    side = min(box.w_px, box.h_px)
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
    height, width = rgb.shape[:2]
    for box in boxes:
        x0, y0 = max(0, int(np.floor(box.x_px))), max(0, int(np.floor(box.y_px)))
        x1 = min(width, int(np.ceil(box.x_px + box.w_px)))
        y1 = min(height, int(np.ceil(box.y_px + box.h_px)))
        if x1 <= x0 or y1 <= y0:
            continue
        region = out[y0:y1, x0:x1]
        cells = (min(_CELLS, x1 - x0), min(_CELLS, y1 - y0))
        few = cv2.resize(region, cells, interpolation=cv2.INTER_AREA)
        smooth = cv2.resize(few, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        sigma = max(1.0, min(x1 - x0, y1 - y0) / (2.0 * _CELLS))
        out[y0:y1, x0:x1] = cv2.GaussianBlur(smooth, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    return out
