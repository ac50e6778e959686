"""Dice of a model of either stage on a real labelled scan, by name, on the scan's own grid.

python scripts/segment_real.py --model runs/tiny-stage-one/model --scan ct.nii.gz --labels labels.nii.gz --names label_names.json [--spacing 6 3.4 3.4]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from ctinstruct_hf import CTInstructForPretraining, CTInstructImageProcessor, CTVolume, Study, read_volume
from ctinstruct_hf.data.reading import open_labels
from ctinstruct_hf.evaluation.segmentation import volume_dice
from ctinstruct_hf.inference.study import load_model

# our names -> beginnings of TotalSegmentator's
STRUCTURES = {
    "lungs": ("lung_",),
    "liver": ("liver",),
    "spleen": ("spleen",),
    "right kidney": ("kidney_right",),
    "left kidney": ("kidney_left",),
    "kidneys": ("kidney_right", "kidney_left"),
    "bones": ("vertebrae_", "rib_", "sternum", "hip_", "sacrum", "costal"),
    "spine": ("vertebrae_",),
    "ribs": ("rib_",),
    "heart": ("heart",),
    "aorta": ("aorta",),
    "stomach": ("stomach",),
    "pancreas": ("pancreas",),
}


@torch.no_grad()
def masks_of(folder: Path, volume: CTVolume, spacing: list[float] | None = None) -> dict[str, np.ndarray]:
    """The mask of each of `STRUCTURES`, by a stage-one model or through `<SEG>`."""
    if "CTInstructForPretraining" not in json.loads((folder / "config.json").read_text())["architectures"]:
        return Study(volume, *load_model(str(folder))).segment(list(STRUCTURES))
    model = CTInstructForPretraining.from_pretrained(folder).eval()
    processor = CTInstructImageProcessor.from_pretrained(folder)
    if spacing is not None:  # as `bundle_tiny.py` sets for the bundled model
        processor.target_spacing, processor.antialias = spacing, True
    words = AutoTokenizer.from_pretrained(folder)(list(STRUCTURES), return_tensors="pt", padding=True)
    outputs = model(
        **processor(images=[volume], return_tensors="pt"),
        mask_input_ids=words["input_ids"],
        mask_attention_mask=words["attention_mask"],
    )
    masks = [processor.mask_from_canvas(logits, volume) for logits in outputs.mask_logits]
    return dict(zip(STRUCTURES, masks, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "scan", "labels", "names"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--spacing", type=float, nargs=3, help="mm to bring the scan to, for a stage-one model")
    options = parser.parse_args()
    volume = read_volume(options.scan)
    labels = open_labels(str(options.labels), volume)
    ids = {name: int(key) for key, name in json.loads(options.names.read_text()).items()}
    marked = masks_of(options.model, volume, options.spacing)
    print("| structure | voxels | Dice |\n|---|---|---|")
    for name, beginnings in STRUCTURES.items():
        truth = np.isin(labels, [ids[one] for one in ids if one.startswith(beginnings)])
        if truth.any():
            print(f"| {name} | {int(truth.sum())} | {volume_dice(marked[name], truth):.3f} |")


if __name__ == "__main__":
    main()
