"""The whole pipeline on the small web: what it ends in, that it does nothing twice, and what a new user sees."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import webdataset

from pipelines.cli import main
from pipelines.results import opened, score_run, verify_run

pytestmark = pytest.mark.slow


def test_every_line_ends_as_the_truth_says(lab, undisturbed):
    with opened(f"{undisturbed}/run") as database:
        score = score_run(database)
    assert not score.contacts
    assert score.base_kept >= 0.99
    assert score.overall >= 0.99


def test_every_check_returns_no_row(lab, undisturbed):
    from curation.query import run_checks

    with opened(f"{undisturbed}/run") as database:
        assert run_checks(database.connection) == {}


def test_at_least_eight_shards_and_three_query_sets(undisturbed):
    assert len(list((undisturbed / "run" / "leakage").glob("*.parquet"))) == 8
    parts = pd.read_parquet(undisturbed / "run" / "manifest").part
    assert set(parts) == {"as_is", "sample", "cluster"}


def test_tars_are_read_by_webdataset_and_by_the_manifest(undisturbed):
    manifest = pd.read_parquet(undisturbed / "run" / "manifest").set_index("key")
    tars = sorted(str(path) for path in (undisturbed / "run" / "tars").glob("*.tar"))
    assert len(tars) >= 2
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert sorted(sample["__key__"] for sample in samples) == sorted(manifest.index)
    for sample in samples:
        row = manifest.loc[sample["__key__"]]
        lineage = json.loads(sample["json"])
        assert lineage["sha256"] == row.sha256
        data = (undisturbed / "run" / row.tar).read_bytes()[row.offset : row.offset + row["size"]]
        assert sample[row.ext] == data
    problems, num_samples = verify_run(f"{undisturbed}/run")
    assert (problems, num_samples) == ([], len(manifest))


def test_the_second_command_does_nothing_and_starts_no_ray(lab, undisturbed):
    before = lab.digests(undisturbed)
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.cli", "curate", "smoke"]
    command += lab.overrides(undisturbed, "execution.executor=auto")
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "nothing to do: all" in result.stdout
    for heavy in ("ray", "torch", "cv2", "onnxruntime", "faiss", "numba"):
        assert f"| {heavy}\n" not in result.stderr, f"{heavy} was imported"
    assert lab.digests(undisturbed) == before


def test_commands_that_look_at_a_run(undisturbed, capsys):
    run = f"{undisturbed}/run"
    for arguments in (
        ["status", "--run", run],
        ["funnel", "--run", run],
        ["funnel", "--run", run, "--json"],
        ["sql", "reasons", "--run", run],
        ["sql", "composition", "--run", run, "--json"],
        ["verify", "--run", run],
        ["report", "--run", run],
        ["clean", "--run", run],
    ):
        assert main(arguments) == 0, arguments
    output = capsys.readouterr().out
    assert "near_duplicate" in output
    assert "0 problems" in output
    assert "0 objects removed" in output
    image = pd.read_parquet(f"{run}/manifest").image_id[0]
    assert main(["explain", str(image), "--run", run]) == 0
    assert str(image) in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "curate" in result.stdout
    for heavy in ("pyarrow", "pydantic", "numpy", "ray", "torch"):
        assert f"| {heavy}\n" not in result.stderr, f"{heavy} was imported"
