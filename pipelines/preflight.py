"""What can be checked before work: options, sources, weights, disks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curation.ingest.outcome import PERMANENT, TRANSIENT
from curation.ingest.pagefetcher import OF_PAGES
from curation.ingest.sources import SourceConfig, check_source
from curation.schema import Role
from curation.stage import Stage
from pipelines.curate import CurateRecipe
from training.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line adds to a recipe."""

    until: str | None = None
    redo: tuple[str, ...] = ()
    retry: tuple[str, ...] = ()  # ``transient``, or failure classes
    dry_run: bool = False

    def retried(self) -> frozenset[str]:
        """The failure classes whose rows are fetched again."""
        return frozenset(name for value in self.retry for name in (TRANSIENT if value == "transient" else (value,)))


def named_sources(recipe: CurateRecipe) -> list[tuple[str, Role, SourceConfig]]:
    """All sources of a recipe with their roles: benchmarks and query sets first, so that a longer list moves none.

    A balanced set has no source.
    """
    return [
        *((name, "benchmark", source) for name, source in recipe.benchmarks.items()),
        *((name, "query", query.source) for name, query in recipe.queries.items() if query.source is not None),
        *((name, "pool", source) for name, source in recipe.sources.items()),
    ]


def preflight(recipe: CurateRecipe, stages: Sequence[Stage], options: Options) -> None:
    """Check all that can be checked before work.

    Raises:
        ConfigError: one line for the first thing that is wrong.
    """
    names = [stage.name for stage in stages]
    for option, values in (("--until", [options.until] if options.until else []), ("--redo", list(options.redo))):
        for value in values:
            if value not in names:
                raise ConfigError(f"{option} {value!r} is not a stage; stages: {', '.join(names)}")
    for value in options.retry:
        if value not in ("transient", *TRANSIENT, *PERMANENT, *OF_PAGES):
            raise ConfigError(
                f"--retry {value!r} is no failure class; give transient ({', '.join(TRANSIENT)}) or one of these or "
                f"of {', '.join(PERMANENT)}; of pages also {', '.join(OF_PAGES)}"
            )
    if recipe.sample_web is None:
        check_sources(recipe)
    for stage in stages:
        stage.preflight()
    if absolute(recipe.pool) == absolute(recipe.run):
        raise ConfigError(f"key 'run': got {recipe.run!r}, which is the pool too; give the run a folder of its own")
    for key, location in (("pool", recipe.pool), ("run", recipe.run)):
        if not location.startswith("s3://"):
            _check_disk(key, Path(location), recipe.execution.min_free_gb)


def check_sources(recipe: CurateRecipe) -> None:
    """Check that all sources are there and have their columns.

    Raises:
        ConfigError: names the first that is not as it should be.
    """
    groups = {"pool": "sources", "query": "queries", "benchmark": "benchmarks"}
    for name, role, source in sorted(named_sources(recipe), key=lambda one: list(groups).index(one[1])):
        check_source(f"{groups[role]}.{name}", source)


def _check_disk(key: str, folder: Path, min_free_gb: float) -> None:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"key {key!r}: {there} cannot be written to; give another folder")
    free_gb = shutil.disk_usage(there).free / 1e9
    if free_gb < min_free_gb:
        raise ConfigError(
            f"key {key!r}: {free_gb:.1f} GB free on the disk of {folder}, execution.min_free_gb is {min_free_gb:g}; "
            "free some, or give another folder"
        )


def absolute(location: str) -> str:
    """A path as another folder sees it; an address stays."""
    return location if "://" in location else str(Path(location).absolute())
