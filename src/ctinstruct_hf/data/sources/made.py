"""Sources whose scans are made, by a package above this one, which is imported when it is used.

`source:name` names a set of such scans wherever a prepared data set may be named, as `phantoms:trunk:0-700`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from ..cases import Case


class Made:
    """A source that makes its scans.

    Args:
        package: its package; its module `dataset` has `cases(name)`, `refs_of(name)`, `of_slices(name)` and `name_of(settings)`,
            which gives the name of what a recipe describes.
        example: a name.
        summary: what it is.
    """

    def __init__(self, package: str, example: str, summary: str) -> None:
        self.package, self.example, self.__doc__ = package, example, summary

    def module(self, name: str) -> Any:
        return import_module(f"{self.package}.{name}")

    @property
    def dataset(self) -> Any:
        return self.module("dataset")

    def __call__(self, name: Path) -> Iterator[Case]:
        yield from self.dataset.cases(str(name))


MADE_UP = Made("ctinstruct_hf.phantoms", "phantoms:trunk:0-40", "Made-up scans by kind and seeds: -i trunk:0-40.")
SOURCES = {"phantoms": MADE_UP}


def made_up_scan(seed: int) -> Any:
    """A whole scan as `CTVolume`: what the demo and the page show."""
    return MADE_UP.module("scans").phantom_of(f"phantom:trunk:{seed}").volume


def made_up_slice(seed: int) -> Any:
    """One axial slice as `CTVolume`."""
    return MADE_UP.module("phantom").make_phantom(seed, kind="slice").volume


def train_tokenizer() -> Any:
    """The tokenizer of the `tiny` preset, learned from the words about made-up scans."""
    return MADE_UP.module("vocabulary").train_tokenizer()


def imagined_conversation(seed: int, turns: int) -> list[dict[str, Any]]:
    """Messages about a scan that nobody has made: words alone."""
    messages: list[dict[str, Any]] = MADE_UP.module("imagined").imagined_conversation(seed, turns)
    return messages
