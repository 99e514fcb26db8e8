"""Faces: which boxes count, how they grow, and that blurring changes their pixels for good and no others."""

import json
import tarfile

import numpy as np
import pytest

from curation.safety.detector import Box, NudeNetDetector
from curation.safety.faces import (
    LEAST_PSNR_DB,
    NORMAL_PX,
    NUDENET_THRESHOLDS,
    YUNET_THRESHOLDS,
    NudeNetFaces,
    YuNet,
    blur_faces,
    dilate,
    encode_blurred,
    merged,
    passes,
    psnr_db,
    unit_of,
)
from training.data.pixels import decode, encode_jpeg


def yunet_file(shared_data) -> str:
    return str(shared_data / "weights" / "yunet_n_dynamic.onnx")


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
    """Stripes of a sixth of the box and finer are gone; of its two halves a smooth slope is left, without an edge."""
    for width in (max(1, side // 24), side // 6):
        stripes = (np.arange(side) // width % 2 * 255).astype(np.uint8)
        rgb = np.repeat(np.repeat(stripes[None, :, None], side, axis=0), 3, axis=2)
        assert blur_faces(rgb, [face(0, 0, side, side)]).std() < 0.05 * rgb.std()
    halves = np.zeros((side, side, 3), np.uint8)
    halves[:, side // 2 :] = 255
    out = blur_faces(halves, [face(0, 0, side, side)])[side // 2, :, 0].astype(int)
    assert np.abs(np.diff(out)).max() <= 255 / (side / 4)


def test_dilation_grows_about_the_middle_and_stops_at_the_edge() -> None:
    box = dilate(face(40, 40, 20, 10), 1.5, width_px=100, height_px=100)
    assert box[2:] == (35.0, 37.5, 30.0, 15.0)
    assert dilate(face(0, 90, 20, 20), 2.0, width_px=100, height_px=100)[2:] == (0.0, 80.0, 30.0, 20.0)


def test_one_box_a_face() -> None:
    high, low, other = face(10, 10, 20, 20, 0.9), face(11, 10, 20, 21, 0.7), face(60, 60, 20, 20, 0.8)
    assert merged([low, other, high]) == [high, other]
    assert merged([]) == []
    assert merged([low]) == [low]


def test_a_score_is_judged_by_the_size_of_its_box() -> None:
    limits = (0.6, 0.4, 0.7, 0.9)
    for side, least in ((15.9, 0.6), (16, 0.4), (31.9, 0.4), (32, 0.7), (63.9, 0.7), (64, 0.9), (5000, 0.9)):
        assert passes(face(0, 0, side, 9000, least), limits)
        assert passes(face(0, 0, 9000, side, least), limits)
        assert not passes(face(0, 0, side, 9000, least - 0.01), limits)
    for limits in (NUDENET_THRESHOLDS, YUNET_THRESHOLDS):
        assert max(limits[:3]) < limits[3]  # false boxes on animals are large


def test_boxes_of_a_large_picture_are_judged_as_at_its_normal_size() -> None:
    box = face(0, 0, 100, 100, 0.5)
    assert not passes(box, (0.6, 0.4, 0.7, 0.9))
    assert passes(box, (0.6, 0.4, 0.7, 0.9), unit=unit_of(np.zeros((600, 2560, 3), np.uint8)))  # 25 px
    assert unit_of(np.zeros((NORMAL_PX, 40, 3), np.uint8)) == 1


def test_a_large_photograph_keeps_the_faces_of_a_small_one(shared_data) -> None:
    """The same photographs, enlarged four times: no detail is gained, and none may be lost."""
    import cv2

    yunet = YuNet(yunet_file(shared_data), scales=(1.0, 2.0), thresholds=YUNET_THRESHOLDS)
    found = {1: 0, 4: 0}
    with tarfile.open(shared_data / "faces_boxes.tar") as tar:
        for member in [m for m in tar.getmembers() if not m.name.endswith(".csv")][::24]:
            rgb = decode(tar.extractfile(member).read()).rgb
            for times in found:
                large = cv2.resize(rgb, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
                found[times] += len(merged(yunet.faces([large])[0]))
    assert found[1] >= 10
    assert found[4] >= 0.9 * found[1]


def test_the_rest_of_a_blurred_picture_keeps_40_db_whatever_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)  # the worst there is
    boxes = [face(20, 20, 60, 60)]
    blurred = blur_faces(noise, boxes)
    outside = np.ones((160, 200), bool)
    outside[20:80, 20:80] = False
    kept = decode(encode_blurred(blurred, boxes, 90)).rgb
    assert psnr_db(kept[outside], noise[outside]) >= LEAST_PSNR_DB
    assert psnr_db(decode(encode_jpeg(blurred, 90)).rgb[outside], noise[outside]) < 25  # what 4:2:0 would give
    flat = np.full((40, 40, 3), 90, np.uint8)
    assert encode_blurred(flat, boxes, 90) == encode_jpeg(flat, 90, subsampling="444")  # no higher than is needed
    assert encode_blurred(blurred, [face(0, 0, 200, 160)], 90) == encode_jpeg(blurred, 90, subsampling="444")


def test_psnr() -> None:
    assert psnr_db(np.full(9, 10, np.uint8), np.full(9, 35, np.uint8)) == pytest.approx(20 * np.log10(255 / 25))
    assert psnr_db(np.zeros(3, np.uint8), np.zeros(3, np.uint8)) == psnr_db(*np.zeros((2, 0), np.uint8)) == np.inf


@pytest.fixture(scope="module")
def network() -> NudeNetDetector:
    return NudeNetDetector()


def test_nudenet_looks_at_several_sizes_but_enlarges_little(network) -> None:
    from skimage import data

    class Spy:
        labels = network.labels
        seen: list = []  # noqa: RUF012

        def outputs(self, pictures, *, input_px):
            self.seen.append((input_px, [rgb.shape[:2] for rgb in pictures]))
            return network.outputs(pictures, input_px=input_px)

    astronaut = data.astronaut()
    small = astronaut[::4, ::4]
    boxes = NudeNetFaces(Spy(), input_px=(640, 320, 960), thresholds=NUDENET_THRESHOLDS).faces([small, astronaut])
    assert Spy.seen == [(320, [(128, 128), (512, 512)]), (640, [(512, 512)]), (960, [(512, 512)])]
    assert {box.label for one in boxes for box in one} <= {"FACE_FEMALE", "FACE_MALE"}
    assert len(merged(boxes[1])) == 1
    alone = NudeNetFaces(network, input_px=(320, 640, 960), thresholds=NUDENET_THRESHOLDS)
    assert alone.faces([small]) + alone.faces([astronaut]) == boxes
    assert alone.faces([]) == []


def test_detectors_do_not_find_what_they_blurred(network, shared_data) -> None:
    """A few photos; `make bench NAME=faces` looks at all and counts."""
    yunet = YuNet(yunet_file(shared_data), scales=(1.0, 2.0), thresholds=YUNET_THRESHOLDS)
    nudenet = NudeNetFaces(network, input_px=(320, 640), thresholds=NUDENET_THRESHOLDS)
    num_faces = num_again = 0
    with tarfile.open(shared_data / "faces_boxes.tar") as tar:
        for member in [m for m in tar.getmembers() if not m.name.endswith(".csv")][::12]:
            rgb = decode(tar.extractfile(member).read()).rgb
            height, width = rgb.shape[:2]
            found = merged([*yunet.faces([rgb])[0], *nudenet.faces([rgb])[0]])
            grown = [dilate(box, 1.5, width_px=width, height_px=height) for box in found]
            blurred = blur_faces(rgb, grown)
            again = [*yunet.faces([blurred])[0], *nudenet.faces([blurred])[0]]
            num_faces += len(grown)
            num_again += sum(
                any(
                    box.x_px <= one.x_px + one.w_px / 2 <= box.x_px + box.w_px
                    and box.y_px <= one.y_px + one.h_px / 2 <= box.y_px + box.h_px
                    and one.w_px * one.h_px >= box.w_px * box.h_px / 4
                    for one in again
                )
                for box in grown
            )
    assert num_faces >= 50
    assert num_again <= 0.02 * num_faces


def test_yunet_on_hostile_shapes(shared_data) -> None:
    yunet = YuNet(yunet_file(shared_data), scales=(1.0, 2.0), thresholds=YUNET_THRESHOLDS)
    for shape in ((1, 1), (3, 2), (1, 3000), (65_500, 4)):
        (found,) = yunet.faces([np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)])
        assert np.isfinite([box[1:] for box in found]).all()
        assert all(box.w_px > 0 and box.h_px > 0 for box in found)


def test_yunet_covers_nearly_all_loose_head_boxes(shared_data) -> None:
    """The 28 Caltech heads; research measured 28 of 28 covered at least half by boxes grown 1.5 times."""
    yunet = YuNet(yunet_file(shared_data), scales=(1.0, 2.0), thresholds=YUNET_THRESHOLDS)
    with tarfile.open(shared_data / "faces_boxes.tar") as tar:
        import pandas as pd

        rows = pd.read_csv(tar.extractfile("manifest.csv"))
        rows = rows[rows.file.str.startswith("caltech")].iloc[::4]
        covered = []
        for row in rows.itertuples():
            rgb = decode(tar.extractfile(row.file).read()).rgb
            height, width = rgb.shape[:2]
            mask = np.zeros((height, width), bool)
            for found in merged(yunet.faces([rgb])[0]):
                box = dilate(found, 1.5, width_px=width, height_px=height)
                mask[int(box.y_px) : int(box.y_px + box.h_px), int(box.x_px) : int(box.x_px + box.w_px)] = True
            for x, y, w, h in json.loads(row.boxes_xywh_json):
                covered.append(mask[int(y) : int(y + h), int(x) : int(x + w)].mean() >= 0.5)
    assert len(covered) == 7
    assert all(covered)
