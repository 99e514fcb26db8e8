"""Look: every picture is decoded at full size once, and everything that needs its pixels is done then.

Hashes are of the original. Where faces were found, a version with blurred faces is stored, and the 288-px intermediate
that describe and embed read is made from it: vectors are of blurred pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.dedup.hashes import dhash, luma, luma_std, pdq, phash, pixel_sha256
from curation.ingest.takedown import TABLE as TAKEDOWNS
from curation.ingest.takedown import TAKEN_DOWN, rules_of
from curation.modelfacts import ModelFacts
from curation.safety.detector import LICENSE, Box, NudeNetDetector, explicit_score, model_digest, model_path
from curation.safety.faces import YuNet, blur_faces, dilate, merged, nudenet_faces
from curation.schema import TABLES
from curation.stage import Context, ShardStage, TaskIO, keyed_folder
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
        (320,), description="input sizes of NudeNet for faces; scores are at 320"
    )
    face_threshold: float = Field(0.3, ge=0.2, le=1, description="of NudeNet's face classes")
    yunet: str | None = Field(None, json_schema_extra=EXECUTION, description="YuNet's ONNX file; finds twice the faces")
    yunet_scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field((1.0, 2.0), min_length=1)
    face_dilation: float = Field(1.5, ge=1, le=4)
    blur: bool = Field(True, description="false: faces are found but nothing is blurred")
    small_px: int = Field(288, ge=32, description="shortest side of the intermediate")
    quality: int = Field(95, ge=50, le=100, description="of the JPEGs that are written")

    def detection_values(self) -> dict[str, Any]:
        """What decides ``detections``: the settings and the digests of the models."""
        values = self.fingerprint_values()
        values["nudenet"] = model_digest() if self.detector == "nudenet" else None
        values["yunet"] = _sha256(self.yunet) if self.yunet else None
        return values


def _sha256(path: str) -> str:
    if not Path(path).is_file():
        raise ConfigError(
            f"look.yunet: got {path!r}, which is no file; give YuNet's ONNX file "
            "(face_detection_yunet of OpenCV's zoo), or null to find faces with NudeNet alone"
        )
    return file_sha256(path, key="look.yunet")


class Looker:
    """The loaded detectors, and what is done with one picture."""

    def __init__(self, config: LookConfig) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._config = config
        self._nudenet = NudeNetDetector(device=config.device) if config.detector == "nudenet" else None
        self._yunet = YuNet(config.yunet, scales=config.yunet_scales) if config.yunet else None

    def boxes(self, rgb: np.ndarray) -> tuple[list[Box], list[Box]]:
        """All boxes of NudeNet at 320 px, and the dilated face boxes of all detectors."""
        config = self._config
        found = self._nudenet.detect(rgb) if self._nudenet is not None else []
        faces = nudenet_faces(found, config.face_threshold) if 320 in config.face_input_px else []
        for size in config.face_input_px:
            if size != 320 and self._nudenet is not None:
                faces += nudenet_faces(self._nudenet.detect(rgb, input_px=size), config.face_threshold)
        if self._yunet is not None:
            faces += self._yunet.detect(rgb)
        height, width = rgb.shape[:2]
        return found, [dilate(box, config.face_dilation, width_px=width, height_px=height) for box in merged(faces)]


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
    }


class LookStage(ShardStage):
    """Decode once: hashes, detections, blurred version, intermediate.

    Of a picture whose pHash or PDQ is on the takedown list nothing is stored: its row says ``taken_down``.
    """

    name = "look"
    section = "look"
    version = 3
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

    def preflight(self) -> None:
        """The files of the models are there."""
        self.config.detection_values()
        if self.config.detector == "nudenet":
            model_path()

    def models(self) -> list[ModelFacts]:
        """The detectors."""
        found = []
        if self.config.detector == "nudenet":
            sizes = " and ".join(str(size) for size in sorted({320, *self.config.face_input_px}))
            path, sha256 = model_path(), model_digest()
            found.append(ModelFacts(name="nudenet", takes=f"{sizes} px", file=path, sha256=sha256, license=LICENSE))
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
        hashes, detections = [], []
        for row in io.rows.to_pylist():
            place = place_of[row["image_id"]]
            data = io.blob(place["object"], place["offset"], place["num_bytes"])
            name = f"{row['image_id']:018d}.jpg"
            try:
                picture = self._decoder.decode(data)
                hashed = hash_row(picture)
                reason = TAKEN_DOWN if taken_down.looks_like(hashed) else None
            except DecodeError as error:
                reason = error.reason
            if reason is not None:
                hashes.append({**row, "ok": False, "reason": reason})
                detections.append({**row, "boxes": [], "nsfw_score": 0.0, "faces": [], "num_faces": 0})
                continue
            hashes.append({**row, **hashed})
            boxes, faces = self._looker.boxes(picture.rgb)
            label, score = explicit_score(boxes)
            rgb = picture.rgb
            found: dict[str, Any] = {}
            if faces and self.config.blur:
                rgb = blur_faces(rgb, faces)
                jpeg = encode_jpeg(rgb, self.config.quality)
                found |= {"blurred_offset": blurred.add(name, jpeg), "blurred_bytes": len(jpeg)}
            jpeg = encode_jpeg(resize_shortest(rgb, self.config.small_px), self.config.quality)
            found |= {"small_offset": small.add(name, jpeg), "small_bytes": len(jpeg)}
            found |= {"boxes": [box._asdict() for box in boxes], "faces": [box._asdict() for box in faces]}
            detections.append({**row, **found, "nsfw_label": label, "nsfw_score": score, "num_faces": len(faces)})
        small_path, blurred_path = small.close(), blurred.close()
        for line in detections:
            line["small_object"] = small_path if line.get("small_bytes") is not None else None
            line["blurred_object"] = blurred_path if line.get("blurred_bytes") is not None else None
        return {
            "hashes": pa.Table.from_pylist(hashes, schema=TABLES["hashes"].schema),
            "detections": pa.Table.from_pylist(detections, schema=TABLES["detections"].schema),
        }
