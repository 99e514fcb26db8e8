"""Look: one pass over real pictures gives rows for all, blurred versions where there are faces, and small ones."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError

from curation.dedup.hashes import dhash, pdq, phash, pixel_sha256
from curation.safety.detector import EXPLICIT, model_path
from curation.safety.faces import LEAST_PSNR_DB, psnr_db
from curation.safety.look import LookConfig, LookStage
from curation.schema import TABLES
from training.config import ConfigError
from training.data.pixels import decode


class Tar:
    """Members one after another; its name tells its content."""

    def __init__(self, folder: str, objects: dict[str, bytes]) -> None:
        self.folder, self.objects, self.data, self.names = folder, objects, b"", []

    def add(self, name: str, data: bytes) -> int:
        self.names.append(name)
        self.data += data
        return len(self.data) - len(data)

    def close(self) -> str:
        if not self.names:
            return ""
        path = f"{self.folder}/{pixel_sha256(np.frombuffer(self.data, np.uint8))[:16]}.tar"
        self.objects[path] = self.data
        return path


class Shard:
    """What a stage may touch, held in memory."""

    def __init__(self, files: dict[int, bytes], only: list[int] | None = None) -> None:
        self.objects = {"bytes/a.tar": b"".join(files.values())}
        self.tars: dict[str, Tar] = {}
        images, offset = [], 0
        for image_id, data in files.items():
            images.append({"image_id": image_id, "object": "bytes/a.tar", "offset": offset, "num_bytes": len(data)})
            offset += len(data)
        self.images = pa.Table.from_pylist(images, schema=TABLES["images"].schema)
        ids = list(files) if only is None else only
        self.rows = pa.table({"image_id": pa.array(ids, pa.int64()), "sha256": [f"sha{i}" for i in ids]})
        self.takedowns = TABLES["takedowns"].schema.empty_table()

    def table(self, name: str, columns: Any = None) -> pa.Table:
        if name == "takedowns":
            return self.takedowns
        assert name == "images"
        return self.images.select(columns)

    def blob(self, path: str, offset: int, size: int, root: str = "pool") -> bytes:
        return self.objects[path][offset : offset + size]

    def tar(self, folder: str, root: str = "pool") -> Tar:
        self.tars[folder] = Tar(folder, self.objects)
        return self.tars[folder]


def encoded(rgb: np.ndarray, name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, name, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[int, bytes]:
    from skimage import data

    astronaut = data.astronaut()
    return {
        1_000_000: encoded(astronaut, "JPEG", quality=95),
        1_000_001: encoded(data.coffee()),
        1_000_003: encoded(astronaut)[:5000],
        1_000_004: b"<html>",
        1_000_005: encoded(np.zeros((1, 1, 3), np.uint8)),
        1_000_006: encoded(np.zeros((3, 65_500, 3), np.uint8)),
        1_000_009: encoded(data.chelsea()[:100, :140]),
    }


@pytest.fixture(scope="module")
def looked(files):
    shard = Shard(files)
    return shard, LookStage(LookConfig()).run(1, shard)


def test_one_row_a_picture_in_order_with_the_schema(files, looked) -> None:
    _, made = looked
    for name in ("hashes", "detections"):
        assert made[name].schema.equals(TABLES[name].schema)
        assert made[name]["image_id"].to_pylist() == list(files)
        assert made[name]["sha256"].to_pylist() == [f"sha{i}" for i in files]
    assert made["hashes"]["reason"].to_pylist() == [
        None, None, "decode_truncated", "decode_unsupported", None, None, None,
    ]  # fmt: skip
    assert made["hashes"]["ok"].to_pylist() == [True, True, False, False, True, True, True]


def test_hashes_are_of_the_original(files, looked) -> None:
    for row in looked[1]["hashes"].to_pylist():
        if row["ok"]:
            picture = decode(files[row["image_id"]])
            assert row["phash"] == phash(picture.rgb)
            assert row["dhash"] == dhash(picture.rgb)
            assert (row["pdq"], row["pdq_quality"]) == pdq(picture.rgb)
            assert row["pixel_sha256"] == pixel_sha256(picture.rgb)
            assert (row["width_px"], row["height_px"]) == (picture.width_px, picture.height_px)
            assert row["format"] == picture.format
        else:
            assert row["phash"] is row["pixel_sha256"] is row["width_px"] is None
            assert row["pdq"] is row["pdq_quality"] is None


def test_faces_are_blurred_in_both_versions_and_nowhere_else(files, looked) -> None:
    shard, made = looked
    rows = {row["image_id"]: row for row in made["detections"].to_pylist()}
    row = rows[1_000_000]
    assert row["num_faces"] == len(row["faces"]) == 1
    blurred = decode(shard.blob(row["blurred_object"], row["blurred_offset"], row["blurred_bytes"]))
    original = decode(files[1_000_000])
    assert blurred.rgb.shape == original.rgb.shape
    face = row["faces"][0]
    inside = np.zeros(original.rgb.shape[:2], bool)
    x, y = int(face["x_px"]), int(face["y_px"])
    inside[y : int(y + face["h_px"]) + 2, x : int(x + face["w_px"]) + 2] = True
    assert inside[60:200, 180:280].mean() > 0.6  # where her face is
    difference = np.abs(blurred.rgb.astype(int) - original.rgb).mean(axis=2)
    assert difference[inside].mean() > 10
    assert np.median(difference[~inside]) < 3  # what encoding again costs
    small = decode(shard.blob(row["small_object"], row["small_offset"], row["small_bytes"]))
    assert min(small.rgb.shape[:2]) == 288
    for image_id, other in rows.items():
        if image_id != 1_000_000:
            assert other["num_faces"] == 0
            assert other["blurred_object"] is other["blurred_offset"] is other["blurred_bytes"] is None
    assert shard.tars["blurred"].names == ["000000000001000000.jpg"]
    assert shard.objects["bytes/a.tar"] == b"".join(files.values())  # what has no face is exported from here, as it is


def test_small_versions_are_never_enlarged_and_failures_have_none(looked) -> None:
    shard, made = looked
    shapes = {}
    for row in made["detections"].to_pylist():
        if row["small_object"] is not None:
            data = shard.blob(row["small_object"], row["small_offset"], row["small_bytes"])
            shapes[row["image_id"]] = decode(data).rgb.shape[:2]
        else:
            assert row["small_offset"] is row["small_bytes"] is row["nsfw_label"] is None
            assert (row["boxes"], row["faces"], row["num_faces"], row["nsfw_score"]) == ([], [], 0, 0.0)
            assert row["class_scores"] == []
    assert shapes == {
        1_000_000: (288, 288),
        1_000_001: (288, 432),
        1_000_005: (1, 1),
        1_000_006: (3, 65_500),
        1_000_009: (100, 140),
    }
    names = shard.tars["small"].names
    assert names == sorted(names)
    assert names[0] == "000000000001000000.jpg"


def test_a_row_does_not_depend_on_the_rows_beside_it(files, looked) -> None:
    alone = LookStage(LookConfig()).run(1, Shard(files, only=[1_000_001]))
    whole = looked[1]
    position = list(files).index(1_000_001)
    assert alone["hashes"].to_pylist() == whole["hashes"].slice(position, 1).to_pylist()
    places = {"small_object", "small_offset"}
    left, right = alone["detections"].to_pylist()[0], whole["detections"].slice(position, 1).to_pylist()[0]
    assert {k: v for k, v in left.items() if k not in places} == {k: v for k, v in right.items() if k not in places}


def test_twice_the_same_bytes(files, looked) -> None:
    shard = Shard(files)
    again = LookStage(LookConfig()).run(1, shard)
    assert all(again[name].equals(looked[1][name]) for name in again)
    assert shard.objects == looked[0].objects


def test_every_class_is_scored_and_the_worst_explicit_one_is_named(looked) -> None:
    for row in looked[1]["detections"].to_pylist():
        if row["small_object"] is None:
            continue
        scores = dict(row["class_scores"])
        assert len(scores) == 18
        assert all(0 <= score <= 1 for score in scores.values())
        assert row["nsfw_score"] == scores[row["nsfw_label"]] == max(scores[label] for label in EXPLICIT)
        # a box has the score of its class or, where one with a higher score covers it, none
        assert all(box["score"] <= scores[box["label"]] for box in row["boxes"])


def test_pictures_that_wait_for_a_gpu_give_the_same_rows(files, looked) -> None:
    """What a GPU changes but arithmetic: several pictures wait, and are looked at together."""

    class Waits(LookStage):
        def _must_finish(self, held_px: int, num_held: int) -> bool:
            return held_px > 600_000

    shard = Shard(files)
    made = Waits(LookConfig()).run(1, shard)
    assert all(made[name].equals(looked[1][name]) for name in made)
    assert shard.objects == looked[0].objects


def test_a_blurred_file_holds_nothing_but_the_picture(files) -> None:
    """EXIF with a thumbnail, XMP, a comment and a profile are gone, and the orientation is in the pixels."""
    from PIL import ImageCms
    from skimage import data

    astronaut = data.astronaut()
    turned = Image.fromarray(np.rot90(astronaut))  # stored lying; orientation 6 says: turn it back
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "A. Photographer"
    thumbnail = encoded(astronaut[::4, ::4], "JPEG")
    blob = exif.tobytes() + thumbnail  # where a camera keeps it: behind the tables of the segment
    buffer = io.BytesIO()
    turned.save(
        buffer, "JPEG", quality=95, exif=blob, comment=b"of a person", xmp=b"<x:xmpmeta>a person</x:xmpmeta>",
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )  # fmt: skip
    stored = buffer.getvalue()
    assert thumbnail in stored
    shard = Shard({1_000_000: stored})
    row = LookStage(LookConfig()).run(1, shard)["detections"].to_pylist()[0]
    jpeg = shard.blob(row["blurred_object"], row["blurred_offset"], row["blurred_bytes"])
    small = shard.blob(row["small_object"], row["small_offset"], row["small_bytes"])
    for data_of in (jpeg, small):
        assert [marker for marker in segments(data_of) if 0xE0 < marker <= 0xEF or marker == 0xFE] == []
        assert thumbnail[:100] not in data_of
        image = Image.open(io.BytesIO(data_of))
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert row["num_faces"] == 1
    difference = np.abs(decode(jpeg).rgb.astype(int) - astronaut).mean(axis=2)
    assert np.median(difference) < 3


def segments(jpeg: bytes) -> list[int]:
    """Markers of a JPEG up to its scan."""
    found, place = [], 2
    while jpeg[place + 1] != 0xDA:
        found.append(jpeg[place + 1])
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return found


def test_without_blur_and_without_a_detector(files) -> None:
    one = {1_000_000: files[1_000_000]}
    shard = Shard(one)
    row = LookStage(LookConfig(blur=False)).run(1, shard)["detections"].to_pylist()[0]
    assert row["num_faces"] == 1
    assert row["blurred_object"] is None
    assert shard.tars["blurred"].names == []
    row = LookStage(LookConfig(detector="none")).run(1, Shard(one))["detections"].to_pylist()[0]
    assert (row["boxes"], row["faces"], row["nsfw_label"], row["nsfw_score"]) == ([], [], None, 0.0)
    assert row["class_scores"] == []
    assert row["small_object"] is not None


def test_of_a_file_that_holds_more_what_was_seen_is_stored_beside_it() -> None:
    from skimage import data

    coffee = data.coffee()[:300, :300]
    astronaut = Image.fromarray(data.astronaut()[:300, :300])
    half = np.dstack([data.astronaut(), np.zeros(data.astronaut().shape[:2], np.uint8)])
    files = {
        1_000_000: encoded(coffee, "GIF", save_all=True, append_images=[astronaut]),
        1_000_001: encoded(half),  # nothing of it is seen
        1_000_002: encoded(np.dstack([coffee, np.full(coffee.shape[:2], 255, np.uint8)])),
        1_000_003: encoded(coffee, "TIFF", save_all=True, append_images=[astronaut]),
        1_000_004: encoded(coffee),
    }
    shard = Shard(files)
    rows = LookStage(LookConfig(face_input_px=(320,))).run(1, shard)["detections"].to_pylist()
    assert [row["num_faces"] for row in rows] == [0] * len(files)
    assert [row["blurred_object"] is not None for row in rows] == [True, True, False, True, False]
    for row in rows:
        if row["blurred_object"] is not None:
            stored = decode(shard.blob(row["blurred_object"], row["blurred_offset"], row["blurred_bytes"]))
            first = decode(files[row["image_id"]])
            assert (stored.format, stored.num_frames, stored.shows_all) == ("jpeg", 1, True)
            assert psnr_db(stored.rgb, first.rgb) >= LEAST_PSNR_DB
    for config in (LookConfig(detector="none"), LookConfig(blur=False, face_input_px=(320,))):
        rows = LookStage(config).run(1, Shard(files))["detections"].to_pylist()
        assert [row["blurred_object"] for row in rows] == [None] * len(files)


def test_yunet_finds_the_face_too_once(files, shared_data) -> None:
    yunet = str(shared_data / "weights" / "yunet_n_dynamic.onnx")
    one = {1_000_000: files[1_000_000]}
    for detector in ("none", "nudenet"):
        row = LookStage(LookConfig(detector=detector, yunet=yunet)).run(1, Shard(one))["detections"].to_pylist()[0]
        assert row["num_faces"] == 1


def test_folders_tell_models_and_settings_apart_but_not_paths(tmp_path, shared_data) -> None:
    source = shared_data / "weights" / "yunet_n_dynamic.onnx"
    copy = tmp_path / "elsewhere.onnx"
    copy.write_bytes(source.read_bytes())

    def folder(**values: object) -> str:
        return LookStage(LookConfig(**values)).folder("detections", None)

    assert folder() == folder(max_seconds=99)
    assert folder(yunet=str(source)) == folder(yunet=str(copy))
    others = [
        folder(), folder(yunet=str(source)), folder(detector="none"),
        folder(face_thresholds=(0.3, 0.3, 0.3, 0.5)), folder(blur=False),
        folder(face_dilation=1.3), folder(small_px=224), folder(quality=90), folder(max_pixels=1000),
        folder(face_input_px=(320, 640)),
        folder(yunet=str(source), yunet_thresholds=(0.5, 0.5, 0.5, 0.5)),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    assert others[0].startswith("detections/nudenet-")


def test_bad_values_are_named_before_any_work() -> None:
    with pytest.raises(
        ConfigError, match=r"look\.yunet: got 'no/such\.onnx', which is no file; fetch face_detection_yunet"
    ):
        LookStage(LookConfig(yunet="no/such.onnx")).preflight()
    with pytest.raises(ConfigError, match=r"look\.yunet"):
        LookStage(LookConfig(yunet="no/such.onnx")).fingerprint_values()
    for values in ({"detector": "nude"}, {"face_input_px": (330,)}, {"yunet_scales": ()}, {"max_pixels": 10**9}):
        with pytest.raises(ValidationError):
            LookConfig(**values)


def test_a_file_that_is_no_yunet_is_told_before_any_work(tmp_path, shared_data, capfd) -> None:
    LookStage(LookConfig(yunet=str(shared_data / "weights" / "yunet_n_dynamic.onnx"))).preflight()
    text, empty = tmp_path / "text.onnx", tmp_path / "empty.onnx"
    text.write_text("<html>not found</html>")
    empty.write_bytes(b"")
    for path in (text, empty, model_path()):  # the last is a network, and not this one
        with pytest.raises(
            ConfigError, match=rf"^look\.yunet: got '{path}', which OpenCV cannot run as YuNet"
        ) as caught:
            LookStage(LookConfig(yunet=str(path))).preflight()
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["phash", "pdq"])
def test_nothing_is_stored_of_a_picture_whose_hash_is_on_the_takedown_list(files, kind):
    from curation.ingest.takedown import rule_of, to_table

    before = Shard(files)
    hashes = LookStage(LookConfig()).run(1, before)["hashes"].to_pylist()
    row = next(row for row in hashes if row["image_id"] == 1_000_000)
    shard = Shard(files)
    near = f"{row['phash'] ^ 5:016x}" if kind == "phash" else f"{int(row['pdq'], 16) ^ 5:064x}"
    shard.takedowns = to_table([rule_of(near, kind=kind, radius_bits=2)])
    out = LookStage(LookConfig()).run(1, shard)
    hashed = {row["image_id"]: row for row in out["hashes"].to_pylist()}
    assert (hashed[1_000_000]["ok"], hashed[1_000_000]["reason"]) == (False, "taken_down")
    assert hashed[1_000_000]["phash"] is None
    assert hashed[1_000_001] == next(row for row in hashes if row["image_id"] == 1_000_001)
    seen = {row["image_id"]: row for row in out["detections"].to_pylist()}
    assert (seen[1_000_000]["small_object"], seen[1_000_000]["blurred_object"]) == (None, None)
    assert len(shard.tars["small"].names) == len(before.tars["small"].names) - 1
