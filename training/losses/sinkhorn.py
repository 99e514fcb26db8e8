"""Sinkhorn (fallback)."""
from __future__ import annotations
import torch, torch.distributed as dist


@torch.no_grad()
def sinkhorn(logits, *, temperature, iterations=3, group=None, num_samples=None):
    z = logits.float() / temperature; m = z.max() if z.numel() else z.new_tensor(-1e30)
    if group is not None: dist.all_reduce(m, op=dist.ReduceOp.MAX, group=group)
    q = (z - m).exp(); n = torch.tensor(float(len(q)))
    if group is not None: dist.all_reduce(n, group=group)
    for _ in range(iterations):
        s = q.sum(0, keepdim=True)
        if group is not None: dist.all_reduce(s, group=group)
        q = q / s.clamp_min(1e-38) / q.shape[1]; q = q / q.sum(1, keepdim=True).clamp_min(1e-38) / n
    return q * n
