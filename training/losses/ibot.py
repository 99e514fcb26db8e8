"""Patch-level loss (Zhou et al. 2021; DINOv2, section 4): the student's masked patches against the teacher's.

Letters: C global crops, N patches, M masked ones, K prototypes, Z bottleneck dim.
"""

from __future__ import annotations

from torch import Tensor

from training.losses.prototypes import chunked_cross_entropy


def ibot_loss(z: Tensor, weight: Tensor, targets: Tensor, *, masks: Tensor, temperature: float, chunk: int) -> Tensor:
    """Mean over global crops, unmasked ones included, of the mean cross-entropy of a crop's masked patches.

    Args:
        z: student's masked patches [M, Z], in the order of ``masks.flatten().nonzero()``.
        weight: prototypes [K, Z].
        targets: teacher's probabilities [M, K].
        masks: bool [C, N].
        temperature: of the student.
        chunk: rows of logits held at once.

    Returns:
        Scalar; 0 where nothing is masked.
    """
    counts = masks.sum(1)  # [C]
    weights = (counts.clamp(min=1) * len(masks)).float().reciprocal()
    per_patch = weights[:, None].expand_as(masks)[masks]  # [M]
    return chunked_cross_entropy(z, weight, targets, temperature=temperature, weights=per_patch, chunk=chunk).total
