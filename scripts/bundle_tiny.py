"""Makes the bundled checkpoint from a trained stage-two model: half the size in bfloat16, with its code files.

python scripts/bundle_tiny.py -i runs/tiny-reports/model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ctinstruct_hf import CTInstructForConditionalGeneration, CTInstructProcessor
from ctinstruct_hf.data.tiny import write_bundled
from ctinstruct_hf.errors import CTInstructError

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
    write_bundled(target, model, processor)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-i", "--input", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=BUNDLED)
    arguments = parser.parse_args()
    bundle(arguments.input, arguments.output)
    print(f"wrote {arguments.output}")
