"""WordNet for METEOR without a download: nltk's folder or Debian's packages, whichever is there."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import CTInstructError

HOW_TO_GET = (
    "METEOR needs WordNet, which was not found: run `python -m nltk.downloader wordnet`, or `scripts/install_wordnet.sh` "
    "(Debian's packages wordnet-base and wordnet-sense-index, without root), or leave METEOR out."
)
# Debian's packages and ours, then what nltk has
FOLDERS = (Path("/usr/share/wordnet"), Path("~/.cache/ctinstruct_hf/wordnet"))
# the files of lexicographers, in the order of their numbers (lexnames(5WN)), which Debian leaves out
_NOUNS = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event",
    "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon", "plant",
    "possession", "process", "quantity", "relation", "shape", "state", "substance", "time",
)  # fmt: skip
_VERBS = (
    "body", "change", "cognition", "communication", "competition", "consumption", "contact", "creation",
    "emotion", "motion", "perception", "possession", "social", "stative", "weather",
)  # fmt: skip
_LEXNAMES = ["adj.all", "adj.pert", "adv.all", *(f"noun.{name}" for name in _NOUNS), *(f"verb.{name}" for name in _VERBS), "adj.ppl"]  # fmt: skip


def find_wordnet() -> Any:
    """nltk's reader of WordNet.

    Raises:
        CTInstructError: with how to get it, where there is none.
    """
    from nltk import data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def open(self, file: str) -> Any:
            if file == "lexnames" and not (Path(str(self._root)) / file).exists() and not _zipped(self._root):
                return io.StringIO("".join(f"{number:02d}\t{name}\t0\n" for number, name in enumerate(_LEXNAMES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Other languages' numbers of synsets, which METEOR does not use."""

    roots: list[Any] = []
    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            roots.append(data.find(name))
        except LookupError:
            continue
    for folder in FOLDERS:
        root = str(folder.expanduser())
        if os.path.exists(os.path.join(root, "index.sense")):
            roots.append(root)
            if root not in data.path:  # nltk opens nothing outside its folders
                data.path.append(root)
    problems = []
    for root in roots:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that other languages are missing
                return Reader(root, None)
        except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
            problems.append(f" ({root} is there, but cannot be read: {error})")
    raise CTInstructError(HOW_TO_GET + "".join(problems))


def _zipped(root: Any) -> bool:
    return not os.path.isdir(str(root))


class Synonyms:
    """Synsets as nltk's METEOR asks for them, each word looked up once."""

    def __init__(self) -> None:
        self._reader = find_wordnet()
        self.synsets = lru_cache(maxsize=100_000)(self._synsets)

    def _synsets(self, word: str) -> list[Any]:
        names = {lemma.name() for synset in self._reader.synsets(word) for lemma in synset.lemmas()}
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in sorted(names)]
        return [SimpleNamespace(lemmas=lambda: lemmas)]


class Stems:
    """Porter's stems, each word's computed once."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = lru_cache(maxsize=100_000)(PorterStemmer().stem)
