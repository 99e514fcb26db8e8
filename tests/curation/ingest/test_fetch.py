import hashlib
import itertools
import os
import resource
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.ingest.fetch import FetchConfig, Fetched, FetchStage
from curation.ingest.screen import ScreenConfig
from curation.ingest.spool import Spool
from curation.schema import TABLES, image_ids
from curation.stage import OutageError


def put_urls(io, urls=None, locations=None):
    num_rows = len(urls or locations)
    columns = {
        "image_id": image_ids(io.shard, num_rows),
        "source": ["s"] * num_rows,
        "url": urls or [None] * num_rows,
        "host": [url.split("/")[2] for url in urls] if urls else [None] * num_rows,
        "location": locations or [None] * num_rows,
    }
    arrays = [pa.array(columns.get(f.name, [None] * num_rows), f.type) for f in TABLES["urls"].schema]
    io.tables["urls", io.shard] = pa.Table.from_arrays(arrays, schema=TABLES["urls"].schema)
    io.ask_for(range(io.shard * 1_000_000, io.shard * 1_000_000 + num_rows))


def run(io, config):
    out = FetchStage(config).run(io.shard, io)
    for name, table in out.items():
        assert table.schema.equals(TABLES[name].schema), name
        io.tables[name, io.shard] = table
    return out["images"].to_pylist()


def test_a_shard_from_the_web(memory_io, web, make_picture, fast_config):
    memory_io.shard = 4
    pictures = [make_picture((n, 0, 0)) for n in range(6)]
    for n in (0, 1, 3, 5):
        web.reply("a.test", f"/{n}", pictures[n])
    web.reply("a.test", "/4", b"<html></html>" * 20, headers={"Content-Type": "text/html"})
    put_urls(memory_io, [f"http://a.test/{n}" for n in range(6)])
    memory_io.rows = memory_io.rows.filter(pa.array([n != 1 for n in range(6)]))
    images = run(memory_io, fast_config())
    assert [image["image_id"] for image in images] == [4_000_000, 4_000_002, 4_000_003, 4_000_004, 4_000_005]
    assert [image["reason"] for image in images] == [None, "http_4xx", None, "not_an_image", None]
    for image, n in zip(images, (0, 2, 3, 4, 5), strict=True):
        assert image["ok"] == (image["reason"] is None)
        if image["ok"]:
            assert memory_io.blob(image["object"], image["offset"], image["num_bytes"]) == pictures[n]
            assert image["sha256"] == hashlib.sha256(pictures[n]).hexdigest()
        else:
            assert (image["sha256"], image["object"], image["offset"], image["num_bytes"]) == (None,) * 4
    assert [image["offset"] for image in images if image["ok"]] == sorted(i["offset"] for i in images if i["ok"])
    assert ("a.test", "/1") not in web.requests
    log = memory_io.tables["fetch_log", 4].to_pylist()
    assert [dict(visit["headers"]).get("content-type") for visit in log].count("text/html") == 1
    assert len(log) == 5
    assert list(memory_io.scratch.iterdir()) == []


def test_bytes_and_table_do_not_depend_on_the_order_of_answers(memory_io, web, make_picture, fast_config):
    for n in range(12):
        web.reply("abc"[n % 3] + ".test", f"/{n}", make_picture((n * 20, 0, 0)))
    put_urls(memory_io, [f"http://{'abc'[n % 3]}.test/{n}" for n in range(12)])
    results = []
    for concurrency in (1, 16):
        images = run(memory_io, fast_config(concurrency=concurrency, per_host=concurrency))
        results.append((images, dict(memory_io.objects)))
    assert results[0] == results[1]


def test_a_shard_of_local_files(memory_io, tmp_path, make_picture, shared_tar):
    memory_io.shard = 7
    names = ["a.png", "gone.png", "text.png", "b.jpg"]
    path = shared_tar([("b.jpg", make_picture(kind="JPEG")), ("a.png", make_picture()), ("text.png", b"no picture")])
    put_urls(memory_io, locations=names)
    images = run(memory_io, FetchConfig(locations={"s": str(path)}, kinds={"s": "tar"}))
    assert [(image["reason"], image["format"], image["robots"]) for image in images] == [
        (None, "png", None),
        ("file_missing", None, None),
        ("not_an_image", None, None),
        (None, "jpeg", None),
    ]
    assert memory_io.tables["fetch_log", 7].num_rows == 0
    last = images[3]
    assert memory_io.blob(last["object"], last["offset"], last["num_bytes"]) == make_picture(kind="JPEG")


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_a_local_picture_that_is_too_large(memory_io, tmp_path, make_picture, shared_tar, kind):
    data = make_picture()
    names = ["a.png", "b.png"]
    location = tmp_path
    for name, more in zip(names, (b"", b"x"), strict=True):
        (tmp_path / name).write_bytes(data + more)
    if kind == "tar":
        location = shared_tar([("a.png", data), ("b.png", data + b"x")])
    elif kind == "parquet":
        names, location = ["image/0", "image/1"], tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": [data, data + b"x"]}), location)
    put_urls(memory_io, locations=names)
    images = run(memory_io, FetchConfig(locations={"s": str(location)}, kinds={"s": kind}, max_bytes=len(data)))
    assert [(image["reason"], image["ok"]) for image in images] == [(None, True), ("too_large", False)]


@pytest.fixture
def shared_tar(tmp_path):
    import io

    def write(members):
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / "set.tar"

    return write


def test_nothing_to_do(memory_io, fast_config):
    put_urls(memory_io, ["http://a.test/1"])
    memory_io.ask_for([])
    assert run(memory_io, fast_config()) == []
    assert memory_io.objects == {}


def test_the_verdict(memory_io, web, make_picture, fast_config):
    web.reply("a.test", "/0", make_picture())
    put_urls(memory_io, ["http://a.test/0", "http://a.test/1", "http://a.test/2"])
    images = run(memory_io, fast_config())
    memory_io.ask_for([0, 2])  # a screening that lets less through than was fetched
    verdict = Fetched(fast_config()).run(0, memory_io)["fetched"]
    assert verdict.schema.equals(TABLES["fetched"].schema)
    assert verdict.select(["image_id", "sha256", "keep", "reason"]).to_pylist() == [
        {"image_id": 0, "sha256": images[0]["sha256"], "keep": True, "reason": None},
        {"image_id": 2, "sha256": None, "keep": False, "reason": "http_4xx"},
    ]


def test_the_breaker_ends_a_shard_when_no_name_resolves(memory_io, web, fast_config, monkeypatch):
    import asyncio
    import socket

    async def getaddrinfo(self, host, port, **_):
        raise socket.gaierror(socket.EAI_AGAIN, "the name server does not answer")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    put_urls(memory_io, [f"http://h{n}.test/x" for n in range(200)])
    with pytest.raises(OutageError, match=r"50 of the last 50 hosts failed \(50 dns\) and no host was reached"):
        FetchStage(fast_config()).run(0, memory_io)
    assert memory_io.objects == {}


def test_limits_of_a_host_say_that_they_hold_for_each_worker():
    for name in ("per_host", "per_host_interval_s"):
        assert "each worker" in str(FetchConfig.model_fields[name].description)


def test_what_is_content_and_what_is_execution():
    content = set(FetchConfig().fingerprint_values())
    assert content == {"agent", "respect_robots", "respect_opt_out", "max_bytes", "max_redirects"}


def in_shards(io, config, urls, *, num_shards=3):
    """``images`` of some shards of the same addresses, one after another in one worker, and when each visit began."""
    stage = FetchStage(config)
    tables = []
    for shard in range(num_shards):
        io.shard = shard
        put_urls(io, urls)
        tables.append(stage.run(shard, io))
    visits = sorted(visit["started_at"].timestamp() for one in tables for visit in one["fetch_log"].to_pylist())
    return [one["images"].to_pylist() for one in tables], visits


@pytest.mark.parametrize("asks", [b"Crawl-delay: 0.5", b"Allow: /"])
def test_a_pause_is_kept_from_shard_to_shard(memory_io, web, fast_config, make_picture, asks):
    web.reply("a.test", "/robots.txt", b"User-agent: *\n" + asks)
    web.reply("a.test", "/x", make_picture())
    values = {} if b"delay" in asks else {"per_host_interval_s": 0.5}
    images, visits = in_shards(memory_io, fast_config(respect_robots=True, **values), ["http://a.test/x"])
    assert [row["ok"] for shard in images for row in shard] == [True] * 3
    assert min(after - before for before, after in itertools.pairwise(visits)) > 0.45


@pytest.mark.parametrize("headers", [{"Retry-After": "86400"}, {}])
def test_a_host_that_refuses_is_left_alone_by_the_next_shards_too(memory_io, web, fast_config, headers):
    web.reply("a.test", "/x", status=429, headers=headers)
    images, _ = in_shards(memory_io, fast_config(attempts=1, per_host=1), ["http://a.test/x"] * 10)
    assert len(web.requests) == 5
    for row in (row for shard in images for row in shard):
        assert (row["reason"], row["transient"], row["http_status"]) == ("rate_limited", True, 429)


@pytest.mark.parametrize(
    ("role", "screen", "reason"),
    [
        ("pool", {"blocked_hosts": ["b.test"]}, "blocked_host"),
        ("pool", {"blocked_urls": ["b.test/bad"]}, "blocked_url"),
        ("pool", {"blocked_urls": ["b.test/good"], "schemes": ["https"]}, None),
        ("query", {"blocked_hosts": ["b.test"]}, None),
    ],
)
def test_a_redirect_into_a_blocked_host_is_not_followed(
    memory_io, web, make_picture, fast_config, role, screen, reason
):
    memory_io.role = role
    web.reply("a.test", "/0", status=302, headers={"Location": "/1"})
    web.reply("a.test", "/1", status=302, headers={"Location": "//B.test/b%61d"})
    web.reply("b.test", "/bad", make_picture())
    put_urls(memory_io, urls=["http://a.test/0"])
    stage = FetchStage(fast_config(respect_robots=True), ScreenConfig(**screen))
    (row,) = stage.run(0, memory_io)["images"].to_pylist()
    assert (row["reason"], row["transient"], row["final_url"]) == (reason, False, "http://b.test/bad")
    assert ("b.test" in {host for host, _ in web.requests}) == (reason is None)
    assert stage.fingerprint_values() == FetchStage(stage.fetch).fingerprint_values()


@pytest.fixture
def full_disk():
    """Files that grow past so many bytes are on a full disk: the last write takes a part, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_body_for_which_the_disk_has_no_place_is_no_row(memory_io, web, make_picture, fast_config, full_disk):
    data = make_picture(size=(200, 200), kind="BMP")
    web.reply("a.test", "/0", data)
    put_urls(memory_io, urls=["http://a.test/0"])
    full_disk(len(data) - 1)
    with pytest.raises(OSError, match="File too large"):
        run(memory_io, fast_config())


def test_a_body_that_is_not_there_as_it_was_put_down_is_no_row(tmp_path):
    spool = Spool(tmp_path)
    spool.put(1, b"abc")
    spool.put(2, b"defg")
    assert (spool.get(1), spool.get(2), spool.get(3)) == (b"abc", b"defg", None)
    os.truncate(tmp_path / "bodies", 5)
    with pytest.raises(OSError, match="2 of 4 bytes"):
        spool.get(2)
    spool.close()
