import asyncio
import time

import pyarrow as pa
import pytest

from curation.ingest.breaker import Breaker, Reached
from curation.ingest.fetch import FetchConfig, FetchStage
from curation.ingest.resolver import LookupFailedError, Resolver
from curation.schema import TABLES, image_ids
from curation.stage import OutageError


def count(breaker, rows, *, are_all=True):
    """Rows as (host, failure class or None), of a shard or its beginning; the breaker judges each as it comes."""

    async def run():
        for number, (host, reason) in enumerate(rows):
            await breaker.count(number, host, reason)
        if are_all:
            await breaker.end()

    asyncio.run(run())


def make(*, there, known=(), **values):
    probed = []

    async def is_there(host, port):
        probed.append(host)
        return there.pop(0) if isinstance(there, list) else there

    reached = Reached()
    for host in known:
        reached.answered(host, 80)

    async def build():
        return Breaker(FetchConfig(breaker_patience_s=0.0, **values), reached, is_there)

    return asyncio.run(build()), probed


KNOWN = ("k1.example", "k2.example", "k3.example", "k4.example")


def test_a_list_of_dead_hosts_stands_while_known_ones_are_there():
    breaker, probed = make(there=True, known=KNOWN, breaker_hosts=10)
    count(breaker, [(f"h{n}.example", "dns" if n % 10 < 7 else None) for n in range(200)])
    assert breaker.doubted == set()
    assert 3 <= len(probed) <= 3 * 21
    assert set(probed) == set(KNOWN[-3:])


def test_few_failures_probe_nobody_before_the_end():
    breaker, probed = make(there=True, known=KNOWN, breaker_hosts=10)
    count(breaker, [(f"h{n}.example", "dns" if n % 10 < 3 else None) for n in range(100)])
    assert len(probed) == 3


def test_nothing_is_probed_where_all_is_well():
    breaker, probed = make(there=False, known=KNOWN, breaker_hosts=10)
    count(breaker, [(f"h{n}.example", ("http_4xx", None, "opt_out")[n % 3]) for n in range(100)])
    assert probed == []


def test_when_no_known_host_is_there_the_shard_ends():
    breaker, probed = make(there=False, known=KNOWN, breaker_hosts=10)
    with pytest.raises(OutageError) as caught:
        count(breaker, [(f"h{n}.example", None if n < 95 else "dns") for n in range(1000)])
    assert str(caught.value) == (
        "5 of the last 10 hosts failed (5 dns) and hosts reached before cannot be reached now (k2.example, k3.example, "
        "k4.example); check the name server and the network: nothing of this shard was recorded; where they are gone "
        "for good, fetch.breaker=false records that"
    )
    assert len(probed) == 3


def test_the_last_rows_of_a_shard_are_looked_at_too():
    breaker, _ = make(there=False, known=KNOWN, breaker_hosts=50)
    with pytest.raises(OutageError, match="1 of the last 20 hosts failed"):
        count(breaker, [(f"h{n}.example", None if n < 19 else "connection") for n in range(20)])


def test_one_dead_host_with_many_rows_is_one_host():
    breaker, probed = make(there=True, known=KNOWN, breaker_hosts=10)
    rows = [(f"h{n}.example", None) for n in range(9)] + [("dead.example", "connection")] * 1000
    count(breaker, rows)
    assert len(probed) == 3  # at the end


def test_before_any_host_was_reached_only_a_long_row_of_failures_stops_in_the_midst():
    """All of as many domains as the breaker looks at; hosts of one domain count once."""
    breaker, _ = make(there=False, breaker_hosts=10)
    count(breaker, [(f"h{n}.one.example", "dns") for n in range(500)], are_all=False)
    breaker, _ = make(there=False, breaker_hosts=10)
    with pytest.raises(OutageError, match=r"10 of the last 10 hosts failed \(10 dns\) and no host was reached"):
        count(breaker, [(f"www.h{n}", "dns") for n in range(10)], are_all=False)


def test_domains_are_those_that_somebody_registered():
    breaker, _ = make(there=False, breaker_hosts=10)
    count(breaker, [(f"www.h{n}.co.uk", "dns") for n in range(9)], are_all=False)
    count(breaker, [(f"h{n}.h8.co.uk", "dns") for n in range(50)], are_all=False)
    with pytest.raises(OutageError, match="10 of the last 10 hosts failed"):
        count(breaker, [("h9.co.uk", "dns")], are_all=False)


def test_where_a_name_server_answers_the_row_must_be_longer():
    breaker, _ = make(there=False, breaker_hosts=10)
    breaker.reached.named("lame.example", True)
    count(breaker, [(f"www.h{n}", "dns") for n in range(99)], are_all=False)
    with pytest.raises(OutageError, match=r"; where they are gone for good, fetch\.breaker=false records that"):
        count(breaker, [(f"www.h{n}", "dns") for n in range(99, 101)], are_all=False)


@pytest.mark.parametrize("num_hosts", [1, 2, 40, 150])
@pytest.mark.parametrize("reason", ["dns", "connection", "timeout", "robots_unreachable"])
def test_a_shard_none_of_whose_hosts_was_reached_is_no_record(num_hosts, reason):
    rows = [(f"h{n % num_hosts}.example", reason) for n in range(300)]
    breaker, probed = make(there=False)
    with pytest.raises(OutageError) as caught:
        count(breaker, [*rows, ("127.0.0.1", "forbidden_address")])
    last = min(num_hosts, 50)
    assert str(caught.value) == (
        f"{last} of the last {last} hosts failed ({last} {reason}) and no host was reached in between; check the name "
        "server and the network: nothing of this shard was recorded; where they are gone for good, "
        "fetch.breaker=false records that"
    )
    assert probed == []
    breaker, _ = make(there=False, breaker=False)
    count(breaker, rows)


def test_names_that_there_are_none_of_are_no_failures():
    breaker, _ = make(there=False, breaker_hosts=10)
    for n in range(2000):
        breaker.reached.named(f"h{n}.example", False)
    count(breaker, [(f"h{n}.example{'.' * (n % 2)}", "dns") for n in range(2000)])
    count(breaker, [(f"lame{n}.example", "dns") for n in range(4)])
    with pytest.raises(OutageError, match="5 of the last 10 hosts failed"):
        count(breaker, [("lame5.example", "dns")])


@pytest.mark.parametrize("num_known", [1, 2])
def test_few_known_hosts_are_probed_too(num_known):
    known = KNOWN[:num_known]
    breaker, probed = make(there=True, known=known)
    count(breaker, [("k1.example", "timeout")] * 100)
    assert probed == list(known)
    breaker, _ = make(there=False, known=known)
    with pytest.raises(OutageError) as caught:
        count(breaker, [("k1.example", "timeout")] * 100)
    assert str(caught.value) == (
        "1 of the last 1 hosts failed (1 timeout) and hosts reached before cannot be reached now "
        f"({', '.join(known)}); check the name server and the network: nothing of this shard was recorded; where they "
        "are gone for good, fetch.breaker=false records that"
    )


def test_an_outage_that_passes_is_waited_for_and_its_rows_go_again():
    breaker, _ = make(there=[False, False, False, True, True, True], known=KNOWN, breaker_hosts=10)
    breaker.config = FetchConfig(breaker_hosts=10, breaker_patience_s=1.0, timeout_s=0.2)
    started = time.monotonic()
    count(breaker, [(f"h{n}.example", None if n < 20 else "dns") for n in range(25)])
    assert breaker.doubted == {20, 21, 22, 23, 24}
    assert time.monotonic() - started > 0.9


# With a name server that dies


def put_urls(io, urls):
    columns = {
        "image_id": image_ids(0, len(urls)),
        "source": ["s"] * len(urls),
        "url": urls,
        "host": [url.split("/")[2] for url in urls],
    }
    arrays = [pa.array(columns.get(f.name, [None] * len(urls)), f.type) for f in TABLES["urls"].schema]
    io.tables["urls", 0] = pa.Table.from_arrays(arrays, schema=TABLES["urls"].schema)
    io.ask_for(range(len(urls)))


@pytest.fixture
def named_web(web, nameserver, make_picture):
    """A hundred hosts that a name server knows, and a hundred that it does not."""
    hosts = [f"h{n}.site{n}.test" for n in range(100)]
    server = nameserver({host: ["127.0.0.1"] for host in hosts})
    for n, host in enumerate(hosts):
        web.reply(host, "/x", make_picture((n, 0, 0)))
    settings = {
        "resolve": dict.fromkeys(hosts, f"127.0.0.1:{web.port}"),
        "resolve_checked": True,
        "nameservers": [server.place],
        "respect_robots": True,
        "breaker_hosts": 20,
        "breaker_patience_s": 0.0,
        "concurrency": 4,
    }
    urls = [f"http://{name}/x" for n, host in enumerate(hosts) for name in (host, f"gone{n}.site.test")]
    return server, settings, urls


def test_a_half_dead_list_is_fetched(named_web, memory_io, fast_config):
    server, settings, urls = named_web
    put_urls(memory_io, urls)
    images = FetchStage(fast_config(**settings)).run(0, memory_io)["images"].to_pylist()
    assert [image["reason"] for image in images] == [None, "dns"] * 100
    assert len([name for name in server.asked if name.startswith("gone")]) == 100


@pytest.mark.parametrize("num_hosts", [1, 2, 40, 100])
@pytest.mark.parametrize("num_answers", [0, 2])
def test_a_name_server_that_dies_costs_no_shard_however_few_hosts_there_are(
    named_web, memory_io, fast_config, num_hosts, num_answers
):
    """It is dead from the start, or dies after two questions; other hosts are asked for than were reached before."""
    server, settings, urls = named_web
    alive = urls[::2]
    stage = FetchStage(fast_config(**settings))
    if num_answers:
        put_urls(memory_io, alive[:num_hosts])
        server.dies_after = num_answers
    else:
        put_urls(memory_io, alive[-num_hosts:] * 3)
        server.stop()
    if num_hosts <= num_answers:
        assert [image["reason"] for image in stage.run(0, memory_io)["images"].to_pylist()] == [None] * num_hosts
        server.stop()
        put_urls(memory_io, alive[-num_hosts:])
        memory_io.objects.clear()
    for _ in range(2):
        with pytest.raises(OutageError, match=r" dns\) and (hosts reached before cannot|no host was reached)"):
            stage.run(0, memory_io)
    assert memory_io.objects == {}
    server.dies_after = None
    server.start()
    assert {image["reason"] for image in stage.run(0, memory_io)["images"].to_pylist()} == {None}


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_shard_of_dead_hosts_only(named_web, memory_io, fast_config, is_alive):
    """That there is no such name is an answer; that nobody answers is none."""
    server, settings, _ = named_web
    urls = [f"http://gone{n}.d{n}.test/x" for n in range(250)]
    put_urls(memory_io, urls)
    stage = FetchStage(fast_config(**settings))
    if is_alive:
        for _ in range(2):
            assert [image["reason"] for image in stage.run(0, memory_io)["images"].to_pylist()] == ["dns"] * 250
        return
    server.stop()
    with pytest.raises(OutageError, match=r"20 of the last 20 hosts failed \(20 dns\) and no host was reached"):
        stage.run(0, memory_io)


def test_hosts_that_an_earlier_command_reached_are_known(named_web, memory_io, fast_config):
    """So that rows that failed once, all tried again, are told from an outage."""
    server, settings, urls = named_web
    put_urls(memory_io, urls)
    images = FetchStage(fast_config(**settings)).run(0, memory_io)["images"]
    memory_io.tables["images", 0] = images
    memory_io.ask_for([n for n in range(len(urls)) if n % 2])
    stage = FetchStage(fast_config(**settings))
    again = stage.run(0, memory_io)["images"]
    assert set(again["reason"].to_pylist()) == {"dns"}
    assert len(stage.reached.known) == 64
    server.stop()
    with pytest.raises(OutageError, match="and hosts reached before cannot be reached now"):
        FetchStage(fast_config(**settings)).run(0, memory_io)


def test_a_name_server_that_dies_ends_the_shard_without_a_record(named_web, memory_io, fast_config):
    server, settings, urls = named_web
    put_urls(memory_io, urls)
    server.dies_after = 100
    stage = FetchStage(fast_config(**settings))
    with pytest.raises(OutageError, match=r"of the last 20 hosts failed \(\d+ dns\) and hosts reached before cannot"):
        stage.run(0, memory_io)
    assert memory_io.objects == {}
    server.start()
    images = stage.run(0, memory_io)["images"].to_pylist()
    assert [image["reason"] for image in images] == [None, "dns"] * 100


def test_rows_of_a_short_outage_are_fetched_when_it_is_over(named_web, memory_io, fast_config, web, back_when_missed):
    server, settings, urls = named_web
    put_urls(memory_io, urls)
    server.dies_after = 100
    back_when_missed(server)
    stage = FetchStage(fast_config(**{**settings, "breaker_patience_s": 10.0}))
    images = stage.run(0, memory_io)["images"].to_pylist()
    assert [image["reason"] for image in images] == [None, "dns"] * 100
    assert web.asked("/x") == 100  # what had come was not asked for again


def test_visits_of_an_outage_are_told_as_well(named_web, memory_io, fast_config, back_when_missed):
    server, settings, urls = named_web
    put_urls(memory_io, urls)
    server.dies_after = 100
    back_when_missed(server)
    config = fast_config(**{**settings, "breaker_patience_s": 10.0, "respect_robots": False})
    tables = FetchStage(config).run(0, memory_io)
    visits = {}
    for visit in tables["fetch_log"].to_pylist():
        visits.setdefault(visit["image_id"], []).append(visit["outcome"])
    came = [visits[image["image_id"]] for image in tables["images"].to_pylist() if image["ok"]]
    assert len(came) == 100
    assert ["dns", "dns", "dns", "ok"] in came
    assert {visits[-1] for visits in came} == {"ok"}


def test_a_name_server_that_is_away_for_a_moment_costs_no_row(named_web, memory_io, fast_config, monkeypatch):
    """Questions that it refuses are asked again, whatever the breaker makes of them."""
    server, settings, urls = named_web
    put_urls(memory_io, urls)
    server.stop()
    ask = Resolver.addresses
    refused = []

    async def addresses(self, host, **values):
        try:
            return await ask(self, host, **values)
        except LookupFailedError as error:
            if error.again:
                refused.append(host)
            if len(refused) > 3 and not server.alive:
                server.start()
            raise

    monkeypatch.setattr(Resolver, "addresses", addresses)
    stage = FetchStage(fast_config(**{**settings, "breaker": False}))
    images = stage.run(0, memory_io)["images"].to_pylist()
    assert len(refused) > 3
    assert [image["reason"] for image in images] == [None, "dns"] * 100


def test_a_name_that_leads_elsewhere_than_it_should_is_refused(web, nameserver, memory_io, fast_config):
    server = nameserver({"a.test": ["127.0.0.2"], "b.test": ["127.0.0.1", "10.0.0.1"], "c.test": ["127.0.0.1"]})
    put_urls(memory_io, [f"http://{name}.test/x" for name in "abc"])
    config = fast_config(nameservers=[server.place], resolve_checked=True)
    images = FetchStage(config).run(0, memory_io)["images"].to_pylist()
    assert [image["reason"] for image in images] == ["forbidden_address", "forbidden_address", "http_4xx"]
    assert {host for host, _ in web.requests} == {"c.test"}


# Somebody on the way who answers for everybody


@pytest.fixture
def filtered_web(web, make_picture, fast_config):
    """A web that gives a picture at every address until ``answers`` says otherwise; shards of it in one worker."""
    from aiohttp import web as aio

    answers = []

    async def handler(request):
        status, body = answers[-1] if answers else (200, make_picture())
        return aio.Response(status=status, body=body, content_type="text/html")

    hosts = [f"h{n}.site{n}.test" for n in range(120)]
    for host in hosts:
        web.on(host, "/x", handler)
    config = fast_config(resolve=dict.fromkeys(hosts, f"127.0.0.1:{web.port}"), breaker_patience_s=0.0)
    stage = FetchStage(config)

    def run(io, first, last):
        put_urls(io, [f"http://{host}/x" for host in hosts[first:last]])
        return [image["reason"] for image in stage.run(0, io)["images"].to_pylist()]

    return answers, stage, run


@pytest.mark.parametrize(
    ("answer", "reason"), [((403, b""), "http_4xx"), ((200, b"<html>log in"), "not_an_image"), ((502, b""), "http_5xx")]
)
@pytest.mark.parametrize("num_hosts", [12, 80])
def test_somebody_who_answers_for_all_ends_the_shard_without_a_record(
    filtered_web, memory_io, answer, reason, num_hosts
):
    answers, _, run = filtered_web
    assert run(memory_io, 0, 20) == [None] * 20
    answers.append(answer)
    message = (
        rf"of the last \d+ hosts gave no picture \(\d+ {reason}\) and addresses that gave one before give none now"
    )
    with pytest.raises(OutageError, match=message) as caught:
        run(memory_io, 20, 20 + num_hosts)
    assert str(caught.value).count("http://h") == 3
    answers.clear()
    assert run(memory_io, 20, 20 + num_hosts) == [None] * num_hosts


def test_a_dead_stretch_of_a_list_is_a_fact(filtered_web, memory_io, web):
    _, _, run = filtered_web
    assert run(memory_io, 0, 20) == [None] * 20
    for n in range(20, 120):
        web.reply(f"h{n}.site{n}.test", "/x", status=404)
    web.requests.clear()
    assert run(memory_io, 20, 120) == ["http_4xx"] * 100
    # Three that gave a picture were asked after 50 hosts; three others at the end, where ten came in after that.
    assert len(web.requests) in (103, 106)


def test_a_filter_that_goes_is_waited_for_and_its_rows_go_again(filtered_web, memory_io, monkeypatch):
    answers, stage, run = filtered_web
    stage.fetch = stage.fetch.model_copy(update={"breaker_patience_s": 30.0})
    assert run(memory_io, 0, 20) == [None] * 20
    answers.append((403, b""))
    probe = Breaker._probe_pictures

    async def probe_once(self):
        gives = await probe(self)
        answers.clear()
        return gives

    monkeypatch.setattr(Breaker, "_probe_pictures", probe_once)
    assert run(memory_io, 20, 100) == [None] * 80


@pytest.mark.parametrize("place", ["ns.example", "127.0.0.1:x", "127.0.0.1:70000", "::1:", ""])
def test_a_bad_name_server_is_a_configuration_error(place):
    from training.config import ConfigError

    with pytest.raises(ConfigError, match=r"fetch\.nameservers: .* is no ADDRESS or ADDRESS:PORT"):
        FetchStage(FetchConfig(nameservers=[place])).preflight()


@pytest.mark.parametrize("place", ["192.0.2.1", "192.0.2.1:5353", "2001:db8::1", "[2001:db8::1]:53"])
def test_name_servers_may_be_given_in_all_forms(place):
    FetchStage(FetchConfig(nameservers=[place])).preflight()
    assert Resolver([place])._nameservers == [place]
