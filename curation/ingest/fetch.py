"""Fetching: bytes of what screening let through, from the web or from local files, each picture stored as it came."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation.ingest.breaker import Breaker, Reached
from curation.ingest.fetcher import Fetcher, Refuses
from curation.ingest.guard import Guard
from curation.ingest.local import TOO_LARGE, Read, read_local
from curation.ingest.magic import EXTENSIONS, SNIFF_BYTES, sniff_format
from curation.ingest.outcome import PERMANENT, TRANSIENT, Outcome
from curation.ingest.pace import Key, Pause
from curation.ingest.resolver import Resolver
from curation.ingest.robots import Rules, forget_unreachable
from curation.ingest.screen import Rules as BlockLists
from curation.ingest.screen import ScreenConfig
from curation.ingest.spool import Spool
from curation.ingest.takedown import TABLE as TAKEDOWNS
from curation.ingest.takedown import TAKEN_DOWN, rules_of
from curation.ingest.takedown import Rules as Takedowns
from curation.schema import TABLES
from curation.stage import OutageError, Resources, ShardStage, TaskIO, verdict_table
from training.config import EXECUTION, Config

BYTES = "bytes"  # folder of the tars


class FetchConfig(Config):
    """How pictures are fetched.

    What decides which pictures may be had is content: agent, robots, opt-out, limits of size and of redirects. How
    long, how often and how many at once is execution: patience changes what succeeds on a bad day, and must not ask
    for millions of pictures again.
    """

    agent: str = Field(
        default="lvd-curate", pattern=r"^[A-Za-z_-]+$", description="our name in robots.txt and X-Robots-Tag"
    )
    respect_robots: bool = Field(default=True, description="ask for robots.txt first, and do as it says")
    respect_opt_out: bool = Field(default=True, description="X-Robots-Tag noai, noindex, …; tdm-reservation")
    max_bytes: int = Field(default=20_000_000, ge=1, description="of one picture")
    max_redirects: int = Field(default=5, ge=0)
    contact: str = Field(
        default="",
        json_schema_extra=EXECUTION,
        pattern=r"^[\x20-\x7e]*$",
        description="address or page that stands in the User-Agent, for those who want to complain",
    )
    concurrency: int = Field(default=64, ge=1, json_schema_extra=EXECUTION, description="requests at once, each worker")
    per_host: int = Field(
        default=2, ge=1, json_schema_extra=EXECUTION, description="connections to one host, each worker"
    )
    per_host_interval_s: float = Field(
        default=0.2,
        ge=0,
        json_schema_extra=EXECUTION,
        description="least time between requests to one host, each worker: N workers ask N times as often",
    )
    per_host_patience_s: float = Field(
        default=3600.0,
        gt=0,
        json_schema_extra=EXECUTION,
        description="that a shard gives to one host; rows whose turn would come later end as host_busy",
    )
    max_crawl_delay_s: float = Field(
        default=30.0,
        ge=0,
        json_schema_extra=EXECUTION,
        description="Crawl-delay that is kept; a host that asks for more in its robots.txt is left alone (crawl_delay)",
    )
    verify_certificates: bool = Field(
        default=True,
        json_schema_extra=EXECUTION,
        description="of https; false: whoever answers is believed, and bad_certificate does not occur",
    )
    timeout_s: float = Field(default=20.0, gt=0, json_schema_extra=EXECUTION, description="of one visit, body included")
    attempts: int = Field(default=3, ge=1, json_schema_extra=EXECUTION, description="visits, when failures may pass")
    backoff_s: float = Field(default=1.0, ge=0, json_schema_extra=EXECUTION, description="first wait; it doubles")
    max_retry_after_s: float = Field(
        default=30.0, ge=0, json_schema_extra=EXECUTION, description="a longer Retry-After is not waited for"
    )
    breaker: bool = Field(
        default=True,
        json_schema_extra=EXECUTION,
        description="stop where nothing can be reached; false: failures are recorded whatever they come from",
    )
    breaker_hosts: int = Field(
        default=50, ge=3, json_schema_extra=EXECUTION, description="the last different hosts that the breaker looks at"
    )
    breaker_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        json_schema_extra=EXECUTION,
        description="of them that failed for want of a name or an answer, at which hosts reached before are probed",
    )
    breaker_patience_s: float = Field(
        default=30.0,
        ge=0,
        json_schema_extra=EXECUTION,
        description="that none of those may be reached before the run stops; rows that failed meanwhile go again",
    )
    nameservers: list[str] = Field(
        default_factory=list,
        json_schema_extra=EXECUTION,
        description="ADDRESS or ADDRESS:PORT of name servers to ask instead of the system",
    )
    resolve: dict[str, str] = Field(
        default_factory=dict,
        json_schema_extra=EXECUTION,
        description="hosts that stand at ADDRESS:PORT; the only ones that may be inside a private network",
    )
    resolve_checked: bool = Field(
        default=False,
        json_schema_extra=EXECUTION,
        description="look these hosts up as well, and refuse any that a name server puts elsewhere",
    )
    locations: dict[str, str] = Field(
        default_factory=dict,
        json_schema_extra=EXECUTION,
        description="where each source lies; the command fills it in",
    )
    kinds: dict[str, str] = Field(
        default_factory=dict, json_schema_extra=EXECUTION, description="kind of each source; the command fills it in"
    )

    @property
    def user_agent(self) -> str:
        """Header of every request."""
        return f"{self.agent}/1.0 (+{self.contact})" if self.contact else f"{self.agent}/1.0"


class FetchStage(ShardStage):
    """Bytes and what is known of how they came, one row for each line that screening let through.

    An address of the takedown list is not asked for, and bytes of it are not stored: the row says ``taken_down``.

    Args:
        config: of the stage.
        screen: its block lists hold for redirects too. They are no part of what makes facts stale: whose lines they
            block leaves by screening, and nobody asks for millions of pictures again because one host was added.
    """

    name = "fetch"
    version = 2
    section = "fetch"
    kind = "facts"
    reads = ("urls", "screened")
    consults = (TAKEDOWNS,)
    writes = ("images", "fetch_log")
    after = "screened"
    transient = TRANSIENT
    permanent = PERMANENT
    roles = ("pool", "query", "benchmark")
    resources = Resources(cpus=0, speculative=False)

    def __init__(self, config: FetchConfig, screen: ScreenConfig | None = None) -> None:
        super().__init__(config)
        self.fetch = config
        self.screen = ScreenConfig() if screen is None else screen
        self.blocked: BlockLists | None = None
        self.rules: dict[str, Rules] = {}  # robots.txt, kept from shard to shard
        self.reached = Reached()
        self.pauses: dict[Key, Pause] = {}

    def preflight(self) -> None:
        """Exempt hosts must name an address and a port, name servers an address."""
        Guard(self.fetch.resolve, resolver=Resolver(self.fetch.nameservers))

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Fetch the rows of one shard.

        Raises:
            OutageError: nothing can be reached.
        """
        del shard
        urls = io.table("urls", ["image_id", "source", "url", "host", "location"])
        places = pc.index_in(io.rows["image_id"], value_set=urls["image_id"].combine_chunks())
        rows = urls.take(places).to_pylist()
        tar = io.tar(BYTES)
        images: list[dict[str, Any]] = []
        log: list[dict[str, Any]] = []
        taken_down = rules_of(io)
        named = {row["image_id"] for row in rows if taken_down.url(row["url"])}
        remote = [row for row in rows if row["location"] is None and row["image_id"] not in named]
        self._know_hosts(io)
        spool = Spool(io.scratch)
        outcomes = asyncio.run(self._fetch(remote, spool, taken_down, self._refuses(io.role))) if remote else {}
        local = self._read([row for row in rows if row["location"] is not None and row["image_id"] not in named])
        for row in rows:  # in id order, so that equal bytes make an equal tar
            image_id = row["image_id"]
            data: bytes | None = None
            if image_id in named:
                outcome = Outcome(reason=TAKEN_DOWN)
            elif row["location"] is None:
                outcome, data = outcomes[image_id], spool.get(image_id)
            else:
                outcome, data = next(local)
            sha256 = None if data is None else hashlib.sha256(data).hexdigest()
            if sha256 is not None and taken_down.sha256(sha256):
                outcome, data, sha256 = replace(outcome, reason=TAKEN_DOWN, format=None), None, None
            images.append(_image(image_id, outcome, sha256, None if data is None else len(data)))
            if data is not None:
                images[-1]["offset"] = tar.add(f"{image_id:018d}.{EXTENSIONS[str(outcome.format)]}", data)
            log.extend({"image_id": image_id, **vars(hop)} for hop in outcome.hops)
        spool.close()
        path_of_tar = tar.close()
        for image in images:
            image["object"] = path_of_tar if image["ok"] else None
        return {
            "images": pa.Table.from_pylist(images, schema=TABLES["images"].schema),
            "fetch_log": pa.Table.from_pylist(log, schema=TABLES["fetch_log"].schema),
        }

    def _know_hosts(self, io: TaskIO) -> None:
        """Where nothing was reached yet, hosts that an earlier command reached are known to be there."""
        if self.reached.known:
            return
        images = io.table("images", ["ok", "final_url"])
        for url in images.filter(images["ok"])["final_url"].drop_null().to_pylist():
            parts = urlsplit(url)
            self.reached.answered(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            self.reached.gave_picture(parts.hostname or "", url)

    def _refuses(self, role: str) -> Refuses:
        """What block lists say of an address; as in screening, they are not asked for query sets and benchmarks."""
        self.blocked = self.blocked or BlockLists(self.screen)
        return self.blocked.blocks if role == "pool" and self.blocked.blocked.entries else lambda url: None

    async def _fetch(
        self, rows: list[dict[str, Any]], spool: Spool, taken_down: Takedowns, refuses: Refuses
    ) -> dict[int, Outcome]:
        """Outcomes by id; bodies are put down as they come, so memory holds those in flight only."""
        outcomes: dict[int, Outcome] = {}
        try:
            while rows:
                doubted = await self._fetch_once(rows, outcomes, spool, taken_down, refuses)
                rows = [row for row in rows if row["image_id"] in doubted]
                if doubted:
                    forget_unreachable(self.rules)
        except (BaseExceptionGroup, OutageError) as error:
            forget_unreachable(self.rules)
            raise (error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error) from None
        return outcomes

    async def _fetch_once(
        self,
        rows: list[dict[str, Any]],
        outcomes: dict[int, Outcome],
        spool: Spool,
        taken_down: Takedowns,
        refuses: Refuses,
    ) -> set[int]:
        """Fetch rows; those that failed in an outage that passed."""
        fetcher = Fetcher(
            self.fetch,
            rules=self.rules,
            taken_down=taken_down,
            refuses=refuses,
            reached=self.reached,
            pauses=self.pauses,
            scratch=spool.scratch,
        )

        async def gives_picture(url: str) -> bool:
            # Another one: nobody asks this one while the breaker judges.
            async with Fetcher(
                self.fetch, rules=self.rules, taken_down=taken_down, refuses=refuses, reached=self.reached
            ) as prober:
                return (await prober.fetch(url)).reason is None

        breaker = Breaker(self.fetch, self.reached, fetcher.is_there, gives_picture)
        fetcher.calm = breaker.calm

        async def one(row: dict[str, Any]) -> None:
            outcome = await fetcher.fetch(row["url"])
            if outcome.body is not None:
                spool.put(row["image_id"], outcome.body)
            earlier = outcomes.get(row["image_id"])  # in an outage: its visits were made, too
            hops = outcome.hops if earlier is None else (*earlier.hops, *outcome.hops)
            outcomes[row["image_id"]] = replace(outcome, body=None, hops=hops)
            await breaker.count(row["image_id"], row["host"], outcome.reason, row["url"])

        async with fetcher:
            async with asyncio.TaskGroup() as group:
                for row in rows:
                    group.create_task(one(row))
            await breaker.end()
        return breaker.doubted

    def _read(self, rows: list[dict[str, Any]]) -> Iterator[tuple[Outcome, bytes | None]]:
        """Outcome and bytes of local rows; those of one shard belong to one source."""
        if not rows:
            return
        source = rows[0]["source"]
        kind, location = self.fetch.kinds[source], self.fetch.locations[source]
        for data in read_local(kind, location, [row["location"] for row in rows], self.fetch.max_bytes):
            yield _judge_local(data)


class Fetched(ShardStage):
    """The verdict over what was fetched: bytes are there, or why not."""

    name = "fetched"
    section = "fetch"
    kind = "verdict"
    reads = ("images", "screened")
    writes = ("fetched",)
    after = "screened"
    roles = ("pool", "query", "benchmark")
    by_content = ("images",)

    def fingerprint_values(self) -> dict[str, Any]:
        """Nothing: the table ``images`` says it all."""
        return {}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each line that screening let through."""
        del shard
        images = io.table("images", ["image_id", "reason", "sha256"])
        images = images.take(pc.index_in(io.rows["image_id"], value_set=images["image_id"].combine_chunks()))
        rows = images.select(["image_id", "sha256"])
        return {"fetched": verdict_table("fetched", rows, reason=images["reason"].to_pylist())}


def _judge_local(data: Read) -> tuple[Outcome, bytes | None]:
    if data is None:
        return Outcome(reason="file_missing"), None
    if data == TOO_LARGE:
        return Outcome(reason=TOO_LARGE), None
    found = sniff_format(data[:SNIFF_BYTES])
    return (Outcome(reason="not_an_image"), None) if found is None else (Outcome(format=found), data)


def _image(image_id: int, outcome: Outcome, sha256: str | None, num_bytes: int | None) -> dict[str, Any]:
    """A row of ``images``, without where the bytes lie."""
    return {
        "image_id": image_id,
        "ok": sha256 is not None,
        "reason": outcome.reason,
        "transient": outcome.transient,
        "http_status": outcome.http_status,
        "final_url": outcome.final_url,
        "content_type": outcome.content_type,
        "robots": outcome.robots,
        "opt_out": outcome.opt_out,
        "format": outcome.format,
        "sha256": sha256,
        "num_bytes": num_bytes,
    }
