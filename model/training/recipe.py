"""Recipes: the shape of a model, how it is trained and on which text, as TOML that names every choice.

Tables: ``[model]`` (:class:`~model.config.ModelConfig`), ``[training]``
(:class:`~model.training.config.TrainingConfig`) and ``[data]``. What a recipe does not say is the default.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from model.config import ModelConfig, StrictModel
from model.training.config import TrainingConfig

SHIPPED = Path(__file__).parent / "recipes"

Tables = Mapping[str, Mapping[str, Any]]
"""Values by table and key."""


class RecipeError(ValueError):
    """A recipe is missing, not TOML, or has an unknown key or a bad value."""


class DataConfig(StrictModel):
    """Which text a model is trained on."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Share of the sequences by domain; by the size of its text where there are none."""


class Recipe(StrictModel):
    """Everything that decides what a run computes, but the text itself and where it starts from."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def read_recipe(source: str | Path, changes: Tables | None = None) -> Recipe:
    """The recipe of a name (one that is shipped) or of a TOML file, with ``changes`` over it.

    Raises:
        RecipeError: it is missing, not TOML, or has an unknown key or a bad value; names file, key, value and
            expectation.
    """
    changes = changes or {}
    path = SHIPPED / f"{source}.toml" if source in shipped_recipes() else Path(source)
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        known = ", ".join(shipped_recipes())
        raise RecipeError(f"no recipe {str(source)!r}: {error.strerror}, and those shipped are {known}") from None
    for table, values in changes.items():
        if isinstance(tables.get(table, {}), dict):  # what else it may be is refused below
            tables[table] = {**tables.get(table, {}), **values}
    try:
        # As JSON: strict types take no list, which is all that TOML has, for a tuple otherwise.
        return Recipe.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        raise RecipeError(_described(error.errors(include_url=False)[0], path, changes)) from None


def _described(error: ErrorDetails, path: Path, changes: Tables) -> str:
    """File, key, value and expectation of a bad value."""
    table, *keys = map(str, error["loc"])
    changed = bool(keys) and keys[0] in changes.get(table, {})
    where = "command line" if changed else str(path)
    key = ".".join(keys)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = _keys_of(table) if keys else list(Recipe.model_fields)
        near = difflib.get_close_matches(keys[-1] if keys else table, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        message = f"unknown {'key' if keys else 'table'}; {hint}"
    if not keys:  # a table as a whole
        return f"{where}: [{table}]: {message}"
    return f"{where}: [{table}] {key} = {error['input']!r}: {message}"


def _keys_of(table: str) -> list[str]:
    config: type[StrictModel] = get_type_hints(Recipe)[table]
    return list(config.model_fields)
