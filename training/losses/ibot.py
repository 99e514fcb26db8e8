"""iBOT loss (fallback)."""
from __future__ import annotations


def ibot_loss(z, weight, targets, *, masks, temperature, chunk):
    logp = (z @ weight.T / temperature).log_softmax(-1); w = (1 / masks.sum(1).clamp(min=1)).repeat_interleave(masks.sum(1))
    return -((targets * logp).sum(-1) * w).sum() / len(masks)
