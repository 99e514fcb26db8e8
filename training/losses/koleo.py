"""Kozachenko-Leonenko entropy of features (Sablayrolles et al. 2019; DINOv2, section 4): keeps them apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-8


def koleo(x: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Minus the mean log distance of each row to its nearest other row, on the unit sphere.

    for i: nn = argmax_{j != i} <x_i, x_j>;  loss -= log(|x_i - x_nn + 1e-8| + 1e-8) / n

    Always in fp32: in fp16 the 1e-8 is nothing, and a duplicate is infinite. In fp32 an exact duplicate costs at most
    ln(1e8) = 18.42, and it pulls at nothing: the gradient of three equal rows would be a million times that of others.

    Args:
        x: [n, D], not normalised.
        group: seek neighbours among the rows of all these ranks; None: among these rows. With a group, the mean over
            ranks of the losses, and of the gradients of parameters, is that of one process with all rows (each rank has
            as many rows).

    Returns:
        Scalar: mean over the rows of this rank. 0 where there are fewer than two rows in all.
    """
    with torch.autocast(x.device.type, enabled=False):
        mine = F.normalize(x.float(), dim=-1, eps=_EPS)
        rows, first = mine, 0
        if group is not None:
            rows, first = _Gather.apply(mine, group), dist.get_rank(group) * len(mine)
        if len(rows) < 2:
            return mine.sum() * 0
        with torch.no_grad():
            similarity = mine @ rows.T  # [n, n of all ranks]
            similarity[torch.arange(len(mine)), torch.arange(first, first + len(mine))] = -2
            nearest = similarity.argmax(1)
        apart = mine - rows[nearest]
        apart = torch.where((apart == 0).all(-1, keepdim=True), apart.detach(), apart)
        distance = torch.linalg.vector_norm(apart + _EPS, dim=-1)
        loss: Tensor = -(distance + _EPS).log().mean()
        return loss


@torch.no_grad()
def duplicate_pairs(x: Tensor, threshold: float = 1 - 1e-5) -> int:
    """Pairs of rows [n, D] whose cosine is above ``threshold``: what dominates the loss when there are any."""
    rows = F.normalize(x.float(), dim=-1, eps=_EPS)
    return int((rows @ rows.T).triu(1).gt(threshold).sum())


class _Gather(torch.autograd.Function):
    """Rows of all ranks in order of rank; the gradient of a rank's rows is the sum of what all ranks have for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.num_rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.num_rows
        return gradient[first : first + ctx.num_rows], None
