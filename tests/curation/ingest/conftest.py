"""A web server on a loopback port, an in-memory TaskIO, and small pictures."""

import asyncio
import io
import runpy
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curation.ingest.breaker import Breaker
from curation.ingest.fetch import FetchConfig
from curation.ingest.fetcher import Fetcher
from curation.ingest.outcome import Outcome
from curation.ingest.robots import Rules
from curation.schema import TABLES, Part
from curation.store import Within, rows_within

HOSTS = ("a.test", "b.test", "c.test")
Handler = Callable[[Any], Awaitable[Any]]


def picture(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (32, 24), kind: str = "PNG") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


class Web:
    """Answers by (host, path); what is not planned is 404. Every request is written down."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Handler] = {}
        self.requests: list[tuple[str, str]] = []
        self.times: list[float] = []
        self.agents: set[str] = set()
        self.port = 0

    @property
    def resolve(self) -> dict[str, str]:
        return dict.fromkeys(HOSTS, f"127.0.0.1:{self.port}")

    def reply(
        self, host: str, path: str, body: bytes = b"", *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        from aiohttp import web

        async def handler(request: Any) -> Any:
            return web.Response(body=body, status=status, headers=dict(headers or {}))

        self.answers[host, path] = handler

    def on(self, host: str, path: str, handler: Handler) -> None:
        self.answers[host, path] = handler

    def asked(self, path: str) -> int:
        return sum(asked == path for _, asked in self.requests)

    async def __call__(self, request: Any) -> Any:
        import time

        from aiohttp import web

        host = request.headers.get("Host", "").partition(":")[0]
        self.requests.append((host, request.rel_url.raw_path))
        self.times.append(time.monotonic())
        self.agents.add(request.headers.get("User-Agent", ""))
        handler = self.answers.get((host, request.rel_url.raw_path))
        return web.Response(status=404) if handler is None else await handler(request)


@pytest.fixture(scope="session")
def running_web() -> Iterator[Web]:
    from aiohttp import web

    site = Web()
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def start() -> web.ServerRunner:
        runner = web.ServerRunner(web.Server(site, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        site.port = runner.addresses[0][1]
        started.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert started.wait(10)
    yield site
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture
def web(running_web: Web) -> Web:
    running_web.answers.clear()
    running_web.requests.clear()
    running_web.times.clear()
    running_web.agents.clear()
    return running_web


class Contacts:
    """Stands under the guard: refuses and records every address but the test server's."""

    def __init__(self, port: int) -> None:
        self.allowed = ("127.0.0.1", port)
        self.refused: list[tuple[str, int]] = []

    def __call__(self, address: str, port: int) -> None:
        if (address, port) != self.allowed:
            self.refused.append((address, port))
            raise OSError(f"no test contacts {address}:{port}")


@pytest.fixture
def contacts(web: Web) -> Contacts:
    return Contacts(web.port)


def fast(web: Web, **values: Any) -> FetchConfig:
    defaults: dict[str, Any] = {
        "resolve": web.resolve,
        "per_host_interval_s": 0.0,
        "backoff_s": 0.01,
        "timeout_s": 20.0,
        "respect_robots": False,
    }
    return FetchConfig(**{**defaults, **values})


@pytest.fixture
def fetch(web: Web, contacts: Contacts) -> Callable[..., list[Outcome]]:
    """Fetch addresses at once, under the recording guard."""

    def fetch_all(*urls: str, rules: dict[str, Rules] | None = None, **values: Any) -> list[Outcome]:
        async def run() -> list[Outcome]:
            async with Fetcher(fast(web, **values), rules=rules, contact=contacts) as fetcher:
                return list(await asyncio.gather(*(fetcher.fetch(url) for url in urls)))

        outcomes = asyncio.run(run())
        assert contacts.refused == []
        return outcomes

    return fetch_all


class MemoryTar:
    def __init__(self, objects: dict[str, bytes], folder: str, shard: int) -> None:
        self.objects, self.path, self.data = objects, f"{folder}/{shard:09d}.tar", b""
        self.names: list[str] = []

    def add(self, name: str, data: bytes) -> int:
        self.names.append(name)
        offset = len(self.data)
        self.data += data
        return offset

    def close(self) -> str:
        if not self.names:
            return ""
        self.objects[self.path] = self.data
        return self.path


@dataclass
class MemoryIO:
    """A TaskIO over tables in memory."""

    scratch: Path
    shard: int = 0
    role: str = "pool"
    rows: pa.Table = field(
        default_factory=lambda: pa.table({"image_id": pa.array([], pa.int64()), "sha256": pa.array([], pa.string())})
    )
    tables: dict[tuple[str, int], pa.Table] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def part(self, table: str, index: int) -> Part:
        return Part(TABLES[table].root, table, index)

    def parts(self, table: str) -> list[Part]:
        return [self.part(name, index) for name, index in sorted(self.tables) if name == table]

    def read(self, part: Part, columns: Sequence[str] | None = None, *, within: Within | None = None) -> pa.Table:
        consulted = part.folder in ("takedowns", "images") and (part.folder, part.index) not in self.tables
        if consulted:
            empty = TABLES[part.folder].schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        table = rows_within(self.tables[part.folder, part.index], within)
        return table if columns is None else table.select(list(columns))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        return self.read(self.part(name, 0 if TABLES[name].parts == "single" else self.shard), columns)

    def blob(self, path: str, offset: int, size: int, root: str = "pool") -> bytes:
        return self.objects[path][offset : offset + size]

    def tar(self, folder: str, root: str = "pool") -> MemoryTar:
        return MemoryTar(self.objects, folder, self.shard)

    def ask_for(self, ids: Sequence[int]) -> None:
        self.rows = pa.table({"image_id": pa.array(ids, pa.int64()), "sha256": pa.nulls(len(ids), pa.string())})


@pytest.fixture
def memory_io(tmp_path: Path) -> MemoryIO:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return MemoryIO(scratch)


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def fast_config(web: Web) -> Callable[..., FetchConfig]:
    """Settings that wait for nothing."""

    def config(**values: Any) -> FetchConfig:
        return fast(web, **values)

    return config


NAME_SERVER = runpy.run_path(str(Path(__file__).parents[2] / "nameserver.py"))["NameServer"]


@pytest.fixture
def back_when_missed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``back_when_missed(server)``: once dead, it is started again as soon as the breaker looked for it in vain.

    After some seconds instead, a machine that stands still could miss the whole outage.
    """

    def arrange(server: Any) -> None:
        probe = Breaker._probe

        async def probe_and_start(self: Breaker) -> bool:
            is_there = await probe(self)
            if not is_there and not server.alive:
                server.start()
            return is_there

        monkeypatch.setattr(Breaker, "_probe", probe_and_start)

    return arrange


@pytest.fixture
def nameserver() -> Iterator[Callable[..., Any]]:
    """Starts name servers on loopback ports: ``nameserver({name: [address, …]})``."""
    started: list[Any] = []

    def start(names: Mapping[str, Sequence[str]]) -> Any:
        started.append(NAME_SERVER(names).start())
        return started[-1]

    yield start
    for server in started:
        server.stop()
