"""Cross-entropy over prototypes, a few rows of logits at a time.

With 131,072 prototypes the logits of a batch are larger than the network. Here they exist for ``chunk`` rows only: the
forward pass makes them, takes the loss and, since the loss is linear in it, the gradient too, so that nothing is
computed twice and nothing but two matrices of the size of the inputs is kept.

Letters: n rows, Z bottleneck dim, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def chunked_cross_entropy(
    z: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, weights: Tensor | None = None, chunk: int
) -> Tensor:
    """Sum over rows of w_i * (- sum_k t_ik log softmax(z_i W^T / temperature)_k).

    Args:
        z: [n, Z].
        weight: prototypes W [K, Z].
        targets: [n, K]; a row need not sum to 1.
        temperature: of the student.
        weights: w [n]; None: 1 / n each.
        chunk: rows of logits held at once.

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs); 0 for no rows. Differentiable by z and weight.
    """
    if not len(z):
        return z.sum() * 0 + weight.sum() * 0
    if weights is None:
        weights = z.new_full((len(z),), 1 / len(z))
    with torch.autocast(z.device.type, enabled=False):
        loss: Tensor = _CrossEntropy.apply(z, weight, targets, weights, temperature, chunk)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - apply takes no keywords
        ctx: Any, z: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        rows, matrix = z.detach().to(dtype), weight.detach().to(dtype)
        by_z = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        by_weight = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        loss = rows.new_zeros(())
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            target, scale = targets[part].to(dtype), weights[part].to(dtype)
            logits = (rows[part] / temperature) @ matrix.T  # [chunk, K]
            total = target.sum(-1)
            # - sum t log softmax = (sum t) logsumexp - <t, logits>
            most = logits.amax(-1, keepdim=True)
            inner = torch.einsum("nk,nk->n", target, logits)
            logits.sub_(most).exp_()
            sums = logits.sum(-1)
            loss += ((sums.log() + most[:, 0]) * total - inner) @ scale
            if by_z is None and by_weight is None:
                continue
            # gradient by logits: ((sum t) softmax - t) w / temperature
            logits.mul_((total / sums)[:, None]).sub_(target).mul_((scale / temperature)[:, None])
            if by_z is not None:
                torch.mm(logits, matrix, out=by_z[part])
            if by_weight is not None:
                by_weight.addmm_(logits.T, rows[part])
        ctx.save_for_backward(by_z, by_weight)
        ctx.dtypes = (z.dtype, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        by_z, by_weight = ctx.saved_tensors
        (gradient,) = gradients
        scaled = [
            None if part is None else (part * gradient).to(dtype)
            for part, dtype in zip((by_z, by_weight), ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None
