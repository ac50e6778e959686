"""Names as people write them, and the names that a model was taught.

A model knows "left kidney"; people type "Left Kidney", "left_kidney", "kidney, left", "the left kidneys". `Names.find`
takes them for the same name before it becomes part of a prompt. What else people and data sets call a structure stands in
`names.yaml`; a file of the same form extends it.
"""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from .templates import ask_segmentation

TABLE = Path(__file__).with_name("names.yaml")
_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "the a an of in on at to and my this that these those his her its their s patient all any both bilateral side sided "
        "whole entire complete organ mask segmentation structure please",
    )
)
_SIDES = {"l": "left", "lt": "left", "lft": "left", "r": "right", "rt": "right", "rgt": "right"}
_MASK = r"(?:binary\s+|segmentation\s+)?(?:mask|segmentation|outline|contour|location|position)s?\s+(?:of|for)"
_VERBS = (
    r"(?:give|get|make|create|generate|provide|produce|return|perform|do|have|show|see|find|draw|i(?:'d|\s+would)\s+like|"
    rf"i\s+(?:want|need))(?:\s+me)?\s+(?:an?\s+|the\s+)?{_MASK}"
    rf"|{_MASK}|where(?:'s|\s+is|\s+are|\s+can\s+i\s+(?:find|see)|\s+do(?:es)?)"
    r"|(?:(?:auto)?segment|outline|delineate|contour|highlight|mark|label|show|display|draw|find|locate|locali[sz]e|mask|extract|"
    r"trace|isolate|point)(?:\s+me)?(?:\s+out)?\s*:?"
)
_REQUEST = re.compile(
    rf"(?:(?:hi|hello|hey|ok|now|please|kindly|let(?:'s|\s+us|\s+me)|(?:can|could|would|will)\s+(?:you|i|we)(?:\s+please)?|"
    rf"i(?:'d|\s+would)?\s+(?:want|need|like)\s+(?:you\s+)?to)[\s,]+)*"
    rf"(?:{_VERBS})\s+(?P<names>.+?)"
    r"(?:\s+(?:located|lie|lying|situated|seen|visible))?"
    r"(?:\s+(?:in|on|of|for|from|within)\s+(?:this|the|that|my)\s+(?:\w+\s+)?(?:scan|image|ct|volume|study|picture|patient))?"
    r"(?:[\s,]+(?:for\s+me|please|now|here))*\s*[.?!]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Found:
    """What a name was taken for.

    Attributes:
        given: the name as written.
        names: what to ask for: a known name, several whose union is meant, or `given` where it is unknown.
        known: whether it was found.
        nearest: known names that look like it, best first, where it was not found.
        note: a sentence for the user where the name is asked as written and the model may not know it.
    """

    given: str
    names: tuple[str, ...]
    known: bool = True
    nearest: tuple[str, ...] = ()
    note: str | None = None


class Names:
    """The names that a model knows, and what else people call them.

    Args:
        known: names as the model was taught them.
        more: {name: other names} of the user, which come before those of the table. Each line is about the known name that
            its key, or else one of the others, stands for; where none does, the key counts as known.
        listed: whether `known` is all that the model was taught. Where it is not, a name in plain words is left as written.
        table: {name: other names}; `names.yaml` by default.
    """

    def __init__(
        self,
        known: Iterable[str],
        more: Mapping[str, Sequence[str]] | None = None,
        listed: bool = True,
        table: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.known = list(dict.fromkeys(known))
        self.listed = listed
        self._cased: dict[str, str] = {}
        self._index: dict[str, str] = {}
        self._pairs: dict[str, tuple[str, ...]] = {}  # a name of the user -> both sides
        before = Names(self.known, None, listed, table) if more else self
        for name, others in (more or {}).items():
            found = [before._resolved(word) for word in (name, *others)]
            names = next((each for each in found if each), (name,))
            if len(names) > 1:
                self._pairs[name] = names
            target = names[0] if len(names) == 1 else name
            if target == name:
                self.known.append(name)
            self._add(target, [word for word in (name, *others) if word not in self.known])
        self.known = list(dict.fromkeys(self.known))
        for name in self.known:
            self._cased.setdefault(name.casefold(), name)
            self._add(name, [name])
        for name, others in (read_table() if table is None else table).items():
            group = [name, *others]
            taught = next((self._index[key] for word in group for key in keys_of(word) if key in self._index), None)
            if taught is not None:
                self._add(taught, group)

    def _add(self, name: str, others: Iterable[str]) -> None:
        for other in others:
            for key in keys_of(other):
                self._index.setdefault(key, name)

    def find(self, name: str) -> Found:
        """The known name, or names, that a name stands for."""
        if name in self.known and name not in self._pairs:
            return Found(name, (name,))
        text = " ".join(name.split())
        if not self.listed and _is_plain(text):
            if self._lookup(text):
                return Found(name, (text,))
            nearest = self.nearest(text)
            return Found(name, (text,), False, nearest, _note(name, nearest, self.listed))
        names = self._resolved(text)
        if names:
            return Found(name, names)
        nearest = self.nearest(text)
        return Found(name, (text or name,), False, nearest, _note(name, nearest, self.listed))

    def _resolved(self, text: str) -> tuple[str, ...]:
        """The known name that a text stands for, both sides of a pair that has no name, or nothing."""
        text = " ".join(text.split())
        same = self._cased.get(text.casefold()) or self._lookup(text)
        if same is not None:
            return self._pairs.get(same, (same,))
        if not {"left", "right"} & set(words_of(text)):
            halves = [self._lookup(f"{side} {text}") for side in ("left", "right")]
            if None not in halves:
                return tuple(half for half in halves if half is not None)
        return ()

    def _lookup(self, text: str) -> str | None:
        return next((self._index[key] for key in keys_of(text) if key in self._index), None)

    def nearest(self, text: str) -> tuple[str, ...]:
        """Up to three known names that look like a text or share a word with it, best first."""
        words = words_of(text)
        scores: dict[str, float] = {}
        written = " ".join(sorted(words))
        for key, name in self._index.items():
            likeness = difflib.SequenceMatcher(None, key, written).ratio()
            shared = len(set(words) & set(key.split())) / max(len(set(words) | set(key.split())), 1)
            scores[name] = max(scores.get(name, 0.0), likeness if likeness >= 0.72 else 0.0, shared * 0.9)
        best = max(scores.values(), default=0.0)
        ranked = sorted(
            (name for name in scores if scores[name] >= max(0.4, best - 0.15)), key=lambda name: -scores[name]
        )
        return tuple(ranked[:3])

    def question(self, text: str) -> tuple[str, list[str]]:
        """A user's question with the names in it as the model knows them, and notes on those that it may not know.

        A request for masks of known structures ("Segment the LIVER") becomes the phrasing that the model was taught; in any
        other question, known names are written as known where only case, underscores and hyphens differ.
        """
        asked = text.strip()
        request = _REQUEST.fullmatch(asked)
        # the name of a structure alone is a request, too
        named = request["names"] if request else "" if asked.endswith("?") else asked.rstrip(".!")
        structures = self._split(named)
        if structures:
            return ask_segmentation(structures), []
        parts = [self.find(part) for part in re.split(r"\s*,\s*|\s+and\s+", named)] if request else []
        notes = [part.note for part in parts if part.nearest and part.note]
        return (self._mentions.sub(self._spell, text) if self.known else text), notes

    def _split(self, text: str) -> list[str] | None:
        """The known names in an enumeration; None where one of its parts is unknown."""
        names: list[str] = []
        for part in re.split(r"\s*[,;+]\s*(?:and\s+)?", text.strip()):
            words = re.split(r"\s+(?:and|&|plus|as\s+well\s+as)\s+", part)
            while words:  # the longest that is one name: "left and right kidneys"
                for stop in range(len(words), 0, -1):
                    found = self.find(" and ".join(words[:stop]))
                    if found.known and words_of(found.given):
                        names += found.names
                        words = words[stop:]
                        break
                else:
                    return None
        return list(dict.fromkeys(names)) or None

    @functools.cached_property
    def _mentions(self) -> re.Pattern[str]:
        forms = [
            r"[\s_-]+".join(re.escape(word) for word in re.split(r"[\s_-]+", name))
            for name in sorted(self.known, key=len, reverse=True)
        ]
        return re.compile(rf"(?<![^\W_])(?P<name>{'|'.join(forms)})(?P<plural>s?)(?![^\W_])", re.IGNORECASE)

    def _spell(self, match: re.Match[str]) -> str:
        spelled = self._cased.get(re.sub(r"[\s_-]+", " ", match["name"]).casefold())
        return match[0] if spelled is None else spelled + match["plural"].lower()


def structure_names(model: Any, processor: Any, more: Mapping[str, Sequence[str]] | None = None) -> Names:
    """The structures and findings that a model can mark.

    They stand in `config.structures` where training wrote them. Of other models the list is not known: `names.yaml` gives
    the spelling.
    """
    config = model.config
    findings = [*(processor.image_processor.mask_floors or {}), *config.disease_names]
    listed = config.structures
    known = read_table() if listed is None else listed
    return Names([*known, *findings], more, listed=listed is not None)


def disease_names(model: Any, more: Mapping[str, Sequence[str]] | None = None) -> Names:
    """The diseases that a model gives probabilities of: those of its lists, any other too where it has one head for all."""
    known = model.config.disease_names
    shared = model.config.disease_head == "shared"
    plain = Names(known)
    kept = {
        name: others
        for name, others in (more or {}).items()
        if shared or any(plain.find(word).known for word in (name, *others))
    }
    return Names(known, kept, listed=not shared)


@functools.lru_cache(maxsize=1)
def read_table() -> dict[str, list[str]]:
    """{name: other names} of `names.yaml`."""
    return read_names(TABLE)


def read_names(path: str | Path) -> dict[str, list[str]]:
    """{name: other names} of a YAML or JSON file.

    Raises:
        CTInstructError: where it cannot be read, is no such mapping, or gives one name to two.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CTInstructError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise CTInstructError(f"{path} is no YAML or JSON: {str(error).splitlines()[0]}.") from error
    if not isinstance(found, dict) or not found:
        raise CTInstructError(f"{path} holds {type(found).__name__}: give names as 'left kidney: [LK, ren sinister]'.")
    names: dict[str, list[str]] = {}
    taken: dict[str, str] = {}
    for name, others in found.items():
        listed = [others] if isinstance(others, str) else others or []
        if not isinstance(name, str) or not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
            raise CTInstructError(f"{path}: '{name}' must be a text with a list of texts, as 'left kidney: [LK]'.")
        for other in listed:
            if taken.setdefault(other.casefold(), name) != name:
                raise CTInstructError(f"{path} gives '{other}' to both '{taken[other.casefold()]}' and '{name}'.")
        names[name] = listed
    return names


def canonical(name: str) -> str:
    """A data set's name of a structure as this package writes it: "kidney_left" is "left kidney"; others in plain words."""
    found = _canonical().find(name)
    return found.names[0] if found.known and len(found.names) == 1 else " ".join(name.replace("_", " ").split())


def in_known_words(names: Iterable[str]) -> dict[str, str]:
    """{name: the package's name} of those that are written in another way: "Kidney_Left"; plain words stay."""
    return {name: canonical(name) for name in names if not _is_plain(name) and _canonical().find(name).known}


def distinct(names: Iterable[str], keep_plain: bool = False) -> dict[str, str]:
    """{a data set's name: ours}; two that we would write alike stay as they are, in plain words.

    Args:
        names: of one data set.
        keep_plain: see `in_known_words`.
    """
    plain = {name: " ".join(name.replace("_", " ").split()) for name in names}
    ours = {**plain, **in_known_words(plain)} if keep_plain else {name: canonical(name) for name in plain}
    written = list(ours.values())
    return {name: known if written.count(known) == 1 else plain[name] for name, known in ours.items()}


def spell(text: str, names: Mapping[str, str]) -> str:
    """A text with names {as written: known name}; case, blanks, underscores and hyphens do not matter."""
    for given, name in names.items():
        pattern = r"[\s_-]+".join(re.escape(word) for word in re.split(r"[\s_-]+", given.strip()))
        text = re.sub(rf"(?<![^\W_]){pattern}(?![^\W_])", lambda _, name=name: name, text, flags=re.I)  # type: ignore[misc]
    return text


@functools.lru_cache(maxsize=1)
def _canonical() -> Names:
    return Names(read_table())


def _note(name: str, nearest: Sequence[str], listed: bool) -> str | None:
    if nearest:
        return f"'{name}' is asked as written: did you mean {' or '.join(nearest)}?"
    return f"'{name}' is asked as written: it is no name that the model was taught." if listed else None


def _is_plain(text: str) -> bool:
    """Lower-case words with single blanks, as data sets and people write them when nothing is to be changed."""
    return re.fullmatch(r"[^\W\d_A-Z]+(?: [^\W_A-Z]+)*", text) is not None and text.split()[0] not in _FILLERS


def words_of(text: str) -> list[str]:
    """Its words without case, articles, plural and the like; sides written out."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z](?:[a-z]|$|[\s_]))", " ", unicodedata.normalize("NFKC", text)).casefold()
    text = re.sub(r"\.nii(?:\.gz)?\s*$", "", text)
    words = [re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", word) for word in re.findall(r"[^\W_]+", text)]
    words = [word for word in words if word not in _FILLERS] or words
    if len(words) > 1:
        words = [_SIDES.get(word, word) for word in words]
    if {"left", "right"} < set(words):  # both
        words = [word for word in words if word not in ("left", "right")]
    return [_singular(word) for word in words]


def _singular(word: str) -> str:
    """A form that singular and plural share; it need not be a word."""
    for ending, short in (("ies", "y"), ("ae", "a"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"),
                          ("ses", "s"), ("sis", "s"), ("se", "s"), ("ss", "ss"), ("us", "us"), ("s", "")):  # fmt: skip
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word[: -len(ending)] + short
    return word


def keys_of(text: str) -> list[str]:
    """What names that mean the same share: their words in any order, or written together."""
    words = words_of(text)
    sides = [word for word in words if word in ("left", "right")]
    rest = [word for word in words if word not in sides]
    together = ["".join(words), "".join(sides + rest), "".join(rest + sides)]
    return list(dict.fromkeys([" ".join(sorted(words)), *together])) if words else []


__all__ = [
    "Found",
    "Names",
    "canonical",
    "disease_names",
    "in_known_words",
    "keys_of",
    "read_names",
    "read_table",
    "spell",
    "structure_names",
    "words_of",
]
