"""Training recipes and the commands around them; what they print when something is wrong."""

import json

import pytest

from pipelines.cli import main
from pipelines.recipe import TRAINING_RECIPES
from pipelines.train import load_training_recipe
from tests.training import small_training as small

NAMES = sorted(path.stem for path in TRAINING_RECIPES.glob("*.yaml"))


def test_all_recipes_of_the_readme_are_there():
    wanted = {"vits14_smoke", "vitl16_short", "vitl14", "vitg14", "vith16_in22k", "highres518", "distill"}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_for_every_stage_and_says_what_it_is(name, capsys):
    recipe = load_training_recipe(name)
    for stage in recipe.stages:
        assert recipe.resolved(stage).num_steps > 0
    assert main(["show", name]) == 0
    shown = capsys.readouterr().out
    for word in ("# Reproduces:", "# Command:", "# Hardware:", "stages:"):
        assert word in shown


def test_recipes_train_on_what_they_name_and_nothing_of_their_base():
    parts = {name: sorted(load_training_recipe(name).data.parts) for name in NAMES}
    assert parts["vith16_in22k"] == ["in22k"]
    assert parts["vitl14"] == parts["vitg14"] == parts["highres518"] == parts["distill"] == ["lvd"]
    resolved = load_training_recipe("vith16_in22k")
    assert load_training_recipe("highres518").model.ffn == load_training_recipe("vitl14").model.ffn
    assert resolved.model.ffn == "mlp"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("views.blur=strong", "key 'views.blur': got 'strong'; input should be 'released' or 'paper'"),
        ("views.global_px=55", "views.global_px 55 must be a multiple of model.patch_px 14"),
        ("stages.pretrain.changes.view.x=1", "stage 'pretrain' changes 'view'; allowed: model, views"),
        ("evaluation.image_px=100", "evaluation.image_px 100 must be a multiple of model.patch_px 14"),
        ("stages.pretrain.kind=gram", "objective.gram.weight is 0"),
        ("schedule.warmup=1000", "schedule.warmup 1000 must be at most schedule.length 300"),
        ("data.parts.smoke.location=nowhere", "nowhere"),
        ("data.micro_batch_size=5", "data.micro_batch_size 5 must divide the 32 pictures"),
        ("parallel.device=cuda", "parallel.device: got 'cuda', and torch sees no GPU here"),
        ("stages.pretrain.init.source=gone.pth", "got 'gone.pth', which is no file"),
    ],
)
def test_bad_configuration_is_one_line_and_exit_2(override, said, tmp_path, capsys):
    tars = tmp_path / "tars"
    small.write_tars(tars, num_tars=1, per_tar=8)
    values = [f"run={tmp_path}/run", "data.parts.smoke.kind=tars", f"data.parts.smoke.location={tars}/*.tar"]
    values += ["evaluation.sets={}", "data.num_workers=0", "data.batch_size=32"]
    assert main(["train", "vits14_smoke", *values, override]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert said in error


def test_a_network_is_exported_and_measured(tmp_path, capsys):
    tars, run = tmp_path / "tars", tmp_path / "run"
    small.write_tars(tars)
    path = small.write_recipe(tmp_path / "small.yaml", tars, run, schedule={"length": 2})
    assert main(["train", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["stages"]["pretrain"]["num_steps"] == 2
    weights = str(run / "network.safetensors")
    for to, out in (("timm", "timm.safetensors"), ("hub", "hub.pth"), ("hf", "hf")):
        assert main(["export", weights, "--to", to, "--out", str(tmp_path / out)]) == 0
        assert (tmp_path / out).exists()
    capsys.readouterr()
    assert main(["eval", weights, "--kind", "tars", "--data", f"{tars}/*.tar", "--label", "label", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= found["knn_set"] <= 1
