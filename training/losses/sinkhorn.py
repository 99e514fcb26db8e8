"""Sinkhorn-Knopp assignments (Caron et al. 2020, SwAV; DINOv2, section 4) that cannot overflow.

exp(logit / temperature) leaves fp32 at a logit of 3.55 and a temperature of 0.04. Subtracting the largest logit of all
rows and ranks changes nothing else; subtracting each row's own would give other assignments after few iterations.
A row whose logits all lie far below the largest would vanish; the same is then done in logarithms.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def sinkhorn(
    logits: Tensor, *, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Logits to probabilities whose sums over samples are about the same for each prototype.

    Args:
        logits: [n, K]; n may differ between ranks, and be 0.
        temperature: of the teacher.
        iterations: of both normalisations.
        group: ranks whose rows belong together; None: this one alone.

    Returns:
        fp32 [n, K]; rows sum to 1.
    """
    log_q = logits.float() / temperature
    num_samples = log_q.new_tensor(float(len(log_q)))
    lowest = torch.finfo(torch.float32).min
    largest = log_q.amax() if len(log_q) else log_q.new_tensor(lowest)
    if group is not None:
        dist.all_reduce(num_samples, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    spread = largest - (log_q.amax(-1).amin() if len(log_q) else largest)
    if group is not None:
        dist.all_reduce(spread, op=dist.ReduceOp.MAX, group=group)
    if spread > _SAFE:
        return _in_logs(log_q, num_samples, iterations, group)
    q = log_q.sub_(largest).exp_()
    for _ in range(iterations):
        per_prototype = q.sum(0, keepdim=True)  # [1, K]
        if group is not None:
            dist.all_reduce(per_prototype, group=group)
        # A prototype that nobody is near stays at 0.
        q.mul_((per_prototype * q.shape[1]).clamp_min_(_TINY).reciprocal_())
        q.div_(q.sum(1, keepdim=True) * num_samples)
    return q.mul_(num_samples)


_SAFE = 60.0  # exp(-60) = 1e-26: rows that far below the largest still have 12 digits of range
_TINY = 1e-37


def _in_logs(log_q: Tensor, num_samples: Tensor, iterations: int, group: dist.ProcessGroup | None) -> Tensor:
    """The same in logarithms: slower, and right for any finite logits."""
    for _ in range(iterations):
        log_q = log_q - _log_sum_over_samples(log_q, group)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def _log_sum_over_samples(log_q: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[1, K], over the rows of all ranks."""
    lowest = torch.finfo(torch.float32).min
    most = log_q.amax(0) if len(log_q) else log_q.new_full((log_q.shape[1],), lowest)
    if group is not None:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    sums = (log_q - most).exp().sum(0)
    if group is not None:
        dist.all_reduce(sums, group=group)
    return (sums.log() + most)[None]
