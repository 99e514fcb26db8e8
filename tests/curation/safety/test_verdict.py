"""The safety verdict: which test names the reason, and what is written beside it."""

import pyarrow as pa
import pytest
from pydantic import ValidationError

from curation.safety.detector import EXPLICIT
from curation.safety.verdict import SafetyConfig, SafetyStage, judge
from curation.schema import TABLES


def picture(**changes: object) -> dict:
    seen = {"ok": True, "reason": None, "width_px": 400, "height_px": 300, "luma_std": 50.0, "flat_share": 0.1}
    return {**seen, **changes}


EVERYTHING_WRONG = picture(width_px=300, height_px=20, luma_std=0.0, flat_share=1.0)
HOT = {"MALE_GENITALIA_EXPOSED": 0.9}


def judged(row: dict, scores: dict, *, is_reference: bool = False, opinion: float | None = None, **config: object):
    return judge(row, scores, SafetyConfig(**config), is_reference=is_reference, opinion=opinion)


def test_the_first_test_that_fails_names_the_reason() -> None:
    assert judged(picture(ok=False, reason="decode_corrupt", luma_std=None), {}) == ("decode_corrupt", None, None)
    off: dict[str, float] = {}
    for limit, judgement in (
        ({"min_pixels": 7000}, ("too_small", 20.0, 32.0)),
        ({"min_shortest_px": 1}, ("too_few_pixels", 6000.0, 7000.0)),
        ({"min_pixels": 6000}, ("aspect", 15.0, 8.0)),
        ({"max_aspect": 20}, ("blank", 0.0, 2.0)),
        ({"min_luma_std": 0}, ("placeholder", 1.0, 0.95)),
        ({"max_flat_share": 1}, ("nsfw", 0.9, 0.4)),
    ):
        off |= limit
        assert judged(EVERYTHING_WRONG, HOT, **off) == judgement
    assert judged(picture(), {}) == (None, None, None)


def test_a_second_opinion_drops_more_or_clears() -> None:
    assert judged(picture(), {}, opinion=0.9) == (None, None, None)  # nobody asked what it is good for
    assert judged(picture(), {}, opinion=0.9, opinion_drop=0.8) == ("nsfw_opinion", 0.9, 0.8)
    assert judged(picture(), {}, opinion=0.7, opinion_drop=0.8) == (None, None, None)
    assert judged(picture(), HOT, opinion=0.9, opinion_drop=0.8) == ("nsfw", 0.9, 0.4)
    assert judged(picture(), HOT, opinion=0.1, opinion_clear=0.2) == (None, 0.1, 0.2)
    assert judged(picture(), HOT, opinion=0.2, opinion_clear=0.2) == ("nsfw", 0.9, 0.4)
    assert judged(picture(), HOT, opinion=None, opinion_clear=0.2) == ("nsfw", 0.9, 0.4)


def test_limits_themselves_pass() -> None:
    assert judged(picture(width_px=256, height_px=32, luma_std=2.0, flat_share=0.95), {}, min_pixels=8192)[0] is None


def test_every_class_has_its_own_threshold() -> None:
    assert judged(picture(), {"BUTTOCKS_EXPOSED": 0.35}) == ("nsfw", 0.35, 0.3)
    assert judged(picture(), {"MALE_GENITALIA_EXPOSED": 0.35}) == (None, 0.35, 0.4)
    # the class that goes furthest beyond its own threshold is the one that is told
    both = {"MALE_GENITALIA_EXPOSED": 0.42, "ANUS_EXPOSED": 0.41}
    assert judged(picture(), both) == ("nsfw", 0.41, 0.3)
    assert judged(picture(), {"FACE_FEMALE": 0.99, "MALE_BREAST_EXPOSED": 0.99}) == (None, None, None)
    assert judged(picture(), HOT, nsfw_threshold={}) == (None, None, None)


def test_references_are_dropped_only_when_they_do_not_decode() -> None:
    assert judged(EVERYTHING_WRONG, HOT, is_reference=True) == (None, None, None)
    row = picture(ok=False, reason="decode_truncated")
    assert judged(row, [], is_reference=True) == ("decode_truncated", None, None)


def test_defaults_are_as_strict_as_the_evidence_allows() -> None:
    thresholds = SafetyConfig().nsfw_threshold
    assert set(thresholds) == set(EXPLICIT)
    assert max(thresholds.values()) <= 0.4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nsfw_threshold": {"KNEE_EXPOSED": 0.5}}, "'KNEE_EXPOSED' is not judged; allowed: FEMALE_BREAST_EXPOSED"),
        ({"nsfw_threshold": {"ANUS_EXPOSED": 1.5}}, "less than or equal to 1"),
        ({"min_shortest_px": 0}, "greater than or equal to 1"),
        ({"max_aspct": 3}, "Extra inputs are not permitted"),
    ],
)
def test_bad_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("'", "['`]")):
        SafetyConfig(**values)


class Tables:
    """The tables of one shard, as a stage reads them."""

    def __init__(self, role: str, tables: dict[str, pa.Table], rows: pa.Table) -> None:
        self.role, self.rows, self._tables = role, rows, tables

    def table(self, name: str, columns=None) -> pa.Table:
        return self._tables[name].select(columns)


@pytest.mark.parametrize("role", ["pool", "query", "benchmark"])
def test_the_stage_answers_its_rows_only(role: str) -> None:
    def row(image_id: int, **values: object) -> dict:
        return {"image_id": image_id, "sha256": f"{image_id}", **values}

    hashes = [
        row(5, **picture()),
        row(6, **picture(ok=False, reason="decode_truncated")),
        row(7, **picture()),
        row(8, **picture()),
    ]
    detections = [row(5), row(6, class_scores=[]), row(7, class_scores=list(HOT.items())), row(8, class_scores=None)]
    tables = {
        "hashes": pa.Table.from_pylist(hashes, schema=TABLES["hashes"].schema),
        "detections": pa.Table.from_pylist(detections, schema=TABLES["detections"].schema),
        "opinions": TABLES["opinions"].schema.empty_table(),
    }
    rows = pa.table({"image_id": [6, 7, 8], "sha256": ["6", "7", "8"]})
    made = SafetyStage(SafetyConfig()).run(0, Tables(role, tables, rows))["safety"]
    assert made.schema.equals(TABLES["safety"].schema)
    assert made["image_id"].to_pylist() == [6, 7, 8]
    assert made["reason"].to_pylist() == ["decode_truncated", "nsfw" if role == "pool" else None, None]
    assert made["keep"].to_pylist() == [False, role != "pool", True]
    if role == "pool":
        assert made["score"].to_pylist()[1] == pytest.approx(0.9)
        assert made["threshold"].to_pylist()[1] == pytest.approx(0.4)
