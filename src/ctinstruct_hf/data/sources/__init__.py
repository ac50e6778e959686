"""The public data sets of the paper: what each downloaded folder looks like, turned into cases.

A module of this package lists what it reads as `SOURCES`: {name: function from the folder to its cases}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ..cases import Case
from ..samples import InstructionSample
from .common import Problem
from .made import Made

Found = Case | InstructionSample | Problem
Source = Callable[[Path], Iterator[Found]]


def find_sources() -> dict[str, Source]:
    """{name: source} of all modules here."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {name: source for module in modules for name, source in getattr(module, "SOURCES", {}).items()}


SOURCES = find_sources()
MADE = {name: source for name, source in SOURCES.items() if isinstance(source, Made)}
