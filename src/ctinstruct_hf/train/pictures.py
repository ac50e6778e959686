"""What is logged while stage one trains: a picture of masks and a table of retrieval, as files and in the trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.alignment import AlignmentScores
from ..files import whole_file, write_whole


def log_scores(trainer: Any, scores: AlignmentScores) -> None:
    """Write `evaluation/step-<n>/` of a run and show the same in TensorBoard and Weights & Biases, where they are used."""
    step = trainer.state.global_step
    folder = Path(trainer.args.output_dir) / "evaluation" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    dice = {name: float(np.mean(values)) for name, values in scores.dice.items()}
    write_whole(folder / "scores.json", json.dumps({"metrics": scores.metrics, "dice": dice}, indent=1))
    picture = draw_masks(scores)
    if picture is not None:
        from PIL import Image

        with whole_file(folder / "masks.png") as temporary:
            Image.fromarray(picture).save(temporary, format="png")
    table = retrieval_table(scores)
    if table:
        write_whole(folder / "retrieval.md", table)
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            if picture is not None:
                writer.add_image("evaluation/masks", picture, step, dataformats="HWC")
            if table:
                writer.add_text("evaluation/retrieval", table, step)
        tracker = getattr(callback, "_wandb", None)
        if tracker is not None and picture is not None:
            tracker.log({"evaluation/masks": tracker.Image(picture)}, commit=False)


def draw_masks(scores: AlignmentScores) -> np.ndarray | None:
    """The masks of the first scored scan, see `tile_masks`; None where none was scored."""
    return None if scores.example is None else tile_masks(*scores.example)


def tile_masks(canvas: np.ndarray, masks: dict[str, tuple[np.ndarray, np.ndarray]], most: int = 12) -> np.ndarray:
    """RGB uint8 [H, W, 3]: of each structure the slice where it is largest; truth green, prediction red, both yellow.

    Args:
        canvas: [D, H, W] in −1…1.
        masks: {structure: (truth, prediction)}, bool [D, H, W] each.
        most: structures that are drawn.
    """
    tiles = []
    for truth, marked in list(masks.values())[:most]:
        depth = int(truth.sum((1, 2)).argmax())
        grey = np.clip((canvas[depth] + 1) / 2 * 2.2 - 0.7, 0, 1) * 255  # a soft tissue window of −1…1
        tile = np.repeat(grey[..., None], 3, axis=-1)
        for channel, mask in ((1, truth[depth]), (0, marked[depth])):
            tile[..., channel] = np.where(mask, 0.5 * tile[..., channel] + 127, tile[..., channel])
        tiles.append(tile.astype(np.uint8))
    columns = min(4, len(tiles))
    rows = -(-len(tiles) // columns)
    tiles += [np.zeros_like(tiles[0])] * (rows * columns - len(tiles))
    return np.concatenate(
        [np.concatenate(tiles[row * columns : (row + 1) * columns], axis=1) for row in range(rows)], axis=0
    )


def retrieval_table(scores: AlignmentScores, most: int = 8) -> str:
    """Markdown: some reports, the rank of their own image among all, and which image came first."""
    if scores.similarity is None:
        return ""
    lines = ["| report | rank of its image | first image |", "|---|---|---|"]
    for row in range(min(most, len(scores.ids))):
        order = np.argsort(-scores.similarity[row])
        rank = int(np.flatnonzero(order == row)[0]) + 1
        text = " ".join(scores.texts[row].split())[:120].replace("|", "/")
        lines.append(f"| {text} | {rank} of {len(order)} | {scores.ids[order[0]]} |")
    return "\n".join(lines) + "\n"
