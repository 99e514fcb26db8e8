"""Geometric verification of candidate pairs: on edits of photographs, against scikit-image, and as a stage."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from PIL import Image

from curation.dedup import edges as edges_module
from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.edges import Edges, EdgesConfig, FitQuantiser
from curation.dedup.geometric import MIN_PLACES, places_in_common
from curation.dedup.siftvlad import Keypoints, grey_of, keypoints_of
from tests.copy_edits import EDITS
from tests.curation.dedup.test_stages import direction, vectors_in

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "camera.png", "coins.png", "brick.png", "rocket.jpg")
DESCRIPTOR = DescriptorConfig(duplicate_threshold=0.6, leakage_threshold=0.5)


def photograph(name: str) -> Image.Image:
    picture = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
    picture.thumbnail((400, 400))
    return picture


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    return {name: photograph(name) for name in PHOTOGRAPHS}


def keypoints(picture: Image.Image) -> Keypoints:
    return keypoints_of(grey_of(np.asarray(picture)))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_shows_the_same_at_the_same_places(edit: str, pictures: dict[str, Image.Image]) -> None:
    draw = random.Random(1)
    for name, other in (("astronaut.png", "coffee.png"), ("coins.png", "brick.png")):
        copy = opened(EDITS[edit](pictures[name], pictures[other], draw))
        places = places_in_common(keypoints(copy), keypoints(pictures[name]))
        assert places >= MIN_PLACES, (edit, name)
        assert places_in_common(keypoints(copy), keypoints(pictures["chelsea.png"])) < MIN_PLACES


def test_different_photographs_do_not(pictures: dict[str, Image.Image]) -> None:
    seen = {name: keypoints(picture) for name, picture in pictures.items()}
    for name, one in seen.items():
        for other, two in seen.items():
            assert (places_in_common(one, two) >= MIN_PLACES) == (name == other), (name, other)


def test_skimage_finds_as_many(pictures: dict[str, Image.Image]) -> None:
    """Mutual matching and RANSAC of a similarity transform by scikit-image, on the same keypoints."""
    from skimage.feature import match_descriptors
    from skimage.measure import ransac
    from skimage.transform import SimilarityTransform

    draw = random.Random(2)
    for name, other in (("astronaut.png", "coffee.png"), ("coins.png", "rocket.jpg"), ("camera.png", "brick.png")):
        right = keypoints(pictures[name])
        for edit in ("rotate 12", "crop .67", "pasted"):
            left = keypoints(opened(EDITS[edit](pictures[name], pictures[other], draw)))
            pairs = match_descriptors(left.rows, right.rows, max_ratio=0.85, cross_check=False)
            ends = left.places[pairs[:, 0]], right.places[pairs[:, 1]]
            _, inside = ransac(ends, SimilarityTransform, min_samples=3, residual_threshold=4, max_trials=1000, rng=0)
            assert places_in_common(left, right) == pytest.approx(inside.sum(), rel=0.25)


@pytest.mark.parametrize("edit", ["caption", "disc"])
def test_a_part_that_two_pictures_share_does_not_make_them_copies(edit: str, pictures: dict[str, Image.Image]) -> None:
    seen = []
    for name in ("astronaut.png", "coffee.png", "chelsea.png", "coins.png"):
        seen += [keypoints(opened(EDITS[edit](pictures[name].resize((400, 300)), pictures[name], random.Random(5))))]
    for at, one in enumerate(seen):
        for other in seen[:at]:
            assert places_in_common(one, other) < MIN_PLACES


def test_pictures_without_keypoints_agree_on_nothing() -> None:
    flat = keypoints(Image.new("RGB", (200, 150), "grey"))
    assert places_in_common(flat, flat) == 0
    one_place = Keypoints(np.zeros((60, 2), np.float32), 200 * np.eye(60, 128, dtype=np.uint8), 288)
    assert places_in_common(one_place, one_place) == 0, "one place, however often"


# --- the stage ------------------------------------------------------------------------------------------------------

EDGES = EdgesConfig(num_lists=4, probes=3, reference_probes=4, verify="sift", verify_nearest=3)


def pool(memory_io: Any, pictures: dict[str, Image.Image]) -> None:
    """Copies that the cosine does not see, strangers that it takes for copies, and flat pictures."""
    draw = random.Random(3)
    a, b, c = (pictures[name] for name in ("astronaut.png", "coffee.png", "coins.png"))
    flat = Image.new("RGB", (200, 150), "grey")
    crop, turned = opened(EDITS["crop .67"](a, b, draw)), opened(EDITS["rotate 12"](b, a, draw))
    x, y = direction(0), direction(1)
    shown = {
        0: [(a, x), (b, direction(2, x, 0.7)), (flat, y)],
        1: [(crop, direction(3, x, 0.3)), (turned, direction(4)), (flat, direction(5, y, 0.7))],
        1_000_000: [(pictures["chelsea.png"], direction(6, x, 0.3))],
        2_000_000: [(opened(EDITS["caption"](c, a, draw)), direction(7, x, 0.2)), (a, direction(8, x, 0.8))],
        3_000_000: [(pictures["camera.png"], direction(9, x, 0.55))],
    }
    vectors_in(memory_io, {shard: [vector for _, vector in rows] for shard, rows in shown.items()})
    for shard, rows in shown.items():
        ids = [shard * 1_000_000 + row for row in range(len(rows))]
        blobs = []
        for image_id, (picture, _) in zip(ids, rows, strict=True):
            out = io.BytesIO()
            picture.save(out, "JPEG", quality=90)
            memory_io.blobs[str(image_id)] = out.getvalue()
            blobs.append(len(out.getvalue()))
        memory_io.put(
            "detections",
            shard,
            image_id=ids,
            small_object=[str(image_id) for image_id in ids],
            small_offset=[0] * len(ids),
            small_bytes=blobs,
        )
    FitQuantiser(EDGES).run(memory_io, memory_io.map)


def found(memory_io: Any, config: EdgesConfig, table: str) -> dict[tuple[int, int], bool | None]:
    Edges(config, DESCRIPTOR).run(memory_io, memory_io.map)
    parts = [memory_io.tables[memory_io.part(table, number)] for number in range(config.num_lists)]
    rows = pa.concat_tables(parts).to_pydict()
    first, second, _, verified = rows.values()
    pairs = list(zip(first, second, strict=True))
    assert len(set(pairs)) == len(pairs), "each pair once"
    assert not memory_io.parts("edge_proposals") + memory_io.parts("edge_keypoints")
    return dict(zip(pairs, verified, strict=True))


def test_local_features_decide(memory_io: Any, pictures: dict[str, Image.Image]) -> None:
    pool(memory_io, pictures)
    s1 = 1_000_000
    assert found(memory_io, EDGES, "edges") == {
        (0, 1): False,  # similar vectors, other pictures
        (0, s1): True,  # a crop that the cosine does not see
        (2, s1 + 2): None,  # flat pictures: nobody can tell
    }
    test_picture, other = 2 * s1 * s1 + 1, 3 * s1 * s1
    assert found(memory_io, EDGES, "reference_edges") == {
        (0, test_picture): True,
        (0, other): False,
        (1, test_picture): False,
        (s1, test_picture): True,  # the crop again
    }
    everything = EDGES.model_copy(update={"verify_floor": -0.9, "verify_nearest": 100, "probes": 4})
    assert found(memory_io, everything, "edges")[1, s1 + 1] is True


def test_what_other_settings_left_goes(memory_io: Any, pictures: dict[str, Image.Image]) -> None:
    pool(memory_io, pictures)
    memory_io.put("edge_keypoints", 0, image_id=[0])
    memory_io.put("edge_proposals", 9, a=[0])
    Edges(EDGES.model_copy(update={"verify": "none"}), DESCRIPTOR).run(memory_io, memory_io.map)
    assert not memory_io.parts("edge_proposals") + memory_io.parts("edge_keypoints")


def test_a_picture_that_repeats_itself_cannot_tell(memory_io: Any, pictures: dict[str, Image.Image]) -> None:
    tile = np.asarray(pictures["astronaut.png"].resize((48, 48)))
    wallpaper = Image.fromarray(np.tile(tile, (6, 6, 1)))
    assert len(keypoints(wallpaper).places) > MIN_PLACES
    pool(memory_io, pictures)
    for image_id in (2, 1_000_002):  # the flat ones
        out = io.BytesIO()
        wallpaper.save(out, "PNG")
        memory_io.blobs[str(image_id)] = out.getvalue()
        memory_io.put(
            "detections",
            image_id // 1_000_000,
            image_id=[image_id - 2, image_id - 1, image_id],
            small_object=[str(one) for one in (image_id - 2, image_id - 1, image_id)],
            small_offset=[0] * 3,
            small_bytes=[len(memory_io.blobs[str(one)]) for one in (image_id - 2, image_id - 1, image_id)],
        )
    assert found(memory_io, EDGES, "edges")[2, 1_000_002] is None


def test_lists_and_pieces_do_not_show(
    memory_io: Any, pictures: dict[str, Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool(memory_io, pictures)
    whole = EDGES.model_copy(update={"verify_floor": -0.9, "verify_nearest": 100, "probes": 4})
    wanted = [found(memory_io, whole, table) for table in ("edges", "reference_edges")]
    monkeypatch.setattr(edges_module, "_PIECE_ROWS", 3)
    assert [found(memory_io, whole, table) for table in ("edges", "reference_edges")] == wanted


def test_little_memory_changes_nothing(memory_io: Any, pictures: dict[str, Image.Image]) -> None:
    pool(memory_io, pictures)
    wanted = [found(memory_io, EDGES, table) for table in ("edges", "reference_edges")]
    memory_io.memory_bytes = 1000
    assert [found(memory_io, EDGES, table) for table in ("edges", "reference_edges")] == wanted
