"""Data of one's own, as people have it: tables, conversations as other trainers take them, folders of scans and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
from datasets import Dataset, DatasetDict
from datasets_on_disk import nifti, nnunet, table
from PIL import Image
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app
from ctinstruct_hf.data.importing import import_own
from ctinstruct_hf.data.prepared import export_jsonl, iterate
from ctinstruct_hf.data.reading import open_mask, open_volume
from ctinstruct_hf.data.samples import AlignmentSample, InstructionSample, from_row, text_of
from ctinstruct_hf.data.sources.own_folder import scans_with_masks


def imported(
    path: Path, target: Path, **more: Any
) -> tuple[list[AlignmentSample], list[InstructionSample], dict[str, Any]]:
    summary = import_own(path, target, **more)
    rows: list[Any] = [from_row(row, kind) for kind, _, _, row in iterate(target)]
    alignment = [row for row in rows if isinstance(row, AlignmentSample)]
    return alignment, [row for row in rows if isinstance(row, InstructionSample)], summary


def reasons(target: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (target / "problems.jsonl").read_text().splitlines()]


ROWS = [
    {"path": "scans/a.nii.gz", "report": "No effusion.", "patient": "p1", "Pleural_Effusion": 0, "gout": 1, "comment": "old"},
    {"path": "scans/b.nii.gz", "report": "Effusion, and gout.", "patient": "p2", "Pleural_Effusion": "", "gout": "1.0", "comment": ""},
    {"path": "scans/lost.nii.gz", "report": "Gone.", "patient": "p3", "Pleural_Effusion": 1, "gout": -1, "comment": ""},
]  # fmt: skip


@pytest.mark.parametrize("form", ["csv", "tsv", "semicolons.csv", "jsonl", "json", "parquet"])
def test_a_table_of_paths_reports_and_labels(tmp_path: Path, form: str) -> None:
    for name in ("a", "b"):
        nifti(tmp_path / "scans" / f"{name}.nii.gz")
    path = tmp_path / f"mine.{form}"
    if form.endswith(("csv", "tsv")):
        table(path, ROWS, {"csv": ",", "tsv": "\t"}.get(form, ";"))
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    else:
        Dataset.from_list([{name: str(value) for name, value in row.items()} for row in ROWS]).to_parquet(path)
    alignment, instructions, summary = imported(path, tmp_path / "set")
    assert [(sample.texts, [(label.name, label.value) for label in sample.labels]) for sample in alignment] == [
        (["No effusion."], [("pleural effusion", 0), ("gout", 1)]),
        (["Effusion, and gout."], [("pleural effusion", -1), ("gout", 1)]),
    ]
    assert [sample.image.path for sample in alignment] == [str(tmp_path / "scans" / f"{name}.nii.gz") for name in "ab"]
    assert {(sample.split, sample.source) for sample in alignment} == {("train", path.stem)}
    assert [sample.patient for sample in alignment] == ["p1", "p2"]
    assert {sample.task for sample in instructions} == {"report", "diagnosis", "question"}
    assert "lost.nii.gz is missing" in reasons(tmp_path / "set")[0]
    assert summary["notes"] == [f"Columns of {path.name} that hold no label are not used: comment."]


def test_twenty_patients_are_shared_out_and_a_column_of_splits_is_obeyed(tmp_path: Path) -> None:
    nifti(tmp_path / "scan.nii.gz")
    for number in range(24):
        (tmp_path / f"{number}.nii.gz").symlink_to(tmp_path / "scan.nii.gz")
    rows = [{"path": f"{number}.nii.gz", "report": "Normal."} for number in range(24)]
    table(tmp_path / "mine.csv", rows)
    alignment, _, _ = imported(tmp_path / "mine.csv", tmp_path / "1")
    splits = [sample.split for sample in alignment]
    assert set(splits) == {"train", "validation", "test"}
    assert splits.count("train") > 12
    table(
        tmp_path / "mine.csv", [{**row, "split": "val" if number < 3 else "train"} for number, row in enumerate(rows)]
    )
    alignment, _, _ = imported(tmp_path / "mine.csv", tmp_path / "2")
    assert [sample.split for sample in alignment].count("validation") == 3


def test_masks_of_a_table_and_several_questions_about_a_scan(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    nifti(tmp_path / "organs.nii.gz", (1, 2))
    nifti(tmp_path / "tumour.nii.gz", (1,))
    table(tmp_path / "mine.csv", [
        {"path": "a.nii.gz", "question": "Where?", "answer": "Left.", "mask:tumour": "tumour.nii.gz"},
        {"path": "a.nii.gz", "question": "How large?", "answer": "2 cm.", "mask:tumour": ""},
    ])  # fmt: skip
    (sample,), instructions, _ = imported(tmp_path / "mine.csv", tmp_path / "1")
    assert [mask.name for mask in sample.masks] == ["tumour"]
    assert [one.answers for one in instructions if one.task == "question"] == [["Left."], ["2 cm."]]
    corrected = {
        "path": "a.nii.gz", "report": "A tumour.", "labels": {"tumour": 1, "cyst": 0, "gout": None},
        "masks": {"liver": {"path": "organs.nii.gz", "values": [2]}, "tumour": "tumour.nii.gz", "cyst": ""},
    }  # fmt: skip
    (tmp_path / "corrections.jsonl").write_text(json.dumps(corrected))
    (sample,), instructions, _ = imported(tmp_path / "corrections.jsonl", tmp_path / "2")
    volume = open_volume(sample.image)
    assert {mask.name: int(open_mask(mask, volume).sum()) for mask in sample.masks} == {"liver": 80, "tumour": 80, "cyst": 0}  # fmt: skip
    assert {label.name: label.value for label in sample.labels} == {"tumour": 1, "cyst": 0}
    assert {one.task for one in instructions} == {"report", "segmentation", "diagnosis", "question"}


def test_a_mask_that_another_row_names_is_not_known_to_be_absent(tmp_path: Path) -> None:
    for name in ("a", "b"):
        nifti(tmp_path / f"{name}.nii.gz")
    nifti(tmp_path / "m.nii.gz", (1,))
    rows = [{"path": "a.nii.gz", "masks": {"liver": "m.nii.gz"}}, {"path": "b.nii.gz", "masks": {"spleen": "m.nii.gz", "cyst": ""}}]  # fmt: skip
    Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")  # which writes null for what a row lacks
    alignment, _, _ = imported(tmp_path / "mine.parquet", tmp_path / "set")
    assert [[mask.name for mask in sample.masks] for sample in alignment] == [["liver"], ["spleen", "cyst"]]


def asked(question: Any, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [
    {"messages": asked("Is it a cyst?", "Yes."), "images": ["a.nii.gz"]},
    {"messages": asked("<image>\nAnd this one?", "No."), "images": ["a.nii.gz"], "split": "test"},
    {"messages": asked([{"type": "image", "image": "a.nii.gz"}, {"type": "text", "text": "This?"}], "No.")},
    {"messages": asked("Where is the Kidney_Left?", "Sure, it is <SEG>."), "images": ["a.nii.gz"],
     "masks": [{"name": "Kidney_Left", "path": "m.nii.gz", "values": [2]}]},
    {"messages": asked("How likely is gout?", "gout <disease_confidence>"), "images": ["a.nii.gz"],
     "labels": [{"name": "gout", "value": 1}]},
    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Nothing."}], "image": "a.nii.gz"},
    {"messages": asked("Where is it?", "It is <SEG>."), "images": ["a.nii.gz"]},
    {"messages": asked("Lost?", "Yes."), "images": ["lost.nii.gz"]},
    {"messages": asked("No image?", "Yes."), "images": []},
]  # fmt: skip


def test_conversations_as_other_trainers_take_them(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    nifti(tmp_path / "m.nii.gz", (1, 2))
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, CONVERSATIONS)))
    _, samples, _ = imported(tmp_path / "talks.jsonl", tmp_path / "set")
    samples.sort(key=lambda sample: sample.id)
    assert [(text_of(one.messages[0]), one.task, one.split) for one in samples] == [
        ("Is it a cyst?", "question", "train"),
        ("And this one?", "question", "test"),
        ("This?", "question", "train"),
        ("Where is the left kidney?", "segmentation", "train"),
        ("How likely is gout?", "diagnosis", "train"),
        ("What?", "question", "train"),
    ]
    assert all(one.messages[0]["content"][0] == {"type": "image"} for one in samples)
    assert {image.path for one in samples for image in one.images} == {str(tmp_path / "a.nii.gz")}
    assert samples[3].masks[0].values == [2]
    found = " ".join(reasons(tmp_path / "set"))
    assert all(
        part in found for part in ("1 <SEG> in its answers and 0 masks", "lost.nii.gz is missing", "shows no image")
    )


@pytest.mark.parametrize("form", ["saved", "saved with splits", "parquet"])
def test_a_set_of_datasets_with_messages_and_images(tmp_path: Path, form: str) -> None:
    nifti(tmp_path / "a.nii.gz")
    rows = Dataset.from_list([{"messages": asked("A cyst?", "Yes."), "images": [str(tmp_path / "a.nii.gz")]}] * 2)
    folder = tmp_path / "mine"
    if form == "parquet":
        for split in ("train", "validation"):
            (folder / "data").mkdir(parents=True, exist_ok=True)
            rows.to_parquet(folder / "data" / f"{split}-00000.parquet")
    else:
        (rows if form == "saved" else DatasetDict(train=rows, validation=rows)).save_to_disk(str(folder))
    _, samples, _ = imported(folder, tmp_path / "set")
    splits = [sample.split for sample in samples]
    assert splits == (["train"] * 2 if form == "saved" else ["train"] * 2 + ["validation"] * 2)
    assert len({sample.id for sample in samples}) == len(samples)


def test_pictures_that_a_set_holds_itself_are_written(tmp_path: Path) -> None:
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    picture = Image.new("L", (50, 40), 128)
    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(turn), "images": List(ImageFeature())})
    rows = Dataset.from_list([{"messages": asked("A cyst?", "Yes."), "images": [picture, picture]}], features=features)
    rows.save_to_disk(str(tmp_path / "mine"))
    _, (sample,), _ = imported(tmp_path / "mine", tmp_path / "set")
    assert [open_volume(image).shape for image in sample.images] == [(1, 40, 50)] * 2
    assert len(list((tmp_path / "set" / "files").iterdir())) == 1


def one_folder_a_scan(raw: Path) -> None:
    for case in ("a", "b"):
        nifti(raw / case / "ct.nii.gz")
        nifti(raw / case / "liver.nii.gz", (1,))
        nifti(raw / case / "segmentations" / "Kidney_Left.nii.gz", (0, 1))
    (raw / "a" / "report.txt").write_text("Normal.")


def masks_beside(raw: Path) -> None:
    for case in ("a", "b"):
        nifti(raw / f"{case}.nii.gz")
        nifti(raw / f"{case}_seg.nii.gz", (1, 2))
    (raw / "a.txt").write_text("Normal.")
    (raw / "labels.json").write_text(json.dumps({"background": 0, "liver": 1, "Kidney_Left": 2}))


def masks_in_a_folder(raw: Path) -> None:
    for case in ("a", "b"):
        nifti(raw / "images" / f"{case}.nii.gz")
        nifti(raw / "masks" / f"{case}.nii.gz", (1, 2))
    (raw / "images" / "a.txt").write_text("Normal.")
    table(raw / "masks" / "names.csv", [{"id": 1, "structure": "liver"}, {"id": 2, "structure": "kidney_left"}])


def a_folder_of_masks_a_scan(raw: Path) -> None:
    for case in ("a", "b"):
        nifti(raw / "scans" / f"{case}.nii.gz")
        nifti(raw / "masks" / case / "liver.nii.gz", (1,))
        nifti(raw / "masks" / case / "Kidney_Left.nii.gz", (0, 1))
    (raw / "scans" / "a.txt").write_text("Normal.")


def structures_in_names_of_files(raw: Path) -> None:
    for case in ("a", "b"):
        nifti(raw / f"{case}.nii.gz")
        nifti(raw / "labels" / f"{case}_liver.nii.gz", (1,))
        nifti(raw / "labels" / f"{case}_kidney_left_mask.nii.gz", (0, 1))
    (raw / "a.txt").write_text("Normal.")


LAYOUTS = {  # as the sets of the paper's first footnote have them: a scan, and its label map
    "ATM22": ("imagesTr/{}_0000.nii.gz", "labelsTr/{}_0000.nii.gz"),
    "BTCV": ("img/img000{}.nii.gz", "label/label000{}.nii.gz"),
    "FLARE22": ("images/{}_0000.nii.gz", "labels/{}.nii.gz"),
    "KiTS23": ("case_{}/imaging.nii.gz", "case_{}/segmentation.nii.gz"),
    "MM-WHS": ("ct_train/ct_train_{}_image.nii.gz", "ct_train/ct_train_{}_label.nii.gz"),
    "RibFrac": ("images/RibFrac{}-image.nii.gz", "labels/RibFrac{}-label.nii.gz"),
    "SegTHOR": ("Patient_{0}/Patient_{0}.nii.gz", "Patient_{}/GT.nii.gz"),
    "SEGA": ("Dongyang/D{0}/D{0}.nrrd", "Dongyang/D{0}/D{0}.seg.nrrd"),
    "PARSE22": ("train/PA{0}/image/PA{0}.nii.gz", "train/PA{0}/label/PA{0}.nii.gz"),
    "KIPA22": ("train/image/case_{}.nii.gz", "train/label/case_{}.nii.gz"),
    "CT-Pelvic": (
        "dataset6_data/dataset6_CLINIC_000{}_data.nii.gz",
        "dataset6_mask/dataset6_CLINIC_000{}_mask_4label.nii.gz",
    ),
    "LUNA16": ("subset0/1.3.6.{}.mhd", "seg-lungs-LUNA16/1.3.6.{}.mhd"),
    "LNDb": ("data0/LNDb-000{}.mhd", "masks/LNDb-000{}_label.mhd"),
    "one name in two folders": ("clinic{}/images/a.nii.gz", "clinic{}/masks/a.nii.gz"),
    "names within names": ("{}.nii.gz", "{}_seg.nii.gz"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scans_find_their_label_maps_in_layouts_as_published(tmp_path: Path, layout: str) -> None:
    numbers = ("1", "1_2") if layout == "names within names" else ("1", "2")
    pairs = [tuple(tmp_path / name.format(number) for name in LAYOUTS[layout]) for number in numbers]
    for path in (path for pair in pairs for path in pair):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "labels.json").write_text(json.dumps({"one": 1, "two": 2, "either": []}))
    found = list(scans_with_masks(tmp_path))
    assert {(case.images[0].path, mask.path) for case in found for mask in case.masks} == {
        (str(scan), str(mask)) for scan, mask in pairs
    }
    assert [[(mask.name, mask.values) for mask in case.masks] for case in found] == [
        [("one", [1]), ("two", [2]), ("either", [])]
    ] * 2
    assert len({case.id for case in found}) == 2


def test_scans_and_label_maps_may_be_nrrd(tmp_path: Path) -> None:
    for name, labels in (("d", ()), ("d.seg", (1, 2))):
        nifti(tmp_path / "x.nii.gz", labels)
        (tmp_path / "mine").mkdir(exist_ok=True)
        sitk.WriteImage(sitk.ReadImage(str(tmp_path / "x.nii.gz")), str(tmp_path / "mine" / f"{name}.nrrd"))
    (tmp_path / "mine" / "labels.json").write_text(json.dumps({"aorta": 2, "vessels": [], "cyst": 3}))
    (sample,), _, _ = imported(tmp_path / "mine", tmp_path / "set")
    volume = open_volume(sample.image)
    assert {mask.name: int(open_mask(mask, volume).sum()) for mask in sample.masks} == {"aorta": 80, "vessels": 160, "cyst": 0}  # fmt: skip


def test_a_mask_of_two_scans_is_refused_and_a_scan_without_masks_says_nothing_of_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        nifti(tmp_path / "mine" / name / "x.nii.gz")
    nifti(tmp_path / "mine" / "masks" / "x_liver.nii.gz", (1,))
    with pytest.raises(CTInstructError, match=r"x_liver\.nii\.gz could belong to x\.nii\.gz"):
        import_own(tmp_path / "mine", tmp_path / "set")
    (tmp_path / "mine" / "b" / "x.nii.gz").rename(tmp_path / "mine" / "b" / "y.nii.gz")
    (tmp_path / "mine" / "b" / "y.txt").write_text("Normal.")
    alignment, _, _ = imported(tmp_path / "mine", tmp_path / "set")
    assert {sample.id: [mask.name for mask in sample.masks] for sample in alignment} == {"a/x": ["liver"], "b/y": []}


@pytest.mark.parametrize("make", [
    one_folder_a_scan, masks_beside, masks_in_a_folder, a_folder_of_masks_a_scan, structures_in_names_of_files,
])  # fmt: skip
def test_a_folder_of_scans_and_masks(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "mine")
    alignment, instructions, summary = imported(tmp_path / "mine", tmp_path / "set")
    assert [sample.id for sample in alignment] == ["a", "b"]
    assert summary["problems"] == 0
    for sample in alignment:
        volume = open_volume(sample.image)
        assert {mask.name: int(open_mask(mask, volume).sum()) for mask in sample.masks} == {"liver": 80, "left kidney": 80}  # fmt: skip
    assert [sample.texts for sample in alignment] == [["Normal."], []]
    assert {one.task for one in instructions} == {"report", "segmentation"}


def test_a_folder_in_the_layout_of_nnunet_is_taken_as_such(tmp_path: Path) -> None:
    nnunet(tmp_path / "mine", 3)
    alignment, _, _ = imported(tmp_path / "mine", tmp_path / "set")
    assert [(sample.split, sorted(mask.name for mask in sample.masks if mask.path)) for sample in alignment] == [
        ("train", ["one"]), ("train", ["two"]), ("train", ["one"])
    ]  # fmt: skip


def test_a_mask_of_no_scan_is_listed_and_values_without_names_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "mine"
    masks_beside(raw)
    nifti(raw / "c_seg.nii.gz", (1,))
    _, _, summary = imported(raw, tmp_path / "1")
    assert (summary["problems"], reasons(tmp_path / "1")) == (1, ["c_seg.nii.gz belongs to no scan of mine"])
    (raw / "labels.json").unlink()
    with pytest.raises(
        CTInstructError, match=r"a_seg\.nii\.gz is a label map whose values have no names: .*labels\.json"
    ):
        import_own(raw, tmp_path / "2")
    assert not (tmp_path / "2").exists()


def without(path: Path, text: str) -> Path:
    path.write_text(text, errors="surrogateescape")
    return path


@pytest.mark.parametrize(("name", "text", "told"), [
    ("a.csv", "scan_path,report\na.nii.gz,x\n", "a.csv has neither a column path, .* it has scan_path, report"),
    ("a.csv", "path,gout\na.nii.gz,1\na.nii.gz,maybe\n", "a.csv, line 3 has gout = 'maybe': a label is 1, 0, −1"),
    ("a.csv", "path,report\na.nii.gz,one, two\n", "a.csv, line 2 has more cells than the header"),
    ("a.csv", "path,report\n", "a.csv has no row"),
    ("a.csv", "path,report\n../b.nii.gz,x\n", "lies outside of"),
    ("a.csv", "path,report,split\na.nii.gz,x,fold1\n", "split 'fold1'"),
    ("a.csv", "path,report\nlost.nii.gz,x\n", "no usable case: lost.nii.gz is missing"),
    ("a.csv", "path\na.nii.gz\n", "nothing to learn from"),
    ("a.csv", "path,id,report\na.nii.gz,1,x\nb.nii.gz,1,x\n", "id '1', which another scan has"),
    ("a.jsonl", '{"path": "a.nii.gz"\n', "a.jsonl, line 1"),
    ("a.jsonl", '{"path": "a.nii.gz", "masks": [1]}\n', "a.jsonl, line 1 has masks that are not"),
    ("a.parquet", "none", "a.parquet cannot be read as Parquet"),
    ("a.txt", "none", "a.txt"),
    ("a.csv", "path,report\na.nii.gz,\udce4rztin\n", "a.csv cannot be read as a table in UTF-8"),
])  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path: Path, name: str, text: str, told: str) -> None:
    nifti(tmp_path / "a.nii.gz")
    nifti(tmp_path / "b.nii.gz")
    path = without(tmp_path / name, text)
    with pytest.raises(CTInstructError, match=told):
        import_own(path, tmp_path / "set")
    assert not (tmp_path / "set" / "dataset.json").exists()


def test_an_absolute_path_is_taken_as_it_is_unless_a_root_is_named(tmp_path: Path) -> None:
    nifti(tmp_path / "scans" / "a.nii.gz")
    here = tmp_path / "here"
    table(here / "mine.csv", [{"path": str(tmp_path / "scans" / "a.nii.gz"), "report": "x"}])
    (sample,), _, _ = imported(here / "mine.csv", tmp_path / "1")
    assert sample.image.path == str(tmp_path / "scans" / "a.nii.gz")
    table(here / "mine.csv", [{"path": "a.nii.gz", "report": "x"}])
    (sample,), _, _ = imported(here / "mine.csv", tmp_path / "2", root=tmp_path / "scans")
    assert sample.image.path == str(tmp_path / "scans" / "a.nii.gz")
    table(here / "mine.csv", [{"path": str(tmp_path / "scans" / "a.nii.gz"), "report": "x"}])
    with pytest.raises(CTInstructError, match="outside of"):
        import_own(here / "mine.csv", tmp_path / "3", root=here)


def test_the_command_line_imports_and_what_it_exports_comes_in_again(tmp_path: Path) -> None:
    one_folder_a_scan(tmp_path / "mine")
    run = CliRunner().invoke
    done = run(app, ["data", "import", "-i", str(tmp_path / "mine"), "-o", str(tmp_path / "set")])
    assert done.exit_code == 0, done.output
    assert "alignment: train 2" in done.output
    twice = run(app, ["data", "import", "-i", str(tmp_path / "set"), "-o", str(tmp_path / "no")])
    assert "is a prepared data set already" in str(twice.exception or twice.output)
    rows = export_jsonl(tmp_path / "set", tmp_path / "out.jsonl")
    again = run(app, ["data", "import", "-i", str(tmp_path / "out.jsonl"), "-o", str(tmp_path / "again"), "--root", str(tmp_path)])  # fmt: skip
    assert f"{rows} rows in" in again.output
    assert [row for kind, _, _, row in iterate(tmp_path / "again")] == [
        row for kind, _, _, row in iterate(tmp_path / "set") if kind == "instructions"
    ]
