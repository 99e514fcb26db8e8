"""Pictures by https, from servers with certificates of an authority that is made here, good ones and others."""

import asyncio
import datetime
import hashlib
import ipaddress
import ssl
import threading
from contextlib import ExitStack, contextmanager

import pytest

from curation.ingest.certificates import tls_context
from curation.ingest.fetch import FetchConfig
from curation.ingest.fetcher import Fetcher

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates."""

    def __init__(self, folder, name="authority"):
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self._sign(self._name, self._key, NOW + 9 * DAY, is_authority=True))

    @property
    def name_in_folders(self):
        """As OpenSSL looks for it (X509_NAME_hash): of a name in lower case, the SHA-1 of its parts."""
        parts = self._name.public_bytes()[2:]  # without the head of the sequence
        return f"{int.from_bytes(hashlib.sha1(parts).digest()[:4], 'little'):08x}.0"

    def _sign(self, subject, key, ends, *, is_authority=False, names=()):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        builder = x509.CertificateBuilder(
            issuer_name=self._name,
            subject_name=subject,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=NOW - 9 * DAY,
            not_valid_after=ends,
        ).add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def context(self, host, *, ends=NOW + 9 * DAY):
        """What a server of this name speaks https with."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("192.0.2.1"))]
        path = self.folder / f"{host}-{ends:%j}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(self._sign(subject, key, ends, names=names) + private)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


@contextmanager
def serving(answer, context=None):
    """A server on a loopback port that says the same to everybody; its port."""
    ready, found = threading.Event(), {}

    async def serve(reader, writer):
        try:
            head = await reader.read(1 << 16)
            await asyncio.sleep(30 if answer is None else 0)
            writer.write(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n" if b"robots.txt" in head else answer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        found.update(loop=asyncio.get_running_loop(), stopped=asyncio.Event())
        found["port"] = server.sockets[0].getsockname()[1]
        ready.set()
        await found["stopped"].wait()
        server.close()
        await asyncio.sleep(0.1)  # connections say goodbye

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield found["port"]
    finally:
        found["loop"].call_soon_threadsafe(found["stopped"].set)
        thread.join(10)


def ok(body):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body


@pytest.fixture
def authority(tmp_path, monkeypatch):
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.path))
    return made


@pytest.fixture
def ask(authority, picture_bytes):
    """Fetches addresses from one server each, all on loopback."""

    def ask_all(urls, servers, **values):
        contacts = []
        with ExitStack() as stack:
            ports = {host: stack.enter_context(serving(*server)) for host, server in servers.items()}

            def contact(address, port):
                contacts.append((address, port))
                assert address == "127.0.0.1"
                assert port in ports.values()

            async def run():
                config = FetchConfig(
                    resolve={host: f"127.0.0.1:{port}" for host, port in ports.items()},
                    per_host_interval_s=0.0,
                    backoff_s=0.01,
                    timeout_s=5.0,
                    **values,
                )
                async with Fetcher(config, contact=contact) as fetcher:
                    return list(await asyncio.gather(*(fetcher.fetch(url) for url in urls)))

            return asyncio.run(run()), contacts

    return ask_all


@pytest.fixture
def picture_bytes():
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def test_a_picture_by_https_and_one_that_http_leads_to(authority, ask, picture_bytes):
    led = b"HTTP/1.1 301 Moved\r\nLocation: https://good.test/x.png\r\nContent-Length: 0\r\n\r\n"
    servers = {"good.test": (ok(picture_bytes), authority.context("good.test")), "plain.test": (led,)}
    outcomes, _ = ask(["https://good.test/x.png", "http://plain.test/x.png"], servers)
    assert [(outcome.reason, outcome.body) for outcome in outcomes] == [(None, picture_bytes)] * 2
    assert [outcome.final_url for outcome in outcomes] == ["https://good.test/x.png"] * 2


def test_a_certificate_that_is_not_good_is_seen_before_anything_is_asked(authority, tmp_path, ask, picture_bytes):
    (tmp_path / "other").mkdir()
    body = ok(picture_bytes)
    servers = {
        "expired.test": (body, authority.context("expired.test", ends=NOW - DAY)),
        "another.test": (body, authority.context("elsewhere.test")),
        "stranger.test": (body, Authority(tmp_path / "other", "stranger").context("stranger.test")),
    }
    outcomes, contacts = ask([f"https://{host}/x.png" for host in servers], servers)
    assert [outcome.reason for outcome in outcomes] == ["bad_certificate"] * 3
    assert all(outcome.transient for outcome in outcomes)  # sites renew them, and it may be us
    assert len(contacts) == 3  # of robots.txt, once each: the next try would be the same
    outcomes, contacts = ask([f"https://{host}/x.png" for host in servers], servers, respect_robots=False)
    assert [outcome.reason for outcome in outcomes] == ["bad_certificate"] * 3
    assert [[hop.outcome for hop in outcome.hops] for outcome in outcomes] == [["bad_certificate"]] * 3
    outcomes, _ = ask([f"https://{host}/x.png" for host in servers], servers, verify_certificates=False)
    assert [(outcome.reason, outcome.body) for outcome in outcomes] == [(None, picture_bytes)] * 3


def test_what_speaks_no_tls(ask, picture_bytes):
    servers = {"plain.test": (ok(picture_bytes),), "silent.test": (None,)}
    outcomes, _ = ask(
        ["https://plain.test/x.png", "https://silent.test/x.png"], servers, respect_robots=False, attempts=1
    )
    assert [outcome.reason for outcome in outcomes] == ["connection", "timeout"]


@pytest.mark.parametrize("left", [(), ("README",), ("empty.pem",)])
def test_a_machine_without_certificates_has_those_of_mozilla(monkeypatch, tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "empty.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert ssl.create_default_context().cert_store_stats()["x509_ca"] == 0
    assert tls_context().cert_store_stats()["x509_ca"] > 100
    assert tls_context().verify_mode == ssl.CERT_REQUIRED


def test_certificates_of_folders_are_those_of_the_machine(authority, ask, picture_bytes, monkeypatch, tmp_path):
    folder = tmp_path / "trusted"
    folder.mkdir()
    (folder / authority.name_in_folders).write_bytes(authority.path.read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing"))
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path / 'nowhere'}:{folder}")
    assert tls_context().cert_store_stats()["x509_ca"] == 0  # each is read when it is needed
    servers = {"good.test": (ok(picture_bytes), authority.context("good.test"))}
    assert ask(["https://good.test/x.png"], servers)[0][0].body == picture_bytes


def test_a_probe_of_the_breaker_sees_a_certificate_too(authority, tmp_path, picture_bytes):
    """Whoever answers for everybody takes connections, but is not who was reached before."""
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "stranger").context("stranger.test")

    async def are_there(places):
        async with Fetcher(FetchConfig(resolve=places)) as fetcher:
            return [await fetcher.is_there(host, 443) for host in places]

    with serving(b"", authority.context("good.test")) as good, serving(b"", stranger) as portal, serving(b"") as plain:
        ports = {"good.test": good, "stranger.test": portal, "plain.test": plain}
        found = asyncio.run(are_there({host: f"127.0.0.1:{port}" for host, port in ports.items()}))
    assert found == [True, False, False]
