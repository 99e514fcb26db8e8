"""One optimiser step: all micro-batches forward and backward, clip, rails, AdamW, EMA."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from training.config import Resolved
from training.data.collate import Batch
from training.models.network import Network
from training.objective import Objective, Targets, Views
from training.optim import apply_schedule, build_optimizer, clip, parameter_groups, update_teacher
from training.parallel import World
from training.schedule import At


class TrainStep:
    """Takes the micro-batches of a step and moves the weights once.

    All randomness of a step is seeded by (seed, step, micro-batch, rank), so no generator has a state to save.

    Attributes:
        objective: the networks and losses.
        optimizer: AdamW over the student.
        result: the network that the run is for: the EMA teacher, or in a distill stage the spare EMA of the student.
    """

    def __init__(
        self, resolved: Resolved, objective: Objective, world: World, *, result: Network | None = None
    ) -> None:
        self.resolved, self.objective, self.world = resolved, objective, world
        self.is_distilled = result is not None
        self.result = result if result is not None else objective.teacher
        depth = resolved.model.shape[1]
        groups = parameter_groups(objective.student, resolved.optim, depth)
        self.optimizer = build_optimizer(groups, resolved.optim)
        self._frozen_steps = resolved.steps(resolved.stage.init.freeze_backbone)

    def __call__(self, batches: Sequence[Batch], at: At, step: int) -> dict[str, float]:
        """One step.

        Args:
            batches: this rank's micro-batches.
            at: values of the schedules at this step.
            step: its number, from 0.

        Returns:
            Mean terms over micro-batches and ranks, gradient norms, and ``is_skipped``: 1 when a loss or a gradient was
            not finite, so that neither weights, teacher nor centres moved.
        """
        objective = self.objective
        objective.student.train()
        centers = objective.centers()
        micros = [objective.views(batch, is_masked=at.is_masked) for batch in batches]
        targets = objective.targets(micros, at)
        gradients, spread = self._spread_of_step(micros, step)
        terms = self._backward(micros, targets, gradients, step)
        if spread is not None:
            terms["koleo"] = spread
        record = self._mean(terms)
        if step < self._frozen_steps:
            for parameter in objective.student.backbone.parameters():
                parameter.grad = None
        norms = clip(objective.student, self.resolved.optim)
        record |= {f"norm_{name}": float(norm) for name, norm in norms.items()}
        is_finite = all(math.isfinite(value) for value in record.values())
        if is_finite:
            apply_schedule(self.optimizer, at)
            self.optimizer.step()
            self._average(at)
        else:
            objective.restore_centers(centers)
        self.optimizer.zero_grad(set_to_none=True)
        record["is_skipped"] = float(not is_finite)
        record |= objective.telemetry(targets)
        return record

    def _average(self, at: At) -> None:
        """Move the result, and a teacher that follows the student, towards the student."""
        if self.is_distilled:
            update_teacher(self.objective.student, self.result, self.resolved.stage.distill.output_momentum)
        else:
            update_teacher(self.objective.student, self.result, at.momentum)

    def _backward(
        self, micros: Sequence[Views], targets: Sequence[Targets], gradients: list[Tensor] | None, step: int
    ) -> dict[str, Tensor]:
        """Accumulate gradients of the mean loss; mean terms."""
        totals: dict[str, Tensor] = {}
        for index, (views, target) in enumerate(zip(micros, targets, strict=True)):
            self._seed(step, index)
            # The KoLeo of a whole step is no mean over micro-batches: its gradient comes as it is.
            injected = gradients[index] * len(micros) if gradients is not None else None
            loss, terms = self.objective.losses(views, target, injected)
            (loss / len(micros)).backward()  # type: ignore[no-untyped-call]
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term / len(micros)
        return totals

    def _spread_of_step(self, micros: Sequence[Views], step: int) -> tuple[list[Tensor] | None, Tensor | None]:
        """KoLeo over the class tokens of all micro-batches: its gradient for each of them [C, D], and its value.

        It costs a forward pass without gradient, and is needed only where there are several micro-batches.
        """
        config = self.resolved.objective.koleo
        if config.scope == "micro" or not config.weight or len(micros) == 1:
            return None, None
        tokens = []
        with torch.no_grad():
            for index, views in enumerate(micros):
                self._seed(step, index)
                tokens.append(self.objective.cls_tokens(views))
        firsts, seconds = zip(*(cls.chunk(2) for cls in tokens), strict=True)
        joined = torch.cat([*firsts, *seconds]).requires_grad_()  # view-major over the whole step
        spread = self.objective.spread(joined)
        (gradient,) = torch.autograd.grad(spread, joined)
        sizes = [len(first) for first in firsts]
        by_view = [torch.split(half, sizes) for half in gradient.chunk(2)]
        return [torch.cat(pair) for pair in zip(*by_view, strict=True)], spread.detach()

    def _mean(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Terms over all ranks, in one reduction and one copy from the device."""
        values = self.world.mean(torch.stack([term.float() for term in terms.values()]))
        return dict(zip(terms, values.tolist(), strict=True))

    def _seed(self, step: int, micro: int) -> None:
        text = f"{self.resolved.seed}/{step}/{micro}/{self.world.rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)
