"""The fetch stage on a site that does everything wrong, on disk and in an object store; and a name server that dies."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from curation.schema import Part
from curation.store import open_store, read_part

TESTS = Path(__file__).parents[1]
HOSTILE = runpy.run_path(str(TESTS / "hostile_site.py"))
NAME_SERVER = runpy.run_path(str(TESTS / "nameserver.py"))["NameServer"]
SHARD_ROWS = 60
BODY_BYTES = 8_000_000
NUM_LARGE = 24
# What a worker may take beyond what it has when it starts: a megabyte of each body that is under way, two whole bodies,
# the tar that is uploaded, and what the allocator keeps.
MEMORY_BYTES = 160_000_000


@pytest.fixture(scope="module")
def site():
    site = HOSTILE["HostileSite"]()
    large = HOSTILE["Case"](ends=(None,), handler=HOSTILE["slow"](HOSTILE["picture"](7) + b"\0" * BODY_BYTES))
    site.cases.update({f"large-{n}": large for n in range(NUM_LARGE)})
    site.start()
    yield site
    site.stop()


@pytest.fixture
def names(site):
    server = NAME_SERVER(site.names).start()
    server.turns[HOSTILE["REBINDS"]] = [["127.0.0.1"], ["169.254.169.254"]]
    yield server
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def root(request, tmp_path):
    """Where pool and run lie, and the place of the object store."""
    if request.param == "disk":
        return str(tmp_path), []
    server = request.getfixturevalue("bucket_server")
    return f"s3://{server.new_bucket()}", [server.place]


def write_recipe(folder, root, lines, **fetch):
    """A recipe over a list of addresses."""
    (folder / "urls.txt").write_bytes(b"".join(line + b"\n" for line in lines))
    recipe = {
        "name": "hostile",
        "pool": f"{root}/pool",
        "run": f"{root}/run",
        "shard_rows": SHARD_ROWS,
        "sources": {"web": {"kind": "list", "location": str(folder / "urls.txt")}},
        "fetch": {"resolve_checked": True, "per_host_interval_s": 0.0, "backoff_s": 0.02, **fetch},
        "execution": {"executor": "inline", "min_free_gb": 0.1},
    }
    path = folder / "hostile.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def table(root, name, where="pool"):
    store = open_store(f"{root}/{where}")
    indices = sorted(int(path[-17:-8]) for path in store.list(name) if path.endswith(".parquet"))
    return pa.concat_tables([read_part(store, Part(where, name, index)) for index in indices])


@pytest.mark.slow
def test_every_row_of_a_hostile_site_has_its_class(site, names, root, tmp_path):
    location, stores = root
    rows = dict(site.rows())
    direct = [url for url in HOSTILE["FORBIDDEN"] if url.startswith("http")]
    odd = [b"http://\xff\xfe.test/x.png", b"http://plain.hostile.test/\xff.png", b"", b"no address", b"http://a\x00b/"]
    lines = [*(url.encode() for url in rows), *(url.encode() for url in direct), *odd]
    recipe = write_recipe(
        tmp_path,
        location,
        lines,
        resolve=site.resolve,
        nameservers=[names.place],
        max_bytes=10_000_000,
        timeout_s=5.0,
        concurrency=32,
    )
    places = [f"127.0.0.1:{site.port}", *stores]
    command = [sys.executable, str(TESTS / "hostile_run.py"), str(recipe), *places]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, env={**os.environ, "PYTHONPATH": "."}
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    print(told)
    assert told["refused"] == []
    assert told["num_jobs_again"] == 0
    assert told["peak_bytes"] - told["before_bytes"] < MEMORY_BYTES, told

    urls = {row["image_id"]: row["url"] for row in table(location, "urls").to_pylist()}
    screened = {row["image_id"]: row for row in table(location, "screened", "run").to_pylist()}
    images = {row["image_id"]: row for row in table(location, "images").to_pylist()}
    assert len(urls) == len(screened) == len(lines)
    wrong = {}
    for image_id, url in urls.items():
        image = images.get(image_id)
        if image is None:
            assert not screened[image_id]["keep"], url
            assert url not in rows, (url, screened[image_id])
            continue
        ends = rows.get(url, ("forbidden_address", "bad_url", "dns"))
        if url and url.endswith("\ufffd.png"):
            ends = (None,)  # of an address that was no text, what was made of it may be asked for
        if image["reason"] not in ends:
            wrong[url] = (image["reason"], ends)
        assert image["ok"] == (image["reason"] is None) == (image["sha256"] is not None)
    assert wrong == {}
    hosts = {row["image_id"]: row for row in table(location, "fetched", "run").to_pylist()}
    assert hosts.keys() == images.keys()


# A name server that dies in the middle


NUM_HOSTS = 150


@pytest.fixture
def many_names():
    hosts = {f"n{n}": HOSTILE["Case"](ends=(None,), handler=HOSTILE["own"](n)) for n in range(NUM_HOSTS)}
    site = HOSTILE["HostileSite"](cases=hosts).start()
    server = NAME_SERVER(site.names).start()
    yield site, server
    server.stop()
    site.stop()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_a_name_server_that_dies_stops_the_run_and_the_same_command_goes_on(many_names, tmp_path, executor):
    site, server = many_names
    # One in three lines leads to a host that there is no more, as in any old list.
    lines = [url.encode() for url, _ in site.rows() if "rebinds" not in url]
    lines = [line for n, one in enumerate(lines) for line in ([one, b"http://gone%d.test/x" % n] if n % 2 else [one])]
    settings = {
        "resolve": site.resolve,
        "nameservers": [server.place],
        "breaker_hosts": 20,
        "breaker_patience_s": 0.5,
        "concurrency": 4,
    }
    recipe = write_recipe(tmp_path, str(tmp_path), lines, **settings)
    command = [sys.executable, "-m", "pipelines.cli", "curate", str(recipe), "--until", "fetched"]
    command += [f"execution.executor={executor}", "execution.fetchers=2"]
    server.dies_after = 140
    died = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == 1, died.stdout + died.stderr
    assert "Traceback" not in died.stderr
    said = [line for line in died.stderr.splitlines() if line.startswith("lvd: ")]
    assert len(said) == 2
    assert "hosts failed (" in said[0]
    # With two workers the one that speaks first may have begun when the name server was dead already.
    known = " dns) and hosts reached before cannot be reached now ("
    assert known in said[0] or (executor == "ray" and " dns) and no host was reached in between" in said[0])
    assert "check the name server and the network: nothing of this shard was recorded" in said[0]
    assert said[1] == "lvd: what was done stays; the same command goes on from there"
    before = table(tmp_path, "images").to_pylist() if (tmp_path / "pool/images").exists() else []
    urls = {row["image_id"]: row["url"] for row in table(tmp_path, "urls").to_pylist()}
    assert len(before) < len(urls)
    lost = {row["image_id"] for row in before if row["reason"] == "dns" and "gone" not in urls[row["image_id"]]}
    assert len({image_id // 1_000_000 for image_id in lost}) <= 1
    assert not lost or executor == "ray"
    kept = {row["image_id"] for row in before if row["ok"]}
    asked = site.asked.copy()
    server.start()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    if lost:
        subprocess.run([*command, "--retry", "transient"], capture_output=True, timeout=120, check=True)
    after = table(tmp_path, "images").to_pylist()
    assert len(after) == len(urls)
    assert {urls[row["image_id"]]: row["reason"] for row in after} == {
        url: "dns" if "gone" in url else None for url in urls.values()
    }
    again = {host for host in asked if site.asked[host] > asked[host]}
    assert not again & {urls[image_id].split("/")[2] for image_id in kept}  # what was committed is not asked for
