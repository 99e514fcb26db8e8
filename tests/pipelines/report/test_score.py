import pyarrow as pa
import pytest

from pipelines.report.score import format_score, score, score_json
from pipelines.sample_web.truth import TRUTH_SCHEMA

KINDS = [
    *[("base", "kept", None)] * 4,
    ("crop", "near|duplicates", "near_duplicate|copy"),
    ("exact_copy", "near", "exact_duplicate"),
    ("robots_denied", "fetched", "robots_denied"),
    ("opt_out", "fetched", "opt_out"),
    ("blocked_host", "screened", "blocked_host"),
]
TRUTH = pa.Table.from_pylist(
    [
        {"line": n, "url": f"http://h{n:03d}.sample.test/p/{n}.jpg", "kind": kind, "end_stage": stage, "reason": reason}
        for n, (kind, stage, reason) in enumerate(KINDS)
    ],
    schema=TRUTH_SCHEMA,
)


def ends_of(rows: list[tuple[int, str, str | None]]) -> pa.Table:
    return pa.table(
        {
            "image_id": pa.array([row[0] for row in rows], pa.int64()),
            "line": pa.array([row[0] for row in rows], pa.int64()),
            "end_stage": pa.array([row[1] for row in rows], pa.string()),
            "reason": pa.array([row[2] for row in rows], pa.string()),
        }
    )


RIGHT = [
    (n, stage.split("|")[-1], reason.split("|")[-1] if reason else None) for n, (_, stage, reason) in enumerate(KINDS)
]


def request(host: str, path: str, *, complete: bool = True, method: str = "GET") -> dict[str, object]:
    return {"host": host, "path": path, "method": method, "status": 200, "complete": complete, "bytes": 9}


def test_right_run_is_ok():
    result = score(ends_of(RIGHT), TRUTH, [request("h000.sample.test", "/p/0.jpg")])
    assert (result.overall, result.base_kept, result.contacts, result.ok) == (1.0, 1.0, (), True)
    assert "score: ok" in format_score(result)
    assert score_json(result)["ok"] is True


def test_every_alternative_counts_and_selection_counts_as_kept():
    rows = [(0, "selection", "not_retrieved"), *RIGHT[1:]]
    rows[4] = (4, "near", "near_duplicate")
    assert score(ends_of(rows), TRUTH).overall == 1.0
    rows[1] = (1, "fetched", "taken_down")  # somebody asked for it
    assert score(ends_of(rows), TRUTH).overall == 1.0


@pytest.mark.parametrize(
    ("line", "stage", "reason"),
    [
        (0, "near", "near_duplicate"),  # a good picture lost
        (4, "kept", None),  # a copy kept
        (4, "safety", "blank"),  # the wrong stage
        (5, "near", "near_duplicate"),  # the right stage, another reason
    ],
)
def test_wrong_end_is_a_miss_of_its_kind(line: int, stage: str, reason: str | None):
    rows = list(RIGHT)
    rows[line] = (line, stage, reason)
    result = score(ends_of(rows), TRUTH)
    assert result.overall == pytest.approx(8 / 9)
    assert not result.ok
    (kind,) = [kind for kind in result.kinds if kind.misses]
    assert (kind.kind, kind.misses[0].line) == (KINDS[line][0], line)
    assert kind.misses[0].got in format_score(result)


def test_missing_and_doubled_and_unknown_lines_are_seen():
    missing = score(ends_of(RIGHT[1:]), TRUTH)
    assert missing.kinds[0].misses[0].got == "no end state"
    doubled = score(ends_of([*RIGHT, (0, "kept", None)]), TRUTH)
    assert doubled.kinds[0].misses[0].got == "kept and kept"
    unknown = score(ends_of([*RIGHT, (99, "kept", None)]), TRUTH)
    assert unknown.failures() == ["end states of 1 lines that the list does not have"]


@pytest.mark.parametrize(
    ("asked", "num_contacts"),
    [
        (request("h006.sample.test", "/p/6.jpg", complete=False), 1),  # robots.txt denies it
        (request("h006.sample.test", "/robots.txt"), 0),
        (request("h007.sample.test", "/p/7.jpg", complete=False), 0),  # the header came with the answer
        (request("h007.sample.test", "/p/7.jpg", method="HEAD"), 0),
        (request("h007.sample.test", "/p/7.jpg"), 1),  # read to its end
        (request("h008.sample.test", "/robots.txt"), 1),  # a blocked host
    ],
)
def test_forbidden_contacts(asked: dict[str, object], num_contacts: int):
    result = score(ends_of(RIGHT), TRUTH, [asked])
    assert len(result.contacts or ()) == num_contacts
    assert result.ok is (num_contacts == 0)


def test_without_a_log_contacts_are_not_judged():
    assert "not judged" in format_score(score(ends_of(RIGHT), TRUTH))
