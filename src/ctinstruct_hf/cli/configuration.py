"""`ctinstruct --config file.yaml verb …`: options by verb from a file, which those on the command line come before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import read_yaml


def read_configuration(path: Path, command: Any) -> dict[str, Any]:
    """What the command line takes for its defaults.

    Args:
        path: YAML, `{verb: {option: value}}`; options by their long names, with `-` or `_`. A list may stand for what the
            command line separates by commas, and one value for an option that may be repeated.
        command: the group of verbs.

    Raises:
        CTInstructError: naming the file and the verb or option that is not known.
    """
    return _defaults(path.name, "", read_yaml(path), command)


def _defaults(file: str, verb: str, found: Any, command: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise CTInstructError(f"{file} has {verb or 'no verbs'}: expected 'name: value' lines.")
    commands = getattr(command, "commands", None)
    if commands is not None:
        _check_known(file, verb, found, commands)
        return {name: _defaults(file, name, below, commands[name]) for name, below in found.items()}
    options = {
        option.lstrip("-"): parameter
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }
    named = {str(name).replace("_", "-"): value for name, value in found.items()}
    _check_known(file, verb, named, options)
    for name, value in named.items():
        if isinstance(value, dict):
            raise CTInstructError(f"{file}: {verb} has {name}: expected a value or a list of values.")
    return {options[name].name: _value(options[name], value) for name, value in named.items() if value is not None}


def _value(option: Any, value: Any) -> Any:
    if option.multiple:
        return value if isinstance(value, list) else [value]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _check_known(file: str, verb: str, found: dict[str, Any], known: dict[str, Any]) -> None:
    unknown = [str(name) for name in found if name not in known]
    if unknown:
        where = f"{verb} has no option" if verb else "There is no verb"
        raise CTInstructError(f"{file}: {where} {unknown[0]}: use {', '.join(sorted(known))}.")


__all__ = ["read_configuration"]
