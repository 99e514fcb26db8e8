"""From tars to a teacher that the curation side opens by name."""

import pandas as pd
import pytest
import yaml

from curation.backbones import BackboneConfig, open_backbone
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


def test_a_teacher_of_the_tars_is_an_embedder(undisturbed, tmp_path, capsys):
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
    backbone = open_backbone(BackboneConfig(name=f"checkpoint:{run}/teacher.safetensors"))
    assert (backbone.dim, backbone.size_px) == (48, 56)
