"""Phrasings of the paper's six kinds of instructions (section 3.3), drawn by seed; the paper's own examples among them."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

SEG_TOKEN = "<SEG>"
DISEASE_TOKEN = "<disease_confidence>"

REPORT = (
    "Please generate a report.",
    "Write a radiology report for this scan.",
    "Describe the findings of this CT.",
    "Generate the radiology report.",
    "What does this CT show? Write a full report.",
    "Report this study.",
)
CAPTION = (
    "Describe this image in a sentence.",
    "Give a short caption for this scan.",
    "Summarise this scan briefly.",
    "What is the main finding?",
    "Caption this image.",
)
SEGMENT = (
    "Where is the {name}?",
    "Please segment the {name}.",
    "Segment the {name} in this scan.",
    "Show me the {name}.",
    "Can you outline the {name}?",
    "Mark the {name}.",
)
SEGMENT_ANSWER = ("Sure, it is {token}.",)
SEGMENT_MANY = ("Please segment the {names}.", "Segment the {names} in this scan.", "Where are the {names}?")
DIAGNOSE = (
    "Give probabilistic predictions for the presence of {names}.",
    "Estimate the probability of the presence of {names}.",
    "How likely is the presence of {names}?",
    "Predict the presence of {names}.",
    "What is the probability of {names}?",
    "Give the confidence that this scan shows {names}.",
)
CHOOSE = (
    "{question} {choices}",
    "{question} Choose one: {choices}",
    "{question} Answer with one option. {choices}",
    "{question} Options: {choices}",
    "Choose the right option. {question} {choices}",
    "{question} Pick one of these: {choices}",
)
WHICH = ("Which of these findings is present?", "Which of these findings is absent?")
WHICH_ALL = ("Which of these findings are present?", "Which of these findings are absent?")  # none, one or several
LETTERS = string.ascii_uppercase
UNCOUNTED = (
    "emphysema",
    "cardiomegaly",
    "consolidation",
    "atelectasis",
    "lymphadenopathy",
    "medical material",
    "arterial wall calcification",
)
PRESENCE = (
    "Is there {article}?",
    "Is {article} present?",
    "Does this scan show {article}?",
    "Do you see {article}?",
    "Can {article} be seen?",
    "Is there any sign of {article}?",
)
PRESENT_ANSWER = ("Yes, {article} is seen.", "Yes, there is {article}.")
ABSENT_ANSWER = ("No, no {name} is seen.", "No, there is no {name}.")

# the examples printed in section 3.3
PAPER_EXAMPLES = (
    ("Please generate a report.", "Findings: Minimal pleural effusion ..."),
    ("Where is the COVID infection?", f"Sure, it is {SEG_TOKEN}."),
    (
        "Give probabilistic predictions for the presence of calcification and bronchiectasis.",
        f"calcification {DISEASE_TOKEN}, bronchiectasis {DISEASE_TOKEN}",
    ),
)


def draw(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of several phrasings."""
    return options[int(rng.integers(len(options)))]


def join_names(names: Sequence[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def with_article(name: str) -> str:
    """ "a pleural effusion", "an …"; `UNCOUNTED` names go without."""
    if name.partition(" on the ")[0] in UNCOUNTED:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def ask_segmentation(names: Sequence[str], rng: np.random.Generator | None = None) -> str:
    """A request for masks; the paper's phrasing without a generator."""
    options = SEGMENT if len(names) == 1 else SEGMENT_MANY
    phrase = options[0] if rng is None else draw(rng, options)
    return phrase.format(name=names[0], names=join_names(names))


def answer_segmentation(names: Sequence[str], named: bool = False) -> str:
    """The answer with a `<SEG>` per name, in their order; the paper's phrasing for one name does not repeat it, `named`
    does."""
    if len(names) == 1 and not named:
        return SEGMENT_ANSWER[0].format(token=SEG_TOKEN)
    return "Sure, " + ", ".join(f"{name} {SEG_TOKEN}" for name in names) + "."


def ask_diagnosis(diseases: Sequence[str], rng: np.random.Generator | None = None) -> str:
    """A request for probabilities; the paper's phrasing without a generator."""
    phrase = DIAGNOSE[0] if rng is None else draw(rng, DIAGNOSE)
    return phrase.format(names=join_names(diseases))


def answer_diagnosis(diseases: Sequence[str]) -> str:
    """The answer with a `<disease_confidence>` per disease, in their order."""
    return ", ".join(f"{disease} {DISEASE_TOKEN}" for disease in diseases)


def ask_presence(article: str, name: str, present: bool, rng: np.random.Generator) -> tuple[str, str]:
    """A finding-related question and its answer, also where the finding is absent."""
    answer = draw(rng, PRESENT_ANSWER if present else ABSENT_ANSWER)
    return draw(rng, PRESENCE).format(article=article), answer.format(article=article, name=name)


def ask_choice(question: str, choices: Sequence[str], rng: np.random.Generator | None = None) -> str:
    """A question with lettered choices."""
    phrase = CHOOSE[0] if rng is None else draw(rng, CHOOSE)
    lettered = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return phrase.format(question=question, choices=lettered)


def answer_choice(choices: Sequence[str], right: str) -> str:
    """ "pleural effusion (B)". The name comes first: a model that has named what it sees finds the letter before that name
    among the choices, but a letter can only be said first by one that has weighed all choices already."""
    return f"{right} ({LETTERS[list(choices).index(right)]})"


def weigh_choices(choices: Sequence[str], there: Sequence[bool], right: Sequence[str]) -> str:
    """ "(A) pleural effusion? No. (B) atelectasis? Yes (B). Answer: (B) atelectasis": of findings, each is looked for before
    any is chosen, of which there may be several or "none". A small language model that has to choose with its first word
    has to look for all at once; and a letter beside each "Yes" or "No" that is asked for is all that is left to read off in
    the end."""
    weighed, chosen = [], []
    for letter, name, seen in zip(LETTERS, choices, there, strict=False):
        mark = f" ({letter})" if name in right else ""
        weighed.append(f"({letter}) {name}? {'Yes' if seen else 'No'}{mark}.")
        if mark:
            chosen.append(f"({letter}) {name}")
    return f"{' '.join(weighed)} Answer: {', '.join(chosen) or 'none'}"
