"""Whole steps against those that dinov2 made on the same noise; see tests/golden/make_step.py."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.config import Resolved, TrainRecipe
from training.data.collate import Batch
from training.models.network import Network
from training.objective import Objective
from training.parallel import World
from training.schedule import Schedules
from training.step import TrainStep

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MADE: dict[str, Any] = runpy.run_path(str(GOLDEN / "make_step.py"))
WORLD = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


def resolved(variant: dict[str, Any]) -> Resolved:
    """The variant in our words."""
    dim, depth, num_heads = MADE["SHAPE"]
    head = {
        "num_prototypes": MADE["HEAD"]["K"],
        "hidden_dim": MADE["HEAD"]["hidden"],
        "bottleneck_dim": MADE["HEAD"]["bottleneck"],
    }
    recipe = {
        "name": "oracle",
        "run": "unused",
        "preset": "dinov2-released",
        "model": {
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
            "patch_px": MADE["PATCH_PX"],
            "image_px": MADE["GLOBAL_PX"],
        },
        "views": {"global_px": MADE["GLOBAL_PX"], "local_px": MADE["LOCAL_PX"], "num_locals": MADE["LOCALS"]},
        "objective": {
            "dino": {"head": head},
            "ibot": {"head": None if variant["is_tied"] else head},
            "koleo": {"weight": MADE["KOLEO_WEIGHT"]},
            "centering": "ema" if variant["centering"] == "centering" else "sinkhorn",
            "temperature": {"start": 0.04, "end": 0.07, "warmup": 4},
            "ema_momentum": [0.9, 1.0],
            "prototype_chunk": 5,
        },
        "data": {"parts": {"all": {"kind": "folder", "location": "unused"}}, "batch_size": MADE["BATCH"]},
        "optim": {
            "lr": variant["base_lr"],
            "weight_decay": [0.04, 0.4],
            "layer_decay": variant["layer_decay"],
            "patch_embed_lr": 0.2,
            "clip": variant["clip"],
        },
        "schedule": {"length": MADE["LENGTH"], "warmup": 2, "freeze_last_layer": 2},
        "parallel": {"device": "cpu"},
    }
    return TrainRecipe.model_validate(recipe).resolved("pretrain")


def network(config: Resolved) -> Network:
    """A network with the starting weights of the golden run."""
    made = Network(config.model, config.objective)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(MADE["start"](name, tuple(parameter.shape)))
    return made


def batch(step: int) -> Batch:
    """Crops and masks of a step of the golden run."""
    global_crops, local_crops, masks = MADE["crops"](step)
    size = MADE["BATCH"]
    return Batch(
        global_crops=global_crops,
        local_crops=local_crops,
        masks=masks,
        positions=torch.arange(size),
        keys=[str(i) for i in range(size)],
        bad=[],
        gram_crops=None,
        photometric=None,
    )


@pytest.fixture(scope="module", params=list(MADE["VARIANTS"]))
def run(request: pytest.FixtureRequest) -> tuple[TrainStep, list[dict[str, float]], dict[str, np.ndarray]]:
    """Our steps, what they recorded, and the golden values."""
    config = resolved(MADE["VARIANTS"][request.param])
    objective = Objective(config, network(config), network(config)).place(WORLD)
    training = TrainStep(config, objective, WORLD)
    schedules = Schedules(config)
    records = [training([batch(step)], schedules.at(step), step) for step in range(MADE["STEPS"])]
    return training, records, dict(np.load(GOLDEN / f"step_{request.param}.npz"))


def test_each_term_of_the_loss_is_that_of_dinov2_at_every_step(run):
    _, records, golden = run
    for step, record in enumerate(records):
        for name in ("dino", "dino_global", "dino_local", "ibot", "koleo"):
            expected = float(golden[f"{step}/{name}"])
            assert record[name] == pytest.approx(expected, rel=1e-5), f"{name} at step {step}"


def test_gradient_norm_of_each_submodule_is_that_of_dinov2_at_every_step(run):
    _, records, golden = run
    for step, record in enumerate(records):
        names = [key.split("/")[1] for key in golden if key.startswith(f"{step}/norm_")]
        assert {name for name in record if name.startswith("norm_")} == set(names)
        for name in names:
            assert record[name] == pytest.approx(float(golden[f"{step}/{name}"]), rel=1e-5), f"{name} at step {step}"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_every_weight_after_the_last_step_is_that_of_dinov2(run, side: str):
    training, _, golden = run
    ours = dict(getattr(training.objective, side).named_parameters())
    assert set(ours) == {key.split("/")[1] for key in golden if key.startswith(f"{side}/")}
    for name, parameter in ours.items():
        expected = MADE["start"](name, tuple(parameter.shape)) + torch.from_numpy(golden[f"{side}/{name}"]).float()
        difference = (parameter.detach() - expected).abs()
        if name.endswith("qkv.bias"):
            # The bias of keys has no gradient but rounding (softmax cancels it), which Adam blows up to full steps.
            queries, _, values = difference.chunk(3)
            difference = torch.cat([queries, values])
        assert difference.max() < 1e-5, name
