"""Speed of the metrics against the obvious way: a bootstrap, METEOR of many reports, Dice of all classes of a volume.

python benchmarks/evaluation.py [--check] [--quick]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from common import alternate, arguments, header, ratio, table, write_figures
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from sklearn.metrics import roc_auc_score

from ctinstruct_hf.evaluation.segmentation import volume_dice
from ctinstruct_hf.evaluation.significance import bootstrap_auc
from ctinstruct_hf.evaluation.text import _words, score_texts
from ctinstruct_hf.evaluation.wordnet import find_wordnet
from ctinstruct_hf.phantoms import FINDINGS
from ctinstruct_hf.phantoms.wording import write_report


def reports(count: int) -> list[str]:
    """Reports as phantoms have them."""
    texts = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        labels = {name: int(rng.random() < 0.4) for name in FINDINGS}
        texts.append(write_report(rng, labels, [], "native"))
    return texts


def naive_bootstrap(scores: np.ndarray, labels: np.ndarray, times: int) -> np.ndarray:
    """scikit-learn's AUC of every disease in every draw."""
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(times):
        rows = rng.integers(len(scores), size=len(scores))
        areas.append([roc_auc_score(labels[rows, one], scores[rows, one]) for one in range(scores.shape[1])])
    return np.percentile(areas, [2.5, 97.5], axis=0)


def naive_dice(said: np.ndarray, truth: np.ndarray, classes: int) -> list[float]:
    """A pass over the voxels per class."""
    found = []
    for label in range(1, classes + 1):
        a, b = said == label, truth == label
        found.append(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))
    return found


def naive_meteor(said: list[str], right: list[str], reader: Any) -> list[float]:
    """nltk's own, in one process."""
    stemmer = PorterStemmer()
    return [
        single_meteor_score(_words(b), _words(a), stemmer=stemmer, wordnet=reader)
        for a, b in zip(said, right, strict=True)
    ]


def main() -> int:
    options = arguments(__doc__)
    quick, runs = options.quick, 1 if options.quick else options.runs
    rng = np.random.default_rng(0)
    print(header("torch", "numpy", "scikit-learn", "nltk"))
    cases, diseases = (100, 3) if quick else (1564, 18)
    labels = (rng.random((cases, diseases)) < 0.3).astype(int)
    scores = np.clip(labels * 0.2 + rng.random((cases, diseases)) * 0.8, 0, 1)
    times, some = (20, 10) if quick else (1000, 100)
    shape, classes = ((20, 30, 30), 5) if quick else ((300, 512, 512), 117)
    truth = rng.integers(0, classes + 1, shape, dtype=np.uint8)
    said = np.where(rng.random(shape, dtype=np.float32) < 0.8, truth, 0).astype(np.uint8)
    texts = reports(20 if quick else 2000)
    others = texts[1:] + texts[:1]
    reader = find_wordnet()
    pairs = [
        alternate(
            f"AUC, {cases} x {diseases}, {times} bootstraps",
            lambda: bootstrap_auc(scores, labels, times),
            lambda: naive_bootstrap(scores, labels, some),
            runs,
            None if quick else 5,
        ),
        alternate(
            f"Dice, {classes} classes",
            lambda: volume_dice(said, truth, list(range(1, classes + 1))),
            lambda: naive_dice(said, truth, 3 if quick else 12),
            runs,
            None if quick else 1,
        ),
        alternate(
            f"METEOR of {len(texts)} pairs, one process",
            lambda: score_texts(texts, others, ["meteor"], workers=1),
            lambda: naive_meteor(texts, others, reader),
            runs,
            None if quick else 1,
        ),
    ]
    print(
        f"The other side does {some} of {times} bootstraps and {3 if quick else 12} of {classes} classes; all the pairs."
    )
    print(table(pairs))
    fastest = [min(pair.ours) for pair in pairs]
    write_figures(
        options,
        auc=f"{fastest[0]:.2f} s; scikit-learn with {some} of them takes {ratio(pairs[0])} times as long",
        dice=f"{fastest[1]:.2f} s; a pass per class takes {ratio(pairs[1])} times as long for {3 if quick else 12} of them",
        meteor=f"{fastest[2]:.2f} s, nltk's own {ratio(pairs[2])} times as long",
    )
    if not quick:
        seconds = {pair.name: min(pair.ours) for pair in pairs}
        for name, most in ((pairs[0].name, 20.0), (pairs[1].name, 3.0)):
            print(f"{name}: {seconds[name]:.2f} s, at most {most:g} s{'  MISSED' if seconds[name] > most else ''}")
        if options.check and (seconds[pairs[0].name] > 20 or seconds[pairs[1].name] > 3):
            return 1
    return int(options.check and any(pair.missed for pair in pairs))


if __name__ == "__main__":
    sys.exit(main())
