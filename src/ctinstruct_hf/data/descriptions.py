"""A sentence for each category, in our own words: what the text encoder reads in category alignment (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CATEGORY_DESCRIPTIONS: dict[str, str] = {
    "medical material": "Medical material such as a pacemaker, a catheter, clips or wires is visible.",
    "calcification": "Calcium deposits, bright as bone, are visible.",
    "arterial wall calcification": "Calcified plaques line the wall of the aorta or of other arteries.",
    "coronary artery wall calcification": "Calcified plaques line the coronary arteries of the heart.",
    "cardiomegaly": "The heart is enlarged and takes up more than half of the chest's width.",
    "pericardial effusion": "Fluid surrounds the heart inside the pericardial sac.",
    "hiatal hernia": "Part of the stomach has slid through the diaphragm into the chest.",
    "lymphadenopathy": "Lymph nodes of the mediastinum are enlarged beyond one centimetre.",
    "emphysema": "Black holes of destroyed lung tissue, as in emphysema, are seen in the upper lobes.",
    "atelectasis": "A band or segment of the lung is collapsed and airless.",
    "lung nodule": "A small round opacity, a nodule, lies in the lung.",
    "lung opacity": "An area of the lung is denser than normal.",
    "pulmonary fibrotic sequela": "Fibrotic scars and strands remain in the lung after earlier disease.",
    "pleural effusion": "Fluid fills the pleural space at the back of the chest.",
    "mosaic attenuation pattern": "Darker and lighter patches of lung alternate like a mosaic.",
    "peribronchial thickening": "The walls of the bronchi are thickened.",
    "consolidation": "The air spaces of part of a lung are filled, with air bronchograms inside.",
    "bronchiectasis": "Bronchi are widened beyond the artery beside them.",
    "interlobular septal thickening": "Fine lines between the lobules of the lung are thickened.",
    "kidney stone": "A bright stone lies in a kidney.",
    "liver lesion": "A darker round lesion lies in the liver.",
    "COVID-19": "The lungs show ground-glass opacities typical of COVID-19 pneumonia.",
    "common pneumonia": "The lungs show consolidation of a common bacterial or viral pneumonia.",
    "normal": "The scan is normal, without any abnormality.",
    "COVID infection": "Areas of the lungs are infected by COVID-19.",
}


def texts_of(row: dict[str, Any]) -> list[str]:
    """What stage one's grains say of a row: the names of its structures and the sentences of its categories."""
    return [mask["name"] for mask in row["masks"]] + [describe_category(label["name"]) for label in row["labels"]]


def describe_category(name: str) -> str:
    """The sentence of a category; for one that the table lacks, a plain one with its name."""
    return CATEGORY_DESCRIPTIONS.get(name) or f"The CT shows {name.replace('_', ' ')}."


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int = 256) -> tuple[Any, Any]:
    """input_ids and attention_mask int64 [texts, L] for the text encoder, padded on the tokenizer's side."""
    encoded = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=max_length)
    return encoded["input_ids"], encoded["attention_mask"]
