"""NudeNet's detector: scores of every class, boxes of exposed parts, faces.

NudeNet is AGPL-3.0: model and class names are taken from the installed package, and nothing of it is copied; a recipe
with ``look.detector: none`` works without it. What surrounds the model, a letterbox and the decoding of a YOLOv8 head,
is our own, tested to give what ``nudenet.NudeDetector().detect`` gives, in bounded memory for pictures of any shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from curation.weights import file_sha256
from training.config import ConfigError

EXPLICIT = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)
FACES = ("FACE_FEMALE", "FACE_MALE")
FLOOR = 0.2
LICENSE = "AGPL-3.0"  # of its repository; the metadata of its wheel say MIT
_IOU = 0.45

Channels = Literal["rgb", "bgr"]


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
    return file_sha256(model_path(), key="look.detector")


def has_cuda() -> bool:
    """Whether the installed onnxruntime was built for CUDA (onnxruntime-gpu)."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


class NudeNetDetector:
    """NudeNet's model in a session of one thread: a result depends on its picture only.

    ``nudenet`` swaps the channels of a file twice, so that its network sees BGR. Both orders are of use, so the caller
    says which one the network is shown: see docs/safety.md.
    """

    labels: tuple[str, ...]

    def __init__(self, *, device: str = "cpu", batch_px: int = 0) -> None:
        """Load the model.

        Args:
            device: cpu or cuda.
            batch_px: pixels of network input that one run may hold; 0: one picture a run. A run of more is filled up
                with black, so that the network always sees one shape, whatever pictures come together.

        Raises:
            ConfigError: onnxruntime opens no CUDA device. By itself it would go on, slowly, on the CPU.
        """
        import cv2
        import onnxruntime
        from nudenet import nudenet as package

        cv2.setNumThreads(1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CUDAExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
        self._session: Any = onnxruntime.InferenceSession(str(model_path()), options, providers=providers)
        if self._session.get_providers()[0] != providers[0]:
            raise ConfigError("look.device: got 'cuda', and onnxruntime opens no such device; set execution.device=cpu")
        self._input: str = self._session.get_inputs()[0].name
        self._batch_px = batch_px
        self.labels = tuple(vars(package)["__labels"])

    def outputs(
        self, pictures: Sequence[np.ndarray], *, input_px: int = 320, channels: Channels = "rgb"
    ) -> Iterator[np.ndarray]:
        """The network's output of each picture, float32 [4 + classes, N].

        Args:
            pictures: uint8 [H, W, 3] each, RGB.
            input_px: side of the square that a picture is laid into; a multiple of 32.
            channels: the order in which the network is shown them.
        """
        size = max(1, self._batch_px // input_px**2)
        for start in range(0, len(pictures), size):
            some = pictures[start : start + size]
            inputs = np.zeros((size, 3, input_px, input_px), np.float32)
            for place, rgb in enumerate(some):
                planes = letterbox(rgb, input_px)[0]
                inputs[place] = planes if channels == "rgb" else planes[::-1]
            (output,) = self._session.run(None, {self._input: inputs})
            yield from output[: len(some)]

    def detect(
        self, rgb: np.ndarray, *, input_px: int = 320, floor: float = FLOOR, channels: Channels = "rgb"
    ) -> list[Box]:
        """Boxes of uint8 [H, W, 3] with a score of at least ``floor``, the highest first.

        Args:
            rgb: uint8 [H, W, 3].
            input_px: side of the square that the picture is laid into; a multiple of 32.
            floor: least score.
            channels: the order in which the network is shown the picture.
        """
        (output,) = self.outputs([rgb], input_px=input_px, channels=channels)
        height, width = rgb.shape[:2]
        return boxes_of(output, self.labels, width_px=width, height_px=height, input_px=input_px, floor=floor)


def letterbox(rgb: np.ndarray, input_px: int) -> np.ndarray:
    """The picture in the upper left of a black square, bilinear: float32 [1, 3, input_px, input_px] in 0..1.

    Equal in every value to padding the picture to a square first and shrinking that, without the memory of the square:
    black is added only as far as the filter reaches.
    """
    import cv2

    height, width = rgb.shape[:2]
    side = max(height, width)
    reach = 2 * -(-side // input_px) + 2
    pad_y, pad_x = min(side - height, reach), min(side - width, reach)
    padded = cv2.copyMakeBorder(rgb, 0, pad_y, 0, pad_x, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    scale = input_px / side
    shrunk = cv2.resize(padded, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)[:input_px, :input_px]
    square = np.zeros((input_px, input_px, 3), np.uint8)
    square[: shrunk.shape[0], : shrunk.shape[1]] = shrunk
    return np.ascontiguousarray(square.transpose(2, 0, 1)[None].astype(np.float32) * np.float32(1 / 255))


def boxes_of(
    output: np.ndarray,
    labels: Sequence[str],
    *,
    width_px: int,
    height_px: int,
    input_px: int,
    floor: float,
    only: Sequence[str] = (),
) -> list[Box]:
    """Boxes of one picture from the network's output.

    Args:
        output: float32 [4 + classes, N]: middle, width, height in pixels of the square; a score a class.
        labels: names of the classes.
        width_px: of the picture.
        height_px: of the picture.
        input_px: side of the square.
        floor: least score.
        only: classes that count; without any, all do.

    Returns:
        Boxes that survive the suppression of overlaps (IoU 0.45, over all classes that count together), the highest
        score first.
    """
    import cv2

    counted = [index for index, label in enumerate(labels) if not only or label in only]
    classes = output[4:][counted]
    scores = classes.max(axis=0)
    chosen = np.flatnonzero(scores >= floor)
    if not len(chosen):
        return []
    best = classes[:, chosen].argmax(axis=0)
    scores = scores[chosen]
    centre_x, centre_y, width, height = output[:4, chosen].astype(np.float64) * (max(width_px, height_px) / input_px)
    # The corner is clipped before the size is, as nudenet does: a box that begins outside keeps its width.
    x = np.clip(centre_x - width / 2, 0, width_px)
    y = np.clip(centre_y - height / 2, 0, height_px)
    rectangles = np.stack([x, y, np.minimum(width, width_px - x), np.minimum(height, height_px - y)], axis=1)
    kept = np.asarray(cv2.dnn.NMSBoxes(rectangles.tolist(), scores.tolist(), floor, _IOU), np.int64).ravel()
    boxes = [Box(labels[counted[best[i]]], float(scores[i]), *map(float, rectangles[i])) for i in kept]
    return sorted(boxes, key=lambda box: (-box.score, box.label, box[2:]))


def class_scores_of(output: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """The largest score of every class over all places, before any suppression of overlaps.

    Args:
        output: float32 [4 + classes, N] of one picture.
        labels: names of the classes.
    """
    return dict(zip(labels, output[4:].max(axis=1).tolist(), strict=True))


def explicit_score(class_scores: Mapping[str, float]) -> tuple[str | None, float]:
    """The explicit class with the highest score, and that score; (None, 0) where no class was scored."""
    explicit = {label: class_scores[label] for label in EXPLICIT if label in class_scores}
    if not explicit:
        return None, 0.0
    best = max(explicit, key=lambda label: (explicit[label], label))
    return best, explicit[best]
