"""Centring of teacher logits by a running mean (Caron et al. 2021), the older way of keeping assignments spread."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Center(nn.Module):
    """Running mean of teacher logits over the batches of all ranks.

    Args:
        num_prototypes: K.
        momentum: of the mean.
    """

    center: Tensor  # [1, K]

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """Softmax of logits [n, K] less the centre of earlier steps: fp32 [n, K]."""
        return ((logits.float() - self.center) / temperature).softmax(-1)

    @torch.no_grad()
    def update(self, logits: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Move the centre towards the mean of logits [n, K] of all ranks; n may differ, and be 0."""
        sums = torch.cat([logits.float().sum(0), logits.new_tensor([len(logits)], dtype=torch.float32)])  # [K + 1]
        if group is not None:
            dist.all_reduce(sums, group=group)
        if sums[-1] > 0:
            self.center.lerp_((sums[:-1] / sums[-1])[None], 1 - self.momentum)
