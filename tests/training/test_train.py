"""Whole runs: stages, resume, ranks. Sizes are tiny; everything else is what a user runs."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.training import small_training as small
from training.config import ConfigError, TrainRecipe
from training.train import train


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    small.write_tars(folder)
    return folder


def quietly(recipe: TrainRecipe) -> list[str]:
    lines: list[str] = []
    torch.set_num_threads(1)
    train(recipe, lines.append)
    return lines


def network(run, stage="pretrain"):
    return load_file(run / stage / "network.safetensors")


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_run_leaves_a_teacher_that_timm_loads_and_a_plot(tars, tmp_path):
    lines = quietly(small.recipe(tars, tmp_path / "run"))
    stage = tmp_path / "run" / "pretrain"
    with safe_open(str(stage / "teacher.safetensors"), framework="pt") as file:
        about = file.metadata()
    model = timm.create_model(about["architecture"], **json.loads(about["model_args"]))
    model.load_state_dict(load_file(stage / "teacher.safetensors"))
    assert (stage / "plot.png").stat().st_size > 5_000
    assert (tmp_path / "run" / "teacher.safetensors").is_file()
    steps = small.steps_of(stage / "log.jsonl")
    assert [record["step"] for record in steps] == list(range(8))
    assert any("48 pictures" in line for line in lines)
    assert any("done before" in line for line in quietly(small.recipe(tars, tmp_path / "run")))


def test_the_network_that_measured_best_is_kept_and_is_the_same_after_a_kill(tars, tmp_path):
    sets = {"made": {"train": {"kind": "tars", "location": f"{tars}/*.tar"}}}
    recipe = small.recipe(tars, tmp_path / "run", evaluation={"sets": sets, "every": 1}, checkpoint={"every": 4})
    quietly(recipe)
    stage = tmp_path / "run" / "pretrain"
    measured = {record["step"] + 1: record["knn_made"] for record in small.steps_of(stage / "log.jsonl")}
    best = json.loads((stage / "best" / "record.json").read_text())
    first = min(step for step, knn in measured.items() if knn == max(measured.values()))
    assert best == {"num_steps": first, "knn": measured[first]}
    weights = network(tmp_path / "run", "pretrain/best")
    if best["num_steps"] == 8:
        assert_equal(weights, network(tmp_path / "run"))
    (stage / "done.json").unlink()
    (stage / "checkpoints" / "step-00000008" / ".metadata").unlink()  # as if killed after step 4
    quietly(recipe)
    assert json.loads((stage / "best" / "record.json").read_text()) == best
    assert_equal(network(tmp_path / "run", "pretrain/best"), weights)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_ends_as_one_that_was_not(tars, tmp_path, num_workers):
    # 48 pictures, 8 a step: six steps an epoch; two micro-batches a step; checkpoints every three steps
    changes = {
        "data": {"num_workers": num_workers, "micro_batch_size": 4},
        "model": {"drop_path": 0.2},
        "schedule": {"length": 14},
        "checkpoint": {"background": num_workers == 2},
    }
    quietly(small.recipe(tars, tmp_path / "straight", **changes))
    path = small.write_recipe(tmp_path / "killed.yaml", tars, tmp_path / "killed", **changes)
    log = tmp_path / "killed" / "pretrain" / "log.jsonl"
    small.kill_after(path, log, 5)
    small.run_cli(path)
    assert_equal(network(tmp_path / "straight"), network(tmp_path / "killed"))
    told = [[(r["step"], r["samples"], r["dino"]) for r in small.steps_of(p)]
            for p in (log, tmp_path / "straight" / "pretrain" / "log.jsonl")]  # fmt: skip
    assert told[0] == told[1]


def test_another_recipe_or_another_set_is_refused_by_name(tars, tmp_path):
    run = tmp_path / "run"
    quietly(small.recipe(tars, run))
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.002, is 0\.001"):
        quietly(small.recipe(tars, run, optim={"lr": 0.001}))
    begun_with = run / "pretrain" / "recipe.json"
    values = json.loads(begun_with.read_text())
    del values["model"]["stem"]  # of a version that had no such key
    begun_with.write_text(json.dumps(values))
    quietly(small.recipe(tars, run))
    other = tmp_path / "tars"
    small.write_tars(other)
    small.write_tars(tmp_path / "more", num_tars=1, per_tar=5)
    begun = small.recipe(other, tmp_path / "begun")
    quietly(begun)
    (tmp_path / "begun" / "pretrain" / "done.json").unlink()
    (tmp_path / "more" / "000.tar").replace(other / "001.tar")
    with pytest.raises(ConfigError, match=r"001\.tar"):
        quietly(begun)


def test_a_finished_run_of_other_pictures_is_not_taken_for_done(tmp_path):
    small.write_tars(tmp_path / "tars")
    recipe = small.recipe(tmp_path / "tars", tmp_path / "run", schedule={"length": 2})
    quietly(recipe)
    small.write_tars(tmp_path / "tars", num_tars=4)
    with pytest.raises(ConfigError, match=r"003\.tar was added"):
        quietly(recipe)


def test_a_run_killed_before_it_said_that_it_was_done_still_says_what_it_measured(tars, tmp_path):
    recipe = small.recipe(tars, tmp_path / "run", schedule={"length": 2})
    quietly(recipe)
    done = tmp_path / "run" / "pretrain" / "done.json"
    before = json.loads(done.read_text())["record"]
    done.unlink()
    quietly(recipe)
    assert json.loads(done.read_text())["record"] == before


def test_micro_batches_change_nothing(tars, tmp_path):
    for micro in (8, 2):
        quietly(small.recipe(tars, tmp_path / str(micro), data={"micro_batch_size": micro}))
    one, four = (small.steps_of(tmp_path / name / "pretrain" / "log.jsonl") for name in ("8", "2"))
    for first, second in zip(one, four, strict=True):
        for term in ("dino", "ibot", "koleo"):
            assert first[term] == pytest.approx(second[term], abs=1e-5), (first["step"], term)
    whole, cut = network(tmp_path / "8"), network(tmp_path / "2")
    for name, tensor in whole.items():
        assert torch.allclose(tensor, cut[name], atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "ranks"),
    [
        pytest.param("ddp", 2, marks=pytest.mark.matrix),
        ("fsdp", 2),
        pytest.param("fsdp", 4, marks=pytest.mark.matrix),
        pytest.param("hsdp", 4, marks=pytest.mark.matrix),
    ],
)
def test_ranks_agree_with_one_process(tars, tmp_path, mode, ranks):
    changes = {"schedule": {"length": 4}, "model": {"stem": "conv"}}
    quietly(small.recipe(tars, tmp_path / "one", **changes))
    shard = {"shard_size": 2} if mode == "hsdp" else {}
    parallel = {"parallel": {"mode": mode, **shard}}
    small.run_cli(small.write_recipe(tmp_path / "many.yaml", tars, tmp_path / "many", **changes, **parallel), ranks)
    for name, tensor in network(tmp_path / "one").items():
        assert torch.allclose(tensor, network(tmp_path / "many")[name], atol=1e-5), name


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_goes_on_on_one_and_then_on_two(tars, tmp_path):
    quietly(small.recipe(tars, tmp_path / "one"))
    path, run = tmp_path / "many.yaml", tmp_path / "many"
    for length, ranks in ((3, 4), (6, 1), (8, 2)):
        # The schedule is that of eight steps all along; a run is cut short by stop_after.
        changes = {"checkpoint": {"stop_after": length}, "parallel": {"mode": "fsdp"}}
        small.run_cli(small.write_recipe(path, tars, run, **changes), ranks)
    for name, tensor in network(tmp_path / "one").items():
        assert torch.allclose(tensor, network(run)[name], atol=1e-5), name


@pytest.mark.slow
def test_stages_follow_each_other(tars, tmp_path):
    recipe = small.recipe(
        tars,
        tmp_path / "run",
        model={"stem": "conv"},
        stages={
            "pretrain": {},
            "gram": {"kind": "gram", "changes": {"objective": {"gram": {"weight": 1.0, "start": 2, "refresh": 3}}}},
            "highres": {"kind": "highres", "changes": {"views": {"global_px": 48}, "model": {"image_px": 48}}},
            "distill": {"kind": "distill", "changes": {"model": {"dim": 16, "image_px": 32, "stem": "linear"}}},
            "features": {
                "kind": "distill",
                "distill": {"mode": "feature", "teacher": str(tmp_path / "run" / "highres" / "network.safetensors")},
                "changes": {"model": {"dim": 16, "image_px": 32, "stem": "linear"}},
            },
        },
    )
    lines = quietly(recipe)
    assert any("4 x 4 to 6 x 6" in line for line in lines), lines
    assert any("output_momentum 0.999 leaves 99% of the first weights" in line for line in lines), lines
    # A network without heads, and a bare backbone, are teachers of features too.
    for name, teacher in (
        ("headless", "features/network.safetensors"),
        ("ours", "highres/teacher.safetensors"),
        ("timm", "distill/teacher.safetensors"),
    ):
        stage = {"kind": "distill", "distill": {"mode": "feature", "teacher": str(tmp_path / "run" / teacher)}}
        quietly(small.recipe(tars, tmp_path / name, stages={"distill": stage}, schedule={"length": 2}))
    terms = [set(small.steps_of(tmp_path / "run" / name / "log.jsonl")[-1]) for name in recipe.stages]
    assert "gram" in terms[1]
    assert "feature" in terms[4]
    assert network(tmp_path / "run", "distill")["backbone.cls_token"].shape[-1] == 16


@pytest.mark.matrix
def test_a_rank_that_dies_is_started_again_and_ends_as_one_that_did_not(tars, tmp_path):
    changes = {"schedule": {"length": 12}, "parallel": {"mode": "fsdp"}}
    path = small.write_recipe(tmp_path / "straight.yaml", tars, tmp_path / "straight", **changes)
    small.run_cli(path, 2)
    path = small.write_recipe(tmp_path / "killed.yaml", tars, tmp_path / "killed", **changes)
    small.kill_a_rank_after(path, tmp_path / "killed" / "pretrain" / "log.jsonl", 5)
    assert_equal(network(tmp_path / "straight"), network(tmp_path / "killed"))


# Bad pictures


def test_an_empty_or_a_cut_off_tar_is_named(tars, tmp_path):
    (tmp_path / "empty").mkdir()
    small.write_tars(tmp_path / "empty", num_tars=1, per_tar=0)
    with pytest.raises(ConfigError, match=r"empty"):
        quietly(small.recipe(tmp_path / "empty", tmp_path / "run"))
    cut = tmp_path / "cut"
    small.write_tars(cut, num_tars=1)
    whole = (cut / "000.tar").read_bytes()
    (cut / "000.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"000\.tar.*the file ends at byte"):
        quietly(small.recipe(cut, tmp_path / "run2"))


def test_a_bad_picture_is_named_and_another_takes_its_place(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02d}.jpg").write_bytes(small.picture(index))
    (folder / "03.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (folder / "05.jpg").write_bytes(b"")
    data = {"parts": {"made": {"kind": "folder", "location": str(folder)}}}
    quietly(small.recipe(tmp_path, tmp_path / "run", data=data))
    bad = (tmp_path / "run" / "pretrain").rglob("*.jsonl")
    text = "".join(path.read_text() for path in bad)
    assert "03.jpg" in text
    assert "05.jpg" in text
