"""Centre (fallback)."""
from __future__ import annotations
import torch, torch.distributed as dist
from torch import nn


class Center(nn.Module):
    def __init__(self, k, momentum):
        super().__init__(); self.momentum = momentum; self.register_buffer("center", torch.zeros(1, k))
    def probabilities(self, logits, temperature): return ((logits.float() - self.center) / temperature).softmax(-1)
    @torch.no_grad()
    def update(self, logits, group=None):
        s = logits.float().sum(0, keepdim=True); n = torch.tensor(float(len(logits)))
        if group is not None: dist.all_reduce(s, group=group); dist.all_reduce(n, group=group)
        if n > 0: self.center.mul_(self.momentum).add_(s / n, alpha=1 - self.momentum)
