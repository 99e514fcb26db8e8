"""The safety verdict: what does not decode, is too small, too long, blank, or explicit is dropped."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import pyarrow as pa
from pydantic import Field, field_validator

from curation.safety.detector import EXPLICIT
from curation.stage import ShardStage, TaskIO, verdict_table
from training.config import Config


class SafetyConfig(Config):
    """Limits. At these thresholds 0.7 % of 428 harmless full-size photographs are dropped, and 2 % of small pieces."""

    nsfw_threshold: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default={
            "FEMALE_BREAST_EXPOSED": 0.4,
            "FEMALE_GENITALIA_EXPOSED": 0.4,
            "MALE_GENITALIA_EXPOSED": 0.4,
            "BUTTOCKS_EXPOSED": 0.3,
            "ANUS_EXPOSED": 0.3,
        },
        description="a box of this class with at least this score drops the picture; boxes below 0.2 are not kept",
    )
    min_shortest_px: int = Field(32, ge=1, description="shortest side")
    max_aspect: float = Field(8.0, ge=1, description="longest side over shortest side")
    min_luma_std: float = Field(2.0, ge=0, description="below: one colour, a placeholder")

    @field_validator("nsfw_threshold")
    @classmethod
    def _known_classes(cls, value: dict[str, float]) -> dict[str, float]:
        allowed = (*EXPLICIT, "MALE_BREAST_EXPOSED")
        unknown = sorted(set(value) - set(allowed))
        if unknown:
            raise ValueError(f"class {unknown[0]!r} is not judged; allowed: {', '.join(allowed)}")
        return value


Judgement = tuple[str | None, float | None, float | None]  # reason, score, threshold


def judge(
    hashes: dict[str, Any], boxes: list[dict[str, Any]], config: SafetyConfig, *, is_reference: bool
) -> Judgement:
    """(reason, score, threshold) of one picture; (None, score, threshold) of the NSFW test where it is kept.

    Tests in this order, the first that fails names the reason: decode_*, too_small, aspect, blank, nsfw. A reference
    (query or benchmark) is dropped only when it does not decode.

    Args:
        hashes: row of ``hashes``.
        boxes: ``detections.boxes`` of the same picture.
        config: limits.
        is_reference: the picture belongs to a query set or a benchmark.
    """
    if not hashes["ok"]:
        return hashes["reason"], None, None
    if is_reference:
        return None, None, None
    width, height = hashes["width_px"], hashes["height_px"]
    shortest, aspect = min(width, height), max(width, height) / min(width, height)
    for reason, number, limit, fails in (
        ("too_small", float(shortest), float(config.min_shortest_px), shortest < config.min_shortest_px),
        ("aspect", aspect, config.max_aspect, aspect > config.max_aspect),
        ("blank", hashes["luma_std"], config.min_luma_std, hashes["luma_std"] < config.min_luma_std),
    ):
        if fails:
            return reason, number, limit
    return judge_nsfw(boxes, config.nsfw_threshold)


def judge_nsfw(boxes: list[dict[str, Any]], thresholds: dict[str, float]) -> Judgement:
    """The explicit box that goes furthest beyond, or comes nearest to, the threshold of its class."""
    judged = [(box["score"], thresholds[box["label"]]) for box in boxes if box["label"] in thresholds]
    if not judged:
        return None, None, None
    score, threshold = max(judged, key=lambda pair: (pair[0] - pair[1], pair))
    return ("nsfw" if score >= threshold else None), score, threshold


class SafetyStage(ShardStage):
    """Verdict over every fetched picture."""

    name = "safety"
    section = "safety"
    kind = "verdict"
    after = "fetched"
    reads: ClassVar[tuple[str, ...]] = ("fetched", "hashes", "detections")
    writes = ("safety",)
    roles = ("pool", "query", "benchmark")
    config: SafetyConfig

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Judge the rows of a shard."""
        columns = ["image_id", "ok", "reason", "width_px", "height_px", "luma_std"]
        hashes = {row["image_id"]: row for row in io.table("hashes", columns).to_pylist()}
        detections = io.table("detections", ["image_id", "boxes"])
        boxes = dict(zip(detections["image_id"].to_pylist(), detections["boxes"].to_pylist(), strict=True))
        is_reference = io.role != "pool"
        judged = [
            judge(hashes[image_id], boxes[image_id] or [], self.config, is_reference=is_reference)
            for image_id in io.rows["image_id"].to_pylist()
        ]
        return {
            "safety": verdict_table(
                "safety",
                io.rows,
                reason=[row[0] for row in judged],
                score=[row[1] for row in judged],
                threshold=[row[2] for row in judged],
            )
        }
