"""Faces: which boxes count, how they grow, and that blurring changes their pixels for good and no others."""

import json
import tarfile

import numpy as np
import pytest

from curation.safety.detector import Box
from curation.safety.faces import YuNet, blur_faces, dilate, merged, nudenet_faces, passes
from training.data.pixels import decode


def face(x: float, y: float, w: float, h: float, score: float = 0.9) -> Box:
    return Box("FACE", score, x, y, w, h)


def test_only_pixels_of_boxes_change() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    before = rgb.copy()
    boxes = [face(10.4, 20.6, 30.2, 40.1), face(150, 110, 50, 50), face(70, 5, 1, 1), face(-20, -20, 25, 25)]
    out = blur_faces(rgb, boxes)
    assert np.array_equal(rgb, before)
    inside = np.zeros((120, 160), bool)
    inside[20:61, 10:41] = inside[110:, 150:] = inside[5:6, 70:71] = inside[:5, :5] = True
    changed = (out != rgb).any(axis=2)
    assert not changed[~inside].any()
    assert changed[20:61, 10:41].mean() > 0.99
    assert np.array_equal(out, blur_faces(rgb, boxes))


def test_boxes_outside_the_picture_change_nothing() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert np.array_equal(blur_faces(rgb, [face(40, 5, 10, 10), face(5, -30, 10, 10), face(5, 5, 0, 9)]), rgb)
    assert np.array_equal(blur_faces(rgb, []), rgb)


@pytest.mark.parametrize("side", [24, 90, 300])
def test_what_is_left_of_a_face_is_too_little_to_sharpen(side: int) -> None:
    """Stripes of a sixth of the box and finer lose nearly all contrast: nothing finer than the cells is left."""
    stripes = (np.arange(side) // max(1, side // 24) % 2 * 255).astype(np.uint8)
    rgb = np.repeat(np.repeat(stripes[None, :, None], side, axis=0), 3, axis=2)
    out = blur_faces(rgb, [face(0, 0, side, side)])
    assert out[:, side // 6 : -side // 6].std() < 0.1 * rgb.std()


def test_dilation_grows_about_the_middle_and_stops_at_the_edge() -> None:
    box = dilate(face(40, 40, 20, 10), 1.5, width_px=100, height_px=100)
    assert box[2:] == (35.0, 37.5, 30.0, 15.0)
    assert dilate(face(0, 90, 20, 20), 2.0, width_px=100, height_px=100)[2:] == (0.0, 80.0, 30.0, 20.0)


def test_one_box_a_face() -> None:
    high, low, other = face(10, 10, 20, 20, 0.9), face(11, 10, 20, 21, 0.7), face(60, 60, 20, 20, 0.8)
    assert merged([low, other, high]) == [high, other]
    assert merged([]) == []
    assert merged([low]) == [low]


def test_nudenets_face_classes_only() -> None:
    boxes = [
        Box("FACE_MALE", 0.5, 0, 0, 1, 1),
        Box("FACE_FEMALE", 0.2, 0, 0, 1, 1),
        Box("BELLY_EXPOSED", 0.9, 0, 0, 1, 1),
    ]
    assert nudenet_faces(boxes, 0.3) == boxes[:1]


def test_small_boxes_need_less_score() -> None:
    assert passes(20, 0.6)
    assert not passes(50, 0.6)
    assert passes(50, 0.8)
    assert not passes(200, 0.8)


def test_yunet_on_hostile_shapes(shared_data) -> None:
    yunet = YuNet(str(shared_data / "weights" / "yunet_n_dynamic.onnx"), scales=(1.0, 2.0))
    for shape in ((1, 1), (3, 2), (1, 3000), (65_500, 4)):
        found = yunet.detect(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
        assert np.isfinite([box[1:] for box in found]).all()
        assert all(box.w_px > 0 and box.h_px > 0 for box in found)


def test_yunet_covers_nearly_all_loose_head_boxes(shared_data) -> None:
    """The 28 Caltech heads; research measured 28 of 28 covered at least half by boxes grown 1.5 times."""
    yunet = YuNet(str(shared_data / "weights" / "yunet_n_dynamic.onnx"), scales=(1.0, 2.0))
    with tarfile.open(shared_data / "faces_boxes.tar") as tar:
        import pandas as pd

        rows = pd.read_csv(tar.extractfile("manifest.csv"))
        rows = rows[rows.file.str.startswith("caltech")].iloc[::4]
        covered = []
        for row in rows.itertuples():
            rgb = decode(tar.extractfile(row.file).read()).rgb
            height, width = rgb.shape[:2]
            mask = np.zeros((height, width), bool)
            for found in merged(yunet.detect(rgb)):
                box = dilate(found, 1.5, width_px=width, height_px=height)
                mask[int(box.y_px) : int(box.y_px + box.h_px), int(box.x_px) : int(box.x_px + box.w_px)] = True
            for x, y, w, h in json.loads(row.boxes_xywh_json):
                covered.append(mask[int(y) : int(y + h), int(x) : int(x + w)].mean() >= 0.5)
    assert len(covered) == 7
    assert all(covered)
