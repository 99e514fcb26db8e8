"""Block lists and the PCA hash on the whole pipeline: what they redo, what they leave alone, what is told of them."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipelines.cli import main
from pipelines.preflight import Options
from pipelines.session import curate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def table(folder: Path, root: str, name: str) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted((folder / root / name).rglob("*.parquet"))])


def test_a_block_list_drops_what_it_names_and_redoes_nothing_that_looks(lab, undisturbed, tmp_path, capsys: Any):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    hashes = table(folder, "pool", "hashes").set_index("image_id")
    web = table(folder, "run", "safety").query("keep and image_id >= 0").join(hashes.pdq_quality, on="image_id")
    in_set = set(table(folder, "run", "manifest").query("source == 'web'").image_id)
    by_bytes, by_look = [int(i) for i in web[web.image_id.isin(in_set) & (web.pdq_quality >= 50)].image_id[:2]]
    (tmp_path / "bytes.txt").write_text(f"# ours\n{hashes.sha256[by_bytes]}\n")
    near = int(hashes.pdq[by_look], 16) ^ ((1 << 20) - 1)
    (tmp_path / "look.csv").write_text(f"{near:064x},100,known\n")
    lists = [
        f"safety.blocked_sha256_files=[{tmp_path}/bytes.txt]",
        f"safety.blocked_pdq_files=[{tmp_path}/look.csv]",
    ]
    said: list[str] = []
    outcome = curate(lab.recipe(folder, *lists), Options(), said.append)
    assert any("stale: safety.blocked_pdq." in line and line.startswith("  safety ") for line in said)
    assert not set(outcome.summary.costs) & {"screened", "fetch", "fetched", "look", "fit_descriptor"}
    judged = table(folder, "run", "safety").set_index("image_id")
    assert judged.reason[by_bytes] == "blocked_sha256"
    assert (judged.reason[by_look], judged.score[by_look], judged.threshold[by_look]) == ("blocked_pdq", 20, 31)
    assert not {by_bytes, by_look} & set(table(folder, "run", "manifest").image_id)
    assert lab.curate(folder, *lists).summary.num_jobs == 0

    capsys.readouterr()
    assert main(["explain", str(by_look), "--run", f"{folder}/run"]) == 0
    shown = capsys.readouterr().out
    assert "dropped: blocked_pdq  (score 20, threshold 31)" in shown
    assert f"{hashes.pdq[by_look]}, quality {int(hashes.pdq_quality[by_look])}" in shown
    for command in (["funnel"], ["sql", "reasons"]):
        assert main([*command, "--run", f"{folder}/run"]) == 0
        shown = capsys.readouterr().out
        assert "blocked_sha256" in shown
        assert "blocked_pdq" in shown
    assert main(["card", f"{folder}/run"]) == 0
    card = (folder / "run" / "card.json").read_text()
    assert "PDQ at most 31 bits from one of 1 blocked ones" in card
    assert "but the sha256 and PDQ hashes that the recipe brings" in card


def test_the_pca_hash_is_made_where_it_is_asked_for_and_of_new_rows_only(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    assert len(table(folder, "pool", "pca_hashes")) == 0
    asked = "near.hash=pca_hash"
    outcome = lab.curate(folder, asked, until="pca_hash")
    assert set(outcome.summary.costs) == {"fit_pca_hash", "pca_hash"}
    safe = table(folder, "run", "safety").query("keep")
    made = table(folder, "pool", "pca_hashes").set_index("image_id")
    pool = safe[safe.image_id.isin(table(folder, "run", "near").image_id)]
    assert sorted(made.index) == sorted(pool.image_id)
    assert made.pca_hash.nunique() > 20
    # Equal bytes have equal codes.
    assert (made.groupby("sha256").pca_hash.nunique() == 1).all()
    assert lab.curate(folder, asked, until="pca_hash").summary.num_jobs == 0

    more = lab.curate(folder, asked, "safety.min_shortest_px=8", until="pca_hash").summary.costs
    assert set(more) == {"safety", "pca_hash"}
    again = table(folder, "pool", "pca_hashes").set_index("image_id")
    assert more["pca_hash"].num_rows == len(again) - len(made) >= 1
    assert again.pca_hash[made.index].equals(made.pca_hash)
