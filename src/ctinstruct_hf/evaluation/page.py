"""A self-contained HTML page of all systems: the tables, Dice by structure, ROC curves, reliability."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import whole_folder, write_whole
from .scores import SystemScores
from .significance import deviation
from .tables import Table, all_tables

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1rem;font-size:13px}th,td{border:1px solid #ccc;padding:.25rem .5rem;text-align:left}
th{background:#f2f4f7}.wide{overflow-x:auto}.note{color:#555;font-size:13px}.banner{background:#fff3cd;padding:.5rem 1rem;border-radius:4px}
img{max-width:100%}
"""


def write_comparison(systems: Sequence[SystemScores], folder: Path, pictures: bool = True) -> list[Table]:
    """Tables in Markdown, LaTeX and CSV, pictures as PNG, `scores.json`, and `index.html` with everything.

    Args:
        systems: the others are tested against the first.
        folder: appears when it is whole.
        pictures: draw them, where matplotlib is installed.

    Returns:
        The tables.
    """
    tables = all_tables(systems)
    drawn = draw_all(systems) if pictures else {}
    with whole_folder(folder) as draft:
        (draft / "tables.md").write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")
        (draft / "tables.tex").write_text("\n".join(table.latex() for table in tables), encoding="utf-8")
        (draft / "tables").mkdir()
        for number, table in enumerate(tables, start=1):
            (draft / "tables" / f"{number:02d}.csv").write_text(table.csv(), encoding="utf-8")
        for name, (_, picture) in drawn.items():
            (draft / f"{name}.png").write_bytes(picture)
        scores = [_plain(system.to_dict()) for system in systems]
        (draft / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
        (draft / "index.html").write_text(_page(systems, tables, drawn), encoding="utf-8")
    return tables


def write_scores(scores: SystemScores, path: Path) -> None:
    """The scores of a system as JSON; NaN is null."""
    write_whole(path, json.dumps(_plain(scores.to_dict()), indent=1))


def _plain(value: Any) -> Any:
    """Values that JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def draw_all(systems: Sequence[SystemScores]) -> dict[str, tuple[str, bytes]]:
    """{name: (what it shows, PNG)}; empty without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    found: dict[str, tuple[str, bytes]] = {}
    for task, dataset in sorted({(task.task, task.dataset) for system in systems for task in system.tasks}):
        having = [(run.system, scores) for run in systems if (scores := run.find(task, dataset)) and scores.details]
        what = dataset or "all data"
        if task == "segmentation" and any(scores.details.get("_per_structure") for _, scores in having):
            found[f"dice_{what}"] = (f"Dice by structure, {what}", _dice_picture(having))
        if task == "diagnosis" and having:
            found[f"roc_{what}"] = (f"ROC curves, {what}", _roc_picture(having))
            found[f"reliability_{what}"] = (f"Reliability, {what}", _reliability_picture(having))
    return {name.replace(" ", "_").replace("/", "_"): drawing for name, drawing in found.items()}


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()


def _dice_picture(having: Sequence[tuple[str, Any]]) -> bytes:
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for _, scores in having for name in scores.details["_per_structure"]))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(names) * max(len(having), 1)))
    step = 0.8 / len(having)
    for number, (system, scores) in enumerate(having):
        rows = scores.details["_per_structure"]
        values = [rows.get(name, []) for name in names]
        at = np.arange(len(names)) + number * step
        means = [np.mean(dice) if dice else 0 for dice in values]
        spread = [deviation(dice) if dice else 0 for dice in values]
        axes.barh(at, means, step * 0.9, xerr=spread, label=system, error_kw={"lw": 0.7})
    axes.set_yticks(np.arange(len(names)) + 0.4 - step / 2, names)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_xlabel("Dice, mean ± standard deviation")
    axes.legend(loc="lower right")
    return _png(figure)


def _roc_picture(having: Sequence[tuple[str, Any]]) -> bytes:
    import matplotlib.pyplot as plt
    from sklearn.metrics import roc_curve

    figure, all_axes = plt.subplots(1, len(having), figsize=(5.2 * len(having), 5), squeeze=False)
    for axes, (system, scores) in zip(all_axes[0], having, strict=True):
        for column, name in enumerate(scores.details["_names"]):
            truth, score = scores.details["_labels"][:, column], scores.details["_probabilities"][:, column]
            known = truth >= 0
            if len(set(truth[known])) == 2:
                false, true, _ = roc_curve(truth[known], score[known])
                area = scores.details["per_disease"][name]["auc"]
                axes.plot(false, true, lw=1, label=f"{name} {area:.2f}")
        axes.plot([0, 1], [0, 1], "k:", lw=0.7)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title=system, aspect="equal")
        if len(axes.lines) > 1:
            axes.legend(fontsize=6, loc="lower right")
    return _png(figure)


def _reliability_picture(having: Sequence[tuple[str, Any]]) -> bytes:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5))
    axes.plot([0, 1], [0, 1], "k:", lw=0.7)
    for system, scores in having:
        bins = scores.details["calibration"]["bins"]
        ece = scores.details["calibration"]["ece"]
        axes.plot([row["confidence"] for row in bins], [row["frequency"] for row in bins], "o-", ms=4, label=f"{system}, ECE {ece:.3f}")  # fmt: skip
    axes.set(xlabel="probability", ylabel="how often it is there", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(fontsize=8)
    return _png(figure)


def _page(systems: Sequence[SystemScores], tables: Sequence[Table], drawn: dict[str, tuple[str, bytes]]) -> str:
    safe = html.escape
    parts = ["<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"]
    parts += [f"<title>Comparison</title><style>{_STYLE}</style>", "<h1>Comparison</h1>"]
    parts += ["<p class='banner'>Research use only. Nothing here is a diagnosis.</p>"]
    parts += ["<p>" + safe(", ".join(system.system for system in systems)) + "</p>"]
    for system in systems:
        failed = [(task.task, name) for task in system.tasks for name in task.failed]
        if failed:
            listed = ", ".join(f"{name} ({task})" for task, name in failed[:50])
            parts.append(f"<p class='note'>{safe(system.system)}: {len(failed)} samples failed: {safe(listed)}</p>")
    for table in tables:
        parts.append(f"<h2>{safe(table.title)}</h2><div class='wide'><table><tr>")
        parts += [f"<th scope='col'>{safe(cell)}</th>" for cell in table.header]
        for row in table.rows:
            parts.append(f"</tr><tr><th scope='row'>{safe(row[0])}</th>")
            parts += [f"<td>{safe(cell)}</td>" for cell in row[1:]]
        parts.append("</tr></table></div>")
        parts += [f"<p class='note'>{safe(note)}</p>" for note in table.notes]
    for what, picture in drawn.values():
        data = base64.b64encode(picture).decode()
        parts.append(f"<h2>{safe(what)}</h2><img alt='{safe(what, quote=True)}' src='data:image/png;base64,{data}'>")
    return "\n".join([*parts, "</html>\n"])


__all__ = ["draw_all", "write_comparison", "write_scores"]
