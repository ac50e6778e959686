"""What the tests of the page share: a browser, a server, a page of it. CTINSTRUCT_SCREENSHOTS=folder keeps the pictures that
the documents show."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from running import Running

from ctinstruct_hf.inference.study import BUNDLED_MODEL
from ctinstruct_hf.phantoms import phantom_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# WebGL 2 in software, as there may be no GPU
BROWSER_OPTIONS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
SCREENSHOTS = os.environ.get("CTINSTRUCT_SCREENSHOTS")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_OPTIONS)
        yield one
        one.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    one = Running(str(BUNDLED_MODEL), new_tokens=160, idle_job=5.0)
    yield one
    one.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1360, "height": 900}, accept_downloads=True)
    context.route(lambda url: not url.startswith((server.address, "blob:", "data:")), lambda route: route.abort())
    one = context.new_page()
    one.faults = []
    one.on("pageerror", lambda error: one.faults.append(str(error)))
    one.on("requestfailed", lambda request: one.faults.append(f"{request.url}: {request.failure}") if "ABORTED" not in str(request.failure) else None)  # fmt: skip
    one.goto(server.address)
    expect(one.locator("body[data-ready]")).to_be_attached()
    yield one
    assert one.faults == []
    context.close()


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "chest.nii.gz"
    volume = phantom_of("phantom:trunk:1000003").volume
    nib.save(volume.to_source(volume.hu), path)
    return path


def keep(page: Page, name: str) -> None:
    if SCREENSHOTS:
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        image.quantize(256).save(Path(SCREENSHOTS) / f"{name}.png", optimize=True)


def canvas(page: Page) -> np.ndarray:
    """The pixels of the viewer as shown."""
    page.mouse.move(5, 5)
    page.wait_for_timeout(400)
    image = Image.open(io.BytesIO(page.locator("#canvas").screenshot()))
    return np.asarray(image.convert("RGB")).astype(int)


def open_scan(page: Page, path: Path) -> None:
    page.locator("#files").set_input_files(path)
    expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=30_000)


def tab(page: Page, name: str) -> None:
    """Show a tab of the answers."""
    page.locator(f"#tab-{name}").click()
