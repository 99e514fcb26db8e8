"""The safety verdict: what is blocked, does not decode, is too small, too long, blank, or explicit is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pyarrow as pa
from pydantic import Field, field_validator

from curation.dedup.hashes import PDQ_MIN_QUALITY, PDQ_RADIUS_BITS
from curation.safety.blocklist import BlockList, read_block_list
from curation.safety.detector import EXPLICIT
from curation.stage import ShardStage, TaskIO, verdict_table
from training.config import EXECUTION, Config


class SafetyConfig(Config):
    """Limits. At these thresholds 1 of 428 harmless photographs is dropped, and 1 of 1,320 pictures of 64 px."""

    nsfw_threshold: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default={
            "FEMALE_BREAST_EXPOSED": 0.4,
            "FEMALE_GENITALIA_EXPOSED": 0.4,
            "MALE_GENITALIA_EXPOSED": 0.4,
            "BUTTOCKS_EXPOSED": 0.3,
            "ANUS_EXPOSED": 0.3,
        },
        description="at least this score of the class drops the picture",
    )
    opinion_drop: float | None = Field(
        None, ge=0, le=1, description="a picture whose second opinion is at least this is dropped too"
    )
    opinion_clear: float | None = Field(
        None,
        ge=0,
        le=1,
        description="a picture that only the detector would drop stays where its opinion is below this",
    )
    min_shortest_px: int = Field(32, ge=1, description="shortest side")
    min_pixels: int = Field(1, ge=1, description="width times height, beside the limit of the shortest side")
    max_aspect: float = Field(8.0, ge=1, description="longest side over shortest side")
    min_luma_std: float = Field(2.0, ge=0, description="below: one colour")
    max_flat_share: float = Field(
        0.95, gt=0, le=1, description="share of pixels within a grey level of one luma; above: a placeholder"
    )

    blocked_sha256_files: list[str] = Field(
        default_factory=list,
        json_schema_extra=EXECUTION,  # their content is in the fingerprint, their paths are not
        description="files with one sha256 of the bytes of a picture a line",
    )
    blocked_pdq_files: list[str] = Field(
        default_factory=list,
        json_schema_extra=EXECUTION,
        description="files with one PDQ hash a line, and maybe its quality",
    )
    blocked_pdq_radius_bits: int = Field(PDQ_RADIUS_BITS, ge=0, le=64, description="of 256 bits that may differ")
    blocked_pdq_min_quality: int = Field(
        PDQ_MIN_QUALITY, ge=0, le=100, description="pictures and entries with a lower one are not matched"
    )

    @property
    def blocked_sha256(self) -> BlockList:
        """All entries of the files of sha256."""
        return read_block_list("safety.blocked_sha256_files", "sha256", self.blocked_sha256_files)

    @property
    def blocked_pdq(self) -> BlockList:
        """All entries of the files of PDQ hashes that are good enough."""
        key, floor = "safety.blocked_pdq_files", self.blocked_pdq_min_quality
        return read_block_list(key, "pdq", self.blocked_pdq_files, min_quality=floor)

    def fingerprint_values(self) -> dict[str, Any]:
        """The limits, and the lists by their content, so that a file may move."""
        lists = {"blocked_sha256": self.blocked_sha256.values, "blocked_pdq": self.blocked_pdq.values}
        return {**super().fingerprint_values(), **lists}

    @field_validator("nsfw_threshold")
    @classmethod
    def _known_classes(cls, value: dict[str, float]) -> dict[str, float]:
        allowed = (*EXPLICIT, "MALE_BREAST_EXPOSED")
        unknown = sorted(set(value) - set(allowed))
        if unknown:
            raise ValueError(f"class {unknown[0]!r} is not judged; allowed: {', '.join(allowed)}")
        return value


Judgement = tuple[str | None, float | None, float | None]  # reason, score, threshold


def judge_blocked(hashes: pa.Table, config: SafetyConfig) -> list[Judgement | None]:
    """blocked_sha256, or blocked_pdq with the bits to the nearest entry and the radius; None where no list names it.

    Args:
        hashes: rows of ``hashes``: sha256, pdq, pdq_quality.
        config: lists and radius.
    """
    found: list[Judgement | None] = [None] * hashes.num_rows
    if (by_look := config.blocked_pdq).entries:
        radius = config.blocked_pdq_radius_bits
        distances = by_look.pdq_distances(
            hashes["pdq"].to_pylist(),
            hashes["pdq_quality"].to_pylist(),
            radius_bits=radius,
            min_quality=config.blocked_pdq_min_quality,
        )
        found = [None if bits is None else ("blocked_pdq", float(bits), float(radius)) for bits in distances]
    if (by_bytes := config.blocked_sha256).entries:
        names = hashes["sha256"].to_pylist()
        found = [
            ("blocked_sha256", None, None) if name in by_bytes else other
            for name, other in zip(names, found, strict=True)
        ]
    return found


def judge(
    hashes: dict[str, Any],
    class_scores: Mapping[str, float],
    config: SafetyConfig,
    *,
    is_reference: bool,
    opinion: float | None = None,
) -> Judgement:
    """(reason, score, threshold) of one picture; (None, score, threshold) of the NSFW test where it is kept.

    Tests in this order, the first that fails names the reason: decode_*, too_small, too_few_pixels, aspect, blank,
    placeholder, nsfw, nsfw_opinion. What a block list names (``judge_blocked``) is not asked for more. A reference
    (query or benchmark) is dropped only when it does not decode.

    Args:
        hashes: row of ``hashes``.
        class_scores: ``detections.class_scores`` of the same picture.
        config: limits.
        is_reference: the picture belongs to a query set or a benchmark.
        opinion: score of the second opinion; None where nobody was asked.
    """
    if not hashes["ok"]:
        return hashes["reason"], None, None
    if is_reference:
        return None, None, None
    return judge_shape(hashes, config) or judge_explicit(class_scores, opinion, config)


def judge_shape(hashes: dict[str, Any], config: SafetyConfig) -> Judgement | None:
    """The first limit of size and content that a picture fails; None where it fails none."""
    width, height = hashes["width_px"], hashes["height_px"]
    shortest, aspect = min(width, height), max(width, height) / min(width, height)
    for reason, number, limit, fails in (
        ("too_small", float(shortest), float(config.min_shortest_px), shortest < config.min_shortest_px),
        ("too_few_pixels", float(width * height), float(config.min_pixels), width * height < config.min_pixels),
        ("aspect", aspect, config.max_aspect, aspect > config.max_aspect),
        ("blank", hashes["luma_std"], config.min_luma_std, hashes["luma_std"] < config.min_luma_std),
        ("placeholder", hashes["flat_share"], config.max_flat_share, hashes["flat_share"] > config.max_flat_share),
    ):
        if fails:
            return reason, number, limit
    return None


def judge_explicit(class_scores: Mapping[str, float], opinion: float | None, config: SafetyConfig) -> Judgement:
    """What the detector says, and the second opinion where there is one."""
    judged = judge_nsfw(class_scores, config.nsfw_threshold)
    if opinion is not None and judged[0] is None and config.opinion_drop is not None and opinion >= config.opinion_drop:
        return "nsfw_opinion", opinion, config.opinion_drop
    if opinion is not None and judged[0] and config.opinion_clear is not None and opinion < config.opinion_clear:
        return None, opinion, config.opinion_clear
    return judged


def judge_nsfw(class_scores: Mapping[str, float], thresholds: Mapping[str, float]) -> Judgement:
    """The explicit class that goes furthest beyond, or comes nearest to, its threshold."""
    judged = [(class_scores[label], limit) for label, limit in thresholds.items() if label in class_scores]
    if not judged:
        return None, None, None
    score, threshold = max(judged, key=lambda pair: (pair[0] - pair[1], pair))
    return ("nsfw" if score >= threshold else None), score, threshold


class SafetyStage(ShardStage):
    """Verdict over every fetched picture. Block lists are held against the pool only; `lvd takedown` reaches all."""

    name = "safety"
    section = "safety"
    kind = "verdict"
    after = "fetched"
    reads: ClassVar[tuple[str, ...]] = ("fetched", "hashes", "detections", "opinions")
    writes = ("safety",)
    roles = ("pool", "query", "benchmark")
    config: SafetyConfig

    def preflight(self) -> None:
        """The block lists can be read."""
        self.config.fingerprint_values()

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Judge the rows of a shard."""
        columns = [
            "image_id",
            "sha256",
            "ok",
            "reason",
            "width_px",
            "height_px",
            "pdq",
            "pdq_quality",
            "luma_std",
            "flat_share",
        ]
        table = io.table("hashes", columns)
        hashes = {row["image_id"]: row for row in table.to_pylist()}
        detections = io.table("detections", ["image_id", "class_scores"])
        scores = dict(zip(detections["image_id"].to_pylist(), detections["class_scores"].to_pylist(), strict=True))
        opinions = io.table("opinions", ["image_id", "score"])
        opinion = dict(zip(opinions["image_id"].to_pylist(), opinions["score"].to_pylist(), strict=True))
        is_reference = io.role != "pool"
        ids = table["image_id"].to_pylist()
        blocked = {} if is_reference else dict(zip(ids, judge_blocked(table, self.config), strict=True))
        judged = [
            blocked.get(image_id)
            or judge(
                hashes[image_id],
                dict(scores[image_id] or ()),
                self.config,
                is_reference=is_reference,
                opinion=opinion.get(image_id),
            )
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
