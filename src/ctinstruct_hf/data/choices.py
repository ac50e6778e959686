"""Multiple choice: the options that a question lists, and the one that an answer names.

An answer is one option's text, or else is read by what it concludes with ("Answer: …", `\\boxed{…}`, `<answer>`), by letters that
stand as labels, and by the options' words. Options that it denies and the reasons that it gives do not count; an answer that
names several, or a letter beside another option's text, is unreadable.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import CTInstructError


def options_of(question: str) -> list[str]:
    """The options that a question lists, as "(A) … (B) …", "A. … B. …", "a) … b) …".

    Raises:
        CTInstructError: where it has fewer than two.
    """
    for pattern in (r"\(([A-Z])\)\s*", r"\(([a-z])\)\s*", r"(?<!\w)([A-Z])[.:)]\s+", r"(?<!\w)([a-z])[.:)]\s+"):
        labels = list(re.finditer(pattern, question))
        letters = "".join(label[1] for label in labels).upper()
        # the last list that begins with A: letters before it are part of the question
        for first in reversed(range(len(labels))):
            listed = labels[first:]
            if len(listed) >= 2 and letters[first:] == string.ascii_uppercase[: len(listed)]:
                ends = [*(label.start() for label in listed[1:]), len(question)]
                return [
                    question[label.end() : end].strip().rstrip(",;") for label, end in zip(listed, ends, strict=True)
                ]
    raise CTInstructError(f"the question '{question[:80]}' lists no choices.")


@dataclass(frozen=True)
class _Mention:
    """A letter in an answer: of which option, where, whether as a label before a text, whether as the stated answer."""

    index: int
    start: int
    end: int
    label: bool
    stated: bool


_CONCLUSION = re.compile(r"\banswer(?: is)?\s*:", re.I)
_REASON = re.compile(r"\b(?:because|since|due to|given|as)\b", re.I)
_LETTER = re.compile(r"(?<![A-Za-z0-9])(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])(?![A-Za-z0-9'’]|-\w))")
_SEPARATOR = re.compile(r"\s*[).:,;?!](?=\W|$)|\s*(?:\n|$|\()|\s+[-–—]\s")
_JOINED = re.compile(r"\s+(?:is|are|because|since|as|and|or|nor|but|due|given|seems|would|fits)\b|\s*[/&+]", re.I)
_LIST = re.compile(r"\s*(?:,|/|&|\+)?\s*(?:and|or|nor)?\s*", re.I)
_CUE = re.compile(
    r"(?:\b(?:answers?|options?|choices?|letters?|select|choose|chose|pick|go(?:ing)? with|opt for|doubt|say|both|either|neither|nor|not|between|than"
    r"|of|is|are|be|it's|that's|likely|probably|clearly|therefore|thus|hence|so|correct|right|best|but|except|or|and|maybe|perhaps"
    r"|possibly|leaving|shows)|答案是?|选择?|[:=→>])\W*$",
    re.I,
)
_VERBS = r"(?:is|are|was|were|can|could|does|do|did|has|have|would|should|must|seems?|appears?)"
_STATED_BEFORE = re.compile(
    r"(?:\b(?:(?:answer|choice)s?|correct(?: option| one)?)(?:\s+(?:is|are|was|would be|should be|must be|has to be))?"
    r"(?:\s+(?:most likely|likely|probably|clearly|definitely|option|choice|letter))*"
    r"|\b(?:select|choose|chose|pick|go with|going with|opt for)(?:\s+(?:option|choice))?"
    r"|^\W*(?:the\s+)?(?:option|choice|letter)|答案是?|选择?)[^\w.;!?]*$",
    re.I,
)  # fmt: skip
_STATED_AFTER = re.compile(r"\W*(?:is|would be|must be|seems)\s+(?:the\s+)?(?:correct|right|best|(?:most )?likely|answer)", re.I)  # fmt: skip
# what a denial before a name reaches: "no mass, nodule or cyst" as a whole, "not the mass, the cyst" up to the comma
_DENIED_LIST = re.compile(
    r"\b(?:no(?! doubt)|without(?! (?:a )?doubt)|neither|nor|negative for|free of|absence of|lacks?|excludes?|rules? out)\b", re.I
)  # fmt: skip
_DENIED_NEXT = re.compile(
    r"\b(?:not(?! only)|never|cannot|unlikely|rather than|instead of|except|other than|opposed to|against|whether|unable|ruled out"
    r"|excluded)\b|n['’]t\b", re.I
)  # fmt: skip
_DENIED_AFTER = re.compile(
    rf"\b{_VERBS}(?:n['’]t|\s+not(?! only)|\s+never)\b|\bcan(?:not|['’]t)\b"
    r"|\b(?:unlikely|absent|excluded|ruled out|wrong|incorrect|false|eliminated|impossible|implausible)\b|^\W*no\s*$",
    re.I,
)
_BEFORE_CLAUSE = re.compile(r"[.;!?\n]|\b(?:but|however|so|therefore|thus|hence|whereas|while|although)\b", re.I)
_AFTER_CLAUSE = re.compile(r"[.,;!\n]|\b(?:but|because|since|while|whereas|although|rather|instead)\b", re.I)


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Which option an answer names, by its letter ("(B) …", "**B**", "The answer is B, because …") or by its text.

    Returns:
        The option's index; None where the answer names none or several, denies what it names, or contradicts itself.
    """
    exact = _exact(answer, options)
    if exact is not None:
        return exact
    text = _undecorated(answer)
    concluded = [part for part in _CONCLUSION.split(text) if part.strip(" .:()\n")]
    if not concluded:
        return None
    last = concluded[-1]
    exact = _exact(last, options)
    if exact is not None:
        return exact
    for part in (_REASON.split(last)[0], last):
        letters = list(_letters(part, options))
        named = [one for one in letters if not _denied(part, one.start, one.end)]
        if named:
            return _letter_of(part, named, options)
        words = {index for index, start, end in _words(part, options) if not _denied(part, start, end)}
        words |= {other for index, start, _ in _words(part, options) for other in _joined(part[:start], index, options)}
        if words:
            return words.pop() if len(words) == 1 else None
        if letters:
            return None
    return None


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def _exact(text: str, options: Sequence[str]) -> int | None:
    """The option whose text this is, "a" and "the" aside."""
    article = r"^\s*(?:an?|the)\s+(?=\w)"
    for drop in (r"^$", article):
        words = _plain(re.sub(drop, "", text, flags=re.I))
        for index, option in enumerate(options):
            if words and words == _plain(re.sub(drop, "", option, flags=re.I)):
                return index
    return None


def _undecorated(answer: str) -> str:
    """Without reasoning in tags, markup and LaTeX; a decorated letter becomes "(B)"."""
    text = unicodedata.normalize("NFKC", answer)
    text = re.sub(r"^.*</think>|<think>.*", " ", text, flags=re.S | re.I)
    text = re.sub(r"<answer>|\\f?boxed\b|####", " Answer: ", text, flags=re.I)
    text = re.sub(r"\\[A-Za-z]+\s*|\\[()\[\]]", "", text)
    text = re.sub(r"<\|[^|]*\|>|</?[A-Za-z][^<>]*>", " ", text)
    text = re.sub(
        r"""(?<![A-Za-z0-9])[*_`$"'“‘«【「\[{(]+([A-Za-z])[*_`$"'”’»】」\]})]+(?![A-Za-z0-9])""", r"(\1)", text
    )
    return re.sub(r"[*`${}]|__|~~", "", text)


def _pattern(option: str) -> str:
    """The option's words, whatever stands between them; scripts without blanks have no edges of words."""
    words = _plain(option).split()
    if not words:
        return r"(?!)"
    before, after = (r"(?<!\w)" if words[0][0] < "\u2e80" else "", r"(?!\w)" if words[-1][-1] < "\u2e80" else "")
    return before + r"[\W_]+".join(re.escape(word) for word in words) + after


def _letters(text: str, options: Sequence[str]) -> Iterator[_Mention]:
    """Letters that stand for options, with the option's own text where it follows."""
    previous: _Mention | None = None
    for found in _LETTER.finditer(text):
        letter = found[1] or found[2]
        index = ord(letter.upper()) - ord("A")
        before, after = text[: found.start()], text[found.end() :]
        own = re.match(rf"[\s().:,;–—-]*(?:(?:the|an?)\s+)?{_pattern(options[index])}", after, re.I) if index < len(options) else None  # fmt: skip
        joined, separator = _JOINED.match(after), _SEPARATOR.match(after)
        listed = previous is not None and bool(_LIST.fullmatch(text[previous.end : found.start()]))
        stated = bool(_STATED_BEFORE.search(before) or _STATED_AFTER.match(after)) or (
            listed and previous is not None and previous.stated
        )
        if found[2]:  # without brackets
            opens = re.search(r"(?:^|[.!?\n])[\s>#•–—-]*$", before)
            if letter.islower():
                counts = bool(separator and (stated or (opens and not before.strip(" \n>#•–—-"))))
            else:
                counts = bool((opens or listed or stated or _CUE.search(before)) and (separator or joined or own))
                counts = counts or bool(own and separator)
            if not counts or (letter == "I" and re.match(r"\s+(?!is\b|and\b|or\b)\w", after)):
                continue
        end = found.end() + (own.end() if own else 0)
        previous = _Mention(index, found.start(), end, bool(found[1] or separator) and not joined, stated)
        yield previous


def _letter_of(text: str, named: list[_Mention], options: Sequence[str]) -> int | None:
    """The one option that the letters name; a label in front counts before letters later in the text."""
    chosen = [one for one in named if one.stated] or named
    first = chosen[0]
    if first.label and not text[: first.start].strip(" \n(>#•–—-"):
        chosen = [first, *(one for one in chosen if one.label)]
    if len({one.index for one in chosen}) > 1 or first.index >= len(options):
        return None
    for one in chosen:
        beside = (
            re.split(r"[.,;\n]", text[one.end :].lstrip(" ().:,;–—-"))[0],
            re.split(r"[.,;:\n]", text[: one.start])[-1],
        )
        if any(_exact(words, options) not in (None, one.index) for words in beside):
            return None
    return first.index


def _words(text: str, options: Sequence[str]) -> list[tuple[int, int, int]]:
    """(option, start, end) of options' texts; "pleural effusion" inside "no pleural effusion" is not counted."""
    found = [
        (index, match.start(), match.end())
        for index, option in enumerate(options)
        for match in re.finditer(_pattern(option), text, re.I)
    ]
    return [
        (index, start, end)
        for index, start, end in found
        if not any(a <= start and end <= b and b - a > end - start for _, a, b in found)
    ]


def _joined(before: str, named: int, options: Sequence[str]) -> Iterator[int]:
    """Options that share words with one that was named and are joined to it: "upper" in "upper or middle lobe"."""
    split = [_plain(option).split() for option in options]
    for index, words in enumerate(split):
        if index == named or not set(words) & set(split[named]):
            continue
        alone = [word for word in words if word not in split[named]]
        if alone and re.search(rf"\b{re.escape(alone[-1])}\W*(?:\bor\b|\band\b|/|,)\W*(?:the\s+)?$", before, re.I):
            yield index


def _denied(text: str, start: int, end: int) -> bool:
    """Whether the clause around a mention says that it is not so."""
    before = re.sub(r"^\W*no\s*,", "", _BEFORE_CLAUSE.split(text[:start])[-1], flags=re.I)
    if _DENIED_LIST.search(before) or _DENIED_NEXT.search(before.rpartition(",")[2]):
        return True
    while listed := re.match(r"\s*(?:,|/|&|and|or)\s*\(?[A-Z]\)?(?!\w)", text[end:]):  # "A and B are wrong"
        end += listed.end()
    after = _AFTER_CLAUSE.split(text[end:])[0]
    spoken = re.match(rf"(.*?\b{_VERBS}\b.*?)\band\b", after, re.I)  # "B is right and A is absent"
    return bool(_DENIED_AFTER.search(spoken[1] if spoken else after))


__all__ = ["chosen_option", "options_of"]
