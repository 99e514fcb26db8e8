"""``lvd train``, ``lvd export``, ``lvd eval``: what stands around the trainer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.held_out import NAME as HELD_OUT
from pipelines.held_out import write_held_out
from pipelines.recipe import TRAINING_RECIPES, dump_recipe, load_recipe
from training.config import EvalConfig, EvalSet, TrainRecipe

Say = Callable[[str], None]


def load_training_recipe(name: str, overrides: Sequence[str] = ()) -> TrainRecipe:
    """A training recipe, checked.

    Raises:
        ConfigError: one line that names the key, the value got and the values allowed.
    """
    return load_recipe(TrainRecipe, name, overrides, folder=TRAINING_RECIPES)


def train(recipe: TrainRecipe, say: Say) -> dict[str, Any]:
    """Run a recipe; where its results lie and what the last steps measured.

    Raises:
        ConfigError: the recipe does not fit what is there; before any work.
    """
    # Threads of a matrix product that wait in a loop take the cores from the loader's workers, and from others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from training.train import train as run_stages

    started = time.monotonic()
    if os.environ.get("RANK", "0") == "0":
        run = Path(recipe.run)
        run.mkdir(parents=True, exist_ok=True)
        _write_held_out(recipe, say)
        (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    results = run_stages(recipe, say)
    last = results[-1]
    files = ("teacher", "teacher.safetensors"), ("plot", "plot.png")
    return {
        "recipe": recipe.name,
        "run": recipe.run,
        "wall_s": time.monotonic() - started,
        "stages": {result.folder.name: result.record | {"num_steps": result.num_steps} for result in results},
        **{name: str(last.folder / file) if last.is_whole else None for name, file in files},
    }


def _write_held_out(recipe: TrainRecipe, say: Say) -> None:
    """Make the sets that name ``held_out.parquet`` of a run, where the run has none yet."""
    for name in recipe.stages:
        for labelled in recipe.resolved(name).evaluation.sets.values():
            path = Path(labelled.train.location)
            if path.name == HELD_OUT and _is_stale(path):
                write_held_out(str(path.parent))
                say(f"held out  {path}")


def _is_stale(path: Path) -> bool:
    """Whether a held-out set is not there, or older than the manifest of its run."""
    if not path.exists():
        return True
    written = path.stat().st_mtime
    return any(part.stat().st_mtime > written for part in (path.parent / "manifest").glob("*.parquet"))


def evaluate(options: Any) -> dict[str, float]:
    """kNN, and linear probes where asked, of a network on labelled pictures.

    Args:
        options: weights, kind, data, label, split, readout, size, linear, as the command line gives them.
    """
    from training.eval.evaluate import evaluate_file

    part = {"kind": options.kind, "location": options.data}
    train_part, test_part = part, None
    if options.split is not None:
        train_part, test_part = (part | {"where": value} for value in options.split)
    labelled = EvalSet.model_validate({"train": train_part, "test": test_part, "label": options.label})
    config = EvalConfig(sets={"set": labelled}, readout=options.readout, image_px=options.size, linear=options.linear)
    return evaluate_file(Path(options.weights), config)
