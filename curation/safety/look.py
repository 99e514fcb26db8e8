"""Look: every picture is decoded at full size once, and everything that needs its pixels is done then.

Hashes are of the original. Where faces were found, a version with blurred faces is stored, and the 288-px intermediate
that describe and embed read is made from it: vectors are of blurred pixels. Of a file that holds more than detectors
saw (other frames, pixels hidden by alpha) what they saw is stored too: it takes the place of the original once that is
purged (originals.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curation.dedup.hashes import dhash, flat_share, luma, luma_std, pdq, phash, pixel_sha256
from curation.ingest.takedown import TABLE as TAKEDOWNS
from curation.ingest.takedown import TAKEN_DOWN, rules_of
from curation.modelfacts import ModelFacts
from curation.safety.detector import (
    FLOOR,
    LICENSE,
    Box,
    NudeNetDetector,
    boxes_of,
    class_scores_of,
    explicit_score,
    has_cuda,
    model_digest,
    model_path,
)
from curation.safety.faces import (
    NUDENET_THRESHOLDS,
    YUNET_THRESHOLDS,
    FaceDetector,
    NudeNetFaces,
    YuNet,
    blur_faces,
    dilate,
    encode_blurred,
    merged,
)
from curation.safety.originals import PURGED
from curation.schema import TABLES
from curation.stage import Context, ObjectTar, Resources, ShardStage, TaskIO, keyed_folder
from curation.weights import file_sha256
from training.config import EXECUTION, Config, ConfigError
from training.data.pixels import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SECONDS,
    MOST_PIXELS,
    DecodeError,
    Picture,
    encode_jpeg,
    resize_shortest,
)
from training.data.sandbox import DecoderProcess

_EXPLICIT_PX = 320  # of the pass that scores classes: at 640 three times as many harmless pictures score high
_BATCH_PX = 2**23  # of network input on a GPU: 81 pictures at 320 px, 9 at 960
_HELD_PX, _HELD = 2**26, 256  # pixels of decoded pictures that wait for a GPU, and how many of these

Waiting = list[tuple[dict[str, Any], Picture]]  # rows of ``detections`` that are to be filled, and their pictures

_Score = Annotated[float, Field(ge=0.05, le=1)]
_Scores = tuple[_Score, _Score, _Score, _Score]


class LookConfig(Config):
    """How pictures are looked at."""

    max_bytes: int = Field(MAX_BYTES, ge=1, description="length of a file; more is a row with a reason")
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, le=MOST_PIXELS, description="width times height; more is a row with a reason"
    )
    max_seconds: float = Field(
        MAX_SECONDS, gt=0, json_schema_extra=EXECUTION, description="CPU time of decoding a picture"
    )
    device: str = Field("cpu", pattern="^(cpu|cuda)$", json_schema_extra=EXECUTION, description="filled in")
    detector: Literal["nudenet", "none"] = "nudenet"
    face_input_px: tuple[Annotated[int, Field(ge=320, le=1280, multiple_of=32)], ...] = Field(
        (320, 640, 960), description="input sizes of NudeNet for faces; none: its faces are not used"
    )
    face_thresholds: _Scores = Field(
        NUDENET_THRESHOLDS, description="of NudeNet's faces of a side below 16, 32 and 64 px, and larger"
    )
    yunet: str | None = Field(
        None, json_schema_extra=EXECUTION, description="YuNet's ONNX file; finds half as many faces again as NudeNet"
    )
    yunet_scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field((1.0, 2.0), min_length=1)
    yunet_thresholds: _Scores = Field(
        YUNET_THRESHOLDS, description="of YuNet's faces of a side below 16, 32 and 64 px, and larger"
    )
    face_dilation: float = Field(1.5, ge=1, le=4)
    blur: bool = Field(True, description="false: faces are found but nothing is blurred")
    purge_originals: bool = Field(
        False,
        json_schema_extra=EXECUTION,  # it changes what is kept, no fact
        description="what shows a face, may hide one or does not decode leaves the pool; what was seen stays, blurred",
    )
    small_px: int = Field(288, ge=32, description="shortest side of the intermediate")
    quality: int = Field(95, ge=50, le=100, description="of the JPEGs that are written; of a blurred one at least")

    @model_validator(mode="after")
    def _purges_what_it_blurs(self) -> LookConfig:
        if self.purge_originals and not self.blurs_faces:
            raise ValueError(
                "look.purge_originals: got true, and nothing is blurred; allowed with look.blur=true and a detector: "
                "look.detector=nudenet, look.yunet=PATH, or both"
            )
        return self

    @property
    def blurs_faces(self) -> bool:
        """Whether pictures are looked at for faces, and these blurred."""
        return self.blur and (self.detector != "none" or self.yunet is not None)

    @property
    def on_gpu(self) -> bool:
        """Whether NudeNet's passes are worth a GPU: those for faces take ten times as long as the one for classes.

        YuNet, decoding and hashes stay on the CPU, and of workers with a GPU there are as many as GPUs.
        """
        return self.device == "cuda" and self.detector == "nudenet" and bool(self.face_input_px) and has_cuda()

    def detection_values(self) -> dict[str, Any]:
        """What decides ``detections``: the settings and the digests of the models."""
        values = self.fingerprint_values()
        values["nudenet"] = model_digest() if self.detector == "nudenet" else None
        values["yunet"] = _sha256(self.yunet) if self.yunet else None
        return values


def _sha256(path: str) -> str:
    if not Path(path).is_file():
        raise ConfigError(
            f"look.yunet: got {path!r}, which is no file; fetch face_detection_yunet_2026may.onnx from OpenCV's model "
            "zoo (https://github.com/opencv/opencv_zoo, models/face_detection_yunet) and give its path, or give null "
            "to find faces with NudeNet alone"
        )
    return file_sha256(path, key="look.yunet")


def _try_yunet(config: LookConfig, path: str) -> None:
    """Let YuNet look at two blank pictures: what is no YuNet, or one of a fixed size, fails here and not after fetch.

    Raises:
        ConfigError: it cannot.
    """
    import cv2

    blank = [np.zeros(shape, np.uint8) for shape in ((96, 160, 3), (200, 70, 3))]
    try:
        YuNet(path, scales=config.yunet_scales, thresholds=config.yunet_thresholds).faces(blank)
    except cv2.error as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"look.yunet: got {path!r}, which OpenCV cannot run as YuNet on pictures of any size; give "
            f"face_detection_yunet_2026may.onnx of OpenCV's model zoo, or null: {why}"
        ) from None


class Seen(NamedTuple):
    """What the detectors say of one picture."""

    boxes: list[Box]  # of all classes of NudeNet, at 320 px
    class_scores: dict[str, float]  # the largest of each class there; empty without NudeNet
    faces: list[Box]  # of all face detectors, one a face, dilated


class Looker:
    """The loaded detectors."""

    def __init__(self, config: LookConfig) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._config = config
        self._nudenet: NudeNetDetector | None = None
        self._face_detectors: list[FaceDetector] = []
        if config.detector == "nudenet":
            device, batch_px = ("cuda", _BATCH_PX) if config.on_gpu else ("cpu", 0)
            self._nudenet = NudeNetDetector(device=device, batch_px=batch_px)
            if sizes := config.face_input_px:
                faces = NudeNetFaces(self._nudenet, input_px=sizes, thresholds=config.face_thresholds)
                self._face_detectors.append(faces)
        if config.yunet:
            yunet = YuNet(config.yunet, scales=config.yunet_scales, thresholds=config.yunet_thresholds)
            self._face_detectors.append(yunet)

    def see(self, pictures: Sequence[np.ndarray]) -> list[Seen]:
        """What is seen on each of some pictures.

        Args:
            pictures: uint8 [H, W, 3] each, RGB.
        """
        scored = self._scored(pictures)
        found = [detector.faces(pictures) for detector in self._face_detectors]
        seen = []
        for place, (rgb, (boxes, class_scores)) in enumerate(zip(pictures, scored, strict=True)):
            height, width = rgb.shape[:2]
            faces = merged([box for of_one in found for box in of_one[place]])
            grown = [dilate(box, self._config.face_dilation, width_px=width, height_px=height) for box in faces]
            seen.append(Seen(boxes, class_scores, grown))
        return seen

    def _scored(self, pictures: Sequence[np.ndarray]) -> list[tuple[list[Box], dict[str, float]]]:
        """Boxes and class scores of NudeNet, which is shown BGR here, as nudenet shows it: fewer false scores."""
        if self._nudenet is None:
            return [([], {}) for _ in pictures]
        labels, scored = self._nudenet.labels, []
        outputs = self._nudenet.outputs(pictures, input_px=_EXPLICIT_PX, channels="bgr")
        for rgb, output in zip(pictures, outputs, strict=True):
            height, width = rgb.shape[:2]
            boxes = boxes_of(output, labels, width_px=width, height_px=height, input_px=_EXPLICIT_PX, floor=FLOOR)
            scored.append((boxes, class_scores_of(output, labels)))
        return scored


# Columns of ``detections`` of a picture that did not decode.
_NOTHING_SEEN = {"boxes": [], "class_scores": [], "nsfw_score": 0.0, "faces": [], "num_faces": 0}


def hash_row(picture: Picture) -> dict[str, Any]:
    """Columns of ``hashes`` of a picture that decoded."""
    grey = luma(picture.rgb)
    pdq_hash, pdq_quality = pdq(picture.rgb)
    return {
        "ok": True,
        "reason": None,
        "width_px": picture.width_px,
        "height_px": picture.height_px,
        "format": picture.format,
        "num_frames": picture.num_frames,
        "pixel_sha256": pixel_sha256(picture.rgb),
        "phash": phash(grey),
        "dhash": dhash(grey),
        "pdq": pdq_hash,
        "pdq_quality": pdq_quality,
        "luma_std": luma_std(grey),
        "flat_share": flat_share(grey),
    }


class LookStage(ShardStage):
    """Decode once: hashes, detections, blurred version, intermediate.

    Of a picture whose pHash or PDQ is on the takedown list nothing is stored: its row says ``taken_down``.
    """

    name = "look"
    section = "look"
    version = 5
    kind = "facts"
    after = "fetched"
    reads: ClassVar[tuple[str, ...]] = ("fetched", "images")
    consults = (TAKEDOWNS,)
    writes = ("hashes", "detections")
    roles = ("pool", "query", "benchmark")
    config: LookConfig

    def __init__(self, config: LookConfig) -> None:
        super().__init__(config)
        self._looker: Looker | None = None
        self._decoder = DecoderProcess(
            max_bytes=config.max_bytes, max_pixels=config.max_pixels, max_seconds=config.max_seconds
        )  # starts on first use, ends with the stage or the worker
        if config.on_gpu:
            self.resources = Resources(gpus=1.0)

    def preflight(self) -> None:
        """The files of the models are there, and YuNet's is one."""
        self.config.detection_values()
        if self.config.yunet:
            _try_yunet(self.config, self.config.yunet)
        if self.config.detector == "nudenet":
            model_path()

    def models(self) -> list[ModelFacts]:
        """The detectors."""
        found = []
        if self.config.detector == "nudenet":
            sizes = " and ".join(str(size) for size in sorted({_EXPLICIT_PX, *self.config.face_input_px}))
            path, sha256 = model_path(), model_digest()
            facts = ModelFacts(name="nudenet", takes=f"{sizes} px", file=path, sha256=sha256, license=LICENSE)
            found.append(replace(facts, needs_cpu=not self.config.on_gpu))
        if self.config.yunet:
            path, sha256 = Path(self.config.yunet), _sha256(self.config.yunet)
            found.append(ModelFacts(name="yunet", takes="whole pictures", file=path, sha256=sha256, needs_cpu=True))
        return found

    def fingerprint_values(self) -> dict[str, Any]:
        """Settings and digests of models."""
        return self.config.detection_values()

    def folder(self, table: str, context: Context) -> str:
        """Both tables are keyed by all that decides them, as they are made in one pass."""
        del context
        return self.facts_folder(table)

    def facts_folder(self, table: str) -> str:
        """Folder of ``hashes`` or ``detections``."""
        names = [self.config.detector, *(["yunet"] if self.config.yunet else [])]
        return keyed_folder(table, "-".join(names), self.version, self.config.detection_values())

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One picture after another; bytes never pile up."""
        if self._looker is None:
            self._looker = Looker(self.config)
        places = io.table("images", ["image_id", "object", "offset", "num_bytes"])
        place_of = {row["image_id"]: row for row in places.to_pylist()}
        taken_down = rules_of(io)
        small, blurred = io.tar("small"), io.tar("blurred")
        hashes: list[dict[str, Any]] = []
        detections: list[dict[str, Any]] = []
        waiting: Waiting = []
        held_px = 0
        for row in io.rows.to_pylist():
            place = place_of[row["image_id"]]
            try:
                if place["object"] is None:
                    raise DecodeError(PURGED, "purged after an earlier look")
                data = io.blob(place["object"], place["offset"], place["num_bytes"])
                picture = self._decoder.decode(data)
                hashed = hash_row(picture)
                reason = TAKEN_DOWN if taken_down.looks_like(hashed) else None
            except DecodeError as error:
                reason = error.reason
            if reason is not None:
                hashes.append({**row, "ok": False, "reason": reason})
                detections.append({**row, **_NOTHING_SEEN})
                continue
            hashes.append({**row, **hashed})
            detections.append(dict(row))
            waiting.append((detections[-1], picture))
            held_px += picture.width_px * picture.height_px
            if self._must_finish(held_px, len(waiting)):
                self._finish(waiting, small, blurred)
                waiting, held_px = [], 0
        self._finish(waiting, small, blurred)
        small_path, blurred_path = small.close(), blurred.close()
        for line in detections:
            line["small_object"] = small_path if line.get("small_bytes") is not None else None
            line["blurred_object"] = blurred_path if line.get("blurred_bytes") is not None else None
        return {
            "hashes": pa.Table.from_pylist(hashes, schema=TABLES["hashes"].schema),
            "detections": pa.Table.from_pylist(detections, schema=TABLES["detections"].schema),
        }

    def _must_finish(self, held_px: int, num_held: int) -> bool:
        """Pictures wait for each other only where a GPU looks at several together; memory bounds how many."""
        return not self.config.on_gpu or held_px >= _HELD_PX or num_held >= _HELD

    def _finish(self, waiting: Waiting, small: ObjectTar, blurred: ObjectTar) -> None:
        """Fill the rows of pictures that wait: what is seen, the blurred version, the intermediate."""
        assert self._looker is not None
        config = self.config
        pictures = [picture.rgb for _, picture in waiting]
        for (line, picture), seen in zip(waiting, self._looker.see(pictures), strict=True):
            name = f"{line['image_id']:018d}.jpg"
            rgb = picture.rgb
            if config.blurs_faces and (seen.faces or not picture.shows_all):
                rgb = blur_faces(rgb, seen.faces)
                jpeg = encode_blurred(rgb, seen.faces, config.quality)
                line |= {"blurred_offset": blurred.add(name, jpeg), "blurred_bytes": len(jpeg)}
            jpeg = encode_jpeg(resize_shortest(rgb, config.small_px), config.quality)
            line |= {"small_offset": small.add(name, jpeg), "small_bytes": len(jpeg)}
            label, score = explicit_score(seen.class_scores)
            line |= {"class_scores": list(seen.class_scores.items()), "nsfw_label": label, "nsfw_score": score}
            line |= {"boxes": [box._asdict() for box in seen.boxes]}
            line |= {"faces": [box._asdict() for box in seen.faces], "num_faces": len(seen.faces)}
