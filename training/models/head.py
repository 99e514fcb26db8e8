"""Projection head: MLP, L2 norm, prototypes (Caron et al. 2021), with the parameter names of dinov2.

Letters: n rows, D embedding dim, Z bottleneck dim, K prototypes. Always in fp32, whatever surrounds it.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import HeadConfig
from training.losses.dino import DinoTerms, dino_loss
from training.losses.ibot import ibot_loss


class Prototypes(nn.Module):
    """K directions in the bottleneck; with a gain each, unless ``gain`` is none."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gain = config.weight_norm_gain
        shape = (config.num_prototypes, config.bottleneck_dim)
        if self.gain == "none":
            self.weight = nn.Parameter(torch.empty(shape))
            return
        self.weight_g = nn.Parameter(torch.empty(shape[0], 1), requires_grad=self.gain == "trainable")
        self.weight_v = nn.Parameter(torch.empty(shape))

    def reset_parameters(self) -> None:
        """Draw anew; with a gain as dinov2 does, which leaves torch's default: how fast v turns hangs on its length."""
        if self.gain == "none":
            nn.init.trunc_normal_(self.weight, std=0.02)
            return
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def matrix(self) -> Tensor:
        """[K, Z]."""
        if self.gain == "none":
            return self.weight
        # one operation, which keeps nothing of this size besides its result; F.normalize and a product keep two
        return torch._weight_norm(self.weight_v, self.weight_g, 0)


class _RowNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of a call; a single row has no statistics and stays as it is."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows if len(rows) == 1 else super().forward(rows)


class ProjectionHead(nn.Module):
    """Rows of a backbone to logits over prototypes.

    With BatchNorm the statistics are always those of the rows at hand, in teachers too, whose running ones
    nothing would update; a call then needs two rows at least, or none.
    """

    def __init__(self, dim: int, config: HeadConfig) -> None:
        """Draw weights from torch's generator.

        Args:
            dim: D.
            config: its shape.
        """
        super().__init__()
        self.config = config
        self.num_prototypes = config.num_prototypes
        sizes = [dim] + [config.hidden_dim] * (config.num_layers - 1)
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(sizes):
            layers.append(nn.Linear(width, next_width))
            if config.norm != "none":
                layers.append(_RowNorm(next_width, track_running_stats=False))
            layers.append(nn.GELU())
        layers.append(nn.Linear(sizes[-1], config.bottleneck_dim))
        if config.norm == "batch_all":
            layers.append(_RowNorm(config.bottleneck_dim, affine=False, track_running_stats=False))
        # dinov2 has no sequence around a single layer, and so other names
        self.mlp: nn.Module = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.last_layer = Prototypes(config)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew from torch's generator; also after ``to_empty``."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()
        self.last_layer.reset_parameters()

    def project(self, rows: Tensor) -> Tensor:
        """Rows [n, D] to the bottleneck, fp32 [n, Z], of length 1."""
        with torch.autocast(rows.device.type, enabled=False):
            return F.normalize(self.mlp(rows.float()), dim=-1, eps=1e-12)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [n, D] to logits, fp32 [n, K]."""
        z = self.project(rows)
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(z, self.last_layer.matrix())

    def dino_loss(self, rows: Tensor, targets: Tensor, *, num_locals: int, temperature: float, chunk: int) -> DinoTerms:
        """``losses.dino.dino_loss`` of class tokens [(2 + L) B, D] against targets [2 B, K]."""
        return dino_loss(
            self.project(rows),
            self.last_layer.matrix(),
            targets,
            num_locals=num_locals,
            temperature=temperature,
            chunk=chunk,
        )

    def ibot_loss(self, rows: Tensor, targets: Tensor, *, masks: Tensor, temperature: float, chunk: int) -> Tensor:
        """``losses.ibot.ibot_loss`` of masked patches [M, D] against targets [M, K]; scalar."""
        return ibot_loss(
            self.project(rows), self.last_layer.matrix(), targets, masks=masks, temperature=temperature, chunk=chunk
        )
