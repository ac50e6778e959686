"""INSPECT: CT of pulmonary arteries with impressions and whether an embolism is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import CTInstructError
from ..cases import Case, ImageRef, Label
from .common import Problem, need, read_table, split_in_name

# columns without and with the ending of those that were read from the impressions
_LABELS = {
    "pulmonary embolism": "pe_positive",
    "acute pulmonary embolism": "pe_acute",
    "subsegmental pulmonary embolism only": "pe_subsegmentalonly",
}
_VALUES = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}


def cases(folder: Path) -> Iterator[Case | Problem]:
    """INSPECT: CTPA with impressions and three labels of embolism; what happened to patients later is left out."""
    base = folder / "full" if (folder / "full").is_dir() else folder
    volumes = need(base / "CTPA")
    studies = _table(base, "study_mapping", ("impression_id", "image_id", "person_id"))
    splits = _table(base, "splits", ("impression_id", "split"))
    impressions = _table(base, "impressions", ("impression_id", "impressions"))
    labels = _table(base, "labels", ("impression_id",))
    for number, study in studies.items():
        name = study["image_id"].removesuffix(".nii.gz")
        if number not in splits:
            yield Problem(name, f"the table of splits has no impression {number}")
            continue
        row = labels.get(number, {})
        given = {label: row.get(f"{column}_nlp", row.get(column, "")) for label, column in _LABELS.items()}
        values = {label: _VALUES.get(value.strip().lower(), -1) for label, value in given.items()}
        text = impressions.get(number, {}).get("impressions", "").strip()
        yield Case(
            id=f"inspect/{name}",
            images=[ImageRef(str(volumes / f"{name}.nii.gz"))],
            split=split_in_name(splits[number]["split"]),
            source="inspect",
            patient=study["person_id"],
            texts={"impression": text} if text else {},
            labels=[Label(label, value) for label, value in values.items()] if max(values.values()) >= 0 else [],
        )


def _table(base: Path, name: str, columns: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Rows of `<name>_<date>.tsv`, or of a CSV file, by their impression; the first of several."""
    files = sorted([*base.glob(f"{name}*.tsv"), *base.glob(f"{name}*.csv")])
    if not files:
        raise CTInstructError(f"{base} has no {name}_….tsv: is this INSPECT's folder?")
    path = files[-1]
    rows: dict[str, dict[str, str]] = {}
    for row in read_table(path, columns, "\t" if path.suffix == ".tsv" else ","):
        rows.setdefault(row["impression_id"], row)
    return rows


SOURCES = {"inspect": cases}
