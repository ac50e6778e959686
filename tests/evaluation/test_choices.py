"""Answers to multiple choice in the forms that systems give them: read rightly, or as unreadable, never as another option."""

from __future__ import annotations

import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.evaluation.choices import choice_accuracy, chosen_option, options_of

FINDINGS = ("lung mass", "emphysema", "pleural effusion", "no pleural effusion")
LOBES = ("upper lobe", "middle lobe", "lower lobe")
TEN = ("nodule", "effusion", "cardiomegaly", "atelectasis", "emphysema", "fibrosis", "calcification", "hernia", "pneumothorax", "bronchiectasis")  # fmt: skip
ANSWERS: dict[str, tuple[tuple[str, ...], dict[str, int | None]]] = {
    "decoration": (
        FINDINGS,
        {
            "**B**": 1,
            "$B$": 1,
            "\\boxed{B}": 1,
            "The answer is $\\boxed{\\text{B}}$.": 1,
            "<answer>B</answer>": 1,
            "<b>B</b>": 1,
            "[B]": 1,
            '"B"': 1,
            "`B`": 1,
            "{B}": 1,
            "__B__": 1,
            "_B_": 1,
            "**B.** emphysema": 1,
            "**Answer:** B": 1,
            "**Answer: B**": 1,
            "**(B)**": 1,
            "Final answer: **B) emphysema**": 1,
            "Ｂ": 1,
            "（Ｂ）": 1,
            "【B】": 1,
            "答案是B": 1,
            "答案：B": 1,
            "选B": 1,
            "B<|im_end|>": 1,
            "<think>A or C? Not sure.</think>\nB": 1,
            "A is tempting.</think> B": 1,
            "<think>maybe A": None,
            "\\(B\\)": 1,
            "\\textbf{B}": 1,
            "$\\mathrm{B}$": 1,
        },
    ),
    "a stated answer with a reason": (
        FINDINGS,
        {
            "The answer is B because A is not seen.": 1,
            "B, because A would show a mass.": 1,
            "B. Options A and C are not seen.": 1,
            "I would choose B, as A is not seen.": 1,
            "Option B is correct. Options A and C are wrong.": 1,
            "B since there is no mass": 1,
            "The correct option is (B) emphysema. (A) is wrong.": 1,
            "Emphysema, because there is no lung mass.": 1,
            "Because of hyperlucency, it is B": 1,
            "B\n\nExplanation: A lung mass would be dense.": 1,
            "I think the answer is B.": 1,
            "It is B.": 1,
            "So it must be B.": 1,
            "B is correct": 1,
            "B is the best answer; A is possible too.": 1,
            "I believe **B. emphysema** fits": 1,
        },
    ),
    "an article is no letter": (
        FINDINGS,
        {
            "A 2 cm mass in the left lower lobe": None,
            "A large pleural effusion is seen.": 2,
            "A pleural effusion": 2,
            "A lung mass": 0,
            "A small nodule, so B": 1,
            "I see emphysema": 1,
            "I cannot tell": None,
            "A hyperlucent area. The answer is B.": 1,
            "The answer is A nodule": None,
            "The answer is a nodule": None,
        },
    ),
    "denials": (
        FINDINGS,
        {
            "It is not A.": None,
            "Not B": None,
            "not emphysema": None,
            "There is no emphysema": None,
            "Neither A nor B": None,
            "The answer is not B": None,
            "The answer is not B but C": 2,
            "not A but B": 1,
            "A is wrong": None,
            "Emphysema is not seen": None,
            "Emphysema, not lung mass": 1,
            "emphysema rather than lung mass": 1,
            "All except B": None,
            "No lung mass or emphysema": None,
            "no lung mass, emphysema": None,
            "None of the above": None,
            "A and B are wrong, C is right.": 2,
            "There is a pleural effusion": 2,
            "Emphysema is absent. There is a lung mass.": 0,
            "It isn't emphysema": None,
            "lung mass and emphysema are absent": None,
            "I don't think it is B": None,
        },
    ),
    "two letters": (
        FINDINGS,
        {
            "A or B": None,
            "A and C": None,
            "A, C": None,
            "A/B": None,
            "AB": None,
            "(A)(B)": None,
            "Both A and B": None,
            "(A), (B)": None,
            "A & C": None,
            "A. lung mass\nB. emphysema": None,
            "The answer is A or C": None,
            "B and C are possible, but the answer is B": 1,
            "A B": None,
            "(A) and (C)": None,
        },
    ),
    "letters beside another text, and other forms": (
        FINDINGS,
        {
            "(A) emphysema": None,
            "emphysema (A)": None,
            "emphysema (B)": 1,
            "E. emphysema": None,
            "hepatitis B": None,
            "B-lines are seen": None,
            "It is A": 0,
            "The answer is A": 0,
            "Option A": 0,
            "option b": 1,
            "answer is b": 1,
            "(b)": 1,
            "b) emphysema": 1,
            "B) emphysema": 1,
            "B: emphysema": 1,
            "B - emphysema": 1,
            "Choice: B": 1,
            "My choice is C.": 2,
            "Yes": None,
            "The letter is D": 3,
            "B (emphysema)": 1,
            "Answer: B (not A)": 1,
            "B!": 1,
            "Answer B": 1,
            "Ans: B": 1,
            "B or maybe C": None,
            "Could be B, could be C": None,
            "A, B and D": None,
            "Between A and B, I choose B.": 1,
            "I'd say B": 1,
            "Let's go with (C)": 2,
            "B is incorrect, C is correct": 2,
            "Not A, not B, so C": 2,
            "A can be excluded, leaving B": 1,
            "(A) lung mass (B) emphysema (C) pleural effusion": None,
            "B. It is not a lung mass": 1,
            "B: not a lung mass": 1,
            "B, which is not A": 1,
            "Not only B but also C": None,
            "B, no doubt": 1,
            "It is without doubt B": 1,
            "Correct answer - B": 1,
            "The most likely answer is option (B): emphysema.": 1,
            "**Answer**: (b)": 1,
            "The finding is $B$, not $A$": 1,
            "A lung mass is excluded; emphysema is seen": 1,
            "emphysema. There is no pleural effusion.": None,
            "E is right": None,
            "(c) pleural effusion": 2,
            "C) and D)": None,
            "I choose option C since D is false": 2,
            "There's neither a lung mass nor emphysema": None,
            "Definitely not B": None,
            "B is ruled out": None,
            "It cannot be B.": None,
            "cannot determine": None,
            "A 3 cm lung mass is seen": 0,
            "A patient with B": None,
            "D, no pleural effusion": 3,
            "No pleural effusion (D)": 3,
            "(D) no pleural effusion": 3,
        },
    ),
    "lobes": (
        LOBES,
        {
            "not the upper lobe": None,
            "It is the lower lobe, not the upper lobe.": 2,
            "not the upper lobe, the lower lobe": 2,
            "The nodule isn't in the upper lobe": None,
            "Neither the upper nor the middle lobe": None,
            "The lower lobe.": 2,
            "the Upper Lobe": 0,
            "upper or middle lobe": None,
            "C. The upper lobe is clear.": 2,
            "It is in the lower lobe; the upper lobe is not involved.": 2,
            "No, it is the lower lobe": 2,
            "C (upper lobe)": None,
            "(C) The upper lobe": None,
            "upper and lower lobe": None,
            "middle/lower lobe": None,
            "The lower lobe, i.e. C": 2,
        },
    ),
    "ten options": (
        TEN,
        {
            "I": 8,
            "Answer: J": 9,
            "(J)": 9,
            "The answer is J.": 9,
            "I think it is J": 9,
            "I see a nodule": 0,
            "I am not sure": None,
            "(I)": 8,
            "I.": 8,
            "The answer is I.": 8,
            "I and J": None,
        },
    ),
    "options that deny": (
        ("present", "absent"),
        {
            "(B) absent": 1,
            "B: absent": 1,
            "absent": 1,
            "It is absent.": 1,
            "present": 0,
            "B": 1,
        },
    ),
    "yes and no": (
        ("Yes", "No"),
        {
            "Yes, there is.": 0,
            "No": 1,
            "No, there is no effusion.": 1,
            "(B) No": 1,
            "No.": 1,
            "B. No": 1,
        },
    ),
    "sides": (
        ("left", "right"),
        {
            "B. Right lung": 1,
            "The right side": 1,
            "right": 1,
            "It's on the left, not on the right": 0,
        },
    ),
    "options with articles": (
        ("A 2 cm mass", "A 5 cm mass"),
        {
            "A 5 cm mass": 1,
            "B. A 5 cm mass": 1,
            "Answer: A 2 cm mass": 0,
        },
    ),
    "another script": (
        ("肺结节", "胸腔积液"),
        {
            "胸腔积液": 1,
            "答案是胸腔积液": 1,
        },
    ),
}


@pytest.mark.parametrize("form", ANSWERS)
def test_an_answer_is_read_rightly_or_not_at_all(form: str) -> None:
    options, answers = ANSWERS[form]
    assert {answer: chosen_option(answer, options) for answer in answers} == answers


def test_the_twenty_sixth_option_has_a_letter() -> None:
    options = [f"finding {number}" for number in range(26)]
    assert chosen_option("The answer is Z.", options) == 25
    assert choice_accuracy(["(Z)", "J"], ["Z", "finding 9"], [options] * 2) == {"accuracy": 1.0, "unreadable": [], "correct": [True, True]}  # fmt: skip


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which? (A) one (B) two, (C) three", ["one", "two", "three"]),
        ("Which? (a) one (b) two", ["one", "two"]),
        ("Which? Choices: A. one B. two", ["one", "two"]),
        ("Which?\na) one\nb) two\nc) three", ["one", "two", "three"]),
        ("In type (B)? (A) one (B) two", ["one", "two"]),
        ("Which? " + " ".join(f"({letter}) o{letter}" for letter in "ABCDEFGHIJKL"), [f"o{x}" for x in "ABCDEFGHIJKL"]),
    ],
)
def test_choices_are_read_from_a_question_in_any_usual_form(question: str, options: list[str]) -> None:
    assert options_of(question) == options


@pytest.mark.parametrize("question", ["Which?", "Which (A)?", "What is seen in (b) and (c)?"])
def test_a_question_without_choices_is_refused(question: str) -> None:
    with pytest.raises(CTInstructError, match="lists no choices"):
        options_of(question)
