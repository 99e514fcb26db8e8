"""Names to addresses: as the system does, or by the name servers that a recipe gives.

The system's look-up takes a thread each and knows /etc/hosts. With name servers of one's own, look-ups cost no thread
and ask nobody else: for clusters whose resolver cannot bear the load, and where nobody may install another.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from training.config import ConfigError

if TYPE_CHECKING:
    from aiodns import DNSResolver

NUM_LOOKUPS = 32  # at once: a resolver that is flooded answers nobody
_REMEMBER_S = 300.0
# Of the first question to a name server; c-ares waits no longer than a few times what earlier answers took, a quarter
# of a second at least, and twice as long each round. So a late answer needs many rounds, and all of them have an end.
_TIMEOUT_S = 3.0
_ROUNDS = 6
_PATIENCE_S = 9.0  # of one name
_AT_ONCE_S = 1.0
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class LookupFailedError(OSError):
    """A name has no address: because somebody said so (``answered``), or because nobody answered.

    Where that was told at once, as by a name server that is being started, it is worth another attempt (``again``).
    """

    def __init__(self, text: str, *, answered: bool) -> None:
        super().__init__(text)
        self.answered = answered
        self.again = False


class Resolver:
    """Looks names up, a number at once, inside one event loop.

    Failures are remembered for five minutes, but for those that are worth another attempt.

    ``answered`` is told whenever somebody had an answer: the name, and whether there is such a name.
    """

    def __init__(
        self, nameservers: Sequence[str] = (), answered: Callable[[str, bool], None] = lambda host, is_there: None
    ) -> None:
        self._nameservers = [_nameserver(place) for place in nameservers]
        self._answered = answered
        self._client: DNSResolver | None = None
        self._failed: dict[str, tuple[float, LookupFailedError]] = {}
        self._slots = asyncio.Semaphore(NUM_LOOKUPS)

    async def addresses(self, host: str, *, anew: bool = False) -> list[str]:
        """Addresses of a name; ``anew`` asks again, whatever was answered before.

        Raises:
            LookupFailedError: it has none, or nobody answered.
        """
        failed = None if anew else self._failed.get(host)
        if failed is not None and time.monotonic() - failed[0] < _REMEMBER_S:
            raise failed[1]
        async with self._slots:
            started = time.monotonic()
            try:
                found = await self._ask(host, anew=anew)
            except LookupFailedError as error:
                error.again = not error.answered and time.monotonic() - started < _AT_ONCE_S
                if not error.again:
                    self._failed[host] = (time.monotonic(), error)
                if error.answered:
                    self._answered(host, False)
                raise
        self._answered(host, True)
        return list(dict.fromkeys(found))

    def forget_failures(self) -> None:
        """Names that failed may be asked for again: they failed in an outage."""
        self._failed.clear()

    async def close(self) -> None:
        """Ask nobody any more."""
        if self._client is not None:
            await self._client.close()

    async def _ask(self, host: str, *, anew: bool) -> list[str]:
        if not self._nameservers:
            return await _ask_system(host)
        if anew:  # not by the client that is kept: it answers from its own memory
            async with _client(self._nameservers) as client:
                return await _ask_servers(client, host)
        if self._client is None:
            self._client = _client(self._nameservers)
        return await _ask_servers(self._client, host)


def _client(nameservers: Sequence[str]) -> DNSResolver:
    import aiodns
    import pycares

    return aiodns.DNSResolver(
        nameservers=nameservers,
        timeout=_TIMEOUT_S,
        tries=_ROUNDS,
        flags=pycares.ARES_FLAG_NOSEARCH,
    )


async def _ask_servers(client: DNSResolver, host: str) -> list[str]:
    """Both kinds of addresses, by a question each.

    Not by ``getaddrinfo``: it would read /etc/hosts as well, and open sockets to addresses that nobody has judged yet,
    to sort them. pycares 5.2 can forbid the first, but hands c-ares a string for it that is freed by then: now and then
    a client would find no way to look up anything.
    """
    import aiodns

    try:
        async with asyncio.timeout(_PATIENCE_S):
            questions = (client.query_dns(host, kind) for kind in ("A", "AAAA"))
            replies = await asyncio.gather(*questions, return_exceptions=True)
    except TimeoutError:
        raise LookupFailedError(f"no name server answered within {_PATIENCE_S:g} s", answered=False) from None
    found: list[str] = []
    failures: list[LookupFailedError] = []
    for reply in replies:
        if isinstance(reply, aiodns.error.DNSError):
            failures.append(_failure(reply))
        elif isinstance(reply, BaseException):
            raise reply
        else:
            found += [record.data.addr for record in reply.answer if hasattr(record.data, "addr")]
    if found:
        return found
    # What nobody answered says more: the answer to the other question may be that there is none of its kind.
    raise min(failures, key=lambda failure: failure.answered, default=LookupFailedError("no address", answered=True))


def _failure(error: Exception) -> LookupFailedError:
    from aiodns.error import ARES_EBADNAME, ARES_ENODATA, ARES_ENOTFOUND

    code, text = error.args
    return LookupFailedError(str(text), answered=code in (ARES_ENOTFOUND, ARES_ENODATA, ARES_EBADNAME))


async def _ask_system(host: str) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise LookupFailedError(str(error), answered=error.errno in _NO_SUCH_NAME) from None
    except OSError as error:
        raise LookupFailedError(str(error), answered=False) from None
    except UnicodeError as error:
        raise LookupFailedError(f"{host!r} is no name: {error}", answered=True) from None
    return [str(entry[4][0]) for entry in found]


def _nameserver(place: str) -> str:
    """An address, with its port where it is not 53."""
    address, colon, port = place.rpartition(":") if place.count(":") == 1 or "]:" in place else (place, "", "")
    try:
        ip = ipaddress.ip_address(address.strip("[]"))
        if colon and not 0 < int(port) < 65536:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"fetch.nameservers: {place!r} is no ADDRESS or ADDRESS:PORT, such as 192.0.2.53 or 127.0.0.1:5353"
        ) from None
    return place if colon else str(ip)
