"""What a site says about being fetched: robots.txt (RFC 9309), and headers that forbid use."""

from __future__ import annotations

import asyncio
import codecs
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from protego import Protego

MAX_ROBOTS_BYTES = 512_000  # at least so many (RFC 9309, section 2.5)
OPT_OUT_DIRECTIVES = frozenset(("noai", "noimageai", "noindex", "noimageindex", "noml", "none"))
TDM_RESERVATION = "tdm-reservation"
NOFOLLOW_DIRECTIVES = frozenset(("nofollow", "none"))
_VALUED = frozenset(("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"))
_AGENT = re.compile(r"\*|[a-z_-][a-z0-9_-]*")  # what may stand before a colon; pieces of a date do not match
# A line that begins a group, one that is a rule, and one that belongs to no group, in all the spellings that Protego
# takes. Any other field ends the names of a group, too.
_NAME_LINE = re.compile(r"user[- ]?agent(?:\s*:|\s|$)\s*(.*)", re.IGNORECASE | re.ASCII)
_RULE_LINE = re.compile(
    r"(?:allow|diss?allow|diss?alow|diasllow|disallaw|crawl[- ]delay)(?:\s*:|\s|$)", re.IGNORECASE | re.ASCII
)
_SITE_LINE = re.compile(r"(?:sitemaps?|site-map|host)\s*:", re.IGNORECASE | re.ASCII)
_TOKEN = re.compile(r"\**([a-z_-]+)(?![\w-])|\*(?![\w-])")  # `bot/1.0` speaks to `bot`, `bot2` does not
_MAX_RULES = 20_000  # and wildcards in them, each of which costs time at every address
_RULE_BYTES = 600  # of one of them in memory, beside its text
_MAX_KNOWN = 20_000  # authorities; those asked longest ago are forgotten
_MAX_KNOWN_BYTES = 200_000_000  # of their rules
_KEEP_S = 24 * 3600.0
_KEEP_FAILURE_S = 300.0

State = Literal["allowed", "denied", "none", "unreachable"]


class Reply(NamedTuple):
    """What asking for robots.txt gave: a status and a body, or the failure class of the visit."""

    status: int
    body: bytes
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is known of one authority."""

    state: State  # `allowed` stands for: there are rules to ask
    failure: str | None
    expires: float  # time.monotonic()
    parsed: Protego | None = None  # the rules for us, as if they were for everybody
    num_bytes: int = 0  # that they take, about

    def judge(self, url: str) -> State:
        """Whether the rules let us fetch an address."""
        if self.parsed is None:
            return self.state
        return "allowed" if self.parsed.can_fetch(url, "*") else "denied"

    def delay_s(self) -> float:
        """Seconds between requests that the site asks for; 0 where it asks for none."""
        delay = None if self.parsed is None else self.parsed.crawl_delay("*")
        return 0.0 if delay is None or not delay > 0 else float(delay)  # `nan` is none


def forget_unreachable(known: dict[str, Rules]) -> None:
    """After an outage: what was seen of robots.txt in it says nothing of the site."""
    for authority in [authority for authority, rules in known.items() if rules.state == "unreachable"]:
        del known[authority]


class Robots:
    """What robots.txt of every authority says to an agent, asked for once.

    ``known`` may outlive the loop that filled it; others may take what could not be had from it.
    """

    def __init__(self, get: Callable[[str], Awaitable[Reply]], known: dict[str, Rules], agent: str) -> None:
        self._get = get
        self._agent = agent
        self._known = known
        self._known_bytes = sum(rules.num_bytes for rules in known.values())
        self._parsing = asyncio.Lock()
        self._asking: dict[str, asyncio.Task[Rules]] = {}

    async def rules(self, authority: str) -> Rules:
        """Rules of ``scheme://host:port``."""
        known = self._known.get(authority)
        if known is not None and known.expires > time.monotonic():
            return known
        if authority not in self._asking:
            self._asking[authority] = asyncio.create_task(self._ask(authority))
        # Others wait for the same answer: one of them that is cancelled must not take it from the rest.
        return await asyncio.shield(self._asking[authority])

    async def close(self) -> None:
        """Ask no more: whoever waited has been told, or gave up."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    async def _ask(self, authority: str) -> Rules:
        try:
            reply = await self._get(f"{authority}/robots.txt")
            async with self._parsing:  # a large one takes a tenth of a second, in which others must not time out
                rules = await asyncio.to_thread(parse_reply, reply, self._agent)
            self._forget(authority)
            self._known[authority] = rules
            self._known_bytes += rules.num_bytes
            while len(self._known) > _MAX_KNOWN or self._known_bytes > _MAX_KNOWN_BYTES:
                self._forget(next(iter(self._known)))
            return rules
        finally:
            del self._asking[authority]

    def _forget(self, authority: str) -> None:
        forgotten = self._known.pop(authority, None)
        self._known_bytes -= 0 if forgotten is None else forgotten.num_bytes


def parse_reply(reply: Reply, agent: str) -> Rules:
    """Rules for an agent from what asking for robots.txt gave (RFC 9309, section 2.3.1).

    4xx: there are none. 5xx, no answer in time, and 429: the site cannot say, so nothing is asked of it. Nor of one
    that has more rules for us than are kept: to keep some of them could be against the others.
    """
    soon = time.monotonic() + _KEEP_FAILURE_S
    late = time.monotonic() + _KEEP_S
    if reply.failure is not None:
        failure = "robots_unreachable" if reply.failure in ("timeout", "truncated_body") else reply.failure
        return Rules(state="unreachable", failure=failure, expires=soon)
    if reply.status >= 500 or reply.status == 429:
        return Rules(state="unreachable", failure="robots_unreachable", expires=soon)
    if not 200 <= reply.status < 300:
        return Rules(state="none", failure=None, expires=late)
    from protego import Protego

    body = reply.body[:MAX_ROBOTS_BYTES]
    is_utf16 = body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = body.decode("utf-16" if is_utf16 else "utf-8-sig", "replace")
    lines = _rules_for(text, agent)
    num_rules = sum(1 + line.count("*") + line.count("$") for line in lines)
    if num_rules > _MAX_RULES:
        return Rules(state="denied", failure=None, expires=late)
    group = "\n".join(["User-agent: *", *lines])
    num_bytes = len(group) + num_rules * _RULE_BYTES
    return Rules(state="allowed", failure=None, expires=late, parsed=Protego.parse(group), num_bytes=num_bytes)


def _rules_for(text: str, agent: str) -> list[str]:
    """Rules of all groups that name an agent, or else of those for everybody, each once (RFC 9309, section 2.2.1).

    Names are compared as wholes, in any case, and what follows a name is none of it. Protego alone would keep every
    rule for every name of its group, and take a name for ours that is only how ours begins.
    """
    names = (agent.lower(), "*")
    rules: dict[str, dict[str, None]] = {}  # by which of these names
    group: set[str] = set()  # those of the group that is read
    is_head = False
    for whole in text.splitlines():
        line = whole.partition("#")[0].strip()
        if begins := _NAME_LINE.match(line):
            group = group if is_head else set()
            is_head = True
            token = _TOKEN.match(begins[1].lower())
            name = None if token is None else token[1] or "*"
            if name in names:
                group.add(name)
                rules.setdefault(name, {})
        elif _RULE_LINE.match(line):
            is_head = False
            for name in group:
                rules[name].pop(line, None)  # of several delays the last one holds
                rules[name][line] = None
        elif ":" in line and not _SITE_LINE.match(line):
            is_head = False
    return next((list(rules[name]) for name in names if name in rules), [])


def opt_out(headers: Iterable[tuple[str, str]], agent: str) -> str | None:
    """The directive of response headers that forbids use, or None.

    ``X-Robots-Tag`` with one of ``OPT_OUT_DIRECTIVES``, for everybody or for this agent, and ``tdm-reservation: 1``
    (W3C TDM Reservation Protocol).
    """
    for name, value in headers:
        key = name.lower()
        if key == TDM_RESERVATION and value.strip() == "1":
            return TDM_RESERVATION
        if key == "x-robots-tag":
            found = _directive(value, agent, OPT_OUT_DIRECTIVES)
            if found is not None:
                return found
    return None


def nofollow(headers: Iterable[tuple[str, str]], agent: str) -> bool:
    """Whether an ``X-Robots-Tag`` of a page says, to everybody or to this agent, not to follow its links."""
    tags = (value for name, value in headers if name.lower() == "x-robots-tag")
    return any(_directive(value, agent, NOFOLLOW_DIRECTIVES) is not None for value in tags)


def _directive(value: str, agent: str, among: frozenset[str]) -> str | None:
    """First directive of one X-Robots-Tag that is one of some; ``bot: a, b`` speaks to that bot only."""
    to_us = True
    for part in value.lower().split(","):
        name, colon, rest = part.partition(":")
        directive = part.strip()
        if colon and name.strip() in _VALUED:
            continue
        if colon and _AGENT.fullmatch(name.strip()):
            to_us = name.strip() in ("*", agent.lower())
            directive = rest.strip()
        if to_us and directive in among:
            return directive
    return None
