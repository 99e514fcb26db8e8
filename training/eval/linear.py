"""Linear probes on frozen features: ridge regression while a run trains, and dinov2's grid of classifiers after it.

Letters: n labelled pictures, m tested ones, F features, C classes, L learning rates, D embedding dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-6, 3))  # of the mean variance of a feature
# dinov2's eval/linear, for a batch of 256
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
NUM_STEPS, BATCH_SIZE = 12_500, 1024  # 10 x 1,250 steps; 128 pictures on each of 8 GPUs
MAX_PASSES = 100  # over small sets: 12,500 steps are 10 over ImageNet
NUM_BLOCKS = 4
ROWS = 65_536  # of features that are summed up at once


def held_out(num: int, share: int, seed: int = 0) -> Tensor:
    """Which rows are held out, bool [num]: one in ``share``, at least one and not all, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num, generator=generator)
    return order < min(max(num // share, 1), max(num - 1, 0))


def held_out_by_label(labels: Tensor, share: int, seed: int = 0) -> Tensor:
    """Row numbers that are held out, sorted by class; always the same ones, and as many as by ``held_out``.

    Each class gives one in ``share`` of its rows, rounded up or down: no class of two rows or more goes whole.

    Args:
        labels: int64 [n].
        share: at least 2.
        seed: of the order of rows within a class.

    Returns:
        int64 [max(n // share, 1)], none for n < 2.
    """
    num = len(labels)
    if num < 2:
        return torch.zeros(0, dtype=torch.long)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    return by_class[min(share, num) - 1 :: share]


# Ridge


def ridge_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of least squares on one-hot labels, its penalty chosen on a held-out fifth of ``train``.

    Args:
        train: features [n, F].
        labels: int64 [n].
        test: features [m, F].
        test_labels: int64 [m].

    Returns:
        Share of tested pictures whose class is right; NaN where a feature is not finite.
    """
    if not (train.isfinite().all() and test.isfinite().all()):
        return math.nan
    num_classes = int(torch.cat([labels, test_labels]).max()) + 1
    held = held_out(len(train), 5)
    fitted = _Ridge(train[~held], labels[~held], num_classes)
    scores = [_accuracy(fitted.scores(train[held], penalty), labels[held]) for penalty in PENALTIES]
    best = max(range(len(PENALTIES)), key=lambda index: (scores[index], index))  # of equals, the smoother one
    return _accuracy(_Ridge(train, labels, num_classes).scores(test, PENALTIES[best]), test_labels)


class _Ridge:
    """Least squares on centred features; one decomposition serves all penalties, and rows are only summed up."""

    def __init__(self, train: Tensor, labels: Tensor, num_classes: int) -> None:
        num, width = train.shape
        square = train.new_zeros((width, width), dtype=torch.double)
        by_class = train.new_zeros((num_classes, width), dtype=torch.double)
        for rows, of in zip(torch.split(train, ROWS), torch.split(labels, ROWS), strict=True):
            square += rows.double().T @ rows.double()
            by_class.index_add_(0, of, rows.double())
        self._mean = by_class.sum(0) / num  # [F]
        self._offset = torch.bincount(labels, minlength=num_classes).double() / num  # [C]
        self._values, self._vectors = torch.linalg.eigh(square - num * self._mean.outer(self._mean))  # [F], [F, F]
        self._projected = self._vectors.T @ (by_class.T - num * self._mean.outer(self._offset))  # [F, C]

    def scores(self, test: Tensor, penalty: float) -> Tensor:
        """[m, C]."""
        level = penalty * self._values.mean().clamp(min=1e-30)
        weight = self._vectors @ (self._projected / (self._values.clamp(min=0) + level)[:, None])  # [F, C]
        scores: Tensor = (test.double() - self._mean) @ weight + self._offset
        return scores


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())


# Grid


class GridResult(NamedTuple):
    """What the grid of classifiers gave on the test pictures."""

    accuracy: float  # of the classifier that is best on held-out pictures of train
    best_accuracy: float  # of the one that is best on the test pictures themselves, which is what dinov2 reports
    name: str  # of the first one


def grid_accuracy(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    dim: int,
    num_steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: torch.device | None = None,
) -> GridResult:
    """Train 13 rates x {1, 4} blocks x {without, with mean patch} by SGD with momentum, as dinov2's eval/linear.

    Unlike there the features are made once, of the centre of each picture; and the classifier is chosen on a tenth of
    ``train`` that is held out.

    Args:
        train: [n, 5 D]: class tokens of the last four blocks, and the mean patch of the last, see ``extract``. Of
            a network with fewer blocks, all of its blocks.
        labels: int64 [n].
        test: [m, 5 D], likewise.
        test_labels: int64 [m].
        dim: D.
        num_steps: of SGD; None: dinov2's, but ``MAX_PASSES`` over ``train`` at most.
        batch_size: pictures a step.
        device: where to compute; None: where ``train`` lies.

    Returns:
        Accuracies, and which classifier was chosen; NaN and none where a feature is not finite.
    """
    if not (train.isfinite().all() and test.isfinite().all()):
        return GridResult(math.nan, math.nan, "none")
    device = device or train.device
    num_classes = int(torch.cat([labels, test_labels]).max()) + 1
    held = held_out(len(train), 10)
    kept, kept_labels = train[~held], labels[~held]
    batch_size = min(batch_size, len(kept))
    num_steps = num_steps or min(NUM_STEPS, MAX_PASSES * -(-len(kept) // batch_size))
    outcomes: list[tuple[float, float, str]] = []
    most = train.shape[1] // dim - 1
    for num_blocks in sorted({1, most}):
        for with_mean in (False, True):
            columns = slice((most - num_blocks) * dim, (most + with_mean) * dim)
            probes = _Probes(num_blocks * dim + with_mean * dim, num_classes, device)
            probes.fit(kept[:, columns], kept_labels, num_steps=num_steps, batch_size=batch_size)
            chosen = probes.accuracies(train[held][:, columns], labels[held])
            told = probes.accuracies(test[:, columns], test_labels)
            blocks = f"last {num_blocks} blocks" if num_blocks > 1 else "last block"
            inputs = f"{blocks}, mean patch" if with_mean else blocks
            outcomes += [(c, t, f"{inputs}, lr {rate:g}") for c, t, rate in zip(chosen, told, RATES, strict=True)]
    best = max(outcomes, key=lambda outcome: outcome[0])
    return GridResult(best[1], max(outcome[1] for outcome in outcomes), best[2])


class _Probes:
    """Linear classifiers on the same features, one for each rate, trained side by side."""

    def __init__(self, num_features: int, num_classes: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        first = 0.01 * torch.randn(num_classes, num_features, generator=generator)
        self._weight = first.to(device).repeat(len(RATES), 1, 1)  # [L, C, F]
        self._bias = torch.zeros(len(RATES), num_classes, device=device)
        self._device = device

    def logits(self, rows: Tensor) -> Tensor:
        """Features [b, F] to [L, b, C]."""
        return torch.baddbmm(self._bias[:, None], rows.expand(len(RATES), -1, -1), self._weight.mT)

    def fit(self, train: Tensor, labels: Tensor, *, num_steps: int, batch_size: int) -> None:
        """Cross-entropy, momentum 0.9, no decay, a cosine from each rate to 0."""
        rates = torch.tensor(RATES, device=self._device) * batch_size / 256
        parameters = [self._weight, self._bias]
        momenta = [torch.zeros_like(parameter) for parameter in parameters]
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(train), generator=generator)
        for step in range(num_steps):
            if len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(train), generator=generator)])
            chosen, order = order[:batch_size], order[batch_size:]
            rows, wanted = train[chosen].to(self._device).float(), labels[chosen].to(self._device)
            error = self.logits(rows).softmax(-1)  # its gradient by the logits is error / b, less 1 / b at the label
            error[:, torch.arange(batch_size, device=self._device), wanted] -= 1
            error /= batch_size
            gradients = [error.mT @ rows, error.sum(1)]  # [L, C, F], [L, C]
            scale = rates * (1 + math.cos(math.pi * step / num_steps)) / 2
            for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                momentum.mul_(0.9).add_(gradient)
                parameter.sub_(scale.view(-1, *[1] * (parameter.ndim - 1)) * momentum)

    def accuracies(self, test: Tensor, labels: Tensor) -> list[float]:
        """Of each rate."""
        right = torch.zeros(len(RATES), dtype=torch.long)
        for rows, wanted in zip(torch.split(test, 4096), torch.split(labels, 4096), strict=True):
            classes = self.logits(rows.to(self._device).float()).argmax(-1).cpu()  # [L, b]
            right += (classes == wanted).sum(1)
        return [float(count) / len(labels) for count in right]
