"""A web server that does everything wrong, on purpose: each host does one thing, and must end its row in one way.

``CASES`` says how: (what a host does, the failure classes that its row may end with; None for a picture that is kept).
"""

import asyncio
import gzip
import io
import itertools
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

# Addresses that must not be asked for, in every written form.
FORBIDDEN = (
    "http://127.0.0.1/",
    "http://127.0.0.1:22/",
    "http://127.1/",
    "http://127.0.0.1./",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0x7F.0x0.0x0.0x1/",
    "http://017700000001/",
    "http://0177.0.0.1/",
    "http://00000177.0.0.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://012.0.0.1/",
    "http://0xa.0.0.1/",
    "http://167772161/",
    "http://172.16.0.1/",
    "http://192.168.1.1/admin",
    "http://0xC0A80101/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/latest/meta-data/",
    "http://0251.0376.0251.0376/",
    "http://0xA9.0xFE.43518/",
    "http://100.64.0.1/",
    "http://192.0.0.192/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://198.18.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://240.0.0.1/",
    "http://[::]/",
    "http://[::1]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[0:0:0:0:0:ffff:a00:1]/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::127.0.0.1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:c0a8:101::1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b::10.0.0.1]/",
    "http://[64:ff9b:1::a00:1]/",
    "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://[64:ff9b:]/x.png",
    "http://localhost/",
    "http://LOCALHOST./",
    "http://user:pass@127.0.0.1/",
    "http://public.test@127.0.0.1/",
    "http://127.0.0.1#@public.test/",
    "http://１２７.0.0.1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "//127.0.0.1/",
    "//[::1]/",
    "\\\\127.0.0.1/",
    "http:\\\\127.0.0.1/",
    "http:127.0.0.1/",
    "http:///127.0.0.1/",
    "https://127.0.0.1:8443/",
    "http://8.8.8.8:25/",
    "http://private.test/",
    "http://mapped.test/",
    "http://loopback6.test/",
    "http://mixed.test/",
    "file:///etc/passwd",
    "ftp://127.0.0.1/",
    "gopher://127.0.0.1:70/_x",
    "data:image/png;base64,iVBORw0KGgo=",
    "javascript:alert(1)",
)
# Names that lead where nobody may go.
NAMES = {
    "private.test": ["10.0.0.1"],
    "mapped.test": ["::ffff:10.0.0.1"],
    "loopback6.test": ["::1"],
    "mixed.test": ["127.0.0.1", "8.8.8.8"],
}
# How a redirect to one of them ends: a reference that is no address stays on the host, where there is nothing.
ENDS = {
    **dict.fromkeys(FORBIDDEN, "forbidden_address"),
    **dict.fromkeys(("http://localhost/", "http://LOCALHOST./"), "dns"),
    **dict.fromkeys(
        ("\\\\127.0.0.1/", "http:\\\\127.0.0.1/", "http:127.0.0.1/", "http:///127.0.0.1/"),
        "http_4xx",
    ),
    **dict.fromkeys(
        (
            "http://[64:ff9b:]/x.png",
            "file:///etc/passwd",
            "ftp://127.0.0.1/",
            "gopher://127.0.0.1:70/_x",
            "data:image/png;base64,iVBORw0KGgo=",
            "javascript:alert(1)",
        ),
        "bad_url",
    ),
}
REBINDS = "rebinds.hostile.test"

GIGABYTE = 1_000_000_000
_STORM = 30


def picture(seed: int = 0) -> bytes:
    """A small picture, another for each seed."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (40, 30), (seed % 251, seed % 241, 90)).save(out, "PNG")
    return out.getvalue()


@dataclass(kw_only=True)
class Visit:
    """One request, and where to write the answer."""

    writer: asyncio.StreamWriter
    host: str
    path: str
    head: bytes
    site: "HostileSite"

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        await asyncio.sleep(0)  # a flood whose client keeps up never waits in drain, and no other host would be served
        self.site.sent[self.host] += len(data)

    async def reply(self, body: bytes = b"", *headers: str, status: str = "200 OK", length: int | None = None) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
        await self.send("\r\n".join([*lines, "Connection: close", "", ""]).encode("utf-8", "surrogateescape") + body)


Handler = Callable[[Visit], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one host does, and what must come of its row."""

    ends: tuple[str | None, ...]
    handler: Handler
    robots: Handler | None = None  # None: there is no robots.txt
    num_urls: int = 1


def _ends(*reasons: str | None, robots: Handler | None = None, num_urls: int = 1) -> Callable[[Handler], Case]:
    return lambda handler: Case(ends=reasons, handler=handler, robots=robots, num_urls=num_urls)


async def _fine(visit: Visit) -> None:
    await visit.reply(picture())


def own(seed: int) -> Handler:
    async def answer(visit: Visit) -> None:
        await visit.reply(picture(seed))

    return answer


def _flood(piece: bytes, *headers: str, chunked: bool = False) -> Handler:
    async def flood(visit: Visit) -> None:
        coding = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {GIGABYTE}"
        await visit.send("\r\n".join(["HTTP/1.1 200 OK", coding, *headers, "", ""]).encode())
        for one in (picture() if headers else b"", *itertools.repeat(piece, GIGABYTE // len(piece))):
            if one:
                await visit.send(b"%x\r\n%s\r\n" % (len(one), one) if chunked else one)

    return flood


def _drip(data: bytes, pause_s: float = 1.0) -> Handler:
    async def drip(visit: Visit) -> None:
        for place in range(len(data)):
            await visit.send(data[place : place + 1])
            await asyncio.sleep(pause_s)

    return drip


def _raw(data: bytes) -> Handler:
    async def raw(visit: Visit) -> None:
        await visit.send(data)

    return raw


def _endless(start: bytes, piece: bytes) -> Handler:
    async def endless(visit: Visit) -> None:
        await visit.send(start)
        while True:
            await visit.send(piece)

    return endless


def _headed(*headers: str, status: str = "200 OK", body: bytes | None = None, length: int | None = None) -> Handler:
    async def headed(visit: Visit) -> None:
        await visit.reply(picture() if body is None else body, *headers, status=status, length=length)

    return headed


def slow(body: bytes) -> Handler:
    """So slowly that all who ask at once are under way together; its last piece comes after a second."""

    async def answer(visit: Visit) -> None:
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body) - 1, 65536):  # what waits to be sent takes no memory here
            await visit.send(body[start : min(start + 65536, len(body) - 1)])
        await asyncio.sleep(1.0)
        await visit.send(body[-1:])

    return answer


async def _silent(visit: Visit) -> None:
    await asyncio.sleep(30)


async def _loop(visit: Visit) -> None:
    await visit.reply(b"", f"Location: /{visit.path.strip('/')}x", status="302 Found")


async def _hang_up(visit: Visit) -> None:
    visit.writer.transport.abort()


def _bomb() -> bytes:
    """A gigabyte that begins like a picture, in a megabyte of gzip."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = [packer.compress(picture())]
    pieces += [packer.compress(b"\0" * 10_000_000) for _ in range(GIGABYTE // 10_000_000)]
    return b"".join([*pieces, packer.flush()])


_OK = b"HTTP/1.1 200 OK\r\n"
_DENY_ALL = b"User-agent: *\nDisallow: /\n"


def _rules(num: int) -> bytes:
    return b"".join(b"Disallow:/%x*\n" % n for n in range(num))


def cases() -> dict[str, Case]:
    """All cases by a name that is part of the host."""
    bomb = _bomb()
    found = {
        "plain": Case(ends=(None,), handler=_fine),
        "gigabyte": _ends("too_large")(_flood(b"\0" * 65536, "X-Picture: 1")),
        "gigabyte-chunked": _ends("too_large")(_flood(b"\0" * 65536, "X-Picture: 1", chunked=True)),
        "gigabyte-of-text": _ends("not_an_image", "too_large")(_flood(b"<html>" * 9999, chunked=True)),
        "gzip-bomb": _ends("too_large")(_headed("Content-Encoding: gzip", body=bomb)),
        "gzip-tail": _ends("too_large")(
            _endless(_OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(picture()), b"junk" * 16384)
        ),
        "not-gzip": _ends("not_an_image")(_headed("Content-Encoding: gzip")),
        "odd-coding": _ends("not_an_image")(_headed("Content-Encoding: compress")),
        "drip": _ends("timeout")(_drip(_OK + b"Content-Length: 999\r\n\r\n" + picture())),
        "drip-body": _ends("timeout")(_drip_body),
        "silent": _ends("timeout")(_silent),
        "endless-redirect": _ends("too_many_redirects")(_loop),
        "empty-location": _ends("too_many_redirects")(_headed("Location: ", status="301 Moved")),
        "wrong-mime": _ends(None)(_headed("Content-Type: text/html; charset=utf-8")),
        "odd-mime": _ends(None)(_headed("Content-Type: \udcff\udcfe")),
        "html-as-jpg": _ends("not_an_image")(_headed("Content-Type: image/jpeg", body=b"<!DOCTYPE html>" * 100)),
        "svg": _ends("not_an_image")(_headed("Content-Type: image/svg+xml", body=b"<svg xmlns='x'/>")),
        "empty": _ends("not_an_image")(_headed(body=b"")),
        "huge-robots": _ends(None, robots=_endless(_OK + b"\r\nUser-agent: *\nDisallow: /no\n", b"# " * 32768))(_fine),
        "huge-robots-denies": _ends("robots_denied", robots=_endless(_OK + b"\r\n" + _DENY_ALL, b"Allow: /q\n" * 6000))(
            _fine
        ),
        "robots-names": _ends(None, robots=_headed(body=b"User-agent: b\n" * 3000 + _rules(5000)))(_fine),
        "robots-all": _ends("robots_denied", robots=_headed(body=b"User-agent: *\n" + _rules(40_000)))(_fine),
        "robots-all-others": _ends(None, robots=_headed(body=b"User-agent: b\n" + _rules(40_000)))(_fine),
        "robots-our-version": _ends("robots_denied", robots=_headed(body=b"User-agent: LVD-curate/1.0\nDisallow: /"))(
            _fine
        ),
        "robots-bomb": _ends(None, "robots_unreachable", robots=_headed("Content-Encoding: gzip", body=bomb))(_fine),
        "robots-silent": _ends("robots_unreachable", robots=_silent)(_fine),
        "robots-drip": _ends("robots_unreachable", robots=_drip(_OK + b"\r\n" + _DENY_ALL))(_fine),
        "robots-error": _ends("robots_unreachable", robots=_headed(status="500 No"))(_fine),
        "robots-429": _ends("robots_unreachable", "rate_limited", robots=_headed(status="429 No"))(_fine),
        "robots-loop": _ends(None, robots=_loop)(_fine),
        "robots-inside": _ends(
            "forbidden_address", robots=_headed("Location: http://169.254.169.254/", status="302 Found")
        )(_fine),
        "robots-wild": _ends(
            None, robots=_headed(body=b"User-agent: *\nDisallow: /" + b"*a" * 200 + b"*b$\n" + b"Disallow: *" * 9999)
        )(_fine),
        "robots-bytes": _ends(None, robots=_headed(body=bytes(range(256)) * 100))(_fine),
        "crawl-delay": _ends("crawl_delay", robots=_headed(body=b"User-agent: *\nCrawl-delay: 3600\n"))(_fine),
        "crawl-inf": _ends("crawl_delay", None, robots=_headed(body=b"User-agent: *\nCrawl-delay: inf\n"))(_fine),
        "crawl-nan": _ends(None, robots=_headed(body=b"User-agent: *\nCrawl-delay: nan\n"))(_fine),
        "crawl-minus": _ends(None, robots=_headed(body=b"User-agent: *\nCrawl-delay: -99\n"))(_fine),
        "storm": _ends("rate_limited", num_urls=_STORM)(_headed("Retry-After: 86400", status="429 No")),
        "storm-silent": _ends("rate_limited", num_urls=_STORM)(_headed(status="429 No")),
        "retry-after-odd": _ends("rate_limited")(_headed("Retry-After: -1e999, soon", status="429 No")),
        "retry-after-huge": _ends("rate_limited")(_headed("Retry-After: " + "9" * 400, status="503 No")),
        "retry-after-date": _ends("rate_limited", "http_5xx")(
            _headed("Retry-After: Wed, 21 Oct 99999 07:28:00 GMT", status="503 No")
        ),
        "retry-after-year": _ends("rate_limited")(
            _headed("Retry-After: Wed, 21 Oct 99999999999 07:28:00 GMT", status="429 No")
        ),
        "retry-after-zone": _ends("rate_limited")(
            _headed("Retry-After: Wed, 21 Oct 2026 07:28:00 +9999999999999", status="503 No")
        ),
        "header-flood": _ends("connection")(_endless(_OK, b"".join(b"X-%d: y\r\n" % n for n in range(5000)))),
        "header-line": _ends("connection")(_endless(_OK + b"X: ", b"y" * 65536)),
        "long-location": _ends("connection", "bad_url")(_headed("Location: /" + "x" * 1_000_000, status="302 Found")),
        "continues": _ends("timeout", "connection")(_endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100)),
        "injected-header": _ends(None, "connection")(_headed("X: a\x00b", "Set-Cookie: a=b", "X-Y: c\td")),
        "split-answer": _ends(None, "connection", "http_4xx")(
            _headed("Location: /x%0d%0aX-Evil:%201%0d%0a%0d%0aGET%20/evil", status="302 Found")
        ),
        "split-raw": _ends(None, "connection", "bad_url", "http_4xx")(
            _headed("Location: /x\rX-Evil: 1", status="302 Found")
        ),
        "no-http": _ends("connection")(_raw(b"SSH-2.0-OpenSSH_9.6\r\n" * 50)),
        "http-0.9": _ends("connection")(_raw(picture())),
        "bad-status": _ends("connection", "not_an_image", "http_5xx")(_raw(b"HTTP/1.1 999999 Odd\r\n\r\n")),
        "hang-up": _ends("connection")(_hang_up),
        "cut-short": _ends("truncated_body")(_headed(length=100_000)),
        "two-lengths": _ends("connection", None)(
            _raw(_OK + b"Content-Length: 5\r\nContent-Length: 500\r\n\r\n" + picture())
        ),
        "bad-chunk": _ends("truncated_body", "connection")(
            _raw(_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + picture())
        ),
        "huge-chunk": _ends("too_large", "truncated_body", "connection", "timeout", "not_an_image")(
            _endless(_OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 16 + b"\r\n" + picture(), b"\0" * 65536)
        ),
        "chunk-extension": _ends("timeout", "truncated_body", "connection")(
            _endless(_OK + b"Transfer-Encoding: chunked\r\n\r\n5;", b"x" * 65536)
        ),
        "opt-out": _ends("opt_out")(_headed("X-Robots-Tag: noai")),
        "opt-out-flood": _ends("opt_out")(_flood(b"\0" * 65536, "TDM-Reservation: 1")),
        "teapot": _ends("http_4xx")(_headed(status="418 Teapot")),
        "no-content": _ends("not_an_image")(_raw(b"HTTP/1.1 204 No\r\n\r\n")),
        "not-modified": _ends("not_an_image")(_raw(b"HTTP/1.1 304 No\r\n\r\n")),
        "switches": _ends("connection", "not_an_image", "timeout")(
            _raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")
        ),
    }
    for number, target in enumerate(FORBIDDEN):
        found[f"to-{number}"] = _ends(ENDS[target])(_headed(f"Location: {target}", status="302 Found"))
    return found


async def _drip_body(visit: Visit) -> None:
    data = picture()
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data))
    await _drip(data)(visit)


@dataclass
class HostileSite:
    """Serves all cases on one loopback port, from a thread of its own."""

    cases: dict[str, Case] = field(default_factory=cases)
    port: int = 0
    heads: list[bytes] = field(default_factory=list)  # of all requests
    asked: Counter[str] = field(default_factory=Counter)  # visits by host, those to robots.txt apart
    sent: Counter[str] = field(default_factory=Counter)  # bytes by host, as far as the client took them

    def host(self, name: str) -> str:
        return f"{name}.hostile.test"

    def rows(self) -> Iterator[tuple[str, tuple[str | None, ...]]]:
        """Every address, and how it may end."""
        yield f"http://{REBINDS}/x.png", (None,)
        for name, case in self.cases.items():
            for number in range(case.num_urls):
                yield f"http://{self.host(name)}/{number}.png", case.ends

    @property
    def resolve(self) -> dict[str, str]:
        return dict.fromkeys((REBINDS, *(self.host(name) for name in self.cases)), f"127.0.0.1:{self.port}")

    @property
    def names(self) -> dict[str, list[str]]:
        return {**{host: ["127.0.0.1"] for host in self.resolve}, **NAMES}

    def start(self) -> "HostileSite":
        started = threading.Event()

        async def serve() -> None:
            self._stopped = asyncio.Event()
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
            self.port = server.sockets[0].getsockname()[1]
            # So that what counts as sent was taken, or nearly.
            server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            self._loop = asyncio.get_running_loop()
            started.set()
            await self._stopped.wait()
            server.close()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            lines = head.decode("latin-1").split("\r\n")
            fields: dict[str, Any] = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            host, path = fields["host"].partition(":")[0], lines[0].split(" ")[1]
            visit = Visit(writer=writer, host=host, path=path, head=head, site=self)
            case = self.cases.get(host.removesuffix(".hostile.test"))
            if path == "/robots.txt" or (case is not None and case.robots is _loop and "robots" in path):
                robots = None if case is None else case.robots
                await (_headed(status="404 None", body=b"") if robots is None else robots)(visit)
                return
            self.asked[host] += 1
            if case is None:
                await _fine(visit)
            elif "evil" in path.lower() or (host.startswith("to-") and path != "/0.png"):
                await visit.reply(b"", status="404 None")  # where it redirected to, on the same host
            else:
                await case.handler(visit)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has had enough
        finally:
            writer.close()
