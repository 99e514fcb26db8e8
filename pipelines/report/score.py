"""How a run over a sample web did against the truth, kind by kind.

A row is right when it has exactly one end state, and that state and its reason are among those that truth names.
Truth's ``kept`` means: survived everything up to and including leakage. What comes after that is a matter of meaning
and of the query sets, so an end in ``semantic`` or ``selection`` counts as kept. A line that was taken down ends as
somebody asked for.

A forbidden contact is, in the server's request log,
- any request for an address that robots.txt denies (or whose robots.txt cannot be had), or to a blocked host;
- a body read to its end whose header had forbidden use. That header comes with the answer, so the request itself is
  allowed; the server makes such bodies larger than the buffers between it and the client, so that one goes out to its
  end only where the client takes it.
Requests to private addresses never reach the sample server: tests watch them at the connector instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from curation.ingest.takedown import TAKEN_DOWN
from pipelines.sample_web.truth import BASE, KEPT, NEVER_READ, NEVER_REQUESTED

KIND_FLOOR = 0.95
OVERALL_FLOOR = 0.99
BASE_KEPT_FLOOR = 0.99
_NUM_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Miss:
    """One line that ended elsewhere than truth says."""

    line: int
    url: str
    expected: str
    got: str


@dataclass(frozen=True, kw_only=True)
class KindScore:
    """How the lines of one kind did."""

    kind: str
    num_lines: int
    num_right: int
    misses: tuple[Miss, ...]  # the first few

    @property
    def share(self) -> float:
        """Lines that ended where they should, 0 to 1."""
        return self.num_right / self.num_lines


@dataclass(frozen=True, kw_only=True)
class Score:
    """A run against the truth of its sample web."""

    kinds: tuple[KindScore, ...]  # base first, then by name
    contacts: tuple[str, ...] | None  # what should not have been asked for; None when there is no request log
    num_unknown: int  # end states of lines that truth does not know

    @property
    def num_lines(self) -> int:
        """Lines that truth knows."""
        return sum(kind.num_lines for kind in self.kinds)

    @property
    def overall(self) -> float:
        """Lines of all kinds that ended where they should, 0 to 1."""
        return sum(kind.num_right for kind in self.kinds) / self.num_lines

    @property
    def base_kept(self) -> float:
        """Pictures without a planted cause that survived, 0 to 1."""
        return next(kind.share for kind in self.kinds if kind.kind == BASE.name)

    def failures(self) -> list[str]:
        """What keeps the score from being good, one line each; empty when it is."""
        found = [
            f"{kind.kind}: {kind.num_right} of {kind.num_lines} right ({kind.share:.3f}), floor {KIND_FLOOR}"
            for kind in self.kinds
            if kind.share < KIND_FLOOR
        ]
        if self.overall < OVERALL_FLOOR:
            found.append(f"all kinds: {self.overall:.4f}, floor {OVERALL_FLOOR}")
        if self.base_kept < BASE_KEPT_FLOOR:
            found.append(f"base pictures kept: {self.base_kept:.4f}, floor {BASE_KEPT_FLOOR}")
        if self.contacts:
            found.append(f"forbidden contacts: {len(self.contacts)}, allowed 0; first: {self.contacts[0]}")
        if self.num_unknown:
            found.append(f"end states of {self.num_unknown} lines that the list does not have")
        return found

    @property
    def ok(self) -> bool:
        """Whether every floor is met."""
        return not self.failures()


def score(ends: pa.Table, truth: pa.Table, request_log: Iterable[Mapping[str, Any]] | None = None) -> Score:
    """Hold the end states of a run against the truth.

    Args:
        ends: one row a line of the sample web's list: ``line``, ``end_stage`` (the verdict that dropped it,
            ``selection`` when only that did, else ``kept``), ``reason`` (null where kept). Others are ignored.
        truth: the table ``truth.parquet``.
        request_log: what the server was asked for (``serve.read_requests``); None leaves contacts unjudged.
    """
    states: dict[int, list[tuple[str, str | None]]] = {}
    columns = (ends[name].to_pylist() for name in ("line", "end_stage", "reason"))
    for line, stage, reason in zip(*columns, strict=True):
        states.setdefault(line, []).append((stage, reason))
    num_lines: dict[str, int] = {}
    misses: dict[str, list[Miss]] = {}
    for row in truth.to_pylist():
        kind = row["kind"]
        num_lines[kind] = num_lines.get(kind, 0) + 1
        got = states.pop(row["line"], [])
        if len(got) != 1 or not _is_right(row, *got[0]):
            expected = _named(row["end_stage"], row["reason"])
            told = " and ".join(_named(*state) for state in got) or "no end state"
            misses.setdefault(kind, []).append(Miss(line=row["line"], url=row["url"], expected=expected, got=told))
    kinds = sorted(num_lines, key=lambda kind: (kind != BASE.name, kind))
    return Score(
        kinds=tuple(
            KindScore(
                kind=kind,
                num_lines=num_lines[kind],
                num_right=num_lines[kind] - len(misses.get(kind, [])),
                misses=tuple(misses.get(kind, [])[:_NUM_EXAMPLES]),
            )
            for kind in kinds
        ),
        contacts=None if request_log is None else forbidden_contacts(request_log, truth),
        num_unknown=len(states),
    )


def _is_right(row: Mapping[str, Any], stage: str, reason: str | None) -> bool:
    if reason == TAKEN_DOWN:
        return True
    if row["end_stage"] == KEPT:
        return stage in (KEPT, "semantic", "selection")
    return stage in row["end_stage"].split("|") and reason in row["reason"].split("|")


def _named(stage: str, reason: str | None) -> str:
    return stage if reason is None else f"{stage}/{reason}"


def forbidden_contacts(request_log: Iterable[Mapping[str, Any]], truth: pa.Table) -> tuple[str, ...]:
    """Requests that should not have been made, or bodies that should not have been read; one text each."""
    never_requested: set[tuple[str, str]] = set()
    never_read: set[tuple[str, str]] = set()
    blocked_hosts: set[str] = set()
    for url, kind in zip(truth["url"].to_pylist(), truth["kind"].to_pylist(), strict=True):
        if kind in NEVER_REQUESTED or kind in NEVER_READ:
            parts = urlsplit(url)
            place = (parts.netloc, parts.path)
            (never_requested if kind in NEVER_REQUESTED else never_read).add(place)
            if kind == "blocked_host":
                blocked_hosts.add(parts.netloc)
    found = []
    for request in request_log:
        place = (request["host"], request["path"])
        if place in never_requested or request["host"] in blocked_hosts:
            found.append(f"asked for http://{place[0]}{place[1]}")
        elif place in never_read and request["complete"] and request["method"] != "HEAD":
            found.append(f"read http://{place[0]}{place[1]} to its end")
    return tuple(found)


def format_score(result: Score) -> str:
    """The score as a table of text, misses below it, the verdict last."""
    lines = [f"{'kind':<20}{'lines':>7}{'right':>7}{'share':>8}"]
    lines += [f"{k.kind:<20}{k.num_lines:>7}{k.num_right:>7}{k.share:>8.3f}" for k in result.kinds]
    num_right = sum(kind.num_right for kind in result.kinds)
    lines.append(f"{'all':<20}{result.num_lines:>7}{num_right:>7}{result.overall:>8.4f}")
    contacts = "not judged: no request log" if result.contacts is None else str(len(result.contacts))
    lines += [f"base pictures kept: {result.base_kept:.4f}", f"forbidden contacts: {contacts}"]
    for kind in result.kinds:
        lines += [f"  {kind.kind} line {m.line} {m.url}: {m.got}, expected {m.expected}" for m in kind.misses]
    failures = result.failures()
    lines += [f"short: {failure}" for failure in failures]
    lines.append("score: short" if failures else "score: ok")
    return "\n".join(lines)


def score_json(result: Score) -> dict[str, Any]:
    """The score as plain data."""
    return {
        "kinds": [{**asdict(kind), "share": kind.share} for kind in result.kinds],
        "num_lines": result.num_lines,
        "overall": result.overall,
        "base_kept": result.base_kept,
        "forbidden_contacts": None if result.contacts is None else list(result.contacts),
        "failures": result.failures(),
        "ok": result.ok,
    }
