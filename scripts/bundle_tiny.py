"""Makes the bundled checkpoint from a trained stage-two model: in bfloat16, without code files, which the package has.

python scripts/bundle_tiny.py -i runs/tiny-reports/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from ctinstruct_hf import CTInstructForConditionalGeneration, CTInstructProcessor
from ctinstruct_hf.errors import CTInstructError
from ctinstruct_hf.inference.calibration import CALIBRATION

BUNDLED = Path(__file__).parents[1] / "src" / "ctinstruct_hf" / "assets" / "ctinstruct-tiny"

# a scan of any slice thickness and voxel size comes to the canvas that the made-up scans of training had, with their noise
SPACING = [6.0, 3.4, 3.4]
NOTE = "The model was trained on made-up scans only: on a patient's scan its words mean little and its masks are rough."


def bundle(source: Path, target: Path) -> None:
    """Write the bundled folder from a trained model's."""
    model = CTInstructForConditionalGeneration.from_pretrained(source)
    if not model.config.trained:
        raise CTInstructError(f"{source} holds random weights: train it first (ctinstruct instruct tiny).")
    model.config.note = NOTE
    processor = CTInstructProcessor.from_pretrained(source)
    processor.image_processor.target_spacing = SPACING
    processor.image_processor.antialias = True
    model.to(torch.bfloat16).save_pretrained(target)  # half the size; loaded as float32 on a CPU
    processor.save_pretrained(target)
    if (source / CALIBRATION).is_file():
        shutil.copyfile(source / CALIBRATION, target / CALIBRATION)
    drop_code(target)


def drop_code(folder: Path) -> None:
    """Remove the code files of a saved model and the `auto_map` entries that name them."""
    for file in folder.glob("*.py"):
        file.unlink()
    for file in folder.glob("*config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
            part.pop("auto_map", None)
        file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-i", "--input", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=BUNDLED)
    arguments = parser.parse_args()
    bundle(arguments.input, arguments.output)
    print(f"wrote {arguments.output}")
