"""NudeNet's model with our letterbox and decoding: equal to what nudenet itself returns for the same array."""

import tarfile

import cv2
import numpy as np
import pytest

from curation.safety.detector import (
    EXPLICIT,
    FACES,
    NudeNetDetector,
    boxes_of,
    class_scores_of,
    explicit_score,
    letterbox,
)
from training.data.pixels import decode


@pytest.fixture(scope="module")
def detector() -> NudeNetDetector:
    return NudeNetDetector()


def theirs(package_detector, rgb: np.ndarray) -> list[tuple[str, float, list[int]]]:
    return [(found["class"], found["score"], found["box"]) for found in package_detector.detect(rgb)]


@pytest.mark.parametrize("input_px", [320, 640])
def test_equal_to_nudenet_on_people(detector, shared_data, input_px) -> None:
    from nudenet import NudeDetector

    package_detector = NudeDetector(inference_resolution=input_px)
    num_boxes = 0
    with tarfile.open(shared_data / "faces_boxes.tar") as tar:
        for member in [m for m in tar.getmembers() if not m.name.endswith(".csv")][:: 6 if input_px == 320 else 24]:
            rgb = decode(tar.extractfile(member).read()).rgb
            ours = [box for box in detector.detect(rgb, input_px=input_px) if box.score >= 0.25]  # nudenet's own floor
            expected = theirs(package_detector, rgb)
            assert [box.label for box in ours] == [label for label, _, _ in expected]
            for box, (_, score, corners) in zip(ours, expected, strict=True):
                assert box.score == pytest.approx(score, abs=1e-3)
                assert [int(value) for value in box[2:]] == corners  # nudenet cuts the fractions off
            num_boxes += len(expected)
    assert num_boxes >= 5


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 500), (700, 3), (2000, 20), (33, 1501), (320, 320), (319, 321), (500, 800), (801, 800)]
)
def test_letterbox_equals_padding_to_a_square(shape) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    side = max(shape)
    square = np.zeros((side, side, 3), np.uint8)
    square[: shape[0], : shape[1]] = rgb
    expected = cv2.dnn.blobFromImage(square, 1 / 255.0, (320, 320), swapRB=False, crop=False)
    assert np.array_equal(letterbox(rgb, 320), expected)


def test_a_long_strip_needs_no_square(detector) -> None:
    strip = np.full((4, 65_500, 3), 90, np.uint8)  # its square would hold 12 GB
    assert detector.detect(strip) == []


def test_a_result_depends_on_its_picture_only(detector) -> None:
    from skimage import data

    astronaut = data.astronaut()
    first = detector.detect(astronaut)
    detector.detect(data.coffee())
    assert detector.detect(astronaut) == first == NudeNetDetector().detect(astronaut)
    assert any(box.label in FACES and box.score > 0.5 for box in first)
    assert [box.score for box in first] == sorted((box.score for box in first), reverse=True)


def test_boxes_are_clipped_floored_and_free_of_overlaps() -> None:
    output = np.zeros((4 + 2, 5), np.float32)
    output[:4, 0] = (100, 100, 50, 50)
    output[:4, 1] = (102, 101, 50, 50)  # the same thing, of another class
    output[:4, 2] = (5, 300, 40, 100)  # hangs over two edges
    output[:4, 3] = (250, 50, 10, 10)  # below the floor
    output[4, :4] = (0.9, 0.3, 0.5, 0.19)
    output[5, 1] = 0.8
    found = boxes_of(output, ("a", "b"), width_px=640, height_px=640, input_px=320, floor=0.2)
    assert [(box.label, round(box.score, 2)) for box in found] == [("a", 0.9), ("a", 0.5)]
    assert found[0][2:] == (150.0, 150.0, 100.0, 100.0)
    assert found[1][2:] == (0.0, 500.0, 80.0, 140.0)
    nothing = boxes_of(np.zeros((6, 3), np.float32), ("a", "b"), width_px=9, height_px=9, input_px=320, floor=0.2)
    assert nothing == []


def test_only_classes_that_count_are_boxes_and_suppress_others() -> None:
    output = np.zeros((4 + 3, 2), np.float32)
    output[:4] = np.array([[100, 102], [100, 101], [50, 50], [50, 50]])
    output[4, 0], output[5, 1], output[6, 1] = 0.9, 0.3, 0.25
    sizes = {"width_px": 320, "height_px": 320, "input_px": 320, "floor": 0.2}
    labels = ("covered", "face", "other face")
    assert [box.label for box in boxes_of(output, labels, **sizes)] == ["covered"]
    (box,) = boxes_of(output, labels, only=labels[1:], **sizes)
    assert (box.label, round(box.score, 2)) == ("face", 0.3)
    assert boxes_of(output, labels, only=("other face",), **sizes)[0].label == "other face"
    assert class_scores_of(output, labels) == pytest.approx({"covered": 0.9, "face": 0.3, "other face": 0.25})


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_class_scores_are_nudenets_own(detector, shared_data, channels) -> None:
    """Of 50 pictures of all kinds; `make bench NAME=nsfw` compares 200. nudenet shows an array as it is given."""
    from nudenet import NudeDetector
    from nudenet import nudenet as package

    own = NudeDetector()
    with tarfile.open(shared_data / "pool_imagenet_300.tar") as tar:
        for member in [m for m in tar.getmembers() if not m.name.endswith(".csv")][::12]:
            rgb = decode(tar.extractfile(member).read()).rgb
            shown = rgb if channels == "rgb" else np.ascontiguousarray(rgb[:, :, ::-1])
            (expected,) = own.onnx_session.run(None, {own.input_name: package._read_image(shown, 320)[0]})
            (output,) = detector.outputs([rgb], channels=channels)
            ours = class_scores_of(output, detector.labels)
            assert list(ours) == vars(package)["__labels"]
            assert list(ours.values()) == pytest.approx(expected[0, 4:].max(axis=1).tolist(), abs=1e-3)


def test_a_batch_gives_what_single_pictures_give(detector) -> None:
    from skimage import data

    pictures = [data.astronaut(), data.coffee(), data.chelsea(), data.astronaut()[:90, :400], data.coffee()[::2]]
    batches = NudeNetDetector(batch_px=3 * 320**2)  # runs of 3 and of 2, filled up
    single = [next(iter(detector.outputs([rgb]))) for rgb in pictures]
    for one, many in zip(single, batches.outputs(pictures), strict=True):
        assert np.abs(one[4:] - many[4:]).max() <= 1e-5
        assert np.abs(one[:4] - many[:4]).max() <= 1e-2  # px
    assert list(detector.outputs([])) == []


def test_explicit_score() -> None:
    assert explicit_score({}) == (None, 0.0)
    assert explicit_score({"FACE_MALE": 0.9, "MALE_BREAST_EXPOSED": 0.8}) == (None, 0.0)
    assert explicit_score({EXPLICIT[0]: 0.3, EXPLICIT[3]: 0.4, "FACE_MALE": 0.9}) == (EXPLICIT[3], 0.4)
