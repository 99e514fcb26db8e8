"""Nearest neighbours by cosine, each with a vote of exp(similarity / temperature) (Wu et al. 2018; dinov2's eval/knn).

Letters: n labelled pictures, m tested ones, F features, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_TEST_ROWS, _TRAIN_ROWS = 512, 65_536  # similarities held at once: 128 MB


def nearest(train: Tensor, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar rows, most similar first.

    Args:
        train: [n, F], of length 1; may lie on another device than ``test``, and is sent over in parts.
        test: [m, F], of length 1.
        k: at most n.

    Returns:
        Similarities [m, k] and rows of ``train`` [m, k], on the device of ``test``.
    """
    best = test.new_full((len(test), 0), 0.0)
    rows = torch.zeros((len(test), 0), dtype=torch.long, device=test.device)
    for first in range(0, len(train), _TRAIN_ROWS):
        part = train[first : first + _TRAIN_ROWS].to(test.device)
        similarity = test @ part.T  # [m, part]
        found, where = similarity.topk(min(k, len(part)), dim=1)
        joined, order = torch.cat([best, found], 1).topk(min(k, best.shape[1] + found.shape[1]), dim=1)
        rows = torch.cat([rows, where + first], 1).gather(1, order)
        best = joined
    return best, rows


def predict(
    train: Tensor, labels: Tensor, test: Tensor, *, k: Sequence[int], temperature: float,
    device: torch.device | None = None,
) -> dict[int, Tensor]:  # fmt: skip
    """Classes of tested pictures by their neighbours' votes; of equal votes the smaller class wins.

    Args:
        train: features [n, F], of any length.
        labels: int64 [n], from 0.
        test: features [m, F].
        k: numbers of neighbours; one above n is taken as n.
        temperature: of the votes.
        device: where to compute; None: where ``test`` lies.

    Returns:
        For each k int64 [m], on the CPU.
    """
    device = device or test.device
    train, test = F.normalize(train.float(), dim=-1), F.normalize(test.float(), dim=-1)
    num_classes, most = int(labels.max()) + 1, min(max(k), len(train))
    labels = labels.to(device)
    found: dict[int, list[Tensor]] = {number: [] for number in k}
    for part in torch.split(test, _TEST_ROWS):
        similarity, rows = nearest(train, part.to(device), most)
        # the best one's vote is 1: no temperature overflows
        votes = ((similarity - similarity[:, :1]).double() / temperature).exp()  # [b, most]
        classes = labels[rows]
        total = votes.new_zeros((len(part), num_classes))
        counted = 0
        for number in sorted(set(k)):
            for column in range(counted, min(number, most)):  # one at a time, so that sums have one order
                total.scatter_add_(1, classes[:, column : column + 1], votes[:, column : column + 1])
            counted = max(counted, min(number, most))
            found[number].append(total.argmax(1).cpu())
    return {number: torch.cat(parts) for number, parts in found.items()}


def knn_accuracy(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, k: Sequence[int], temperature: float,
    device: torch.device | None = None,
) -> dict[int, float]:  # fmt: skip
    """Share of tested pictures whose class is right, for each k; see ``predict``. ``test_labels``: int64 [m].

    NaN where a feature is not finite: such neighbours are any, and the share would look like a measurement.
    """
    if not (train.isfinite().all() and test.isfinite().all()):
        return dict.fromkeys(k, math.nan)
    found = predict(train, labels, test, k=k, temperature=temperature, device=device)
    return {number: float((classes == test_labels).double().mean()) for number, classes in found.items()}
