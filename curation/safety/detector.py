"""NudeNet's detector: class scores and boxes of exposed parts and faces.

NudeNet is AGPL-3.0: it is imported, never copied; a recipe with ``look.detector: none`` works without it. Its own
pre- and post-processing runs here; only the session is ours, with one thread, so that results do not depend on the machine.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from curation.stage import ConfigError

EXPLICIT = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)
FACES = ("FACE_FEMALE", "FACE_MALE")


class Box(NamedTuple):
    """One detection, in pixels of the picture."""

    label: str
    score: float
    x_px: float
    y_px: float
    w_px: float
    h_px: float


def model_path() -> Path:
    """The ONNX file inside the installed nudenet package.

    Raises:
        ConfigError: nudenet is not installed.
    """
    spec = find_spec("nudenet")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "look.detector: got 'nudenet', which is not installed; pip install nudenet, or set it to 'none'"
        )
    return Path(spec.origin).parent / "320n.onnx"


@lru_cache
def model_digest() -> str:
    """sha256 of the model's file, hex."""
    with model_path().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class NudeNetDetector:
    """NudeNet's model at one or more input sizes; the first one gives the class scores, all give faces."""

    def __init__(self, *, device: str = "cpu") -> None:
        import cv2
        import onnxruntime
        from nudenet import NudeDetector

        cv2.setNumThreads(1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CUDAExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(model_path()), options, providers=providers)
        self._detector: Any = NudeDetector.__new__(NudeDetector)
        self._detector.onnx_session = session
        self._detector.input_name = session.get_inputs()[0].name

    def detect(self, rgb: np.ndarray, *, input_px: int = 320) -> list[Box]:
        """Boxes of uint8 [H, W, 3] with a score of at least 0.2, the highest first."""
        self._detector.input_width = self._detector.input_height = input_px
        found = self._detector.detect(np.ascontiguousarray(rgb[:, :, ::-1]))  # it wants BGR
        boxes = [Box(item["class"], float(item["score"]), *map(float, item["box"])) for item in found]
        return sorted(boxes, key=lambda box: (-box.score, box.label, box[2:]))


def explicit_score(boxes: list[Box]) -> tuple[str | None, float]:
    """The explicit class with the highest score, and that score; (None, 0) where there is none."""
    explicit = [box for box in boxes if box.label in EXPLICIT]
    if not explicit:
        return None, 0.0
    best = max(explicit, key=lambda box: (box.score, box.label))
    return best.label, best.score
