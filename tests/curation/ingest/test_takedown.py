import hashlib
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.ingest.fetch import FetchConfig, FetchStage
from curation.ingest.takedown import Rule, Rules, from_table, merged, read_rules, rule_of, to_table
from curation.schema import TABLES
from training.config import ConfigError

SHA256, PHASH, PDQ = "ab" * 32, "00ff00ff00ff00ff", "0f" * 32


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("HTTP://A.test:80/x/../p.jpg#top", "url", "http://a.test/p.jpg"),
        ("https://a.test/p.jpg?Q=1", "url", "https://a.test/p.jpg?Q=1"),
        (SHA256.upper(), "sha256", SHA256),
        (PHASH.upper(), "phash", PHASH),
    ],
)
def test_the_kind_is_told_from_the_text(text, kind, value):
    rule = rule_of(f" {text}\n")
    assert (rule.kind, rule.value, rule.applied) == (kind, value, False)
    assert rule.radius_bits == (4 if kind == "phash" else None)


def test_a_pdq_is_one_only_where_it_is_called_one(tmp_path):
    rule = rule_of(PDQ.upper(), kind="pdq")
    assert (rule.kind, rule.value, rule.radius_bits) == ("pdq", PDQ, 31)
    assert rule_of(PDQ, kind="pdq", radius_bits=0).radius_bits == 0
    assert rule_of(PDQ).kind == "sha256"
    table = tmp_path / "list.csv"
    table.write_text(f"pdq,quality,reason\n{PDQ},100,known\n")
    (rule,) = read_rules([str(table)])
    assert (rule.key, rule.radius_bits, rule.reason) == (("pdq", PDQ), 31, "known")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "p.jpg",
            {},
            r"'p.jpg' is no http address, no sha256 \(64 hex digits\), no pHash \(16 hex digits\) and, with kind pdq,",
        ),
        ("ftp://a.test/p.jpg", {}, "is no http address"),
        ("ftp://a.test/p.jpg", {"kind": "url"}, r"is no url: an address begins with http:// or https://"),
        (PHASH, {"kind": "sha256"}, "is no sha256: a sha256 has 64 hex digits"),
        (PHASH, {"radius_bits": 17}, "a radius of 17 bits; allowed: 0 to 16 of a phash"),
        (PDQ, {"kind": "pdq", "radius_bits": 65}, "a radius of 65 bits; allowed: 0 to 64 of a pdq"),
        (PHASH, {"kind": "pdq"}, "is no pdq: a PDQ has 64 hex digits, as `lvd explain` prints"),
        (SHA256, {"kind": "md5"}, "kind 'md5' is not known; allowed: url, sha256, phash, pdq"),
    ],
)
def test_what_is_no_rule_says_why(text, options, message):
    with pytest.raises(ValueError, match=message):
        rule_of(text, **options)


def test_lists(tmp_path):
    text = tmp_path / "list.txt"
    text.write_text(f"\ufeff# by mail\n\nhttp://a.test/1\n{SHA256}\nhttp://A.test/1\n")
    table = tmp_path / "list.csv"
    table.write_text(f"phash,radius_bits,reason\n{PHASH},2,logo\n{PHASH[::-1]},,\n")
    found = read_rules([str(text), str(table), "http://b.test/2"], radius_bits=1, reason="asked for")
    assert [(rule.kind, rule.value, rule.radius_bits, rule.reason) for rule in found] == [
        ("url", "http://a.test/1", None, "asked for"),
        ("sha256", SHA256, None, "asked for"),
        ("phash", PHASH, 2, "logo"),
        ("phash", PHASH[::-1], 1, "asked for"),
        ("url", "http://b.test/2", None, "asked for"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "http://a.test/1\nnonsense\n", r"l\.txt line 2: 'nonsense' is no http address"),
        ("l.csv", f"value,kind\n{PHASH},url\n", r"l\.csv line 2: '00ff00ff00ff00ff' is no url: no scheme"),
        ("l.csv", f"phash,radius_bits\n{PHASH},two\n", r"l\.csv line 2: radius_bits is 'two'; allowed: 0 to 16"),
        ("l.csv", "address\nhttp://a.test/1\n", r"line 1: columns are address; a list in csv has exactly one of the"),
        ("l.txt", "# nothing\n", "holds no entry"),
        ("l.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        read_rules([str(path)])
    assert "\n" not in str(error.value)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"takedown list '.*gone.txt' is not there"):
        read_rules([str(tmp_path / "gone.txt")])
    with pytest.raises(ConfigError, match="takedown: 'nonsense' is no http address"):
        read_rules(["nonsense"])


def test_the_table_holds_a_rule_once_and_a_wider_radius_replaces_a_smaller_one():
    old = [Rule(kind="phash", value=PHASH, radius_bits=2, added_at=datetime(2024, 1, 1, tzinfo=UTC), applied=True)]
    assert merged(old, [rule_of(PHASH, radius_bits=1)]) == old
    (wider,) = merged(old, [rule_of(PHASH, radius_bits=3)])
    assert (wider.radius_bits, wider.applied) == (3, False)
    assert wider.added_at is not None
    rules = merged(old, [rule_of("http://a.test/1", reason="by mail"), rule_of(SHA256)])
    table = to_table(rules)
    assert table.schema.equals(TABLES["takedowns"].schema)
    assert [rule.key for rule in from_table(table)] == [
        ("phash", PHASH),
        ("url", "http://a.test/1"),
        ("sha256", SHA256),
    ]


def test_matching():
    rules = Rules([rule_of("http://a.test/%7Ex"), rule_of(SHA256), rule_of(PHASH, radius_bits=1)])
    assert rules.url("HTTP://a.test:80/~x#y")
    assert not rules.url("http://a.test/~x?y")
    assert not rules.url(None)
    assert not rules.url("nonsense")
    assert rules.hosts == {"a.test"}
    assert (rules.sha256(SHA256), rules.sha256("cd" * 32), rules.sha256(None)) == (True, False, False)
    none = Rules([])
    assert not none.url("http://a.test/")
    assert not none.has_hashes
    assert none.phash([1, 2]).tolist() == [False, False]
    assert none.pdq([PDQ, None], [100, None]).tolist() == [False, False]


def flipped(pdq: str, num_bits: int) -> str:
    """A PDQ that differs in its last bits."""
    return f"{int(pdq, 16) ^ ((1 << num_bits) - 1):064x}"


def test_pdqs_within_the_radius_of_one_that_is_named_if_they_tell_something():
    rules = Rules([rule_of(PDQ, kind="pdq"), rule_of("f0" * 32, kind="pdq", radius_bits=2)])
    assert rules.has_hashes
    hashes = [PDQ, flipped(PDQ, 31), flipped(PDQ, 32), flipped("f0" * 32, 2), flipped("f0" * 32, 3), None]
    assert rules.pdq(hashes, [50] * 6).tolist() == [True, True, False, True, False, False]
    assert rules.pdq(hashes, [49, 49, 0, 49, 49, None]).tolist() == [True, False, False, False, False, False]
    row = {"phash": 1, "pdq": flipped(PDQ, 9), "pdq_quality": 80}
    assert rules.looks_like(row)
    assert not rules.looks_like({**row, "pdq": flipped(PDQ, 40)})
    assert Rules([rule_of(f"{1:016x}")]).looks_like({**row, "pdq": None, "pdq_quality": None})


@given(
    codes=st.lists(st.integers(0, 2**64 - 1), max_size=8),
    named=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 16)), max_size=4),
    flips=st.lists(st.integers(0, 63), max_size=6),
)
def test_hashes_within_the_radius_of_one_that_is_named(codes, named, flips):
    if named:  # one that is near
        near = named[0][0]
        for bit in flips:
            near ^= 1 << bit
        codes = [*codes, near]
    rules = Rules([Rule(kind="phash", value=f"{code:016x}", radius_bits=radius) for code, radius in named])
    expected = [any((code ^ other).bit_count() <= radius for other, radius in named) for code in codes]
    assert rules.phash(np.array(codes, np.uint64)).tolist() == expected


# Fetch


def put_urls(io, urls):
    rows = [
        {"image_id": n, "source": "s", "url": url, "host": url.split("/")[2], "line": n} for n, url in enumerate(urls)
    ]
    io.tables["urls", 0] = pa.Table.from_pylist(rows, schema=TABLES["urls"].schema)
    io.ask_for(range(len(urls)))


def test_fetch_asks_for_no_address_and_stores_no_bytes_of_the_list(memory_io, web, make_picture, fast_config):
    bad, good = make_picture((1, 2, 3)), make_picture((200, 2, 3))
    web.reply("a.test", "/named", bad)
    web.reply("b.test", "/same-bytes", bad)
    web.reply("b.test", "/good", good)
    web.reply("c.test", "/leads-there", status=302, headers={"Location": "http://a.test/named"})
    put_urls(
        memory_io,
        ["http://A.test/named#x", "http://b.test/same-bytes", "http://b.test/good", "http://c.test/leads-there"],
    )
    rules = [rule_of("http://a.test/named"), rule_of(hashlib.sha256(bad).hexdigest())]
    memory_io.tables["takedowns", 0] = to_table(rules)
    out = FetchStage(fast_config()).run(0, memory_io)
    images = out["images"].to_pylist()
    assert [image["reason"] for image in images] == ["taken_down", "taken_down", None, "taken_down"]
    assert [image["sha256"] for image in images] == [None, None, hashlib.sha256(good).hexdigest(), None]
    assert web.asked("/named") == 0
    assert all(bad not in data for data in memory_io.objects.values())
    assert images[0] == dict.fromkeys(images[0]) | {
        "image_id": 0, "ok": False, "reason": "taken_down", "transient": False
    }  # fmt: skip
    assert (images[1]["http_status"], images[1]["format"], images[1]["object"]) == (200, None, None)


def test_local_bytes_of_the_list_are_not_stored(memory_io, tmp_path, make_picture):
    (tmp_path / "a.png").write_bytes(make_picture((1, 2, 3)))
    (tmp_path / "b.png").write_bytes(make_picture((3, 2, 1)))
    rows = [{"image_id": n, "source": "s", "location": name} for n, name in enumerate(("a.png", "b.png"))]
    memory_io.tables["urls", 0] = pa.Table.from_pylist(rows, schema=TABLES["urls"].schema)
    memory_io.ask_for([0, 1])
    memory_io.tables["takedowns", 0] = to_table([rule_of(hashlib.sha256(make_picture((1, 2, 3))).hexdigest())])
    config = FetchConfig(locations={"s": str(tmp_path)}, kinds={"s": "folder"})
    images = FetchStage(config).run(0, memory_io)["images"].to_pylist()
    assert [(image["ok"], image["reason"]) for image in images] == [(False, "taken_down"), (True, None)]
