import asyncio
import math
import socket
import time

import pytest

from curation.ingest import resolver
from curation.ingest.resolver import LookupFailedError, Resolver


def test_a_name_that_takes_long_is_found_although_others_were_quick(nameserver):
    """c-ares learns from quick answers to wait for a quarter of a second only."""
    quick = [f"quick{n}.test" for n in range(60)]
    slow = {f"slow{n}.test": 0.6 + 0.4 * (n % 2) for n in range(10)}
    server = nameserver({name: ["8.8.8.8"] for name in (*quick, *slow)})
    server.late.update(slow)

    async def run():
        asker = Resolver([server.place])
        for name in quick:
            await asker.addresses(name)
        found = await asyncio.gather(*(asker.addresses(name) for name in slow), return_exceptions=True)
        await asker.close()
        return found

    assert asyncio.run(run()) == [["8.8.8.8"]] * len(slow)


def test_a_name_server_that_says_nothing_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(resolver, "_PATIENCE_S", 0.3)
    told = []

    async def run(place):
        asker = Resolver([place], lambda: told.append(True))
        for anew in (False, True):
            with pytest.raises(LookupFailedError, match=r"no name server answered within 0\.3 s") as failed:
                await asker.addresses("a.test", anew=anew)
            assert not failed.value.answered
        await asker.close()

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        started = time.monotonic()
        asyncio.run(run(f"127.0.0.1:{silent.getsockname()[1]}"))
    assert time.monotonic() - started < 10  # c-ares alone would ask six times, the first for three seconds
    assert told == []


def test_where_a_client_fails_another_one_asks(nameserver):
    server = nameserver({"a.test": ["8.8.8.8"], "b.test": ["8.8.4.4"]})
    server.late["b.test"] = math.inf

    async def run():
        asker = Resolver([server.place])
        await asker.addresses("a.test")
        asked = asyncio.create_task(asker.addresses("b.test"))
        while "b.test" not in server.asked:
            await asyncio.sleep(0.01)
        asker._client.cancel()  # its question ends without an answer
        server.late.clear()
        found = await asked
        await asker.close()
        return found

    assert asyncio.run(run()) == ["8.8.4.4"]
    assert len(server.askers["b.test"]) == 2


def test_where_every_client_fails_the_name_is_not_said_to_be_none(nameserver):
    server = nameserver({"a.test": ["8.8.8.8"]})
    server.stop()

    async def run():
        asker = Resolver([server.place])
        with pytest.raises(LookupFailedError) as failed:
            await asker.addresses("a.test")
        await asker.close()
        return failed.value.answered

    assert asyncio.run(run()) is False
