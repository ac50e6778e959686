"""The public data sets of the paper: what each downloaded folder looks like, turned into cases.

A module of this package lists what it reads as `SOURCES`: {name: function from the folder to its cases}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ..samples import Case, InstructionSample
from .common import Problem
from .made import Made

Found = Case | InstructionSample | Problem
SOURCES: dict[str, Callable[[Path], Iterator[Found]]] = {}
for _module in iter_modules(__path__):
    SOURCES |= getattr(import_module(f"{__name__}.{_module.name}"), "SOURCES", {})
MADE = {name: source for name, source in SOURCES.items() if isinstance(source, Made)}
