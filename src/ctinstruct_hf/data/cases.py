"""A case as its data set publishes it: images, texts, labels, masks and questions.

It names its files; voxels are read when a batch is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SPLITS = ("train", "validation", "test")
LAYOUTS = ("", "chwd", "cdhw")
META = ("scanner", "sex", "age", "slice_thickness")  # what scores are grouped by; never a name or a date


@dataclass
class ImageRef:
    """Where an image is, and what its file does not say.

    Attributes:
        path: whatever `read_volume` takes.
        slope, intercept: HU = slope x stored value + intercept, where the file lacks them.
        spacing: mm (depth, height, width), where the file lacks it or has it wrong.
        layout: axes of an array file: "" as `CTVolume.hu`, "chwd" channel, height, width, depth, "cdhw" likewise.
    """

    path: str
    slope: float = 1.0
    intercept: float = 0.0
    spacing: list[float] = field(default_factory=list)
    layout: str = ""


@dataclass
class MaskRef:
    """One structure of an image.

    Attributes:
        name: what it is called in the text.
        path: the label file on the image's grid; "" where the structure is known to be absent.
        values: the labels that belong to it; every label above 0 where empty.
    """

    name: str
    path: str = ""
    values: list[int] = field(default_factory=list)


@dataclass
class Label:
    """One category and whether it is there: 1, 0, or −1 where unknown."""

    name: str
    value: int


@dataclass
class Question:
    """A question of a data set.

    Attributes:
        kind: short, long, side, count, size, multiple_choice, or a task of `tasks.TASKS`.
        choices: of a multiple-choice question whose text does not list them.
        follows: True where it goes on with the conversation of the question before it.
    """

    question: str
    answer: str
    kind: str = "short"
    choices: list[str] = field(default_factory=list)
    follows: bool = False


@dataclass
class Case:
    """One study as its data set publishes it, before it is turned into samples.

    Attributes:
        texts: {report, findings, impression, caption, technique}: those that there are.
        structures: every name that the data set labels in this case; those without a mask in `masks` are absent.
        diseases: names of the diagnosis list, in its order; those of all labels where empty.
        meta: whatever is known of scanner, sex, age, slice thickness; never a name or a date.
    """

    id: str
    images: list[ImageRef]
    split: str
    source: str
    patient: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    labels: list[Label] = field(default_factory=list)
    masks: list[MaskRef] = field(default_factory=list)
    structures: list[str] = field(default_factory=list)
    diseases: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def absent(self) -> list[str]:
        """The structures that the data set labels and this case does not have."""
        there = {mask.name for mask in self.masks}
        return [name for name in self.structures if name not in there]
