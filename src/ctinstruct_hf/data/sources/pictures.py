"""2D sets of stage one: folders of PNG and JPEG whose names are the labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import CTInstructError
from ..cases import Case, ImageRef, Label
from .common import Problem, need, read_table, split_of

SUFFIXES = (".png", ".jpg", ".jpeg")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _cases(
    source: str, folder: Path, groups: dict[str, list[Label]], patient_depth: int = 0
) -> Iterator[Case | Problem]:
    """A case a picture; `patient_depth` folders below the group's name the patient."""
    for group, labels in groups.items():
        pictures = _files(need(folder / group))
        if not pictures:
            raise CTInstructError(f"{folder / group} has no PNG or JPEG file.")
        for path in pictures:
            place = path.relative_to(folder / group)
            patient = f"{group}-{place.parts[0]}" if patient_depth else f"{group}-{path.stem}"
            yield Case(
                id=f"{source}/{path.relative_to(folder)}",
                images=[ImageRef(str(path))],
                split=split_of(patient),
                source=source,
                patient=patient,
                labels=list(labels),
            )


def ucsd_ai4h(folder: Path) -> Iterator[Case | Problem]:
    """UCSD-AI4H COVID-CT."""
    groups = {"CT_COVID": [Label("COVID-19", 1)], "CT_NonCOVID": [Label("COVID-19", 0)]}
    yield from _cases("ucsd_ai4h", folder, groups)


def sars_cov_2(folder: Path) -> Iterator[Case | Problem]:
    """SARS-CoV-2 CT-scan dataset."""
    yield from _cases("sars_cov_2", folder, {"COVID": [Label("COVID-19", 1)], "non-COVID": [Label("COVID-19", 0)]})


def cc_ccii(folder: Path) -> Iterator[Case | Problem]:
    """CC-CCII: class, patient, scan, slices."""
    names = {"CP": "common pneumonia", "NCP": "COVID-19", "Normal": "normal"}
    groups = {
        group: [Label(name, int(name == right)) for name in names.values()]
        for group, right in names.items()
        if (folder / group).is_dir()
    }
    if not groups:
        need(folder / "NCP")
    yield from _cases("cc_ccii", folder, groups, patient_depth=1)


def radimagenet(folder: Path) -> Iterator[Case | Problem]:
    """RadImageNet's CT part: the folders name anatomy and disease; a CSV of filename and label says which are used."""
    tables = sorted(folder.glob("*.csv"))
    if not tables:
        raise CTInstructError(f"{folder} has no .csv file with filename and label.")
    rows = [row for table in tables for row in read_table(table, ("filename", "label"))]
    by_anatomy: dict[str, set[str]] = {}
    for row in rows:
        parts = Path(row["filename"]).parts
        if "CT" in parts:
            by_anatomy.setdefault(parts[parts.index("CT") + 1], set()).add(row["label"])
    for row in rows:
        parts = Path(row["filename"]).parts
        if "CT" not in parts:
            continue
        anatomy = parts[parts.index("CT") + 1]
        path = folder / Path(*parts[parts.index("CT") :])
        if not path.exists():
            yield Problem(row["filename"], f"{row['filename']} is missing")
            continue
        labels = [
            Label(f"{name} of the {anatomy}".replace("_", " "), int(name == row["label"]))
            for name in sorted(by_anatomy[anatomy])
        ]
        patient = path.stem
        yield Case(f"radimagenet/{row['filename']}", [ImageRef(str(path))], split_of(patient), "radimagenet", patient, labels=labels)  # fmt: skip


SOURCES = {"ucsd_ai4h": ucsd_ai4h, "sars_cov_2": sars_cov_2, "cc_ccii": cc_ccii, "radimagenet": radimagenet}
