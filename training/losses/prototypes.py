"""Cross-entropy over prototypes, a few rows of logits at a time.

With 131,072 prototypes the logits of a batch are larger than the network. Here they exist for ``chunk`` rows only: the
forward pass makes them, takes the loss and, since the loss is linear in it, the gradient too, so that nothing is
computed twice and nothing but two matrices of the size of the inputs is kept.

Letters: n rows, Z bottleneck dim, K prototypes, T rows of targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CrossEntropy(NamedTuple):
    """A loss and its shares."""

    total: Tensor  # scalar
    rows: Tensor  # [n], detached; their sum is the total


def chunked_cross_entropy(
    z: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    weights: Tensor | None = None,
    index: Tensor | None = None,
    chunk: int,
) -> CrossEntropy:
    """Sum over rows of w_i * (- sum_k t_ik log softmax(z_i W^T / temperature)_k).

    Everything that shares prototypes belongs in one call: each keeps a gradient [K, Z] until the backward pass.

    Args:
        z: [n, Z].
        weight: prototypes W [K, Z].
        targets: [T, K]; a row need not sum to 1.
        temperature: of the student.
        weights: w [n]; None: 1 / n each.
        index: int64 [n], the row of targets that is t_i; None: T = n, the i-th.
        chunk: rows of logits held at once.

    Returns:
        In fp32 (fp64 for fp64 inputs); 0 for no rows. The total is differentiable, once, by z and weight.
    """
    if not len(z):
        return CrossEntropy(z.sum() * 0 + weight.sum() * 0, z.new_zeros(0))
    if weights is None:
        weights = z.new_full((len(z),), 1 / len(z))
    with torch.autocast(z.device.type, enabled=False):
        return CrossEntropy(*_CrossEntropy.apply(z, weight, targets, weights, index, temperature, chunk))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - apply takes no keywords
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        index: Tensor | None,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        rows, matrix = z.detach().to(dtype), weight.detach().to(dtype)
        by_z = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        by_weight = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        losses = rows.new_empty(len(rows))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            target = (targets[part] if index is None else targets[index[part]]).to(dtype)  # [chunk, K]
            scale = weights[part].to(dtype)
            logits = (rows[part] / temperature) @ matrix.T  # [chunk, K]
            total = target.sum(-1)
            # - sum t log softmax = (sum t) logsumexp - <t, logits>
            most = logits.amax(-1, keepdim=True)
            inner = torch.einsum("nk,nk->n", target, logits)
            logits.sub_(most).exp_()
            sums = logits.sum(-1)
            losses[part] = ((sums.log() + most[:, 0]) * total - inner) * scale
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
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient = gradients[0]
        # Scaled in place, for a copy of [K, Z] would be the most memory of the step; not where the graph is run again.
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = [
            None if part is None else (part * gradient if is_kept else part.mul_(gradient)).to(dtype)
            for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None
