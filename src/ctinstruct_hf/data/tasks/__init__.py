"""The tasks of instructions (section 3.3), a file each, which holds one as `TASK`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..task import Task


def find_tasks() -> dict[str, Task]:
    """{name: task} of all files here, those of a lower rank first."""
    found: dict[str, Task] = {
        module.name: import_module(f"{__name__}.{module.name}").TASK for module in iter_modules(__path__)
    }
    return dict(sorted(found.items(), key=lambda named: (named[1].rank, named[0])))


TASKS = find_tasks()


def scored_as(task: str) -> str:
    """The task whose metrics score the answers of a task."""
    return TASKS[task].scored_as if task in TASKS else task
