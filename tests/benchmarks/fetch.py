"""CPU time a picture takes to be fetched: img2dataset beside ours, from one nginx on loopback.

    make bench NAME=fetch ARGS="--data FOLDER --peer PYTHON [--nginx NGINX]"

FOLDER holds ``pool_imagenet_300.tar``; PYTHON is that of an environment with img2dataset; NGINX its binary. All sides
have the same duty: a list of addresses in; tars with the bytes as they came, metadata and a sha256 an address out.

    img2dataset, no resize   its ``resize_mode no`` with ``skip_reencode``: it decodes each picture and tells its size
    img2dataset, bytes only  its ``disable_all_reencoding``: whatever comes is stored, be it a picture or not
    ours                     ``lvd curate --until fetched`` with robots.txt and opt-outs on: it also registers and
                             screens the list, tells formats from bytes, and writes down every visit; it decodes later

The goal is held against the first; the second is told besides. One address in fifty is missing on the server. Addresses
are the 300 photographs again and again, on 200 hosts, each with a query of its own.

CPU seconds are of all processes of a side, without nginx's. Sides take turns. A side's cost is the slope between 2,000
and 12,000 addresses, so that starting up is out of it; the ratio is that of the medians over rounds. Every picture that
the peer has ours must have too, with the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

GOAL = 2.0
SIZES = (2_000, 12_000)
NUM_HOSTS = 200
ONE_MISSING_IN = 50
PEERS = {
    "img2dataset, no resize": {"resize_mode": "no", "skip_reencode": True},
    "img2dataset, bytes only": {"disable_all_reencoding": True},
}
SIDES = ("ours", *PEERS)
PORT = 18_911
PR_SET_CHILD_SUBREAPER = 36
PACKAGES = ("aiohttp", "pyarrow")
REPORT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "fetch.json"
NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 2048; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000; default_type application/octet-stream;
  types {{ image/jpeg jpg; text/plain txt; }}
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port} backlog=4096; root {folder}/root; }}
}}
"""


def serve(folder: Path, nginx: str, pictures: Path) -> tuple[subprocess.Popen[bytes], list[str]]:
    """Start nginx over the photographs of a tar; the server and their names."""
    root = folder / "root"
    root.mkdir(parents=True)
    names = []
    with tarfile.open(pictures) as tar:
        for member in tar:
            if member.name.lower().endswith((".jpeg", ".jpg")):
                names.append(f"{len(names):03d}.jpg")
                (root / names[-1]).write_bytes(tar.extractfile(member).read())
    (root / "robots.txt").write_text("User-agent: *\nAllow: /\n")
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=PORT))
    server = subprocess.Popen([nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)], stderr=subprocess.DEVNULL)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(50):
        try:
            opener.open(f"http://127.0.0.1:{PORT}/robots.txt", timeout=1).close()
            return server, names
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"nginx did not start: {(folder / 'error.log').read_text()}")


def paths_of(names: list[str], count: int) -> list[str]:
    """``count`` different paths with a query, some of which the server does not have."""
    return [f"/{'gone' if n % ONE_MISSING_IN == 7 else ''}{names[n * 7919 % len(names)]}?v={n}" for n in range(count)]


def adopt_orphans() -> None:
    """A process whose parent ends without waiting for it becomes ours, and its CPU time is told to us."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def cpu_of(command: list[str], *, server: int, environment: dict[str, str] | None = None) -> float:
    """CPU seconds of a command and of all that it started; ``server`` is another child, which goes on."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    for child in psutil.Process().children():
        if child.pid != server:
            os.waitpid(child.pid, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def by_us(paths: list[str], folder: Path, server: int) -> tuple[float, dict[str, str]]:
    """CPU seconds, and the sha256 of every picture by its path."""
    hosts = [f"h{n:03d}.bench.test" for n in range(NUM_HOSTS)]
    lines = [f"http://{hosts[n % NUM_HOSTS]}{path}" for n, path in enumerate(paths)]
    (folder / "urls.txt").write_text("\n".join(lines) + "\n")
    recipe = {
        "name": "bench",
        "pool": str(folder / "pool"),
        "run": str(folder / "run"),
        "sources": {"web": {"kind": "list", "location": str(folder / "urls.txt")}},
        "fetch": {"resolve": dict.fromkeys(hosts, f"127.0.0.1:{PORT}"), "per_host_interval_s": 0.0},
        "execution": {"executor": "inline"},
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "pipelines.cli", "curate", str(folder / "bench.yaml"), "--until", "fetched"]
    spent = cpu_of(command, server=server)
    images = table_of(folder / "pool" / "images", "part-*.parquet")
    urls = table_of(folder / "pool" / "urls", "part-*.parquet")
    url_of = dict(zip(urls["image_id"].to_pylist(), urls["url"].to_pylist(), strict=True))
    found = {}
    for row in images.filter(images["ok"]).to_pylist():
        with (folder / "pool" / row["object"]).open("rb") as tar:
            data = os.pread(tar.fileno(), row["num_bytes"], row["offset"])
        if hashlib.sha256(data).hexdigest() == row["sha256"]:
            found[url_of[row["image_id"]].partition(".bench.test")[2]] = row["sha256"]
    return spent, found


def by_peer(paths: list[str], folder: Path, server: int, *, side: str, python: str) -> tuple[float, dict[str, str]]:
    """The same of img2dataset."""
    base = f"http://127.0.0.1:{PORT}"
    (folder / "urls.txt").write_text("\n".join(base + path for path in paths) + "\n")
    values = {
        "url_list": folder / "urls.txt",
        "output_folder": folder / "out",
        "output_format": "webdataset",
        "processes_count": 1,
        "thread_count": 32,
        **PEERS[side],
        "compute_hash": "sha256",
        "enable_wandb": False,
        "extract_exif": False,
    }
    command = [str(Path(python).parent / "img2dataset")]
    command += [f"--{name}={value}" for name, value in values.items()]
    spent = cpu_of(command, server=server, environment={"NO_ALBUMENTATIONS_UPDATE": "1"})
    rows = table_of(folder / "out", "*.parquet").to_pylist()
    told = {row["key"]: (row["url"].removeprefix(base), row["sha256"]) for row in rows if row["status"] == "success"}
    found = {}
    for path in sorted((folder / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if kind not in ("txt", "json"):
                    data = tar.extractfile(member).read()
                    where, sha256 = told[key]
                    if hashlib.sha256(data).hexdigest() == sha256:
                        found[where] = sha256
    return spent, found


def table_of(folder: Path, pattern: str) -> pa.Table:
    """All parts of a table."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob(pattern))], promote_options="default")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pool_imagenet_300.tar")
    parser.add_argument("--peer", required=True, help="python of an environment with img2dataset")
    parser.add_argument("--nginx", default="nginx", help="its binary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=REPORT, help="where the numbers go")
    options = parser.parse_args()
    adopt_orphans()
    spent: dict[str, dict[int, list[float]]] = {side: {size: [] for size in SIZES} for side in SIDES}
    same = superset = True
    with tempfile.TemporaryDirectory(prefix="lvd-bench-fetch-") as temporary:
        folder = Path(temporary)
        server, names = serve(folder / "nginx", options.nginx, options.data / "pool_imagenet_300.tar")
        try:
            for number in range(options.rounds):
                for size in SIZES:
                    paths, got = paths_of(names, size), {}
                    for side in SIDES if number % 2 else SIDES[::-1]:
                        work = folder / "work"
                        work.mkdir()
                        if side == "ours":
                            cpu_s, got[side] = by_us(paths, work, server.pid)
                        else:
                            cpu_s, got[side] = by_peer(paths, work, server.pid, side=side, python=options.peer)
                        spent[side][size].append(cpu_s)
                        shutil.rmtree(work)
                        told = f"{len(got[side]):,} of {size:,} pictures, {cpu_s:.1f} CPU s"
                        print(f"round {number} {side:<24}{told}", flush=True)
                    ours = got.pop("ours")
                    for theirs in got.values():
                        superset &= theirs.keys() <= ours.keys()
                        same &= all(ours.get(path) == sha256 for path, sha256 in theirs.items())
        finally:
            server.terminate()
            server.wait()
    slopes = {
        side: statistics.median(
            (large - small) / (SIZES[1] - SIZES[0]) * 1e3
            for small, large in zip(by_size[SIZES[0]], by_size[SIZES[1]], strict=True)
        )
        for side, by_size in spent.items()
    }
    ratios = {peer: slopes[peer] / slopes["ours"] for peer in PEERS}
    ratio = ratios["img2dataset, no resize"]
    peer_version = subprocess.run(
        [options.peer, "-c", "from importlib.metadata import version; print(version('img2dataset'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    report = {
        "ratios": {peer: round(value, 3) for peer, value in ratios.items()},
        "goal": GOAL,
        "cpu_ms_an_address": {side: round(value, 4) for side, value in slopes.items()},
        "cpu_s": spent,
        "same_bytes": same,
        "superset": superset,
        "inputs": {
            "pictures": f"{len(names)} of pool_imagenet_300.tar",
            "addresses": SIZES,
            "hosts": NUM_HOSTS,
            "rounds": options.rounds,
        },
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES} | {"img2dataset": peer_version},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for side, value in slopes.items():
        print(f"{side:<24}{value:>9.3f} CPU ms an address")
    print(f"same bytes of every picture that both have: {same}; all that the peer has: {superset}")
    print(f"fetch beside img2dataset, bytes only: ratio {ratios['img2dataset, bytes only']:.2f}")
    is_ok = ratio >= GOAL and same and superset
    print(f"fetch ratio {ratio:.2f} goal {GOAL} {'ok' if is_ok else 'short'}")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
