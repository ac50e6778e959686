"""Draws phantoms beside each other for docs/data.md.

python scripts/phantom_page.py [-o docs/phantoms.png] [--seeds 1 2 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ctinstruct_hf.phantoms import FINDINGS, make_phantom

WINDOWS = {"lung": (-1100, 200), "soft": (-160, 240)}


def show(axes: plt.Axes, picture: np.ndarray, window: str, title: str, aspect: float = 1.0) -> None:
    low, high = WINDOWS[window]
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="bilinear")
    axes.set_title(title, fontsize=8)
    axes.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "docs" / "phantoms.png")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    columns = 6
    rows = len(options.seeds) + -(-len(FINDINGS) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(2 * columns, 2 * rows))
    for axes in grid.flat:
        axes.axis("off")
    for row, seed in enumerate(options.seeds):
        phantom = make_phantom(seed)
        hu, (depth, height, width) = phantom.volume.hu, phantom.volume.spacing
        masks = phantom.masks
        levels = [
            int(np.median(np.nonzero(masks[name].any((1, 2)))[0])) for name in ("kidneys", "liver", "heart", "trachea")
        ]
        for column, (level, window) in enumerate(zip(levels, ("soft", "soft", "soft", "lung"), strict=True)):
            show(grid[row, column], hu[level], window, f"seed {seed}, {phantom.phase}, axial {level}", height / width)
        middle = int(np.median(np.nonzero(masks["heart"].any((0, 2)))[0]))
        show(grid[row, 4], hu[::-1, middle], "soft", "coronal", depth / width)
        show(grid[row, 5], hu[::-1, :, hu.shape[2] // 2], "soft", "sagittal", depth / height)
    for place, finding in enumerate(FINDINGS):
        phantom = make_phantom(7, findings={name: int(name == finding) for name in FINDINGS})
        mask = phantom.masks[finding]
        level = int(mask.sum((1, 2)).argmax())
        axes = grid[len(options.seeds) + place // columns, place % columns]
        show(axes, phantom.volume.hu[level], "lung" if finding in ("lung nodule", "consolidation", "emphysema", "atelectasis") else "soft", finding)  # fmt: skip
        axes.contour(mask[level], [0.5], colors="orange", linewidths=0.7)
    figure.tight_layout(pad=0.3)
    figure.savefig(options.output, dpi=75)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
