"""`report.html`: one self-contained page that a person reads, prints, or opens on a phone."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw

from .._version import __version__
from ..processing.volume import CTVolume
from .colours import css, rgb
from .measure import diameter_lines, key_place
from .results import Origin, Results

WINDOWS = {
    "lung": (-1350.0, 150.0),
    "soft tissue": (-160.0, 240.0),
    "bone": (-450.0, 1050.0),
    "liver": (-45.0, 105.0),
    "all tissue": (-1024.0, 1024.0),
}
PICTURE_SIDE = 420
_PLANES = {"S": "Axial", "I": "Axial", "P": "Coronal", "A": "Coronal", "L": "Sagittal", "R": "Sagittal"}

_STYLE = """
:root { color-scheme: light; font-family: system-ui, sans-serif; line-height: 1.5; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: #1b1f24; background: #fff; }
.notice { background: #fff3cd; border: 1px solid #d9a400; border-radius: .4rem; padding: .6rem .9rem; font-weight: 600; }
.warning { background: #fdecea; border: 1px solid #c0392b; border-radius: .4rem; padding: .4rem .9rem; margin-top: .5rem; }
h1 { font-size: 1.5rem; margin: .8rem 0 .2rem; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .4rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt { color: #57606a; } dd { margin: 0; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; flex: 1 1 18rem; max-width: 26rem; } figure img { width: 100%; height: auto; background: #000; border-radius: .3rem; }
figcaption { font-size: .88rem; color: #424a53; } .key { white-space: nowrap; margin-right: .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #d0d7de; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; border: 1px solid #555; }
.bar { display: grid; grid-template-columns: minmax(9rem, 16rem) 1fr 3rem; gap: .6rem; align-items: center; margin: .15rem 0; }
.bar meter { width: 100%; height: 1rem; } blockquote { margin: .3rem 0 1rem; padding-left: .8rem; border-left: 3px solid #8c959f; }
.text { white-space: pre-wrap; } footer { margin-top: 2rem; font-size: .85rem; color: #57606a; }
.contradiction td, .contradiction th { background: #fdecea; } .contradiction th::before { content: "▲ "; } figure:target { outline: 3px solid #4f9dff; } tr:target { outline: 2px solid #4f9dff; }
a.grounded { color: inherit; text-decoration: underline dotted; }
a:focus-visible { outline: 3px solid #4f9dff; }
@media screen and (prefers-color-scheme: dark) {
:root { color-scheme: dark; } body { color: #e6edf3; background: #0d1117; } .notice { background: #4d3a00; } .warning { background: #4b1512; }
dt, figcaption, footer { color: #a5b0bb; } th, td { border-color: #3d444d; } a { color: #79b8ff; } a.grounded { color: inherit; }
.contradiction td, .contradiction th { background: #4b1512; }
}
@media print { body { max-width: none; } .notice { position: static; } h2 { break-after: avoid; } figure { break-inside: avoid; max-width: 45%; } .bar, tr { break-inside: avoid; } }
"""


def write_page(results: Results, volume: CTVolume, origin: Origin, findings: dict[str, Any], path: Path) -> None:
    """Write the page of one study; everything from the scan or the model is escaped."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>CTInstruct: {escape(findings['source'] or 'scan')}</title><style>{_STYLE}</style></head><body><main>",
        '<p class="notice" role="note">Research use only. This is not a diagnosis.</p>',
        *(f'<p class="warning" role="note">{escape(note)}</p>' for note in findings["warnings"]),
        f"<h1>{escape(findings['source'] or 'Scan')}</h1>",
        facts(volume, origin, results.fitness),
    ]
    rows = findings["findings"]
    pictured = {name for name, numbers in findings["segmentation"].items() if numbers["voxels"]}
    if rows:
        parts += ["<h2>Findings and agreement</h2>", findings_table(rows, pictured)]
    parts += ["<h2>Pictures</h2>", pictures(volume, results.masks, origin.diseases, rows)]
    if findings["asked"]:
        parts += ["<h2>What was asked</h2>", asked(findings["asked"])]
    if findings["report"] is not None:
        text = grounded_report(findings["report"], rows, pictured) or "<em>The model wrote nothing.</em>"
        parts += ["<h2>Report</h2>", f'<p class="text" id="report">{text}</p>']
    if findings["answers"]:
        parts.append("<h2>Questions</h2>")
        for pair in findings["answers"]:
            answer = escape(pair["answer"]) or "<em>no answer</em>"
            parts.append(
                f'<p><strong>{escape(pair["question"])}</strong></p><blockquote class="text">{answer}</blockquote>'
            )
    if findings["diagnosis"]:
        parts += ["<h2>Probabilities</h2>", bars(findings["diagnosis"])]
    if findings["segmentation"]:
        parts += ["<h2>Structures</h2>", structure_table(findings["segmentation"], _labels(path.parent))]
    parts.append(
        f"</main><footer>Made by ctinstruct-hf {__version__}. Head or front is up. Left in a picture is the patient's right, "
        "in sagittal pictures the patient's front.</footer></body></html>"
    )
    path.write_text("\n".join(parts), encoding="utf-8")


def _labels(folder: Path) -> dict[str, int]:
    """The values of the structures in the label map of a folder of results; {} without one."""
    sidecar = folder / "masks" / "labels.json"
    return json.loads(sidecar.read_text(encoding="utf-8"))["labels"] if sidecar.is_file() else {}


def escape(text: Any) -> str:
    """Text that cannot become markup."""
    return html.escape(str(text), quote=True)


def facts(volume: CTVolume, origin: Origin, fitness: dict[str, Any] | None = None) -> str:
    """Scan and settings, in a few lines."""
    depth, height, width = volume.shape
    rows = {
        "Scan": f"{depth} x {height} x {width} voxels (depth, height, width), "
        + " x ".join(f"{mm:.2f}" for mm in volume.spacing)
        + " mm",
        **origin.facts,
    }
    if fitness is not None:
        percentile = fitness["percentile"]
        share = "" if percentile is None else f", farther than {percentile:.0f} % of held-out scans"
        rows["Fit to the model"] = "; ".join([f"{fitness['state']}{share}", *fitness["unusual"]])
    return (
        '<dl class="facts">' + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows.items()) + "</dl>"
    )


def asked(request: dict[str, Any]) -> str:
    """The request in words."""
    drafts = request.get("consensus") or 1
    lines = ["a report" + (f", of {drafts} drafts" if drafts > 1 else "")] if request.get("report") else []
    lines += ["the table of findings"] if request.get("findings") else []
    lines += [f"\u201c{question}\u201d" for question in request.get("questions") or []]
    if request.get("structures"):
        lines.append("masks of " + ", ".join(request["structures"]))
    if request.get("diagnose"):
        lines.append(f"probabilities: {str(request['diagnose']).replace('_', ' ')}")
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def anchor(name: str) -> str:
    """The id of what belongs to a finding on the page."""
    return re.sub(r"\W+", "-", name).strip("-") or "finding"


def findings_table(rows: dict[str, dict[str, Any]], pictured: Container[str] = ()) -> str:
    """Each finding with what every source says, those that contradict themselves first; a name leads to its picture where
    there is one, what the report says to its sentence."""
    lines = []
    order = {"consistent": 2, "unchecked": 1}
    for name, row in sorted(
        rows.items(), key=lambda item: (order.get(item[1]["agreement"], 0), -(item[1]["probability"] or 0))
    ):
        wrong = row["agreement"] not in order
        link = anchor(name)
        title = f'<a href="#picture-{link}">{escape(name)}</a>' if name in pictured else escape(name)
        words = escape(row["report"])
        sentence = f'<a href="#sentence-{link}">{words}</a>' if row["sentences"] else words
        number = "–" if row["probability"] is None else f"{row['probability']:.2f}"
        style = ' class="contradiction"' if wrong else ""
        lines.append(
            f'<tr id="finding-{link}"{style}><th scope="row">{title}</th><td class="number">{number}</td>'
            f"<td>{sentence}</td><td>{escape(row['answer']) or '–'}</td><td>{escape(mask_words(row['mask']))}</td>"
            f"<td>{escape('; '.join([('contradiction: ' if wrong else '') + row['agreement'], *row['remarks']]))}</td></tr>"
        )
    heads = ("Finding", "Probability", "Report", "Asked directly", "Mask", "Agreement")
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    return f'<div class="scroll"><table class="findings"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def mask_words(mask: dict[str, Any] | None) -> str:
    """What a mask measures, in a line."""
    if mask is None:
        return "–"
    if not mask["voxels"]:
        return "empty"
    count = len(mask["components"])
    words = [f"{mask['volume_ml']:.1f} ml", f"{mask['diameter_mm']:.0f} x {mask['perpendicular_mm']:.0f} mm"]
    words += [f"{mask['mean_hu']:.0f} ± {mask['sd_hu']:.0f} HU", f"{count} parts" if count > 1 else "1 part"]
    side = f"{mask['side']} side" if mask["side"] != "both" else "both sides"
    organ = mask["organ"]
    words.append(side if organ is None else organ if mask["side"] in organ else f"{organ}, {side}")
    return ", ".join(words)


def grounded_report(report: str, rows: dict[str, dict[str, Any]], pictured: Container[str] = ()) -> str:
    """The report as HTML; a sentence that states a finding with a mask shows its size and leads to its picture where there is
    one."""
    spans: dict[tuple[int, int], list[str]] = {}
    for name, row in rows.items():
        for one in row["sentences"]:
            spans.setdefault((one["start"], one["end"]), []).append(name)
    parts, done, marked = [], 0, set()
    for (start, end), names in sorted(spans.items()):
        if start < done:
            continue
        first = [name for name in names if name not in marked]
        marked.update(first)
        text = "".join(f'<span id="sentence-{anchor(name)}"></span>' for name in first) + escape(report[start:end])
        there = [
            name
            for name in names
            if rows[name]["report"] == "present" and rows[name]["mask"] and rows[name]["mask"]["voxels"]
        ]
        if there:
            title = "; ".join(f"{name}: {mask_words(rows[name]['mask'])}" for name in there)
            seen = [name for name in there if name in pictured]
            link = f' href="#picture-{anchor(seen[0])}"' if seen else ""
            text = f'<a class="grounded"{link} title="{escape(title)}">{text}</a>'
        parts += [escape(report[done:start]), text]
        done = end
    return "".join([*parts, escape(report[done:])])


def bars(probabilities: dict[str, float]) -> str:
    """Probabilities as bars, the likeliest first."""
    lines = []
    for name, value in sorted(probabilities.items(), key=lambda item: -item[1]):
        label = escape(name)
        lines.append(
            f'<div class="bar"><span>{label}</span><meter min="0" max="1" value="{value:.4f}" '
            f'aria-label="{label}: {value:.0%}"></meter><span>{value:.2f}</span></div>'
        )
    return "\n".join(lines)


def structure_table(segmentation: dict[str, dict[str, Any]], labels: dict[str, int]) -> str:
    """Volume and mean HU of every structure, where the scan cuts it off, and its value in a label map if there is one."""
    lines = []
    for index, (name, numbers) in enumerate(segmentation.items()):
        label = f'<td class="number">{labels.get(name, "–")}</td>' if labels else ""
        unknown = "" if numbers["known"] else " (unknown to the model)"
        mean = "–" if numbers["mean_hu"] is None else f"{numbers['mean_hu']:.0f}"
        file = f'<a href="{escape(numbers["file"])}">{escape(numbers["file"])}</a>' if numbers["file"] else ""
        lines.append(
            f'<tr><th scope="row">{swatch(index)}{escape(name)}{unknown}</th>{label}<td class="number">{numbers["volume_ml"]:.1f}</td>'
            f'<td class="number">{mean}</td><td class="number">{numbers["voxels"]}</td>'
            f"<td>{', '.join(numbers['cut_off'])}</td><td>{file}</td></tr>"
        )
    label_head = '<th scope="col" class="number">Label</th>' if labels else ""
    head = f'<tr><th scope="col">Structure</th>{label_head}<th scope="col" class="number">Volume (ml)</th><th scope="col" class="number">Mean HU</th><th scope="col" class="number">Voxels</th><th scope="col">Cut off at</th><th scope="col">File</th></tr>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def pictures(
    volume: CTVolume, masks: dict[str, np.ndarray], findings: Sequence[str] = (), rows: Container[str] = ()
) -> str:
    """Key slices: three planes through the largest finding, or the middle of the scan, then each structure where it is
    largest, findings first, with a link to its row in the table."""
    depth, height, width = volume.shape
    # masks are looked at one after the other, and only their shown planes are kept: they may be packed, and many
    places = {name: key_place(mask) for name, mask in masks.items() if mask.any()}
    marked = [name for name in findings if name in places]
    # a finding is shown where it is longest, with the diameters that the table gives
    diameters = {name: diameter_lines(masks[name], volume.spacing) for name in marked}
    places |= {name: (level, *places[name][1:]) for name, (level, _) in diameters.items()}
    centre = (depth // 2, height // 2, width // 2)
    where = "the middle of the scan"
    if marked:
        largest = max(marked, key=lambda name: int(masks[name].sum()))
        centre = places[largest]
        where = f"the {largest}"
    slices = {(axis, centre[axis]) for axis in range(3)} | {(0, place[0]) for place in places.values()}
    shown: list[tuple[str, Any]] = [(name, _Planes(mask, slices)) for name, mask in masks.items()]
    planes = dict(shown)
    figures = []
    for axis in range(3 if depth > 1 else 1):
        title = f"{plane_of(volume, axis)} through {where}"
        figures.append(_figure(volume, shown, axis, centre[axis], "soft tissue", title))
    figures.append(_figure(volume, shown, 0, centre[0], "lung", f"{plane_of(volume, 0)} through {where}"))
    for name in [*marked, *(name for name in places if name not in marked)]:
        best, lines = places[name][0], diameters.get(name, (0, []))[1]
        inside = float(volume.hu[best][planes[name].take(best, axis=0)].mean())
        window = "lung" if inside < -300 else "bone" if inside > 180 else "soft tissue"
        caption = f"{name}, where it is largest" + (f": slice {best + 1} of {depth} from the feet" if depth > 1 else "")
        if lines:
            longest, across = (np.linalg.norm(np.subtract(start, end) * volume.spacing[1:]) for start, end in lines)
            caption += f", {longest:.0f} x {across:.0f} mm"
        figures.append(_figure(volume, shown, 0, best, window, caption, anchor(name), name in rows, lines))
    return f'<div class="pictures">{"".join(figures)}</div>'


class _Planes:
    """Some planes of a mask, packed; `numpy.take` finds them by (axis, index)."""

    def __init__(self, mask: np.ndarray, slices: Iterable[tuple[int, int]]) -> None:
        planes = {(axis, index): np.take(mask, index, axis=axis) for axis, index in slices}
        self.shapes = {place: plane.shape for place, plane in planes.items()}
        self.bits = {place: np.packbits(plane) for place, plane in planes.items() if plane.any()}

    def take(self, index: int, axis: int, out: None = None, mode: str = "raise") -> np.ndarray:
        shape = self.shapes[axis, index]
        if (axis, index) not in self.bits:
            return np.zeros(shape, bool)
        return np.unpackbits(self.bits[axis, index], count=shape[0] * shape[1]).view(bool).reshape(shape)


def plane_of(volume: CTVolume, axis: int) -> str:
    """The plane of the pictures across an axis (0 depth, 1 height, 2 width) of the volume."""
    if volume.source.kind == "picture":
        return "Picture"  # it does not say
    return _PLANES[axis_codes(volume)[axis]]


def axis_codes(volume: CTVolume) -> str:
    """Where each axis (depth, height, width) leads: SPL for volumes, I among them for an upright slice."""
    return "".join(nib.aff2axcodes(volume.affine)[::-1])


def _figure(
    volume: CTVolume,
    masks: list[tuple[str, np.ndarray]],
    axis: int,
    index: int,
    window: str,
    caption: str,
    link: str = "",
    in_table: bool = False,
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> str:
    """One picture with its legend; what is outlined is said in words too."""
    seen = [(number, name) for number, (name, mask) in enumerate(masks) if np.take(mask, index, axis=axis).any()]
    words = f"{caption}, {window} window"
    outlined = f"; outlined: {', '.join(name for _, name in seen)}" if seen else ""
    legend = "".join(f'<span class="key">{swatch(number)}{escape(name)}</span> ' for number, name in seen)
    if in_table:
        legend += f'<a href="#finding-{link}">in the table</a>'
    mark = f"picture-{link}" if link else None
    return figure(picture(volume, masks, axis, index, window, lines), f"{words}{outlined}", words, legend, mark)


def swatch(number: int) -> str:
    return f'<span class="swatch" style="background:{css(number)}"></span>'


def figure(image: Image.Image, description: str, caption: str, legend: str = "", place: str | None = None) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    mark = "" if place is None else f' id="{place}"'
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure{mark}><img alt="{escape(description)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}<br>{legend}</figcaption></figure>"
    )


def picture(
    volume: CTVolume,
    masks: list[tuple[str, np.ndarray]],
    axis: int,
    index: int,
    window: str,
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> Image.Image:
    """One slice in a window with the outlines of masks, in the scan's aspect in mm; head or front up, the patient's right, in
    sagittal slices the front, on the left. `lines` are drawn over it, as pairs of (row, column) in voxels."""
    low, high = WINDOWS[window]
    plane = np.take(volume.hu, index, axis=axis).astype(np.float32)
    spacing = [mm for place, mm in enumerate(volume.spacing) if place != axis]
    grey = np.clip((plane - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    tall, wide = grey.shape[0] * spacing[0], grey.shape[1] * spacing[1]
    scale = PICTURE_SIDE / max(tall, wide)
    size = (max(1, round(wide * scale)), max(1, round(tall * scale)))
    flip = axis_codes(volume)[1 if axis == 0 else 0] == "S"  # rows run from the feet up there
    image = np.asarray(
        Image.fromarray(grey[::-1] if flip else grey).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    ).copy()
    for number, (_, mask) in enumerate(masks):
        part = np.take(mask, index, axis=axis)
        if part.any():
            _draw_outline(image, part[::-1] if flip else part, rgb(number))
    drawn = Image.fromarray(image)
    across = np.array(image.shape[:2]) / grey.shape
    for line in lines:
        ends = (np.array(line) + 0.5) * across  # of (row, column); the middle of a voxel is its place
        if flip:
            ends[:, 0] = image.shape[0] - ends[:, 0]
        ImageDraw.Draw(drawn).line([(float(x), float(y)) for y, x in ends], fill="white", width=2)
    return drawn


def _draw_outline(image: np.ndarray, part: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw the outline of a mask's plane into a picture [rows, columns, 3] of it; only where the mask is."""
    target, source = [], []
    for axis in range(2):
        ratio = part.shape[axis] / image.shape[axis]
        inside = np.flatnonzero(part.any(axis=1 - axis))
        first = max(0, int(inside[0] / ratio) - 2)
        last = min(image.shape[axis], int((inside[-1] + 1) / ratio) + 3)
        target.append(slice(first, last))
        source.append((first * ratio, last * ratio))
    (top, bottom), (left, right) = source
    size = (target[1].stop - target[1].start, target[0].stop - target[0].start)
    large = Image.fromarray(part.astype(np.uint8) * 255).resize(
        size, Image.Resampling.BILINEAR, (left, top, right, bottom)
    )
    image[target[0], target[1]][outline(np.asarray(large) > 127)] = colour


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that touch its outside."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
