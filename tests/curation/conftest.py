import runpy
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.store import LocalStore, S3Store

BUILD = runpy.run_path(str(Path(__file__).parents[1] / "small_run.py"))["build"]


@pytest.fixture
def small_run(tmp_path: Path) -> Any:
    """Pool and run of hand-made tables with real pictures, all verdicts done, nothing exported: see small_run.py."""
    return BUILD(tmp_path)


@pytest.fixture
def in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[LocalStore], S3Store]]:
    """Copies a folder into a bucket of a server on loopback; the same store over there."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)

    def copied(local: LocalStore) -> S3Store:
        bucket = f"small-{uuid.uuid4().hex}"  # the servers of a process share what they hold
        request = urllib.request.Request(f"http://{host}:{port}/{bucket}", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
        store = S3Store(f"s3://{bucket}/pool")
        for path in local.list(""):
            file = tmp_path / "upload"
            file.write_bytes(local.read(path))
            assert store.create(path, file)
        return store

    try:
        yield copied
    finally:
        server.stop()
