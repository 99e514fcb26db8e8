"""The takedown list: pictures that must not be in a pool, by address, by sha256 of their bytes, by pHash, by PDQ.

The list is the table ``takedowns`` of the pool. Stages consult it: fetch asks for no address of it and stores no bytes
of it, look stores nothing of a picture whose hash it names. What was stored before a rule came is taken out by
``curation.export.purge``. Rules are never taken back: a picture that was named once stays out of this pool.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from curation.dedup.hashes import PDQ_MIN_QUALITY, PDQ_RADIUS_BITS, pdq_nearest, pdq_words
from curation.dedup.near import hamming
from curation.ingest.address import AddressError, canonical_url, parse_address
from curation.schema import TABLES, Part
from curation.stage import TaskIO
from curation.store import Store, read_part
from training.config import ConfigError

TABLE = "takedowns"
PART = Part("pool", TABLE, 0)
TAKEN_DOWN = "taken_down"  # the reason that a row ends with

# A further kind is one name here, one spelling in ``_SPELLINGS``, its radius if it is a hash, and one method of
# ``Rules``. A text that does not say its kind is of the first whose spelling it has, so never a PDQ.
RuleKind = Literal["url", "sha256", "phash", "pdq"]


class Radius(NamedTuple):
    """Bits of a hash that may differ."""

    default: int
    most: int


# pHash as near.radius_bits: the last radius that merges no two of 22,000 distinct photographs; PDQ as its authors.
RADII: Mapping[RuleKind, Radius] = {"phash": Radius(4, 16), "pdq": Radius(PDQ_RADIUS_BITS, 64)}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of the list."""

    kind: RuleKind
    value: str  # canonical address, or lower-case hex digits
    radius_bits: int | None = None  # of hashes
    reason: str | None = None
    added_at: datetime | None = None
    applied: bool = False  # the pool was purged of what it names

    @property
    def key(self) -> tuple[str, str]:
        """What makes two entries one rule."""
        return self.kind, self.value


# Spellings


def _plain_url(text: str) -> str:
    if parse_address(text).scheme not in ("http", "https"):
        raise ValueError("an address begins with http:// or https://")
    return canonical_url(text)


def _plain_sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("a sha256 has 64 hex digits")
    return text.lower()


def _plain_phash(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{16}", text):
        raise ValueError("a pHash has 16 hex digits, as `lvd explain` prints")
    return text.lower()


def _plain_pdq(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("a PDQ has 64 hex digits, as `lvd explain` prints")
    return text.lower()


_SPELLINGS: Mapping[RuleKind, Callable[[str], str]] = {
    "url": _plain_url,
    "sha256": _plain_sha256,
    "phash": _plain_phash,
    "pdq": _plain_pdq,
}
KINDS = tuple(_SPELLINGS)


def rule_of(text: str, *, kind: str | None = None, radius_bits: int | None = None, reason: str | None = None) -> Rule:
    """The rule that a text names.

    Args:
        text: an address, 64 hex digits (sha256, or PDQ where ``kind`` says so) or 16 hex digits (pHash).
        kind: one of ``KINDS``; None tells it from the text.
        radius_bits: of a hash: how many bits may differ; None takes the default of its kind.
        reason: kept with the rule.

    Raises:
        ValueError: the text is none of these; the message says why in a few words.
    """
    text = text.strip()
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; allowed: {', '.join(KINDS)}")
    for name, spelling in _SPELLINGS.items():
        if kind not in (None, name):
            continue
        try:
            value = spelling(text)
        except ValueError as error:  # AddressError too
            if kind is not None:
                raise ValueError(f"{text!r} is no {kind}: {error}") from None
            continue
        radius = None
        if name in RADII:
            radius = RADII[name].default if radius_bits is None else radius_bits
            if not 0 <= radius <= RADII[name].most:
                raise ValueError(f"a radius of {radius} bits; allowed: 0 to {RADII[name].most} of a {name}")
        return Rule(kind=name, value=value, radius_bits=radius, reason=reason or None)
    raise ValueError(
        f"{text!r} is no http address, no sha256 (64 hex digits), no pHash (16 hex digits) and, with kind pdq, no PDQ "
        "(64 hex digits)"
    )


# List files


def read_rules(
    entries: Sequence[str], *, kind: str | None = None, radius_bits: int | None = None, reason: str | None = None
) -> list[Rule]:
    """Rules of some lists, each once, in their order.

    Args:
        entries: each the path of a list, or one address, sha256 or hash itself. A list that ends in .csv has a column
            ``url``, ``sha256``, ``phash``, ``pdq`` or ``value``, and maybe ``kind``, ``radius_bits`` and ``reason``.
            Any other has one entry a line; blank lines and lines that begin with # say nothing.
        kind: of all entries that do not name their own; None tells it from each.
        radius_bits: of hashes that do not name their own.
        reason: of entries that do not name their own.

    Raises:
        ConfigError: the first entry that cannot be read, with file and line; or there is no entry at all.
    """
    found: dict[tuple[str, str], Rule] = {}
    for entry in entries:
        for where, cells in _entries(entry):
            try:
                rule = rule_of(
                    cells["value"] or "",
                    kind=cells.get("kind") or kind,
                    radius_bits=_radius(cells.get("radius_bits"), radius_bits),
                    reason=cells.get("reason") or reason,
                )
            except ValueError as error:
                raise ConfigError(f"{where}{error}") from None
            known = found.setdefault(rule.key, rule)
            if (rule.radius_bits or 0) > (known.radius_bits or 0):
                found[rule.key] = rule
    if not found:
        raise ConfigError(f"takedown: {', '.join(entries)} holds no entry; give one address, sha256 or hash a line")
    return list(found.values())


def _entries(entry: str) -> Iterator[tuple[str, Mapping[str, str | None]]]:
    """Each entry of a list as (where, its cells), where as the beginning of a message."""
    path = Path(entry)
    if not path.is_file():
        if "://" not in entry and ("/" in entry or path.suffix in (".txt", ".csv")):
            raise ConfigError(f"takedown list {entry!r} is not there; give a file, an address, a sha256 or a hash")
        yield "takedown: ", {"value": entry}
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{entry}: not UTF-8 at byte {error.start:,}; give a text file, one entry a line") from None
    if path.suffix == ".csv":
        yield from _csv_entries(entry, lines)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#"):
            yield f"{entry} line {number}: ", {"value": line}


def _csv_entries(entry: str, lines: Sequence[str]) -> Iterator[tuple[str, Mapping[str, str | None]]]:
    reader = csv.DictReader(lines, restval="")
    columns = reader.fieldnames or []
    named = [column for column in ("value", *KINDS) if column in columns]
    if len(named) != 1:
        raise ConfigError(
            f"{entry} line 1: columns are {', '.join(columns) or 'none'}; a list in csv has exactly one of the columns "
            f"value, {', '.join(KINDS)}, and maybe kind, radius_bits, reason"
        )
    (column,) = named
    for cells in reader:
        own = {"kind": column} if column in KINDS else {}
        yield f"{entry} line {reader.line_num}: ", {**cells, **own, "value": cells[column]}


def _radius(cell: str | None, default: int | None) -> int | None:
    if not cell:
        return default
    if not cell.strip().isdecimal():
        allowed = ", ".join(f"0 to {radius.most} of a {kind}" for kind, radius in RADII.items())
        raise ValueError(f"radius_bits is {cell!r}; allowed: {allowed}")
    return int(cell)


# The table


def merged(known: Sequence[Rule], new: Iterable[Rule]) -> list[Rule]:
    """The list with further rules, each (kind, value) once: a wider radius replaces a smaller one."""
    rules = {rule.key: rule for rule in known}
    for rule in new:
        old = rules.get(rule.key)
        if old is None or (rule.radius_bits or 0) > (old.radius_bits or 0):
            rules[rule.key] = replace(rule, added_at=rule.added_at or datetime.now(UTC))
    return list(rules.values())


def to_table(rules: Sequence[Rule]) -> pa.Table:
    """The table ``takedowns``."""
    return pa.Table.from_pylist([vars(rule) for rule in rules], schema=TABLES[TABLE].schema)


def from_table(table: pa.Table) -> list[Rule]:
    """The reverse of ``to_table``."""
    return [Rule(**row) for row in table.to_pylist()]


def known_rules(pool: Store) -> list[Rule]:
    """All rules of a pool, in the order in which they came."""
    return from_table(read_part(pool, PART)) if pool.exists(PART.path) else []


def rules_of(io: TaskIO) -> Rules:
    """The rules that a stage consults; none where the pool has no list."""
    return Rules(from_table(io.table(TABLE)))


# Matching


class Rules:
    """Rules to hold pictures against: each method answers for one kind."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._values: dict[str, frozenset[str]] = {
            kind: frozenset(rule.value for rule in rules if rule.kind == kind) for kind in KINDS
        }
        self._codes = np.array([int(rule.value, 16) for rule in rules if rule.kind == "phash"], np.uint64)
        self._pdqs = pdq_words([rule.value for rule in rules if rule.kind == "pdq"])
        self._radii: dict[str, list[int]] = {
            kind: [rule.radius_bits or 0 for rule in rules if rule.kind == kind] for kind in RADII
        }

    @property
    def sha256s(self) -> frozenset[str]:
        """All sha256 of the list."""
        return self._values["sha256"]

    @property
    def has_hashes(self) -> bool:
        """Whether a picture must be looked at to be judged."""
        return len(self._codes) + len(self._pdqs) > 0

    @property
    def has_pdqs(self) -> bool:
        """Whether some of the hashes are PDQ."""
        return len(self._pdqs) > 0

    @cached_property
    def hosts(self) -> frozenset[str]:
        """Hosts of all addresses: an address elsewhere matches none."""
        return frozenset(parse_address(url).host for url in self._values["url"])

    def url(self, url: str | None) -> bool:
        """Whether an address is named, in whatever spelling."""
        if url is None or not self._values["url"]:
            return False
        try:
            return canonical_url(url) in self._values["url"]
        except AddressError:
            return False

    def sha256(self, sha256: str | None) -> bool:
        """Whether bytes are named."""
        return sha256 in self._values["sha256"]

    def phash(self, codes: Any) -> np.ndarray:
        """Which pHashes lie within the radius of one that is named: uint64 [N] -> bool [N]."""
        codes = np.asarray(codes, np.uint64)
        found = np.zeros(len(codes), bool)
        for code, radius in zip(self._codes, self._radii["phash"], strict=True):
            found |= hamming(codes, code) <= radius
        return found

    def pdq(self, hashes: Sequence[str | None], qualities: Sequence[int | None]) -> np.ndarray:
        """Which PDQ hashes lie within the radius of one that is named, bool [N].

        A hash of low quality tells little, so of a picture that has one only an equal hash is named.
        """
        found = np.zeros(len(hashes), bool)
        if self.has_pdqs:
            trusted = np.array([(quality or 0) >= PDQ_MIN_QUALITY for quality in qualities], bool)
            words, radii = pdq_words(hashes), np.array(self._radii["pdq"])
            found |= pdq_nearest(words, self._pdqs, 0) == 0
            for radius in np.unique(radii).tolist():
                found |= trusted & (pdq_nearest(words, self._pdqs[radii == radius], radius) <= radius)
            found &= np.array([one is not None for one in hashes], bool)
        return found

    def looks_like(self, hashes: Mapping[str, Any]) -> bool:
        """Whether a picture is named by how it looks, from its row of the table ``hashes``."""
        alike = self.phash([hashes["phash"]]) | self.pdq([hashes["pdq"]], [hashes["pdq_quality"]])
        return bool(alike[0])
