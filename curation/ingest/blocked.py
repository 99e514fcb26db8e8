"""Block lists: which hosts and which addresses are dropped, as recipes and files write it.

    example.org             the host and all below it; so do .example.org and *.example.org
    example.org/ads/        of these, addresses of any scheme and port whose path begins so
    https://example.org/a   addresses that begin so; the host is whole, and no other is below it
    /banner/                a part of an address, wherever it stands
    0.0.0.0 a.test b.test   a line of a hosts file: names behind an IP address

Rules and addresses are both held in their canonical spelling. A name below which anybody registers others (co.uk,
github.io) would block hosts of many owners, so that must be meant: bare it is an error, ``*.github.io`` names them all.
In a line of a hosts file, which knows no domains, it is that host alone. What cannot be read is an error, too, so that
no line of a list in another syntax is taken for something else, or for nothing.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from curation.ingest.address import AddressError, canonical_url, parse_address
from curation.ingest.suffix import is_public_suffix
from curation.stage import digest_of
from training.config import ConfigError

_NAME = re.compile(r"[a-z0-9_.-]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NEVER = re.compile(r"[^!-~]|[][*^|\\<>\"{}`]")  # no canonical path has these; but *, which is meant as a wildcard
# a.test##.ad is a rule of another syntax, a.test # ad is not. Right behind a path stands a fragment, no comment.
_COMMENT = re.compile(r"(?:^|\s)#.*|^([^/#]*)#(?![#@?$%]).*")
_HOSTS = "give hosts or domains, without scheme, port and path"
_ALLOWED = (
    "allowed are HOST or DOMAIN, HOST/PATH, SCHEME://HOST/PATH, a part of an address that begins with /, or a line of "
    "a hosts file; rules for browsers (adblock) are not read, most lists are published as hosts or domains too"
)


class Entry(NamedTuple):
    """One rule in its canonical spelling."""

    kind: Literal["domain", "host", "path", "address", "part"]
    value: str


@dataclass(frozen=True)
class Blocked:
    """Rules, each once, in order."""

    entries: tuple[Entry, ...]

    @cached_property
    def digest(self) -> str:
        """Of the rules: paths of files, order and comments are of no matter."""
        return digest_of([list(entry) for entry in self.entries])

    def names_host(self, host: str) -> bool:
        """Whether all of a host is blocked."""
        return host in self._hosts or not self._domains.isdisjoint(domains_of(host))

    def asks_path(self, host: str) -> bool:
        """Whether some rule names a part of a host."""
        return host in self._hosts_of_addresses or not self._hosts_of_paths.isdisjoint(domains_of(host))

    def names_path(self, host: str, canonical: str) -> bool:
        """Whether a rule names an address of a host, by how it begins."""
        address = _without_user(canonical)
        if _begins(self._addresses, address):
            return True
        path = address[address.find("/", address.find("://") + 3) :]
        below = (domain for domain in domains_of(host) if domain in self._hosts_of_paths)
        return any(_begins(self._paths, domain + path) for domain in below)

    @cached_property
    def has_parts(self) -> bool:
        """Whether some rule names parts of addresses."""
        return any(entry.kind == "part" for entry in self.entries)

    def names_part(self, canonical: str) -> bool:
        """Whether a rule names a part of an address: in one pass over it, however many such rules there are."""
        return next(self._parts.iter(canonical), None) is not None

    def _of(self, kind: str) -> list[str]:
        return [entry.value for entry in self.entries if entry.kind == kind]

    @cached_property
    def _domains(self) -> frozenset[str]:
        return frozenset(self._of("domain"))

    @cached_property
    def _hosts(self) -> frozenset[str]:
        return frozenset(self._of("host"))

    @cached_property
    def _addresses(self) -> list[str]:
        return _shortest(self._of("address"))

    @cached_property
    def _hosts_of_addresses(self) -> frozenset[str]:
        return frozenset(parse_address(url).host for url in self._addresses)

    @cached_property
    def _paths(self) -> list[str]:
        return _shortest(self._of("path"))

    @cached_property
    def _hosts_of_paths(self) -> frozenset[str]:
        return frozenset(path.partition("/")[0] for path in self._paths)

    @cached_property
    def _parts(self) -> Any:
        import ahocorasick

        found = ahocorasick.Automaton(ahocorasick.STORE_LENGTH)
        for part in self._of("part"):
            found.add_word(part)
        found.make_automaton()
        return found


def domains_of(host: str) -> list[str]:
    """The host and every domain above it."""
    found, at = [host], host.find(".")
    while at >= 0:
        found.append(host[at + 1 :])
        at = host.find(".", at + 1)
    return found


def _without_user(canonical: str) -> str:
    """An address without the user and password that may stand in front of its host."""
    scheme, mark, rest = canonical.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{mark}{authority.rpartition('@')[2]}{slash}{path}"


def _shortest(prefixes: Iterable[str]) -> list[str]:
    """Prefixes without those that another one begins, in order: so only the one before a text can begin it."""
    kept: list[str] = []
    for prefix in sorted(prefixes):
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return kept


def _begins(prefixes: list[str], text: str) -> bool:
    place = bisect_right(prefixes, text)
    return place > 0 and text.startswith(prefixes[place - 1])


# Reading


def read_entries(key: str, texts: Sequence[str], *, is_host: bool) -> Blocked:
    """Rules that a recipe holds.

    Args:
        key: of the recipe, for messages.
        texts: rules.
        is_host: all are hosts or domains; else what is neither address nor host with a path is a part of an address.

    Raises:
        ConfigError: one that cannot be read, or a bare public suffix.
    """
    found = set()
    for text in texts:
        try:
            entry = Entry("domain", _domain(text.strip(), _HOSTS)) if is_host else _entry(text.strip(), is_part=True)
            found.add(entry)
        except ValueError as error:
            raise ConfigError(f"{key}: got {text!r}: {error}") from None
    return Blocked(tuple(sorted(found)))


def read_block_lists(key: str, paths: Sequence[str]) -> Blocked:
    """Rules of some files.

    Raises:
        ConfigError: a file or a line cannot be read; one line that names file, line, value, and what is allowed.
    """
    states = []
    for path in paths:
        try:
            state = Path(path).stat()
        except OSError as error:
            raise ConfigError(_unreadable(key, path, str(error.strerror))) from None
        states.append((path, state.st_mtime_ns, state.st_size))
    return _read(key, tuple(states))


@lru_cache(maxsize=16)  # the planner asks for the fingerprint of every shard
def _read(key: str, states: tuple[tuple[str, int, int], ...]) -> Blocked:
    return Blocked(tuple(sorted({entry for path, _, _ in states for entry in _entries(key, path)})))


def _unreadable(key: str, path: str, why: str) -> str:
    return f"{key}: {path!r}: {why}; give text files with one entry a line"


def _entries(key: str, path: str) -> Iterator[Entry]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(_unreadable(key, path, str(error.strerror))) from None
    except UnicodeDecodeError:
        raise ConfigError(_unreadable(key, path, "not UTF-8 text")) from None
    for number, line in enumerate(lines, start=1):
        first, *names = _COMMENT.sub(r"\1", line).split() or [""]
        try:
            if names and _is_ip(first):
                yield from (_entry_of_hosts_file(name) for name in names)
            elif names:
                raise ValueError(_ALLOWED)
            elif first:
                yield _entry(first, is_part=first.startswith("/"))
        except ValueError as error:
            raise ConfigError(f"{key}: {path} line {number}: got {line.strip()[:80]!r}: {error}") from None


def _entry_of_hosts_file(name: str) -> Entry:
    plain = _plain(name)
    return Entry("host" if is_public_suffix(plain) else "domain", plain)


def _entry(text: str, *, is_part: bool) -> Entry:
    """The rule that a text is; ``is_part``: where it is neither an address nor a host with a path."""
    host, slash, path = text.partition("/")
    if slash and "#" in text:
        raise ValueError("no rule can name a fragment (#…), no server is told it; a comment has a space before its #")
    if _SCHEME.match(text):
        if "*" in text:
            raise ValueError("* is no wildcard here; an address covers all that begin with it")
        try:
            parse_address(text)
            return Entry("address", _without_user(canonical_url(text)))
        except AddressError as error:
            raise ValueError(f"{error}; {_ALLOWED}") from None
    if host and slash and ("." in host or not is_part):
        if _is_network(text):
            raise ValueError("networks are not read here; give hosts, or addresses with their scheme")
        if "*" in path:
            raise ValueError("* is no wildcard in a path; it covers all that begin with it")
        domain = _domain(host)
        return Entry("path", canonical_url(f"http://{domain}/{path}").removeprefix("http://"))
    if not is_part:
        return Entry("domain", _domain(text))
    if _NEVER.search(text):
        raise ValueError(f"no address has such a part in its canonical spelling; {_ALLOWED}")
    if text in "https://":
        raise ValueError("every address has such a part")
    return Entry("part", text)


def _domain(text: str, allowed: str = _ALLOWED) -> str:
    """A host or domain; bare it must not be a public suffix."""
    plain = _plain(text, allowed)
    if not text.startswith((".", "*.")) and is_public_suffix(plain):
        raise ValueError(
            f"a public suffix, below which anybody registers names; *.{plain} names them all, or name those you mean"
        )
    return plain


def _plain(text: str, allowed: str = _ALLOWED) -> str:
    """A host of a rule in the spelling that hosts of addresses have."""
    name = text.lower().removeprefix("*.").strip(".")
    try:
        if not name.isascii():
            name = parse_address(f"http://{name}").host
    except AddressError:
        raise ValueError(f"no host; {allowed}") from None
    if not (_NAME.fullmatch(name) or _is_ip(name)):
        port = " (with a port: only in an address with its scheme)" if re.fullmatch(r"[^/:]+:\d+", name) else ""
        raise ValueError(f"no host{port}; {allowed}")
    return name


@lru_cache(maxsize=256)  # the same few stand in front of all names of a hosts file
def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True
