"""Serve a sample web on one loopback port, all virtual hosts by the Host header.

``python -m pipelines.sample_web.serve FOLDER --port N`` prints one line of JSON, ``{"port": N}``, and serves until it
is stopped. Every request becomes one line of the log once it is answered: host, path, method, status, and whether the
whole body was sent. The log is appended to: a run that was killed and taken up again keeps what it asked for before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from aiohttp import web

LOG = "requests.jsonl"
_SLOW_S = 0.5  # over which the body of `slow` arrives
_PAD_BYTES = 5_000_000
# A body that nobody should read is larger than all that may lie in buffers between server and client, so it goes out to
# its end only where the client takes it: no load on the machine makes one that hung up look like one that read.
_UNREAD_BYTES = 3_900_000  # and smaller than what the recipe takes at most, so that who does not look reads it
_UNREAD_SEND_BUFFER_BYTES = 65_536
_PIECE_BYTES = 65_536
_PARENT_CHECK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site that is being served."""

    folder: Path
    port: int
    resolve: dict[str, str]  # host -> 127.0.0.1:port, for every host of the site and no other
    log: Path

    def requests(self) -> list[dict[str, Any]]:
        """The request log so far: host, path, method, status, complete, bytes."""
        return read_requests(self.log)


def read_requests(log: Path) -> list[dict[str, Any]]:
    """All whole lines of a request log."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


@contextmanager
def serving(folder: Path, *, port: int = 0, log: Path | None = None) -> Iterator[Site]:
    """Serve ``folder`` from a process of its own while the block runs; port 0 takes a free one.

    The process ends with the block, and by itself when this process dies.
    """
    folder = folder.absolute()
    log = (log or folder / LOG).absolute()
    command = [sys.executable, "-m", "pipelines.sample_web.serve", str(folder), "--port", str(port)]
    command += ["--log", str(log), "--parent", str(os.getpid())]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, stdin=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first:
            raise OSError(f"the sample web did not start on port {port} (exit {process.wait()})")
        taken = int(json.loads(first)["port"])
        hosts = json.loads((folder / "site.json").read_text())
        yield Site(folder=folder, port=taken, resolve=dict.fromkeys(hosts, f"127.0.0.1:{taken}"), log=log)
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class _Server:
    """Answers every request from the plan in ``site.json``."""

    def __init__(self, folder: Path, log: TextIO) -> None:
        self.folder = folder
        self.log = log
        self.hosts: dict[str, dict[str, Any]] = json.loads((folder / "site.json").read_text())
        self.visits: Counter[tuple[str, str]] = Counter()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        host = request.headers.get("Host", "").lower().partition(":")[0]
        path = request.rel_url.raw_path
        spec = self._spec(host, path)
        body = self._body(spec)
        response = self._response(spec, body)
        sent = 0
        complete = False
        try:
            if spec.get("mode") == "unread":
                _shrink_send_buffer(request)
            await response.prepare(request)
            async for piece in _pieces(spec, body):
                if request.transport is None or request.transport.is_closing():
                    raise ConnectionResetError
                await response.write(piece)
                sent += len(piece)
            if spec.get("mode") == "truncate":
                assert request.transport is not None
                request.transport.close()
            else:
                await response.write_eof()
                complete = True
        except ConnectionError:
            pass  # the client has gone; what it got is logged
        finally:
            line = {"host": host, "path": path, "method": request.method, "status": response.status}
            line |= {"complete": complete, "bytes": sent}
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
        return response

    def _spec(self, host: str, path: str) -> dict[str, Any]:
        """What to answer: status, headers, type, and a file or a text."""
        site = self.hosts.get(host)
        if site is None:
            return {"status": 421, "text": "no such host", "type": "text/plain"}
        if path == "/robots.txt":
            return {"status": site["robots_status"], "text": site["robots"] or "", "type": "text/plain"}
        if path == "/":
            return {"text": _page(host, site["page"], self._links(host)), "type": "text/html"}
        spec = site["answers"].get(path)
        if spec is None:
            return {"status": 404, "text": "not found", "type": "text/plain"}
        if spec.get("mode") == "limited":
            self.visits[host, path] += 1
            if self.visits[host, path] <= spec["times"]:
                return {"status": 429, "headers": {"Retry-After": "1"}, "text": "slow down", "type": "text/plain"}
        return dict(spec)

    def _links(self, host: str) -> list[str]:
        """The first host has the front page, which leads to all others and they back to it."""
        front = min(self.hosts)
        return [f"http://{other}/" for other in (sorted(self.hosts) if host == front else [front]) if other != host]

    def _body(self, spec: dict[str, Any]) -> bytes:
        if "text" in spec:
            return str(spec["text"]).encode()
        if spec.get("status", 200) != 200 or "file" not in spec:
            spec["type"] = "text/html"
            return b"<!DOCTYPE html><title>no picture here</title>"
        data = (self.folder / str(spec["file"])).read_bytes()
        sizes = {"pad": _PAD_BYTES, "pad_chunked": _PAD_BYTES, "unread": _UNREAD_BYTES}
        return data.ljust(sizes.get(str(spec.get("mode")), 0), b"\0")

    def _response(self, spec: dict[str, Any], body: bytes) -> web.StreamResponse:
        from aiohttp import web

        headers = dict(spec.get("headers", {}))
        if "location" in spec:
            headers["Location"] = spec["location"]
        if spec["type"]:
            headers["Content-Type"] = spec["type"]
        response = web.StreamResponse(status=spec.get("status", 200), headers=headers)
        if spec.get("mode") == "pad_chunked":
            response.enable_chunked_encoding()
        else:
            response.content_length = len(body)
        return response


def _shrink_send_buffer(request: web.BaseRequest) -> None:
    connection = request.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_SEND_BUFFER_BYTES)


async def _pieces(spec: dict[str, Any], body: bytes) -> Any:
    """The body in the pieces and at the pace that the mode asks for."""
    match spec.get("mode"):
        case "slow":
            num_pieces = 10
            step = -(-len(body) // num_pieces)
            for start in range(0, len(body), step):
                yield body[start : start + step]
                await asyncio.sleep(_SLOW_S / num_pieces)
        case "drip":
            for place in range(len(body)):
                yield body[place : place + 1]
                await asyncio.sleep(1.0)
        case "truncate":
            yield body[: len(body) // 2]
        case "pad" | "pad_chunked" | "unread":
            for start in range(0, len(body), _PIECE_BYTES):
                yield body[start : start + _PIECE_BYTES]
        case _:
            yield body


def _page(host: str, pictures: list[list[str]], links: list[str]) -> str:
    anchors = "\n".join(f'<li><a href="{escape(url)}">{escape(url)}</a>' for url in links)
    images = "\n".join(f'<p><img src="{escape(url)}" alt="{escape(alt)}"></p>' for url, alt in pictures)
    return (
        f"<!DOCTYPE html>\n<title>{escape(host)}</title>\n<h1>{escape(host)}</h1>\n{images}\n<ul>\n{anchors}\n</ul>\n"
    )


async def _serve(folder: Path, *, port: int, log: Path, parent: int) -> None:
    from aiohttp import web

    with log.open("a", encoding="utf-8") as stream:
        server = web.Server(_Server(folder, stream), access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
        await site.start()
        taken = runner.addresses[0][1]
        print(json.dumps({"port": taken}), flush=True)
        # Asked to end, it ends the visits that run, so that each has its line in the log.
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        try:
            # Checked by polling: a parent that was killed tells nobody.
            while not stop.is_set() and (parent == 0 or os.getppid() == parent):
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _PARENT_CHECK_S)
        finally:
            await runner.cleanup()


def main() -> None:
    """Serve a folder until stopped."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.sample_web.serve", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--log", type=Path, help=f"request log; FOLDER/{LOG} when not given")
    parser.add_argument("--parent", type=int, default=0, help="end when this process is no longer the parent")
    given = parser.parse_args()
    log = given.log or given.folder / LOG
    try:
        asyncio.run(_serve(given.folder, port=given.port, log=log, parent=given.parent))
    except KeyboardInterrupt:
        pass
    except OSError as error:
        sys.exit(f"sample web: {error}")


if __name__ == "__main__":
    main()
