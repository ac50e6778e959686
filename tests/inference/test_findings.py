"""The table of findings of the bundled model, what the page and the files make of it, and the draft that agrees best."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from ctinstruct_hf import CTInstructError, Study
from ctinstruct_hf.data.statements import Statement
from ctinstruct_hf.inference.consensus import disagreement
from ctinstruct_hf.inference.findings import Evidence
from ctinstruct_hf.inference.predict import Request, predict_study
from ctinstruct_hf.inference.study import load_model
from ctinstruct_hf.output import folder
from ctinstruct_hf.output.report import grounded_report
from ctinstruct_hf.phantoms import FINDINGS, phantom_of

SCHEMA = json.loads(Path(folder.__file__).with_name("findings.schema.json").read_text())


@pytest.fixture(scope="module")
def study() -> Study:
    """A phantom whose greedy report denies the nodules that everything else sees."""
    made = Study(phantom_of("phantom:trunk:3").volume, *load_model(None, "cpu"))
    made.ask("How many lung nodules are there?")
    made.findings()
    return made


@pytest.fixture(scope="module")
def saved(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study.save(tmp_path_factory.mktemp("findings") / "out")


def test_every_finding_has_all_four_sources_side_by_side(study: Study) -> None:
    rows = study.results.findings
    assert list(rows) == FINDINGS
    truth = phantom_of("phantom:trunk:3").labels
    for name, row in rows.items():
        assert set(row["says"]) == {"report", "probability", "question", "mask"}
        assert row["says"]["probability"] == (row["probability"] >= row["threshold"]) == bool(truth[name])
        assert row["says"]["mask"] == bool(row["mask"]["voxels"])
        assert row["probability"] == pytest.approx(study.results.diagnosis[name], abs=1e-4)


def test_a_contradiction_is_named(study: Study) -> None:
    rows = study.results.findings
    assert rows["lung nodule"]["agreement"] == "present by probability, question, mask; absent by report"
    assert ["report", "mask"] in rows["lung nodule"]["disagree"]
    assert rows["consolidation"]["agreement"] == "consistent"
    assert any("the report says right, the mask is on the left" in one for one in rows["kidney stone"]["remarks"])


def test_sentences_are_characters_of_the_report(study: Study) -> None:
    report = study.results.report
    assert report is not None
    for name, row in study.results.findings.items():
        assert row["sentences"], name
        for one in row["sentences"]:
            assert report[one["start"] : one["end"]] == one["text"]
    assert "consolidation" in study.results.findings["consolidation"]["sentences"][0]["text"]


def test_masks_are_measured_and_become_masks_of_the_study(study: Study) -> None:
    mask = study.results.findings["kidney stone"]["mask"]
    assert (mask["side"], mask["organ"]) == ("left", "left kidney")
    assert 0.5 < mask["mean_probability"] <= 1
    assert mask["voxels"] == int(study.results.masks["kidney stone"].sum())
    assert (study.segment("kidney stone") == study.results.masks["kidney stone"]).mean() > 0.9999
    assert "emphysema" not in study.results.masks  # empty


def test_a_study_that_was_asked_nothing_before_gives_several_masks_at_once(study: Study) -> None:
    fresh = Study(study.volume, study.model, study.processor)
    fresh.__dict__["features"], fresh.__dict__["batch"] = study.features, study.batch
    together, alone = (one.mask_logits(["liver", "spleen"], one is fresh) for one in (fresh, study))
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_the_folder_holds_the_table_and_fits_its_schema(saved: Path, study: Study) -> None:
    written = json.loads((saved / "findings.json").read_text())
    jsonschema.validate(written, SCHEMA)
    assert list(written["findings"]) == FINDINGS
    assert (saved / written["findings"]["kidney stone"]["mask"]["file"]).exists()
    assert written["findings"]["emphysema"]["mask"]["file"] is None


def test_the_page_begins_with_the_table_and_links_sentences_and_slices_both_ways(saved: Path) -> None:
    page = (saved / "report.html").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[0] == "Findings and agreement"
    ids = set(re.findall(r' id="([^"]+)"', page))
    links = set(re.findall(r'href="#([^"]+)"', page))
    assert links <= ids
    assert {"picture-consolidation", "finding-consolidation", "sentence-consolidation"} <= links & ids
    row = page[page.index('id="finding-lung-nodule"') :]
    assert "contradiction: present by probability, question, mask; absent by report" in row[: row.index("</tr>")]


def test_a_report_with_probabilities_gets_the_table_but_only_the_masks_asked_for(
    small_scan: Path, tmp_path: Path
) -> None:
    request = Request(report=True, diagnose="all", structures=["liver"])
    predict_study(small_scan, tmp_path / "out", request, device="cpu")
    findings = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert findings["findings"]
    assert set(findings["segmentation"]) == {"liver"}
    assert any(row["mask"] and row["mask"]["voxels"] for row in findings["findings"].values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r' id="([^"]+)"', page))


def test_a_report_without_masks_is_plain_text() -> None:
    row = {"report": "present", "mask": None, "sentences": [{"start": 0, "end": 9, "text": "<b> seen."}]}
    html = grounded_report("<b> seen. Rest.", {"cyst": row})
    assert html == '<span id="sentence-cyst"></span>&lt;b&gt; seen. Rest.'


def test_findings_by_name_as_people_write_them(study: Study) -> None:
    rows = study.findings("Kidney Stones")
    assert list(rows) == ["Kidney Stones"]
    assert rows["Kidney Stones"]["question"] == "Is there a kidney stone?"
    with pytest.raises(CTInstructError, match="knows no finding 'gout'"):
        study.findings(["gout"])
    with pytest.raises(CTInstructError, match="names is empty"):
        study.findings([])
    del study.results.findings["Kidney Stones"], study.results.masks["Kidney Stones"]


def test_the_draft_that_agrees_is_kept_and_the_same_each_time(study: Study) -> None:
    again = Study(study.volume, study.model, study.processor)
    again.__dict__["features"], again.__dict__["batch"] = study.features, study.batch
    report = again.report(consensus=6)
    assert "No lung nodule" not in report
    assert "nodule" in report
    assert again.report(consensus=6) == report
    assert again.results.answers == []
    with pytest.raises(CTInstructError, match="consensus is 0"):
        again.report(consensus=0)


def test_a_draft_is_judged_by_contradictions_then_by_likelihood() -> None:
    def evidence(probability: float, answer: str) -> dict[str, Any]:
        return {"lung nodule": Evidence("lung nodule", probability, 0.5, "Is there a lung nodule?", answer)}

    there, silent = {"lung nodule": Statement("present")}, {"lung nodule": Statement()}
    assert disagreement(there, evidence(0.9, "Yes."))[:2] == (0, 0)
    assert disagreement(silent, evidence(0.9, "Yes."))[:2] == (1, 1)
    assert disagreement(there, evidence(0.6, "Yes.")) < disagreement(silent, evidence(0.6, "No."))
    assert disagreement(there, evidence(0.9, "Yes.")) < disagreement(there, evidence(0.6, "Yes."))


def test_a_plain_answer_computes_nothing_of_it(study: Study, tmp_path: Path) -> None:
    plain = Study(study.volume, study.model, study.processor)
    plain.segment("liver")
    written = json.loads((plain.save(tmp_path / "out") / "findings.json").read_text())
    jsonschema.validate(written, SCHEMA)
    assert (written["findings"], written["fitness"], plain.evidence) == ({}, None, {})
