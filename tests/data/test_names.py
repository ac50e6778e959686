"""Names as people write them become the names that a model was taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctinstruct_hf import CTInstructError, Study
from ctinstruct_hf.data.names import Names, canonical, read_names, read_table
from ctinstruct_hf.data.prepared import import_jsonl, load_rows
from ctinstruct_hf.inference.study import load_model
from ctinstruct_hf.phantoms import FINDINGS, ORGANS, UNIONS, make_phantom

TAUGHT = [*ORGANS, *UNIONS, *FINDINGS]
WRITTEN = {
    "liver": ["Liver", "LIVER", " the liver ", "livers", "Liver.", "whole liver", "the patient's liver", "hepar"],
    "left kidney": ["left_kidney", "Left Kidney", "kidney_left", "kidney, left", "KidneyLeft", "LEFT-KIDNEY", "L kidney"],
    "lungs": ["lung", "Lungs", "both lungs", "left and right lung", "the LUNGS", "bilateral lungs", "lung parenchyma"],
    "right lung": ["lung_right", "lung, right", "Right Lungs", "rt lung", "rightlung"],
    "kidneys": ["kidney", "both kidneys", "left and right kidneys"],
    "spine": ["vertebrae", "vertebral column", "Backbone"],
    "esophagus": ["Oesophagus", "esophagus_"],
    "urinary bladder": ["bladder", "urinary_bladder", "Bladder, urinary"],
    "muscle": ["skeletal_muscle", "muscles"],
    "lung nodule": ["Lung Nodules", "pulmonary nodule", "nodules"],
    "pericardial effusion": ["pericardial-effusion", "Pericardial Effusions"],
    "kidney stone": ["renal stones", "Kidney_Stone", "nephrolithiasis"],
    "liver lesion": ["hepatic lesions", "LIVER LESION", "liver_tumor"],
    "cardiomegaly": ["enlarged heart", "Cardiomegaly"],
    "ribs": ["rib", "THE RIBS"],
    "pancreas": ["Pancreas"],
}  # fmt: skip


@pytest.fixture(scope="module")
def taught() -> Names:
    return Names(TAUGHT)


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(make_phantom(3, shape=(32, 64, 64)).volume, *load_model(None, "cpu"))


def anew(study: Study, **options: Any) -> Study:
    """The same scan with nothing asked yet, its features at hand."""
    other = Study(study.volume, study.model, study.processor, **options)
    other.__dict__.update(batch=study.batch, features=study.features)
    return other


@pytest.mark.parametrize(("known", "written"), WRITTEN.items(), ids=list(WRITTEN))
def test_a_name_is_found_however_it_is_written(taught: Names, known: str, written: list[str]) -> None:
    assert {name: taught.find(name).names for name in [known, *written]} == dict.fromkeys([known, *written], (known,))
    assert all(taught.find(name).known and taught.find(name).note is None for name in written)


@pytest.mark.parametrize("name", TAUGHT)
def test_every_taught_name_stands_for_itself(taught: Names, name: str) -> None:
    for written in (name, name.upper(), name.title(), name.replace(" ", "_"), name.replace(" ", "-"), f"the {name}"):
        assert taught.find(written).names == (name,)


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("livr", ("liver",)),
        ("left kidny", ("left kidney",)),
        ("effusion", ("pleural effusion", "pericardial effusion")),
        ("brain", ()),
    ],
)
def test_an_unknown_name_is_asked_as_written_with_the_nearest_known_names(
    taught: Names, written: str, nearest: tuple[str, ...]
) -> None:
    found = taught.find(written)
    assert (found.names, found.known, found.nearest) == ((written,), False, nearest)
    expected = f"did you mean {' or '.join(nearest)}?" if nearest else "no name that the model was taught"
    assert found.note is not None
    assert found.note.startswith(f"'{written}' is asked as written: ")
    assert expected in found.note


def test_both_sides_stand_for_a_pair_that_has_no_name() -> None:
    names = Names(["left femur", "right femur", "left rib 1", "vertebra L1"])
    assert names.find("Femurs").names == ("left femur", "right femur")
    assert names.find("both femurs").names == ("left femur", "right femur")
    assert names.find("rib_left_1").names == ("left rib 1",)
    assert names.find("vertebrae_L1").names == ("vertebra L1",)
    assert not names.find("vertebrae_L2").known


def test_a_model_without_a_list_gets_plain_names_as_written_and_others_in_the_wording_of_the_table() -> None:
    names = Names(read_table(), listed=False)
    plain = ["kidney left", "lung", "lesion of the adrenal cortex", "liver"]
    assert [names.find(name).names for name in plain] == [(name,) for name in plain]
    assert names.find("Kidney_Left").names == ("left kidney",)
    assert names.find("LIVER").names == ("liver",)
    assert names.find("Gizzard").note is None  # it may know it
    assert names.find("livr").nearest == ("liver",)


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("Segment the LIVER", "Where is the liver?"),
        ("segment liver", "Where is the liver?"),
        ("Could you please outline the Left Kidney in this scan?", "Where is the left kidney?"),
        ("LIVER", "Where is the liver?"),
        ("show me both Lungs and the SPLEEN", "Please segment the lungs and spleen."),
        ("Segment left and right kidney, liver, and aorta.", "Please segment the kidneys, liver and aorta."),
        ("Is there a PLEURAL EFFUSION?", "Is there a pleural effusion?"),
        ("How many Lung_Nodules are there?", "How many lung nodules are there?"),
        ("What is seen in the body of the scan?", "What is seen in the body of the scan?"),
        ("Segment the brain", "Segment the brain"),
        ("Please generate a report.", "Please generate a report."),
    ],
)
def test_a_question_is_asked_with_the_names_that_the_model_knows(taught: Names, written: str, asked: str) -> None:
    assert taught.question(written) == (asked, [])


@pytest.mark.parametrize(
    "written",
    [
        "segment: LIVER",
        "I'd like you to segment the Liver",
        "I would like a segmentation of the liver",
        "Provide the segmentation mask for the liver.",
        "Perform segmentation of the Liver",
        "Show the location of the liver",
        "Point out the liver",
        "Where is the liver located?",
        "Where does the Liver lie?",
        "Where can I find the liver in this CT scan?",
        "Let's trace the liver",
    ],
)
def test_a_request_is_understood_in_other_phrasings(taught: Names, written: str) -> None:
    assert taught.question(written) == ("Where is the liver?", [])


@pytest.mark.parametrize("written", ["Can you see a Pleural Effusion?", "Can you identify any Pleural effusion?"])
def test_a_question_about_presence_is_no_request_for_a_mask(taught: Names, written: str) -> None:
    assert taught.question(written) == (written.replace("Pleural ", "pleural ").replace("Effusion", "effusion"), [])


def test_an_unknown_name_in_a_request_is_noted(taught: Names) -> None:
    text, notes = taught.question("Segment the livr and the spleen")
    assert text == "Segment the livr and the spleen"
    assert notes == ["'the livr' is asked as written: did you mean liver?"]


def test_masks_are_the_same_however_the_name_is_written_and_bear_the_name_given(study: Study) -> None:
    right = study.segment("liver")
    assert right.any()
    written = ["Liver", "LIVER", "the liver", "livers"]
    masks = study.segment(written)
    assert list(masks) == written
    assert all(np.array_equal(mask, right) for mask in masks.values())
    assert np.array_equal(study.segment(["Left_Kidney"])["Left_Kidney"], study.segment("left kidney"))
    answer = study.ask("Segment the LIVER")
    assert len(answer.masks) == 1
    assert np.array_equal(answer.masks[0], right)
    assert study.results.answers[-1][0] == "Segment the LIVER"
    assert not study.notes


def test_a_pair_that_has_no_name_is_the_union_of_its_sides(study: Study) -> None:
    other = anew(study)
    other.structures = Names(["left lung", "right lung"])
    both = other.segment("Lungs")
    assert np.array_equal(both, other.segment("left lung") | other.segment("right lung"))


def test_probabilities_are_the_same_however_the_name_is_written(study: Study) -> None:
    right = study.diagnose(["lung nodule", "emphysema"])
    written = study.diagnose(["Pulmonary Nodules", "EMPHYSEMA"])
    assert list(written) == ["Pulmonary Nodules", "EMPHYSEMA"]
    assert list(written.values()) == list(right.values())
    assert study.diagnose("Lung_Nodule") == {"Lung_Nodule": study.diagnose("lung nodule")["lung nodule"]}
    assert set(study.diagnose("PHANTOM")) == set(study.model.config.disease_names)
    with pytest.raises(CTInstructError, match=r"no head for lung nodul \(did you mean lung nodule\?\)"):
        study.diagnose(["lung nodul"])


def test_a_name_that_the_model_does_not_know_is_noted_in_the_warnings(study: Study) -> None:
    other = anew(study)
    other.segment(["livr", "livr", "liver"])
    assert other.notes == ["'livr' is asked as written: did you mean liver?"]
    assert other.notes[0] in other.warnings


def test_users_extend_the_table_by_a_file(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"left kidney": ["LK", "Ren sinister"], "liver": "Leber"}))
    other = anew(study, names=read_names(file))
    assert other.structures.find("lk").names == ("left kidney",)
    assert other.structures.find("ren_sinister").names == ("left kidney",)
    assert other.structures.question("Segment the LEBER")[0] == "Where is the liver?"


@pytest.mark.parametrize(
    ("table", "written", "asked"),
    [
        ({"Liver": ["Leber"]}, ["Leber", "LEBER", "Liver", "liver"], ("liver",)),
        ({"Leber": ["liver"]}, ["Leber", "leber", "LIVER"], ("liver",)),
        ({"left_kidney": ["linke Niere"]}, ["Linke_Niere", "left_kidney"], ("left kidney",)),
        ({"Rundherd": ["pulmonary nodules"]}, ["Rundherd", "pulmonary nodule"], ("lung nodule",)),
        ({"both femurs": ["Femora"]}, ["Femora", "both femurs"], ("left femur", "right femur")),
        ({"gizzard": ["Muskelmagen"]}, ["gizzard", "MUSKELMAGEN"], ("gizzard",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_names_of_users_stand_for_what_the_model_was_taught(
    table: dict[str, list[str]], written: list[str], asked: tuple[str, ...]
) -> None:
    names = Names([*TAUGHT, "left femur", "right femur"], table)
    assert [names.find(name).names for name in written] == [asked] * len(written)


def test_names_of_users_reach_diseases_in_any_wording(study: Study) -> None:
    other = anew(study, names={"Pulmonary Nodule": ["Rundherd"], "Leber": ["liver"]})
    assert other.diagnose(["rundherd"]) == {"rundherd": study.diagnose(["lung nodule"])["lung nodule"]}
    with pytest.raises(CTInstructError, match=r"no head for Leber.*It can mark Leber: ask for a mask"):
        other.diagnose(["Leber"])


@pytest.mark.parametrize("names", [[], "", " ", ["liver", "..."], [None]])
def test_no_name_and_an_empty_one_are_refused(study: Study, names: Any) -> None:
    with pytest.raises(CTInstructError, match=r"^names (is empty|has ).*give"):
        study.segment(names)
    with pytest.raises(CTInstructError, match=r"^diseases (is empty|has ).*give"):
        study.diagnose(names)


def test_names_of_other_data_sets_are_imported_in_the_wording_of_the_package(tmp_path: Path) -> None:
    def sample(name: str) -> dict[str, Any]:
        return {
            "id": name, "task": "segmentation", "split": "train", "source": "mine", "images": [{"path": "scan.nii.gz"}],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Where is the {name}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"Sure, {name} <SEG>."}]},
            ],
            "masks": [{"name": name}],
        }  # fmt: skip

    written = {"Kidney_Left": "left kidney", "LIVER": "liver", "my_own_label": "my_own_label", "lung": "lung"}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(sample(name)) for name in written))
    import_jsonl(tmp_path / "rows.jsonl", tmp_path / "set")
    rows = list(load_rows(tmp_path / "set", "instructions", "train"))
    assert [row["masks"][0]["name"] for row in rows] == list(written.values())
    texts = [[part["text"] for turn in row["messages"] for part in turn["content"] if part["text"]] for row in rows]
    assert texts == [[f"Where is the {name}?", f"Sure, {name} <SEG>."] for name in written.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[liver]", "holds list"),
        ("", "holds NoneType"),
        ("liver: [1]", "'liver' must be a text with a list of texts"),
        ("liver: [x]\nspleen: [X]", "gives 'X' to both 'liver' and 'spleen'"),
        ("liver: [x", "is no YAML or JSON"),
    ],
)
def test_a_bad_file_of_names_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "names.yaml"
    file.write_text(text)
    with pytest.raises(CTInstructError, match=message):
        read_names(file)
    with pytest.raises(CTInstructError, match="cannot be read: No such file"):
        read_names(tmp_path / "none.yaml")


def test_the_package_writes_names_of_data_sets_in_one_way() -> None:
    theirs = [
        "kidney_left",
        "lung_upper_lobe_left",
        "iliac_vena_left",
        "Postcava",
        "skeletal_muscle",
        "COVID infection",
    ]
    ours = ["left kidney", "left upper lung lobe", "left iliac vein", "inferior vena cava", "muscle", "COVID infection"]
    assert [canonical(name) for name in theirs] == ours
    assert canonical("my_own_label") == "my own label"


def test_no_name_of_the_table_stands_for_two() -> None:
    names = Names(read_table())
    for name, others in read_table().items():
        assert {names.find(other).names for other in [name, *others]} == {(name,)}
