"""Recipes: YAML of values, at most one ``base:``, dotted overrides. An error is one readable line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from training.config import ConfigError, lay_over

RECIPES = Path(__file__).parent / "recipes"
TRAINING_RECIPES = RECIPES / "training"
Recipe = TypeVar("Recipe", bound=BaseModel)


def find_recipe(name: str, folder: Path = RECIPES) -> Path:
    """Path of a recipe given by name (``smoke``, one of ``folder``) or by path (``mine.yaml``)."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"recipe {name!r}: no such file")
        return path
    bundled = folder / f"{name}.yaml"
    if not bundled.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ConfigError(f"recipe {name!r} is not known; give one of {known}, or a path that ends in .yaml")
    return bundled


def read_values(path: Path, folder: Path = RECIPES) -> dict[str, Any]:
    """Values of a recipe file, those of its base beneath them."""
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    below = path.parent / base if str(base).endswith((".yaml", ".yml")) else find_recipe(str(base), folder)
    if not below.is_file():
        raise ConfigError(f"{path}: base {str(base)!r}: no such file")
    base_values = _read_yaml(below)
    if "base" in base_values:
        raise ConfigError(f"{path}: base {below.name} has a base of its own; a recipe may stand on one only")
    return lay_over(base_values, values)


def load_recipe(kind: type[Recipe], name: str, overrides: Sequence[str] = (), *, folder: Path = RECIPES) -> Recipe:
    """A recipe with ``key.sub=value`` overrides, checked. ``folder`` is where a bare name is looked for.

    Raises:
        ConfigError: one line that names the key, the value got and the values allowed.
    """
    path = find_recipe(name, folder)
    values = read_values(path, folder)
    for override in overrides:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {_explain(kind, error)}") from None


def dump_recipe(recipe: BaseModel) -> str:
    """A resolved recipe as YAML that runs again as it is."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))


def differences(recipe: BaseModel, other: BaseModel) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ between two recipes, with both values; names, sources and how it is done apart."""
    apart = ("name", "pool", "run", "sources", "queries", "benchmarks", "sample_web", "execution", "expected")
    here, there = (dict(_flat(model.model_dump(mode="json", exclude=set(apart)))) for model in (recipe, other))
    return [(key, here.get(key), there.get(key)) for key in here | there if here.get(key) != there.get(key)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values, not {type(values).__name__}")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as key.sub=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    *outer, last = key.split(".")
    place = values
    for name in outer:
        below = place.setdefault(name, {})
        if below is None:
            below = place[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {name!r} holds a value, not further keys")
        place = below
    place[last] = value


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """First complaint of pydantic as one line, and how many more there are."""
    first, *more = error.errors()
    key = ".".join(str(step) for step in first["loc"]) or "recipe"
    got = first.get("input")
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(kind, [str(step) for step in first["loc"][:-1]])
        near = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        line = f"unknown key {key!r}; {hint}known keys: {', '.join(allowed)}"
    elif first["type"] == "missing":
        line = f"key {key!r} is missing"
    else:
        message = str(first["msg"]).removeprefix("Value error, ")
        said = f"{message[:1].lower()}{message[1:]}"
        # What is wrong between keys names them itself; the whole recipe is no value to repeat.
        line = f"key {key!r}: got {got!r}; {said}" if first["loc"] else said
    line = " ".join(line.split())
    return f"{line} (and {len(more)} more)" if more else line


def _fields_at(kind: Any, path: Sequence[str]) -> list[str]:
    """Field names of the model at a path inside a model; mappings and optional fields are looked through."""
    for step in path:
        fields = getattr(kind, "model_fields", None)
        annotation = fields[step].annotation if fields and step in fields else kind
        kind = _model_in(annotation)
        if kind is None:
            return []
    return list(getattr(kind, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (found := _model_in(inner)) is not None:
            return found
    return None
