"""Tables 3 to 8 of the paper with other systems beside its rows, as Markdown, LaTeX and CSV.

The paper's rows are cited constants (CTInstruct, AAAI 2026, tables 3 to 8), in percent. Its segmentation numbers are the
release's Dice along lines (`released_dice`), so systems scored here show that number beside the ordinary Dice.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .metrics import columns_of, metrics_of
from .scores import SystemScores, TaskScores
from .significance import Interval, paired_test, stars

# (header, task, data set, metric)
Column = tuple[str, str, str, str]
_NAMES = {
    "rp3d_cap": "RP3D-Cap",
    "rp3d_vqa": "RP3D-VQA",
    "ct_rate": "CT-RATE",
    "ct_rate_vqa": "CT-VQA",
    "rad_chestct": "Rad-ChestCT",
    "covid_19": "COVID-19",
    "totalsegmentator": "TotalSegmentator",
    "ct_org": "CT-ORG",
    "abdomen_1k": "Abdomen1K",
}


def _many(task: str, datasets: Sequence[str], metrics: Sequence[tuple[str, str]]) -> list[Column]:
    return [(f"{_NAMES[name]} {header}", task, name, metric) for name in datasets for header, metric in metrics]


_DIAGNOSIS = columns_of("diagnosis")[:4]
_TEXT = columns_of("caption")
_DICE = (("DSC", "dice"),)
_STAGE_ONE = [
    *_many("retrieval", ("rp3d_cap", "ct_rate"), columns_of("retrieval")),
    *_many("diagnosis", ("rad_chestct",), (*_DIAGNOSIS[:3], ("Pre.", "precision"))),
    *_many("segmentation", ("covid_19", "totalsegmentator", "ct_org", "abdomen_1k"), _DICE),
]
_HYBRID_3D = "4.50 8.00 5.00 7.50 5.00 10.00 4.50 9.00 57.44 62.89 44.75 35.62 92.33 98.58 93.38 93.72"


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number, title: as printed.
        columns: what each shows.
        rows: {system: cells as printed, in percent}.
    """

    number: int
    title: str
    columns: list[Column]
    rows: dict[str, list[str]]


def _cells(text: str) -> list[str]:
    return text.split()


PAPER_TABLES: dict[int, PaperTable] = {
    3: PaperTable(3, "Vision encoder pretraining strategy", _STAGE_ONE, {
        "ITC": _cells("3.50 6.00 3.50 7.00 3.50 6.50 4.50 7.00 54.73 55.88 44.10 35.27 68.83 98.04 85.56 91.36"),
        "ITC + Clas.": _cells("3.00 7.00 4.00 8.50 6.50 9.50 3.50 8.00 55.07 56.73 43.78 39.02 87.08 98.32 90.78 93.14"),
        "ITC + Seg.": _cells("6.00 9.00 4.50 7.50 5.00 9.00 5.50 9.00 56.82 57.79 43.95 33.20 91.56 98.44 93.30 93.69"),
        "ITC + Seg. + Clas.": _cells(_HYBRID_3D),
    }),
    4: PaperTable(4, "Vision encoder architecture", _STAGE_ONE, {
        "ResNet3D": _cells("4.00 6.00 2.00 7.00 5.00 10.50 4.50 9.00 54.76 57.60 43.67 33.03 77.46 98.00 83.84 89.10"),
        "ViT3D": _cells("1.50 6.50 2.00 5.50 6.50 14.00 6.50 12.50 56.73 57.51 43.26 33.80 80.18 98.41 88.17 93.16"),
        "Hybrid ResNet-ViT": _cells(_HYBRID_3D),
    }),
    5: PaperTable(5, "Data dimensionality", _STAGE_ONE, {
        "3D": _cells(_HYBRID_3D),
        "2D + 3D": _cells("5.00 9.00 4.50 9.00 4.50 11.00 5.50 10.00 57.22 61.33 46.09 38.46 93.35 99.00 94.74 95.07"),
    }),
    6: PaperTable(6, "Medical diagnosis", _many("diagnosis", ("ct_rate", "rad_chestct"), _DIAGNOSIS), {
        "CT-Net": _cells("50.27±22.75** 38.18±19.52** 29.45±16.73* 20.05±13.23* 51.42±23.94** 41.02±19.81** 39.29±24.76** 28.50±17.92**"),
        "RadFM": _cells("53.78±20.16** 56.05±23.65 25.24±15.61** 24.29±22.07 50.49±21.42** 49.79±20.23** 33.50±23.90** 26.06±24.34**"),
        "CT-Chat": _cells("30.00±26.55** 59.66±17.19 15.51±12.00** 14.95±12.37** 28.74±28.48** 60.13±18.30 18.41±10.31** 19.29±12.13**"),
        "CT-CLIP": _cells("56.49±5.39 40.84±17.25** 32.80±13.69 21.40±10.62* 52.17±3.50** 43.80±17.59** 41.29±22.80 29.47±21.75*"),
        "M3D": _cells("54.92±29.02* 45.14±20.23** 23.59±9.70** 20.32±11.37* 43.09±25.44** 52.53±18.25** 26.96±13.41** 31.85±24.19*"),
        "CTInstruct": _cells("58.47±4.63 56.83±17.70 33.80±13.11 24.78±9.77 59.42±0.06 63.03±0.18 44.87±0.22 37.36±0.20"),
    }),
    7: PaperTable(7, "Medical VQA and captions", [
        *_many("question", ("ct_rate_vqa", "rp3d_vqa"), _TEXT), *_many("caption", ("rp3d_cap",), _TEXT)], {
        "RadFM": _cells("15.44±14.08** 11.12±10.38** 14.26±12.83** 25.97±21.77** 14.52±11.21** 16.25±12.40** 16.49±7.74* 12.23±7.46* 11.57±5.47*"),
        "CT-Chat": _cells("58.40±39.26 49.41±40.41** 31.12±28.97** 8.80±7.41** 1.93±1.41** 9.23±8.05** 4.43±3.21** 2.95±2.63** 2.64±1.95**"),
        "M3D": _cells("17.12±15.24** 10.15±9.46** 11.60±8.84** 37.40±33.88* 33.64±30.82** 25.36±21.55 19.51±13.64 14.90±12.80 14.32±13.15"),
        "CTInstruct": _cells("59.11±34.98 54.01±35.87 55.87±34.82 40.66±34.68 37.36±24.63 26.58±21.89 18.65±7.07 15.89±7.63 15.33±5.65"),
    }),
    8: PaperTable(8, "Medical segmentation", _many("segmentation", ("totalsegmentator", "abdomen_1k", "ct_org"), _DICE), {
        "SegVol": _cells("44.28 79.06 77.78"),
        "M3D": _cells("59.70 73.37 81.01"),
        "CTInstruct": _cells("98.07±4.40 96.39±3.47 93.03±8.16"),
    }),
}  # fmt: skip


@dataclass
class Table:
    """Cells as text, ready to be written."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        escape = [
            [cell.replace("|", "\\|").replace("**", "\\*\\*") for cell in row] for row in [self.header, *self.rows]
        ]
        lines = [f"**{self.title}**", "", "| " + " | ".join(escape[0]) + " |", "|" + "---|" * len(self.header)]
        lines += ["| " + " | ".join(row) + " |" for row in escape[1:]]
        return "\n".join([*lines, "", *self.notes, ""])

    def latex(self) -> str:
        special = {ord(character): f"\\{character}" for character in "&%_#${}"} | {
            ord("±"): "$\\pm$",
            ord("–"): "--",
            ord("\\"): "\\textbackslash{}",
        }

        def clean(cell: str) -> str:
            return cell.translate(special)

        lines = [
            "\\begin{table}",
            "\\centering",
            "\\small",
            f"\\begin{{tabular}}{{l{'c' * (len(self.header) - 1)}}}",
            "\\toprule",
        ]
        lines += [" & ".join(clean(cell) for cell in self.header) + " \\\\", "\\midrule"]
        lines += [" & ".join(clean(cell) for cell in row) + " \\\\" for row in self.rows]
        caption = " ".join([self.title + ".", *self.notes])
        return "\n".join(
            [*lines, "\\bottomrule", "\\end{tabular}", f"\\caption{{{clean(caption)}}}", "\\end{table}", ""]
        )

    def csv(self) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.header, *self.rows])
        return out.getvalue()


def percent(interval: Interval | None, mark: str = "") -> str:
    """ "57.44±4.63*": percent, mean ± standard deviation if known."""
    if interval is None or np.isnan(interval.mean):
        return "–"
    spread = "" if np.isnan(interval.sd) else f"±{100 * interval.sd:.2f}"
    return f"{100 * interval.mean:.2f}{spread}{mark}"


def significance(scores: TaskScores | None, best: TaskScores | None, metric: str) -> str:
    """The paper's stars where a system differs from `best`, by a paired test on the same samples."""
    if scores is None or best is None or scores is best:
        return ""
    first, second = scores.per_sample.get(metric), best.per_sample.get(metric)
    if not first or not second:
        return ""
    shared = [name for name in second if name in first]
    return stars(paired_test([first[name] for name in shared], [second[name] for name in shared])) if shared else ""


def _scored(system: SystemScores, task: str, dataset: str) -> TaskScores | None:
    """A system's scores for a column; the paper's CT-VQA is the questions of CT-RATE."""
    return system.find(task, dataset) or (system.find(task, "ct_rate") if dataset == "ct_rate_vqa" else None)


def paper_table(number: int, systems: Sequence[SystemScores]) -> Table | None:
    """A table of the paper with the systems below its rows; None where no system has scores for it."""
    paper = PAPER_TABLES[number]
    filled = [entry for entry in systems if any(_scored(entry, task, dataset) for _, task, dataset, _ in paper.columns)]
    if not filled:
        return None
    table = Table(f"Table {number}: {paper.title}", ["", *(header for header, _, _, _ in paper.columns)])
    table.rows += [[f"{name} (paper)", *cells] for name, cells in paper.rows.items()]
    segments = any(task == "segmentation" for _, task, _, _ in paper.columns)
    for system in filled:
        table.rows.append([system.system, *_row(system, systems[0], paper.columns, {})])
        if segments and any(task.task == "segmentation" for task in system.tasks):
            table.rows.append([f"{system.system}, released Dice", *_row(system, systems[0], paper.columns, {"dice": "released_dice"})])  # fmt: skip
    table.notes.append(f"Percent. Rows marked (paper) are cited from table {number} of CTInstruct (AAAI 2026); the others were scored here.")  # fmt: skip
    if segments:
        table.notes.append("The paper's Dice is the release's, along lines, where an empty line counts as 1: compare it with the rows of released Dice only.")  # fmt: skip
    if len(filled) > 1:
        table.notes.append(f"Stars: differs from {systems[0].system} by a paired permutation test, * p < 0.05, ** p < 0.01.")  # fmt: skip
    return table


def _row(system: SystemScores, first: SystemScores, columns: Sequence[Column], other: dict[str, str]) -> list[str]:
    cells = []
    for _, task, dataset, metric in columns:
        if other and metric not in other:
            cells.append("")
            continue
        wanted = other.get(metric, metric)
        scores = _scored(system, task, dataset)
        mark = significance(scores, _scored(first, task, dataset), wanted)
        cells.append(percent(scores.metrics.get(wanted) if scores else None, mark))
    return cells


def _title(task: str, dataset: str, what: str = "") -> str:
    return f"{task.replace('_', ' ').capitalize()}{what}: {_NAMES.get(dataset, dataset or 'all data')}"


def task_table(task: str, dataset: str, systems: Sequence[SystemScores]) -> Table:
    """All systems on a task of a data set, with 95 % intervals."""
    having = [(system, scores) for system in systems if (scores := system.find(task, dataset))]
    metrics = [
        (header, name) for header, name in columns_of(task) if any(name in scores.metrics for _, scores in having)
    ]
    table = Table(_title(task, dataset), ["", "samples", "failed", *(header for header, _ in metrics)])
    first = having[0][1]
    for system, scores in having:
        cells = []
        for _, name in metrics:
            interval = scores.metrics.get(name)
            cell = percent(interval, significance(scores, first, name))
            if interval is not None and not np.isnan(interval.low):
                cell += f" ({100 * interval.low:.1f}–{100 * interval.high:.1f})"
            cells.append(cell)
        table.rows.append([system.system, str(scores.count), str(len(scores.failed)), *cells])
        table.notes += [f"{system.system}: {note}." for note in scores.notes]
    table.notes.insert(0, "Percent; mean ± standard deviation and, in brackets, a 95 % bootstrap interval.")
    return table


def per_item_table(task: str, dataset: str, systems: Sequence[SystemScores]) -> Table | None:
    """Per disease, structure or finding."""
    having = [(system, scores) for system in systems if (scores := system.find(task, dataset))]
    metric = next((metric for metric in metrics_of(task) if metric.items), None)
    if metric is None:
        return None
    shown, found = metric.items, [(system.system, metric.rows(scores.details)) for system, scores in having]
    names = list(dict.fromkeys(name for _, rows in found for name in rows))
    if not names:
        return None
    header = ["", *(f"{system} {label}" if len(found) > 1 else label for system, _ in found for label, _ in shown)]
    table = Table(_title(task, dataset, " by item"), header)
    for name in names:
        cells = [rows[name].get(metric) if name in rows else None for _, rows in found for _, metric in shown]
        table.rows.append(
            [name, *("–" if value is None or np.isnan(value) else f"{100 * value:.1f}" for value in cells)]
        )
    table.notes.append("Percent.")
    return table


def group_table(task: str, dataset: str, systems: Sequence[SystemScores]) -> Table | None:
    """By scanner, sex, age and slice thickness, where the metadata has them."""
    rows = []
    for system in systems:
        scores = system.find(task, dataset)
        for metric, groupings in (scores.groups if scores else {}).items():
            for key, groups in groupings.items():
                for name, interval in groups.items():
                    bounds = f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"
                    rows.append(
                        [
                            system.system,
                            metric,
                            key.replace("_", " "),
                            name,
                            str(interval.count),
                            percent(interval),
                            bounds,
                        ]
                    )
    if not rows:
        return None
    return Table(
        _title(task, dataset, " by group"),
        ["system", "metric", "group", "", "samples", "mean ± sd", "95 % interval"],
        rows,
    )


def all_tables(systems: Sequence[SystemScores]) -> list[Table]:
    """The paper's tables for which there are scores, then tables per task and data set, by item and by group."""
    tables = [table for number in PAPER_TABLES if (table := paper_table(number, systems))]
    keys = sorted({(task.task, task.dataset) for system in systems for task in system.tasks})
    for task, dataset in keys:
        tables.append(task_table(task, dataset, systems))
        tables += [
            table for table in (per_item_table(task, dataset, systems), group_table(task, dataset, systems)) if table
        ]
    return tables


__all__ = ["PAPER_TABLES", "Table", "all_tables", "paper_table", "percent", "task_table"]
