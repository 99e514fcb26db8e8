"""Screening: which lines may be fetched at all. Schemes, block lists, and addresses that an earlier line has.

``screen_keys`` judges each line on its own, once, and gives those that pass the 64-bit key of their address. Equal
addresses are then found without holding them all: ``url_order`` holds the keys of some shards in order, a task of
``url_repeats`` reads one range of keys out of all parts, and ``url_duplicates`` brings what was found back to the order
of lines. The least id of a key wins. Between groups a key counts once a group, however many of its lines have it, so
that ranges are of even size and tasks of bounded memory also where one address fills the lists. A list that is appended
sorts only its own shards and those of the last group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation.ingest.address import AddressError, canonical_url, parse_address
from curation.ingest.blocked import Blocked, read_block_lists, read_entries
from curation.ingest.spelling import spelled
from curation.schema import TABLES, Part, groups_by_size, id_range, part_of_group
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, verdict_table
from training.config import EXECUTION, Config

_BUCKET_BITS = 16  # of a key; ranges of keys are whole buckets
_BYTES_OF_KEY = 96  # while the repeats of a range are found, at most
_ROWS_IN_GROUP = 1 << 21  # of `url_order`, at most: 200 MB while they are sorted
_REASONS = ("broken_line", "scheme", "blocked_host", "blocked_url")


class ScreenConfig(Config):
    """Rules about addresses. Pictures of folders and archives have none, and pass.

    A picture of a parquet file that says where it came from is here already: of it only the block lists are asked.
    """

    schemes: list[str] = Field(default=["http", "https"], description="of the address, lower case")
    blocked_hosts: list[str] = Field(
        default_factory=list,
        description="hosts; a domain covers all hosts below it. A public suffix (github.io) is written *.github.io",
    )
    blocked_urls: list[str] = Field(
        default_factory=list,
        description="HOST/PATH: how the path begins, there and on all hosts below; with a scheme in front: how the "
        "address begins; else: a part of it. Held against its canonical spelling",
    )
    block_list_files: list[str] = Field(
        default_factory=list,
        json_schema_extra=EXECUTION,  # their content is in the fingerprint, their paths are not
        description="files with one such rule a line (a part begins with /), or lines of a hosts file; # begins a "
        "comment",
    )
    memory_mb: int = Field(
        default=500,
        ge=1,
        json_schema_extra=EXECUTION,
        description="of one task of de-duplication; says how many ranges the keys are cut into",
    )

    def fingerprint_values(self) -> dict[str, Any]:
        """The rules, those in files by their content, so that a file may move."""
        return {**super().fingerprint_values(), "block_lists": self.listed().digest}

    def listed(self) -> Blocked:
        """The rules in files."""
        return read_block_lists("screen.block_list_files", self.block_list_files)


# --- one line -------------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What the rules say of N lines."""

    reason: pa.Array  # string; null: passes
    canonical: pa.Array  # string; null where the text is no address


class Rules:
    """All rules of a config, its files read."""

    def __init__(self, config: ScreenConfig) -> None:
        hosts = read_entries("screen.blocked_hosts", config.blocked_hosts, is_host=True)
        urls = read_entries("screen.blocked_urls", config.blocked_urls, is_host=False)
        self.schemes = pa.array(sorted({scheme.lower() for scheme in config.schemes}), pa.string())
        self.blocked = Blocked(tuple(sorted({*hosts.entries, *urls.entries, *config.listed().entries})))

    def judge(self, urls: pa.Array, is_broken: np.ndarray, is_here: np.ndarray) -> Judged:
        """Why lines are dropped, each on its own.

        Args:
            urls: string [N]; null for pictures that are here and have none.
            is_broken: bool [N]; lines in which registration found no address.
            is_here: bool [N]; local pictures, of which only the block lists are asked, where they say an address.
        """
        canonical, scheme, host = spelled(urls)
        is_address = canonical.is_valid().to_numpy(zero_copy_only=False) & ~is_broken
        code = np.full(len(urls), -1, np.int8)
        code[is_broken | ~(is_address | is_here)] = _REASONS.index("broken_line")
        allowed = pc.is_in(scheme, value_set=self.schemes).to_numpy(zero_copy_only=False)
        code[is_address & ~is_here & ~allowed] = _REASONS.index("scheme")
        left = np.flatnonzero(is_address & (code < 0))
        for reason, found in self._block(left, host, canonical):
            code[found] = _REASONS.index(reason)
        return Judged(pa.array(_REASONS).take(pa.array(code, mask=code < 0)), canonical)

    def blocks(self, url: str) -> str | None:
        """What block lists say of one address, without what arrays of one cost; None where they are silent."""
        try:
            canonical, host = canonical_url(url), parse_address(url).host
        except AddressError:
            return None
        blocked = self.blocked
        if blocked.names_host(host):
            return "blocked_host"
        named = blocked.asks_path(host) and blocked.names_path(host, canonical)
        return "blocked_url" if named or (blocked.has_parts and blocked.names_part(canonical)) else None

    def _block(self, rows: np.ndarray, host: pa.Array, canonical: pa.Array) -> list[tuple[str, np.ndarray]]:
        """Which of some rows are blocked, by reason; each host is looked up once."""
        blocked = self.blocked
        hosts = host.take(pa.array(rows)).dictionary_encode()
        codes, names = hosts.indices.to_numpy(), hosts.dictionary.to_pylist()
        named = np.array([blocked.names_host(name) for name in names], bool)[codes]
        by_host, rows, codes = rows[named], rows[~named], codes[~named]
        asked = np.array([blocked.asks_path(name) for name in names], bool)[codes]
        if not (blocked.has_parts or asked.any()):
            return [("blocked_host", by_host)]
        by_path = np.zeros(len(rows), bool)
        urls = canonical.take(pa.array(rows)).to_pylist()
        for place in np.flatnonzero(asked).tolist():
            by_path[place] = blocked.names_path(names[codes[place]], urls[place])
        if blocked.has_parts:
            by_path |= np.array([blocked.names_part(url) for url in urls], bool)
        return [("blocked_host", by_host), ("blocked_url", rows[by_path])]


def url_keys(canonical: Sequence[str]) -> np.ndarray:
    """64-bit keys of canonical addresses, uint64 [N]: two different ones share a key once in 2**64 pairs."""
    digests = b"".join([hashlib.sha256(url.encode()).digest()[:8] for url in canonical])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


class ScreenKeys(ShardStage):
    """What the rules about one line say, and keys of the addresses that pass them.

    Of query sets and benchmarks only broken lines are dropped.
    """

    name = "screen_keys"
    section = "screen"
    kind = "output"
    version = 3
    reads = ("urls",)
    writes = ("url_keys",)
    roles = ("pool", "query", "benchmark")
    by_content = ("urls",)
    config: ScreenConfig

    def __init__(self, config: ScreenConfig) -> None:
        super().__init__(config)
        self.rules: Rules | None = None

    def preflight(self) -> None:
        """Block lists must be there, and every rule must be one."""
        Rules(self.config)

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each line of the shard."""
        del shard
        table = io.table("urls", ["image_id", "url", "location", "error"]).combine_chunks()
        columns = [table[name].combine_chunks() for name in ("url", "error", "location")]
        urls, (is_broken, is_here) = columns[0], (c.is_valid().to_numpy(zero_copy_only=False) for c in columns[1:])
        if io.role != "pool":
            reason = pc.if_else(pa.array(is_broken), "broken_line", pa.scalar(None, pa.string()))
            key = pa.nulls(len(urls), pa.uint64())
        else:
            self.rules = self.rules or Rules(self.config)
            reason, canonical = self.rules.judge(urls, is_broken, is_here)
            has_key = reason.is_null().to_numpy(zero_copy_only=False) & ~is_here
            values = np.zeros(len(urls), np.uint64)
            values[has_key] = url_keys(canonical.filter(pa.array(has_key)).to_pylist())
            key = pa.array(values, mask=~has_key)
        return {"url_keys": pa.table([table["image_id"], reason, key], schema=TABLES["url_keys"].schema)}


# --- all lines ------------------------------------------------------------------------------------------------------


def repeats(keys: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids whose key a lesser id has, ascending, and that least id: keys uint64 [N], ids int64 [N] -> int64 [M], [M]."""
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    starts = np.ones(len(keys), bool)
    starts[1:] = keys[1:] != keys[:-1]
    later = np.flatnonzero(~starts)
    firsts = np.flatnonzero(starts)
    first = ids[firsts[np.searchsorted(firsts, later) - 1]] if len(later) else ids[later]
    by_id = np.argsort(ids[later], kind="stable")
    return ids[later][by_id], first[by_id]


def num_ranges_of(num_keys: int, memory_bytes: int) -> int:
    """Ranges that keys are cut into, so that one fits: a power of two, so that few more keys cut the same ones."""
    fitting = max(1, memory_bytes // _BYTES_OF_KEY)
    num = 1
    while num * fitting < num_keys and num < 1 << _BUCKET_BITS:
        num *= 2
    return num


def keys_in_order(io: TaskIO, *, shards: list[int]) -> pa.Table:
    """One part of ``url_order``, of a group of shards."""
    tables = [io.read(io.part("url_keys", shard), ["url_key", "image_id"]) for shard in shards]
    table = pa.concat_tables(tables).filter(pc.field("url_key").is_valid())
    keys, ids = table["url_key"].to_numpy(), table["image_id"].to_numpy()
    order = np.argsort(keys, kind="stable")  # ids ascend already
    keys = keys[order]
    bucket = (keys >> np.uint64(64 - _BUCKET_BITS)).astype(np.int32)
    return pa.table([bucket, keys, ids[order]], schema=TABLES["url_order"].schema)


def repeats_of_range(io: TaskIO, *, groups: list[int], buckets: list[int]) -> pa.Table:
    """One part of ``url_repeats``: of the buckets from the first to the one behind the last."""
    within = ("bucket", buckets[0], buckets[1])
    all_keys, all_ids = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for group in groups:
        table = io.read(io.part("url_order", group), ["url_key", "image_id"], within=within)
        keys, firsts = np.unique(table["url_key"].to_numpy(), return_index=True)  # of each key its least id
        all_keys.append(keys)
        all_ids.append(table["image_id"].to_numpy()[firsts])
    columns = repeats(np.concatenate(all_keys), np.concatenate(all_ids))
    return pa.table(columns, schema=TABLES["url_repeats"].schema)


def repeats_of_lines(io: TaskIO, *, shards: list[int], ranges: list[int]) -> pa.Table:
    """One part of ``url_duplicates``: lines of a group of shards whose key an earlier line of it has, or another group.

    What other groups have is read by ranges of ids.
    """
    schema = TABLES["url_duplicates"].schema
    order = io.read(io.part("url_order", shards[0]), ["url_key", "image_id"])
    later, firsts = repeats(order["url_key"].to_numpy(), order["image_id"].to_numpy())
    within = ("image_id", *id_range(shards[0], shards[-1]))
    found = [io.read(io.part("url_repeats", index), within=within) for index in ranges]
    elsewhere = pa.concat_tables([schema.empty_table(), *found]).sort_by("image_id")
    ids, before = (elsewhere[name].to_numpy() for name in ("image_id", "first_id"))
    if len(ids):  # the first of the group may be none of all
        at = np.minimum(np.searchsorted(ids, firsts), len(ids) - 1)
        firsts = np.where(ids[at] == firsts, before[at], firsts)
    here = pa.table([later, firsts], schema=schema)
    return pa.concat_tables([elsewhere, here]).sort_by("image_id")


class UrlDuplicates(GlobalStage):
    """Lines of the pool whose address an earlier line has."""

    name = "url_duplicates"
    section = "screen"
    version = 3
    reads = ("url_keys",)
    writes: ClassVar[tuple[str, ...]] = ("url_duplicates", "url_repeats", "url_order")
    config: ScreenConfig

    def fingerprint_values(self) -> dict[str, Any]:
        """Nothing of the recipe: keys say it all."""
        return {}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002 - the word the design uses
        """Sort by key, compare, sort by line."""
        sizes = [(shard, context.num_rows(context.part("url_keys", shard))) for shard in context.shards("pool")]
        groups = list(groups_by_size(sizes, _ROWS_IN_GROUP))
        sort = [
            Task(
                function=keys_in_order,
                args={"shards": shards},
                reads=tuple(context.part("url_keys", shard) for shard in shards),
                writes=context.part("url_order", shards[0]),
            )
            for shards in groups
        ]
        map(sort)
        order = tuple(task.writes for task in sort)
        compare = self._compare(context, order)
        map(compare)
        found = tuple(task.writes for task in compare)
        map(
            [
                Task(
                    function=repeats_of_lines,
                    args={"shards": shards, "ranges": [part.index for part in found]},
                    reads=(part, *found),
                    writes=context.part("url_duplicates", shards[0]),
                )
                for shards, part in zip(groups, order, strict=True)
            ]
        )

    def _compare(self, context: Context, order: tuple[Part, ...]) -> list[Task]:
        num = num_ranges_of(sum(context.num_rows(part) for part in order), self.config.memory_mb * 1_000_000)
        step = (1 << _BUCKET_BITS) // num
        return [
            Task(
                function=repeats_of_range,
                args={"groups": [part.index for part in order], "buckets": [number * step, (number + 1) * step]},
                reads=order,
                writes=context.part("url_repeats", number),
            )
            for number in range(num)
        ]


class Screened(ShardStage):
    """The verdict over all lines: what ``screen_keys`` says of each, and whether its address is a repeat."""

    name = "screened"
    section = "screen"
    kind = "verdict"
    version = 2
    reads = ("url_keys", "url_duplicates")
    writes = ("screened",)
    roles = ("pool", "query", "benchmark")

    def fingerprint_values(self) -> dict[str, Any]:
        """Nothing of the recipe: the tables say it all."""
        return {}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each line of the shard."""
        table = io.table("url_keys", ["image_id", "reason"])
        ids, reason = (table[name].combine_chunks() for name in ("image_id", "reason"))
        if io.role == "pool":
            part = part_of_group(io.parts("url_duplicates"), shard)
            repeated = io.read(part, ["image_id"], within=("image_id", *id_range(shard, shard)))["image_id"]
            reason = pc.if_else(pc.is_in(ids, value_set=repeated), "duplicate_url", reason)
        covered = pa.table({"image_id": ids, "sha256": pa.nulls(len(ids), pa.string())})
        return {"screened": verdict_table("screened", covered, reason=reason)}
