"""The settings that a run was made with, as the footers of its tables tell them, held against its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curation.retrieve.retrieve import first_parts
from curation.schema import TABLES, Part, first_shard
from curation.store import open_store, read_footer
from training.config import ConfigError

if TYPE_CHECKING:
    from pipelines.results import Database

# Section of a recipe -> the table whose parts say with which of its values they were made.
_MADE_WITH = {
    "screen": "screened",
    "fetch": "images",
    "look": "detections",
    "safety": "safety",
    "near": "near",
    "descriptor": "descriptors",
    "duplicates": "duplicates",
    "leakage": "leakage",
    "embed": "embeddings",
    "cluster": "fit_kmeans",
    "semdedup": "semantic",
    "select": "selection",
    "export": "shards",
}
# What of a query set says what it asks for, by mode.
ASKED: dict[str, tuple[str, ...]] = {
    "as_is": (),
    "sample": ("k",),
    "cluster": ("min_queries", "per_cluster", "cap"),
    "balanced": ("total",),
}
_FITS = {"descriptor": "fit_descriptor", "embed": "fit_embedder"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run was made with."""

    # The recipe's values, over them those that were recorded: thresholds that were left to a descriptor, digests of
    # models (look.nudenet, look.yunet, descriptor.weights_sha256, embed.weights_sha256).
    sections: Mapping[str, Mapping[str, Any]]
    fits: Mapping[str, str]  # content digests of what was fitted, by section: descriptor, embed


def settings_of(database: Database, recipe: Mapping[str, Any]) -> Settings:
    """Read them from the first part of each table.

    Args:
        database: an opened run.
        recipe: the recipe of the run, as JSON-able values.

    Raises:
        ConfigError: the tables were made with other values than the recipe says: a later command did not reach them.
    """
    stores = {"pool": open_store(database.pool), "run": open_store(database.run)}

    def inputs(table: str, index: int) -> Mapping[str, Any]:
        root = TABLES[table].root
        footer = read_footer(stores[root], Part(root, database.state["folders"].get(table, table), index))
        return {} if footer is None else footer.inputs

    query = "SELECT coalesce(min(source_id), 0) FROM sources WHERE role = 'pool' AND num_shards > 0"
    shard = first_shard(database.connection.execute(query).fetchone()[0])
    sections, fits = {}, {}
    for section, table in _MADE_WITH.items():
        made = inputs(table, shard if TABLES[table].parts == "shard" else 0)
        # A stage whose settings stand in several sections records them with their section.
        config = {key.removeprefix(f"{section}."): value for key, value in made.get("config", {}).items()}
        _compare(database.run, section, recipe[section], config)
        sections[section] = {**recipe[section], **config}
        fit = made.get("reads", {}).get(_FITS.get(section))
        if fit is not None:
            fits[section] = fit
    modes = {name: said["mode"] for name, said in recipe["queries"].items()}
    for name, mode in modes.items():
        if mode != "balanced" and name not in database.state["sources"]:
            raise ConfigError(f"run {database.run} is not finished: query set {name!r} is new; go on with lvd curate")
    for name, first in first_parts(modes, database.state["sources"]).items():
        asked = inputs("queries", first).get("config", {}).get("queries", {}).get(name, {})
        tables = {"as_is": (), "sample": ("neighbours",)}.get(modes[name], ("quotas", "neighbours"))
        tasks = [inputs(table, first).get("task", {}) for table in tables]
        retrieved = {key: task[key] for task in tasks for key in ASKED[modes[name]] if key in task}
        if modes[name] == "balanced" and "total" not in retrieved:
            raise ConfigError(f"run {database.run} is not finished: query set {name!r} is new; go on with lvd curate")
        _compare(database.run, f"queries.{name}", recipe["queries"][name], {**asked, **retrieved})
    return Settings(sections=sections, fits=fits)


def _compare(run: str, section: str, said: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    for key, value in made.items():
        if key not in said or _same(key, said[key], value):
            continue
        raise ConfigError(
            f"run {run} is not finished: its tables were made with {section}.{key} {value}, recipe.yaml says "
            f"{said[key]}; go on with lvd curate"
        )


def _same(key: str, said: Any, made: Any) -> bool:
    if key == "yunet":  # a path; recorded by its digest
        return (said is None) == (made is None)
    if key == "threshold":  # null is the descriptor's own
        return said in (None, made)
    return made in (said, str(said).partition(":")[0])  # the name of a model is recorded without its path
