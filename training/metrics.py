"""What a run tells about itself: its log, the alarms that it is watched by, measures of features.

``log.jsonl`` has one line a step, and ``{"step", "alarm"}`` between them; ``bad_samples.jsonl`` beside it names the
pictures that could not be read. A value that is not finite is null. A run that goes on cuts both where it starts, so
each step is there once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from training.config import ConfigError, Resolved
from training.data.samples import BadSample

BAD_SAMPLES = "bad_samples.jsonl"
MAX_SKIPPED = 10  # steps in a row without a finite loss that end the run
STREAK = 10  # steps in a row that raise an alarm: one of them alone may be chance
UNIFORM = 0.01  # distance of a cross-entropy to that of no knowledge (dinov2 issue 407: 8.3178 at K = 4,096)
VANISHED = 0.05  # cross-entropy below which all pictures are told to be the same one (dinov2 issue 272)
LEAST_USE = 0.01
LEAST_RANK = 0.02


class DivergedError(ConfigError):
    """Nothing was learned for many steps, as no loss was finite."""


class Log:
    """The log of a stage; a context manager.

    Args:
        path: of the file; what it and ``bad_samples.jsonl`` say of steps from ``from_step`` on is cut.
        from_step: first step that will be written.
        is_main: whether this rank writes.
        tensorboard: also write scalars to ``tensorboard/`` beside it, where that package is there.
    """

    def __init__(self, path: Path, *, from_step: int, is_main: bool, tensorboard: bool = False) -> None:
        self._file: TextIO | None = None
        self._bad_file: TextIO | None = None  # opened with the first bad picture
        self._bad_path = path.with_name(BAD_SAMPLES)
        self._board: Any = None
        if not is_main:
            return
        for kept in (path, self._bad_path):
            if kept.exists():
                _cut(kept, from_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._board = _board(path.with_name("tensorboard"), from_step)
            if self._board is None:
                self.note(from_step, "no scalars for TensorBoard: the package tensorboard is not installed")

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Write the values of a step."""
        _line(self._file, {"step": step} | {name: _finite(value) for name, value in record.items()})
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(name, float(value), step)

    def note(self, step: int, text: str) -> None:
        """Write an alarm."""
        _line(self._file, {"step": step, "alarm": text})
        if self._board is not None:
            self._board.add_text("alarm", text, step)

    def bad(self, step: int, sample: BadSample) -> None:
        """Write which picture could not be read."""
        if self._file is not None and self._bad_file is None:
            self._bad_file = self._bad_path.open("a", encoding="utf-8")
        _line(self._bad_file, {"step": step} | dataclasses.asdict(sample))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._bad_file, self._board):
            if file is not None:
                file.close()


def _line(file: TextIO | None, values: Mapping[str, Any]) -> None:
    """Append a line that is on disk even where the process is killed after it; None: of a rank that writes nothing."""
    if file is not None:
        file.write(json.dumps(values) + "\n")
        file.flush()


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _cut(path: Path, from_step: int) -> None:
    """Cut a log before the first line of ``from_step`` or later; a line that was written in part goes too."""
    kept_bytes = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if step >= from_step or not line.endswith(b"\n"):
                break
            kept_bytes += len(line)
        file.truncate(kept_bytes)


def _board(folder: Path, from_step: int) -> Any:
    """A writer of scalars; None where there is none."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=from_step)


# Alarms


class Rails:
    """Looks at each step's record and says what is wrong with it.

    An alarm is told when it has held for ``STREAK`` steps, and again only after it was off in between.

    Args:
        resolved: the stage.
    """

    def __init__(self, resolved: Resolved) -> None:
        objective = resolved.objective
        self._settled = max(resolved.steps(resolved.schedule.warmup), resolved.steps(objective.temperature.warmup))
        # cross-entropy of a student that knows nothing; iBOT's is a mean over all crops, masked or not
        self._ignorant: dict[str, float] = {}
        if objective.dino.weight:
            self._ignorant["dino"] = math.log(objective.dino.head.num_prototypes)
        if objective.ibot.weight:
            head = objective.ibot.head or objective.dino.head
            num_crops = 2 * (resolved.data.micro_batch_size or resolved.data.batch_size)
            masked = (
                1.0 if resolved.stage.kind == "distill" else resolved.masks.probability
            )  # of a distilled one, all count
            share = int(num_crops * masked) / num_crops
            if share:
                self._ignorant["ibot"] = math.log(head.num_prototypes) * share
        self._first_masked = resolved.steps(objective.ibot.start)
        self._dim = resolved.model.shape[0]
        self._num_skipped = 0
        self._streaks: dict[str, int] = {}

    def check(self, record: Mapping[str, float], step: int) -> list[str]:
        """Alarms to tell after a step.

        Args:
            record: values of the step, the same on all ranks as far as it ends the run.
            step: its number.

        Raises:
            DivergedError: ``MAX_SKIPPED`` steps in a row were not finite.
        """
        if record.get("is_skipped"):
            return [self._skipped(record, step)]
        self._num_skipped = 0
        held = self._held(record, step)
        self._streaks = {name: self._streaks.get(name, 0) + 1 for name in held}
        return [text for name, text in held.items() if self._streaks[name] == _patience(name)]

    def _skipped(self, record: Mapping[str, float], step: int) -> str:
        self._num_skipped += 1
        names = ", ".join(name for name, value in record.items() if not math.isfinite(value)) or "a loss or gradient"
        if self._num_skipped >= MAX_SKIPPED:
            raise DivergedError(
                f"step {step:,}: {names} not finite for {MAX_SKIPPED} steps in a row; go on with "
                "parallel.precision=fp32, or start another run=FOLDER with a lower optim.lr or optim.clip"
            )
        return f"{names} not finite: step skipped, weights and teacher stay ({self._num_skipped} in a row)"

    def _held(self, record: Mapping[str, float], step: int) -> dict[str, str]:
        """What is wrong with the record of a step, by a name that stays the same."""
        held: dict[str, str] = {}
        for name, value in record.items():
            if name.startswith("rank_me") and not math.isfinite(value):
                held[name] = f"{name} {value}: features of the teacher are not finite, nothing can be measured on them"
            elif name.startswith("rank_me") and value < max(2.0, LEAST_RANK * self._dim):
                held[name] = f"{name} {value:.1f} of {self._dim}: features lie in few directions"
        if step < self._settled:
            return held
        for name, ignorant in self._ignorant.items():
            value = record.get(name, math.nan)
            if name == "ibot" and step < self._first_masked:
                continue
            if abs(value - ignorant) < UNIFORM:
                held[f"{name} uniform"] = (
                    f"{name} {value:.4f} is that of no knowledge ({ignorant:.4f}): uniform collapse"
                )
            elif value < VANISHED:
                held[f"{name} vanished"] = f"{name} {value:.4f} is nearly 0: all pictures fall on one prototype"
        if record.get("prototype_use", 1.0) < LEAST_USE:
            held["use"] = "the teacher uses next to no prototypes: collapse"
        if record.get("duplicate_pairs", 0) > 0:
            held["pairs"] = (
                f"{record['duplicate_pairs']:.0f} pairs of equal class tokens: duplicates in data, or collapse"
            )
        return held


def _patience(name: str) -> int:
    """Steps that an alarm must hold; features are measured now and then only."""
    return 1 if name.startswith("rank_me") else STREAK


# Measures


class PrototypeUse:
    """How many prototypes are the first choice of some teacher row, over a window of steps.

    Args:
        num_prototypes: K.
        window: steps.
    """

    def __init__(self, num_prototypes: int, window: int = 100) -> None:
        self._last = torch.full((num_prototypes,), -1, dtype=torch.long)
        self._window, self._step, self._rows = window, 0, [0] * window

    def update(self, targets: Tensor) -> float:
        """Take the teacher's rows [n, K] of a step; share of those prototypes that could have been used that were."""
        self._last = self._last.to(targets.device)
        self._last[targets.argmax(-1)] = self._step
        self._rows[self._step % self._window] = len(targets)
        used = int((self._last > self._step - self._window).logical_and(self._last >= 0).sum())
        self._step += 1
        return used / max(min(len(self._last), sum(self._rows)), 1)


@torch.no_grad()
def rank_me(x: Tensor) -> float:
    """Effective rank of features [n, D]: exp of the entropy of normalised singular values (Garrido et al. 2023).

    1 where all rows are alike, up to min(n, D); NaN where a feature is not finite.
    """
    if not x.isfinite().all():
        return math.nan
    rows = x.double()
    square = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-300) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))
