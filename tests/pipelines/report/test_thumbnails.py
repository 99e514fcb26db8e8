import base64
from typing import Any

import numpy as np
import pytest

from pipelines.report.thumbnails import HEIGHT_PX, MAX_WIDTH_PX, chosen, data_uri, dropped
from training.data.pixels import decode, encode_jpeg


def pixels_of(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return decode(base64.b64decode(body)).rgb


@pytest.mark.parametrize(
    ("size", "expected"), [((400, 300), (96, 72)), ((300, 900), (80, 240)), ((40, 50), (40, 50)), ((2000, 3), (96, 1))]
)
def test_a_picture_is_made_to_fit_and_never_enlarged(size: tuple[int, int], expected: tuple[int, int]):
    rgb = np.full((*size, 3), 90, np.uint8)
    small = pixels_of(data_uri(encode_jpeg(rgb, 90)))
    assert small.shape[:2] == expected
    assert small.shape[0] <= HEIGHT_PX
    assert small.shape[1] <= MAX_WIDTH_PX


def test_a_hidden_picture_keeps_no_detail():
    rgb = np.kron(np.indices((96, 96)).sum(0) % 2, np.ones((2, 2)))[:, :, None] * np.full(3, 255)
    data = encode_jpeg(rgb.astype(np.uint8), 95)
    seen, hidden = pixels_of(data_uri(data)), pixels_of(data_uri(data, hide=True))
    assert seen.shape == hidden.shape
    assert int(hidden.max()) - int(hidden.min()) <= 4  # a fine pattern is one grey in every cell


def test_what_does_not_decode_has_no_picture():
    assert data_uri(b"no picture") == ""


def test_chosen_and_dropped_stand_beside_what_they_were_held_against(small_run: Any):
    connection, read = small_run.connect(), small_run.store("pool").read_range
    inside = chosen(connection, read, 50)
    assert len(inside) == 6
    assert {(p.stage, p.other_id, bool(p.other_source)) for p in inside} == {
        ("dogs", 2_000_000_000_000, True),
        ("flowers", None, False),
    }
    assert len(chosen(connection, read, 2)) == 2
    outside = {(p.stage, p.reason): p for p in dropped(connection, read, 50)}
    near = outside["near", "near_duplicate"]
    assert (near.image_id, near.other_id) == (3_000_000_000_004, 3_000_000_000_000)
    assert near.other_source
    assert outside["leakage", "leak"].other_id == 1
    assert outside["safety", "too_small"].other_id is None
    small_run.match_a_test_picture()
    matched = {(p.stage, p.reason): p for p in dropped(small_run.connect(), read, 50)}["selection", "test_match"]
    assert (matched.image_id, matched.other_id, bool(matched.other_source)) == (1_000_000_000_000, 0, True)
    assert not {stage for stage, _ in outside} & {"screened", "fetched"}  # no pixels were ever seen
