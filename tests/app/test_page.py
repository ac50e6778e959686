"""The page in a real browser."""

# ruff: noqa: F811
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pages import browser, canvas, keep, needs_browser, open_scan, page, scan, server, tab  # noqa: F401  # fixtures
from playwright.sync_api import Page, expect
from running import Running
from scans import as_nifti, asymmetric, dicom_series

from ctinstruct_hf.inference.study import BUNDLED_MODEL, Study, load_model
from ctinstruct_hf.output.colours import css
from ctinstruct_hf.output.report import WINDOWS, picture
from ctinstruct_hf.phantoms import make_phantom, phantom_of
from ctinstruct_hf.processing.volume_reading import read_volume

pytestmark = needs_browser


def test_a_scan_is_opened_asked_marked_and_taken_away(page: Page, scan: Path, server: Running) -> None:
    expect(page.locator("#notice")).to_contain_text("Research use only")
    open_scan(page, scan)
    expect(page.locator("#facts")).to_contain_text("128 × 128 × 64 voxels")
    plain = canvas(page)
    assert plain.std() > 10  # a picture is there
    assert np.abs(plain - plain.mean(axis=2, keepdims=True)).max(axis=2).mean() < 20  # and grey
    page.locator("#window").select_option("lung")
    assert np.abs(canvas(page) - plain).mean() > 3
    page.locator("#window").select_option("soft tissue")
    # ask
    tab(page, "ask")
    page.locator("#question").fill("Is there a pleural effusion?")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .said")).not_to_have_text("…", timeout=60_000)
    assert page.locator("#chat .said").inner_text() != "No answer."
    # a mask
    tab(page, "masks")
    page.get_by_label("right lung", exact=True).check()
    page.locator("#mark").click()
    expect(page.locator("#masks li")).to_have_count(1, timeout=60_000)
    (study,) = [one for one in server.engine.studies.values() if one.study.results.masks]
    masks = study.study.results.masks
    truth = phantom_of("phantom:trunk:1000003").masks["right lung"]
    assert 2 * (masks["right lung"] & truth).sum() > 0.8 * (masks["right lung"].sum() + truth.sum())
    marked = canvas(page)
    changed = np.abs(marked - plain).max(axis=2) > 12
    assert all(mask.any() for mask in masks.values())
    assert changed.mean() > 0.002
    coloured = np.abs(marked - marked.mean(axis=2, keepdims=True)).max(axis=2) > 25
    assert (coloured & changed).sum() > 0.5 * changed.sum()
    page.locator("#opacity").fill("0")
    assert (np.abs(canvas(page) - plain).max(axis=2) > 12).mean() < changed.mean() / 4
    page.locator("#opacity").fill("0.5")
    page.get_by_label("left lung", exact=True).check()
    page.locator("#named").fill("heart, liver")
    page.locator("#mark").click()
    expect(page.locator("#masks li")).to_have_count(4, timeout=60_000)
    # a mask's pixels lie where the server says it is: the cross goes to its largest slice
    page.get_by_label("go to right lung").click()
    # probabilities and report
    tab(page, "findings")
    page.locator("#diagnose").click()
    expect(page.locator("#bars meter").first).to_be_visible(timeout=60_000)
    tab(page, "report")
    page.locator("#report").click()
    expect(page.locator("#text")).not_to_be_empty(timeout=60_000)
    # hover
    page.evaluate("scrollTo(0, 0)")
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    said = set()
    for x in range(4, 10):
        page.mouse.move(box["x"] + box["width"] * 0.05 * x, box["y"] + box["height"] * 0.25)
        said.add(page.locator("#hover").inner_text())
    assert any("HU at" in text for text in said)
    # take away
    tab(page, "save")
    with page.expect_download() as download:
        page.locator("#get-findings").click()
    findings = json.loads(Path(download.value.path()).read_text())
    assert set(findings["segmentation"]) == {"right lung", "left lung", "heart", "liver"}
    assert findings["answers"][0]["question"] == "Is there a pleural effusion?"
    tab(page, "masks")
    with page.expect_download() as download:
        page.get_by_label("download right lung as NIfTI").click()
    assert download.value.suggested_filename == "right_lung.nii.gz"
    taken = scan.parent / "taken.nii.gz"
    download.value.save_as(taken)
    assert int(np.asarray(nib.load(taken).dataobj).sum()) == int(masks["right lung"].sum())
    # scrolling shows other slices
    page.locator("#view").select_option("0")
    before = canvas(page)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for _ in range(5):
        page.mouse.wheel(0, 120)
        page.wait_for_timeout(60)
    assert np.abs(canvas(page) - before).mean() > 1
    page.locator("#close").click()
    page.get_by_role("button", name="Close", exact=True).click()
    expect(page.locator("#open")).to_be_visible()
    deadline = time.monotonic() + 10
    while study in server.engine.studies.values():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_hu_under_the_mouse_is_the_scans(page: Page, tmp_path: Path) -> None:
    """Every axis has its own letters: HU that tell the place, and words that tell the same."""
    depth, height, width = 20, 30, 40
    z, y, x = np.meshgrid(np.arange(depth), np.arange(height), np.arange(width), indexing="ij")
    hu = (x + 40 * y + 1200 * 0 + z * 0).astype(np.int16)
    data = hu.transpose(2, 1, 0)  # i, j, k
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    affine[:3, 3] = [40, 30, -20]
    path = tmp_path / "ramp.nii.gz"
    nib.save(nib.Nifti1Image(data, affine), path)
    open_scan(page, path)
    page.locator("#view").select_option("0")
    page.wait_for_timeout(300)
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    seen = 0
    for across in np.linspace(0.3, 0.7, 7):
        for down in np.linspace(0.2, 0.8, 5):
            page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * down)
            text = page.locator("#hover").inner_text()
            if "HU at" not in text:
                continue
            value, place = text.split(" HU at ")
            numbers = [part.split() for part in place.removesuffix(" mm").split(", ")]
            right = float(numbers[0][0]) * (-1 if numbers[0][1] == "L" else 1)
            front = float(numbers[1][0]) * (-1 if numbers[1][1] == "P" else 1)
            i, j = (right - 40) / -2, (front - 30) / -2
            assert int(value) % 40 == pytest.approx(i, abs=1.1)
            assert int(value) // 40 == pytest.approx(j, abs=1.1)
            seen += 1
    assert seen > 10


def test_sagittal_slices_face_the_way_they_do_in_the_report(page: Page, tmp_path: Path) -> None:
    """The patient's front is bright."""
    hu = np.full((24, 24, 24), -100, np.int16)
    hu[:, :10] = 200
    path = tmp_path / "front.nii.gz"
    nib.save(as_nifti(hu, "RAS", (2.0, 2.0, 2.0)), path)
    report = np.asarray(picture(read_volume(path), [], 2, 12, "soft tissue").convert("L")).astype(int)
    half = report.shape[1] // 2
    assert report[:, :half].mean() > report[:, half:].mean() + 40
    open_scan(page, path)
    page.locator("#view").select_option("2")
    shown = canvas(page).mean(axis=2)
    shown = shown[:, shown.max(axis=0) > 30]  # without the margins
    half = shown.shape[1] // 2
    assert shown[:, :half].mean() > shown[:, half:].mean() + 20


def test_one_of_several_series_is_chosen_from_a_list(page: Page, tmp_path: Path, server: Running) -> None:
    for number, (depth, description) in enumerate(((6, "chest soft <b>"), (9, "chest lung")), start=1):
        dicom_series(tmp_path / description[6:10], asymmetric((depth, 32, 32)), SeriesInstanceUID=f"1.2.{number}", SeriesNumber=number, SeriesDescription=description)  # fmt: skip
    page.locator("#files").set_input_files(sorted(tmp_path.rglob("IM*")))
    choices = page.locator("#series button")
    expect(choices).to_have_count(2, timeout=30_000)
    expect(choices.first).to_contain_text("series 1, chest soft <b>, 6 slices")
    page.locator("#series button[data-uid='1.2.2']").click()
    expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=30_000)
    expect(page.locator("#facts")).to_contain_text("32 × 32 × 9 voxels")
    expect(page.locator("#choose")).to_be_hidden()


def test_masks_are_one_label_map_and_a_reload_brings_everything_back(page: Page, scan: Path, server: Running) -> None:
    open_scan(page, scan)
    one = server.engine.studies[page.evaluate("page.study.study")]
    truth = phantom_of("phantom:trunk:1000003").masks
    one.study.results.answers.append(("Is there a nodule?", "No."))
    one.study.results.report = "Clear lungs."
    one.study.results.diagnosis["nodule"] = 0.25
    for name in ("right lung", "liver"):
        one.study.results.masks[name] = truth[name]
        one.keep_mask(name, truth[name])
    one.label_map.update(one.study.results.masks)
    page.locator("#view").select_option("0")
    plain = canvas(page)
    page.evaluate("drawMasks()")
    tab(page, "masks")
    expect(page.locator("#masks li")).to_have_count(2)
    page.locator("#opacity").fill("1")
    filled = canvas(page)
    page.locator("#outlines").check()
    outlined = canvas(page)
    page.get_by_label("show right lung").uncheck()
    page.get_by_label("show liver").uncheck()
    hidden = canvas(page)
    changed = [(np.abs(picture - plain).max(axis=2) > 12).sum() for picture in (filled, outlined, hidden)]
    assert 0 < changed[1] < changed[0] / 2
    assert changed[2] < changed[1] / 10
    assert page.evaluate("page.viewer.volumes.length") == 1
    colours = page.locator("#masks .swatch").evaluate_all("all => all.map(e => e.getAttribute('style'))")
    assert colours == [f"background:{css(number)}" for number in range(2)]
    assert f"background:{css(1)}" in server.client.get(f"{page.url.split('#')[0]}api/studies/{page.evaluate('page.study.study')}/results/report.html").text  # fmt: skip
    page.reload()
    expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=30_000)
    expect(page.locator("#masks li")).to_have_count(2)
    expect(page.locator("#chat .said")).to_have_text("No.")
    expect(page.locator("#text")).to_have_text("Clear lungs.")
    expect(page.locator("#bars meter")).to_have_count(1)


def test_slices_and_windows_are_reached_by_keys_and_spoken(page: Page, scan: Path) -> None:
    open_scan(page, scan)
    page.locator("#view").select_option("0")
    shown = page.locator("#slice-number")
    page.locator("#canvas").focus()
    for key, expected in {"Home": 1, "ArrowUp": 2, "PageUp": 12, "ArrowDown": 11, "PageDown": 1, "End": 64}.items():
        page.keyboard.press(key)
        expect(shown).to_have_text(f"{expected} / 64")
    page.locator("#slice").fill("20")
    expect(shown).to_have_text("20 / 64")
    expect(page.locator("#cross")).to_contain_text(" HU at ")
    expect(page.locator("#position")).to_contain_text("axial slice 20 of 64, ")
    assert page.locator("#position").get_attribute("aria-live") == "polite"
    page.locator("#canvas").focus()
    for key, window in enumerate(WINDOWS, start=1):
        page.keyboard.press(str(key))
        expect(page.locator("#window")).to_have_value(window)
    page.locator("#view").select_option("2")
    expect(shown).to_contain_text(" / 128")


def test_a_wrong_file_is_a_clear_sentence(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear colleague")
    page.locator("#files").set_input_files(path)
    expect(page.locator("#error")).to_be_visible(timeout=30_000)
    expect(page.locator("#error")).to_contain_text("letter.txt")
    expect(page.locator("#open")).to_be_visible()
    keep(page, "app-error")


def test_work_can_be_cancelled_and_text_is_never_markup(page: Page, scan: Path, server: Running) -> None:
    evil = scan.with_name("<img src=x onerror=document.title='owned'>.nii.gz".replace("/", ""))
    scan.rename(evil)
    open_scan(page, evil)
    one = list(server.engine.studies.values())[-1]  # the page of the test before may still be saying goodbye
    with one.lock:  # the answer cannot come before the click
        tab(page, "ask")
        page.locator("#question").fill("<img src=x onerror=\"document.title='owned'\">")
        page.keyboard.press("Enter")
        expect(page.locator("#cancel")).to_be_visible()
        page.locator("#cancel").click()
    expect(page.locator("#cancel")).to_be_hidden(timeout=20_000)
    expect(page.locator("#chat .said")).to_have_text("Cancelled.")
    assert page.title() == "CTInstruct"
    assert page.locator("#chat img").count() == 0


def test_it_is_usable_on_a_phone_and_by_keyboard(page: Page, scan: Path) -> None:
    page.set_viewport_size({"width": 375, "height": 800})
    open_scan(page, scan)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, select, a[href]')].filter(
            e => !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length))).length"""
    )
    assert unnamed == 0
    tab(page, "ask")
    page.locator("#question").focus()
    page.keyboard.type("Where?")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Ask"
    page.keyboard.press("Enter")
    expect(page.locator("#chat .said")).not_to_have_text("…", timeout=60_000)


def test_the_report_reads_on_a_phone_and_on_paper(browser: Any, tmp_path: Path) -> None:
    """`report.html` of `predict`: one file, nothing cut off, headings in order, every picture described."""
    study = Study(make_phantom(3, shape=(32, 96, 96)).volume, *load_model(str(BUNDLED_MODEL), "cpu"))
    study.report(max_new_tokens=20)
    study.segment(["right lung", "liver"])
    study.diagnose("phantom")
    study.save(tmp_path, asked={"report": True, "structures": ["right lung", "liver"], "diagnose": "phantom"})
    context = browser.new_context(viewport={"width": 375, "height": 700})
    context.set_offline(True)
    page = context.new_page()
    page.goto(f"file://{tmp_path}/report.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt.length > 10)")
    assert page.evaluate("[...document.querySelectorAll('meter')].every(m => m.getAttribute('aria-label'))")
    assert page.locator("th[scope=row]").count() == 2
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    assert paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") < 12
    context.close()
