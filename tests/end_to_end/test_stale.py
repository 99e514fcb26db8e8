"""A changed recipe: exactly the named parts are redone, facts of new rows only, and it equals a run from scratch."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from training.config import DataConfig, PartConfig
from training.data.index import Index

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

UNSEEN = "look.detector=none"  # where nothing is told by what a detector sees: it takes most of the time
VECTORS = ("pool/descriptors", "pool/embeddings")


def stages(outcome) -> set[str]:
    return set(outcome.summary.costs)


def rows(outcome, stage: str) -> int:
    return outcome.summary.costs[stage].num_rows


def kept(folder: Path, verdict: str) -> set[int]:
    table = pd.read_parquet(folder / "run" / verdict)
    return set(table.image_id[table.keep])


@pytest.fixture
def changed(lab, undisturbed, tmp_path):
    """Apply a change to a copy of the undisturbed run, and the same settings to a run without any vector of before."""

    def change(*overrides: str):
        folder = lab.copy(undisturbed, tmp_path / "changed")
        outcome = lab.curate(folder, *overrides)
        scratch = lab.copy(undisturbed / "pool", tmp_path / "scratch" / "pool").parent
        for table in VECTORS:
            shutil.rmtree(scratch / table)
        lab.curate(scratch, *overrides)
        assert lab.contents(folder) == lab.contents(scratch)
        assert lab.curate(folder, *overrides).summary.num_jobs == 0
        return folder, outcome

    return change


def test_a_loosened_safety_threshold_lets_in_and_computes_only_what_it_lets_in(changed, undisturbed):
    folder, outcome = changed("safety.min_shortest_px=8")
    let_in = kept(folder, "safety") - kept(undisturbed, "safety")
    assert len(let_in) >= 1
    assert not stages(outcome) & {
        "screened",
        "fetch",
        "fetched",
        "look",
        "fit_descriptor",
        "fit_embedder",
        "fit_kmeans",
    }
    assert rows(outcome, "describe") == len(kept(folder, "near") - kept(undisturbed, "near"))
    assert rows(outcome, "embed") == len(kept(folder, "leakage") - kept(undisturbed, "leakage"))


def test_a_tightened_safety_threshold_computes_no_fact(changed, undisturbed):
    folder, outcome = changed("safety.max_aspect=1.3")
    assert kept(folder, "safety") < kept(undisturbed, "safety")
    # What a dropped picture stood for may come forward: only such pictures are described.
    described = rows(outcome, "describe") if "describe" in stages(outcome) else 0
    assert described == len(kept(folder, "near") - kept(undisturbed, "near"))
    assert not stages(outcome) & {"screened", "fetch", "fetched", "look"}


def test_a_stale_part_names_the_key(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    said: list[str] = []
    from pipelines.preflight import Options
    from pipelines.session import curate

    curate(lab.recipe(folder, "safety.max_aspect=7.5"), Options(), said.append)
    plan = [line for line in said if line.startswith("  safety ")]
    assert "stale: safety.max_aspect 8.0 -> 7.5" in plan[0]
    done = [line.split()[0] for line in said if line.endswith(" done")]
    assert "look" in done
    assert "fetch" in done


def test_a_loosened_duplicate_threshold(changed, undisturbed):
    folder, outcome = changed("duplicates.threshold=0.95")
    let_in = kept(folder, "duplicates") - kept(undisturbed, "duplicates")
    assert len(let_in) >= 5
    assert "components" in stages(outcome)
    assert not stages(outcome) & {"fetch", "look", "safety", "near", "describe", "edges"}
    assert rows(outcome, "embed") == len(kept(folder, "leakage") - kept(undisturbed, "leakage"))


def test_a_changed_embedder_redoes_embed_and_what_follows(lab, undisturbed, tmp_path):
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    folder = lab.copy(undisturbed, tmp_path / "changed")
    model = ("embed.name=timm:test_resnet.r160_in1k", f"embed.weights={tmp_path}/weights.pt", "embed.size_px=64")
    outcome = lab.curate(folder, *model)
    redone = {
        "fit_embedder",
        "embed",
        "fit_kmeans",
        "fit_hierarchy",
        "cluster",
        "semantic_duplicates",
        "semantic",
        "queries",
        "quotas",
        "candidates",
        "neighbours",
        "offers",
        "selection",
        "export",
    }
    assert stages(outcome) == redone
    queries = len(pd.read_parquet(folder / "run" / "queries"))
    assert rows(outcome, "embed") == len(kept(folder, "leakage")) + queries
    # Back again: every vector is still there, only verdicts and tars are made anew.
    again = lab.curate(folder)
    assert "embed" not in stages(again)
    assert lab.contents(folder) == lab.contents(undisturbed)


def test_a_weight_touches_no_table_and_reaches_the_trainer(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "weighed")
    assert lab.curate(folder, "queries.sample.weight=0.75").summary.num_jobs == 0
    part = PartConfig(kind="run", location=f"{folder}/run", split_by_part=True)
    shares = {one.name: float(one.share) for one in Index.open(DataConfig(parts={"lvd": part})).parts}
    assert shares["lvd.sample"] == 0.75
    assert sum(shares.values()) == pytest.approx(1)


def test_a_second_recipe_on_the_same_pool_fetches_and_looks_at_nothing(lab, undisturbed, tmp_path):
    pool = lab.copy(undisturbed / "pool", tmp_path / "pool")
    before = lab.digests(tmp_path, "pool")
    outcome = lab.curate(tmp_path, "name=second", f"run={tmp_path}/second", "queries.sample.k=3")
    assert not stages(outcome) & {"fetch", "look", "describe", "embed"}
    assert lab.digests(tmp_path, "pool") == before
    assert pool.is_dir()
    first = pd.read_parquet(undisturbed / "run" / "neighbours").query("query_set == 'sample'")
    second = pd.read_parquet(tmp_path / "second" / "neighbours").query("query_set == 'sample'")
    assert len(second) == len(first) // 8


def test_an_appended_list_and_a_shortened_block_list(lab, undisturbed, tmp_path):
    lines = (lab.web / "urls.csv").read_bytes().splitlines(keepends=True)
    hosts = pd.read_parquet(undisturbed / "pool" / "urls").host.dropna()
    busiest = hosts[hosts.str.endswith("sample.test")].value_counts().index[0]
    listed = tmp_path / "urls.csv"
    listed.write_bytes(b"".join(lines[:-40]))
    base = (f"sources.web.location={listed}", UNSEEN)
    blocked = (*base, f"screen.blocked_hosts=[blocked.test, {busiest}]")
    lab.curate(tmp_path, *blocked)
    ids = {name: kept(tmp_path, name) for name in ("screened", "fetched", "near", "leakage")}

    outcome = lab.curate(tmp_path, *base)
    assert rows(outcome, "fetch") == len(kept(tmp_path, "screened") - ids["screened"]) > 0
    assert rows(outcome, "look") == len(kept(tmp_path, "fetched") - ids["fetched"])
    ids = {name: kept(tmp_path, name) for name in ids}
    fetched_before = pd.read_parquet(tmp_path / "pool" / "images").image_id

    listed.write_bytes(b"".join(lines))
    outcome = lab.curate(tmp_path, *base)
    assert rows(outcome, "fetch") == len(kept(tmp_path, "screened") - ids["screened"]) > 0
    assert rows(outcome, "look") == len(kept(tmp_path, "fetched") - ids["fetched"])
    assert rows(outcome, "describe") == len(kept(tmp_path, "near") - ids["near"])
    images = pd.read_parquet(tmp_path / "pool" / "images")
    assert len(images) > len(fetched_before)
    assert not images.image_id.duplicated().any()

    scratch = tmp_path / "scratch"
    shutil.copytree(tmp_path / "pool" / "fits", scratch / "pool" / "fits")
    lab.curate(scratch, *base)
    assert lab.contents(scratch) == lab.contents(tmp_path)


def test_other_intermediates_are_other_pictures(lab, undisturbed, tmp_path):
    """Vectors are of the intermediates: other ones redo all that follows from them, as a run from scratch does."""
    folder = lab.copy(undisturbed, tmp_path / "changed")
    outcome = lab.curate(folder, "look.small_px=96", UNSEEN)
    assert {"look", "fit_descriptor", "describe", "edges", "embed", "cluster", "export"} <= stages(outcome)
    scratch = lab.copy(undisturbed / "pool", tmp_path / "scratch" / "pool").parent
    for table in ("hashes", "detections", "descriptors", "embeddings", "fits"):
        shutil.rmtree(scratch / "pool" / table)
    lab.curate(scratch, "look.small_px=96", UNSEEN)
    assert lab.contents(folder) == lab.contents(scratch)


def test_a_fit_that_was_tried_on_a_part_of_the_pool_does_not_stay(lab, undisturbed, tmp_path):
    pool = lab.copy(undisturbed / "pool", tmp_path / "pool", without=("fits", "descriptors", "embeddings"))
    assert pool.is_dir()
    lab.curate(tmp_path, "execution.max_shards=1")
    lab.curate(tmp_path)
    assert lab.contents(tmp_path) == lab.contents(undisturbed)


def test_a_driver_that_lost_its_lease_removes_nothing(lab, undisturbed, tmp_path, monkeypatch):
    from curation.lease import LeaseLostError
    from pipelines import drive

    folder = lab.copy(undisturbed, tmp_path / "copy")
    real = drive.Driver._run_global

    def lose(self, stage):
        if stage.name == "components":
            note = folder / "run" / "lease.json"
            note.write_text(note.read_text().replace('"token": "', '"token": "another-'))
        real(self, stage)

    monkeypatch.setattr(drive.Driver, "_run_global", lose)
    with pytest.raises(LeaseLostError, match="another driver took it over"):
        lab.curate(folder, "duplicates.threshold=0.7")
    assert lab.digests(folder, "run").keys() >= lab.digests(undisturbed, "run").keys()


def test_a_lost_log_of_visits_visits_nobody(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    shutil.rmtree(folder / "pool" / "fetch_log")
    assert lab.curate(folder).summary.num_jobs == 0


def test_a_dry_run_sees_a_line_more_and_writes_nothing(lab, undisturbed, tmp_path):
    from pipelines.preflight import Options
    from pipelines.session import curate

    folder = lab.copy(undisturbed, tmp_path / "copy")
    before = lab.digests(folder)
    listed = tmp_path / "urls.csv"
    lines = (lab.web / "urls.csv").read_bytes()
    listed.write_bytes(lines + b"http://h001.sample.test/one-more.jpg,,\n")
    said: list[str] = []
    outcome = curate(lab.recipe(folder, f"sources.web.location={listed}"), Options(dry_run=True), said.append)
    assert "register pool 'web': 1 rows more, 241 in all" in said
    assert {line.stage: line.num_undone for line in outcome.lines}["screen_keys"] == 1
    assert lab.digests(folder) == before


def test_a_command_killed_between_lines_and_sources_leaves_no_line(lab, undisturbed, tmp_path):
    from pipelines import registration

    listed = tmp_path / "urls.csv"
    lines = (lab.web / "urls.csv").read_bytes().splitlines(keepends=True)
    source = f"sources.web.location={listed}"
    listed.write_bytes(b"".join(lines[:26]))
    lab.curate(tmp_path, source, until="screened")
    before = lab.contents(tmp_path)
    listed.write_bytes(b"".join(lines[:29]))
    with pytest.MonkeyPatch.context() as patch:
        real = registration._commit

        def die(store, part, *rest):
            if part == registration.SOURCES:
                raise KeyboardInterrupt
            real(store, part, *rest)

        patch.setattr(registration, "_commit", die)
        with pytest.raises(KeyboardInterrupt):
            lab.curate(tmp_path, source, until="screened")
    listed.write_bytes(b"".join(lines[:26]))
    assert lab.curate(tmp_path, source, until="screened").summary.num_jobs == 0
    assert lab.contents(tmp_path) == before


def test_a_source_that_changed_is_an_error(lab, undisturbed, tmp_path):
    from training.config import ConfigError

    folder = lab.copy(undisturbed, tmp_path / "copy")
    listed = tmp_path / "urls.csv"
    lines = (lab.web / "urls.csv").read_bytes().splitlines(keepends=True)
    listed.write_bytes(b"".join([lines[0], *lines[2:], lines[1]]))
    with pytest.raises(ConfigError, match="source 'web' changed instead of being extended"):
        lab.curate(folder, f"sources.web.location={listed}")


def test_refetching_asks_to_be_told(lab, undisturbed, tmp_path):
    from training.config import ConfigError

    folder = lab.copy(undisturbed, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"fetch: .* rows that were made before .*fetch\.max_bytes .*--redo fetch"):
        lab.curate(folder, "fetch.max_bytes=3999999")
    lab.assert_same(folder, undisturbed)
