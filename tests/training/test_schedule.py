"""Schedules against dinov2's: arrays written here with numpy as that code builds them, and values that it computed."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.train import load_training_recipe
from training.config import Resolved, TrainRecipe, lay_over
from training.schedule import Schedules, cosine


def scheduler(base, final, total, warmup=0, start=0.0, freeze=0):
    """The array of dinov2's CosineScheduler."""
    iters = np.arange(total - warmup - freeze)
    tail = final + 0.5 * (base - final) * (1 + np.cos(np.pi * iters / len(iters)))
    return np.concatenate([np.zeros(freeze), np.linspace(start, base, warmup), tail])


GOLDEN = dict(np.load(Path(__file__).resolve().parents[1] / "golden" / "optim.npz"))  # see make_optim.py there
QUANTITIES = ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temperature")
RECIPES = {
    "short": {"lr": 0.004, "batch": 2048, "length": 125_000, "warmup": 12_500, "decay": (0.04, 0.4), "ema": 0.992},
    "vitl14": {"lr": 0.0002, "batch": 3072, "length": 625_000, "warmup": 100_000, "decay": (0.04, 0.2), "ema": 0.994},
}


def resolved(values: dict, **changes) -> Resolved:
    recipe = {
        "name": "x",
        "run": "x",
        "data": {"parts": {"a": {"kind": "folder", "location": "x"}}, "batch_size": values["batch"]},
        "optim": {"lr": values["lr"], "weight_decay": values["decay"]},
        "objective": {"ema_momentum": (values["ema"], 1.0)},
        "schedule": {"length": values["length"], "warmup": values["warmup"]},
    }
    return TrainRecipe.model_validate(lay_over(recipe, changes)).resolved("pretrain")


@pytest.mark.parametrize("name", RECIPES)
def test_all_values_are_those_of_dinov2(name):
    values = RECIPES[name]
    schedules = Schedules(resolved(values))
    length, lr = values["length"], values["lr"] * (values["batch"] / 1024) ** 0.5
    steps = [*range(0, length, 997), values["warmup"] - 1, values["warmup"], 37_499, 37_500, length - 1, 0]
    found = [schedules.at(step) for step in steps]
    wanted = {
        "lr": scheduler(lr, 1e-6, length, values["warmup"]),
        "weight_decay": scheduler(*values["decay"], length),
        "momentum": scheduler(values["ema"], 1.0, length),
        "teacher_temperature": np.concatenate([np.linspace(0.04, 0.07, 37_500), np.full(length - 37_500, 0.07)]),
    }
    for field, array in wanted.items():
        got = np.array([getattr(at, field) for at in found])
        assert np.abs(got - array[steps]).max() < 1e-12, field
    assert [schedules.at(step).last_layer_lr == 0 for step in (0, 1249, 1250)] == [True, True, False]


def test_published_values_of_the_short_recipe():
    schedules = Schedules(resolved(RECIPES["short"]))
    assert [round(schedules.at(step).lr, 8) for step in (0, 12_499, 12_500, 68_750)] == [
        0.0,
        0.00565685,
        0.00565685,
        0.00282893,
    ]
    assert schedules.at(124_999).lr == pytest.approx(1.0000011e-6, rel=1e-6)


def test_past_the_end_is_the_final_value_and_a_rate_of_zero_stays_zero():
    assert cosine(10, (1.0, 0.25), total=10) == 0.25
    off = Schedules(resolved(RECIPES["short"] | {"lr": 0.0}))
    assert {off.at(step).lr for step in (0, 20_000, 124_999)} == {0.0}


def test_samples_become_steps_and_a_small_batch_slows_the_teacher_less():
    values = {"lr": 0.001, "batch": 100, "length": 1000, "warmup": 250, "decay": (0.04, 0.04), "ema": 0.99}
    by_samples = resolved(values, schedule={"unit": "samples"}, objective={"ema_batch": 200})
    assert by_samples.num_steps == 10
    at = Schedules(by_samples).at(0)
    assert at.momentum == pytest.approx(0.99**0.5)
    assert [Schedules(by_samples).at(step).lr > 0 for step in (0, 1)] == [False, True]


def test_masks_begin_when_ibot_does():
    schedules = Schedules(resolved(RECIPES["short"], objective={"ibot": {"start": 5, "temperature": {"end": 0.1}}}))
    assert [schedules.at(step).is_masked for step in (4, 5)] == [False, True]
    assert schedules.at(100_000).patch_temperature == 0.1


@pytest.mark.parametrize("recipe", ["vitl16_short", "vitl14", "vitg14"])
def test_a_shipped_recipe_has_the_values_that_dinov2_computed_also_beyond_the_end(recipe):
    schedules = Schedules(load_training_recipe(recipe).resolved("pretrain"))
    at = [schedules.at(int(step)) for step in GOLDEN[f"steps/{recipe}"]]
    for quantity in QUANTITIES:
        ours = np.array([getattr(values, quantity) for values in at])
        assert np.abs(ours - GOLDEN[f"schedule/{recipe}/{quantity}"]).max() < 1e-12, quantity


def test_all_steps_of_the_short_recipe_add_up_to_those_that_dinov2_computed():
    config = load_training_recipe("vitl16_short").resolved("pretrain")
    schedules = Schedules(config)
    at = [schedules.at(step) for step in range(config.num_steps)]
    for quantity in QUANTITIES:
        ours = np.array([getattr(values, quantity) for values in at])
        sums = [ours.sum(), ours @ np.arange(len(ours))]
        assert sums == pytest.approx(GOLDEN[f"sums/vitl16_short/{quantity}"].tolist(), rel=1e-12), quantity


def test_the_rate_follows_the_batch_as_the_rule_says():
    peaks = {
        (rule, batch): Schedules(resolved(RECIPES["short"] | {"batch": batch}, optim={"lr_scaling": rule}))
        .at(12_499)
        .lr
        for rule, batch in (("sqrt", 4096), ("linear", 512), ("none", 512))
    }
    assert list(peaks.values()) == pytest.approx([0.008, 0.008, 0.004], abs=1e-15)
