import json
import re
from pathlib import Path

import pytest

from pipelines.curate import CurateRecipe, build_stages
from pipelines.estimate.rates import OVERRIDDEN, load_rates
from pipelines.recipe import load_recipe
from training.config import ConfigError

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "docs" / "benchmarks"


def test_every_stage_has_a_rate():
    rates = load_rates()
    for stage in build_stages(load_recipe(CurateRecipe, "smoke")):
        assert f"stages.{stage.name}" in rates, stage.name
    names = {stage.name for stage in build_stages(load_recipe(CurateRecipe, "smoke"))} | {"register"}
    for name in rates.names:
        if name.partition(".")[0] in ("stages", "bytes", "start"):
            assert name.partition(".")[2] in names | {"part", "vector", "read", "crawl"}, name


def test_every_rate_says_where_it_comes_from():
    rates = load_rates()
    for name in rates.names:
        rate = rates.source(name)
        if rate.measured:
            assert re.search(
                r"make bench NAME=|\.json|smoke run|the same|as stages\.|lvd curate|by hand|curation\.", rate.source
            ), name
        else:
            assert re.search(r"assumed|derived|paper|^as |\.py", rate.source), name
        for bench in re.findall(r"NAME=(\w+)", rate.source):
            assert (ROOT / "tests" / "benchmarks" / f"{bench}.py").is_file(), name
        for file in re.findall(r"(\w+\.json)", rate.source):
            assert (BENCHMARKS / file).is_file(), name


def test_rates_are_the_numbers_of_their_files():
    """A bench that was run again moves its file; a rate that strays from it by more than a quarter is to follow."""
    rates = load_rates()
    read = {path.stem: json.loads(path.read_text()) for path in BENCHMARKS.glob("*.json")}
    scaling = read["copies_scaling"]["sizes"]["45000"]["costs"]
    metadata = read["metadata_cost"]["runs"]["1000000"][0]["cpu_s"]
    for name, value in {
        "stages.screen_keys": read["urls"]["runs"]["5000000"][0]["stages"]["screen_keys"] / 5e6 * 1e3,
        "look.nudenet": read["faces"]["settings"]["nudenet 320, all >= .3"]["cpu_ms"],
        "look.yunet": read["faces"]["settings"]["yunet x1 by side"]["cpu_ms"],
        "stages.describe": read["copies"]["rows"]["sift-vlad-dct"]["ms"],
        "edges.check": read["copies"]["check"]["ms_a_pair"],
        "small.decode": read["decode"]["cpu_ms_a_picture"]["ours"],
        "picture.web": read["decode"]["inputs"]["mean_bytes"],
        "stages.fit_descriptor": scaling["fit_descriptor"]["cpu_s"] / 2000 * 1e3,
        "stages.fit_embedder": scaling["fit_embedder"]["cpu_s"] / 2000 * 1e3,
        "stages.edge_recall": scaling["edge_recall"]["cpu_s"] / 46_786 * 1e3,
        "stages.selection": metadata["selection"] / 1e6 * 1e3,
        "stages.queries": metadata["queries"] / 4000 * 1e3,
    }.items():
        assert rates[name] == pytest.approx(value, rel=0.25), name


def test_what_is_said_of_decoding_is_what_its_file_says():
    rates = load_rates()
    read = json.loads((BENCHMARKS / "decode.json").read_text())
    assert rates["picture.web"] == read["inputs"]["mean_bytes"]
    assert f"assumed: {read['inputs']['pictures'].split()[0]} ImageNet pictures" in rates.source("picture.web").source
    cost = read["cpu_ms_a_picture"]
    more = cost["ours 1400 px, full"] - cost["ours"]
    said = re.search(r"1,400 px take ([\d.]+) ms more to decode", rates.source("stages.look").source)
    assert float(said[1]) == pytest.approx(more, rel=0.25)


def test_a_value_given_is_taken_and_counts_as_an_assumption():
    rates = load_rates(["price.cpu_hour=0.5", "stages.fetch=7"])
    assert (rates["price.cpu_hour"], rates["stages.fetch"]) == (0.5, 7)
    assert list(rates.used) == ["price.cpu_hour", "stages.fetch"]
    assert rates.source("stages.fetch").source == OVERRIDDEN
    assert not rates.source("stages.fetch").measured


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("price.cpu_hours=1", "--rate 'price.cpu_hours' is not known; did you mean 'price.cpu_hour'?"),
        ("price.cpu_hour=-1", r"--rate price\.cpu_hour: got '-1', allowed: a number from 0 on \(USD a core-hour\)"),
        ("price.cpu_hour=much", r"--rate price\.cpu_hour: got 'much', allowed: a number from 0 on"),
        ("price.cpu_hour=nan", "got 'nan', allowed: a number from 0 on"),
        ("stages.fetch", "--rate 'stages.fetch': write it as NAME=VALUE"),
    ],
)
def test_what_is_no_rate_is_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_rates([override])
    assert "\n" not in str(caught.value)
