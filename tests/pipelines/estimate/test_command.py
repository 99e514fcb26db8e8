"""`lvd estimate` as people and programs call it."""

import json
import socket
import subprocess
import sys

import pyarrow as pa
import pytest

from curation.schema import TABLES
from curation.store import write_part
from pipelines.cli import main
from pipelines.curate import CurateRecipe, build_stages
from pipelines.estimate.estimate import estimate
from pipelines.estimate.flow import count_sources
from pipelines.plan import SOURCES
from pipelines.recipe import load_recipe
from training.config import ConfigError


@pytest.fixture(autouse=True)
def nothing_is_written_and_nobody_is_asked(tmp_path, monkeypatch):
    def refused(*_):
        raise AssertionError("an estimate asks no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refused)
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["smoke", "lvd1m", "lvd142m"])
def test_a_recipe_is_estimated_stage_by_stage(name, capsys):
    assert main(["estimate", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = [stage.name for stage in build_stages(load_recipe(CurateRecipe, name))]
    start = next(n for n, line in enumerate(lines) if line.startswith("stage "))
    assert [line.split()[0] for line in lines[start + 1 : start + 3 + len(stages)]] == ["register", *stages, "total"]
    for word in ("cluster", "machines", "money", "held", "storage", "memory", "dearest", "longest"):
        assert any(line.startswith(f"{word} ") for line in lines), word
    assert any("assumed, not measured" in line for line in lines)


def test_as_json_each_number_has_its_source(capsys):
    assert main(["estimate", "lvd142m", "--json", "--hours", "48"]) == 0
    found = json.loads(capsys.readouterr().out)
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert found["hours"] == 48
    assert found["sources"]["crawl"]["rows"] == 1_300_000_000
    assert stages["duplicates"]["rows_out"] == pytest.approx(1.1e9, rel=0.01)  # the paper's counts
    assert stages["leakage"]["rows_out"] == pytest.approx(744e6, rel=0.01)
    assert stages["export"]["rows_out"] == pytest.approx(142_109_386, rel=0.01)
    assert found["total"]["cpu_s"] == pytest.approx(sum(stage["cpu_s"] for stage in found["stages"]))
    for stage in found["stages"]:
        for use in stage["uses"]:
            assert found["rates"][use["rate"]]["source"]


def test_smoke_is_known_from_its_config():
    recipe = load_recipe(CurateRecipe, "smoke")
    assert {name: count.rows for name, count in count_sources(recipe).items()} == {
        "web": 2000, "as_is": 18, "sample": 18, "cluster": 18, "benchmark": 24,
    }  # fmt: skip
    pool = estimate(recipe, hours=24).flow.pool
    # what `lvd funnel` says of a run: README
    assert [round(pool[verdict]) for verdict in ("lines", "screened", "fetched")] == [2000, 1820, 1594]
    assert pool["safety"] == pytest.approx(1506, abs=5)
    assert pool["leakage"] == pytest.approx(1166, abs=5)


def test_shards_that_are_left_out_are_not_counted():
    whole = load_recipe(CurateRecipe, "smoke")
    part = load_recipe(CurateRecipe, "smoke", ["execution.max_shards=2"])
    assert (estimate(whole, hours=24).flow.pool["lines"], estimate(part, hours=24).flow.pool["lines"]) == (2000, 500)


def test_shares_come_from_the_recipe_else_from_the_rates(tmp_path_factory):
    recipe = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    recipe.write_text(
        "name: mine\npool: pool\nrun: run\nexpected: {near: 0.5}\n"
        "sources:\n  list: {kind: list, location: a.csv, expected_rows: 1000}\n"
        "  photos: {kind: folder, location: photos, expected_rows: 100}\n"
    )
    flow = estimate(load_recipe(CurateRecipe, str(recipe)), hours=24, overrides=["keep.fetched=0.5"]).flow
    # 1,000 addresses: .98, .5, .95, .5, .846; 100 pictures that are at hand: the last three
    assert flow.web == (980, 490)
    assert flow.pool["duplicates"] == pytest.approx((490 + 100) * 0.95 * 0.5 * 0.846)
    assert flow.pool["leakage"] == flow.pool["duplicates"]
    assert flow.shares["leakage"].source == "there are no benchmarks"
    assert flow.shares["near"].source == "expected.near of the recipe"


def test_prices_and_workers_are_what_the_command_says():
    recipe = load_recipe(CurateRecipe, "smoke", ["execution.workers=4"])
    plain = estimate(recipe, hours=24)
    dear = estimate(recipe, hours=24, overrides=["price.cpu_hour=0.4"])
    assert dear.total.usd_hours == pytest.approx(10 * plain.total.usd_hours)
    twice = estimate(load_recipe(CurateRecipe, "smoke", ["execution.workers=8"]), hours=24)
    walls = [next(line.cost.wall_s for line in one.lines if line.work.stage == "look") for one in (plain, twice)]
    assert walls[0] == pytest.approx(2 * walls[1])


def test_what_a_pool_knows_is_not_counted_again(tmp_path_factory):
    pool = tmp_path_factory.mktemp("pool")
    row = {"source_id": 0, "name": "web", "role": "pool", "kind": "list", "location": "gone.csv", "digest": "d",
           "num_rows": 7, "shard_rows": 250, "num_shards": 1}  # fmt: skip
    table = pa.Table.from_pylist([row], schema=TABLES["sources"].schema)
    (pool / SOURCES.path).parent.mkdir()
    write_part(table, pool / SOURCES.path, stage="register", version=1, fingerprint="f", inputs={})
    counted = count_sources(load_recipe(CurateRecipe, "smoke", [f"pool={pool}"]))
    assert (counted["web"].rows, counted["web"].source) == (7, f"table sources of {pool}")
    assert counted["sample"].rows == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smokey"], "lvd: recipe 'smokey' is not known; give one of lvd142m, lvd1m, smoke,"),
        (["smoke", "sfety.x=1"], "lvd: smoke.yaml: unknown key 'sfety'; did you mean 'safety'?"),
        (["smoke", "expected.near=2"], "lvd: smoke.yaml: key 'expected.near': got 2; input should be less"),
        (["smoke", "--price", "cpu=1"], "lvd: --rate 'price.cpu' is not known; did you mean 'price.cpu_hour'?"),
        (["smoke", "--hours", "0"], "lvd: --hours: got 0, allowed: above 0"),
        (
            ["smoke", "sample_web=null"],
            "lvd: benchmarks.benchmark.location: 'data/sample_web/benchmark' does not exist; kind 'folder' takes a "
            "folder of pictures; or say how many rows it will have: benchmarks.benchmark.expected_rows=N",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["estimate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_no_heavy_library_is_loaded():
    code = (
        "import sys; from pipelines.cli import main; assert main(['estimate', 'lvd142m']) == 0; "
        "heavy = {'ray', 'torch', 'cv2', 'faiss', 'numba', 'onnxruntime', 'timm', 'open_clip'} & set(sys.modules); "
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_rate_that_is_not_known_stops_before_anything_is_counted():
    with pytest.raises(ConfigError, match="--rate 'look' is not known"):
        estimate(load_recipe(CurateRecipe, "lvd142m"), hours=24, overrides=["look=1"])
