"""Fixtures for all tests: the folder of shared pictures, and a bucket of a server on loopback."""

import os
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from curation.store import LocalStore, S3Store

REPOSITORY = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# How long an example takes says what the machine was at.
settings.register_profile("no_clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no_clock")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures beside the checkout; they are no part of the project."""
    folder = Path(os.environ.get("LVD_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the shared pictures are not at {folder}; name their folder in LVD_SHARED_DATA")
    return folder


class BucketServer(NamedTuple):
    """An object store on loopback. The servers of a process share what they hold."""

    place: str  # HOST:PORT

    def new_bucket(self) -> str:
        """The name of an empty bucket."""
        name = f"bucket-{uuid.uuid4().hex}"
        request = urllib.request.Request(f"http://{self.place}/{name}", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
        return name


@pytest.fixture
def bucket_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """A server, which the environment names to whoever asks for ``s3://``."""
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
    try:
        yield BucketServer(f"{host}:{port}")
    finally:
        server.stop()


@pytest.fixture
def in_a_bucket(tmp_path: Path, bucket_server: BucketServer) -> Callable[[LocalStore], S3Store]:
    """Copies a folder into a bucket; the same store over there."""

    def copied(local: LocalStore) -> S3Store:
        store = S3Store(f"s3://{bucket_server.new_bucket()}/pool")
        for path in local.list(""):
            file = tmp_path / "upload"
            file.write_bytes(local.read(path))
            assert store.create(path, file)
        return store

    return copied


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file stay in one process, so that what they share is made once (pytest -n 2 --dist loadgroup)."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path)))
