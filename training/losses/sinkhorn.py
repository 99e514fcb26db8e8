"""Sinkhorn-Knopp assignments (Caron et al. 2020, SwAV; DINOv2, section 4) that neither overflow nor vanish.

exp(logit / temperature) leaves fp32 at a logit of 3.55 and a temperature of 0.04. The first normalisation is that of
prototypes over samples, so the largest logit of each prototype may be taken off and changes nothing; each row's own
may not, which gives other assignments after few iterations. Both normalisations are then kept as two vectors, so that
the matrix is read twice an iteration and written at the end. Logits too far apart for that are taken in logarithms.

Letters: n samples of this rank, K prototypes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Powers of e between the largest and the smallest entry of one prototype. With 50 the vectors stay within exp(+-50)
# times n and K, far inside fp32.
_SAFE = 50.0
_BLOCK = 1 << 22  # entries taken to double precision at once


@torch.no_grad()
def sinkhorn(
    logits: Tensor, *, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Logits to probabilities whose sums over samples are about the same for each prototype.

    The number of samples cancels, so ranks need not know it.

    Args:
        logits: [n, K]; n may differ between ranks, and be 0.
        temperature: of the teacher.
        iterations: of both normalisations.
        group: ranks whose rows belong together; None: this one alone.

    Returns:
        fp32 [n, K]; rows sum to 1.
    """
    z = logits.float()
    if len(z):
        largest, smallest = z.amax(0), z.amin(0)  # [K]; aminmax(0) takes five times as long on CPU
    else:
        largest = z.new_full((z.shape[1],), -torch.inf)
        smallest = -largest
    ends = _all_reduce(torch.stack([largest, -smallest]), group, dist.ReduceOp.MAX)
    if (ends.sum(0).amax() > _SAFE * temperature).item():
        return _in_logs(z, ends[0], temperature, iterations, group)
    q = (z - ends[0]).mul_(1 / temperature).exp_()  # [n, K], each prototype's largest entry is 1
    of_samples = q.new_ones(len(q))
    for _ in range(iterations):
        of_prototypes = _all_reduce(of_samples @ q, group).reciprocal_()  # [K]
        of_samples = (q @ of_prototypes).reciprocal_()  # [n]
    return q.mul_(of_prototypes).mul_(of_samples[:, None])


def _in_logs(
    z: Tensor, largest: Tensor, temperature: float, iterations: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The same for any finite logits: slower, with sums of logarithms in double precision, some rows at a time.

    Args:
        z: fp32 [n, K].
        largest: [K], over the samples of all ranks.
        temperature: of the teacher.
        iterations: of both normalisations.
        group: ranks whose rows belong together.
    """
    blocks = range(0, len(z), max(1, _BLOCK // z.shape[1]))
    of_prototypes = torch.zeros_like(largest, dtype=torch.float64)  # [K]
    of_samples = z.new_zeros((len(z), 1), dtype=torch.float64)
    most = largest.double() / temperature  # [K], of z / temperature - of_samples
    for _ in range(iterations):
        sums = torch.zeros_like(of_prototypes)
        for start in blocks:
            part = slice(start, start + blocks.step)
            sums += (z[part].double() / temperature - of_samples[part] - most).exp_().sum(0)
        of_prototypes = _all_reduce(sums, group).log_() + most
        most = torch.full_like(most, -torch.inf)
        for start in blocks:
            part = slice(start, start + blocks.step)
            log_q = (z[part].double() / temperature).sub_(of_prototypes)
            of_samples[part] = log_q.logsumexp(1, keepdim=True)
            most = torch.maximum(most, log_q.add_(of_prototypes).sub_(of_samples[part]).amax(0))
        _all_reduce(most, group, dist.ReduceOp.MAX)
    found = torch.empty_like(z)
    for start in blocks:
        part = slice(start, start + blocks.step)
        found[part] = (z[part].double() / temperature).sub_(of_prototypes).sub_(of_samples[part]).exp_()
    return found


def _all_reduce(
    values: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Values of all ranks, in place."""
    if group is not None:
        dist.all_reduce(values, op=op, group=group)
    return values
