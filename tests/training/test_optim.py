"""Groups against those of dinov2 (tests/golden/make_optim.py); AdamW, clipping and the average on one and on two ranks.

Run as a script, this file is one of two ranks: ``test_optim.py RENDEZVOUS RANK OUT``.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training.config import ModelConfig, ObjectiveConfig, OptimConfig
from training.models.network import Network
from training.optim import apply_schedule, build_optimizer, clip, multipliers, parameter_groups, update_teacher
from training.schedule import At

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = dict(np.load(ROOT / "tests" / "golden" / "optim.npz"))
# as in make_optim.py
MODELS = {
    "vit_small": {"arch": "vit_small", "num_registers": 4},
    "vit_large": {"arch": "vit_large", "ffn": "swiglu"},
    "vit_giant2": {"arch": "vit_giant2", "ffn": "swiglu"},
}
TINY = ModelConfig(dim=8, depth=2, num_heads=2, patch_px=4, image_px=8, arch="vit_tiny")
AT = At(
    lr=0.01, last_layer_lr=0.0, weight_decay=0.1, momentum=0.9, teacher_temperature=0.04, patch_temperature=0.04,
    is_masked=True,
)  # fmt: skip


def objective(**head) -> ObjectiveConfig:
    config = {"num_prototypes": 16, "hidden_dim": 8, "bottleneck_dim": 4} | head
    return ObjectiveConfig.model_validate({"dino": {"head": config}, "ibot": {"head": config}})


def tiny(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(TINY, objective())


def give_gradients(network: nn.Module, scale: float = 1.0) -> None:
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.grad = scale * torch.randn_like(parameter)


def norm_of(module: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters() if p.grad is not None))


@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("arch", MODELS)
def test_every_parameter_has_the_multipliers_of_dinov2(arch, decay):
    with torch.device("meta"):
        network = Network(ModelConfig(**MODELS[arch]), objective())
    config = OptimConfig(layer_decay=decay, patch_embed_lr=0.2)
    groups = parameter_groups(network, config, network.backbone.config.shape[1])
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    ours = {
        names[id(parameter)]: tuple(map(float, group["multipliers"]))
        for group in groups
        for parameter in group["params"]
    }
    golden = dict(zip(GOLDEN[f"groups/{arch}/names"].tolist(), GOLDEN[f"groups/{arch}/{decay}"].tolist(), strict=True))
    assert ours.keys() == golden.keys()
    for name, triple in ours.items():
        assert list(triple) == pytest.approx(golden[name], abs=1e-15), name
    assert sum(len(group["params"]) for group in groups) == len(ours), "each is in one group"
    assert len(groups) <= (7 if decay == 1.0 else 2 * network.backbone.config.shape[1] + 6)


def test_tokens_and_weight_norm_can_be_spared_decay_and_nothing_else_changes():
    network, spared = tiny(), set()
    for name, _ in network.named_parameters():
        released = multipliers(name, OptimConfig(), 2)
        other = multipliers(name, OptimConfig(decay_tokens=False), 2)
        assert (released[0], released[2]) == (other[0], other[2])
        if released != other:
            assert (released[1], other[1]) == (1.0, 0.0)
            spared.add(name.removeprefix("backbone."))
    heads = {f"{head}.last_layer.{kind}" for head in ("dino_head", "ibot_head") for kind in ("weight_g", "weight_v")}
    assert spared == {"cls_token", "pos_embed", "mask_token"} | heads


def test_frozen_parameters_are_in_no_group():
    network = Network(TINY, objective(weight_norm_gain="frozen"))
    parameters = [p for group in parameter_groups(network, OptimConfig(), 2) for p in group["params"]]
    assert len(parameters) == len(list(network.parameters())) - 2


def test_a_step_is_adamw_with_each_groups_own_rate_and_decay():
    network, config = tiny(), OptimConfig(betas=(0.8, 0.9), eps=1e-6, layer_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    give_gradients(network)
    optimizer = build_optimizer(parameter_groups(network, config, 2), config)
    apply_schedule(optimizer, AT)
    optimizer.step()
    for name, parameter in network.named_parameters():
        lr_multiplier, wd_multiplier, is_last = multipliers(name, config, 2)
        lr = (AT.last_layer_lr if is_last else AT.lr) * lr_multiplier
        # after one step both moments, corrected, are the gradient and its square
        expected = before[name] * (1 - lr * AT.weight_decay * wd_multiplier)
        expected -= lr * parameter.grad / (parameter.grad.abs() + config.eps)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_modules_are_clipped_apart_and_told_before():
    network = tiny()
    give_gradients(network)
    for parameter in network.dino_head.parameters():
        parameter.grad *= 0.01
    before = {name: norm_of(child) for name, child in network.named_children()}
    assert before["dino_head"] < 3 < before["backbone"]
    norms = clip(network, OptimConfig(clip=3.0))
    assert {name: float(norm) for name, norm in norms.items()} == pytest.approx(before, rel=1e-5)
    assert norm_of(network.backbone) == pytest.approx(3.0, rel=1e-5)
    assert norm_of(network.ibot_head) == pytest.approx(3.0, rel=1e-5)
    assert norm_of(network.dino_head) == pytest.approx(before["dino_head"], rel=1e-6)


def test_all_modules_can_be_clipped_as_one():
    network = tiny()
    give_gradients(network)
    before = norm_of(network)
    norms = clip(network, OptimConfig(clip=3.0, clip_by="global"))
    assert {name: float(norm) for name, norm in norms.items()} == pytest.approx({"all": before}, rel=1e-5)
    assert norm_of(network) == pytest.approx(3.0, rel=1e-5)


def test_without_clipping_norms_are_still_told_and_modules_without_gradient_are_left_out():
    network = tiny()
    give_gradients(network)
    network.backbone.zero_grad(set_to_none=True)
    before = norm_of(network.dino_head)
    norms = clip(network, OptimConfig(clip=None))
    assert set(norms) == {"dino_head", "ibot_head"}
    assert norm_of(network.dino_head) == before
    network.zero_grad(set_to_none=True)
    assert clip(network, OptimConfig()) == {}


def test_one_bad_gradient_makes_the_norm_of_its_module_bad():
    network = tiny()
    give_gradients(network)
    network.ibot_head.last_layer.weight_g.grad[0] = float("inf")
    norms = clip(network, OptimConfig())
    assert not torch.isfinite(norms["ibot_head"])
    assert torch.isfinite(norms["backbone"])


def test_the_teacher_moves_its_share_of_the_way():
    student, teacher = tiny(0), tiny(1)
    before = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters()}
    update_teacher(student, teacher, 0.75)
    for name, parameter in teacher.named_parameters():
        expected = 0.75 * before[name] + 0.25 * student.get_parameter(name).detach()
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-7)
        assert parameter.requires_grad
    moved = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters()}
    update_teacher(student, teacher, 1.0)
    assert all(torch.equal(moved[name], parameter) for name, parameter in teacher.named_parameters())
    update_teacher(student, teacher, 0.0)
    assert all(torch.equal(student.get_parameter(name), parameter) for name, parameter in teacher.named_parameters())


# Two ranks


def steps_on(network: Network, teacher: Network) -> dict[str, torch.Tensor]:
    """Norms, and weights of both sides, after two clipped steps."""
    config = OptimConfig(layer_decay=0.9)
    optimizer = build_optimizer(parameter_groups(network, config, 2), config)
    norms = {}
    for _ in range(2):
        norms = clip(network, config)
        apply_schedule(optimizer, AT)
        optimizer.step()
        update_teacher(network, teacher, AT.momentum)
    weights = {f"student.{name}": parameter.detach() for name, parameter in network.named_parameters()}
    weights |= {f"teacher.{name}": parameter.detach() for name, parameter in teacher.named_parameters()}
    return norms | weights


def rank_main(rendezvous: str, rank: int, out: str) -> None:
    """One of two ranks: the same gradients as in one process, each rank holding its shards."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor

    from training.config import ParallelConfig
    from training.parallel import World, distribute

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    world = World(rank=rank, size=2, device=torch.device("cpu"), mesh=mesh)
    plain = tiny(0)
    give_gradients(plain)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    network, teacher = (distribute(tiny(seed), world, ParallelConfig(mode="fsdp")) for seed in (0, 1))
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor)
        parameter.grad = distribute_tensor(gradients[name], parameter.device_mesh, parameter.placements)
    made = steps_on(network, teacher)
    made = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in made.items()}
    torch.save(made, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.matrix
def test_two_ranks_with_half_the_shards_each_do_what_one_process_does(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / "meet"), str(rank), str(tmp_path / "out")], env=environment
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    network, teacher = tiny(0), tiny(1)
    give_gradients(network)
    alone = steps_on(network, teacher)
    for rank in range(2):
        made = torch.load(tmp_path / f"out.{rank}")
        assert made.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
