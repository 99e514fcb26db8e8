"""Image-level loss (Caron et al. 2021; DINOv2, section 4): the student's crops against the teacher's globals.

Letters: B pictures, L locals a picture, K prototypes, Z bottleneck dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.losses.prototypes import chunked_cross_entropy


class DinoTerms(NamedTuple):
    """Scalars; ``total`` is the mean over all pairs, the others are its two shares, detached."""

    global_: Tensor
    local: Tensor
    total: Tensor


def dino_loss(
    z: Tensor, weight: Tensor, targets: Tensor, *, num_locals: int, temperature: float, chunk: int
) -> DinoTerms:
    """Mean cross-entropy over pairs of a teacher's global and a student's crop of the same picture.

    for each picture, each teacher global g, each student crop s other than g itself:
        loss += - sum_k t_gk log softmax(z_s W^T / temperature)_k
    divided by B (2 + 2 L), the number of pairs. Cross-entropy is linear in the target, so a local crop is scored once,
    against the sum of both teacher rows.

    Args:
        z: student rows [(2 + L) B, Z]: view 1 of all pictures, view 2, then each local of all pictures.
        weight: prototypes [K, Z].
        targets: teacher's probabilities [2 B, K], view 1, then view 2.
        num_locals: L, may be 0.
        temperature: of the student.
        chunk: rows of logits held at once.
    """
    num_pictures = len(targets) // 2
    num_pairs = num_pictures * (2 + 2 * num_locals)
    first, second = targets.chunk(2)
    number = torch.arange(num_pictures, device=z.device)
    of_globals = [number, num_pictures + number]  # rows of what is stacked below
    of_locals = [2 * num_pictures + number] * num_locals
    loss = chunked_cross_entropy(
        z,
        weight,
        torch.cat([second, first, first + second] if num_locals else [second, first]),
        temperature=temperature,
        weights=z.new_full((len(z),), 1 / num_pairs),
        index=torch.cat(of_globals + of_locals),
        chunk=chunk,
    )
    global_, local = torch.split(loss.rows, [2 * num_pictures, num_locals * num_pictures])
    return DinoTerms(global_.sum(), local.sum(), loss.total)
