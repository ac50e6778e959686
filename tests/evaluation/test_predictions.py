"""The small format for predictions: written, read, refused, scored, compared."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner
from wordnets import needs_wordnet

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app
from ctinstruct_hf.evaluation.challenge import write_submission
from ctinstruct_hf.evaluation.diagnosis import best_thresholds
from ctinstruct_hf.evaluation.predictions import Predictions, Record, read_predictions, to_json, write_predictions
from ctinstruct_hf.evaluation.scoring import SystemScores, TaskScores, parse_thresholds, score_predictions
from ctinstruct_hf.evaluation.segmentation import read_mask_pair, released_dice, surface_scores, volume_dice
from ctinstruct_hf.evaluation.significance import Interval
from ctinstruct_hf.evaluation.tables import PAPER_TABLES, all_tables, paper_table


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def answer(name: str, said: str = "Yes.", right: str = "Yes.", **more: Any) -> dict[str, Any]:
    return {"id": name, "task": "question", "prediction": said, "reference": right, **more}


def mask_file(path: Path, mask: np.ndarray, mm: float = 2.0) -> str:
    nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), np.diag([mm, mm, mm, 1])), path)
    return path.name


def cube(low: int, high: int) -> np.ndarray:
    mask = np.zeros((12, 12, 12), bool)
    mask[low:high, low:high, low:high] = True
    return mask


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    records = [
        Record("a", "question", "mine", prediction="", reference="No.", meta={"sex": "F"}),
        Record("b", "diagnosis", probabilities={"x": 0.25}, labels={"x": 1}),
        Record("c", "report", error="c.nii.gz is broken."),
    ]
    write_predictions(Predictions("Mine", records), tmp_path / "p.jsonl")
    found = read_predictions(tmp_path / "p.jsonl")
    assert found.system == "Mine"
    assert found.records == records
    assert [record.id for record in found.failed] == ["c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"task": "question"}, "needs an id"),
        ({"id": "a", "task": "poem"}, "task 'poem'"),
        ({"id": "a", "task": "question", "prediction": "x"}, "lacks reference"),
        ({"id": "a", "task": "question", "prediction": 3, "reference": "x"}, "is no text"),
        ({**answer("a"), "answer": "x"}, "unknown fields answer"),
        ({"id": "a", "task": "diagnosis", "probabilities": {"x": float("nan")}, "labels": {"x": 1}}, "between 0 and 1 for x"),
        ({"id": "a", "task": "diagnosis", "probabilities": {"x": 0.2}, "labels": {"y": 1}}, "different diseases: x, y"),
        ({"id": "a", "task": "diagnosis", "probabilities": {"x": 0.2}, "labels": {"x": 2}}, "other than 1, 0"),
        ({"id": "a", "task": "segmentation", "masks": [{"name": "liver"}]}, "without prediction"),
        ({"id": "a", "task": "retrieval", "image_features": [float("inf")], "text_features": [1.0]}, "no finite"),
    ],
)  # fmt: skip
def test_a_bad_record_is_refused_with_file_line_and_name(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", answer("good"), line)
    with pytest.raises(CTInstructError, match=r"p\.jsonl, line 2") as caught:
        read_predictions(path)
    assert message in str(caught.value)


def test_ids_that_come_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CTInstructError, match="more than once: a"):
        read_predictions(write_lines(tmp_path / "p.jsonl", answer("a"), answer("a")))


@needs_wordnet
def test_a_failing_sample_is_counted_and_listed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", answer("a"), {"id": "b", "task": "question", "error": "no such file"})
    scores = score_predictions(read_predictions(path)).tasks[0]
    assert (scores.count, scores.failed) == (1, ["b"])
    assert scores.metrics["exact"].mean == 1.0


def diagnoses(count: int = 60, seed: int = 0, split: str = "test", shift: float = 0.3) -> list[Record]:
    rng = np.random.default_rng(seed)
    records = []
    for index in range(count):
        labels = {name: int(rng.random() < 0.4) for name in ("x", "y")}
        probabilities = {
            name: float(np.clip(shift * value + 0.6 * rng.random(), 0, 1)) for name, value in labels.items()
        }
        records.append(Record(f"{split}-{index}", "diagnosis", "ct_rate", split, probabilities=probabilities, labels=labels,
                              meta={"sex": "MF"[index % 2]}))  # fmt: skip
    return records


def test_thresholds_come_from_validation_records() -> None:
    test, validation = diagnoses(), diagnoses(seed=1, split="validation")
    scores = score_predictions(Predictions("a", [*test, *validation]), bootstraps=50)
    found = scores.find("diagnosis", "ct_rate")
    assert found is not None
    assert found.count == 60
    table = np.array([list(record.probabilities.values()) for record in validation])
    truth = np.array([list(record.labels.values()) for record in validation])
    limits = best_thresholds(table, truth)
    per_disease = found.details["per_disease"]
    assert [per_disease[name]["threshold"] for name in ("x", "y")] == pytest.approx(limits)
    areas = [
        roc_auc_score([record.labels[name] for record in test], [record.probabilities[name] for record in test])
        for name in ("x", "y")
    ]
    assert found.metrics["auc"].mean == pytest.approx(np.mean(areas))
    assert found.metrics["auc"].sd == pytest.approx(np.std(areas, ddof=1))
    assert found.metrics["auc"].low < np.mean(areas) < found.metrics["auc"].high
    assert set(found.groups["auc"]["sex"]) == {"male", "female"}


def test_thresholds_of_the_test_set_are_marked() -> None:
    released = score_predictions(Predictions("a", diagnoses()), "test_set", bootstraps=20).tasks[0]
    assert released.details["thresholds_from"] == "test_set"
    assert "as released" in released.notes[0]
    fixed = score_predictions(Predictions("a", diagnoses()), 0.5, bootstraps=20).tasks[0]
    assert fixed.metrics["f1"].mean <= released.metrics["f1"].mean
    alone = score_predictions(Predictions("a", diagnoses()), bootstraps=20).tasks[0]
    assert "0.5, since there are no validation samples" in alone.notes[0]
    assert parse_thresholds("0.25") == 0.25
    with pytest.raises(CTInstructError, match="thresholds is 'best'"):
        parse_thresholds("best")


def test_masks_are_scored_on_the_scans_grid(tmp_path: Path) -> None:
    whole, half = cube(2, 6), cube(2, 6)
    half[2:4] = False
    labels = whole.astype(np.uint8) * 7
    reference = {"path": mask_file(tmp_path / "labels.nii.gz", labels), "values": [7]}
    said = mask_file(tmp_path / "half.nii.gz", half)
    empty = mask_file(tmp_path / "empty.nii.gz", cube(0, 0))
    records = [
        Record("a", "segmentation", masks=[{"name": "liver", "prediction": said, "reference": reference}]),
        Record("b", "segmentation", masks=[{"name": "liver", "prediction": empty, "reference": reference}]),
        Record("c", "segmentation", masks=[{"name": "spleen", "prediction": empty, "reference": {"path": ""}}]),
    ]
    found = score_predictions(Predictions("a", records, tmp_path), surface=True, bootstraps=20).tasks[0]
    assert found.per_sample["dice"] == {"a": pytest.approx(2 / 3), "b": 0.0}
    assert found.per_sample["absent_left_empty"] == {"c": 1.0}
    assert found.per_sample["hd95"] == {"a": pytest.approx(4.0, abs=0.5)}  # two voxels of 2 mm are missing
    assert found.per_sample["nsd"]["b"] == 0.0
    assert "1 structures were missed" in found.notes[0]
    assert found.details["per_structure"]["liver"]["count"] == 2
    other = mask_file(tmp_path / "other.nii.gz", half, mm=1.0)
    wrong = [Record("a", "segmentation", masks=[{"name": "liver", "prediction": other, "reference": reference}])]
    with pytest.raises(CTInstructError, match="different affines"):
        score_predictions(Predictions("a", wrong, tmp_path))


def test_released_dice_of_an_empty_prediction_for_a_small_organ() -> None:
    """The example of docs/evaluation.md: nothing is found, and the released number is 0.99."""
    organ = np.zeros((64, 64, 64), bool)
    organ[30:36, 30:36, 30:36] = True
    nothing = np.zeros_like(organ)
    assert volume_dice(nothing, organ) == 0.0
    assert released_dice(nothing, organ) == pytest.approx(1 - 36 / 64**2)
    assert released_dice(nothing, organ) > 0.99


def test_surface_distances_decide_the_empty_cases() -> None:
    mask = cube(2, 6)
    assert surface_scores(mask, mask, (2, 2, 2)) == (1.0, 0.0)
    assert surface_scores(mask * False, mask, (2, 2, 2)) == (0.0, float("inf"))
    assert np.isnan(surface_scores(mask * False, mask * False, (2, 2, 2))).all()
    moved = np.roll(mask, 1, axis=0)
    nsd, hd95 = surface_scores(moved, mask, (2.0, 1.0, 1.0), tolerance=1.0)
    assert hd95 == pytest.approx(2.0)
    assert 0.3 < nsd < 0.9


@needs_wordnet
def test_two_systems_are_compared_by_the_command(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    right = [f"Answer {index}." for index in range(40)]
    good = [Record(f"q{i}", "question", "rp3d_vqa", prediction=one, reference=one) for i, one in enumerate(right)]
    poor = [Record(f"q{i}", "question", "rp3d_vqa", prediction=one if rng.random() < 0.5 else "x", reference=one) for i, one in enumerate(right)]  # fmt: skip
    write_predictions(Predictions("Good <b>", [*good, *diagnoses(30)]), tmp_path / "a.jsonl")
    write_predictions(Predictions("Poor", [*poor, *diagnoses(30, shift=0.0)]), tmp_path / "b.jsonl")
    out = CliRunner().invoke(app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "-o", str(tmp_path / "out")])  # fmt: skip
    assert out.exit_code == 0, out.output
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| CTInstruct (paper) | 59.11±34.98 | 54.01±35.87 | 55.87±34.82 | 40.66±34.68 |" in tables
    poor_row = next(line for line in tables.splitlines() if line.startswith("| Poor | –"))
    assert "\\*\\*" in poor_row
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Good &lt;b&gt;" in page
    assert "Good <b>" not in page
    assert page.count("data:image/png") == 2  # ROC curves and reliability
    assert "Research use only" in page
    assert "\\begin{tabular}" in (tmp_path / "out" / "tables.tex").read_text()
    assert (tmp_path / "out" / "tables" / "01.csv").read_text().startswith(",CT-RATE AUC")
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [one["system"] for one in told] == ["Good <b>", "Poor"]


def test_systems_with_other_samples_are_not_compared(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", answer("a"), answer("b"))
    write_lines(tmp_path / "b.jsonl", answer("a"), answer("c"))
    out = CliRunner().invoke(app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "-o", str(tmp_path / "out")])  # fmt: skip
    assert isinstance(out.exception, CTInstructError)
    assert "1 only in a (b); 1 only in b (c)" in str(out.exception)
    assert not (tmp_path / "out").exists()


def test_the_papers_tables_have_all_their_cells() -> None:
    for table in PAPER_TABLES.values():
        for name, cells in table.rows.items():
            assert len(cells) == len(table.columns), (table.number, name)
    assert list(PAPER_TABLES) == [3, 4, 5, 6, 7, 8]


def test_our_segmentation_stands_beside_the_papers_with_both_dices(tmp_path: Path) -> None:
    mask = mask_file(tmp_path / "m.nii.gz", cube(2, 6))
    record = Record("a", "segmentation", "ct_org", masks=[{"name": "liver", "prediction": mask, "reference": mask}])
    scores = [score_predictions(Predictions("Mine", [record], tmp_path), bootstraps=20)]
    table = paper_table(8, scores)
    assert table is not None
    assert [row[0] for row in table.rows] == ["SegVol (paper)", "M3D (paper)", "CTInstruct (paper)", "Mine", "Mine, released Dice"]  # fmt: skip
    assert table.rows[-2][-1] == "100.00±0.00"
    assert paper_table(6, scores) is None
    assert any("by item" in one.title for one in all_tables(scores))


def test_a_submission_has_a_report_per_volume(tmp_path: Path) -> None:
    records = [Record(f"valid_{i}_a_1/report-0", "report", "ct_rate", prediction=f"Text {i}.", reference="x") for i in range(3)]  # fmt: skip
    assert write_submission(Predictions("a", records), tmp_path / "out.json") == 3
    told = json.loads((tmp_path / "out.json").read_text())["outputs"][0]["value"]
    assert told[1] == {"input_image_name": "valid_1_a_1", "report": "Text 1."}
    failed = [*records, Record("valid_9_a_1", "report", error="broken")]
    with pytest.raises(CTInstructError, match="1 reports failed"):
        write_submission(Predictions("a", failed), tmp_path / "bad.json")
    assert not (tmp_path / "bad.json").exists()
    with pytest.raises(CTInstructError, match="more than one report: valid_0_a_1"):
        write_submission(Predictions("a", [*records, Record("valid_0_a_1/report-2", "report")]), tmp_path / "bad.json")


def test_an_empty_answer_is_kept() -> None:
    assert json.loads(to_json(Record("a", "question", reference="x")))["prediction"] == ""


def test_one_definition_of_standard_deviation_in_a_file_of_scores() -> None:
    """n − 1 over samples, structures' samples and diseases; none from resampling."""
    dice = [0.2, 0.5, 0.9]
    masks = [
        Record(str(i), "segmentation", "x", masks=[{"name": "liver", "dice": value}]) for i, value in enumerate(dice)
    ]
    scores = score_predictions(Predictions("a", [*masks, *diagnoses()]), 0.5, bootstraps=20)
    segmentation, diagnosis = scores.find("segmentation", "x"), scores.find("diagnosis", "ct_rate")
    assert segmentation is not None
    assert diagnosis is not None
    assert segmentation.metrics["dice_as_given"].sd == pytest.approx(np.std(dice, ddof=1))
    per_disease = [row["f1"] for row in diagnosis.details["per_disease"].values()]
    assert diagnosis.metrics["f1"].sd == pytest.approx(np.std(per_disease, ddof=1))
    assert all(np.isnan(interval.sd) for interval in diagnosis.groups["auc"]["sex"].values())


@pytest.mark.parametrize("dataset", ["ct_rate", "ct_rate_vqa"])
def test_ct_vqa_of_table_7_is_filled_from_the_questions_of_ct_rate(dataset: str) -> None:
    scores = TaskScores("question", dataset, 2, metrics={"rouge1": Interval(0.5, 0.1, 0.4, 0.6, 2)})
    table = paper_table(7, [SystemScores("mine", [scores])])
    assert table is not None
    assert table.rows[-1][:2] == ["mine", "50.00±10.00"]
    assert table.header[1] == "CT-VQA ROUGE-1"


@pytest.mark.parametrize("form", ["../{name}", "sub/../../{name}", "link/{name}", "{folder}/{name}"])
def test_masks_are_read_beside_the_predictions_only(form: str, tmp_path: Path) -> None:
    beside = tmp_path / "run"
    (beside / "sub").mkdir(parents=True)
    (beside / "link").symlink_to(tmp_path)
    mask_file(tmp_path / "mask.nii.gz", cube(2, 6))
    mask_file(beside / "mask.nii.gz", cube(2, 6))
    name = form.format(name="mask.nii.gz", folder=tmp_path)
    with pytest.raises(CTInstructError, match=r"outside of its folder|out of its folder"):
        read_mask_pair({"name": "liver", "prediction": name, "reference": "mask.nii.gz"}, beside)
    pair = {"name": "liver", "prediction": "mask.nii.gz", "reference": name}
    if name.startswith("/"):  # as `evaluate` writes where the data lies
        assert read_mask_pair(pair, beside)[1].sum() == cube(2, 6).sum()
    else:
        with pytest.raises(CTInstructError, match=r"outside of its folder|out of its folder"):
            read_mask_pair(pair, beside)


def test_a_mask_unpacks_to_no_more_than_a_scan_may(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((2000, 2000, 2000))
    header.set_data_dtype(np.uint8)
    (tmp_path / "mask.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(1000)))
    with pytest.raises(CTInstructError, match="would unpack"):
        read_mask_pair({"name": "liver", "prediction": "mask.nii.gz", "reference": ""}, tmp_path)
