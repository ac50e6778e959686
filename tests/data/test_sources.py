"""Every public data set on a small folder of exactly its layout, with one broken case each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from datasets_on_disk import nifti, table, totalsegmentator
from PIL import Image

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.data.prepare import prepare
from ctinstruct_hf.data.prepared import iterate
from ctinstruct_hf.data.reading import open_mask, open_volume
from ctinstruct_hf.data.samples import from_row, text_of
from ctinstruct_hf.data.sources import SOURCES
from ctinstruct_hf.modeling.configuration_ctinstruct import CT_RATE_DISEASES, RAD_CHESTCT_DISEASES


def prepared(source: str, folder: Path, tmp_path: Path) -> tuple[list[Any], list[Any], list[dict[str, str]]]:
    """(alignment samples, instruction samples, problems) of a prepared folder."""
    target = tmp_path / "prepared"
    told = prepare(source, folder, target, workers=1)
    rows = [(kind, from_row(row, kind)) for kind, _, _, row in iterate(target)]
    problems = [json.loads(line) for line in (target / "problems.jsonl").read_text().splitlines()]
    assert told["problems"] == len(problems)
    return (
        [one for kind, one in rows if kind == "alignment"],
        [one for kind, one in rows if kind == "instructions"],
        problems,
    )


def ct_rate(folder: Path) -> None:
    base = folder / "dataset"
    names = {"train": ["train_1_a_1", "train_2_a_1", "train_3_a_1"], "valid": ["valid_1_a_1"]}
    for split, long in (("train", "train"), ("valid", "validation")):
        files = [f"{name}.nii.gz" for name in names[split]]
        for name in names[split]:
            patient, scan = "_".join(name.split("_")[:2]), name.rpartition("_")[0]
            if name != "train_3_a_1":  # was not downloaded
                nifti(base / split / patient / scan / f"{name}.nii.gz", stored=24)
        table(base / "metadata" / f"{long}_metadata.csv", [
            {"VolumeName": file, "RescaleSlope": 1, "RescaleIntercept": -1024, "XYSpacing": "[0.7, 0.7]", "ZSpacing": 1.5,
             "PatientSex": "F", "PatientAge": "060Y", "Manufacturer": "X"} for file in files
        ])  # fmt: skip
        table(base / "radiology_text_reports" / f"{long}_reports.csv", [
            {"VolumeName": file, "ClinicalInformation_EN": "", "Technique_EN": "Not given.",
             "Findings_EN": "No nodule, no effusion.", "Impressions_EN": "Normal."} for file in files
        ])  # fmt: skip
        table(base / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", [
            {"VolumeName": file, **{name.capitalize(): int(name == "emphysema") for name in CT_RATE_DISEASES}} for file in files
        ])  # fmt: skip
    turns = [
        {"from": "human", "value": "<image>\nWhat is seen?<long_answer>", "type": "conversation"},
        {"from": "gpt", "value": "Emphysema."},
        {"from": "human", "value": "Where?<short_answer>", "type": "x"},
        {"from": "gpt", "value": "Above."},
    ]
    choice = [
        {
            "from": "human",
            "value": "<image>\nWhich? (a) nodule (b) emphysema<multiple_choice>",
            "type": "multiple_choice",
        },
        {"from": "gpt", "value": "(b) emphysema"},
    ]
    (base / "vqa").mkdir()
    (base / "vqa" / "train_vqa.json").write_text(json.dumps([
        {"id": "1", "image": "train_1_a_1.nii.gz", "conversations": turns},
        {"id": "2", "image": "train_1_a_1.nii.gz", "conversations": choice},
    ]))  # fmt: skip


def test_ct_rate(tmp_path: Path) -> None:
    ct_rate(tmp_path / "raw")
    alignment, instructions, problems = prepared("ct_rate", tmp_path / "raw", tmp_path)
    assert [sample.id for sample in alignment] == ["train_1_a_1", "train_2_a_1", "valid_1_a_1"]
    assert [problem["id"] for problem in problems] == ["train_3_a_1"]
    first = alignment[0]
    volume = open_volume(first.image)
    assert np.unique(volume.hu).tolist() == [-1000]  # 1 x 24 - 1024: applied once
    assert volume.spacing == pytest.approx((1.5, 0.7, 0.7), abs=1e-6)
    assert first.patient == "train_1"
    assert first.texts[0] == "Findings: No nodule, no effusion. Impression: Normal."
    assert [label.name for label in first.labels if label.value] == ["emphysema"]
    assert {sample.split for sample in alignment} == {"train", "validation"}
    tasks = {sample.task for sample in instructions}
    assert tasks == {"report", "caption", "diagnosis", "question", "multiple_choice"}
    talk = next(one for one in instructions if "What is seen?" in one.messages[0]["content"][-1]["text"])
    assert [turn["role"] for turn in talk.messages] == ["user", "assistant", "user", "assistant"]
    assert not any("<" in text_of(one.messages[0]) for one in instructions)


def ct_rate_volume(path: Path, stored: int, scale: tuple[float, float] | None, spacing: tuple[float, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.full((12, 10, 4), stored, np.int16), np.diag([*spacing, 1.0]))
    if scale is not None:
        image.header.set_slope_inter(*scale)
    nib.save(image, path)


@pytest.mark.parametrize(("folder", "scale", "stored", "spacing"), [
    ("train", None, 24, (1.0, 1.0, 1.0)),  # as first released: slope, intercept and spacing in the metadata only
    ("train", (1, -1024), 24, (1.0, 1.0, 1.0)),
    ("train", (2, -1024), 12, (1.0, 1.0, 1.0)),
    ("train_fixed", (1, -1024), 24, (0.7, 0.7, 1.5)),
    ("train_fixed", None, -1000, (0.7, 0.7, 1.5)),  # in HU, which needs no slope
])  # fmt: skip
@pytest.mark.parametrize("above", [False, True])
def test_ct_rate_is_in_hu_in_either_release(
    tmp_path: Path, folder: str, scale: tuple[float, float] | None, stored: int, spacing: tuple[float, ...], above: bool
) -> None:
    raw = tmp_path / "raw"
    ct_rate(raw)
    for left in ("train", "valid"):
        shutil.rmtree(raw / "dataset" / left)
    ct_rate_volume(raw / "dataset" / folder / "train_1/train_1_a/train_1_a_1.nii.gz", stored, scale, spacing)
    if above:
        for name in ("metadata", "radiology_text_reports", "multi_abnormality_labels", "vqa"):
            shutil.move(raw / "dataset" / name, raw / name)
    alignment, instructions, problems = prepared("ct_rate", raw, tmp_path)
    (sample,) = alignment
    volume = open_volume(sample.image)
    assert np.unique(volume.hu).tolist() == [-1000]
    assert volume.spacing == pytest.approx((1.5, 0.7, 0.7), abs=1e-6)
    assert {one.task for one in instructions} >= {"report", "diagnosis", "question", "multiple_choice"}
    assert {problem["id"] for problem in problems} == {"train_2_a_1", "train_3_a_1", "valid_1_a_1"}


def test_of_two_releases_of_a_volume_the_second_is_taken(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    ct_rate(raw)
    ct_rate_volume(raw / "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz", -1000, None, (0.7, 0.7, 1.5))
    alignment, _, problems = prepared("ct_rate", raw, tmp_path)
    assert {sample.id: "fixed" in sample.image.path for sample in alignment} == {
        "train_1_a_1": True, "train_2_a_1": False, "valid_1_a_1": False
    }  # fmt: skip
    assert [problem["id"] for problem in problems] == ["train_3_a_1"]


@pytest.mark.parametrize(("source", "ids"), [
    ("ct_rate", ["train_1_a_1", "train_1_b_2", "train_2_a_1", "valid_1_a_1"]),
    ("ct_rate_all", ["train_1_a_1", "train_1_a_2", "train_1_b_2", "train_2_a_1", "valid_1_a_1"]),
])  # fmt: skip
def test_one_reconstruction_of_each_scan_that_is_there_or_all(tmp_path: Path, source: str, ids: list[str]) -> None:
    raw = tmp_path / "raw"
    ct_rate(raw)
    base = raw / "dataset"
    more = ["train_1_a_2", "train_1_b_1", "train_1_b_2"]
    for name in (more[0], more[2]):  # the first of train_1_b was not downloaded
        nifti(base / "train" / "train_1" / name.rpartition("_")[0] / f"{name}.nii.gz", stored=24)
    for path, names in (
        (base / "metadata" / "train_metadata.csv", more),
        (base / "radiology_text_reports" / "train_reports.csv", ["train_1_b_1"]),
        (base / "multi_abnormality_labels" / "train_predicted_labels.csv", ["train_1_b_1"]),
    ):
        head, row, *rest = path.read_text().splitlines()
        path.write_text("\n".join([head, row, *(row.replace("train_1_a_1", name) for name in names), *rest]))
    alignment, instructions, problems = prepared(source, raw, tmp_path)
    assert sorted(sample.id for sample in alignment) == ids
    assert {sample.source for sample in alignment} == {"ct_rate"}
    assert {problem["id"] for problem in problems} == {"train_3_a_1"} | ({"train_1_b_1"} if "all" in source else set())
    for sample in alignment:  # reports and labels are of the scan, also where another reconstruction's row has them
        assert (len(sample.texts), len(sample.labels)) == (3, 18)
    talks = [one for one in instructions if "What is seen?" in text_of(one.messages[0])]
    assert [one.id.partition("/")[0] for one in talks] == [name for name in ids if name.startswith("train_1_a")]


def test_rad_chestct(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for split, name in (("train", "trn00001"), ("valid", "val00001"), ("test", "tst00001")):
        columns = {"nodule*left_upper": 0, "nodulegr1cm*left_upper": 1, "septal_thickening*left": 0, "clip*x": 0}
        rows = [{"NoteAcc_DEID": name, **columns}]
        if split == "train":
            rows.append({**rows[0], "NoteAcc_DEID": "trn00002"})  # no file
        table(raw / f"img{split}_Abnormality_and_Location_Labels.csv", rows)
        np.savez(raw / f"{name}.npz", ct=np.zeros((4, 10, 12), np.int16))
    alignment, instructions, problems = prepared("rad_chestct", raw, tmp_path)
    assert {sample.split for sample in alignment} == {"train", "validation", "test"}
    assert [problem["id"] for problem in problems] == ["trn00002"]
    values = {label.name: label.value for label in alignment[0].labels}
    assert list(values) == RAD_CHESTCT_DISEASES
    assert (values["lung nodule"], values["interlobular septal thickening"], values["emphysema"]) == (1, 0, -1)
    assert open_volume(alignment[0].image).spacing == pytest.approx((0.8, 0.8, 0.8))
    assert instructions[0].task == "diagnosis"


def test_rp3d_and_m3d(tmp_path: Path) -> None:
    raw = tmp_path / "rp3d"
    raw.mkdir()
    ramp = np.linspace(0, 1, 3 * 10 * 12 * 4, dtype=np.float32).reshape(3, 10, 12, 4)
    np.save(raw / "a.npy", ramp)
    table(raw / "radiology_train.csv", [
        {"image_path": "a.npy", "question": "What?", "answer": "A cyst."},
        {"image_path": "['a.npy', 'a.npy']", "question": "Both?", "answer": "Yes."},
        {"image_path": "lost.npy", "question": "What?", "answer": "Nothing."},
        {"image_path": "a.npy", "question": "", "answer": "Nothing."},
    ])  # fmt: skip
    _, instructions, problems = prepared("rp3d_vqa", raw, tmp_path / "1")
    assert [len(sample.images) for sample in instructions] == [1, 2]
    assert len(problems) == 2
    volume = open_volume(instructions[0].images[0])
    assert volume.shape == (4, 10, 12)
    assert (volume.hu.min(), volume.hu[0, 0, 0]) == (-1000, -1000)
    np.save(raw / "b.npy", ramp[..., :1])
    (raw / "captions.json").write_text(
        json.dumps([{"npy_path": ["a.npy", "b.npy"], "finding": "A cyst.", "impression": "Benign."}])
    )
    (raw / "radiology_train.csv").unlink()
    alignment, instructions, _ = prepared("rp3d_cap", raw, tmp_path / "2")
    assert [(Path(sample.image.path).name, sample.texts) for sample in alignment] == [
        ("a.npy", ["A cyst.", "Benign."]), ("b.npy", ["A cyst.", "Benign."])
    ]  # fmt: skip
    assert len({sample.id for sample in alignment}) == 2
    assert all(len(sample.images) == 2 for sample in instructions)
    assert {sample.task for sample in instructions} == {"report", "caption"}

    m3d = tmp_path / "m3d"
    m3d.mkdir()
    np.save(m3d / "v.npy", np.full((1, 4, 10, 12), 0.5, np.float32))
    (m3d / "t.txt").write_text("A short text.")
    rows = [{"image": "v.npy", "text": "t.txt"}, {"image": "v.npy", "text": "lost.txt"}]
    (m3d / "M3D_Cap.json").write_text(json.dumps({"train": rows[:1], "test": rows[1:]}))
    alignment, _, problems = prepared("m3d_cap", m3d, tmp_path / "3")
    assert (alignment[0].texts, len(problems)) == (["A short text."], 1)
    assert np.unique(open_volume(alignment[0].image).hu).tolist() == [0]
    (m3d / "M3D_Cap.json").unlink()
    choices = {f"Choice {letter}": word for letter, word in zip("ABCD", ("liver", "lung", "bone", "skin"), strict=True)}
    row = {"Image Path": "v.npy", "Question": "Which organ?", **choices, "Answer": "Lung", "Answer Choice": "B", "Question Type": "3"}  # fmt: skip
    table(m3d / "M3D_VQA_test.csv", [row, {**row, "Answer Choice": "E"}])
    _, instructions, problems = prepared("m3d_vqa", m3d, tmp_path / "4")
    assert [sample.answers for sample in instructions] == [["lung (B)"], ["Lung"]]
    assert (instructions[0].split, len(problems)) == ("test", 1)


@pytest.mark.parametrize(("below", "ending"), [("full", "_nlp"), ("", "")])
def test_inspect(tmp_path: Path, below: str, ending: str) -> None:
    base = tmp_path / "raw" / below
    for name in ("PE1", "PE2"):
        nifti(base / "CTPA" / f"{name}.nii.gz")
    ids = [1, 2, 3, 4]
    table(base / "study_mapping_20250611.tsv", [
        {"impression_id": id, "image_id": f"PE{id}", "person_id": 70 + id, "procedure_DATETIME": "2015-03-01"} for id in [*ids, 1]
    ], "\t")  # fmt: skip
    table(base / "splits_20250611.tsv", [{"impression_id": id, "split": ("train", "valid", "test")[id - 1]} for id in ids[:3]], "\t")  # fmt: skip
    table(base / "impressions_20250611.tsv", [{"impression_id": id, "impressions": "No embolism."} for id in ids], "\t")
    table(base / "labels_20250611.tsv", [
        {"impression_id": id, f"pe_positive{ending}": "True", f"pe_acute{ending}": "False", f"pe_subsegmentalonly{ending}": "",
         "12_month_mortality": "Censored"} for id in ids
    ], "\t")  # fmt: skip
    alignment, instructions, problems = prepared("inspect", tmp_path / "raw", tmp_path)
    assert [(sample.id, sample.split, sample.patient) for sample in alignment] == [
        ("inspect/PE1", "train", "71"), ("inspect/PE2", "validation", "72")
    ]  # fmt: skip
    assert [(label.name, label.value) for label in alignment[0].labels] == [
        ("pulmonary embolism", 1), ("acute pulmonary embolism", 0), ("subsegmental pulmonary embolism only", -1)
    ]  # fmt: skip
    assert alignment[0].texts == ["No embolism."]
    assert "diagnosis" in {sample.task for sample in instructions}
    assert {problem["id"] for problem in problems} == {"inspect/PE3", "PE4"}
    assert "2015" not in json.dumps([*problems, *map(str, alignment), *map(str, instructions)])


def test_totalsegmentator(tmp_path: Path) -> None:
    totalsegmentator(tmp_path / "raw")
    alignment, instructions, problems = prepared("totalsegmentator", tmp_path / "raw", tmp_path)
    assert [sample.split for sample in alignment] == ["train", "validation"]
    assert [problem["id"] for problem in problems] == ["s0003"]
    assert {mask.name: bool(mask.path) for mask in alignment[1].masks} == {"liver": True, "left kidney": False}
    empty = [sample for sample in instructions if sample.masks and not sample.masks[0].path]
    assert [sample.masks[0].name for sample in empty] == ["left kidney"]


def abdomen_1k(raw: Path) -> str:
    for name in ("Case_00001", "Case_00002"):
        nifti(raw / f"{name}_0000.nii.gz")
    nifti(raw / "Mask" / "Case_00001.nii.gz", (1, 2, 3))
    return "Case_00002"


def ct_org(raw: Path) -> str:
    for number in (3, 30):
        nifti(raw / f"volume-{number}.nii.gz")
    nifti(raw / "labels-3.nii.gz", (1, 3, 5))
    return "volume-30.nii.gz"


def covid_19(raw: Path) -> str:
    for name in ("coronacases_001", "radiopaedia_4_1"):
        nifti(raw / "COVID-19-CT-Seg_20cases" / f"{name}.nii.gz", stored=0 if name[0] == "r" else -500)
    nifti(raw / "Lung_and_Infection_Mask" / "radiopaedia_4_1.nii.gz", (1, 2, 3))
    return "coronacases_001.nii.gz"


def nnunet(raw: Path) -> str:
    raw.mkdir()
    (raw / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "portal_vein": 1, "all": [1, 2]}, "name": "Some"})
    )
    for name in ("a", "b"):
        nifti(raw / "labelsTr" / f"{name}.nii.gz", (1, 2))
    nifti(raw / "imagesTr" / "a_0000.nii.gz")
    return "b"


@pytest.mark.parametrize(("make", "names"), [
    (abdomen_1k, {"liver", "kidneys", "spleen"}),
    (ct_org, {"liver", "lungs", "bones"}),
    (covid_19, {"left lung", "right lung", "COVID infection", "lungs"}),
    (nnunet, {"portal vein", "all"}),
])  # fmt: skip
def test_label_files(tmp_path: Path, make: Callable[[Path], str], names: set[str]) -> None:
    raw = tmp_path / "raw"
    broken = make(raw)
    alignment, instructions, problems = prepared(make.__name__, raw, tmp_path)
    assert [problem["id"] for problem in problems] == [broken]
    (sample,) = alignment
    assert {mask.name for mask in sample.masks if mask.path} == names
    volume = open_volume(sample.image)
    sizes = {mask.name: int(open_mask(mask, volume).sum()) for mask in sample.masks}
    assert all((size > 0) == (name in names) for name, size in sizes.items())
    assert all(one.answers[0].count("<SEG>") == len(one.masks) for one in instructions)
    if make is ct_org:
        assert sample.split == "test"
    if make is covid_19:
        assert np.unique(volume.hu).tolist() == [-1250 if volume.hu.min() < -1024 else -1024]


def test_msd_has_its_labels_the_other_way_round(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "tumour"}}))
    nifti(raw / "labelsTr" / "x.nii.gz", (1,))
    nifti(raw / "imagesTr" / "x.nii.gz")
    alignment, _, _ = prepared("nnunet", raw, tmp_path)
    assert {mask.name: bool(mask.path) for mask in alignment[0].masks} == {"liver": True, "tumour": False}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 50), 128, np.uint8)).save(path)


def test_pictures(tmp_path: Path) -> None:
    for folder, name in (("CT_COVID", "1.png"), ("CT_NonCOVID", "2.jpg")):
        picture(tmp_path / "ucsd" / folder / name)
    (tmp_path / "ucsd" / "CT_COVID" / "broken.png").write_bytes(b"no picture")
    alignment, _, problems = prepared("ucsd_ai4h", tmp_path / "ucsd", tmp_path / "1")
    assert [label.value for sample in alignment for label in sample.labels] == [1, 0]
    assert "broken.png is no readable picture" in problems[0]["reason"]
    for folder in ("COVID", "non-COVID"):
        picture(tmp_path / "sars" / folder / "1.png")
    (tmp_path / "sars" / "COVID" / "2.png").write_bytes(b"")
    alignment, _, problems = prepared("sars_cov_2", tmp_path / "sars", tmp_path / "2")
    assert (len(alignment), len(problems)) == (2, 1)
    for folder in ("CP/1/2", "NCP/3/4", "Normal/5/6"):
        for name in ("0001.png", "0002.png"):
            picture(tmp_path / "ccii" / folder / name)
    (tmp_path / "ccii" / "CP/1/2/0003.png").write_bytes(b"cut short")
    alignment, _, problems = prepared("cc_ccii", tmp_path / "ccii", tmp_path / "3")
    assert [problem["id"] for problem in problems] == ["cc_ccii/CP/1/2/0003.png"]
    by_patient = {sample.patient: sample.split for sample in alignment}
    assert len(by_patient) == 3
    assert all(by_patient[sample.patient] == sample.split for sample in alignment)
    assert [label.value for label in alignment[0].labels] == [1, 0, 0]
    for name in ("CT/abd/adrenal/a.png", "CT/abd/normal/b.png"):
        picture(tmp_path / "rin" / name)
    table(tmp_path / "rin" / "train.csv", [
        {"filename": f"radiology_ai/{name}", "label": label}
        for name, label in (("CT/abd/adrenal/a.png", "adrenal"), ("CT/abd/normal/b.png", "normal"), ("CT/abd/x/lost.png", "x"))
    ])  # fmt: skip
    alignment, _, problems = prepared("radimagenet", tmp_path / "rin", tmp_path / "4")
    assert ({label.name: label.value for label in alignment[0].labels}["adrenal of the abd"], len(problems)) == (1, 1)


def test_the_releases_own_files(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    nifti(raw / "a.nii.gz")
    nifti(raw / "m.nii.gz", (1, 2))

    def entry(text: str, answer: str, **more: Any) -> dict[str, Any]:
        question = [{"type": "image"}, {"type": "text", "text": text}]
        return {"question": question, "image_path": ["a.nii.gz"], "answer": answer, **more}

    (raw / "sft_train.json").write_text(json.dumps([
        entry("<segmentation>Where is the liver?", "Sure, it is <SEG>.", mask_path=["m.nii.gz"], choose_labels=[[1, 2]]),
        entry("<diagnosis>How likely?", ", ".join(["x <disease_confidence>"] * 16), targets=[1] + [0] * 15),
        entry("<report_generation>Write a report.", "Nothing."),
        entry("How likely?", "x <disease_confidence>", targets=[1, 0]),
    ]))  # fmt: skip
    _, instructions, problems = prepared("released", raw, tmp_path)
    assert [sample.task for sample in instructions] == ["segmentation", "diagnosis", "report"]
    assert instructions[0].masks[0].values == [1, 2]
    assert [label.name for label in instructions[1].labels] == RAD_CHESTCT_DISEASES
    assert instructions[2].messages[0]["content"][-1]["text"] == "Write a report."
    assert "targets" in problems[0]["reason"]


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_a_folder_of_another_layout_is_told_in_one_sentence(tmp_path: Path, source: str) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(CTInstructError) as told:
        prepare(source, tmp_path / "raw", tmp_path / "out", workers=1)
    assert "raw" in str(told.value) or "no " in str(told.value)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    ct_rate(tmp_path)
    path = tmp_path / "dataset" / "metadata" / "train_metadata.csv"
    path.write_text(path.read_text().replace("RescaleSlope", "Slope"))
    with pytest.raises(CTInstructError, match=r"train_metadata\.csv has no column RescaleSlope"):
        prepare("ct_rate", tmp_path, tmp_path / "out", workers=1)
