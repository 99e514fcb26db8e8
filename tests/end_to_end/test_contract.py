"""The contract of a stage, held by every stage: schema, no-op on a rerun, nothing half-written, stale is seen."""

import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from curation.schema import LAST_VERDICT_OF_REFERENCES, LOGS, TABLES, UNDER_WAY, VECTOR_TABLES, VERDICTS, Part, table_of
from curation.stage import GlobalStage, ShardStage
from curation.store import open_store, read_footer, read_part
from pipelines.curate import CurateRecipe, build_stages
from pipelines.recipe import load_recipe

pytestmark = pytest.mark.slow

STAGES = build_stages(load_recipe(CurateRecipe, "smoke"))
NAMES = [stage.name for stage in STAGES]


def parts_of(folder, table: str) -> list[Part]:
    kind = TABLES[table]
    found = []
    for path in open_store(f"{folder}/{kind.root}").list("fits/" + table if table.startswith("fit_") else table):
        if path.endswith(".parquet"):
            place, _, name = path.rpartition("/")
            found.append(Part(kind.root, place, int(name[5:14])))
    return found


def test_every_table_has_one_writer_and_every_read_a_writer_before_it():
    written = {"pages": "crawl", "sources": "register", "urls": "register", "takedowns": "takedown"}
    for stage in STAGES:
        assert isinstance(stage, (ShardStage, GlobalStage))
        for table in (*stage.reads, *stage.consults):
            assert table in written, f"{stage.name} reads {table}, which nothing has written"
        for table in stage.writes:
            assert table not in written, f"{table} has two writers"
            written[table] = stage.name
        assert set(stage.by_content) <= set(stage.reads)
        assert not set(stage.consults) & set(stage.reads)
        assert stage.version >= 1
    assert set(written) == set(TABLES)
    assert [name for name in written if name in VERDICTS] == list(VERDICTS)


@pytest.mark.parametrize("stage", STAGES, ids=NAMES)
def test_parts_have_the_schema_and_name_their_origin(undisturbed, stage):
    for table in stage.writes:
        parts = parts_of(undisturbed, table)
        assert bool(parts) == (table not in UNDER_WAY), table
        for part in parts:
            assert table_of(part) == table
            store = open_store(f"{undisturbed}/{part.root}")
            rows, footer = read_part(store, part), read_footer(store, part)
            assert rows.schema.names == TABLES[table].schema.names
            if table not in VECTOR_TABLES:
                assert rows.schema.types == TABLES[table].schema.types
            assert (footer.stage, footer.version, footer.num_rows) == (stage.name, stage.version, rows.num_rows)
            if TABLES[table].parts == "shard" and "image_id" in rows.schema.names:
                ids = rows["image_id"].to_pylist()
                assert all(image_id // 1_000_000 == part.index for image_id in ids)
                assert ids == sorted(ids)
                assert table in LOGS or len(set(ids)) == len(ids)


@pytest.mark.parametrize("stage", [s for s in STAGES if getattr(s, "kind", "") == "verdict"], ids=lambda s: s.name)
def test_a_verdict_covers_what_the_one_before_kept(undisturbed, stage):
    table = stage.writes[0]
    place = VERDICTS.index(table)
    for part in parts_of(undisturbed, table):
        store = open_store(f"{undisturbed}/run")
        rows = read_part(store, part)
        assert [reason is None for reason in rows["reason"].to_pylist()] == rows["keep"].to_pylist()
        if place == 0:
            urls = read_part(open_store(f"{undisturbed}/pool"), Part("pool", "urls", part.index))
            assert rows["image_id"].equals(urls["image_id"])
            continue
        before = Part("run", VERDICTS[place - 1], part.index)
        if not store.exists(before.path):
            before = Part("run", LAST_VERDICT_OF_REFERENCES, part.index)
        kept = read_part(store, before)
        assert rows["image_id"].to_pylist() == kept.filter(kept["keep"])["image_id"].to_pylist()


@pytest.mark.parametrize("stage", STAGES, ids=NAMES)
def test_a_lost_part_is_made_again_the_same_and_nothing_else_is(lab, undisturbed, tmp_path, stage):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    before = lab.digests(folder)
    lost = parts_of(folder, stage.writes[0])[-1]
    (folder / lost.root / lost.path).unlink()
    outcome = lab.curate(folder) if stage.name != "fetch" else lab.curate(folder, redo=())
    assert set(outcome.summary.costs) == {stage.name}
    num_sorts = 3 if stage.name == "edges" else 0  # vectors of each role by list, which are not kept
    assert outcome.summary.costs[stage.name].num_jobs == 1 + num_sorts
    assert lab.digests(folder) == before


def test_a_lost_second_part_of_a_task_is_made_again(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    before = lab.digests(folder)
    lost = parts_of(folder, "near_report")[0]
    (folder / lost.root / lost.path).unlink()
    costs = lab.curate(folder).summary.costs
    assert {name: cost.num_jobs for name, cost in costs.items()} == {"near_pairs": 1}
    assert lab.digests(folder) == before


@pytest.mark.parametrize("stage", STAGES, ids=NAMES)
def test_killed_in_mid_commit_leaves_nothing_that_is_read(lab, undisturbed, tmp_path, stage):
    """The worker dies between writing a part beside and putting it in place."""
    folder = lab.copy(undisturbed, tmp_path / "copy")
    before = lab.digests(folder)
    lost = parts_of(folder, stage.writes[0])[0]
    (folder / lost.root / lost.path).unlink()
    script = (
        "import os, signal, sys, curation.store as store\n"
        "def die(*arguments): os.kill(os.getpid(), signal.SIGKILL)\n"
        "real = store.LocalStore.create\n"
        "def create(self, path, source):\n"
        f"    if path == {lost.path!r}:\n"
        "        self._beside(path, source); die()\n"
        "    return real(self, path, source)\n"
        "store.LocalStore.create = create\n"
        "from pipelines.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "curate", "smoke", *lab.overrides(folder)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert killed.returncode == -9, killed.stdout + killed.stderr
    assert not (folder / lost.root / lost.path).exists()
    for path in (folder / lost.root).rglob("part-*.parquet"):
        pq.read_metadata(path)
    lab.curate(folder)
    assert lab.digests(folder) == before
    assert not list((folder / lost.root / ".beside").iterdir())


@pytest.mark.parametrize("stage", STAGES, ids=NAMES)
def test_another_version_of_a_stage_is_seen(undisturbed, stage):
    """A raised version changes the fingerprint, so that every part of the stage counts as stale."""
    from pipelines.plan import _origin

    inputs = {"config": stage.fingerprint_values(), "reads": {}}
    now = _origin(stage, inputs)
    stage.version += 1
    try:
        assert _origin(stage, inputs).fingerprint != now.fingerprint
    finally:
        del stage.version
