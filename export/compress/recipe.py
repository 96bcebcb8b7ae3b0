"""A recipe: a TOML file with a list of tables `[[step]]`, each with `use = "<step>"` and that step's own keys.

Parsing is strict: an unknown step, an unknown key or a value out of range is an error that names the place.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ...runtime.host.files import read_text
from ..errors import RecipeError
from .step import Step, step_class, step_name, step_names

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list"}


@dataclass(frozen=True)
class Recipe:
    """Steps in the order in which they run. max_kl: largest KL divergence from the source that the recipe promises, in
    nats a token (None: no promise)."""

    name: str
    steps: tuple[Step, ...]
    max_kl: float | None = None

    def settings(self) -> list[dict[str, Any]]:
        """Every step with every setting, defaults included, as plain data for a manifest."""
        return [step_settings(step) for step in self.steps]


def step_settings(step: Step) -> dict[str, Any]:
    """One step as a recipe writes it, with defaults filled in. Keys that are None are left out."""
    given = {key: value for key, value in dataclasses.asdict(step).items() if value is not None}
    return {"use": step_name(step), **{k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}}


def available_recipes() -> list[str]:
    """Names of the recipes that come with edgelm, mildest first."""
    order = ("light", "balanced", "small", "smallest")
    return [name for name in order if (_folder() / f"{name}.toml").is_file()]


def load_recipe(name: str) -> Recipe:
    """Read a built-in recipe by name, or a recipe from a path that ends in .toml. Raises: RecipeError."""
    path = Path(name) if name.endswith(".toml") else _folder() / f"{name}.toml"
    if not name.endswith(".toml") and name not in available_recipes():
        near = difflib.get_close_matches(name, available_recipes(), 1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(available_recipes())}, or a .toml file"
        raise RecipeError(f"unknown recipe {name!r}: {hint}")
    try:
        data = tomllib.loads(read_text(path))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as TOML ({error})") from error
    return parse_recipe(data, path.stem, str(path))


def parse_recipe(data: dict[str, Any], name: str, where: str) -> Recipe:
    """Parse a recipe from plain data. where: the file, for messages. Raises: RecipeError."""
    unknown = sorted(set(data) - {"step", "max_kl"})
    if unknown:
        raise RecipeError(f"{where}: unknown key {unknown[0]}: a recipe has max_kl and tables [[step]]")
    most = _value(float | None, data["max_kl"], f"{where}: max_kl") if "max_kl" in data else None
    if most is not None and most <= 0:
        raise RecipeError(f"{where}: max_kl must be above 0, found {most:g}")
    tables = data.get("step")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise RecipeError(f"{where}: a recipe needs one or more [[step]] tables")
    return Recipe(name, tuple(_step(table, f"{where}, step {index}") for index, table in enumerate(tables, 1)), most)


def _step(table: dict[str, Any], where: str) -> Step:
    use = table.get("use")
    if use not in step_names():
        near = difflib.get_close_matches(str(use), step_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"steps are {', '.join(step_names())}"
        raise RecipeError(
            f"{where}: use = {use!r} is not a step: {hint}" if use else f"{where}: the key use is missing"
        )
    kind = step_class(use)
    hints = typing.get_type_hints(kind)
    keys = [item.name for item in dataclasses.fields(kind)]
    given = {key: value for key, value in table.items() if key != "use"}
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f"did you mean {near[0]}?" if near else f"keys are {', '.join(keys)}"
            raise RecipeError(f"{where}: {use} has no key {key}: {hint}")
    needed = [key for key in keys if _required(kind, key) and key not in given]
    if needed:
        raise RecipeError(f"{where}: {use} needs the key {needed[0]}")
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in given.items()}
    try:
        step: Step = kind(**values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    return step


def _required(kind: type[Step], name: str) -> bool:
    item = next(item for item in dataclasses.fields(kind) if item.name == name)
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, where: str) -> Any:
    """Check a TOML value against a field's annotation: int, float, str, bool, tuple[T, ...], Literal, or one of these
    with None."""
    options = [item for item in typing.get_args(hint) if item is not type(None)]
    if type(None) in typing.get_args(hint):
        hint = options[0]
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise RecipeError(f"{where} must be {' or '.join(map(repr, typing.get_args(hint)))}, found {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{where} must be a list, found {value!r}")
        return tuple(_value(typing.get_args(hint)[0], item, where) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where} must be a finite number, found {value}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{where} must be {_KINDS[hint]}, found {value!r}")
    return value


def _folder() -> Path:
    return Path(str(resources.files(__package__))) / "recipes"
