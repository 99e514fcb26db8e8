import datetime
import json
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from curation.export.export import ExportConfig
from curation.lease import Lease
from curation.schema import TABLES, Part
from curation.store import read_part
from pipelines.cli import main
from pipelines.curate import CurateRecipe
from pipelines.recipe import dump_recipe
from pipelines.report import card as card_module
from pipelines.report.markdown import format_card
from pipelines.results import write_card, write_page
from training.config import ConfigError

ROOT = Path(__file__).resolve().parents[3]
WEB = 3_000_000
SOURCE = {"kind": "list", "location": "web/list.csv"}
VALUES: dict[str, Any] = {
    "name": "small",
    "pool": "small/pool",
    "run": "small/run",
    "sources": {"web": SOURCE},
    "queries": {"flowers": {**SOURCE, "mode": "as_is"}, "dogs": {**SOURCE, "k": 4}},
    "benchmarks": {"bench": SOURCE},
    "screen": {"blocked_hosts": ["h1.test"]},
    "fetch": {"contact": "pictures@small.test"},
    "leakage": {"mode": "direct"},
    "export": {"samples_per_tar": 4},
}
# What the runner writes into the footers of these tables, as far as the card reads it.
MADE: dict[str, dict[str, Any]] = {
    "detections": {"config": {"detector": "nudenet", "nudenet": "c1" * 32, "yunet": None}},
    "descriptors": {"config": {"name": "sift-vlad-dct"}, "reads": {"fit_descriptor": "d2" * 32}},
    "embeddings": {"config": {"name": "hog-thumb"}, "reads": {"fit_embedder": "e3" * 32}},
    "duplicates": {"config": {"threshold": 0.6, "policy": "component"}},
    "leakage": {"config": {"threshold": 0.45, "mode": "direct"}},
}


def finish(small: Any, **changed: Any) -> str:
    """Export, save a recipe, and write what the tables were made with; the run's root."""
    small.export(ExportConfig(samples_per_tar=4))
    (small.run / "recipe.yaml").write_text(dump_recipe(CurateRecipe.model_validate({**VALUES, **changed})))
    for table, inputs in MADE.items():
        made(small, table, **inputs)
    visit = {"image_id": 3_000_000_000_000, "attempt": 1, "outcome": "ok", "http_status": 200}
    days = [datetime.datetime(2024, 2, day, 12, tzinfo=datetime.UTC) for day in (28, 29)]
    small.write("fetch_log", WEB, [{**visit, "started_at": day} for day in days])
    return str(small.run)


def made(small: Any, name: str, index: int = WEB, **inputs: Any) -> None:
    part = Part(TABLES[name].root, name, index)
    there = small.store(part.root).exists(part.path)
    table = read_part(small.store(part.root), part) if there else TABLES[name].schema.empty_table()
    small.put(part, table, inputs=inputs)


def tables_of(text: str) -> list[list[list[str]]]:
    """Tables of a markdown text as rows of cells; the recipe's block holds none."""
    tables: list[list[list[str]]] = [[]]
    for line in text.partition("```")[0].splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            tables[-1].append([cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def test_numbers_are_those_of_the_tables(small_run: Any):
    run = finish(small_run)
    card = write_card(run)
    manifest, shards = (pq.read_table(small_run.run / name).to_pylist() for name in ("manifest", "shards"))
    assert card["counts"] == {
        "num_lines": 12,
        "num_images": len(manifest),
        "num_samples": len(manifest),
        "num_blurred": sum(row["blurred"] for row in manifest),
        "num_bytes": sum(row["size"] for row in manifest),
        "num_tars": len(shards),
        "num_tar_bytes": sum(row["num_bytes"] for row in shards),
    }
    flowers, dogs = card["composition"]
    assert flowers == {
        "query_set": "flowers", "mode": "as_is", "num_images": 3, "num_queries": 2, "num_retrieved_nominal": None,
        "num_final_nominal": 2, "num_retrieved": None, "num_taken": None, "num_unique": None, "num_collisions": None,
        "shortfall": None, "num_clusters": None, "num_short": None, "num_test_matches": 0, "num_sampled": None,
            "recall": None,
        "num_final": 2, "share": pytest.approx(2 / 6),
    }  # fmt: skip
    assert dogs == {
        "query_set": "dogs", "mode": "sample", "k": 4, "num_images": 2, "num_queries": 1, "num_retrieved_nominal": 4,
        "num_final_nominal": 4, "num_retrieved": 4, "num_taken": 4, "num_unique": 4, "num_collisions": 0,
        "shortfall": 0, "num_clusters": None, "num_short": None, "num_test_matches": None, "num_sampled": 1,
        "recall": 1.0,
        "num_final": 4, "share": pytest.approx(4 / 6),
    }  # fmt: skip
    assert [(step["stage"], step["num_left"]) for step in card["funnel"]][-3:] == [
        ("selection", 4), ("as_is", 2), ("set", 6)
    ]  # fmt: skip
    assert card["funnel"][0]["reasons"] == {"blocked_host": 1, "duplicate_url": 1}
    hosts = [(row["host"], row["num_images"], row["num_lines"]) for row in card["hosts"]["largest"]]
    assert hosts == [("h0.test", 2, 6), ("h1.test", 2, 6)]
    assert card["fetched"] == {"first": "2024-02-28", "last": "2024-02-29"}
    written = datetime.datetime.fromtimestamp(
        (small_run.run / "shards/part-000000000.parquet").stat().st_mtime, datetime.UTC
    )
    assert card["finished"] == written.date().isoformat()


def test_models_and_thresholds_are_what_was_recorded(small_run: Any):
    card = write_card(finish(small_run))
    assert [(model["name"], model["digest"]) for model in card["models"]] == [
        ("nudenet", "c1" * 32), ("sift-vlad-dct", "d2" * 32), ("hog-thumb", "e3" * 32)
    ]  # fmt: skip
    assert card["models"][0]["licence"].startswith("AGPL-3.0")
    rules = {row["key"]: row for row in card["thresholds"]}
    assert (rules["duplicates.threshold"]["value"], rules["leakage.threshold"]["value"]) == (0.6, 0.45)
    assert rules["duplicates.threshold"]["dropped"].endswith("directly or through copies")
    assert rules["leakage.threshold"]["dropped"].startswith("cosine of at least 0.45 to a picture of a benchmark")
    assert rules["safety.nsfw_threshold.ANUS_EXPOSED"]["value"] == 0.3
    assert rules["safety.max_aspect"]["dropped"] == "longest over shortest side above 8"
    assert [row["recall"] for row in card["edge_recall"]] == [0.75, None]
    told = " ".join(format_card(card).split())
    assert (
        "- 75.00% of the pictures with a cosine from 0.60 on to 5 sampled pictures found (3 of 4 pairs; at least "
        "40.00% with 95% confidence)." in told
    )
    assert (
        "- recall is not known: an exact search found no benchmark pictures with a cosine from 0.45 on to 5 sampled"
        in told
    )


def test_models_of_files_are_told_by_their_digest(small_run: Any):
    look = {"detector": "none", "yunet": "models/face.onnx"}
    descriptor = {"name": "sscd:models/sscd.pt"}
    run = finish(small_run, look=look, descriptor=descriptor, embed={"name": "timm:vit_small_patch14_dinov2.lvd142m"})
    made(small_run, "detections", config={"detector": "none", "nudenet": None, "yunet": "f1" * 32})
    made(small_run, "descriptors", config={"name": "sscd", "weights_sha256": "f2" * 32})
    made(small_run, "embeddings", config={"name": "timm:vit_small_patch14_dinov2.lvd142m", "weights_sha256": "f3" * 32})
    card = write_card(run)
    told = [(model["name"], model["digest"][:2], model["licence"], model["source"]) for model in card["models"]]
    assert told == [
        ("yunet", "f1", "that of its origin: MIT (OpenCV) or Apache-2.0 (libfacedetection)", "file face.onnx"),
        ("sscd", "f2", "MIT", "file sscd.pt"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "f3", "apache-2.0, as timm states for weights of this name",
         "cache of Hugging Face"),
    ]  # fmt: skip
    assert not any(row["reason"] == "nsfw" for row in card["thresholds"])
    assert "No picture was judged as explicit." in card["limits"]


def test_faces_that_the_card_tells_are_those_that_were_measured():
    settings = json.loads((ROOT / "docs" / "benchmarks" / "faces.json").read_text())["settings"]
    names = {(True, False): "nudenet", (False, True): "yunet", (True, True): "both"}
    assert {use: settings[f"{name} as shipped"]["found"] for use, name in names.items()} == card_module._FACES_FOUND


def test_limits_follow_the_settings(small_run: Any):
    card = write_card(finish(small_run))
    assert card["limits"][0].endswith("these settings covered 199 of 327 labelled ones of at least 16 px.")
    run = finish(small_run, look={"yunet": "face.onnx", "face_input_px": []})
    made(small_run, "detections", config={"detector": "nudenet", "yunet": "f1" * 32, "face_input_px": []})
    told = write_card(run)
    assert "covered 304 of 327" in told["limits"][0]
    assert [model["use"] for model in told["models"][:2]] == ["explicit pictures", "faces"]
    run = finish(small_run, look={"face_dilation": 1.3})
    made(small_run, "detections", config={"detector": "nudenet", "yunet": None, "face_dilation": 1.3})
    assert write_card(run)["limits"][0].endswith("what share is was not measured with these settings.")
    run = finish(
        small_run, look={"detector": "none"}, fetch={"respect_robots": False}, near={"blocked_hashes": ["0" * 16]}
    )
    made(small_run, "detections", config={"detector": "none", "yunet": None})
    card = write_card(run)
    assert card["limits"][:2] == ["Faces were neither looked for nor blurred.", "No picture was judged as explicit."]
    assert "Licences and consent of pictures were not looked at beyond opt-out headers." in card["limits"]
    assert (
        "Nothing was compared with any list of known illegal material but the pHashes that the recipe brings."
        in (card["limits"])
    )
    lists = {"blocked_sha256": {"entries": 0, "digest": "a"}, "blocked_pdq": {"entries": 1200, "digest": "b"}}
    made(small_run, "safety", config=lists)
    told = {row["reason"]: row["dropped"] for row in write_card(run)["thresholds"]}
    assert told["blocked_pdq"] == "PDQ at most 31 bits from one of 1,200 blocked ones"
    assert "blocked_sha256" not in told
    assert any(
        "list of known illegal material but the PDQ hashes and pHashes that" in one for one in write_card(run)["limits"]
    )
    text = format_card(card)
    assert "robots.txt was **not** asked for" in text
    assert "The recipe names no contact" in text


def test_markdown_is_well_formed_and_read_again_from_json(small_run: Any):
    run = finish(small_run)
    card = write_card(run)
    text = (small_run.run / "card.md").read_text(encoding="utf-8")
    assert json.loads((small_run.run / "card.json").read_text(encoding="utf-8")) == json.loads(json.dumps(card))
    assert format_card(json.loads((small_run.run / "card.json").read_text(encoding="utf-8"))) == text
    tables = tables_of(text)
    assert len(tables) == 8
    for head, rule, *rows in tables:
        assert rows
        assert all(len(row) == len(head) for row in rows)
        assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rule)
        assert len(rule) == len(head)
    lines = text.splitlines()
    assert lines[0] == "# small"
    for place, line in enumerate(lines[:-1]):
        if line.startswith("#"):  # a title stands alone, and something stands below it
            assert lines[place + 1] == ""
            assert not lines[place + 2].startswith("#")
    assert "\n\n\n" not in text
    assert text.count("```") == 2
    assert "Write to pictures@small.test" in text
    assert (small_run.run / "recipe.yaml").read_text() in text
    assert "Images that could not be read asked for nothing: 1 of `flowers`, 1 of `dogs`." in text


def test_the_composition_is_laid_out_as_in_the_paper(small_run: Any):
    text = format_card(write_card(finish(small_run)))
    section = text[text.index("## Composition") : text.index("- `flowers`")].strip().splitlines()
    assert section == [
        "## Composition",
        "",
        "| query set | mode   | images | asked for | retrieved | unique | final |  share |",
        "| --------- | ------ | -----: | --------: | --------: | -----: | ----: | -----: |",
        "| `flowers` | as is  |      3 |         – |         – |      – |     2 |  33.3% |",
        "| `dogs`    | sample |      2 |         4 |         4 |      4 |     4 |  66.7% |",
        "| total     |        |        |           |           |        |     6 | 100.0% |",
    ]


def test_a_multiset_tells_samples_beside_pictures(small_run: Any):
    run = finish(small_run, select={"multiset": True})
    made(small_run, "selection", config={"select.multiset": False})
    with pytest.raises(ConfigError, match=r"made with select\.multiset False, recipe\.yaml says True; go on with"):
        write_card(run)
    made(small_run, "selection", config={"select.multiset": True})
    small_run.take_twice()
    card = write_card(run)
    assert (card["counts"]["num_images"], card["counts"]["num_samples"]) == (6, 7)
    dogs = card["composition"][1]
    assert (dogs["num_taken"], dogs["num_unique"], dogs["num_final"]) == (5, 4, 5)
    assert sum(row["share"] for row in card["composition"]) == pytest.approx(1)
    assert [(step["stage"], step["num_left"]) for step in card["funnel"]][-2:] == [("set", 6), ("samples", 7)]
    text = " ".join(format_card(card).split())
    assert "6 pictures: 4 out of 12 lines" in text
    assert "The set is a multiset: 7 samples, one for each time that a query set took a picture" in text
    assert "In the set a picture is as often as query sets took it." in text
    page = write_page(run).read_text()
    assert "7 samples of 6 pictures from 12 lines" in page
    assert '<td>dogs</td><td class="number">5</td><td class="number">4</td>' in page


def test_a_cluster_set_tells_its_shortfall(small_run: Any):
    dogs = {**SOURCE, "mode": "cluster", "min_queries": 0, "per_cluster": 2_000, "cap": 1_500}
    run = finish(small_run, queries={"flowers": {**SOURCE, "mode": "as_is"}, "dogs": dogs})
    counts = {"num_nominal": 2_000, "num_final_nominal": 1_500, "num_retrieved": 4, "num_taken": 4, "num_unique": 4}
    told = {"query_set": "dogs", "place": 1, "mode": "cluster", "num_clusters": 1, "shortfall": 1_996, "num_short": 1}
    small_run.write("retrieval", 2_000_000, [{**told, **counts}])
    row = write_card(run)["composition"][1]
    assert (row["num_retrieved_nominal"], row["num_final_nominal"], row["num_final"]) == (2_000, 1_500, 4)
    text = " ".join(format_card(write_card(run)).split())
    assert "`dogs`: up to 2,000 pictures of each cluster that holds more than 0 images of the set, at most" in text
    assert "More was asked for than the pool holds: 1,996 of `dogs` (in 1 cluster)." in text
    page = write_page(run).read_text()
    assert "<td>dogs</td><td>cluster</td>" in page
    assert "1 of 1 clusters hold fewer than was asked of them" in page


def test_a_balanced_set_has_no_images_of_its_own(small_run: Any):
    even = {"mode": "balanced", "total": 1_000}
    run = finish(small_run, queries={**VALUES["queries"], "even": even})
    with pytest.raises(ConfigError, match="not finished: query set 'even' is new"):
        write_card(run)
    made(small_run, "quotas", 999_000_000, task={"total": 900})
    with pytest.raises(ConfigError, match=r"made with queries\.even\.total 900, recipe\.yaml says 1000"):
        write_card(run)
    made(small_run, "quotas", 999_000_000, task={"total": 1_000})
    counts = {"num_nominal": 1_000, "num_final_nominal": 1_000, "num_retrieved": 7, "num_taken": 7, "num_unique": 7}
    told = {"query_set": "even", "place": 2, "mode": "balanced", "num_clusters": 3, "shortfall": 993, "num_short": 0}
    small_run.write("retrieval", 999_000_000, [{**told, **counts}])
    text = format_card(write_card(run))
    assert "| `even`    | balanced |      – |     1,000 |         7 |      7 |     0 |   0.0% |" in text
    assert "`even`: 1,000 pictures, as many from each cluster of the pool as from any other" in " ".join(text.split())
    assert "<td>even</td><td>balanced</td>" in write_page(run).read_text()


def test_text_of_strangers_is_no_markup(small_run: Any):
    run = finish(small_run)
    small_run.change("urls", WEB, 0, host="a|b`c\n# d")
    text = format_card(write_card(run))
    assert r"`` a\|b`c # d ``" in text
    assert all(len(row) == len(table[0]) for table in tables_of(text) for row in table)


def test_without_a_finished_run_it_is_one_line(small_run: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no run at .*; make one with lvd curate smoke"):
        write_card(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"run .* has no tars yet; go on with lvd curate"):
        write_card(str(small_run.run))
    run = finish(small_run)
    lease = Lease(small_run.store("run"), tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"run .*: process \d+ on .* works on it; wait for it"):
            write_card(run)
    finally:
        lease.release()
    small_run.change("selection", WEB, 0, keep=False, reason="not_retrieved")
    with pytest.raises(ConfigError, match=r"check choices_match_selection found 1 rows; go on with lvd curate"):
        write_card(run)
    (small_run.run / "recipe.yaml").unlink()
    with pytest.raises(ConfigError, match=r"has lost its recipe\.yaml"):
        write_card(run)
    assert not (small_run.run / "card.md").exists()


def test_a_recipe_that_the_tables_do_not_know_yet_is_told(small_run: Any):
    run = finish(small_run, export={"samples_per_tar": 5})
    made(small_run, "shards", 0, config={"samples_per_tar": 4, "seed": 0})
    with pytest.raises(ConfigError, match=r"made with export\.samples_per_tar 4, recipe\.yaml says 5; go on with"):
        write_card(run)
    run = finish(small_run, queries={**VALUES["queries"], "cats": SOURCE})
    with pytest.raises(ConfigError, match="not finished: query set 'cats' is new"):
        write_card(run)
    run = finish(small_run, queries={**VALUES["queries"], "dogs": {**SOURCE, "k": 8}})
    made(small_run, "queries", 2_000_000, config={"queries": {"dogs": {"mode": "sample", "k": 4}}})
    with pytest.raises(ConfigError, match=r"made with queries\.dogs\.k 4, recipe\.yaml says 8"):
        write_card(run)


def test_a_run_on_an_object_store_has_its_card_there(small_run: Any, monkeypatch: pytest.MonkeyPatch):
    import obstore
    from moto.server import ThreadedMotoServer
    from obstore.store import S3Store

    finish(small_run)
    here = write_card(str(small_run.run))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("NO_PROXY", host)
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/cards", method="PUT")).close()
        client = S3Store("cards", config={"allow_http": "true"})
        state = small_run.run / "state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "pool": "s3://cards/pool"}))
        for path in (path for root in (small_run.pool, small_run.run) for path in root.rglob("*") if path.is_file()):
            if not path.name.startswith("card."):
                obstore.put(client, path.relative_to(small_run.pool.parent).as_posix(), path)
        there = write_card("s3://cards/run")
        assert {**there, "finished": None} == {**here, "finished": None}
        assert abs(datetime.date.fromisoformat(there["finished"]) - datetime.date.today()).days <= 1
        assert bytes(obstore.get(client, "run/card.md").bytes()).decode() == format_card(there)
        write_card("s3://cards/run")  # again, over the one that is there
    finally:
        server.stop()


def test_command(small_run: Any, capsys: pytest.CaptureFixture[str]):
    run = finish(small_run)
    assert main(["card", run]) == 0
    assert capsys.readouterr().out.splitlines() == [f"card      {run}/card.md", f"json      {run}/card.json"]
    first = (small_run.run / "card.md").read_bytes()
    assert main(["card", "--run", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["num_images"] == 6
    assert (small_run.run / "card.md").read_bytes() == first
    assert main(["card", f"{run}-none"]) == 2
    assert capsys.readouterr().err.startswith(f"lvd: no run at {run}-none; ")


def test_rules_of_the_takedown_list_are_counted(small_run: Any):
    run = finish(small_run)
    assert "takedown list of the pool" not in format_card(write_card(run))
    small_run.write("takedowns", 0, [{"kind": "sha256", "value": "ab" * 32, "applied": True}])
    small_run.change("fetched", WEB, 1, reason="taken_down")
    card = write_card(run)
    assert card["takedowns"] == {"num_rules": 1, "num_lines": 1}
    text = " ".join(format_card(card).split())
    assert "The takedown list of the pool has 1 rule, those that follow from others too; 1 line of this run" in text
    assert "runs `lvd takedown LIST`" in text
