import numpy as np
import pytest
from nudenet import NudeDetector
from skimage import data

from curation.safety.detector import Box, NudeNetDetector, explicit_score
from curation.safety.faces import YuNet, blur_faces, dilate, nudenet_faces, passes
from curation.safety.look import LookConfig, Looker, LookStage
from curation.safety.verdict import SafetyConfig, judge
from curation.stage import ConfigError


@pytest.fixture(scope="module")
def detector() -> NudeNetDetector:
    return NudeNetDetector()


def test_scores_and_boxes_are_nudenets_own(detector):
    own = NudeDetector()
    for rgb in (data.astronaut(), data.chelsea(), data.coffee(), data.camera()[:, :, None].repeat(3, 2)):
        expected = sorted(
            (item["class"], item["score"], *item["box"]) for item in own.detect(np.ascontiguousarray(rgb[:, :, ::-1]))
        )
        found = sorted((box.label, box.score, *box[2:]) for box in detector.detect(rgb))
        assert [row[0] for row in found] == [row[0] for row in expected]
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine[1:], theirs[1:], atol=1e-3)


def test_the_astronauts_face_is_found_and_blurred(detector):
    rgb = data.astronaut()
    faces = nudenet_faces(detector.detect(rgb), 0.3)
    assert len(faces) == 1
    box = dilate(faces[0], 1.5, width_px=512, height_px=512)
    x, y = box.x_px + box.w_px / 2, box.y_px + box.h_px / 2
    assert abs(x - 222) < 40
    assert abs(y - 110) < 60
    blurred = blur_faces(rgb, [box])
    assert not nudenet_faces(detector.detect(blurred), 0.3)


def test_blur_changes_the_box_and_nothing_else():
    rgb = data.chelsea()
    box = Box("FACE", 1.0, 100.2, 50.7, 80.0, 60.0)
    changed = (blur_faces(rgb, [box]) != rgb).any(axis=2)
    assert changed[51:111, 101:180].mean() > 0.9
    changed[50:111, 100:181] = False
    assert not changed.any()
    flat = blur_faces(rgb, [box])[50:111, 100:181].astype(float)
    assert np.abs(np.diff(flat, axis=1)).mean() < 0.2 * np.abs(np.diff(rgb[50:111, 100:181].astype(float), axis=1)).mean()


def test_dilation_stays_inside():
    box = dilate(Box("FACE", 1.0, 0.0, 90.0, 20.0, 20.0), 1.5, width_px=100, height_px=100)
    assert box[2:] == (0.0, 85.0, 25.0, 15.0)


def test_yunet_asks_more_of_large_boxes():
    assert passes(20, 0.6)
    assert not passes(60, 0.6)
    assert not passes(200, 0.8)


def test_yunet_finds_the_astronaut_by_file(shared_data):
    path = str(shared_data / "weights" / "yunet_n_dynamic.onnx")
    boxes = YuNet(path, scales=(1.0,)).detect(data.astronaut())
    assert len(boxes) == 1
    found, faces = Looker(LookConfig(yunet=path)).boxes(data.astronaut())
    assert len(faces) == 2
    assert any(box.label == "FACE_FEMALE" for box in found)
    assert LookConfig(yunet=path).detection_values() != LookConfig().detection_values()


def test_a_missing_weights_file_is_one_line():
    with pytest.raises(ConfigError, match=r"look\.yunet: got 'nowhere\.onnx', which is no file"):
        LookStage(LookConfig(yunet="nowhere.onnx")).preflight()


def row(**values):
    return {"ok": True, "reason": None, "width_px": 400, "height_px": 300, "luma_std": 50.0} | values


def test_verdicts_in_their_order():
    config = SafetyConfig()

    def judged(hashes, boxes=(), is_reference=False):
        return judge(hashes, list(boxes), config, is_reference=is_reference)

    explicit = {"label": "FEMALE_BREAST_EXPOSED", "score": 0.5}
    assert judged(row()) == (None, None, None)
    assert judged(row(ok=False, reason="decode_corrupt"))[0] == "decode_corrupt"
    assert judged(row(width_px=20)) == ("too_small", 20.0, 32.0)
    assert judged(row(width_px=4000)) == ("aspect", 4000 / 300, 8.0)
    assert judged(row(luma_std=0.5)) == ("blank", 0.5, 2.0)
    assert judged(row(), [explicit]) == ("nsfw", 0.5, 0.4)
    assert judged(row(), [{**explicit, "score": 0.3}]) == (None, 0.3, 0.4)
    assert judged(row(), [{"label": "MALE_BREAST_EXPOSED", "score": 0.9}]) == (None, None, None)
    assert judged(row(width_px=20), [explicit], is_reference=True)[0] is None
    assert judged(row(ok=False, reason="decode_corrupt"), is_reference=True)[0] == "decode_corrupt"


def test_explicit_score_takes_the_highest_explicit_class():
    boxes = [Box("FACE_MALE", 0.9, 0, 0, 1, 1), Box("ANUS_EXPOSED", 0.3, 0, 0, 1, 1)]
    assert explicit_score(boxes) == ("ANUS_EXPOSED", 0.3)
    assert explicit_score(boxes[:1]) == (None, 0.0)
