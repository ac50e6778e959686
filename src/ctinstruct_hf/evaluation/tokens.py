"""Words of texts in any script, for scores whose libraries know Latin letters without accents only."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

TOKENIZERS = ("auto", "ascii", "unicode")
# scripts that are written without blanks: each character is a word
_WITHOUT_BLANKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x9FFF),  # Chinese, Japanese, with their punctuation
    (0xF900, 0xFAFF),
    (0xFF00, 0xFF65),
    (0x20000, 0x3FFFF),
)


def needs_unicode(texts: Iterable[str]) -> int:
    """How many of the texts have letters or digits beyond ASCII."""
    return sum(
        not text.isascii() and any(not char.isascii() and unicodedata.category(char)[0] in "LN" for char in text)
        for text in texts
    )


def spaced(text: str) -> str:
    """The text with blanks around each character of scripts that are written without blanks."""
    if text.isascii():
        return text
    parts: list[str] = []
    alone = False  # whether the last character, with its marks, is a word by itself
    for char in text:
        if unicodedata.category(char)[0] != "M":
            before, alone = alone, any(low <= ord(char) <= high for low, high in _WITHOUT_BLANKS)
            if before or alone:
                parts.append(" ")
        parts.append(char)
    return "".join(parts)


class UnicodeTokenizer:
    """Lower-case words of letters, marks and digits of any script; on ASCII texts the same as `rouge_score`'s default."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, for `rouge_score`."""
        lowered = unicodedata.normalize("NFKC", spaced(unicodedata.normalize("NFKC", text))).lower()
        return "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in lowered).split()


__all__ = ["TOKENIZERS", "UnicodeTokenizer", "needs_unicode", "spaced"]
