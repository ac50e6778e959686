"""What a report says about any finding by name: CT-RATE's 18 by the labeller's patterns, others by their words.

The patterns stand in place of `names.yaml` for the 18. Other findings are also found by their other names in `names.yaml`, and
all of them by those of a user's file of the same form.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .labeller import FINDINGS, PATTERNS, find_mentions
from .names import Names, keys_of, read_table, words_of

_GAP = r"[^.;:]{0,70}?"


@dataclass(frozen=True)
class Statement:
    """What a report says about one finding.

    Attributes:
        state: present, absent or not mentioned; what is only called possible is present.
        spans: characters (start, end) of the sentences that say so.
    """

    state: str = "not mentioned"
    spans: tuple[tuple[int, int], ...] = ()


class ReportReader:
    """Reads what reports say about findings.

    Args:
        names: of the findings, as a model's lists have them.
        more: {name: other names} of the user, see `data.names.read_names`.
    """

    def __init__(self, names: Sequence[str], more: Mapping[str, Sequence[str]] | None = None) -> None:
        rules = Names(FINDINGS, more) if more else _rules()
        users = _groups(more or {})
        self.patterns: dict[str, tuple[str, ...]] = {}
        self.names: dict[str, str] = {}  # as asked -> the labeller's finding, or the name itself
        for name in names:
            found = rules.find(name)
            finding = found.names[0] if found.known and found.names[0] in PATTERNS else name
            keys = {*keys_of(name), *keys_of(finding)}
            groups = users if finding in PATTERNS else [*users, *_table_groups()]  # patterns replace the table
            others = [word for group, known in groups if known & keys for word in group if word not in PATTERNS]
            written = [*PATTERNS.get(finding, [_pattern(name)]), *map(_pattern, dict.fromkeys(others))]
            self.patterns[finding] = tuple(dict.fromkeys([*self.patterns.get(finding, ()), *written]))
            self.names[name] = finding

    def read(self, report: str) -> dict[str, Statement]:
        """{name: what the report says about it}, in the order of the names.

        Raises:
            CTInstructError: where the report is no text.
        """
        mentions = find_mentions(report, self.patterns)
        found = {}
        for name, finding in self.names.items():
            of_this = [one for one in mentions if one.finding == finding]
            there = [one for one in of_this if one.status != "absent"]
            spans = tuple(dict.fromkeys(one.span for one in there or of_this))
            found[name] = Statement("present" if there else "absent", spans) if of_this else Statement()
        return found


def _groups(table: Mapping[str, Sequence[str]]) -> list[tuple[tuple[str, ...], set[str]]]:
    """(names of one thing, what `find` knows them by) for each line of a table."""
    return [
        ((name, *others), {key for word in (name, *others) for key in keys_of(word)}) for name, others in table.items()
    ]


@functools.lru_cache(maxsize=1)
def _rules() -> Names:
    return Names(FINDINGS)


@functools.lru_cache(maxsize=1)
def _table_groups() -> list[tuple[tuple[str, ...], set[str]]]:
    return _groups(read_table())


def _pattern(name: str) -> str:
    """A regular expression for a name whose words may stand apart, and begin at any of them: "lesion in the liver"."""
    if re.fullmatch(r"[A-Z]{2,}", name):
        return rf"(?-i:\b{name}s?\b)"  # an abbreviation: CAC, not "cac"
    parts = [rf"\b{re.escape(word)}\w{{0,4}}" for word in words_of(name)]
    turns = dict.fromkeys(_GAP.join(parts[first:] + parts[:first]) for first in range(len(parts)))
    return "|".join(turns) or r"(?!)"


__all__ = ["ReportReader", "Statement"]
