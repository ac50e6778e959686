"""How far the bundled model's answers in 8 and 4 bits are from float32: the table of docs/model.md, in Markdown.

python scripts/quantized_answers.py [--phantoms 3 4 5 6 7 8]
"""

from __future__ import annotations

import argparse

import torch

from ctinstruct_hf import Study
from ctinstruct_hf.data.phantoms import make_phantom
from ctinstruct_hf.inference.models import load_model

SHAPE = (32, 96, 96)
TOKENS = 24


def answers(study: Study) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A report, the probabilities of all findings of phantoms, and the mask of the liver."""
    probabilities = torch.tensor(list(study.diagnose("phantom").values()))
    return study.report(max_new_tokens=TOKENS), probabilities, study.mask_logits(["liver"]) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantoms", type=int, nargs="+", default=list(range(3, 9)), help="their seeds")
    seeds = parser.parse_args().phantoms
    volumes = [make_phantom(seed, shape=SHAPE).volume for seed in seeds]
    found = {}
    for quantize in (None, "int8", "int4"):
        model, processor = load_model(None, "cpu", quantize=quantize)
        found[quantize] = [answers(Study(volume, model, processor)) for volume in volumes]
    print(
        "| | probabilities: mean difference | largest | voxels that differ, % | same reports |\n|---|---|---|---|---|"
    )
    for quantize in ("int8", "int4"):
        pairs = list(zip(found[quantize], found[None], strict=True))
        differences = torch.stack([(ours[1] - full[1]).abs() for ours, full in pairs])
        voxels = torch.stack([(ours[2] != full[2]).float().mean() for ours, full in pairs])
        same = sum(ours[0] == full[0] for ours, full in pairs)
        print(
            f"| {quantize} | {differences.mean():.4f} | {differences.max():.3f} | {100 * voxels.mean():.4f} | {same} of {len(pairs)} |"
        )


if __name__ == "__main__":
    main()
