"""Semantic deduplication in a whole run: planted copies that the earlier verdicts are told to let through."""

import json

import pandas as pd
import pytest

from curation.query import connect, run_checks

pytestmark = pytest.mark.slow

WEAK = ("near.radius_bits=0", "edges.floor=0.5", "duplicates.threshold=0.9")
# Of each picture that went: its line and whom it derives from, those of the picture that stays, and the score.
GONE = """
    SELECT s.image_id, t.line, t.base_line, kept.line AS kept_line, kept.base_line AS kept_base_line,
        e.reason, e.score, e.threshold
    FROM end_state e
    JOIN semantic s USING (image_id)
    JOIN truth t ON t.line = e.line
    JOIN urls u ON u.image_id = s.representative_id
    JOIN truth kept ON kept.line = u.line
    WHERE e.stage = 'semantic'
"""


def opened(lab, folder):
    state = json.loads((folder / "run" / "state.json").read_text())
    connection = connect(folder / "pool", folder / "run", state["folders"], set(state["sources"].values()))
    connection.register("truth", pd.read_parquet(lab.web / "truth.parquet"))
    return connection


def test_planted_copies_go_for_the_picture_that_they_derive_from(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    lab.curate(folder, *WEAK, "semdedup.eps=0.25")
    connection = opened(lab, folder)
    gone = connection.execute(GONE).df()
    assert len(gone) >= 4
    for row in gone.to_dict("records"):
        family = {row["line"] if pd.isna(row["base_line"]) else row["base_line"]}
        assert family == {row["kept_line"] if pd.isna(row["kept_base_line"]) else row["kept_base_line"]}
        assert row["reason"] == "semantic_duplicate"
        assert row["score"] > row["threshold"] == 0.75
    manifest = pd.read_parquet(folder / "run" / "manifest")
    assert not set(manifest.image_id) & set(gone.image_id)
    assert run_checks(connection) == {}

    costs = lab.curate(folder, *WEAK, "semdedup.eps=null").summary.costs
    assert not set(costs) & {"semantic_duplicates", "embed", "cluster", "fit_kmeans"}
    connection = opened(lab, folder)
    assert connection.execute("SELECT bool_and(keep) FROM semantic").fetchone() == (True,)
    assert not list((folder / "run").glob("semantic_*/*.parquet"))
    assert set(gone.image_id) <= set(connection.execute("SELECT image_id FROM selection").df().image_id)
    assert run_checks(connection) == {}
