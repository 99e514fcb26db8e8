"""Pictures that are taken down: no byte of them is left, the run follows, and nothing brings them back."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.export.purge import put_rules
from curation.ingest.takedown import rule_of
from curation.store import open_store
from pipelines.cli import main
from pipelines.results import opened, verify_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def pictures(folder: Path) -> pd.DataFrame:
    """What is stored of each picture, with its url and whether it is in the set."""
    pool, run = folder / "pool", folder / "run"
    (looked,) = (pool / "detections").iterdir()
    columns = ["image_id", "blurred_object", "blurred_offset", "blurred_bytes"]
    columns += ["small_object", "small_offset", "small_bytes"]
    found = pd.read_parquet(pool / "images").query("ok")
    found = found.merge(pd.read_parquet(looked)[columns], on="image_id", how="left")
    found = found.merge(pd.read_parquet(pool / "urls")[["image_id", "url", "source"]], on="image_id")
    return found.assign(in_set=found.image_id.isin(pd.read_parquet(run / "manifest").image_id))


def traces(folder: Path, ids: set[int]) -> dict[str, bytes]:
    """Bytes, blurred version, thumbnail and vectors of some pictures, as they are stored."""
    found, pool = {}, folder / "pool"
    for row in pictures(folder).query("image_id in @ids").to_dict("records"):
        for kind, (tar, offset, size) in {
            "bytes": ("object", "offset", "num_bytes"),
            "blurred": ("blurred_object", "blurred_offset", "blurred_bytes"),
            "small": ("small_object", "small_offset", "small_bytes"),
        }.items():
            if isinstance(row[tar], str):
                data = (pool / row[tar]).read_bytes()
                found[f"{kind} {row['image_id']}"] = data[int(row[offset]) : int(row[offset]) + int(row[size])]
    for table in ("descriptors", "embeddings"):
        (model,) = (pool / table).iterdir()
        for part in model.iterdir():
            rows = pq.read_table(part)
            for row in rows.filter(pa.compute.is_in(rows["image_id"], pa.array(ids, pa.int64()))).to_pylist():
                found[f"{table} {row['image_id']}"] = np.array(row["vector"], np.float16).tobytes()
    return found


def rows_of(column: pa.ChunkedArray) -> set[bytes]:
    """Values of a column of vectors or of bytes, vectors as fp16."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        if pa.types.is_floating(kind.value_type):
            return {np.array(value, np.float16).tobytes() for value in column.to_pylist()}
        return set()
    return set(column.to_pylist()) if pa.types.is_binary(kind) else set()


def left_over(folder: Path, needles: dict[str, bytes]) -> list[str]:
    """Where any of these bytes still are, in the files as they lie and in what parquet files hold."""
    found = []
    for path in sorted(path for root in ("pool", "run") for path in (folder / root).rglob("*") if path.is_file()):
        data = path.read_bytes()
        found += [f"{path.relative_to(folder)}: {name}" for name, needle in needles.items() if needle in data]
        if path.suffix == ".parquet":
            table = pq.ParquetFile(path).read()
            held = set().union(*(rows_of(column) for column in table.columns))
            found += [f"{path.relative_to(folder)}: {name}" for name, needle in needles.items() if needle in held]
    return found


def ends(folder: Path, ids: set[int]) -> set[tuple[str, str]]:
    with opened(f"{folder}/run") as database:
        rows = database.connection.execute(
            "SELECT DISTINCT stage, reason FROM end_state WHERE image_id IN (SELECT unnest(?))", [sorted(ids)]
        )
        return set(rows.fetchall())


@pytest.fixture
def folder(lab, undisturbed, tmp_path) -> Path:
    """A copy of the undisturbed run that knows where it lies."""
    copy = lab.copy(undisturbed, tmp_path / "copy")
    for name in ("state.json", "recipe.yaml"):
        text = (copy / "run" / name).read_text().replace(str(undisturbed), str(copy))
        (copy / "run" / name).unlink()
        (copy / "run" / name).write_text(text)
    return copy


@pytest.fixture
def chosen(undisturbed) -> tuple[str, str, set[int]]:
    """An address of the set whose bytes another address has too, the sha256 of a blurred face, and all ids."""
    stored = pictures(undisturbed)
    web = stored[stored.source == "web"]
    twice = web[web.sha256.isin(web.sha256[web.sha256.duplicated()])]
    by_url = web[web.in_set & web.sha256.isin(twice.sha256)]
    by_url = (by_url if len(by_url) else twice).iloc[0]
    face = web[web.blurred_object.notna()].sort_values("in_set").iloc[-1]
    ids = set(stored.image_id[stored.sha256.isin([by_url.sha256, face.sha256])])
    assert len(ids) >= 3
    return by_url.url, face.sha256, ids


def test_what_is_taken_down_leaves_no_byte_and_does_not_come_back(lab, folder, chosen, tmp_path, capsys):
    url, sha256, ids = chosen
    assert main(["report", "--run", f"{folder}/run"]) == 0
    needles = traces(folder, ids)
    assert {name.split()[0] for name in needles} == {"bytes", "blurred", "small", "descriptors", "embeddings"}
    assert len(left_over(folder, needles)) >= len(needles)
    listed = tmp_path / "list.txt"
    listed.write_text(f"# asked for by mail\n{url.replace('.sample.test/', '.SAMPLE.test:80/')}#top\n")

    assert main(["takedown", str(listed), sha256, "--run", f"{folder}/run", "--dry-run"]) == 0
    assert f"pictures  {len(ids)} of this run would go" in capsys.readouterr().out
    assert left_over(folder, needles)
    assert main(["takedown", str(listed), sha256, "--run", f"{folder}/run"]) == 0
    shown = capsys.readouterr().out
    assert f"pictures  {len(ids)} of this run gone" in shown
    assert "its tars hold none of them" in shown

    assert left_over(folder, needles) == []
    assert not (folder / "run" / "report.html").exists()
    assert verify_run(f"{folder}/run")[0] == []
    assert ends(folder, ids) == {("fetched", "taken_down")}
    assert lab.curate(folder).summary.num_jobs == 0

    # The same command again, and the same address in a list of another recipe over the same pool.
    assert main(["takedown", str(listed), sha256, "--run", f"{folder}/run"]) == 0
    assert "0 of this run gone" in capsys.readouterr().out
    more = tmp_path / "more.csv"
    more.write_text(f"url\n{url}\n")
    second = ("name=second", f"run={folder}/second", f"sources.more={{kind: list, location: {more}}}")
    lab.curate(folder, *second, "screen.schemes=[http]")
    images = pd.read_parquet(folder / "pool" / "images")
    assert not images.sha256.isin([hashlib.sha256(needles[n]).hexdigest() for n in needles if n[:5] == "bytes"]).any()
    assert left_over(folder, needles) == []


@pytest.mark.matrix
def test_it_equals_a_run_that_knew_the_list_from_the_start(lab, folder, chosen, tmp_path):
    url, sha256, _ = chosen
    assert main(["takedown", url, sha256, "--run", f"{folder}/run"]) == 0
    scratch = lab.copy(folder / "pool" / "fits", tmp_path / "scratch" / "pool" / "fits").parents[1]
    lab.copy(folder / "pool" / "takedowns", scratch / "pool" / "takedowns")
    lab.curate(scratch)
    assert lab.contents(folder) == lab.contents(scratch)
    for table in ("images", "detections"):
        before, after = (
            pd.concat(pd.read_parquet(part) for part in sorted((root / "pool" / table).rglob("*.parquet")))
            for root in (folder, scratch)
        )
        pd.testing.assert_frame_equal(before, after)


@pytest.mark.parametrize(
    "write", [7, *(pytest.param(number, marks=pytest.mark.matrix) for number in (2, 4, 10, 14, 18))]
)
def test_killed_in_the_middle_the_same_command_finishes_it(lab, folder, chosen, write):
    url, sha256, ids = chosen
    needles = traces(folder, ids)
    script = (
        "import os, signal, sys, curation.store as store\n"
        "left = [WRITE]\n"
        "def counted(real):\n"
        "    def write(self, path, *more):\n"
        "        if path != 'lease.json':\n"
        "            left[0] -= 1\n"
        "            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real(self, path, *more)\n"
        "    return write\n"
        "for name in ('create', 'replace', 'delete'):\n"
        "    setattr(store.LocalStore, name, counted(getattr(store.LocalStore, name)))\n"
        "from pipelines.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    ).replace("WRITE", str(write))
    arguments = ["takedown", url, sha256, "--run", f"{folder}/run"]
    command = [sys.executable, "-c", script, *arguments]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert killed.returncode == -9, killed.stdout + killed.stderr
    assert left_over(folder, needles)
    assert main(arguments) == 0
    assert left_over(folder, needles) == []
    assert verify_run(f"{folder}/run")[0] == []
    assert ends(folder, ids) == {("fetched", "taken_down")}
    assert lab.curate(folder).summary.num_jobs == 0


@pytest.mark.parametrize("kind", ["phash", "pdq"])
def test_a_hash_that_look_meets_leaves_the_pool_in_the_same_command(lab, folder, tmp_path, kind):
    """The rule was there before the picture: its bytes are fetched, because only look knows hashes."""
    pool = open_store(f"{folder}/pool")
    picture = pictures(folder).query("in_set and source == 'web'").iloc[0]
    ids, shard = {int(picture.image_id)}, int(picture.image_id) // 1_000_000
    needles = traces(folder, ids)
    (hashes,) = (folder / "pool" / "hashes").iterdir()
    looked = pd.read_parquet(hashes / f"part-{shard:09d}.parquet").set_index("image_id")
    row = looked.loc[picture.image_id]
    rule = rule_of(f"{row.phash:016x}" if kind == "phash" else row.pdq, kind=kind, radius_bits=0)
    put_rules(pool, [replace(rule, applied=True)], tmp_path)
    for table in ("hashes", "detections", "descriptors", "embeddings"):  # as if nobody had looked yet
        next((folder / "pool" / table).glob(f"*/part-{shard:09d}.parquet")).unlink()
    (folder / "run" / "safety" / f"part-{shard:09d}.parquet").unlink()
    assert lab.curate(folder).summary.costs["look"].num_jobs >= 1
    assert left_over(folder, needles) == []
    assert ends(folder, ids) == {("fetched", "taken_down")}
    assert verify_run(f"{folder}/run")[0] == []
    assert lab.curate(folder).summary.num_jobs == 0
