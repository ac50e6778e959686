"""Recipes: one flat YAML of our settings and Transformers' TrainingArguments, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from ..data.parts import part_name
from ..errors import CTInstructError
from ..files import read_yaml

Settings = TypeVar("Settings")


INSTRUCT = "instruct-"  # what names of stage two's recipes begin with; those of stage one have no beginning


def recipe_names(stage: str = "") -> list[str]:
    """The bundled recipes of a stage, without the beginning of their files' names."""
    folder = resources.files("ctinstruct_hf.train") / "recipes"
    names = [entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    mine = [name for name in names if name.startswith(INSTRUCT) == bool(stage)]
    return sorted(name.removeprefix(stage) for name in mine)


def read_recipe(recipe: str | Path, changes: Sequence[str] = (), stage: str = "") -> dict[str, Any]:
    """The settings of a recipe.

    Args:
        recipe: a YAML file, or the name of a bundled one. `base: name` in it takes another as its start;
            `mixture: {name of a part: {weight: 0.5}}` then changes that part.
        changes: `key=value` each, the value as YAML; `part.key=value` inside a part.
        stage: `INSTRUCT` for bundled recipes of stage two.

    Raises:
        CTInstructError: naming the file or the change.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise CTInstructError(f"{path} does not exist.")
        file = path
    elif str(recipe) in recipe_names(stage):
        file = Path(str(resources.files("ctinstruct_hf.train") / "recipes" / f"{stage}{recipe}.yaml"))
    else:
        known = ", ".join(recipe_names(stage))
        raise CTInstructError(f"There is no recipe '{recipe}': give a YAML file or one of {known}.")
    settings = read_yaml(file)
    if not isinstance(settings, dict):
        raise CTInstructError(f"{path.name} is no recipe: expected 'key: value' lines.")
    if "base" in settings:
        base = str(settings.pop("base"))
        beside = path.parent / base
        settings = merge(read_recipe(beside if beside.is_file() else base, stage=stage), settings)
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise CTInstructError(f"--set '{change}': write key=value.")
        nested: Any = yaml.safe_load(value)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        settings = merge(settings, nested)
    return settings


def merge(start: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`start` with `changes`; dicts are merged, parts of a list are changed by their names (left out by null), everything else is
    replaced.

    Raises:
        CTInstructError: for a name that no part of the list has.
    """
    merged = dict(start)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = merge(old, value)
        elif isinstance(value, dict) and isinstance(old, list):
            merged[key] = _merge_parts(key, old, value)
        else:
            merged[key] = value
    return merged


def _merge_parts(key: str, parts: list[Any], changes: dict[str, Any]) -> list[Any]:
    """A list of dicts with some of them changed: {name of the part: its changes, or None to leave it out}."""
    names = [part_name(part) if isinstance(part, dict) else str(part) for part in parts]
    unknown = sorted(set(map(str, changes)) - set(names))
    if unknown or not all(change is None or isinstance(change, dict) for change in changes.values()):
        wrong = ", ".join(unknown or map(str, changes))
        raise CTInstructError(
            f"{key} has no part {wrong} to change: write 'name: {{key: value}}' (or null to leave it out) of {', '.join(names)}."
        )
    kept = [(part, changes.get(name, {})) for name, part in zip(names, parts, strict=True)]
    return [merge(part, change) for part, change in kept if change is not None]


def parse_recipe(
    settings: dict[str, Any], ours: type[Settings], arguments: Any = None, **defaults: Any
) -> tuple[Settings, Any]:
    """(our settings, TrainingArguments) of a recipe.

    Args:
        settings: from `read_recipe`.
        ours: the dataclass of this stage's settings.
        arguments: the class of the arguments; TrainingArguments by default.
        defaults: TrainingArguments to use where the recipe says nothing.

    Raises:
        CTInstructError: for keys that neither knows, and values that do not fit.
    """
    from transformers import TrainingArguments

    arguments = arguments or TrainingArguments
    known = {field.name for field in dataclasses.fields(ours)}  # type: ignore[arg-type]
    settings = _with_block(settings, ours)
    training = {field.name: field for field in dataclasses.fields(arguments) if field.init}
    unknown = sorted(set(settings) - known - set(training))
    if unknown:
        raise CTInstructError(f"The recipe has unknown keys: {', '.join(unknown)}.")
    rest = {**defaults, **{name: value for name, value in settings.items() if name not in known}}
    for name, value in rest.items():  # YAML reads 1e-4 as text, and no as false
        if value is False and name.endswith("_strategy"):
            rest[name] = "no"
        elif isinstance(value, str) and "float" in str(training[name].type):
            try:
                rest[name] = float(value)
            except ValueError as error:
                raise CTInstructError(f"The recipe has {name}: {value}, expected a number.") from error
    if rest.get("bf16") and not torch.accelerator.is_available():
        rest.setdefault("use_cpu", True)  # else TrainingArguments takes bfloat16 for a GPU's alone
    if settings.get("early_stopping_patience") is not None:
        rest["load_best_model_at_end"] = True
    if rest.get("save_total_limit") == 1:
        rest["save_total_limit"] = 2  # the one before stays until the next is whole
    try:
        mine = ours(**{name: value for name, value in settings.items() if name in known})
        return mine, arguments(**rest)
    except (ValueError, TypeError) as error:
        raise CTInstructError(f"The recipe does not fit: {error}") from error


BLOCK = "small_model"


def _with_block(settings: dict[str, Any], ours: Any) -> dict[str, Any]:
    """The recipe with its block `small_model` as the dataclass that `ours` has for it. Keys of the block that stand beside it, as in
    recipes that were written before there was one, count as in it.

    Raises:
        CTInstructError: for a block that is no mapping, and unknown keys in it.
    """
    block: Any = next(field.default_factory for field in dataclasses.fields(ours) if field.name == BLOCK)
    known = [field.name for field in dataclasses.fields(block)]
    inside = settings.get(BLOCK) or {}
    if not isinstance(inside, dict):
        raise CTInstructError(f"{BLOCK} is {inside!r}: write its keys, as {BLOCK}: {{{known[-1]}: …}}.")
    if unknown := sorted(set(inside) - set(known)):
        raise CTInstructError(f"{BLOCK} has unknown keys: {', '.join(unknown)}; known are {', '.join(known)}.")
    beside = {name: value for name, value in settings.items() if name in known}
    rest = {name: value for name, value in settings.items() if name not in known}
    return {**rest, BLOCK: block(**{**inside, **beside})}
