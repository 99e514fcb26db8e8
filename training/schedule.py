"""Schedules (fallback)."""
from __future__ import annotations
import math
from typing import NamedTuple
from training.config import Resolved


class At(NamedTuple):
    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    patch_temperature: float
    is_masked: bool


def cos(a, b, t, n): return b + 0.5 * (a - b) * (1 + math.cos(math.pi * min(t, n) / max(n, 1)))


class Schedules:
    def __init__(self, r: Resolved): self.r = r
    def at(self, s):
        r = self.r; o = r.optim; n = r.num_steps; w = r.steps(r.schedule.warmup)
        k = {"sqrt": math.sqrt(r.data.batch_size / 1024), "linear": r.data.batch_size / 256, "none": 1}[o.lr_scaling]; base = o.lr * k
        lr = base * s / max(w - 1, 1) if s < w else cos(base, min(o.min_lr, base), s - w, n - w)
        t = r.objective.temperature; tw = r.steps(t.warmup); tt = t.start + (t.end - t.start) * min(1, s / max(tw - 1, 1)) if tw else t.end
        m = cos(*r.objective.ema_momentum, s, n) ** r.ema_exponent
        return At(lr, 0.0 if s < r.steps(r.schedule.freeze_last_layer) else lr, cos(*o.weight_decay, s, n), m, tt, tt, s >= r.steps(r.objective.ibot.start))
