"""The viewer OHIF beside a real Orthanc shows the masks where they are. CTINSTRUCT_SCREENSHOTS=folder keeps the picture."""

from __future__ import annotations

import io
import json
import mimetypes
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from orthanc import MISSING, Orthanc, is_installed
from pages import BROWSER_OPTIONS, CHROMIUM, SCREENSHOTS, needs_browser
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from scans import dicom_series

from ctinstruct_hf import read_volume
from ctinstruct_hf.output.colours import rgb
from ctinstruct_hf.output.dicom_seg import save_dicom_seg
from ctinstruct_hf.pacs import dicomweb
from ctinstruct_hf.pacs.addresses import parse_address
from ctinstruct_hf.phantoms import phantom_of

VIEWERS = sorted((Path.home() / ".cache" / "ctinstruct_hf" / "ohif").glob("*/index.html"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason=MISSING),
    needs_browser,
    pytest.mark.skipif(not VIEWERS, reason="OHIF is not installed: scripts/install_ohif.sh"),
]
SOURCE = {
    "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
    "sourceName": "orthanc",
    "configuration": {
        "name": "orthanc",
        "qidoRoot": "/dicom-web",
        "wadoRoot": "/dicom-web",
        "wadoUriRoot": "/wado",
        "imageRendering": "wadors",
        "thumbnailRendering": "wadors",
        "enableStudyLazyLoad": True,
        "bulkDataURI": {"enabled": True},
        "omitQuotationForMultipartRequest": True,
    },
}
CONFIGURATION = {
    "routerBasename": None,
    "extensions": [],
    "modes": [],
    "defaultDataSourceName": "orthanc",
    "dataSources": [SOURCE],
    "disableConfirmationPrompts": True,
    "investigationalUseDialog": {"option": "never"},
}
VIEWPORT = "cornerstone.getRenderingEngines()[0].getViewports()[0]"
STEPS = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]


@contextmanager
def viewer(folder: Path, archive: str) -> Iterator[str]:
    """The address of a server of OHIF's files, below which `/dicom-web` is the archive's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/dicom-web"):
                headers = {key: self.headers[key] for key in ("Accept",) if key in self.headers}
                try:
                    with urllib.request.urlopen(urllib.request.Request(archive + self.path, headers=headers)) as answer:
                        self.answer(answer.status, answer.headers["Content-Type"], answer.read())
                except urllib.error.HTTPError as error:
                    self.answer(error.code, "text/plain", b"")
            elif path == "/app-config.js":
                self.answer(200, "text/javascript", f"window.config = {json.dumps(CONFIGURATION)};".encode())
            else:
                file = folder / path.lstrip("/")
                file = file if file.is_file() else folder / "index.html"  # the page reads the address itself
                self.answer(200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", file.read_bytes())

        def answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type or "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def go_to(page: Page, z: float) -> None:
    """Show the slice at z (LPS mm)."""
    place = "cornerstone.metaData.get('imagePlaneModule', id).imagePositionPatient[2]"
    page.evaluate(
        f"{VIEWPORT}.setImageIdIndex({VIEWPORT}.getImageIds().findIndex(id => Math.abs({place} - {z}) < 0.1))"
    )


def shown(page: Page) -> np.ndarray:
    """The pixels of the viewport: float [height, width, 3]."""
    page.wait_for_timeout(1500)
    picture = page.locator("[data-cy=viewport-pane] canvas").first.screenshot()
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(float)


def test_a_segmentation_is_shown_over_its_scan_where_it_is_and_in_its_colours(tmp_path: Path) -> None:
    phantom = phantom_of("phantom:trunk:3")
    depth, height, width = phantom.volume.spacing
    spacing = {"PixelSpacing": [height, width], "SliceThickness": depth, "WindowCenter": 40, "WindowWidth": 400}
    series = dicom_series(tmp_path / "ct", phantom.volume.hu, step=(0.0, 0.0, depth), **spacing)
    volume = read_volume(series)
    masks = {name: phantom.masks[name] for name in ("liver", "right lung", "left lung", "heart", "spine")}
    masks["heart"] = masks["heart"] & ~masks["liver"]
    save_dicom_seg(volume, masks, tmp_path / "seg.dcm")
    k = int(np.prod([mask.sum(axis=(1, 2)) for mask in masks.values()], axis=0).argmax())  # a slice that has all
    rows, columns = (axis.ravel() for axis in np.indices(volume.shape[1:]))
    places = volume.affine @ np.stack([columns, rows, np.full(rows.size, k), np.ones(rows.size)])
    world = (places[:3] * [[-1], [-1], [1]]).T.tolist()
    orthanc = Orthanc(tmp_path / "server")
    try:
        orthanc.add(series)
        dicomweb.store([tmp_path / "seg.dcm"], parse_address(f"dicomweb+{orthanc.web}"))
        with viewer(VIEWERS[-1].parent, orthanc.rest) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_OPTIONS)
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"{address}/viewer?StudyInstanceUIDs=1.2.3.4")
            page.get_by_text("Skip all").click()
            page.get_by_text(f"1/{len(phantom.volume.hu)}").first.wait_for()
            go_to(page, world[0][2])
            pixels = np.round(page.evaluate(f"{world}.map(point => {VIEWPORT}.worldToCanvas(point))")).astype(int)
            plain = shown(page)
            page.locator("[data-cy=study-browser-thumbnail-no-image]").dblclick()
            page.wait_for_function("services.segmentationService.getSegmentations().length")
            (found,) = page.evaluate(
                "services.segmentationService.getSegmentations().map(one => Object.values(one.segments).map(s => s.label))"
            )
            go_to(page, world[0][2])
            marked = shown(page)
            if SCREENSHOTS:
                page.locator("[data-cy=panelSegmentation-btn]").click()
                page.wait_for_timeout(3000)
                page.screenshot(path=Path(SCREENSHOTS) / "ohif.png")
            browser.close()
    finally:
        orthanc.close()
    assert found == list(masks)
    before, after = (picture[pixels[:, 1], pixels[:, 0]] for picture in (plain, marked))
    assert before.std() > 40  # a CT in its window
    for number, mask in enumerate(masks.values()):
        inside = mask[k].ravel()
        assert inside.sum() > 20
        towards = np.array(rgb(number)) - before[inside]
        share = ((after - before)[inside] * towards).sum(1) / (towards**2).sum(1)
        rest = np.linalg.norm(after[inside] - before[inside] - share[:, None] * towards, axis=1)
        assert share.min() > 0.45  # half of the mask's colour, all of it at its edge
        assert rest.max() < 3  # and of no other
    any_mask = np.pad(np.any([mask[k] for mask in masks.values()], axis=0), 1)
    near = np.any([np.roll(any_mask, step, (0, 1)) for step in STEPS], axis=0)[1:-1, 1:-1]
    changed = np.abs(after - before).max(axis=1) > 8
    assert changed[~near.ravel()].mean() < 0.001  # nothing else, but for the letter at the top
