"""The names of what a phantom shows."""

from __future__ import annotations

FINDINGS: list[str] = [
    "lung nodule",
    "pleural effusion",
    "consolidation",
    "emphysema",
    "cardiomegaly",
    "arterial wall calcification",
    "pericardial effusion",
    "atelectasis",
    "hiatal hernia",
    "medical material",
    "lymphadenopathy",
    "kidney stone",
    "liver lesion",
]
ORGANS: list[str] = [
    "body",
    "right lung",
    "left lung",
    "trachea",
    "heart",
    "aorta",
    "esophagus",
    "liver",
    "spleen",
    "stomach",
    "right kidney",
    "left kidney",
    "pancreas",
    "spine",
    "ribs",
    "sternum",
    "urinary bladder",
    "subcutaneous fat",
    "muscle",
]
# groups that people ask for
UNIONS: dict[str, tuple[str, ...]] = {
    "lungs": ("right lung", "left lung"),
    "kidneys": ("right kidney", "left kidney"),
    "bones": ("spine", "ribs", "sternum"),
}
SIDED = ("pleural effusion", "consolidation", "atelectasis", "kidney stone", "medical material")  # lie left or right
