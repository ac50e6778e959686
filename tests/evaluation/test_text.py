"""Scores of texts against values worked out independently."""

from __future__ import annotations

import math

import pytest
from wordnets import needs_wordnet

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.evaluation import wordnet
from ctinstruct_hf.evaluation.predictions import Predictions, Record
from ctinstruct_hf.evaluation.scoring import score_predictions
from ctinstruct_hf.evaluation.text import choice_accuracy, chosen_option, clinical_efficacy, score_texts

SAID = ["There is a small nodule in the left lung.", "", "No effusion.", "Heart size is normal, no effusion."]
RIGHT = ["A small nodule is seen in the left lung.", "Emphysema.", "No effusion.", "The heart is of normal size."]


def test_bleu_by_hand() -> None:
    scores = score_texts(SAID, RIGHT, ["bleu1"])
    # 10 tokens against 10, where "there" is not there, "There" counts as another word, and "A" is not "a"
    assert scores["bleu1"][0] == pytest.approx(8 / 10)
    assert scores["bleu1"][1] == 0.0
    assert scores["bleu1"][2] == 1.0
    # 8 tokens against 7: size, is, normal, "." of them
    assert scores["bleu1"][3] == pytest.approx(4 / 8)
    short = score_texts(["nodule"], ["a small nodule ."], ["bleu1"])[0]["bleu1"]
    assert short == pytest.approx(math.exp(1 - 4 / 1))


def test_rouge_by_hand() -> None:
    scores = score_texts(SAID, RIGHT, ["rouge1"])
    assert scores[0]["rouge1"] == pytest.approx(2 * (8 / 9) * (8 / 9) / (16 / 9))
    assert scores[1]["rouge1"] == 0.0
    assert scores[3]["rouge1"] == pytest.approx(2 * 4 / (6 + 6))


@pytest.mark.parametrize("metric", ["rouge1", "bleu1"])
@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("双肺未见结节。", "双肺未见结节。", 1.0),
        ("左肺结节", "右肺结节", 3 / 4),
        ("左肺CT结节", "右肺ct结节", {"rouge1": 4 / 5, "bleu1": 3 / 5}),  # BLEU minds case
        ("結節なし", "結節あり", 2 / 4),
        ("ไม่พบ", "ไม่พบ", 1.0),
        ("В правом лёгком узел", "В левом лёгком узел", 3 / 4),
        ("Sağ akciğerde", "Sol akciğerde", 1 / 2),
        ("Nódulo no pulmão", "Nodulo no pulmao", 1 / 3),
        ("बायाँ फेफड़ा", "बायाँ फेफड़ा", 1.0),
        ("لا توجد عقيدات", "توجد عقيدات كبيرة", 2 / 3),
        ("폐 결절", "폐 종양", 1 / 2),
    ],
)
def test_words_of_any_script_count(metric: str, said: str, right: str, score: float | dict[str, float]) -> None:
    scores = score_texts([said], [right], [metric])
    assert scores.tokenizer == "unicode"
    assert scores[0][metric] == pytest.approx(score[metric] if isinstance(score, dict) else score)


def test_the_unicode_tokenizer_changes_nothing_on_ascii_texts() -> None:
    texts = [*SAID, *RIGHT, "T2-weighted: 3.5 cm_x (L1/L2), it's 50%"]
    ascii_, unicode = (
        score_texts(texts, texts[::-1], ["bleu1", "rouge1"], tokenizer=one) for one in ("ascii", "unicode")
    )
    assert ascii_ == unicode
    assert score_texts(texts, texts[::-1], ["rouge1"]).tokenizer == "ascii"
    assert score_texts(["узел"], ["узел"], ["rouge1"], tokenizer="ascii")[0]["rouge1"] == 0.0
    with pytest.raises(CTInstructError, match="tokenizer is 'latin'"):
        score_texts(texts, texts, ["rouge1"], tokenizer="latin")


@needs_wordnet
def test_scores_say_which_tokenizer_was_taken() -> None:
    for text, name in (("结节", "unicode"), ("nodule", "ascii")):
        records = [Record("a", "report", prediction=text, reference=text)]
        found = score_predictions(Predictions("x", records), bootstraps=5).to_dict()["tasks"][0]
        assert found["details"]["tokenizer"] == name
        assert any("tokenizer: unicode" in note for note in found["notes"]) == (name == "unicode")


@needs_wordnet
def test_meteor_is_nltks_own() -> None:
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import single_meteor_score

    from ctinstruct_hf.evaluation.text import _words

    reader = wordnet.find_wordnet()
    pairs = [*zip(SAID, RIGHT, strict=True), ("The physician examined nodules.", "A doctor was examining the nodule.")]
    ours = score_texts([one for one, _ in pairs], [one for _, one in pairs], ["meteor"])
    for index, (said, right) in enumerate(pairs):
        theirs = single_meteor_score(_words(right), _words(said), stemmer=PorterStemmer(), wordnet=reader)
        assert ours[index]["meteor"] == pytest.approx(theirs)
    assert ours[4]["meteor"] > 0.4  # a doctor is a physician, "examined" and "examining" share a stem


@pytest.mark.slow
@needs_wordnet
def test_several_processes_and_several_references_give_the_same() -> None:
    alone = score_texts(SAID * 3, RIGHT * 3, workers=1)
    shared = score_texts(SAID * 3, RIGHT * 3, workers=2)
    assert list(alone) == list(shared)
    assert alone.mean()["bleu1"] == pytest.approx(sum(alone["bleu1"]) / 12)
    two = score_texts(["No effusion."], [["Emphysema.", "No effusion."]])
    assert two[0]["rouge1"] == 1.0


def test_without_wordnet_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from nltk import data

    from ctinstruct_hf.evaluation.text import _meteor_tools

    monkeypatch.setattr(data, "path", [])
    monkeypatch.setattr(wordnet, "FOLDERS", ())
    _meteor_tools.cache_clear()
    with pytest.raises(CTInstructError, match="install_wordnet"):
        score_texts(["a"], ["a"])
    assert score_texts(["a"], ["a"], ["bleu1", "rouge1"])[0] == {"bleu1": 1.0, "rouge1": 1.0}
    _meteor_tools.cache_clear()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CTInstructError, match="2 predictions for 1"):
        score_texts(["a", "b"], ["a"])
    with pytest.raises(CTInstructError, match="pair 0 is no text"):
        score_texts([None], ["a"])  # type: ignore[list-item]
    with pytest.raises(CTInstructError, match="unknown bertscore"):
        score_texts(["a"], ["a"], ["bertscore"])


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("(B) emphysema", 1),
        ("B", 1),
        ("b.", 1),
        ("The answer is B.", 1),
        ("Answer: (A)", 0),
        ("emphysema", 1),
        ("lung mass? No. emphysema? Yes. pleural effusion? No. Answer: emphysema (B)", 1),
        ("(A) lung mass? No. (B) emphysema? Yes (B). Answer: (B) emphysema", 1),
        ("Answer: (A) lung mass, (B) emphysema", None),
        ("(A) lung mass and (B) emphysema", None),
        ("(B), because (A) is not seen", 1),
        ("(A) is unlikely. The answer is: (C)", 2),
        ("A nodule", None),
        ("It shows no pleural effusion.", 3),
        ("pleural effusion", 2),
        ("emphysema or pleural effusion", None),
        ("E", None),
        ("", None),
    ],
)
def test_an_answer_names_an_option(answer: str, index: int | None) -> None:
    options = ["lung mass", "emphysema", "pleural effusion", "no pleural effusion"]
    assert chosen_option(answer, options) == index


def test_accuracy_of_choices() -> None:
    options = [["x", "y"]] * 3
    told = choice_accuracy(["(A) x", "y", "neither"], ["x", "A", "x"], options)
    assert told["accuracy"] == pytest.approx(1 / 3)
    assert told["unreadable"] == [2]
    with pytest.raises(CTInstructError, match="is not among its options"):
        choice_accuracy(["x"], ["z"], [["x", "y"]])


def test_clinical_efficacy_by_hand() -> None:
    said = ["Emphysema. No effusion.", "Pleural effusion.", "Emphysema and atelectasis."]
    right = ["Emphysema.", {"emphysema": 1, "pleural effusion": 1}, "Atelectasis. Pleural effusion."]
    told = clinical_efficacy(said, right)
    assert told["per_finding"]["emphysema"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert told["per_finding"]["pleural effusion"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}  # fmt: skip
    assert told["f1"] == pytest.approx((0.5 + 2 / 3 + 1) / 3)  # over the three that occur
    assert told["micro"]["precision"] == pytest.approx(3 / 4)
