"""Scores of generated text (section 4.1): BLEU-1, ROUGE-1 and METEOR as `evaluate` computes them, without a download,
multiple choice, and clinical efficacy of reports."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..data.labeller import FINDINGS, find_mentions, label_report
from ..errors import CTInstructError
from .choices import choice_accuracy, chosen_option
from .tokens import TOKENIZERS, UnicodeTokenizer, needs_unicode, spaced

TEXT_METRICS = ("bleu1", "rouge1", "meteor")
_PER_PROCESS = 1000  # pairs for which starting another process is worth it


class TextScores(list[dict[str, float]]):
    """{metric: score in 0…1} per pair. As in `datasets`, a number gives a row and a name a column.

    Attributes:
        tokenizer: `ascii` or `unicode`, how words were found.
    """

    tokenizer: str = "ascii"

    def __getitem__(self, key: Any) -> Any:  # a str: a column
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return [row[key] for row in self]
        found = super().__getitem__(key)
        return TextScores(found) if isinstance(key, slice) else found

    def keys(self) -> list[str]:
        """Names of the metrics."""
        return list(super().__getitem__(0)) if len(self) else []

    def mean(self) -> dict[str, float]:
        """Mean of each metric over the pairs."""
        return {name: float(np.mean(self[name])) for name in self.keys()}


def score_texts(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    metrics: Sequence[str] = TEXT_METRICS,
    workers: int | None = None,
    tokenizer: str = "auto",
) -> TextScores:
    """BLEU-1, ROUGE-1 (F) and METEOR of each pair.

    Args:
        predictions: generated texts.
        references: the right text of each, or several of them: the best counts (in BLEU, their words together).
        metrics: of `TEXT_METRICS`.
        workers: processes; by default all cores where there is enough to do.
        tokenizer: of `TOKENIZERS`: `ascii`, that of the libraries, whose ROUGE drops every letter but a–z; `unicode`, words
            of any script, single characters of scripts without blanks, the same as `ascii` for ASCII texts; `auto`,
            `unicode` where a text has letters or digits beyond ASCII.

    Returns:
        A list with a dict per pair; `scores["meteor"]` is a column of it. Values in 0…1.

    Raises:
        CTInstructError: for lists of different length, pairs that are no text, or METEOR without WordNet.
    """
    pairs = _checked(predictions, references)
    unknown = sorted(set(metrics) - set(TEXT_METRICS))
    if unknown:
        raise CTInstructError(f"metrics has unknown {', '.join(unknown)}: known are {', '.join(TEXT_METRICS)}.")
    _require(metrics)
    if tokenizer not in TOKENIZERS:
        raise CTInstructError(f"tokenizer is '{tokenizer}': use {', '.join(TOKENIZERS)}.")
    if tokenizer == "auto":
        beyond = needs_unicode(text for prediction, several in pairs for text in (prediction, *several))
        tokenizer = "unicode" if beyond else "ascii"
    if "meteor" in metrics and pairs:
        _meteor_tools()  # fails here rather than in a process
    if workers is None:
        workers = max(1, min(os.cpu_count() or 1, len(pairs) // _PER_PROCESS))
    if workers == 1:
        scores = TextScores(_score_pairs(pairs, tuple(metrics), tokenizer))
    else:
        step = -(-len(pairs) // (workers * 4))
        jobs = [(pairs[start : start + step], tuple(metrics), tokenizer) for start in range(0, len(pairs), step)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            scores = TextScores(row for part in pool.map(_score_job, jobs) for row in part)
    scores.tokenizer = tokenizer
    return scores


_LIBRARIES = {"bleu1": "sacrebleu", "rouge1": "rouge_score", "meteor": "nltk"}


def _require(metrics: Sequence[str]) -> None:
    missing = [_LIBRARIES[name] for name in metrics if find_spec(_LIBRARIES[name]) is None]
    if missing:
        raise CTInstructError(f"Scores of texts need {', '.join(missing)}: pip install 'ctinstruct-hf[eval]'.")


def _checked(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[tuple[str, list[str]]]:
    if len(predictions) != len(references):
        raise CTInstructError(f"There are {len(predictions)} predictions for {len(references)} references.")
    pairs = []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        several = [reference] if isinstance(reference, str) else list(reference)
        if not isinstance(prediction, str) or not several or not all(isinstance(text, str) for text in several):
            raise CTInstructError(f"pair {index} is no text: both sides must be strings.")
        pairs.append((prediction, several))
    return pairs


_Pairs = list[tuple[str, list[str]]]


def _score_job(job: tuple[_Pairs, tuple[str, ...], str]) -> list[dict[str, float]]:
    return list(_score_pairs(*job))


def _score_pairs(pairs: _Pairs, metrics: tuple[str, ...], tokenizer: str) -> Iterator[dict[str, float]]:
    known: dict[str, Callable[[str, list[str]], float]] = {
        "bleu1": _bleu1,
        "rouge1": partial(_rouge1, tokenizer),
        "meteor": _meteor,
    }
    for prediction, references in pairs:
        if tokenizer == "unicode":
            prediction, references = spaced(prediction), [spaced(reference) for reference in references]
        yield {name: known[name](prediction, references) for name in metrics}


@lru_cache(maxsize=1)
def _bleu_tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _bleu1(prediction: str, references: list[str]) -> float:
    """`evaluate`'s bleu with max_order=1: clipped precision of words times the brevity penalty, tokens of mteval-13a."""
    tokenize = _bleu_tokenizer()
    words = Counter(tokenize(prediction).split())
    sources = [tokenize(reference).split() for reference in references]
    length, wanted = sum(words.values()), min(len(source) for source in sources)
    if not length:
        return 0.0
    most: Counter[str] = Counter()
    for source in sources:
        most |= Counter(source)
    precision = sum((words & most).values()) / length
    return precision if length > wanted else precision * math.exp(1 - wanted / length)


@lru_cache(maxsize=2)
def _rouge_scorer(tokenizer: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=False, tokenizer=UnicodeTokenizer() if tokenizer == "unicode" else None)


def _rouge1(tokenizer: str, prediction: str, references: list[str]) -> float:
    return float(_rouge_scorer(tokenizer).score_multi(references, prediction)["rouge1"].fmeasure)


@lru_cache(maxsize=1)
def _meteor_tools() -> tuple[Any, Any]:
    from .wordnet import Stems, Synonyms

    return Stems(), Synonyms()


@lru_cache(maxsize=1)
def _sentence_splitter() -> Any:
    """nltk's, trained where its data is there, else the same algorithm without a list of abbreviations."""
    from nltk.tokenize import PunktTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    try:
        return PunktTokenizer("english")
    except LookupError:
        return PunktSentenceTokenizer()


@lru_cache(maxsize=20_000)
def _words(text: str) -> tuple[str, ...]:
    """nltk's `word_tokenize`."""
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return tuple(word for sentence in _sentence_splitter().tokenize(text) for word in tokenizer.tokenize(sentence))


def _meteor(prediction: str, references: list[str]) -> float:
    from nltk.translate.meteor_score import single_meteor_score

    stemmer, synonyms = _meteor_tools()
    return max(
        float(single_meteor_score(_words(reference), _words(prediction), stemmer=stemmer, wordnet=synonyms))
        for reference in references
    )


# clinical efficacy


def clinical_efficacy(
    predictions: Sequence[str], references: Sequence[str | dict[str, int]], uncertain: bool = True
) -> dict[str, Any]:
    """Whether generated reports name the findings that are there: CT-RATE's 18, by `label_report`.

    Args:
        predictions: generated reports.
        references: the right reports, read by the same rules, or {finding: 1, 0, −1 for unknown}.
        uncertain: what findings that are only called possible count as.

    Returns:
        {"precision", "recall", "f1": macro means over findings that occur on either side; "micro": {…};
        "per_finding": {name: {"precision", "recall", "f1", "support"}}}.
    """
    if len(predictions) != len(references):
        raise CTInstructError(f"There are {len(predictions)} predictions for {len(references)} references.")
    named = np.array([list(label_report(text, uncertain).values()) for text in predictions], dtype=bool)
    truth = np.full(named.shape, -1)
    for row, reference in enumerate(references):
        if isinstance(reference, str):
            truth[row] = list(label_report(reference, uncertain).values())
        else:
            known = {name.lower(): value for name, value in reference.items()}
            truth[row] = [known.get(name, -1) for name in FINDINGS]
    return precision_recall_f1(named, truth, FINDINGS)


def precision_recall_f1(named: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of yes or no per column, with macro and micro means.

    Args:
        named: bool [N, columns].
        truth: [N, columns] of 1, 0, or −1 for unknown.
        names: of the columns.
    """
    kept = truth >= 0
    hits = ((truth == 1) & named).sum(0)
    claimed, positives = (named & kept).sum(0), (truth == 1).sum(0)

    def three(hit: int, claim: int, positive: int) -> dict[str, float]:
        return {
            "precision": hit / claim if claim else 0.0,
            "recall": hit / positive if positive else 0.0,
            "f1": 2 * hit / (claim + positive) if claim + positive else 0.0,
        }

    per_finding = {
        name: {**three(int(hits[i]), int(claimed[i]), int(positives[i])), "support": int(positives[i])}
        for i, name in enumerate(names)
    }
    shown = [row for row, claim in zip(per_finding.values(), claimed, strict=True) if row["support"] or claim]
    macro = {key: float(np.mean([row[key] for row in shown])) if shown else float("nan") for key in ("precision", "recall", "f1")}  # fmt: skip
    micro = three(int(hits.sum()), int(claimed.sum()), int(positives.sum()))
    return {**macro, "micro": micro, "per_finding": per_finding}


__all__ = [
    "TEXT_METRICS",
    "TextScores",
    "choice_accuracy",
    "chosen_option",
    "clinical_efficacy",
    "find_mentions",
    "label_report",
    "precision_recall_f1",
    "score_texts",
]
