"""A training run, top to bottom: stages in order, each resumed where it stands.

``RUN/STAGE/`` holds ``checkpoints/``, ``log.jsonl``, ``plot.png``, ``teacher.safetensors`` (backbone, as timm reads
it where it can), ``network.safetensors`` (backbone and heads, dinov2's names) and ``done.json`` when it is finished;
``best/`` holds the two files as they were when kNN was highest. Where a stage starts: its latest whole checkpoint; else
what ``init.source`` names.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.checkpoint import Checkpoints, whole
from training.config import ConfigError, Resolved, TrainRecipe
from training.data.collate import Batch
from training.data.index import Index
from training.data.loader import Loader
from training.export import load_network, read_network, write_network
from training.metrics import Log, Rails
from training.models.network import Network
from training.models.vit import VisionTransformer
from training.objective import Objective
from training.parallel import World, distribute, slow_precision, start, stop
from training.plot import plot
from training.schedule import Schedules
from training.step import TrainStep

Say = Callable[[str], None]


class StageResult(NamedTuple):
    """What a finished stage left."""

    folder: Path
    num_steps: int
    record: dict[str, float]  # last logged values
    is_whole: bool = True  # False where checkpoint.stop_after ended it


def train(recipe: TrainRecipe, say: Say) -> list[StageResult]:
    """Run every stage of a recipe that is not finished yet.

    Args:
        recipe: what to do.
        say: called with lines for a person, on rank 0.

    Returns:
        One result a stage.

    Raises:
        ConfigError: the recipe does not fit what is there; before any work.
    """
    world = start(recipe.parallel)
    try:
        results: list[StageResult] = []
        for name in recipe.stages:
            before = results[-1].folder if results else None
            stage = Stage(recipe, name, world, say if world.is_main else _silent, previous=before)
            results.append(stage.run())
            if not results[-1].is_whole:
                break
        return results
    finally:
        stop()


def _silent(text: str) -> None:
    del text


class Stage:
    """One stage of a run."""

    def __init__(self, recipe: TrainRecipe, name: str, world: World, say: Say, *, previous: Path | None) -> None:
        self.resolved = recipe.resolved(name)
        self.world, self.say, self.previous = world, say, previous
        self.folder = Path(recipe.run) / name
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_other_recipe()

    def run(self) -> StageResult:
        """Train until the end of the schedule, unless that was done before."""
        done = self.folder / "done.json"
        checkpoints = Checkpoints(self.folder / "checkpoints", self.resolved.checkpoint, self.world)
        index = Index.open(self.resolved.data, cache=self.folder.parent / "index")
        step = checkpoints.latest()
        if step is not None:
            progress = checkpoints.progress(step)
            index.check_same(progress["data"], progress.get("shares"))
        if done.exists():
            facts = json.loads(done.read_text())
            self.say(f"{self.resolved.name}: done before, {facts['num_steps']:,} steps")
            return StageResult(self.folder, facts["num_steps"], facts["record"])
        parts = ", ".join(f"{part.num_samples:,} of {part.name}" for part in index.parts)
        self.say(f"{self.resolved.name}: {index.num_samples:,} pictures ({parts}), {self.resolved.num_steps:,} steps")
        for note in index.notes:
            self.say(f"{self.resolved.name}: {note}")
        if slow := slow_precision(self.resolved.parallel.precision, self.world.device):
            self.say(f"{self.resolved.name}: {slow}")
        momentum = self.resolved.stage.distill.output_momentum
        left = momentum**self.resolved.num_steps
        if self.resolved.stage.kind == "distill" and left > 0.01:
            self.say(
                f"{self.resolved.name}: distill.output_momentum {momentum} leaves {left:.0%} of the first weights in "
                f"the result after {self.resolved.num_steps:,} steps; lower it, or train longer"
            )
        training = self.build()
        first = 0
        if step is not None:
            checkpoints.load(step, training)
            self.say(f"{self.resolved.name}: goes on after step {step:,}")
            first = step
        record = self._loop(training, checkpoints, index, first)
        checkpoints.wait()
        if self._last_step < self.resolved.num_steps:
            stopped = max(first, self._last_step)
            self.say(f"{self.resolved.name}: stands after step {stopped:,}; a larger checkpoint.stop_after goes on")
            return StageResult(self.folder, stopped, record, is_whole=False)
        self._finish(training, record)
        return StageResult(self.folder, self.resolved.num_steps, record)

    @property
    def _last_step(self) -> int:
        stop_after = self.resolved.checkpoint.stop_after
        return min(self.resolved.num_steps, stop_after or self.resolved.num_steps)

    # Networks

    def build(self) -> TrainStep:
        """Networks with their starting weights, laid over the devices, and the step that moves them."""
        resolved, world = self.resolved, self.world
        is_distill = resolved.stage.kind == "distill"
        distill = resolved.stage.distill
        held = read_network(self._source(distill.teacher), model=distill.model) if is_distill else None
        student = self._student(
            held.network.backbone.dim if held and resolved.stage.distill.mode == "feature" else None
        )
        torch.manual_seed(resolved.seed)
        student.init_weights()
        self._load_start(student)
        copied = self._student_twin(student)
        teacher = held.network if held is not None else copied
        if held is not None and resolved.stage.distill.mode == "heads":
            _check_heads(student, teacher)
        if held is not None:
            _check_patches(resolved, held.model.patch_px)
        gram = self._gram_teacher(student)
        parallel = resolved.parallel
        distribute(student, world, parallel)
        for frozen in (teacher, gram):
            if frozen is not None:
                distribute(frozen, world, parallel, is_trained=False)
        objective = Objective(resolved, student, teacher, gram).place(world)
        result = distribute(copied, world, parallel, is_trained=False) if is_distill else None
        return TrainStep(resolved, objective, world, result=result)

    def _student(self, feature_dim: int | None = None) -> Network:
        resolved = self.resolved
        attention = resolved.parallel.attention
        return Network(resolved.model, resolved.objective, attention=attention, feature_dim=feature_dim)

    def _student_twin(self, student: Network) -> Network:
        twin = self._student(student.feature_map.out_features if student.feature_map is not None else None)
        twin.load_state_dict(student.state_dict())
        return twin.requires_grad_(False).eval()

    def _gram_teacher(self, student: Network) -> Network | None:
        """What patch similarities are held to: the file that is named, else the weights that the stage starts from."""
        gram = self.resolved.objective.gram
        if not gram.weight:
            return None
        network = Network(self.resolved.model, self.resolved.objective, with_heads=False)
        network.backbone.load_state_dict(student.backbone.state_dict())
        if gram.checkpoint is not None:
            load_network(network, Path(gram.checkpoint), with_heads=False)
        return network

    def _load_start(self, student: Network) -> None:
        """Weights that the stage starts from, where it does not start from random ones."""
        init = self.resolved.stage.init
        if init.source == "random" or (init.source == "previous" and self.previous is None):
            return
        if self.resolved.stage.kind == "distill" and init.source == "previous":
            return  # the stage before is the teacher; the student is another network
        report = load_network(student, self._source(init.source), with_heads=init.heads)
        self.say(f"{self.resolved.name}: weights from {init.source}: {report}")

    def _source(self, name: str) -> Path:
        if name != "previous":
            return Path(name)
        if self.previous is None:
            raise ConfigError(
                f"stage {self.resolved.name!r}: source 'previous', and there is no stage before it; give a file's path"
            )
        return self.previous / "network.safetensors"

    # Resume

    def _refuse_other_recipe(self) -> None:
        """A stage goes on under the recipe that it was begun with; the first key that differs is named."""
        path = self.folder / "recipe.json"
        values = json.loads(json.dumps(self.resolved.fingerprint_values()))
        checkpoints = self.folder / "checkpoints"
        begun = (self.folder / "done.json").exists() or any(checkpoints.glob("step-*/.metadata"))
        text = None
        if self.world.is_main and begun and path.exists():
            text = _first_difference(self.resolved.filled(json.loads(path.read_text())), values)
        elif self.world.is_main:
            beside = path.with_suffix(".tmp")
            beside.write_text(json.dumps(values, indent=1))
            beside.replace(path)
        text = self.world.from_main(text)
        if text is not None:
            raise ConfigError(
                f"{self.folder}: was begun with another recipe: {text}; set it back, or give another run=FOLDER"
            )

    # Loop

    def _loop(self, training: TrainStep, checkpoints: Checkpoints, index: Index, first: int) -> dict[str, float]:
        resolved, world = self.resolved, self.world
        num_steps, last = resolved.num_steps, self._last_step
        schedules = Schedules(resolved)
        loader = Loader(resolved, index, rank=world.rank, world=world.size, start_step=first, device=world.device)
        log = Log(
            self.folder / "log.jsonl",
            from_step=first,
            is_main=world.is_main,
            tensorboard=resolved.checkpoint.tensorboard,
        )
        rails = Rails(resolved)
        evaluator = self._evaluator()
        record = _last_record(self.folder / "log.jsonl", first) if first >= last else {}
        if first == 0 and world.is_main:
            shutil.rmtree(self.folder / "best", ignore_errors=True)  # of a run that never came to a checkpoint
        started = time.monotonic()
        with log, loader:
            batches = iter(loader)
            for step in range(first, last):
                self._gram(training, step)
                micros = _take(batches, loader.num_micros)
                record = training(micros, schedules.at(step), step)
                record |= schedules.at(step)._asdict()
                keys = "\n".join(key for micro in micros for key in micro.keys)
                record |= {"samples": zlib.crc32(keys.encode())}  # of rank 0: which pictures, for comparing runs
                record |= {"wait_s": loader.take_wait_s(), "elapsed_s": time.monotonic() - started}
                for bad in loader.take_bad():
                    log.bad(step, bad)
                if evaluator is not None and ((step + 1) % resolved.evaluation.every == 0 or step + 1 == num_steps):
                    record |= evaluator(training.result)
                    self._keep_best(training.result, record, step)
                for alarm in rails.check(record, step):
                    log.note(step, alarm)
                    self.say(f"{resolved.name}: step {step:,}: {alarm}")
                log.write(step, record)
                self._say_progress(step, first, record, started)
                if self._is_saved(step + 1):
                    progress = {"seed": resolved.seed, "data": index.summary(), "shares": index.shares()}
                    checkpoints.save(step + 1, training, progress)
        return record

    def _is_saved(self, step: int) -> bool:
        """Whether a checkpoint is written after so many steps."""
        config = self.resolved.checkpoint
        is_kept = config.keep_every is not None and step % config.keep_every == 0
        return step % config.every == 0 or is_kept or step == self._last_step

    def _keep_best(self, result: Network, record: dict[str, float], step: int) -> None:
        """Write the network to ``best`` where its kNN, the mean over sets, is above that of all before it.

        A run that was killed makes the same ones again, so what it wrote after its last checkpoint stays right.
        """
        folder = self.folder / "best"
        knn = statistics.fmean(record[f"knn_{name}"] for name in self.resolved.evaluation.sets)
        about = folder / "record.json"
        best = json.loads(about.read_text())["knn"] if self.world.is_main and about.exists() else -math.inf
        if not self.world.from_main(knn > best):
            return
        state = whole(dict(result.state_dict()))
        if self.world.is_main:
            folder.mkdir(exist_ok=True)
            write_network(folder, state, self.resolved)
            beside = about.with_suffix(".tmp")
            beside.write_text(json.dumps({"num_steps": step + 1, "knn": knn}, indent=1))
            beside.replace(about)

    def _gram(self, training: TrainStep, step: int) -> None:
        """Take the teacher of now as the gram teacher at the start of gram, and at each refresh."""
        gram = self.resolved.objective.gram
        since = step - self.resolved.steps(gram.start)
        training.objective.is_gram_on = training.objective.gram_teacher is not None and since >= 0
        if training.objective.gram_teacher is None or gram.checkpoint is not None:
            return
        num_refreshes = since // gram.refresh if gram.refresh else 0
        is_refresh = bool(gram.refresh) and since % (gram.refresh or 1) == 0 and num_refreshes <= gram.max_refreshes
        if since == 0 or (since > 0 and is_refresh):
            training.objective.refresh_gram()

    def _evaluator(self) -> Callable[[Network], dict[str, float]] | None:
        """Measures a network on the recipe's labelled sets; None where it names none."""
        evaluation = self.resolved.evaluation
        if not evaluation.sets:
            return None
        from training.eval.evaluate import Evaluator

        evaluator, wrong = None, None
        if self.world.is_main:
            try:
                evaluator = Evaluator(evaluation, self.resolved.views)
            except ConfigError as error:
                wrong = str(error)
        wrong = self.world.from_main(wrong)  # else the other ranks would wait for a rank that is gone
        if wrong is not None:
            raise ConfigError(wrong)

        def measure(network: Network) -> dict[str, float]:
            state = whole(dict(network.backbone.state_dict()))
            found: dict[str, float] = {}
            if evaluator is not None:  # on one rank, with the whole network: the others wait
                plain = VisionTransformer(self.resolved.model)
                plain.load_state_dict(state)
                found = evaluator(plain.to(self.world.device).eval())
            measured: dict[str, float] = self.world.from_main(found)
            return measured

        return measure

    # End

    def _say_progress(self, step: int, first: int, record: dict[str, float], started: float) -> None:
        """A line every twentieth of the stage, and with every measurement."""
        num_steps = self.resolved.num_steps
        is_due = (
            (step + 1) % max(1, num_steps // 20) == 0 or step == first or any(key.startswith("knn") for key in record)
        )
        if not is_due:
            return
        seconds = time.monotonic() - started
        rate = (step + 1 - first) / max(seconds, 1e-9)
        left = (num_steps - step - 1) / rate
        shown = [
            f"{name} {record[name]:.3f}" for name in ("dino", "ibot", "koleo", "gram", "feature") if name in record
        ]
        shown += [f"{name} {value:.3f}" for name, value in record.items() if name.startswith(("knn", "linear"))]
        pictures = rate * self.resolved.data.batch_size
        self.say(
            f"step {step + 1:>7,} of {num_steps:,}  {'  '.join(shown)}  {pictures:,.1f} pictures/s, {left:,.0f} s left"
        )

    def _finish(self, training: TrainStep, record: dict[str, float]) -> None:
        """Write what the stage was for."""
        state = whole(dict(training.result.state_dict()))
        if self.world.is_main:
            write_network(self.folder, state, self.resolved)
            plot(self.folder / "log.jsonl", self.folder / "plot.png")
            top = self.folder.parent
            for name in ("teacher.safetensors", "network.safetensors", "plot.png"):
                shutil.copyfile(self.folder / name, top / f".{name}")
                (top / f".{name}").replace(top / name)
            facts = {"num_steps": self.resolved.num_steps, "record": record, "torch": torch.__version__}
            (self.folder / "done.json").write_text(json.dumps(facts | {"machine": platform.platform()}, indent=1))
        self.world.barrier()


def _last_record(log: Path, num_steps: int) -> dict[str, float]:
    """What the log says of the last of ``num_steps``: of a run that was killed between its end and saying so."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    records = [line for line in lines if line["step"] == num_steps - 1 and "lr" in line]
    return {name: value for name, value in records[-1].items() if name != "step"} if records else {}


def _take(batches: Iterator[Batch], num: int) -> list[Batch]:
    return [next(batches) for _ in range(num)]


def _check_heads(student: Network, teacher: Network) -> None:
    """A student that learns a teacher's prototypes has as many.

    Raises:
        ConfigError: the teacher has no such head, or another number of prototypes.
    """
    held = teacher.heads()
    for name, head in student.heads().items():
        if name not in held or set(held) != set(student.heads()):
            raise ConfigError(
                f"distill: the teacher has {', '.join(held) or 'no heads'}, the student {', '.join(student.heads())}; "
                "take distill.mode=feature, or train heads for it in a stage "
                "of its own with init.freeze_backbone"
            )
        if head.num_prototypes != held[name].num_prototypes:
            raise ConfigError(
                f"distill: the teacher's {name} has {held[name].num_prototypes:,} prototypes, the student's "
                f"{head.num_prototypes:,}; set objective.*.head.num_prototypes"
            )


def _check_patches(resolved: Resolved, patch_px: int) -> None:
    """Patches of teacher and student must lie on one grid where the same head reads both.

    Raises:
        ConfigError: they do not, or the teacher cannot be given the crops.
    """
    mine, side = resolved.model.patch_px, resolved.views.global_px
    if resolved.stage.distill.mode == "heads" and patch_px != mine:
        raise ConfigError(
            f"distill: the teacher's patches are {patch_px} px, the student's {mine}; take distill.mode=feature"
        )
    if side % patch_px:
        raise ConfigError(f"distill: views.global_px {side} must be a multiple of the teacher's patch of {patch_px} px")


def _first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """First key whose values differ, with both; None where all are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in list(new) + [key for key in old if key not in new]:
            found = _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    return None if old == new else f"{path} was {old!r}, is {new!r}"
