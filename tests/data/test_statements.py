"""What a report says about any finding by name, and which of its characters say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.data.labeller import FINDINGS as CT_RATE
from ctinstruct_hf.data.labeller import find_mentions, label_report
from ctinstruct_hf.data.names import read_names
from ctinstruct_hf.data.statements import ReportReader
from ctinstruct_hf.phantoms import FINDINGS, make_phantom

REPORT = (
    "Technique: Unenhanced CT. Findings: A 12 mm nodule is seen in the left upper lobe. No pleural  effusion or kidney\n"
    "stone. There is a 30\nmm hypodense lesion in the liver – stable. Possible emphysema.\nImpression: Lung nodule."
)


def test_states_and_sentences_of_a_report() -> None:
    found = ReportReader(["lung nodule", "pleural effusion", "liver lesion", "emphysema", "cardiomegaly"]).read(REPORT)
    assert {name: one.state for name, one in found.items()} == {
        "lung nodule": "present",
        "pleural effusion": "absent",
        "liver lesion": "present",
        "emphysema": "present",
        "cardiomegaly": "not mentioned",
    }
    sentences = {name: [REPORT[start:stop] for start, stop in one.spans] for name, one in found.items()}
    assert sentences == {
        "lung nodule": ["A 12 mm nodule is seen in the left upper lobe.", "Lung nodule."],
        "pleural effusion": ["No pleural  effusion or kidney"],
        "liver lesion": ["There is a 30\nmm hypodense lesion in the liver – stable."],
        "emphysema": ["Possible emphysema."],
        "cardiomegaly": [],
    }


def test_every_phantom_report_is_read_as_it_is_meant() -> None:
    reader = ReportReader(FINDINGS)
    for seed in range(12):
        phantom = make_phantom(seed, shape=(8, 16, 16))
        states = {name: one.state for name, one in reader.read(phantom.report).items()}
        assert states == {name: "present" if there else "absent" for name, there in phantom.labels.items()}


def test_the_labellers_findings_are_read_by_its_rules() -> None:
    text = "Hernia of the umbilicus. Nodules in the thyroid. Ground-glass opacities persist. No bronchiectasis."
    found = {name: one.state == "present" for name, one in ReportReader(CT_RATE).read(text).items()}
    assert found == dict(label_report(text))


@pytest.mark.parametrize(
    ("name", "report", "state"),
    [
        ("Pulmonary Nodules", "A nodule is seen.", "present"),
        ("pulmonary_fibrosis", "No fibrotic bands.", "absent"),
        ("gallstone", "No gallstones are seen.", "absent"),
        ("aortic aneurysm", "An aneurysm of the ascending aorta. Nodule.", "not mentioned"),
        ("aneurysm of the aorta", "There is an aneurysm of the ascending aorta.", "present"),
        ("CAC", "There is cac in this text.", "not mentioned"),
        ("kidney stone", "Nephroliths in both kidneys.", "not mentioned"),
    ],
)
def test_names_that_no_rule_knows_are_found_by_their_words(name: str, report: str, state: str) -> None:
    assert ReportReader([name]).read(report)[name].state == state


def test_a_users_table_teaches_other_words(tmp_path: Path) -> None:
    path = tmp_path / "names.yaml"
    path.write_text(
        "kidney stone: [nephrolith]\npleural effusion: [water on the lung, wet lung]\nmy nodes: [lymphadenopathy]\n"
    )
    reader = ReportReader(["kidney stone", "wet lung", "my nodes"], read_names(path))
    found = reader.read("Nephroliths in both kidneys. No water in the left lung. Enlarged mediastinal lymph nodes.")
    assert {name: one.state for name, one in found.items()} == {
        "kidney stone": "present",
        "wet lung": "absent",
        "my nodes": "present",
    }


def test_a_finding_in_its_own_words_is_itself_beside_any_other() -> None:
    (mention,) = [
        one
        for one in find_mentions("No lung nodule, arterial wall calcification or hernia.")
        if "arterial" in one.finding
    ]
    assert mention.status == "absent"


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(CTInstructError, match="must be text"):
        ReportReader(["lung nodule"]).read(3)  # type: ignore[arg-type]
