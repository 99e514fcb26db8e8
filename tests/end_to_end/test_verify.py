"""Copies verified by local features in a whole run: planted copies against pictures that were drawn apart."""

import json

import pandas as pd
import pytest

from curation.query import connect, run_checks
from curation.schema import UNDER_WAY

pytestmark = pytest.mark.slow

# Pairs whose local features agree, and whom the two derive from.
AGREE = """
    SELECT coalesce(ta.base_line, ta.line) AS base, coalesce(tb.base_line, tb.line) AS other, e.similarity
    FROM edges e
    JOIN urls a ON a.image_id = e.a JOIN truth ta ON ta.line = a.line
    JOIN urls b ON b.image_id = e.b JOIN truth tb ON tb.line = b.line
    WHERE e.verified
"""


def test_verified_copies_derive_from_one_picture(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    # near and the cosine find hardly any copy here: local features have to.
    settings = ("near.radius_bits=0", "edges.floor=0.9", "duplicates.threshold=0.95")
    settings += ("edges.verify=sift", "edges.verify_nearest=20")
    lab.curate(folder, *settings)
    state = json.loads((folder / "run" / "state.json").read_text())
    connection = connect(folder / "pool", folder / "run", state["folders"], set(state["sources"].values()))
    connection.register("truth", pd.read_parquet(lab.web / "truth.parquet"))
    agree = connection.execute(AGREE).df()
    assert len(agree) >= 8
    # The photographs of this web are cut from a few large ones, and some cuts overlap.
    assert (agree.base == agree.other).mean() > 0.9
    assert agree.similarity.min() < 0.9
    (gone,) = connection.execute("SELECT count(*) FROM duplicates WHERE NOT keep").fetchone()
    assert gone >= 8
    assert run_checks(connection) == {}
    assert not [path for table in UNDER_WAY for path in (folder / "run").glob(f"{table}/*")]

    again = lab.curate(folder, *settings)
    assert not again.summary.costs
