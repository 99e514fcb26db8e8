"""Registration as a command does it: which files were read is kept in the pool, and is no more than a shortcut."""

import json
import os

import pytest

from curation.ingest.sources import read_lines
from curation.store import open_store
from pipelines.curate import CurateRecipe
from pipelines.registration import register_sources


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Registers the list of a recipe; how many files were read for it."""
    listed = tmp_path / "a.txt"
    listed.write_text("".join(f"http://a.test/{n}.jpg\n" for n in range(25)))
    os.utime(listed, (1e9, 1e9))
    recipe = CurateRecipe.model_validate(
        {
            "name": "x",
            "pool": str(tmp_path / "pool"),
            "run": str(tmp_path / "run"),
            "shard_rows": 10,
            "sources": {"a": {"kind": "list", "location": str(listed)}},
        }
    )
    read = []
    monkeypatch.setattr("curation.ingest.register.read_lines", lambda config: read.append(1) or read_lines(config))
    (tmp_path / "scratch").mkdir()

    def register(unregistered=None):
        read.clear()
        pool = open_store(recipe.pool)
        sources = register_sources(recipe, pool, tmp_path / "scratch", unregistered, lambda text: None)
        assert sources["num_rows"].to_pylist() == [25]
        return len(read)

    return register


def test_a_second_command_reads_no_list(registered, tmp_path):
    assert registered() == 1
    assert set(json.loads((tmp_path / "pool/sources.json").read_text())) == {"a"}
    assert registered() == 0


def test_a_dry_run_keeps_nothing(registered, tmp_path):
    assert registered(unregistered=[]) == 1
    assert not (tmp_path / "pool/sources.json").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[]", b'{"a": 5}', b"\xff"])
def test_damage_costs_a_reading(registered, tmp_path, damage):
    registered()
    (tmp_path / "pool/sources.json").write_bytes(damage)
    assert registered() == 1
    assert registered() == 0
