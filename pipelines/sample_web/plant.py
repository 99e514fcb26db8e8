"""Which line of the list is what: addresses, hosts, answers of the server, and the truth. No pixel is touched here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pipelines.sample_web.bodies import EXTENSIONS, MIME_TYPES
from pipelines.sample_web.truth import BASE, KIND_OF, counts

BENCHMARK_LEAST = 24
QUERY_SETS = ("as_is", "sample", "cluster")
QUERIES_PER_SET = 18

_BROKEN = (
    "",
    "not an address",
    "http://",
    "http:///no-host.jpg",
    "http://[::1/half-a-bracket.jpg",
    "http://h000.sample.test:port/a.jpg",
    "http://h000.sample.test:99999/a.jpg",
    "http://h000.sample.test/\udcff\udcfe.jpg",  # two bytes that are no UTF-8
)
_SCHEMES = (
    "ftp://h000.sample.test/{}.jpg",
    "data:image/png;base64,iVBORw0KGgo{}",
    "file:///pictures/{}.jpg",
    "javascript:show({})",
)
# Addresses that a fetcher must never connect to, plainly written and in forms that only look like names.
_PRIVATE = (
    "http://10.0.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::1]/",
    "http://192.168.1.1/admin.jpg",
    "http://172.16.0.1/",
    "http://127.0.0.1:22/",
    "http://0.0.0.0/",
    "http://100.64.0.1/",
    "http://[::ffff:10.0.0.1]/",
    "http://[fd00::1]/",
    "http://[fe80::1]/",
    "http://2130706433/",
)
_OPT_OUT = (
    {"X-Robots-Tag": "noai"},
    {"X-Robots-Tag": "noai, noimageai"},
    {"X-Robots-Tag": "noimageai"},
    {"tdm-reservation": "1"},
)
# What the server does for a line of a kind, beside sending the file: one of these.
_BEHAVIOURS: dict[str, tuple[dict[str, Any], ...]] = {
    "opt_out": tuple({"mode": "unread", "headers": headers} for headers in _OPT_OUT),
    "not_found": ({"status": 404},),
    "gone": ({"status": 410},),
    "server_error": ({"status": 500},),
    "rate_limited": ({"status": 429, "headers": {"Retry-After": "3600"}},),
    "rate_limited_ok": ({"mode": "limited", "times": 1}, {"mode": "limited", "times": 2}),
    "slow_ok": ({"mode": "slow"},),
    "slow_drip": ({"mode": "drip"},),
    "truncated_body": ({"mode": "truncate"},),
    "too_large": ({"mode": "pad"}, {"mode": "pad_chunked"}),
    "wrong_mime": tuple({"type": name} for name in ("text/html", "image/png", "application/octet-stream", "")),
    "redirect_private": tuple({"location": address} for address in _PRIVATE),
}
ROBOTS_DEFAULT = "User-agent: *\nDisallow: /admin/\n"
_ROBOTS_ALL = "User-agent: *\nDisallow: /\n"
_ROBOTS_PART = "# part of this host is private\nUser-agent: *\nDisallow: /private/\nAllow: /private/open/\n"
NUM_BLOCKED_HOSTS = 4


@dataclass(kw_only=True)
class Line:
    """One line of the list and its truth."""

    kind: str
    url: str = ""
    page_url: str = ""
    alt_text: str = ""
    base_line: int | None = None
    picture: int | None = None  # number of the base picture whose scene it shows


@dataclass(kw_only=True)
class Picture:
    """One base picture and the files that are made from it: (path inside the site, how)."""

    number: int
    outputs: list[tuple[str, str]] = field(default_factory=list)


@dataclass(kw_only=True)
class Plan:
    """The whole site before anything is drawn. ``hosts``: robots.txt and answers by path of every host."""

    lines: list[Line]
    pictures: list[Picture]  # benchmark, then query sets, then the list's, numbered in that order
    bad_files: list[tuple[str, str]]  # (path inside the site, how)
    hosts: dict[str, dict[str, Any]]
    blocked_hosts: list[str]


def num_benchmark(num_urls: int) -> int:
    """Pictures of the benchmark set: each is planted in the list at most once, and some never."""
    return max(BENCHMARK_LEAST, counts(num_urls)["benchmark_equal"] + 4)


def num_pictures(num_urls: int) -> int:
    """Distinct pictures that a site of ``num_urls`` lines needs."""
    own = sum(count for name, count in counts(num_urls).items() if KIND_OF[name].needs == "own")
    return num_benchmark(num_urls) + len(QUERY_SETS) * QUERIES_PER_SET + own


class _Hosts:
    """Host names by what they do. The last hosts behave oddly as a whole; all others serve anything."""

    def __init__(self, num_hosts: int, rng: np.random.Generator) -> None:
        names = [f"h{n:03d}.sample.test" for n in range(num_hosts)]
        self.rng = rng
        self.blocked = [f"b{n:03d}.blocked.test" for n in range(NUM_BLOCKED_HOSTS)]
        sizes = {"opt_out": 3, "server_error": 4, "slow_drip": 4, "rate_limited": 2, "rate_limited_ok": 4}
        sizes |= {"robots_unreachable": 1, "robots_denied": 3}
        self.special: dict[str, list[str]] = {}
        for kind, size in sizes.items():
            self.special[kind] = [names.pop() for _ in range(size)]
        self.plain = names
        self.part_private = names[-3:]
        self.table = {name: self._host(name) for name in (*names, *(n for s in self.special.values() for n in s))}

    def _host(self, name: str) -> dict[str, Any]:
        robots: str | None = ROBOTS_DEFAULT
        status = 200
        if name in self.special["robots_denied"]:
            robots = _ROBOTS_ALL
        elif name in self.part_private:
            robots = _ROBOTS_PART
        elif name in self.special["robots_unreachable"]:
            status = 503
        elif name == self.plain[0]:
            status = 404  # no robots.txt: all is allowed
        return {"robots": robots, "robots_status": status, "answers": {}}

    def place(self, kind: str, extension: str) -> tuple[str, str]:
        """A fresh host and path for a line of this kind."""
        name = f"{self.rng.integers(1 << 48):012x}.{extension}"
        if kind == "robots_denied" and self.rng.integers(2):
            return str(self.rng.choice(self.part_private)), f"/private/{name}"
        if kind == "blocked_host":
            return str(self.rng.choice(self.blocked)), f"/p/{name}"
        # Half of what opts out stands on ordinary hosts, beside pictures that do not.
        if kind in self.special and not (kind == "opt_out" and self.rng.integers(2)):
            return str(self.rng.choice(self.special[kind])), f"/p/{name}"
        host = str(self.rng.choice(self.plain))
        return host, f"/private/open/{name}" if host in self.part_private else f"/p/{name}"

    def answer(self, host: str, path: str, spec: dict[str, Any]) -> None:
        self.table[host]["answers"][path] = spec


def plan_site(num_urls: int, num_hosts: int, rng: np.random.Generator) -> Plan:
    """Decide every line of a site of ``num_urls`` lines."""
    hosts = _Hosts(num_hosts, rng)
    num_references = num_benchmark(num_urls) + len(QUERY_SETS) * QUERIES_PER_SET
    pictures = [Picture(number=n) for n in range(num_references)]
    for number in range(num_benchmark(num_urls)):
        pictures[number].outputs.append((f"benchmark/{number:05d}.jpg", "base"))
    kinds, base_of = _order(num_urls, rng)
    lines = [Line(kind=kind, base_line=base_of.get(n)) for n, kind in enumerate(kinds)]
    for number, line in enumerate(lines):
        if KIND_OF[line.kind].needs == "own":
            line.picture = len(pictures)
            how = "base" if line.kind not in ODD_FORMATS else line.kind
            outputs = [(file_of(number, line.kind), how)]
            pictures.append(Picture(number=len(pictures), outputs=outputs))
    bad_files: list[tuple[str, str]] = []
    next_leak = 0
    for number, line in enumerate(lines):
        if line.kind == "benchmark_equal":
            line.picture, next_leak = next_leak, next_leak + 1
        if line.base_line is not None:
            line.picture = lines[line.base_line].picture
        _write_line(number, line, lines=lines, hosts=hosts, rng=rng)
        path = file_of(number, line.kind)
        if line.kind in MADE_FROM_BASE or line.kind == "benchmark_equal":
            assert line.picture is not None
            how = line.kind if line.kind in MADE_FROM_BASE else ("base", "reencoded")[line.picture % 2]
            pictures[line.picture].outputs.append((path, how))
        elif line.kind in BAD_FILES:
            bad_files.append((path, line.kind))
    return Plan(lines=lines, pictures=pictures, bad_files=bad_files, hosts=hosts.table, blocked_hosts=hosts.blocked)


ODD_FORMATS = ("cmyk_jpeg", "png16", "animated_gif", "exif_rotated", "alpha_png", "grey_jpeg", "webp", "face")
MADE_FROM_BASE = ("reencoded", "resized", "crop", "overlay", "truncated_file")
BAD_FILES = ("corrupt", "bomb", "tiny", "wide", "blank", "html_as_jpg")


def file_of(line: int, kind: str) -> str:
    """Path inside the site of the file that a line has of its own."""
    return f"pictures/{line // 1000:03d}/{line:06d}.{EXTENSIONS.get(kind, 'jpg')}"


def _order(num_urls: int, rng: np.random.Generator) -> tuple[list[str], dict[int, int]]:
    """Kind of every line, and the base line that a line derives from. A base comes before the line that repeats it."""
    kinds = [name for name, count in counts(num_urls).items() for _ in range(count)]
    kinds = [kinds[i] for i in rng.permutation(num_urls)]
    bases = [n for n, kind in enumerate(kinds) if kind == BASE.name]
    free = [bases[i] for i in rng.permutation(len(bases))]
    pairs = [(free.pop(), n) for n, kind in enumerate(kinds) if KIND_OF[kind].needs == "copy"]
    base_of = {}
    for base, line in pairs:
        if line < base:
            kinds[base], kinds[line] = kinds[line], kinds[base]
        base_of[max(base, line)] = min(base, line)
    bases = [n for n, kind in enumerate(kinds) if kind == BASE.name]
    base_of |= {n: int(rng.choice(bases)) for n, kind in enumerate(kinds) if KIND_OF[kind].needs == "any"}
    return kinds, base_of


def _write_line(number: int, line: Line, *, lines: list[Line], hosts: _Hosts, rng: np.random.Generator) -> None:
    """Give a line its address and the server its answer."""
    extension = EXTENSIONS.get(line.kind, "jpg")
    line.alt_text = f"picture {number}, {('left', 'centre', 'right')[number % 3]}"
    match line.kind:
        case "broken_line":
            line.url = str(rng.choice(_BROKEN))
            return
        case "scheme":
            line.url = str(rng.choice(_SCHEMES)).format(number)
            return
        case "url_repeat" | "url_variant":
            assert line.base_line is not None
            line.url = lines[line.base_line].url
            if line.kind == "url_variant":
                line.url = _respelt(line.url, rng)
            line.page_url = f"http://{rng.choice(hosts.plain)}/"
            return
    host, path = hosts.place(line.kind, extension)
    line.url, line.page_url = f"http://{host}{path}", f"http://{host}/"
    if line.kind == "blocked_host":
        return
    own_file = line.kind in (BASE.name, *ODD_FORMATS, *MADE_FROM_BASE, *BAD_FILES) or KIND_OF[line.kind].needs == "own"
    source = number if own_file or line.base_line is None else line.base_line
    # A base line's file: kinds without one of their own answer with the bytes of the base they derive from.
    file = file_of(source, lines[source].kind)
    spec: dict[str, Any] = {"file": file, "type": MIME_TYPES[extension]}
    behaviours = _BEHAVIOURS.get(line.kind, ({},))
    spec |= behaviours[int(rng.integers(len(behaviours)))]
    _store_answer(line.kind, (host, path), spec, hosts=hosts)


def _respelt(url: str, rng: np.random.Generator) -> str:
    """The same address in another spelling."""
    host, path = urlsplit(url).netloc, urlsplit(url).path
    forms = (
        f"http://{host.upper()}{path}",
        f"http://{host}:80{path}",
        f"{url}#top",
        f"HTTP://{host.upper()}:80{path}#x",
    )
    return forms[int(rng.integers(len(forms)))]


def _store_answer(kind: str, place: tuple[str, str], spec: dict[str, Any], *, hosts: _Hosts) -> None:
    """Store the answer of a line, with the further hops of lines that redirect."""
    status = int(hosts.rng.choice([301, 302, 303, 307, 308]))
    if kind == "redirect_ok":
        target_host, target = hosts.place(BASE.name, "jpg")
        hosts.answer(target_host, target, spec)
        hosts.answer(*place, {"status": status, "location": f"http://{target_host}{target}"})
    elif kind == "redirect_private":
        hosts.answer(*place, {"status": status, "location": spec["location"]})
    elif kind == "redirect_loop":
        other_host, other = hosts.place(BASE.name, "jpg")
        hosts.answer(*place, {"status": status, "location": f"http://{other_host}{other}"})
        hosts.answer(other_host, other, {"status": status, "location": f"http://{place[0]}{place[1]}"})
    else:
        hosts.answer(*place, spec)
