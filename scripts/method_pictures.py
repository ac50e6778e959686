"""The pictures of docs/method.md from a made-up scan:  python scripts/method_pictures.py [docs]"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from ctinstruct_hf.output.colours import COLOURS
from ctinstruct_hf.phantoms import make_phantom
from ctinstruct_hf.processing.image_processing_ctinstruct import CTInstructImageProcessor

BLUE, GREEN, ORANGE, GREY = "#dbeafe", "#dcfce7", "#ffedd5", "#f1f5f9"


def canvas_picture(path: Path) -> None:
    """A scan, its canvas of patches, the slices of a patch, and a mask that came back."""
    phantom = make_phantom(12)
    processor = CTInstructImageProcessor(patch_size={"depth": 32, "height": 128, "width": 128}, max_patches=4)
    fit = processor.fit_of(phantom.volume)
    batch = processor(phantom.volume, return_tensors="np")
    height = phantom.volume.shape[1]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    aspect = phantom.volume.spacing[0] / phantom.volume.spacing[2]
    grey = {"cmap": "gray", "vmin": -250, "vmax": 250}
    axes[0].imshow(phantom.volume.hu[::-1, height // 2], aspect=aspect, **grey)
    axes[0].set_title(f"a scan of any size, here\n{' × '.join(map(str, phantom.volume.shape))} voxels")
    z, y, x, s = (int(side) for side in batch["patch_grid"][0])
    patches = batch["pixel_values"].reshape(z, y, x, s, *batch["pixel_values"].shape[1:])
    whole = patches.transpose(0, 3, 1, 4, 2, 5).reshape(z * s, y * patches.shape[4], x * patches.shape[5])
    axes[1].imshow(whole[::-1, whole.shape[1] // 2], cmap="gray", aspect=whole.shape[2] / whole.shape[0])
    for row in range(z):
        for column in range(x):
            corner = (column * patches.shape[5] - 0.5, row * s - 0.5)
            axes[1].add_patch(Rectangle(corner, patches.shape[5], s, fill=False, color=COLOURS[row], lw=2.5))
    axes[1].set_title(
        f"fitted to a canvas of {z} × {y} × {x} patches\n({' × '.join(map(str, fit.resized))} of it the scan)"
    )
    rows = [patches[0, 0, 0, place] for place in np.linspace(2, s - 3, 6).astype(int)]
    sheet = np.concatenate([np.concatenate(rows[:3], axis=1), np.concatenate(rows[3:], axis=1)])
    axes[2].imshow(sheet, cmap="gray")
    axes[2].set_title(f"each patch is {s} slices;\na ResNet2D reads every one")
    level = int(phantom.masks["liver"].sum(axis=(1, 2)).argmax())
    axes[3].imshow(phantom.volume.hu[level], **grey)
    for number, name in enumerate(("liver", "spleen", "stomach", "right lung", "left lung")):
        if phantom.masks[name][level].any():
            axes[3].contour(phantom.masks[name][level], [0.5], colors=[COLOURS[number]], linewidths=1.5)
    axes[3].set_title("masks come back in the\nscan's own geometry")
    for one in axes:
        one.set_axis_off()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def flow_picture(path: Path) -> None:
    """The parts and what flows between them, for both stages."""
    figure, axis = plt.subplots(figsize=(12, 5.2), layout="constrained")
    axis.set_xlim(0, 12)
    axis.set_ylim(0, 5.2)
    axis.set_axis_off()

    def box(x: float, y: float, text: str, colour: str, width: float = 1.9, height: float = 0.9) -> tuple[float, ...]:
        patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05", fc=colour, ec="#475569")
        axis.add_patch(patch)
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5)
        return x, y, width, height

    def arrow(one: tuple[float, ...], other: tuple[float, ...], text: str = "", bend: float = 0.0) -> None:
        start = (one[0] + one[2] + 0.06, one[1] + one[3] / 2)
        stop = (other[0] - 0.06, other[1] + other[3] / 2)
        axis.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color="#334155", connectionstyle=f"arc3,rad={bend}"))  # fmt: skip
        if text:
            axis.text((start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2 + 0.1, text, fontsize=8.5, ha="center", color="#334155")  # fmt: skip

    patches = box(0.1, 2.3, "patches of slices\n(one grey channel)", GREY)
    resnet = box(2.5, 2.3, "ResNet2D\nevery slice", BLUE)
    attention = box(4.9, 2.3, "attention over\npatches, then slices", BLUE)
    unet = box(4.9, 0.5, "U-Net, and a decoder\nprompted by text", BLUE)
    arrow(patches, resnet)
    arrow(resnet, attention, "last map")
    arrow(resnet, unet, "five maps", -0.1)
    one = box(7.6, 3.9, "stage one: image and text\nalike in one space (ITC)", GREEN, 2.3)
    two = box(7.6, 2.8, "stage one: category\nby its sentence", GREEN, 2.3)
    language = box(7.6, 1.6, "stage two: bridger,\nlanguage model", ORANGE, 2.3)
    masks = box(10.3, 0.5, "masks", GREEN, 1.5)
    words = box(10.3, 1.9, "text,\nprobabilities", ORANGE, 1.5)
    arrow(attention, one, "slice tokens", 0.05)
    arrow(attention, two)
    arrow(attention, language)
    arrow(language, words)
    arrow(unet, masks)
    axis.add_patch(FancyArrowPatch((8.75, 1.54), (6.9, 0.9), arrowstyle="-|>", mutation_scale=12, color="#334155"))
    axis.text(8.1, 0.98, "the state of <SEG> is the prompt\n(stage one: a structure's name)", fontsize=8.5, color="#334155")  # fmt: skip
    axis.text(0.1, 4.6, "the tower runs once a study,\nhowever many questions", fontsize=9.5, color="#334155")
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs")
    canvas_picture(folder / "method-canvas.png")
    flow_picture(folder / "method-flow.png")
    print(f"{folder}/method-canvas.png, {folder}/method-flow.png")
