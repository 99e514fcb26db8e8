"""Screening: which lines may be fetched at all. Schemes, block lists, and addresses that an earlier line has.

Equal addresses are found without holding them: each shard writes 64-bit keys, each task takes one range of keys of all
shards, and the least id of a key wins.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.ingest.address import AddressError, canonical_url, parse_address
from curation.schema import TABLES, Part
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, digest_of, verdict_table
from training.config import EXECUTION, Config, ConfigError

_KEY_BITS = 64


class ScreenConfig(Config):
    """Rules about addresses. Pictures of folders and archives have none, and pass.

    A picture of a parquet file that says where it came from is here already: of it only the block lists are asked.
    """

    schemes: list[str] = Field(default=["http", "https"], description="of the address, lower case")
    blocked_hosts: list[str] = Field(default_factory=list, description="hosts; a domain covers all hosts below it")
    blocked_urls: list[str] = Field(
        default_factory=list,
        description="parts of an address; with a scheme in front: how it begins. Held against its canonical spelling",
    )
    block_list_files: list[str] = Field(
        default_factory=list,
        json_schema_extra=EXECUTION,  # their content is in the fingerprint, their paths are not
        description="files with one host, domain, or address beginning with http a line, or lines of a hosts file; "
        "# begins a comment",
    )
    key_ranges: int = Field(
        default=8, ge=1, le=4096, json_schema_extra=EXECUTION, description="tasks of de-duplication"
    )

    def fingerprint_values(self) -> dict[str, Any]:
        """The rules, those in files by their content, so that a file may move."""
        listed = sorted({line for path in self.block_list_files for line in _read_block_list(path)})
        return {**super().fingerprint_values(), "block_lists": digest_of(listed)}


class Rules:
    """All rules of a config, its files read."""

    def __init__(self, config: ScreenConfig) -> None:
        lines = [line for path in config.block_list_files for line in _read_block_list(path)]
        urls = [line for line in lines if line.startswith(("http://", "https://"))]
        hosts = [line for line in lines if not line.startswith(("http://", "https://"))]
        self.schemes = frozenset(scheme.lower() for scheme in config.schemes)
        self.hosts = frozenset(_plain(host) for host in [*config.blocked_hosts, *hosts])
        every = [*config.blocked_urls, *urls]
        self.prefixes = tuple(sorted({url for url in every if "://" in url}))
        self.parts = tuple(sorted({url for url in every if "://" not in url}))

    def judge(self, url: str) -> tuple[str | None, str | None]:
        """Reason to drop an address, or None, and its canonical spelling where it has one."""
        try:
            address, canonical = parse_address(url), canonical_url(url)
        except AddressError:
            return "broken_line", None
        if address.scheme not in self.schemes:
            return "scheme", None
        reason = self._block(address.host, canonical)
        return reason, canonical if reason is None else None

    def judge_origin(self, url: str) -> str | None:
        """Reason to drop a picture that is here already, from where it came; None also where that is no address."""
        try:
            return self._block(parse_address(url).host, canonical_url(url))
        except AddressError:
            return None

    def _block(self, host: str, canonical: str) -> str | None:
        if self.hosts and any(domain in self.hosts for domain in _domains(host)):
            return "blocked_host"
        if canonical.startswith(self.prefixes) or any(part in canonical for part in self.parts):
            return "blocked_url"
        return None


def url_key(canonical: str) -> int:
    """64-bit key of a canonical address: two different ones share a key once in 2**64 pairs."""
    return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big")


def repeats(keys: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids whose key a lesser id has, ascending, and that least id: keys uint64 [N], ids int64 [N] -> int64 [M], [M]."""
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    starts = np.ones(len(keys), bool)
    starts[1:] = keys[1:] != keys[:-1]
    first_ids = ids[np.flatnonzero(starts)][np.cumsum(starts) - 1] if len(ids) else ids
    later, first = ids[~starts], first_ids[~starts]
    by_id = np.argsort(later, kind="stable")
    return later[by_id], first[by_id]


class ScreenKeys(ShardStage):
    """Keys of the addresses that pass every rule about one line."""

    name = "screen_keys"
    section = "screen"
    kind = "output"
    reads = ("urls",)
    writes = ("url_keys",)
    roles = ("pool", "query", "benchmark")
    by_content = ("urls",)

    def __init__(self, config: ScreenConfig) -> None:
        super().__init__(config)
        self.rules: Rules | None = None
        self.screen = config

    def fingerprint_values(self) -> dict[str, Any]:
        """The rules; how many ranges of keys there are is of no matter here."""
        return self.screen.fingerprint_values()

    def preflight(self) -> None:
        """Block lists must be there."""
        Rules(self.screen)

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Keys of one shard."""
        del shard
        self.rules = self.rules or Rules(self.screen)
        urls = io.table("urls", ["image_id", "url", "location", "error"])
        ids, keys = [], []
        for row in urls.to_pylist():
            if row["error"] is None and row["location"] is None:
                reason, canonical = self.rules.judge(row["url"])
                if reason is None and canonical is not None:
                    ids.append(row["image_id"])
                    keys.append(url_key(canonical))
        columns = [pa.array(ids, pa.int64()), pa.array(keys, pa.uint64())]
        return {"url_keys": pa.Table.from_arrays(columns, schema=TABLES["url_keys"].schema)}


class UrlDuplicates(GlobalStage):
    """Lines of the pool whose address an earlier line has."""

    name = "url_duplicates"
    section = "screen"
    reads = ("url_keys",)
    writes = ("url_duplicates",)

    def __init__(self, config: ScreenConfig) -> None:
        super().__init__(config)
        self.num_ranges = config.key_ranges

    def fingerprint_values(self) -> dict[str, Any]:
        """Nothing of the recipe: keys say it all."""
        return {}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002 - the word the design uses
        """One task for each range of keys."""
        parts = tuple(context.part("url_keys", shard) for shard in context.shards("pool"))
        tasks = [
            Task(
                function=find_repeats,
                writes=context.part("url_duplicates", number),
                args={
                    "folder": parts[0].folder if parts else "url_keys",
                    "shards": [part.index for part in parts],
                    "number": number,
                    "num_ranges": self.num_ranges,
                },
                reads=parts,
            )
            for number in range(self.num_ranges)
        ]
        map(tasks)


def find_repeats(io: TaskIO, *, folder: str, shards: Sequence[int], number: int, num_ranges: int) -> pa.Table:
    """Repeats in range ``number`` of ``num_ranges`` equal ones; one shard's keys are held beside the range's."""
    low = (number << _KEY_BITS) // num_ranges
    high = ((number + 1) << _KEY_BITS) // num_ranges - 1
    all_keys, all_ids = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for shard in shards:
        table = io.read(Part(TABLES["url_keys"].root, folder, shard), ["image_id", "url_key"])
        keys = table["url_key"].to_numpy()
        inside = (keys >= np.uint64(low)) & (keys <= np.uint64(high))
        all_keys.append(keys[inside])
        all_ids.append(table["image_id"].to_numpy()[inside])
    ids, first_ids = repeats(np.concatenate(all_keys), np.concatenate(all_ids))
    return pa.Table.from_arrays([pa.array(ids), pa.array(first_ids)], schema=TABLES["url_duplicates"].schema)


class Screened(ShardStage):
    """The verdict over all lines. Of query sets and benchmarks only broken lines are dropped."""

    name = "screened"
    section = "screen"
    kind = "verdict"
    reads = ("urls", "url_duplicates")
    writes = ("screened",)
    roles = ("pool", "query", "benchmark")
    by_content = ("urls",)

    def __init__(self, config: ScreenConfig) -> None:
        super().__init__(config)
        self.rules: Rules | None = None
        self.screen = config

    def fingerprint_values(self) -> dict[str, Any]:
        """The rules."""
        return self.screen.fingerprint_values()

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each line of the shard."""
        del shard
        urls = io.table("urls", ["image_id", "url", "location", "error"])
        rows = urls.to_pylist()
        reasons: list[str | None] = [None if row["error"] is None else "broken_line" for row in rows]
        if io.role == "pool":
            self.rules = self.rules or Rules(self.screen)
            repeated = _repeats_of(io, urls["image_id"].to_numpy())
            for place, row in enumerate(rows):
                if reasons[place] is not None:
                    continue
                if row["location"] is not None:
                    reasons[place] = None if row["url"] is None else self.rules.judge_origin(row["url"])
                    continue
                reasons[place] = self.rules.judge(row["url"])[0]
                if reasons[place] is None and row["image_id"] in repeated:
                    reasons[place] = "duplicate_url"
        nothing = pa.nulls(len(rows), pa.string())
        covered = pa.table({"image_id": urls["image_id"], "sha256": nothing})
        return {"screened": verdict_table("screened", covered, reason=reasons)}


def _repeats_of(io: TaskIO, ids: np.ndarray) -> set[int]:
    """Which of these ids repeat an earlier line's address."""
    repeated: set[int] = set()
    if len(ids):
        for part in io.parts("url_duplicates"):
            found = io.read(part, ["image_id"])["image_id"].to_numpy()
            begin, end = np.searchsorted(found, [ids[0], ids[-1] + 1])
            repeated.update(found[begin:end].tolist())
    return repeated


def _domains(host: str) -> list[str]:
    """The host and every domain above it."""
    labels = host.split(".")
    return [".".join(labels[place:]) for place in range(len(labels))]


def _plain(host: str) -> str:
    """A host of a rule in the spelling that hosts of addresses have."""
    host = host.strip().lower().removeprefix("*.").strip(".")
    if host.isascii():
        return host
    try:
        return parse_address(f"http://{host}").host
    except AddressError:  # no address has such a host
        return host


def _read_block_list(path: str) -> tuple[str, ...]:
    try:
        state = Path(path).stat()
        return _block_list(path, state.st_mtime_ns, state.st_size)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"screen.block_list_files: {path!r}: {why}; give text files with one entry a line") from None


@lru_cache(maxsize=64)  # the planner asks for the fingerprint of every shard
def _block_list(path: str, mtime_ns: int, num_bytes: int) -> tuple[str, ...]:
    del mtime_ns, num_bytes  # keys of the cache: a file that changed is read again
    lines = (line.partition("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return tuple(entry for line in lines for entry in _entries(line))


def _entries(line: str) -> list[str]:
    """What a line blocks: itself, or the names of a line of a hosts file, ``0.0.0.0 NAME NAME``."""
    first, *names = line.split() or [""]
    if names:
        try:
            ipaddress.ip_address(first)
        except ValueError:
            return [line]
        return names
    return [line] if line else []
