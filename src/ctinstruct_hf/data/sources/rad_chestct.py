"""Rad-ChestCT: 84 abnormalities by location, brought to the 16 that the paper scores by a table that can be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import CTInstructError
from ...modeling.configuration_ctinstruct import RAD_CHESTCT_DISEASES
from ..cases import Case, ImageRef, Label
from .common import Problem, read_table

# the paper's name -> Rad-ChestCT's own; any of them counts
MAPPING: dict[str, tuple[str, ...]] = {
    "medical material": (
        "hardware",
        "catheter_or_port",
        "pacemaker_or_defib",
        "clip",
        "stent",
        "staple",
        "suture",
        "chest_tube",
        "tracheal_tube",
        "gi_tube",
        "sternotomy",
        "breast_implant",
        "heart_valve_replacement",
    ),
    "calcification": ("calcification",),
    "cardiomegaly": ("cardiomegaly",),
    "pericardial effusion": ("pericardial_effusion",),
    "hiatal hernia": ("hernia",),
    "lymphadenopathy": ("lymphadenopathy",),
    "emphysema": ("emphysema",),
    "atelectasis": ("atelectasis",),
    "lung nodule": ("nodule", "nodulegr1cm"),
    "lung opacity": ("opacity", "groundglass"),
    "pulmonary fibrotic sequela": ("fibrosis", "scarring"),
    "pleural effusion": ("pleural_effusion",),
    "peribronchial thickening": ("bronchial_wall_thickening",),
    "consolidation": ("consolidation",),
    "bronchiectasis": ("bronchiectasis",),
    "interlobular septal thickening": ("septal_thickening",),
}
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
SPACING_MM = 0.8


def cases(folder: Path, mapping: dict[str, tuple[str, ...]] | None = None) -> Iterator[Case | Problem]:
    """Volumes of the three splits; one patient has one scan."""
    mapping = mapping or MAPPING
    tables = {
        split: folder / f"img{name}_Abnormality_and_Location_Labels.csv"
        for name, split in _SPLITS.items()
        if (folder / f"img{name}_Abnormality_and_Location_Labels.csv").exists()
    }
    if not tables:
        raise CTInstructError(
            f"{folder} has no img*_Abnormality_and_Location_Labels.csv: is this Rad-ChestCT's folder?"
        )
    for split, table in tables.items():
        for row in read_table(table, ("NoteAcc_DEID",)):
            present = {column.partition("*")[0] for column, value in row.items() if "*" in column and value not in ("0", "0.0", "")}  # fmt: skip
            known = {column.partition("*")[0] for column in row if "*" in column}
            labels = []
            for disease in RAD_CHESTCT_DISEASES:
                names = mapping.get(disease, ())
                value = -1 if not known & set(names) else int(bool(present & set(names)))
                labels.append(Label(disease, value))
            name = row["NoteAcc_DEID"].removesuffix(".npz")
            yield Case(
                id=name,
                images=[ImageRef(str(folder / f"{name}.npz"), spacing=[SPACING_MM] * 3)],
                split=split,
                source="rad_chestct",
                patient=name,
                labels=labels,
            )


SOURCES = {"rad_chestct": cases}
