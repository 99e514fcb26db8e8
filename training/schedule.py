"""Values that change over a stage, as functions of the step: nothing to store, nothing to resume.

Shapes of dinov2's CosineScheduler: a linear warm-up whose last step has the base value, then half a cosine that would
reach the final value one step after the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from training.config import Range, Resolved, TemperatureConfig


class At(NamedTuple):
    """The values at one step."""

    lr: float  # before multipliers
    last_layer_lr: float
    weight_decay: float
    momentum: float  # of the teacher
    teacher_temperature: float
    patch_temperature: float
    is_masked: bool  # whether iBOT has begun


def cosine(step: int, ends: Range, *, total: int, warmup: int = 0, start: float = 0.0) -> float:
    """Linear from ``start`` to the first of ``ends`` over ``warmup`` steps, then a cosine to the second.

    Args:
        step: from 0; past ``total`` the value is the second of ``ends``.
        ends: base and final value.
        total: steps.
        warmup: steps of the linear part; its last one has the base value.
        start: value at step 0 where there is a warm-up.
    """
    base, final = ends
    if step >= total:
        return final
    if step < warmup:
        return linear(step, (start, base), length=warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def linear(step: int, ends: Range, *, length: int) -> float:
    """From the first to the second of ``ends``, which the last of ``length`` steps has."""
    if step >= length:
        return ends[1]
    # A length of 1 is its start, as numpy's linspace has it.
    return ends[0] + (ends[1] - ends[0]) * step / max(length - 1, 1)


class Schedules:
    """All schedules of a stage."""

    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        optim, batch = resolved.optim, resolved.data.batch_size
        scale = {"sqrt": math.sqrt(batch / 1024), "linear": batch / 256, "none": 1.0}[optim.lr_scaling]
        self._lr = (optim.lr * scale, min(optim.min_lr, optim.lr * scale))
        self._warmup = resolved.steps(resolved.schedule.warmup)
        self._frozen = resolved.steps(resolved.schedule.freeze_last_layer)
        self._ibot_start = resolved.steps(resolved.objective.ibot.start)

    def at(self, step: int) -> At:
        """The values at a step, from 0."""
        resolved, total = self._resolved, self._resolved.num_steps
        objective = resolved.objective
        lr = cosine(step, self._lr, total=total, warmup=self._warmup)
        momentum = cosine(step, objective.ema_momentum, total=total)
        temperature = self._temperature(step, objective.temperature)
        patches = objective.ibot.temperature
        return At(
            lr=lr,
            last_layer_lr=0.0 if step < self._frozen else lr,
            weight_decay=cosine(step, resolved.optim.weight_decay, total=total),
            momentum=momentum**resolved.ema_exponent,
            teacher_temperature=temperature,
            patch_temperature=self._temperature(step, patches) if patches is not None else temperature,
            is_masked=objective.ibot.weight > 0 and step >= self._ibot_start,
        )

    def _temperature(self, step: int, config: TemperatureConfig) -> float:
        return linear(step, (config.start, config.end), length=self._resolved.steps(config.warmup))
