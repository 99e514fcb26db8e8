import datetime
from typing import Any

import pytest

from curation.export.export import ExportConfig
from pipelines.report.explain import explain
from training.config import ConfigError

FIRST, SECOND = 3_000_000_000_000, 3_000_001_000_000


@pytest.fixture
def connection(small_run: Any) -> Any:
    small_run.export(ExportConfig(samples_per_tar=4))
    return small_run.connect()


def test_life_of_a_chosen_picture(connection: Any):
    text = explain(connection, str(FIRST))
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == f"image {FIRST}"
    for stage in ("screened", "fetched", "safety", "near", "duplicates", "leakage", "semantic", "selection"):
        assert any(line.split() == [stage, "kept"] for line in lines)
    at = lines.index("it stands for 1 near copy:")
    assert lines[at + 1] == f"image {FIRST + 4}  http://h0.test/web/{FIRST + 4}.jpg"
    query = "by query image 2000000000000  http://h0.test/dogs/2000000000000.jpg, similarity 0.5000"
    assert f"asked for   for dogs, rank 0, {query}" in lines
    assert f"for the set dogs, {query}" in lines
    assert "cluster     0, which holds 3 pictures of the pool, similarity 0.7500 to its centroid" in lines
    assert "seen        1 face (blurred)" in lines
    assert "tars/00000000" in text
    assert "faces blurred" in text
    assert lines[-1].split(maxsplit=1) == ["end", "in the set"]


def test_life_of_dropped_pictures(connection: Any):
    near = explain(connection, str(FIRST + 4))
    assert "dropped: near_duplicate" in near
    assert f"image {FIRST} stands for it  http://h0.test/web/{FIRST}.jpg" in near
    copy = explain(connection, str(FIRST + 5))
    assert "dropped: copy  (score 0.7, threshold 0.6)" in copy
    leak = explain(connection, str(SECOND + 1))
    assert "most like image 1 of benchmark bench  http://h1.test/bench/1.jpg" in leak
    assert leak.splitlines()[-1].split() == ["end", "leakage/leak"]
    assert f"image {FIRST} has this address first" in explain(connection, str(SECOND + 4))
    assert "http_4xx, status 404" in explain(connection, str(FIRST + 2))
    assert "no query set asked for it" in explain(connection, str(SECOND + 2))


def test_a_leak_tells_the_reference_and_what_joins_the_two(small_run: Any):
    small_run.match_a_test_picture()
    small_run.change("leaks", 1_000_000, 1, via_id=FIRST + 5)
    connection = small_run.connect()
    through = explain(connection, str(SECOND + 1))
    via = f"joined by image {FIRST + 5} of its component  http://h1.test/bench/1.jpg"
    assert f"most like image 1 of benchmark bench, {via}" in through
    matched = explain(connection, "1000000000000")
    assert "dropped: test_match" in matched
    assert "most like image 0 of benchmark bench  http://h0.test/bench/0.jpg" in matched
    assert matched.splitlines()[-1].split() == ["end", "selection/test_match"]


def test_what_means_the_same_names_who_stays(small_run: Any):
    small_run.mean_the_same()
    connection = small_run.connect()
    gone = explain(connection, str(SECOND + 5))
    assert "dropped: semantic_duplicate  (score 0.9375, threshold 0.875)" in gone
    assert f"too like image {SECOND + 3} of its cluster, which goes for another" in gone
    assert f"image {SECOND} of its cluster stays for it  http://h0.test/web/{SECOND}.jpg" in gone
    assert gone.splitlines()[-1].split() == ["end", "semantic/semantic_duplicate"]
    stays = explain(connection, str(SECOND))
    assert "it stays for 2 pictures of its cluster:" in stays
    assert "too like" not in stays


def test_what_a_picture_was_compared_with(small_run: Any):
    a, b, c, d = FIRST, FIRST + 5, SECOND, SECOND + 3
    component = {"component_id": a, "representative_id": c}
    small_run.change("duplicates", 3_000_000, 0, **component)
    small_run.change("duplicates", 3_000_000, 1, **component)
    small_run.change("duplicates", 3_000_001, 0, **component)
    edges = [(a, b, 0.25, True), (b, c, 0.875, None), (b, d, 0.75, False)]
    small_run.write("edges", 0, [{"a": x, "b": y, "similarity": s, "verified": v} for x, y, s, v in edges])
    small_run.write(
        "near_groups", 0, [{"image_id": FIRST + 4, "representative_id": a, "exact": False, "distance_bits": 2}]
    )
    small_run.write(
        "reference_edges", 0, [{"image_id": SECOND + 1, "reference_id": n, "similarity": 0.5} for n in (0, 1)]
    )
    connection = small_run.connect()
    lines = [line.strip() for line in explain(connection, str(b)).splitlines()]
    at = lines.index("duplicates  dropped: copy  (score 0.7, threshold 0.6)")
    assert lines[at + 1 : at + 6] == [
        f"image {c} stands for it, similarity 0.8750  http://h0.test/web/{c}.jpg",
        "others of its component of 3 pictures:",
        f"image {a}, similarity 0.2500, local features agree  http://h0.test/web/{a}.jpg",
        "like it, but no copies:",
        f"image {d}, similarity 0.7500, local features differ  http://h1.test/web/{d}.jpg",
    ]
    assert f"image {c}, joined by others" in explain(
        connection, str(a)
    ) or "stands for it, joined by others" in explain(connection, str(a))
    assert f"image {a} stands for it, 2 bits apart" in explain(connection, str(FIRST + 4))
    assert f"image {FIRST + 4}, 2 bits apart" in explain(connection, str(a))
    leak = explain(connection, str(SECOND + 1))
    assert "image 0, similarity 0.5000  http://h0.test/bench/0.jpg" in leak
    assert leak.count("bench/1.jpg") == 1


def test_what_queries_asked_for(small_run: Any, connection: Any):
    asked = [line.strip() for line in explain(connection, "2000000000000").splitlines()]
    assert "asks for    the 4 pictures nearest to it: 4 retrieved, 4 of them in the set, 4 by this query" in asked
    assert f"rank 0, similarity 0.5000, image {FIRST}, in the set for dogs  http://h0.test/web/{FIRST}.jpg" in asked
    assert not any(line.startswith("selection") for line in asked)
    small_run.change("queries", 2_000_000, 0, mode="cluster")
    rows = [(FIRST, 0), (SECOND, 1), (SECOND + 3, -1)]
    small_run.write(
        "neighbours",
        2_000_000,
        [{"query_set": "dogs", "image_id": i, "rank": r, "similarity": 0.25, "cluster": 1} for i, r in rows],
    )
    connection = small_run.connect()
    text = explain(connection, "2000000000000")
    assert "asks for    2 pictures of cluster 1, which holds 1 picture of its set" in text
    text = explain(connection, str(SECOND + 3))
    assert "asked for   for dogs, cut by the cap, similarity 0.2500 to its centroid" in text


def test_a_picture_that_was_taken_twice_tells_both(small_run: Any):
    small_run.export(ExportConfig(samples_per_tar=4))
    small_run.take_twice()
    small_run.write("queries", 2_000_000, [*small_run.read("queries", 2_000_000), {"query_id": 2_000_000_000_001,
        "query_set": "dogs", "mode": "sample", "k": 4, "cluster": 1}])  # fmt: skip
    connection = small_run.connect()
    text = explain(connection, str(SECOND))
    at = text.index("for the set dogs, by query image 2000000000000 ")
    assert "for the set dogs, by query image 2000000000001 " in text[at:]
    assert text.count("tars/00000000") == 2
    for query, num in ((2_000_000_000_000, 4), (2_000_000_000_001, 1)):
        assert f"{num} retrieved, {num} of them in the set, {num} by this query" in explain(connection, str(query))


def test_visits_and_redirects(small_run: Any):
    visit = {"image_id": FIRST, "attempt": 1, "http_status": 302, "outcome": "redirect", "url": "http://h0.test/a"}
    at = datetime.datetime(2024, 2, 28, 12, 30, tzinfo=datetime.UTC)
    last = {**visit, "http_status": 200, "outcome": "ok", "url": "http://h1.test/b", "started_at": at}
    small_run.write("fetch_log", 3_000_000, [{**visit, "started_at": at - datetime.timedelta(minutes=1)}, last])
    small_run.change("images", 3_000_000, 0, final_url="http://h1.test/b", robots="allowed")
    text = explain(small_run.connect(), str(FIRST))
    assert "visits      2024-02-28 12:29 http://h0.test/a redirect, status 302" in text
    assert "2024-02-28 12:30 http://h1.test/b ok, status 200" in text
    assert "final url   http://h1.test/b" in text


def test_a_picture_that_was_taken_down(small_run: Any):
    small_run.change("fetched", 3_000_000, 1, reason="taken_down")
    rule = {"kind": "url", "value": f"http://h0.test/web/{FIRST + 2}.jpg", "reason": "by mail", "applied": True}
    small_run.write("takedowns", 0, [rule])
    text = explain(small_run.connect(), str(FIRST + 2))
    assert "dropped: taken_down" in text
    assert "its address is on the takedown list: by mail" in text
    small_run.write("takedowns", 0, [])
    assert "its bytes, or where it leads, are on the takedown list" in explain(small_run.connect(), str(FIRST + 2))


def test_references_and_as_is_pictures(connection: Any):
    assert "a reference" in explain(connection, "0")
    assert "for the set flowers" in explain(connection, "1000000000000")


def test_by_address(connection: Any):
    life = explain(connection, str(FIRST))
    assert explain(connection, f"http://h0.test/web/{FIRST}.jpg") == life
    assert explain(connection, f"HTTP://H0.test:80/x/../web/{FIRST}.jpg#top") == life


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (f"http://elsewhere.test/{FIRST}.jpg", f"the most alike are http://h0.test/web/{FIRST}.jpg,"),
        (f"http://h0.test/wep/{FIRST}.jpeg", f"the most alike are http://h0.test/web/{FIRST}.jpg,"),
        ("http://h0.test/?", "it has 10 other addresses of host h0.test,"),
        ("http://[/x", "give an image_id or an address as the list has it,"),
        ("77", "its ids are bench 0 to 1, flowers 1000000000000 to 1000000000002, dogs"),
    ],
)
def test_an_unknown_picture_names_those_most_alike(connection: Any, name: str, hint: str):
    with pytest.raises(ConfigError) as error:
        explain(connection, name)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["12345", "http://nowhere.test/", "9" * 40, ""])
def test_unknown_pictures_are_told_so(connection: Any, name: str):
    with pytest.raises(ConfigError, match="is not in this run"):
        explain(connection, name)
