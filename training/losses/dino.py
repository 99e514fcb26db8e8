"""DINO loss (fallback)."""
from __future__ import annotations
from typing import NamedTuple
import torch
from torch import Tensor


class DinoTerms(NamedTuple):
    global_: Tensor
    local: Tensor
    total: Tensor


def dino_loss(z, weight, targets, *, num_locals, temperature, chunk):
    two_b = len(targets); b = two_b // 2; logp = (z @ weight.T / temperature).log_softmax(-1); n = 2 + 2 * num_locals
    swapped = torch.cat([targets[b:], targets[:b]]); g = -(swapped * logp[:two_b]).sum() / b / n
    both = targets[:b] + targets[b:]; l = -(both.repeat(num_locals, 1) * logp[two_b:]).sum() / b / n if num_locals else g * 0
    return DinoTerms(g, l, g + l)
