"""AdamW as dinov2 sets it up: what learns how fast, what decays, how gradients are cut, how the teacher follows."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.config import OptimConfig
from training.parallel import local
from training.schedule import At

_TOKENS = ("pos_embed", "cls_token", "mask_token", "register_tokens")


class Multipliers(NamedTuple):
    """What the schedule's values are multiplied by for one parameter."""

    lr: float
    weight_decay: float
    is_last_layer: bool  # prototypes: their rate is 0 while they are frozen


def multipliers(name: str, config: OptimConfig, num_blocks: int) -> Multipliers:
    """Of one parameter (dinov2 utils/param_groups.py).

    Args:
        name: in a ``Network``: backbone.*, dino_head.*, ibot_head.*, feature_map.*.
        config: decay by layer, rate of the patch embedding, what is exempt.
        num_blocks: of the backbone.
    """
    layer = num_blocks + 1  # final norm and heads
    module, _, rest = name.partition(".")
    if module == "backbone":
        if rest.startswith((*_TOKENS, "patch_embed")):
            layer = 0
        elif block := re.match(r"blocks\.(\d+)\.", rest):
            layer = int(block.group(1)) + 1
    lr = config.layer_decay ** (num_blocks + 1 - layer)
    if "patch_embed" in name:
        lr *= config.patch_embed_lr
    # Tokens, position grid and weight norm are decayed in the released code, though a comment there says otherwise.
    is_exempt = name.endswith(".bias") or "norm" in name or "gamma" in name
    if not config.decay_tokens:
        is_exempt = is_exempt or rest.startswith(_TOKENS) or name.endswith(("weight_g", "weight_v"))
    return Multipliers(lr, 0.0 if is_exempt else 1.0, "last_layer" in name)


def parameter_groups(network: nn.Module, config: OptimConfig, num_blocks: int) -> list[dict[str, Any]]:
    """All trainable parameters of a network, those with equal multipliers together."""
    groups: dict[Multipliers, list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(multipliers(name, config, num_blocks), []).append(parameter)
    return [{"params": parameters, "multipliers": key} for key, parameters in groups.items()]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW, whose rates and decays are set by ``apply_schedule`` before each step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)


def apply_schedule(optimizer: torch.optim.Optimizer, at: At) -> None:
    """Set rates and decays of all groups."""
    for group in optimizer.param_groups:
        times: Multipliers = group["multipliers"]
        group["lr"] = (at.last_layer_lr if times.is_last_layer else at.lr) * times.lr
        group["weight_decay"] = at.weight_decay * times.weight_decay


def clip(network: nn.Module, config: OptimConfig) -> dict[str, Tensor]:
    """Cut gradients to ``config.clip`` in place: backbone and each head apart, or all together.

    Returns:
        Norms before cutting, by what was cut together.
    """
    if config.clip_by == "global":
        parts: dict[str, nn.Module] = {"all": network}
    else:
        parts = dict(network.named_children())
    norms = {}
    for name, module in parts.items():
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        if not parameters:
            continue
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
        norms[name] = norm
    return norms


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Teacher <- momentum teacher + (1 - momentum) student, shard by shard: nothing is gathered."""
    held = [local(parameter) for parameter in teacher.parameters()]
    new = [local(parameter.detach()) for parameter in student.parameters()]
    torch._foreach_mul_(held, momentum)
    torch._foreach_add_(held, new, alpha=1 - momentum)
