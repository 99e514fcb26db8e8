import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from pipelines.sample_web.build import build
from pipelines.sample_web.config import SampleWebConfig
from pipelines.sample_web.plant import file_of
from pipelines.sample_web.serve import Site, read_requests, serving
from pipelines.sample_web.truth import read_truth


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = build(SampleWebConfig(path=str(tmp_path_factory.mktemp("web") / "site"), urls=200, seed=3))
    with serving(folder) as running:
        yield running


def urls_of(site: Site, kind: str) -> list[str]:
    return [row["url"] for row in read_truth(site.folder).to_pylist() if row["kind"] == kind]


def get(site: Site, url: str, timeout_s: float = 5.0) -> tuple[int, dict[str, str], bytes]:
    """GET from the loopback server and from nowhere else, whatever the address says. Follows nothing."""

    async def run() -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(url)
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout_s)) as session,
            session.get(
                f"http://127.0.0.1:{site.port}{parts.path}", headers={"Host": parts.netloc}, allow_redirects=False
            ) as answer,
        ):
            return answer.status, dict(answer.headers), await answer.read()

    return asyncio.run(run())


def last_request(site: Site, url: str) -> dict:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [r for r in site.requests() if r["path"] == urlsplit(url).path]
        if found:
            return found[-1]
        time.sleep(0.05)
    raise AssertionError(f"{url} was not logged")


def test_hosts_resolve_to_the_loopback_port_and_no_blocked_one_does(site: Site):
    assert len(site.resolve) == 200
    assert set(site.resolve.values()) == {f"127.0.0.1:{site.port}"}
    blocked = (site.folder / "blocked_hosts.txt").read_text().split()
    assert blocked
    assert not set(blocked) & set(site.resolve)
    assert {urlsplit(url).netloc for url in urls_of(site, "blocked_host")} <= set(blocked)


def test_a_picture_comes_whole_and_is_logged(site: Site):
    row = next(row for row in read_truth(site.folder).to_pylist() if row["kind"] == "base")
    status, headers, body = get(site, row["url"])
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert body == (site.folder / file_of(row["line"], "base")).read_bytes()
    logged = last_request(site, row["url"])
    assert (logged["host"], logged["complete"], logged["bytes"]) == (urlsplit(row["url"]).netloc, True, len(body))


def test_exact_copies_have_the_bytes_of_their_base(site: Site):
    truth = read_truth(site.folder).to_pylist()
    copy = next(row for row in truth if row["kind"] == "exact_copy")
    assert get(site, copy["url"])[2] == get(site, truth[copy["base_line"]]["url"])[2]
    assert copy["url"] != truth[copy["base_line"]]["url"]


def test_pages_and_robots(site: Site):
    row = next(row for row in read_truth(site.folder).to_pylist() if row["kind"] == "base")
    host = urlsplit(row["url"]).netloc
    assert f'<img src="{row["url"]}"'.encode() in get(site, f"http://{host}/")[2]
    robots = {h: get(site, f"http://{h}/robots.txt")[::2] for h in site.resolve}
    assert {status for status, _ in robots.values()} == {200, 404, 503}
    for url in urls_of(site, "robots_denied"):
        status, text = robots[urlsplit(url).netloc]
        assert status == 200
        assert b"Disallow: /\n" in text or (b"Disallow: /private/\n" in text and "/private/" in url)
    assert get(site, "http://h999.sample.test/")[0] == 421


@pytest.mark.parametrize(("kind", "status"), [("not_found", 404), ("gone", 410), ("server_error", 500)])
def test_statuses(site: Site, kind: str, status: int):
    assert get(site, urls_of(site, kind)[0])[0] == status


def test_rate_limits(site: Site):
    status, headers, _ = get(site, urls_of(site, "rate_limited")[0])
    assert (status, headers["Retry-After"]) == (429, "3600")
    answers = [get(site, urls_of(site, "rate_limited_ok")[0]) for _ in range(3)]
    assert answers[0][0] == 429
    assert answers[0][1]["Retry-After"] == "1"
    assert answers[-1][0] == 200


def test_redirects(site: Site):
    status, headers, _ = get(site, urls_of(site, "redirect_ok")[0])
    assert status in (301, 302, 303, 307, 308)
    assert urlsplit(headers["Location"]).netloc in site.resolve
    assert get(site, headers["Location"])[0] == 200
    for url in urls_of(site, "redirect_private"):
        assert urlsplit(get(site, url)[1]["Location"]).netloc not in site.resolve
    loop = urls_of(site, "redirect_loop")[0]
    assert get(site, get(site, loop)[1]["Location"])[1]["Location"] == loop


def test_bodies_that_are_late_short_or_long(site: Site):
    started = time.monotonic()
    assert get(site, urls_of(site, "slow_ok")[0])[0] == 200
    assert time.monotonic() - started > 0.4
    with pytest.raises(TimeoutError):
        get(site, urls_of(site, "slow_drip")[0], timeout_s=1.5)
    with pytest.raises(aiohttp.ClientPayloadError):
        get(site, urls_of(site, "truncated_body")[0])
    assert len(get(site, urls_of(site, "too_large")[0])[2]) > 4_000_000


def test_types_that_lie(site: Site):
    _, headers, body = get(site, urls_of(site, "html_as_jpg")[0])
    assert headers["Content-Type"] == "image/jpeg"
    assert body.startswith(b"<!DOCTYPE html>")
    _, headers, body = get(site, urls_of(site, "wrong_mime")[0])
    assert headers.get("Content-Type") != "image/jpeg"
    assert body.startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("wait_s", [0.0, 0.5])
def test_an_opted_out_body_is_not_sent_whole_to_a_client_that_hangs_up(site: Site, wait_s: float):
    first, second = urls_of(site, "opt_out")[:2]

    async def hang_up() -> dict[str, str]:
        parts = urlsplit(first)
        async with aiohttp.ClientSession() as session:
            answer = await session.get(
                f"http://127.0.0.1:{site.port}{parts.path}", headers={"Host": parts.netloc}, timeout=None
            )
            await asyncio.sleep(wait_s)  # a machine under load: the client is slow, and has read nothing
            answer.close()
            return dict(answer.headers)

    headers = asyncio.run(hang_up())
    assert (
        "noai" in headers.get("X-Robots-Tag", "")
        or "noimageai" in headers.get("X-Robots-Tag", "")
        or (headers.get("tdm-reservation") == "1")
    )
    assert last_request(site, first)["complete"] is False
    get(site, second)
    assert last_request(site, second)["complete"] is True


def test_many_at_once(site: Site):
    urls = urls_of(site, "base")

    async def run() -> list[int]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64)) as session:

            async def one(url: str) -> int:
                parts = urlsplit(url)
                address = f"http://127.0.0.1:{site.port}{parts.path}"
                async with session.get(address, headers={"Host": parts.netloc}) as answer:
                    await answer.read()
                    return answer.status

            return await asyncio.gather(*(one(url) for url in urls * 5))

    assert set(asyncio.run(run())) == {200}


def test_log_is_appended_to_and_may_lie_elsewhere(site: Site, tmp_path: Path):
    log = tmp_path / "asked.jsonl"
    for _ in range(2):
        with serving(site.folder, log=log) as running:
            get(running, "http://h000.sample.test/")
    assert [(r["host"], r["path"]) for r in read_requests(log)] == [("h000.sample.test", "/")] * 2


def test_server_ends_when_its_parent_is_killed(site: Site):
    code = (
        "import sys, time; from pathlib import Path; from pipelines.sample_web.serve import serving\n"
        "with serving(Path(sys.argv[1]), log=Path(sys.argv[2])) as s: print(s.port, flush=True); time.sleep(60)"
    )
    log = str(site.folder.parent / "killed.jsonl")
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(site.folder), log], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert parent.stdout is not None
    port = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    orphan = Site(folder=site.folder, port=port, resolve={}, log=Path(log))
    while time.monotonic() < deadline:
        try:
            get(orphan, "http://h000.sample.test/")
        except aiohttp.ClientConnectionError:
            return
        time.sleep(0.2)
    raise AssertionError("the server outlived its parent")


def test_site_json_is_plain(site: Site):
    assert set(json.loads((site.folder / "site.json").read_text())) == set(site.resolve)
