"""From tars to a teacher that the curation side opens by name."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines.cli import main
from pipelines.held_out import write_held_out

pytestmark = pytest.mark.slow


def test_held_out_pictures_are_kept_and_not_chosen(undisturbed):
    path = write_held_out(f"{undisturbed}/run")
    found = pd.read_parquet(path)
    path.unlink()
    assert not set(found.key.astype(int)) & set(pd.read_parquet(undisturbed / "run" / "manifest").image_id)
    assert found.scene.notna().all()
    assert found.scene.value_counts().max() <= 30
    assert (found.image.str.len() > 100).all()


def test_a_teacher_of_the_tars_embeds_the_pool_it_came_from(lab, undisturbed, tmp_path, capsys):
    """lvd curate, lvd train on its tars, lvd curate again with the teacher by name: only what follows is made."""
    run = tmp_path / "train"
    values = ["model.depth=2", "model.dim=48", "model.num_heads=2", "data.batch_size=8", "data.num_workers=0"]
    values += ["schedule.length=3", "schedule.warmup=1", "parallel.threads=1", f"run={run}"]
    values += [f"data.parts.smoke.location={undisturbed}/run"]
    values += [
        f"evaluation.sets.scenes.{part}.location={undisturbed}/run/held_out.parquet" for part in ("train", "test")
    ]
    assert main(["train", "vits14_smoke", *values]) == 0
    shown = capsys.readouterr().out
    (undisturbed / "run" / "held_out.parquet").unlink()
    assert "step       3 of 3" in shown
    assert "knn_scenes" in shown
    assert "next      lvd curate smoke embed.name=checkpoint:" in shown
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["dim"] == 48

    lab.copy(undisturbed / "pool", tmp_path / "pool")
    name = f"checkpoint:{run}/teacher.safetensors"
    # To a network of three steps all pictures mean nearly the same.
    asked = [*lab.overrides(tmp_path, f"embed.name={name}", "semdedup.eps=null"), "--json"]
    assert main(["curate", "smoke", *asked]) in (0, 1)  # 1: the score may be short on so few urls
    told = capsys.readouterr()
    (line,) = [line.split() for line in told.err.splitlines() if line.startswith("  embed ") and "->" in line]
    assert line[:8] == ["embed", "checkpoint", "56", "px", "->", "48", "fp32", "cpu"]
    done = json.loads(told.out.splitlines()[-1])["costs"]
    assert not set(done) & {"fetch", "look", "fit_descriptor", "describe", "fit_quantiser"}  # the pool has them
    assert {"embed", "cluster", "neighbours", "selection", "export"} <= set(done)

    folders = sorted(path.name for path in (tmp_path / "pool" / "embeddings").iterdir())
    assert [folder.rpartition("-")[0] for folder in folders] == ["checkpoint", "hog-thumb"]
    parts = [pd.read_parquet(tmp_path / "pool" / "embeddings" / folder) for folder in folders]
    assert sorted(parts[0].image_id) == sorted(parts[1].image_id)
    vectors = np.stack(parts[0].vector)
    assert (vectors.shape[1], vectors.dtype) == (48, np.float16)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(float), axis=1), 1, atol=2e-3)
    before, after = (pd.read_parquet(folder / "run" / "manifest") for folder in (undisturbed, tmp_path))
    assert len(after) > 50
    assert set(before.image_id) != set(after.image_id)
    for verdict in ("safety", "near", "duplicates", "leakage"):  # the same pictures came as far
        assert pd.read_parquet(undisturbed / "run" / verdict).equals(pd.read_parquet(tmp_path / "run" / verdict))
