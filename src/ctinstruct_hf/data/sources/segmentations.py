"""Segmentation data sets: TotalSegmentator, AbdomenCT-1K, CT-ORG, COVID-19-CT-Seg, and whatever nnU-Net v2 reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import CTInstructError
from ..cases import Case, ImageRef, MaskRef
from ..names import distinct
from .common import Problem, label_values, masks_of, need, nifti_name, niftis, read_json, read_table, split_of

ABDOMEN_1K = {"liver": [1], "kidneys": [2], "spleen": [3], "pancreas": [4]}
CT_ORG = {"liver": [1], "urinary bladder": [2], "lungs": [3], "kidneys": [4], "bones": [5], "brain": [6]}
COVID_19 = {"left lung": [1], "right lung": [2], "COVID infection": [3]}
COVID_19_PICTURES = (1500 / 255, -1250.0)  # slope and intercept of the cases stored 0…255 in window −1250…250 HU


def _case(source: str, name: str, image: ImageRef, masks: list[MaskRef], split: str, structures: list[str]) -> Case:
    return Case(
        id=f"{source}/{name}",
        images=[image],
        split=split,
        source=source,
        patient=name,
        masks=masks,
        structures=structures,
    )


def totalsegmentator(folder: Path) -> Iterator[Case | Problem]:
    """Version 1 or 2: a folder a case, a binary file a class, splits in meta.csv."""
    rows = read_table(folder / "meta.csv", ("image_id", "split"), delimiter=";")
    names = distinct(
        sorted({nifti_name(path) for row in rows for path in niftis(folder / row["image_id"] / "segmentations")})
    )
    for row in rows:
        name = row["image_id"]
        files = list(niftis(folder / name / "segmentations"))
        if not files:
            yield Problem(name, f"{name}/segmentations has no file")
            continue
        masks = [MaskRef(names[nifti_name(path)], str(path)) for path in files]
        split = {"val": "validation"}.get(row["split"], row["split"])
        image = ImageRef(str(folder / name / "ct.nii.gz"))
        case = _case("totalsegmentator", name, image, masks, split, list(names.values()))
        case.meta = {ours: row[theirs] for theirs, ours in (("gender", "sex"), ("age", "age"), ("manufacturer", "scanner")) if row.get(theirs)}  # fmt: skip
        yield case


def abdomen_1k(folder: Path) -> Iterator[Case | Problem]:
    """AbdomenCT-1K: Case_*_0000.nii.gz beside or below the folder, labels in Mask."""
    images = sorted(folder.rglob("Case_*_0000.nii.gz"))
    if not images:
        raise CTInstructError(f"{folder} has no Case_*_0000.nii.gz: is this AbdomenCT-1K's folder?")
    masks = {path.name: path for path in need(folder / "Mask").glob("Case_*.nii.gz")}
    for path in images:
        name = path.name.removesuffix("_0000.nii.gz")
        label = masks.get(f"{name}.nii.gz")
        if label is None:
            yield Problem(name, f"Mask/{name}.nii.gz is missing")
            continue
        structures = list(ABDOMEN_1K)
        yield _case("abdomen_1k", name, ImageRef(str(path)), masks_of(label, ABDOMEN_1K), split_of(name), structures)


def ct_org(folder: Path) -> Iterator[Case | Problem]:
    """CT-ORG: volume-N and labels-N; cases 0 to 20 are the official test set."""
    images = sorted(folder.rglob("volume-*.nii.gz"), key=lambda path: int(nifti_name(path).rpartition("-")[2]))
    if not images:
        raise CTInstructError(f"{folder} has no volume-*.nii.gz: is this CT-ORG's folder?")
    for path in images:
        number = int(nifti_name(path).rpartition("-")[2])
        label = next(iter(folder.rglob(f"labels-{number}.nii.gz")), None)
        if label is None:
            yield Problem(path.name, f"labels-{number}.nii.gz is missing")
            continue
        split = "test" if number <= 20 else split_of(str(number), test=0.0)
        yield _case("ct_org", f"volume-{number}", ImageRef(str(path)), masks_of(label, CT_ORG), split, list(CT_ORG))


def covid_19(folder: Path) -> Iterator[Case | Problem]:
    """COVID-19-CT-Seg, 20 cases: lungs and infection in one label file; the radiopaedia cases are pictures in a window."""
    for path in niftis(need(folder / "COVID-19-CT-Seg_20cases")):
        label = folder / "Lung_and_Infection_Mask" / path.name
        if not label.exists():
            yield Problem(path.name, f"Lung_and_Infection_Mask/{path.name} is missing")
            continue
        slope, intercept = COVID_19_PICTURES if path.name.startswith("radiopaedia") else (1.0, 0.0)
        masks = [*masks_of(label, COVID_19), MaskRef("lungs", str(label), [1, 2, 3])]
        names = [*COVID_19, "lungs"]
        yield _case(
            "covid_19", nifti_name(path), ImageRef(str(path), slope, intercept), masks, split_of(path.name), names
        )


def nnunet(folder: Path) -> Iterator[Case | Problem]:
    """Any data set in nnU-Net v2's layout, or MSD's: imagesTr, labelsTr, dataset.json."""
    description = read_json(folder / "dataset.json")
    labels = description.get("labels")
    if not isinstance(labels, dict):
        raise CTInstructError(f"{folder / 'dataset.json'} has no labels.")
    names = label_values(labels)
    ours = distinct(names)
    names = {ours[name]: ids for name, ids in names.items()}
    source = str(description.get("name") or folder.name).lower().replace(" ", "_")
    modern = not any(isinstance(value, str) for value in labels.values())
    for label in niftis(need(folder / "labelsTr")):
        if label.name.startswith("."):
            continue
        name = nifti_name(label)
        suffix = label.name.removeprefix(name)
        image = folder / "imagesTr" / (f"{name}_0000{suffix}" if modern else label.name)
        if not image.exists():
            yield Problem(name, f"imagesTr/{image.name} is missing")
            continue
        yield _case(source, name, ImageRef(str(image)), masks_of(label, names), split_of(name), list(names))


SOURCES = {
    "totalsegmentator": totalsegmentator,
    "abdomen_1k": abdomen_1k,
    "ct_org": ct_org,
    "covid_19": covid_19,
    "nnunet": nnunet,
}
