"""Checkpoints for resume: sharded (DCP), written in the background, whole or not there, readable by any ranks.

``STAGE/checkpoints/step-00001000/``; DCP writes ``.metadata`` last, and a folder without it is no checkpoint. State is
weights, moments and centres as tensors, and the position as numbers: seed, step and the digest of the data are all that
the stream of samples, the schedules and the randomness of a step are made from.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor

from training.config import CheckpointConfig, ConfigError
from training.parallel import World
from training.step import TrainStep

_DONE = ".metadata"
_PROGRESS = "progress.json"
_PREFIX = "step-"


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: of the stage's checkpoints.
        config: how many to keep.
        world: the processes.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self._pending: tuple[int, Future[Any]] | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f"{_PREFIX}*"):
                if not (path / _DONE).exists():  # a writer was killed
                    shutil.rmtree(path)
        world.barrier()

    def steps(self) -> list[int]:
        """Steps after which a whole checkpoint was written, ascending."""
        return sorted(int(path.parent.name.removeprefix(_PREFIX)) for path in self.folder.glob(f"{_PREFIX}*/{_DONE}"))

    def latest(self) -> int | None:
        """The last of ``steps``, agreed upon by all ranks."""
        steps = self.steps() if self.world.is_main else []
        latest: int | None = self.world.from_main(steps[-1] if steps else None)
        return latest

    def progress(self, step: int) -> dict[str, Any]:
        """What was saved beside the tensors: step, seed, index of the data."""
        progress: dict[str, Any] = json.loads((self._path(step) / _PROGRESS).read_text())
        return progress

    def save(self, step: int, training: TrainStep, progress: dict[str, Any]) -> None:
        """Write the state after ``step`` steps; in the background where configured.

        The state is copied before this returns, so training may go on at once.
        """
        self.wait()
        path = self._path(step)
        if self.world.is_main and not (path / _DONE).exists():
            path.mkdir(parents=True, exist_ok=True)
            (path / _PROGRESS).write_text(json.dumps(progress | {"step": step}, indent=1))
        self.world.barrier()
        if (path / _DONE).exists():
            return
        state = tensors(training)
        is_alone = self.world.mesh is None
        if self.config.background and not is_alone:
            future = async_save(state, checkpoint_id=path, process_group=self.world.writers)
            assert isinstance(future, Future)
            self._pending = (step, future)
        elif self.config.background:
            copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
            self._pending = (step, _in_thread(lambda: _save(copied, path, is_alone=True)))
        else:
            _save(state, path, is_alone=is_alone)
            self._prune()

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole; its error is raised here."""
        if self._pending is None:
            return
        self._pending[1].result()
        self._pending = None
        self.world.barrier()
        self._prune()

    def load(self, step: int, training: TrainStep) -> None:
        """Bring the state after ``step`` steps into the networks and the optimiser, whatever ranks wrote it.

        Raises:
            ConfigError: it cannot be read, or its tensors are not those of this recipe.
        """
        state = tensors(training)
        try:
            with _quiet():
                load(state, checkpoint_id=self._path(step), no_dist=self.world.mesh is None)
        except Exception as error:
            text = " ".join(str(error).split())
            raise ConfigError(
                f"{self._path(step)}: cannot be taken up, it is damaged or of another recipe; remove it to go on from "
                f"the one before: {text:.300}"
            ) from None

    def _prune(self) -> None:
        """Remove all but the latest ``keep``, and those that ``keep_every`` names."""
        if not self.world.is_main:
            return
        for step in self.steps()[: -self.config.keep]:
            if not (self.config.keep_every and step % self.config.keep_every == 0):
                path = self._path(step)
                (path / _DONE).unlink()  # first, so that a half-removed folder is no checkpoint
                shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"


def tensors(training: TrainStep) -> dict[str, Tensor]:
    """Every tensor that a step reads and writes, by name; the very ones, so that loading into them is enough."""
    objective = training.objective
    networks = {"student": objective.student, "teacher": objective.teacher}
    if training.is_distilled:
        networks["result"] = training.result
    if objective.gram_teacher is not None:
        networks["gram_teacher"] = objective.gram_teacher
    state = {
        f"{role}.{name}": tensor for role, network in networks.items() for name, tensor in network.state_dict().items()
    }
    state["cls_center"] = objective.cls_center.center
    state["patch_center"] = objective.patch_center.center
    for name, parameter in objective.student.named_parameters():
        for kind, moment in _moments(training.optimizer, parameter).items():
            state[f"optimizer.{name}.{kind}"] = moment
    return state


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one parameter; as before its first step where it had none."""
    state = optimizer.state[parameter]
    if "step" not in state:
        is_fused = any(group.get("fused") for group in optimizer.param_groups)
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if is_fused else "cpu")
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {kind: state[kind] for kind in ("step", "exp_avg", "exp_avg_sq")}


def _save(state: dict[str, Tensor], path: Path, *, is_alone: bool) -> None:
    with _quiet():
        save(state, checkpoint_id=path, no_dist=is_alone)


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns of a single process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _in_thread(work: Any) -> Future[Any]:
    """Run in a thread of its own."""
    import threading

    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=False).start()
    return future


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unsharded copies on the CPU; every rank must call it."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().to("cpu", copy=True)
        for name, tensor in state.items()
    }
