import asyncio
import socket

import pytest

from curation.ingest.guard import ForbiddenAddressError, Guard, is_public, is_web_port, literal_address
from training.config import ConfigError

FORBIDDEN = [
    "http://127.0.0.1/a.png",
    "http://127.0.0.1:22/a.png",
    "http://10.0.0.1/a.png",
    "http://172.16.0.1/a.png",
    "http://192.168.1.1/a.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.64.0.1/a.png",
    "http://0.0.0.0/a.png",
    "http://255.255.255.255/a.png",
    "http://224.0.0.1/a.png",
    "http://2130706433/a.png",
    "http://0x7f000001/a.png",
    "http://0x7f.1/a.png",
    "http://017700000001/a.png",
    "http://0177.0.0.1/a.png",
    "http://127.1/a.png",
    "http://127.0.0.1./a.png",
    "http://１２７.0.0.1/a.png",
    "http://127。0。0。1/a.png",
    "http://user@127.0.0.1/a.png",
    "http://[::1]/a.png",
    "http://[::]/a.png",
    "http://[::ffff:10.0.0.1]/a.png",
    "http://[::ffff:7f00:1]/a.png",
    "http://[::7f00:1]/a.png",
    "http://[2002:7f00:1::]/a.png",
    "http://[2002:a00:1::1]/a.png",
    "http://[64:ff9b::10.0.0.1]/a.png",
    "http://[64:ff9b:1::1]/a.png",
    "http://[2001:0:7f00:1::]/a.png",
    "http://[fd00::1]/a.png",
    "http://[fe80::1]/a.png",
    "http://[fe80::1%25eth0]/a.png",
    "http://[fec0::1]/a.png",
    "http://[ff02::1]/a.png",
    "http://[2001:db8::1]/a.png",
    "http://localhost/a.png",
    "http://999999999999/a.png",
    "http://8.8.8.8:25/a.png",
    "http://8.8.8.8:6667/a.png",
    "http://a.test:8099/a.png",
]


@pytest.mark.parametrize("respect_robots", [False, True])
def test_no_forbidden_address_is_contacted_in_any_spelling(fetch, web, contacts, respect_robots):
    outcomes = fetch(*FORBIDDEN, respect_robots=respect_robots)
    reasons = {url: outcome.reason for url, outcome in zip(FORBIDDEN, outcomes, strict=True)}
    assert {url for url, reason in reasons.items() if reason not in ("forbidden_address", "bad_url")} == set()
    assert sum(reason == "bad_url" for reason in reasons.values()) <= 3, reasons
    assert contacts.refused == []
    assert web.requests == []


def test_the_test_servers_own_address_is_forbidden_without_its_name(fetch, web):
    (outcome,) = fetch(f"http://127.0.0.1:{web.port}/a.png")
    assert outcome.reason == "forbidden_address"
    assert web.requests == []


@pytest.mark.parametrize("target", FORBIDDEN)
def test_redirects_into_private_networks_are_not_followed(fetch, web, target):
    web.reply("a.test", "/go", status=302, headers={"Location": target})
    (outcome,) = fetch("http://a.test/go")
    assert outcome.reason in ("forbidden_address", "bad_url")
    assert [path for _, path in web.requests] == ["/go"]
    assert outcome.hops[0].outcome == "redirect"
    assert outcome.hops[0].address == f"127.0.0.1:{web.port}"
    assert outcome.hops[-1].address is None or len(outcome.hops) == 1


def test_a_name_that_leads_inside_is_refused(monkeypatch, contacts):
    async def run(answers):
        guard = Guard({}, contacts)

        async def getaddrinfo(host, port, **_):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, port)) for answer in answers]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        return await guard.resolve("rebind.example", 80)

    with pytest.raises(ForbiddenAddressError, match=r"10\.0\.0\.1 is not a public address"):
        asyncio.run(run(["8.8.8.8", "10.0.0.1"]))
    assert [found["host"] for found in asyncio.run(run(["8.8.8.8"]))] == ["8.8.8.8"]


def test_the_last_door_refuses_what_the_others_would_let_through(contacts):
    guard = Guard({"a.test": "127.0.0.1:8080"}, contacts)
    with pytest.raises(ForbiddenAddressError):
        guard.socket_for((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 8080)))
    assert contacts.refused == []


def test_failed_names_are_asked_for_once(monkeypatch):
    asked = []

    async def run():
        guard = Guard({})

        async def getaddrinfo(host, port, **_):
            asked.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "no such name")

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        for _ in range(3):
            with pytest.raises(OSError, match="no such name"):
                await guard.resolve("gone.example", 80)

    asyncio.run(run())
    assert asked == ["gone.example"]


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::8.8.8.8", "2002:808:808::1"])
def test_public_addresses(address):
    assert is_public(address)


def test_other_ways_of_writing_an_address():
    assert literal_address("0x08.8.2056") == "8.8.8.8"
    assert literal_address("134744072") == "8.8.8.8"
    assert literal_address("example.com") is None
    assert literal_address("1.example") is None
    assert literal_address("99999999999") == "0.0.0.0"


def test_ports():
    assert [port for port in (22, 25, 80, 443, 6667, 8080, 8443) if is_web_port(port)] == [80, 443, 8080, 8443]


def test_a_bad_exemption_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"fetch\.resolve\.a\.test: 'localhost:80' is no ADDRESS:PORT"):
        Guard({"a.test": "localhost:80"})
