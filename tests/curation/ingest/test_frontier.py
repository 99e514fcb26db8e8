"""The order of a crawl, without a network: breadth first, the same whoever stops and goes on, never past its caps."""

import random

import pytest

from curation.ingest.frontier import BAD_URL, SAME_PAGE, Frontier, Limits, Visit

SEEDS = ["http://a.test/", "http://b.test/x", "http://a.test:80/#top", "no address", "ftp://a.test/f"]


def limits(depth=2, max_pages=1000, max_pages_per_host=1000):
    return Limits(depth=depth, max_pages=max_pages, max_pages_per_host=max_pages_per_host)


def web(number, num_pages=60, num_links=4):
    """Links of each page of a small web, drawn with a seed."""
    draw = random.Random(number)
    pages = [f"http://h{n % 5}.test/{n}" for n in range(num_pages)]
    return {page: draw.sample(pages, num_links) for page in pages}


def crawl(frontier, links, *, stop_after=None, in_part=7, failing=()):
    """Visits of a crawl, in order; it is killed after a number of parts."""
    visits = []
    while (candidates := frontier.next(in_part)) and stop_after != 0:
        for candidate in candidates:
            reason = candidate.reason or ("timeout" if candidate.url in failing else None)
            visits.append(
                Visit(
                    page=frontier.num_visits,
                    **{key: value for key, value in candidate._asdict().items() if key != "reason"},
                    reason=reason,
                    final_url=None if reason else candidate.url,
                    links=() if reason else links.get(candidate.url, ()),
                )
            )
            frontier.visited(visits[-1])
        stop_after = stop_after and stop_after - 1
    return visits


def test_pages_that_are_named_come_first_each_with_a_row():
    visits = crawl(Frontier(SEEDS, limits()), {"http://a.test/": ["http://a.test/1"], "http://b.test/x": []})
    assert [(visit.url, visit.depth, visit.seed, visit.parent, visit.reason) for visit in visits] == [
        ("http://a.test/", 0, 0, None, None),
        ("http://b.test/x", 0, 1, None, None),
        ("http://a.test/", 0, 2, None, SAME_PAGE),
        ("no address", 0, 3, None, BAD_URL),
        ("ftp://a.test/f", 0, 4, None, BAD_URL),
        ("http://a.test/1", 1, 0, 0, None),
    ]


def test_breadth_first_in_the_order_of_pages_and_links():
    links = {"http://s/": ["http://s/b", "http://s/a"], "http://s/b": ["http://s/c"], "http://s/a": ["http://s/"]}
    links["http://s/c"] = ["http://s/d"]
    assert [v.url[9:] for v in crawl(Frontier(["http://s/"], limits(depth=2)), links)] == ["", "b", "a", "c"]
    assert [v.url[9:] for v in crawl(Frontier(["http://s/"], limits(depth=0)), links)] == [""]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_crawl_that_was_killed_goes_on_as_one_that_was_not(number, stop_after):
    links, seeds = web(number), [f"http://h{n}.test/{n}" for n in range(3)]
    asked = limits(depth=3, max_pages=40, max_pages_per_host=9)
    whole = crawl(Frontier(seeds, asked), links)
    begun = crawl(Frontier(seeds, asked), links, stop_after=stop_after)
    assert begun + crawl(Frontier(seeds, asked, begun), links) == whole
    assert Frontier(seeds, asked, whole).next(1) == []


@pytest.mark.parametrize(
    ("narrow", "wider"),
    [
        ({"depth": 1}, {"depth": 3}),
        ({"depth": 3, "max_pages": 10}, {"max_pages": 30}),
        ({"depth": 3, "max_pages_per_host": 2}, {"max_pages_per_host": 6}),
        ({"depth": 1, "max_pages": 4, "max_pages_per_host": 1}, {"depth": 3, "max_pages": 40, "max_pages_per_host": 5}),
    ],
)
def test_wider_limits_add_behind(narrow, wider):
    links, seeds = web(1), ["http://h0.test/0"]
    before = crawl(Frontier(seeds, limits(**narrow)), links)
    more = crawl(Frontier(seeds, limits(**{**narrow, **wider}), before), links)
    assert before
    assert more
    assert not {visit.url for visit in before} & {visit.url for visit in more}
    assert [visit.page for visit in before + more] == list(range(len(before) + len(more)))


def test_a_longer_list_adds_behind():
    links = web(2)
    before = crawl(Frontier(["http://h0.test/0"], limits(depth=1)), links)
    more = crawl(Frontier(["http://h0.test/0", "http://h3.test/33"], limits(depth=1), before), links)
    assert [visit.depth for visit in more][:2] == [0, 1]
    assert {visit.seed for visit in more} == {1}
    assert not {visit.url for visit in before} & {visit.url for visit in more}


def test_caps_hold_and_are_told():
    endless = {f"http://a.test/{n}": [f"http://a.test/{n + 1}", f"http://c{n}.a.test/"] for n in range(10_000)}
    frontier = Frontier(["http://a.test/0"], limits(depth=5000, max_pages=50, max_pages_per_host=20))
    visits = crawl(frontier, endless)
    assert sum("//a.test/" in visit.url for visit in visits) == 20
    assert len(visits) == 40
    assert frontier.cut_hosts == {"a.test"}
    assert not frontier.is_cut
    frontier = Frontier(["http://a.test/0"], limits(depth=5000, max_pages=10))
    assert len(crawl(frontier, endless)) == 10
    assert frontier.is_cut
    frontier = Frontier([f"http://a.test/{n}" for n in range(30)], limits(max_pages=20, max_pages_per_host=1))
    assert len(crawl(frontier, endless)) == 20  # pages that are named are meant
    assert frontier.num_seeds_left == 10


def test_narrower_limits_visit_nothing_and_take_nothing_back():
    links = web(3)
    visits = crawl(Frontier(["http://h0.test/0"], limits()), links)
    assert Frontier(["http://h0.test/0"], limits(max_pages=3), visits).next(9) == []
    assert Frontier(["http://h0.test/0"], limits(depth=0), visits).next(9) == []


def test_failures_are_visited_again_where_asked_for_and_lead_on():
    links, seeds = {"http://a.test/": ["http://a.test/1"], "http://a.test/1": ["http://a.test/2"]}, ["http://a.test/"]
    before = crawl(Frontier(seeds, limits(depth=5)), links, failing={"http://a.test/1"})
    assert [visit.reason for visit in before] == [None, "timeout"]
    assert Frontier(seeds, limits(depth=5), before).next(9) == []
    assert Frontier(seeds, limits(depth=5), before, frozenset(["dns"])).next(9) == []
    more = crawl(Frontier(seeds, limits(depth=5), before, frozenset(["timeout"])), links)
    assert [(v.page, v.url, v.depth, v.parent) for v in more] == [
        (2, "http://a.test/1", 1, 0),
        (3, "http://a.test/2", 2, 2),
    ]
    assert Frontier(seeds, limits(depth=5), before + more, frozenset(["timeout"])).next(9) == []
