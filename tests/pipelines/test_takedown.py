from pathlib import Path
from typing import Any

import pytest

from curation.export.export import ExportConfig
from curation.ingest.takedown import known_rules
from curation.lease import Lease
from pipelines.cli import main
from pipelines.takedown import Request, lines_of, takedown
from training.config import ConfigError

FIRST, SECOND = 3_000_000_000_000, 3_000_001_000_000
URL = f"http://H0.test/web/{FIRST}.jpg"


@pytest.fixture
def run(small_run: Any) -> str:
    small_run.export(ExportConfig(samples_per_tar=4))
    return str(small_run.run)


def test_a_dry_run_names_the_pictures_and_their_copies_and_does_nothing(run: str, small_run: Any, capsys: Any):
    before = {path: small_run.store("pool").tag(path) for path in small_run.store("pool").list("")}
    assert main(["takedown", URL, "--run", run, "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"list      2 rules in {small_run.pool}, 2 of them new"
    assert shown[1] == "pictures  1 of this run would go, 1 of them in the set"
    assert shown[2].split() == [str(FIRST), f"http://h0.test/web/{FIRST}.jpg", "(web,", "in", "the", "set)"]
    assert shown[3].startswith("copies    1 copy of these would stay and may take the place")
    assert str(FIRST + 4) in shown[4]
    assert shown[-1].startswith("nothing was done")
    assert {path: small_run.store("pool").tag(path) for path in small_run.store("pool").list("")} == before


def test_a_picture_with_two_samples_is_told_once(small_run: Any):
    small_run.take_twice(in_manifest=False)
    small_run.export(ExportConfig(samples_per_tar=4))
    found = takedown(str(small_run.run), Request(entries=[f"{SECOND:016x}"], radius_bits=0, dry_run=True), print)
    assert [row["image_id"] for row in found.pictures] == [SECOND]
    assert found.num_elsewhere == 0


def test_bad_entries_are_one_line_before_any_work(run: str, small_run: Any, tmp_path: Path, capsys: Any):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{URL}\nnonsense\n")
    assert main(["takedown", str(listed), "--run", run]) == 2
    assert "list.txt line 2: 'nonsense' is no http address" in capsys.readouterr().err
    assert main(["takedown", "ab" * 32, "--kind", "phash", "--run", run]) == 2
    assert "is no phash: a pHash has 16 hex digits" in capsys.readouterr().err
    assert main(["takedown", "ab" * 8, "--kind", "pdq", "--run", run]) == 2
    assert "is no pdq: a PDQ has 64 hex digits" in capsys.readouterr().err
    assert known_rules(small_run.store("pool")) == []


def test_a_living_driver_is_waited_for(run: str, small_run: Any, tmp_path: Path):
    lease = Lease(small_run.store("pool"), tmp_path)
    try:
        with pytest.raises(ConfigError, match="works on it"):
            takedown(run, Request(entries=[URL]), print)
    finally:
        lease.release()
    assert known_rules(small_run.store("pool")) == []


def test_pages_that_hold_pictures_go_and_a_run_that_cannot_follow_says_so(run: str, small_run: Any):
    for page in ("report.html", "held_out.parquet"):
        (small_run.run / page).write_text("pictures")
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"the pool is purged, but run .* has lost its recipe.yaml"):
        takedown(run, Request(entries=[URL]), said.append)
    assert said[0].startswith("takedown: 1 picture taken out of the pool;")
    assert not (small_run.run / "report.html").exists()
    assert not (small_run.run / "held_out.parquet").exists()
    assert small_run.read("images", 3_000_000)[0]["reason"] == "taken_down"


def test_a_picture_that_its_pdq_names_goes(small_run: Any):
    small_run.change("hashes", 3_000_001, 0, pdq="0f" * 32, pdq_quality=90)
    request = Request(entries=["0f" * 31 + "00"], kind="pdq", dry_run=True)
    assert [row["image_id"] for row in takedown(str(small_run.run), request, print).pictures] == [SECOND]


def test_a_run_without_tars_is_left_to_its_next_command(small_run: Any):
    found = takedown(str(small_run.run), Request(entries=[f"{SECOND:016x}"], radius_bits=0), print)
    assert [row["image_id"] for row in found.pictures] == [SECOND]
    assert not found.followed
    assert found.purged.image_ids == {SECOND}
    text = "\n".join(lines_of(found, str(small_run.run), dry_run=False))
    assert "has no tars yet" in text
    assert "other runs over this pool" in text
