"""Faces: found by NudeNet's face classes, by YuNet (OpenCV, file by path), or both; dilated; blurred for good."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from curation.safety.detector import FACES, Box

_CELLS = 6  # a blurred face keeps at most so many samples a side: nothing to sharpen back
# Box side in px below which a score is enough: false boxes on animals are large, and small faces score low.
YUNET_THRESHOLDS = ((40.0, 0.55), (100.0, 0.75), (float("inf"), 0.85))
_LONGEST_PX = 1920  # YuNet sees no side longer than this: its time and memory grow with the area
_SAME_FACE_IOU = 0.5


class YuNet:
    """YuNet through OpenCV, at several scales of the picture; channels as OpenCV has them (BGR)."""

    def __init__(self, path: str, *, scales: Sequence[float]) -> None:
        import cv2

        cv2.setNumThreads(1)
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        self._scales = tuple(scales)
        lowest = min(score for _, score in YUNET_THRESHOLDS)
        self._detector: Any = cv2.FaceDetectorYN.create(path, "", (320, 320), lowest, 0.3, 5000)

    def detect(self, rgb: np.ndarray) -> list[Box]:
        """Face boxes of uint8 [H, W, 3] that pass the threshold of their size."""
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
            for row in [] if found is None else found:
                x, y, w, h = (float(value) / scale for value in row[:4])
                if passes(min(w, h), float(row[14])):
                    boxes.append(Box("FACE", float(row[14]), x, y, w, h))
        return boxes


def passes(side_px: float, score: float) -> bool:
    """Whether YuNet's score is enough for a box of this side."""
    return score >= next(threshold for limit, threshold in YUNET_THRESHOLDS if side_px < limit)


def nudenet_faces(boxes: Iterable[Box], threshold: float) -> list[Box]:
    """Boxes of NudeNet's face classes with at least this score."""
    return [box for box in boxes if box.label in FACES and box.score >= threshold]


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
