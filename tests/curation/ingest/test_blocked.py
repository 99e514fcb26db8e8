import random
import re
import time

import pytest

from curation.ingest.address import canonical_url, parse_address
from curation.ingest.blocked import Blocked, read_block_lists, read_entries
from training.config import ConfigError


def read(tmp_path, text, name="list.txt"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_block_lists("screen.block_list_files", [str(tmp_path / name)])


def reason(blocked: Blocked, url: str):
    host, canonical = parse_address(url).host, canonical_url(url)
    if blocked.names_host(host):
        return "blocked_host"
    by_path = blocked.asks_path(host) and blocked.names_path(host, canonical)
    return "blocked_url" if by_path or (blocked.has_parts and blocked.names_part(canonical)) else None


LIST = """\ufeff# a comment
bad.test
*.worse.test  # and all below
.dotted.test#comment
b\u00fccher.example
2001:DB8::1

HTTPS://One.test:443/%7euser/
http://port.test:8080
shared.test/ads/
*.github.io/tracker/
/banner/
/a?id=
0.0.0.0 hosts.test\tmore.test # both
::1 six.test
0.0.0.0 blogspot.com
127.0.0.1 localhost
"""
NAMED = {
    "http://bad.test/": "blocked_host",
    "http://a.bad.test:81/x": "blocked_host",
    "http://notbad.test/": None,
    "http://worse.test/": "blocked_host",
    "http://x.dotted.test/": "blocked_host",
    "http://a.xn--bcher-kva.example/": "blocked_host",
    "http://[2001:db8::1]/x": "blocked_host",
    "https://one.test/~user/x": "blocked_url",
    "https://me:pw@one.test/~user/x": "blocked_url",
    "https://one.test/~users": None,
    "http://one.test/~user/x": None,
    "https://a.one.test/~user/x": None,
    "http://port.test:8080/x": "blocked_url",
    "http://port.test/x": None,
    "http://port.test.evil.test:8080/x": None,
    "https://cdn.shared.test:81/ads/x": "blocked_url",
    "http://shared.test/./ads/?x": "blocked_url",
    "http://shared.test/ad": None,
    "http://a.test/?u=shared.test/ads/": None,
    "http://me.github.io/tracker/x": "blocked_url",
    "http://me.github.io/x": None,
    "http://a.test/x/banner/y": "blocked_url",
    "http://a.test/?/banner/": "blocked_url",
    "http://a.test/b/a?id=3": "blocked_url",
    "http://x.hosts.test/": "blocked_host",
    "http://more.test/": "blocked_host",
    "http://six.test/": "blocked_host",
    "http://blogspot.com/": "blocked_host",
    "http://somebody.blogspot.com/": None,
    "http://localhost/": "blocked_host",
}


def test_what_a_list_names(tmp_path):
    blocked = read(tmp_path, LIST)
    assert {url: reason(blocked, url) for url in NAMED} == NAMED


def test_a_recipe_writes_the_same(tmp_path):
    hosts = read_entries("screen.blocked_hosts", ["Bad.test", " *.worse.test", ".dotted.test"], is_host=True)
    urls = ["HTTPS://One.test:443/%7euser/", "shared.test/ads/", "/banner/", "-ad.", "img/ads/"]
    urls_of_recipe = read_entries("screen.blocked_urls", urls, is_host=False)
    assert set(hosts.entries) < set(read(tmp_path, LIST).entries)
    kinds = {entry.value: entry.kind for entry in urls_of_recipe.entries}
    assert kinds == {
        "https://one.test/~user/": "address",
        "shared.test/ads/": "path",
        "/banner/": "part",
        "-ad.": "part",
        "img/ads/": "part",  # img is no host: it has no dot
    }


def test_paths_order_and_comments_are_of_no_matter(tmp_path):
    first, second = read(tmp_path, "a.test\nb.test # x\n", "1"), read(tmp_path, "*.B.test\n#\na.test\na.test\n", "2")
    assert first.digest == second.digest != read(tmp_path, "a.test\n", "3").digest


def test_comments_behind_rules(tmp_path):
    plain = read(tmp_path, "a.test\nb.test/x/\nhttps://c.test/\n/ad/\n0.0.0.0 d.test\n", "1")
    told = (
        "a.test#x ## y\nb.test/x/ # https://a/#b\nhttps://c.test/\t#/x\n/ad/ ##\n0.0.0.0 d.test#http://x/#y\n #\n#/z#\n"
    )
    assert read(tmp_path, f"{told} #\n#/z#\n", "2").entries == plain.entries


@pytest.mark.parametrize("name", ["co.uk", "github.io", "com", "ck", "GitHub.io.", "github.io/x", "公司.cn"])
def test_a_bare_public_suffix_is_an_error(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"list\.txt line 2: got '{re.escape(name)}': a public suffix, below which"):
        read(tmp_path, f"a.test\n{name}\n")
    assert len(read(tmp_path, f"*.{name}\n.{name}\n").entries) == 1
    if "/" not in name:
        plain = "xn--55qx5d.cn" if name == "公司.cn" else name.lower().strip(".")
        with pytest.raises(ConfigError, match=rf"^screen\.blocked_hosts: got .*\*\.{re.escape(plain)} names them all"):
            read_entries("screen.blocked_hosts", [name], is_host=True)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("||ads.example^", "no host; allowed are HOST or DOMAIN,"),
        ("@@||ads.example^", "no host; allowed are"),
        ("! Title: a list", "rules for browsers .adblock. are not read"),
        ("[Adblock Plus 2.0]", "rules for browsers"),
        ("ads.example##.banner", "no host"),
        ("ads.example#@#.banner", "no host"),
        ("ads.example^$third-party", "no host"),
        ("/banner\\d+/", "no address has such a part in its canonical spelling"),
        ("/ads/*", "no address has such a part"),
        ("/(ads|banner)/", "no address has such a part"),
        ("/b\u00fccher/", "no address has such a part"),
        ("address=/ads.example/0.0.0.0", "no host"),
        ("ads.example CNAME .", "allowed are"),
        ("0.0.0.0 ads.example/x", "no host"),
        ("ads.example,tracker", "no host"),
        ("ads.example:8080", r"no host \(with a port: only in an address with its scheme\)"),
        ("*ads.example", "no host"),
        ("ads.*.example", "no host"),
        ("ads.example/x/*", r"\* is no wildcard in a path"),
        ("https://*.example/x", r"\* is no wildcard here"),
        ("http://:80/", "no host"),
        ("http://a.test:x/", "no address: "),
        ("10.0.0.0/8", "networks are not read here"),
        ("2001:db8::/32", "networks are not read here"),
        ("/", "every address has such a part"),
        ("//", "every address has such a part"),
        (".", "no host"),
        (
            "https://ipfs.io/#/abc",
            r"no rule can name a fragment \(#…\), no server is told it; a comment has",
        ),
        ("https://ipfs.io/##x", "no rule can name a fragment"),
        ("https://ipfs.io#x", "no rule can name a fragment"),
        ("ipfs.io/#/abc # a comment", "no rule can name a fragment"),
        ("/ads/#top", "no rule can name a fragment"),
    ],
)
def test_other_syntax_is_an_error_that_names_the_line(tmp_path, line, why):
    with pytest.raises(ConfigError, match=why) as caught:
        read(tmp_path, f"# head\nfine.example\n{line}\n")
    assert str(caught.value).startswith(f"screen.block_list_files: {tmp_path}/list.txt line 3: got {line!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "why"),
    [
        ("screen.blocked_hosts", "http://a.test/", "no host; give hosts or domains, without scheme, port and path"),
        ("screen.blocked_hosts", "a.test/x", "no host; give hosts"),
        ("screen.blocked_hosts", "", "no host"),
        ("screen.blocked_urls", "", "every address has such a part"),
        ("screen.blocked_urls", "://", "every address has such a part"),
        ("screen.blocked_urls", "https://ipfs.io/#/abc", "no rule can name a fragment"),
        ("screen.blocked_urls", "a b", "no address has such a part"),
    ],
)
def test_a_rule_of_a_recipe_that_is_none(key, text, why):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: got {text!r}: {why}"):
        read_entries(key, [text], is_host=key.endswith("hosts"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"screen\.block_list_files: 'gone\.txt': No such file"):
        read_block_lists("screen.block_list_files", ["gone.txt"])
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"x': not UTF-8 text; give text files"):
        read_block_lists("screen.block_list_files", [str(tmp_path / "x")])


def test_long_lists_against_a_search_one_by_one(tmp_path):
    """5,000 rules of each kind; and an address costs little, whatever their number."""
    draw = random.Random(0)

    def word(most):
        return "".join(draw.choice("abcd") for _ in range(draw.randint(1, most)))

    hosts = {f"{word(6)}.{word(3)}.test" for _ in range(5000)}
    parts = {f"/{word(7)}/{word(4)}" for _ in range(5000)}
    prefixes = {f"http://{word(3)}.test/{word(6)}" for _ in range(5000)}
    paths = {f"{word(3)}.test/{word(6)}" for _ in range(5000)}
    blocked = read(tmp_path, "\n".join([*hosts, *parts, *prefixes, *paths]))
    urls = [f"http://{word(4)}.{word(3)}.test/{word(7)}/{word(3)}/{word(5)}" for _ in range(300)]
    urls += [f"https://{word(3)}.test/{word(8)}" for _ in range(300)]
    found = [reason(blocked, url) for url in urls]
    for url, one in zip(urls, found, strict=True):
        host, _, path = url.partition("://")[2].partition("/")
        above = [host, host.partition(".")[2]]
        if any(name in hosts for name in above):
            assert one == "blocked_host"
            continue
        begins = any(url.startswith(prefix) for prefix in prefixes)
        below = any(f"{name}/{path}".startswith(start) for name in above for start in paths)
        assert one == ("blocked_url" if begins or below or any(part in url for part in parts) else None)
    assert {None, "blocked_host", "blocked_url"} == set(found)
    started = time.process_time()
    for url in urls:
        blocked.names_part(url)
    assert (time.process_time() - started) / len(urls) < 50e-6  # 300 to 400 with a search for each part
