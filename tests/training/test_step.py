"""One step on batches made here: what must not move, what must stay finite, what may be switched off."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.training import small_training as small
from training.config import lay_over
from training.data.collate import Batch
from training.parallel import World
from training.schedule import Schedules
from training.step import TrainStep
from training.train import Stage

torch.set_num_threads(1)
WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def build(tmp_path: Path, **changes) -> tuple[TrainStep, Schedules]:
    recipe = small.recipe(tmp_path, tmp_path / "run", **lay_over({"schedule": {"warmup": 0}}, changes))
    stage = Stage(recipe, "pretrain", WORLD, print, previous=None)
    return stage.build(), Schedules(stage.resolved)


def batch(num: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    blobs = [
        F.interpolate(torch.rand(num * n, 3, 4, 4, generator=generator) * 255, size=side)
        for n, side in ((2, 32), (2, 16))
    ]
    return Batch(
        global_crops=blobs[0].byte(),
        local_crops=blobs[1].byte(),
        masks=torch.rand(2 * num, 16, generator=generator) < 0.3,
        positions=torch.arange(num),
        keys=[str(i) for i in range(num)],
        bad=[],
    )


def weights(training: TrainStep) -> dict[str, torch.Tensor]:
    modules = {"student": training.objective.student, "teacher": training.objective.teacher}
    return {f"{role}.{name}": t.clone() for role, m in modules.items() for name, t in m.state_dict().items()}


def test_a_nan_picture_moves_nothing(tmp_path):
    training, schedules = build(tmp_path, objective={"centering": "ema"})
    training([batch()], schedules.at(1), 0)
    before, centers = weights(training), training.objective.centers()
    poisoned = batch(seed=1)
    poisoned.global_crops = poisoned.global_crops.float() / 255
    poisoned.global_crops[1, 0, 5, 5] = float("nan")
    record = training([poisoned], schedules.at(2), 1)
    assert record["is_skipped"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(training).items())
    assert all(torch.equal(a, b) for a, b in zip(training.objective.centers(), centers, strict=True))
    assert training([batch(seed=2)], schedules.at(3), 2)["is_skipped"] == 0


def test_the_same_picture_twice_is_finite(tmp_path):
    training, schedules = build(tmp_path)
    twice = batch()
    for crops in (twice.global_crops, twice.local_crops):
        crops[:] = crops[:1]
    twice.masks[:] = False
    twice = dataclasses.replace(twice)
    record = training([twice], schedules.at(1), 0)
    assert record["is_skipped"] == 0
    assert 8 < record["koleo"] / 2 < 18.5  # near ln(1e8) for each row of each view


def test_a_batch_of_one_has_no_neighbours(tmp_path):
    training, schedules = build(tmp_path)
    record = training([batch(1)], schedules.at(1), 0)
    assert record["koleo"] == 0
    assert record["is_skipped"] == 0


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"dino": {"weight": 0.0}}, "dino"),
        ({"ibot": {"weight": 0.0}}, "ibot"),
        ({"koleo": {"weight": 0.0}}, "koleo"),
        ({"ibot": {"start": 3}}, "ibot"),
        ({"dino": {"weight": 0.0}, "ibot": {"head": None}}, "dino"),
    ],
)
def test_any_term_may_be_off(tmp_path, changes, absent):
    training, schedules = build(tmp_path, objective=changes)
    record = training([batch()], schedules.at(1), 0)
    assert absent not in record
    assert record["is_skipped"] == 0


def test_tied_heads_are_one_head(tmp_path):
    training, schedules = build(tmp_path, objective={"ibot": {"head": None}})
    assert training.objective.student.ibot_head is None
    record = training([batch()], schedules.at(1), 0)
    assert {"dino", "ibot"} <= record.keys()


def test_heads_may_learn_first(tmp_path):
    training, schedules = build(tmp_path, stages={"pretrain": {"init": {"freeze_backbone": 1}}})
    before = weights(training)
    training([batch()], schedules.at(5), 0)
    moved = {name for name, tensor in weights(training).items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("student.dino_head") for name in moved)
    assert not any(name.startswith("student.backbone") for name in moved)
    training([batch()], schedules.at(5), 1)
    assert not torch.equal(weights(training)["student.backbone.norm.weight"], before["student.backbone.norm.weight"])


def test_bf16_stays_near_fp32(tmp_path):
    found = []
    for precision in ("fp32", "bf16"):
        training, schedules = build(tmp_path / precision, parallel={"precision": precision})
        found.append([training([batch(seed=s)], schedules.at(s), s)["dino"] for s in range(1, 6)])
    assert found[0] == pytest.approx(found[1], rel=0.01)
