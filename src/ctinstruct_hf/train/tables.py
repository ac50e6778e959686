"""The paper's ablations: one recipe a row of tables 3, 4 and 5, and all of them in miniature by one command.

After its own training every row is probed alike: the tower is frozen and the heads are trained on all three tasks, so
that a row whose strategy leaves a head untrained has a number too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.parts import GRAINS, of_slices
from ..errors import CTInstructError
from ..files import write_whole
from .pretrain import pretrain
from .recipe import merge

# table -> row -> (grains, architecture, with slices)
ROWS: dict[int, dict[str, tuple[tuple[str, ...], str, bool]]] = {
    3: {
        "ITC": (("contrastive",), "hybrid", False),
        "ITC + Clas.": (("contrastive", "category"), "hybrid", False),
        "ITC + Seg.": (("contrastive", "segmentation"), "hybrid", False),
        "ITC + Clas. + Seg.": (GRAINS, "hybrid", False),
    },
    4: {
        "ResNet3D": (GRAINS, "resnet3d", False),
        "ViT3D": (GRAINS, "vit3d", False),
        "Hybrid": (GRAINS, "hybrid", False),
    },
    5: {"3D": (GRAINS, "hybrid", False), "2D + 3D": (GRAINS, "hybrid", True)},
}
# the attention layers of a tower, which a recipe gives their own rate; ResNet3D has none
TRANSFORMER = {"hybrid": "vision_tower.attention", "vit3d": "vision_tower.encoder.groups"}
COLUMNS = {
    "ir@5": "IR@5",
    "ir@10": "IR@10",
    "tr@5": "TR@5",
    "tr@10": "TR@10",
    "auc": "AUC",
    "accuracy": "ACC",
    "f1": "F1",
    "precision": "Pre.",
    "dice_structures": "DSC structures",
    "dice_findings": "DSC findings",
}


def recipe_of_row(recipe: dict[str, Any], row: str) -> dict[str, Any]:
    """A recipe as one row of tables 3, 4 or 5 trains it. Raises CTInstructError for an unknown row."""
    rows = {name: change for table in ROWS.values() for name, change in table.items()}
    if row not in rows:
        raise CTInstructError(f"There is no row '{row}': the tables have {', '.join(rows)}.")
    return row_recipe(recipe, *rows[row])


def row_recipe(recipe: dict[str, Any], grains: Sequence[str], architecture: str, slices: bool) -> dict[str, Any]:
    """The recipe of a row: parts keep those of their tasks that the row trains; parts of slices only where it has them."""
    parts = []
    for part in recipe["mixture"]:
        if of_slices(part) and not slices:
            continue
        tasks = [task for task in part.get("tasks", GRAINS) if task in grains]
        if tasks:
            parts.append({**part, "tasks": tasks})
    row = merge(recipe, {"mixture": parts, "vision": {"architecture": architecture}})
    if architecture != "hybrid" and "loss_weights" in row:  # the other towers have no cells
        row["loss_weights"] = {name: weight for name, weight in row["loss_weights"].items() if name != "cells"}
    row["learning_rates"] = {
        TRANSFORMER[architecture] if name == TRANSFORMER["hybrid"] else name: rate
        for name, rate in recipe.get("learning_rates", {}).items()
        if name != TRANSFORMER["hybrid"] or architecture in TRANSFORMER
    }
    return row


def run_table(
    table: int, recipe: dict[str, Any], seeds: Sequence[int] = (0, 1, 2), tell: Callable[[str], None] = print
) -> str:
    """Train every row with every seed and return the table as Markdown, mean ± standard deviation over seeds.

    Runs are kept under `output_dir` by what they train, shared between tables, and done only once; an interrupted one
    goes on.

    Args:
        table: 3, 4 or 5.
        recipe: of one run; its rows differ from it as in `ROWS`.

    Raises:
        CTInstructError: for another table.
    """
    if table not in ROWS:
        raise CTInstructError(f"--table {table}: the paper's ablations are tables {', '.join(map(str, ROWS))}.")
    base = Path(recipe["output_dir"])
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, (grains, architecture, slices) in ROWS[table].items():
        found = []
        for seed in seeds:
            name = f"{architecture}-{'-'.join(one[:3] for one in grains)}{'-2d' if slices else ''}-seed{seed}"
            tell(f"{row}, seed {seed}")
            found.append(_scores(row_recipe(recipe, grains, architecture, slices), recipe, base / name, seed))
        cells = []
        for metric in COLUMNS:
            values = 100 * np.array([scores.get(metric, np.nan) for scores in found])
            deviation = values.std(ddof=1) if len(values) > 1 else 0.0
            cells.append("–" if np.isnan(values).any() else f"{values.mean():.1f} ± {deviation:.1f}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    base.mkdir(parents=True, exist_ok=True)
    write_whole(base / f"table-{table}.md", text)
    return text


def _scores(own: dict[str, Any], recipe: dict[str, Any], folder: Path, seed: int) -> dict[str, float]:
    """Of one row with one seed, after the probe that all rows share."""
    kept = folder / "probe" / "scores.json"
    if not kept.exists():
        if not (folder / "own" / "scores.json").exists():
            pretrain(merge(own, {"output_dir": str(folder / "own"), "seed": seed, "data_seed": seed}))
        volumes = [part for part in recipe["mixture"] if not of_slices(part)]
        probe = merge(recipe, {
            "output_dir": str(folder / "probe"),
            "model": str(folder / "own" / "model"),
            "freeze": ["text_encoder", "vision_tower"],
            "batch_norm": "local",
            "mixture": volumes,
            "max_steps": max(recipe["max_steps"] // 2, 1),
            "seed": seed,
            "data_seed": seed,
        })  # fmt: skip
        probe["learning_rates"] = {name: rate for name, rate in recipe.get("learning_rates", {}).items() if not name.startswith("vision_tower")}  # fmt: skip
        pretrain(probe)
    scores: dict[str, float] = json.loads(kept.read_text())["metrics"]
    return scores
