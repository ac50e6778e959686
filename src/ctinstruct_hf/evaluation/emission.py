"""Whether an answer has a special token for each name asked for, and no other."""

from __future__ import annotations

import re
from collections.abc import Sequence


def tokens_of_names(answer: str, token: str, asked: Sequence[str], known: Sequence[str] = ()) -> list[int | None]:
    """Which token of a free answer belongs to each name that was asked for.

    A token belongs to the name before it ("liver <SEG>, spleen <SEG>"). Where none of the tokens follows a name, they
    belong to the names in their order, if there are as many.

    Args:
        answer: with its special tokens.
        token: `<SEG>` or `<disease_confidence>`.
        asked: names, as the model writes them.
        known: further names that the model may write.

    Returns:
        The index of the token of each name; None where it has none.
    """
    before = [_name_in(part, [*asked, *known]) for part in answer.split(token)[:-1]]
    if not any(before) and len(before) == len(asked):
        return list(range(len(asked)))
    left = list(enumerate(before))
    found: list[int | None] = []
    for name in asked:
        match = next((pair for pair in left if pair[1] == _plain(name)), None)
        found.append(None if match is None else match[0])
        if match is not None:
            left.remove(match)
    return found


def as_asked(answer: str, token: str, found: Sequence[int | None]) -> bool:
    """Whether every name has its token and there is no other token of the sort."""
    return None not in found and answer.count(token) == len(found)


def _name_in(text: str, names: Sequence[str]) -> str | None:
    """The name that stands last in a text; of those that end at the same character the longest."""
    written = _plain(text)
    ends = [
        (match.end(), len(name), name)
        for name in {_plain(name) for name in names if name.strip()}
        for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", written)
    ]
    return max(ends)[2] if ends else None


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


__all__ = ["as_asked", "tokens_of_names"]
