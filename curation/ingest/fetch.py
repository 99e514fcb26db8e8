"""Fetch: the bytes of every line that screening let through, or the class of its failure.

A shard is fetched into scratch and then packed in id order, so that the same answers give the same tar. Servers are never
visited twice for the same bytes: what was stored stays, a fetch is never run twice at once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from curation.dedup.near import rows_at
from curation.ingest.sources import LocalReader
from curation.schema import TABLES
from curation.stage import EXECUTION, Config, Resources, ShardStage, TaskIO, verdict_table

_BREAKER_ROWS = 50
_BREAKER_SHARE = 0.9


class FetchConfig(Config):
    """How the web is visited. What is asked for and kept decides content; pace and patience do not."""

    agent: str = Field("lvd-bot", pattern=r"^[A-Za-z_-]+$", description="our token in robots.txt, and the User-Agent")
    contact: str = Field("", json_schema_extra=EXECUTION, description="address or page for site owners, sent along")
    respect_robots: bool = True
    respect_opt_out: bool = True
    max_bytes: int = Field(30_000_000, ge=1)
    max_redirects: int = Field(5, ge=0, le=20)
    concurrency: int = Field(64, ge=1, json_schema_extra=EXECUTION, description="connections of one worker")
    per_host: int = Field(2, ge=1, json_schema_extra=EXECUTION, description="connections to one host, of one worker")
    per_host_interval_s: float = Field(0.0, ge=0, json_schema_extra=EXECUTION, description="between visits to a host")
    max_crawl_delay_s: float = Field(10.0, ge=0, json_schema_extra=EXECUTION)
    timeout_s: float = Field(30.0, gt=0, json_schema_extra=EXECUTION, description="of one visit, body included")
    connect_timeout_s: float = Field(10.0, gt=0, json_schema_extra=EXECUTION)
    attempts: int = Field(3, ge=1, json_schema_extra=EXECUTION, description="visits for transient failures")
    backoff_s: float = Field(
        0.5, ge=0, json_schema_extra=EXECUTION, description="before the second attempt, then doubled"
    )
    max_retry_after_s: float = Field(
        5.0, ge=0, json_schema_extra=EXECUTION, description="a longer wait is rate_limited"
    )
    resolve: dict[str, str] = Field(
        default_factory=dict, json_schema_extra=EXECUTION, description="host -> ip:port, the guard's only exemption"
    )
    locations: dict[str, str] = Field(
        default_factory=dict, json_schema_extra=EXECUTION, description="filled in: source -> its location"
    )
    kinds: dict[str, str] = Field(
        default_factory=dict, json_schema_extra=EXECUTION, description="filled in: source -> its kind"
    )
    image_columns: dict[str, str] = Field(
        default_factory=dict, json_schema_extra=EXECUTION, description="filled in: source -> its image column"
    )


class FetchBreakerError(RuntimeError):
    """Nearly nothing can be reached: the fault is here, so no row is marked."""


def failure_row(image_id: int, reason: str) -> dict[str, Any]:
    """Columns of ``images`` of a row without bytes."""
    return {"image_id": image_id, "ok": False, "reason": reason, "transient": False}


class _Spool:
    """Bodies on the worker's disk until their shard is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, image_id: int, body: bytes) -> None:
        (self._folder / f"{image_id}.body").write_bytes(body)

    def take(self, image_id: int) -> bytes:
        path = self._folder / f"{image_id}.body"
        body = path.read_bytes()
        path.unlink()
        return body


def stored(row: dict[str, Any], body: bytes, picture_format: str) -> dict[str, Any]:
    """Columns of ``images`` that follow from the bytes."""
    digest = hashlib.sha256(body).hexdigest()
    return row | {"ok": True, "format": picture_format, "sha256": digest, "num_bytes": len(body), "transient": False}


def read_local(rows: list[dict[str, Any]], config: FetchConfig, spool: _Spool) -> dict[int, dict[str, Any]]:
    """Rows of ``images`` of local pictures."""
    from curation.ingest.fetcher import sniff

    readers: dict[str, LocalReader] = {}
    images = {}
    for row in rows:
        source, image_id = row["source"], row["image_id"]
        if source not in readers:
            column = config.image_columns.get(source, "image")
            readers[source] = LocalReader(config.locations[source], config.kinds[source], column)
        body = readers[source].read(row["location"])
        if body is None:
            images[image_id] = failure_row(image_id, "file_missing")
        elif len(body) > config.max_bytes:
            images[image_id] = failure_row(image_id, "too_large")
        elif (found := sniff(body)) is None:
            images[image_id] = failure_row(image_id, "not_an_image")
        else:
            spool.put(image_id, body)
            images[image_id] = stored({"image_id": image_id, "reason": None}, body, found)
    return images


async def visit_all(
    rows: list[dict[str, Any]], config: FetchConfig, spool: _Spool
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Rows of ``images`` and of ``fetch_log`` of remote pictures.

    Raises:
        FetchBreakerError: of the first rows, nearly all failed to resolve or connect.
    """
    from curation.ingest.fetcher import Fetcher

    images: dict[int, dict[str, Any]] = {}
    log: list[dict[str, Any]] = []
    reasons: Counter[str | None] = Counter()
    limit = asyncio.Semaphore(config.concurrency)

    async def one(fetcher: Fetcher, row: dict[str, Any]) -> None:
        image_id = row["image_id"]
        async with limit:
            outcome = await fetcher.fetch(row["url"])
        line = {
            "image_id": image_id,
            "ok": False,
            "reason": outcome.reason,
            "transient": outcome.transient,
            "http_status": outcome.http_status,
            "final_url": outcome.final_url,
            "content_type": outcome.content_type,
            "robots": outcome.robots,
            "opt_out": outcome.opt_out,
        }
        if outcome.reason is None:
            spool.put(image_id, outcome.body)
            line = stored(line, outcome.body, str(outcome.format))
        images[image_id] = line
        log.extend({"image_id": image_id, **vars(visit)} for visit in outcome.visits)
        reasons[outcome.reason] += 1
        unreachable = reasons["dns"] + reasons["connection"]
        if reasons.total() >= _BREAKER_ROWS and unreachable > _BREAKER_SHARE * reasons.total():
            raise FetchBreakerError(
                f"{unreachable} of the first {reasons.total()} addresses could not be reached ({reasons['dns']} dns, "
                f"{reasons['connection']} connection): is the network up? no row was marked"
            )

    async with Fetcher(config) as fetcher, asyncio.TaskGroup() as group:
        for row in rows:
            group.create_task(one(fetcher, row))
    return images, log


class FetchStage(ShardStage):
    """Bytes into tars of the pool, and a row for every line."""

    name = "fetch"
    section = "fetch"
    kind = "facts"
    after = "screened"
    reads: ClassVar[tuple[str, ...]] = ("screened", "urls")
    writes = ("images", "fetch_log")
    roles = ("pool", "query", "benchmark")
    resources = Resources(cpus=0, max_tasks=2, speculative=False)
    config: FetchConfig

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Fetch the rows of a shard."""
        ids = io.rows["image_id"].to_numpy()
        urls = io.table("urls", ["image_id", "source", "url", "location"])
        rows = urls.take(pa.array(rows_at(urls["image_id"].to_numpy(), ids))).to_pylist()
        spool = _Spool(io.scratch)
        images = read_local([row for row in rows if row["location"] is not None], self.config, spool)
        remote = [row for row in rows if row["location"] is None]
        log: list[dict[str, Any]] = []
        if remote:
            try:
                visited, log = asyncio.run(visit_all(remote, self.config, spool))
            except* FetchBreakerError as group:
                raise group.exceptions[0] from None
            images |= visited
        tar = io.tar("bytes")
        for image_id in map(int, ids):
            row = images[image_id]
            if row["ok"]:
                extension = "jpg" if row["format"] == "jpeg" else row["format"]
                row["offset"] = tar.add(f"{image_id:018d}.{extension}", spool.take(image_id))
        path = tar.close()
        for row in images.values():
            row["object"] = path if row["ok"] else None
        log.sort(key=lambda visit: (visit["image_id"], visit["started_at"]))
        ordered = [images[int(image_id)] for image_id in ids]
        return {
            "images": pa.Table.from_pylist(ordered, schema=TABLES["images"].schema),
            "fetch_log": pa.Table.from_pylist(log, schema=TABLES["fetch_log"].schema),
        }


class Fetched(ShardStage):
    """Verdict: the lines whose bytes are stored."""

    name = "fetched"
    section = "fetch"
    kind = "verdict"
    after = "screened"
    reads: ClassVar[tuple[str, ...]] = ("screened", "images")
    by_content: ClassVar[tuple[str, ...]] = ("images",)
    writes = ("fetched",)
    roles = ("pool", "query", "benchmark")

    def fingerprint_values(self) -> dict[str, Any]:
        """It reads what happened, no setting."""
        return {}

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One shard."""
        images = io.table("images", ["image_id", "reason", "sha256"])
        at = pa.array(rows_at(images["image_id"].to_numpy(), io.rows["image_id"].to_numpy()))
        rows = pa.table([io.rows["image_id"], images["sha256"].take(at)], ["image_id", "sha256"])
        return {"fetched": verdict_table("fetched", rows, reason=images["reason"].take(at).to_pylist())}
