"""The page as a reader works with it: several studies, measurements, corrections, and who cannot see or use a mouse."""

# ruff: noqa: F811
from __future__ import annotations

import io
import json
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from axe_playwright_python.sync_playwright import Axe
from pages import browser, canvas, keep, needs_browser, open_scan, page, scan, server, tab  # noqa: F401  # fixtures
from playwright.sync_api import Page, expect
from running import Running
from scans import asymmetric, dicom_series
from typer.testing import CliRunner

from ctinstruct_hf import Study, cli
from ctinstruct_hf.data.importing import import_own
from ctinstruct_hf.data.prepared import load_rows
from ctinstruct_hf.phantoms import phantom_of

pytestmark = needs_browser
REPORT = "Findings: A 12 mm nodule is seen. No effusion is seen. Impression: Lung nodule."


@pytest.fixture
def marked(page: Page, scan: Path, server: Running) -> Any:
    """An open study that was asked for masks, a report and probabilities."""
    open_scan(page, scan)
    one = server.engine.studies[page.evaluate("page.study.study")]
    truth = phantom_of("phantom:trunk:1000003").masks
    for name in ("right lung", "liver"):
        one.study.results.masks[name] = truth[name]
        one.keep_mask(name, truth[name])
    one.label_map.update(one.study.results.masks)
    one.study.results.report = REPORT
    one.study.results.answers.append(("Is there a nodule?", "No."))
    page.evaluate("$('chat').replaceChildren(), restore()")
    expect(page.locator("#masks li")).to_have_count(2)
    return one


def downloaded(page: Page, selector: str) -> bytes:
    with page.expect_download() as download:
        page.locator(selector).click()
    return Path(download.value.path()).read_bytes()


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A stroke on the canvas, in parts of its width and height."""
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    points = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=8)
    page.mouse.up()


@pytest.mark.slow
def test_everything_is_corrected_and_taken_away_as_rows_to_train_on(
    page: Page, marked: Any, server: Running, tmp_path: Path
) -> None:
    # sentences
    tab(page, "report")
    expect(page.locator("#sentences li")).to_have_count(3)
    first = page.locator("#sentences textarea").first
    first.fill("A 15 mm nodule is seen.")
    first.blur()
    expect(page.locator("#sentences .state").first).to_have_text("changed")
    page.get_by_label("Strike: No effusion is seen.").click()
    page.get_by_label("Accept: Lung nodule.").click()
    expect(page.locator("#sentences .state").last).to_have_text("accepted")
    page.wait_for_timeout(300)
    expected = "Findings: A 15 mm nodule is seen.\n\nImpression: Lung nodule."
    assert expected in downloaded(page, "#get-corrected-text").decode()
    assert "## Findings\n\nA 15 mm nodule is seen." in downloaded(page, "#get-corrected-markdown").decode()
    with zipfile.ZipFile(io.BytesIO(downloaded(page, "#get-corrected-word"))) as word:
        assert "A 15 mm nodule is seen." in word.read("word/document.xml").decode()
    saved = json.loads(downloaded(page, "#get-corrected-json"))
    assert saved["original"] == REPORT
    assert saved["corrected"] == expected
    assert [one["state"] for one in saved["sentences"]] == ["changed", "struck", "accepted"]
    # a mask: a stroke of the eraser through the liver
    page.locator("#view").select_option("0")
    tab(page, "masks")
    page.get_by_label("go to liver").click()
    page.get_by_label("correct liver").click()
    expect(page.locator("#editing")).to_be_visible()
    page.get_by_label("Eraser").check()
    drag(page, (0.3, 0.45), (0.5, 0.45))
    page.locator("#undo").click()
    drag(page, (0.3, 0.5), (0.6, 0.5))
    page.locator("#keep").click()
    expect(page.locator("#masks li")).to_have_count(3, timeout=20_000)
    masks = marked.study.results.masks
    model, edited = masks["liver"], masks["liver (edited)"]
    assert not (edited & ~model).any()
    assert 0 < (model & ~edited).sum() < model.sum() / 2
    assert len(np.unique(np.nonzero(model & ~edited)[0])) == 1  # a slice
    row = page.locator("#masks li").last
    expect(row).to_contain_text(f"liver (edited): {marked.masks['liver (edited)']['volume_ml']:.1f} ml")
    expect(page.get_by_label("show liver", exact=True)).not_to_be_checked()
    # a finding
    name = page.evaluate("Object.keys(page.model.disease_lists).map(key => page.model.disease_lists[key])[0][0]")
    page.evaluate(f"$('table').append(verdict({json.dumps(name)}))")
    tab(page, "findings")
    page.get_by_label(f"{name}, by the reader").select_option("present")
    page.wait_for_timeout(300)
    # rows
    tab(page, "save")
    (tmp_path / "taken").mkdir()
    with zipfile.ZipFile(io.BytesIO(downloaded(page, "#get-corrections"))) as packed:
        packed.extractall(tmp_path / "taken")
    summary = import_own(tmp_path / "taken" / "corrections.jsonl", tmp_path / "data")
    assert summary["rows"] == {"instructions": {"train": 3}}
    rows = {row["task"]: row for row in load_rows(tmp_path / "data", "instructions", "train")}
    assert rows["report"]["messages"][1]["content"][0]["text"] == expected
    assert rows["diagnosis"]["labels"] == [{"name": name, "value": 1}]
    (mask,) = rows["segmentation"]["masks"]
    assert mask["name"] == "liver"
    stored = np.asarray(nib.load(mask["path"]).dataobj)
    assert stored.shape == nib.load(rows["segmentation"]["images"][0]["path"]).shape
    assert int(stored.sum()) == int(edited.sum())
    # ten steps of tuning, and the tuned model answers
    recipe = {
        **{"output_dir": str(tmp_path / "run"), "cache": str(tmp_path / "cache"), "model": "bundled"},
        **{"freeze": ["vision_tower", "bridger"], "mixture": [{"name": "mine", "dataset": str(tmp_path / "data")}]},
        **{"max_steps": 10, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    ended = CliRunner().invoke(cli.app, ["instruct", str(tmp_path / "mine.yaml")])
    assert ended.exit_code == 0, ended.output
    tuned = Study.open(tmp_path / "taken" / "scan.nii", str(tmp_path / "run" / "model"), device="cpu")
    assert tuned.segment("liver").any()
    assert tuned.report(max_new_tokens=8)
    # a reload finds all of it
    page.reload()
    expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=30_000)
    expect(page.locator("#sentences .state").nth(1)).to_have_text("struck")
    expect(page.locator("#masks li")).to_have_count(3)


def test_distance_angle_and_hu_are_measured_on_the_picture(page: Page, tmp_path: Path) -> None:
    hu = np.full((60, 60, 20), -100, np.int16)
    hu[20:40, 20:40] = 60  # 40 x 40 mm in the middle of every slice
    image = nib.Nifti1Image(hu, np.diag([2.0, 2.0, 3.0, 1.0]))
    nib.save(image, tmp_path / "block.nii.gz")
    open_scan(page, tmp_path / "block.nii.gz")
    page.locator("#view").select_option("0")
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    side = min(box["width"], box["height"])  # the picture, 120 mm
    scale = page.evaluate("(() => { const s = page.viewer.screenSlices[0]; return s.leftTopWidthHeight[2] / s.fovMM[0] / devicePixelRatio; })()")  # fmt: skip
    centre = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def click(across: float, down: float) -> None:
        page.mouse.click(centre[0] + across * scale, centre[1] + down * scale)

    assert 100 * scale < side
    page.locator("#tool").select_option("distance")
    click(-15, 0)
    click(15, 0)
    page.locator("#tool").select_option("angle")
    for point in ((0, -20), (0, 0), (20, 0)):
        click(*point)
    page.locator("#tool").select_option("circle")
    click(0, 0)
    click(10, 0)
    found = page.locator("#measured li").all_inner_texts()
    assert float(found[0].removeprefix("distance: ").removesuffix(" mm")) == pytest.approx(30, abs=1)
    assert float(found[1].removeprefix("angle: ").removesuffix("°")) == pytest.approx(90, abs=2)
    assert found[2].startswith("circle: 60 ± 0 HU, ")
    click(20, 0)
    click(30, 0)  # half inside, half outside
    words = page.locator("#measured li").last.inner_text()
    mean, sd = (int(part) for part in words.removeprefix("circle: ").split(" HU")[0].split(" ± "))
    assert (mean, sd) == (pytest.approx(-20, abs=25), pytest.approx(80, abs=8))
    expect(page.locator("#drawn circle")).to_have_count(2)
    page.locator("#slice").fill("2")  # drawn where it was measured, and nowhere else
    expect(page.locator("#drawn circle")).to_have_count(0)
    page.locator("#clear").click()
    expect(page.locator("#measured li")).to_have_count(0)


def test_diameters_of_findings_are_drawn_where_they_lie(page: Page, scan: Path, server: Running) -> None:
    open_scan(page, scan)
    one = server.engine.studies[page.evaluate("page.study.study")]
    name = page.evaluate("Object.values(page.model.disease_lists)[0][0]")
    mask = np.zeros(one.study.volume.shape, bool)
    mask[30, 50:60, 40:45] = True
    one.study.results.masks[name] = mask
    numbers = one.keep_mask(name, mask)
    one.label_map.update(one.study.results.masks)
    page.evaluate("drawMasks()")
    tab(page, "masks")
    page.get_by_label(f"go to {name}").click()
    expect(page.locator("#drawn polyline")).to_have_count(2)
    lengths = [math.dist(*line) for line in numbers["lines_mm"]]
    expect(page.locator("#drawn text")).to_have_text(f"{lengths[0]:.0f} × {lengths[1]:.0f} mm")
    page.locator("#diameters").uncheck()
    expect(page.locator("#drawn polyline")).to_have_count(0)


@pytest.mark.slow
def test_studies_are_tabs_and_the_fifth_asks_which_to_close(page: Page, server: Running, tmp_path: Path) -> None:
    def scan_of(name: str) -> Path:
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(asymmetric((16, 16, 16)).astype(np.int16), np.diag([3.0, 3.0, 3.0, 1.0])), path)
        return path

    for number, name in enumerate("abcd", start=1):
        page.locator("#files").set_input_files(scan_of(name))
        expect(page.locator("#facts")).to_contain_text(f"{name}.nii.gz")
        expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=30_000)
        expect(page.locator("#studies button[aria-label]")).to_have_count(number)
        page.locator("#other").click()
    first = page.evaluate("known()[0].study")
    page.locator("#files").set_input_files(scan_of("e"))
    expect(page.locator("#dialog")).to_contain_text("Which one is closed?")
    page.get_by_role("button", name="Close 1: a.nii.gz").click()
    expect(page.locator("#facts")).to_contain_text("e.nii.gz", timeout=30_000)
    expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=30_000)
    assert first not in server.engine.studies
    page.get_by_role("button", name="b.nii.gz", exact=True).click()
    expect(page.locator("#facts")).to_contain_text("b.nii.gz")
    page.go_back()
    expect(page.locator("#facts")).to_contain_text("e.nii.gz")
    # dropped over an open study: asked first
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File(["x"], "letter.txt"));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }""")
    expect(page.locator("#dialog")).to_contain_text("Open what was dropped")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#study")).to_be_visible()
    for name in "bcde":
        page.get_by_role("button", name=f"Close {name}.nii.gz").click()
        page.get_by_role("button", name="Close", exact=True).click()
    expect(page.locator("#open")).to_be_visible()


def test_a_list_of_series_shows_pictures_and_why_others_cannot_be_opened(page: Page, tmp_path: Path) -> None:
    for number, description in enumerate(("soft", "lung"), start=1):
        dicom_series(tmp_path / description, asymmetric((5, 32, 32)), SeriesInstanceUID=f"1.2.{number}", SeriesNumber=number, SeriesDescription=description)  # fmt: skip
    (other,) = sorted((tmp_path / "soft").iterdir())[:1]
    data = pydicom.dcmread(other)
    data.Modality, data.SeriesInstanceUID, data.SeriesDescription = "MR", "1.2.9", "brain"
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    data.save_as(tmp_path / "soft" / "mr.dcm")
    page.locator("#files").set_input_files(sorted(path for path in tmp_path.rglob("*") if path.is_file()))
    expect(page.locator("#series button")).to_have_count(2, timeout=30_000)
    assert page.locator("#series img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 8)")
    expect(page.locator("#series .skipped")).to_contain_text("brain: is no CT image")
    page.locator("#series button").first.press("Enter")
    expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=30_000)


@pytest.mark.slow
def test_an_answer_is_streamed_stopped_beside_it_and_asked_again(page: Page, marked: Any, server: Running) -> None:
    tab(page, "ask")
    with marked.lock:
        page.get_by_text("Questions to start with").click()
        page.locator("#suggested button").nth(1).click()
        stop = page.locator("#chat #cancel")  # beside the answer
        expect(stop).to_be_visible()
        expect(page.locator("#progress")).to_contain_text(" s")
    expect(page.locator("#chat .said").last).not_to_have_text("…", timeout=60_000)
    expect(stop).to_have_count(0, timeout=60_000)
    asked = page.locator("#chat .asked").all_inner_texts()
    assert asked[1].startswith("Is there ")
    page.locator("#chat .turn").last.get_by_text("Ask again").click()
    expect(page.locator("#chat .asked")).to_have_count(3)
    expect(page.locator("#chat .said").last).not_to_have_text("…", timeout=60_000)
    # what the server sends while it writes
    study = page.evaluate("page.study.study")
    job = server.client.post(f"/api/studies/{study}/jobs", json={"kind": "ask", "question": "What is seen?"}).json()
    with server.client.stream("GET", f"/api/jobs/{job['job']}/events") as events:
        states = [json.loads(line.removeprefix("data: ")) for line in events.iter_lines() if line]
    assert states[-1]["status"] == "done"
    assert states[-1]["text"] == states[-1]["result"]["answer"]
    assert all(states[-1]["text"].startswith(one["text"]) for one in states)


@pytest.mark.slow
def test_no_rule_of_axe_is_broken_in_either_theme(page: Page, marked: Any) -> None:
    axe = Axe()
    for scheme, size in (("light", (1280, 720)), ("dark", (375, 800))):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": size[0], "height": size[1]})
        for name in ("findings", "ask", "masks", "report", "save"):
            tab(page, name)
            found = axe.run(page)
            assert found.violations_count == 0, found.generate_report()
    page.locator("#other").click()
    found = axe.run(page)
    assert found.violations_count == 0, found.generate_report()


def test_picture_and_answers_are_in_view_and_the_viewer_is_dark(page: Page, marked: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 720})
    boxes = [page.locator(one).bounding_box() for one in (".screen", ".side", "#slice")]
    assert all(box and box["y"] >= 0 and box["y"] + box["height"] <= 720 for box in boxes)
    assert boxes[0]["width"] * boxes[0]["height"] > 0.4 * 1280 * 720  # type: ignore[index]
    assert page.evaluate("document.documentElement.scrollHeight") <= 720
    assert page.evaluate("getComputedStyle(document.querySelector('.viewer')).backgroundColor") == "rgb(16, 21, 27)"
    page.set_viewport_size({"width": 375, "height": 800})
    screen, side = (page.locator(one).bounding_box() for one in (".screen", ".side"))
    assert screen["y"] + screen["height"] <= side["y"]  # type: ignore[index]
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.slow
def test_by_keyboard_alone_from_opening_to_download(page: Page, server: Running) -> None:
    def reach(selector: str) -> None:
        for _ in range(80):
            if page.evaluate(f"document.activeElement.matches({selector!r})"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(selector)

    reach("#sample")
    page.keyboard.press("Enter")
    expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=60_000)
    reach("#tab-findings")
    page.keyboard.press("ArrowRight")
    reach("#question")
    page.keyboard.type("Is there a nodule?")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .said")).not_to_have_text("…", timeout=60_000)
    for _ in range(80):  # back to the tabs
        if page.evaluate("document.activeElement.id") == "tab-ask":
            break
        page.keyboard.press("Shift+Tab")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    reach("#get-findings")
    with page.expect_download(timeout=60_000) as download:
        page.keyboard.press("Enter")
    assert json.loads(Path(download.value.path()).read_text())["answers"][0]["question"] == "Is there a nodule?"


@pytest.mark.slow
def test_five_structures_of_a_large_scan_are_drawn_within_three_seconds(
    page: Page, server: Running, tmp_path: Path
) -> None:
    z, y, x = np.ogrid[:133, :512, :512]
    hu = np.where(((x - 256) / 230) ** 2 + ((y - 256) / 170) ** 2 < 1, 40, -1000).astype(np.int16) + 0 * z
    nib.save(
        nib.Nifti1Image(hu.transpose(2, 1, 0).astype(np.int16), np.diag([-0.7, -0.7, 2.5, 1.0])), tmp_path / "big.nii"
    )
    page.locator("#files").set_input_files(tmp_path / "big.nii")
    expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=120_000)
    one = server.engine.studies[page.evaluate("page.study.study")]
    for number in range(5):
        mask = np.zeros(one.study.volume.shape, bool)
        mask[20:110, 150:350, 60 + 80 * number : 120 + 80 * number] = True
        one.study.results.masks[f"structure {number}"] = mask
        one.keep_mask(f"structure {number}", mask)
    one.label_map.update(one.study.results.masks)
    drawn = "(async () => { {} const gl = page.viewer.gl; gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4)); })()"
    page.evaluate(drawn.replace("{}", ""))  # the scan itself
    start = time.monotonic()
    page.evaluate(drawn.replace("{}", "await drawMasks();"))
    assert time.monotonic() - start < 3


@pytest.mark.slow
def test_the_pictures_of_the_documents(page: Page, scan: Path, server: Running) -> None:
    """What CTINSTRUCT_SCREENSHOTS keeps."""
    page.set_viewport_size({"width": 1280, "height": 720})
    open_scan(page, scan)
    page.locator("#compare").click()
    expect(page.locator("#table table")).to_be_visible(timeout=120_000)
    page.locator("#view").select_option("4")
    page.locator("#table .grounded").first.click()
    canvas(page)
    keep(page, "findings")
    tab(page, "ask")
    for question in ("Is there a pleural effusion?", "What is the main finding?"):
        page.locator("#question").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator("#chat .said").last).not_to_have_text("…", timeout=60_000)
        expect(page.locator("#cancel")).to_be_hidden(timeout=60_000)
    tab(page, "masks")
    for name in ("right lung", "heart", "liver"):
        page.get_by_label(name, exact=True).check()
    page.locator("#mark").click()
    expect(page.get_by_label("show liver", exact=True)).to_be_visible(timeout=120_000)
    tab(page, "ask")
    canvas(page)
    keep(page, "app")
    page.set_viewport_size({"width": 390, "height": 844})
    canvas(page)
    keep(page, "app-phone")
    assert page.faults == []
