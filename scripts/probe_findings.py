"""Whether the tower of a stage-one model knows of a finding, and where: a linear probe on slices at the level of the finding, half of
which it learns from, for the mean and the maximum of the last two maps and for the slice's token.

python scripts/probe_findings.py --model runs/tiny-stage-one/model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ctinstruct_hf import CTInstructForPretraining, CTInstructImageProcessor
from ctinstruct_hf.phantoms import FINDINGS, make_phantom


@torch.no_grad()
def read(tower: torch.nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the probe may look at: {place: [D]} of one slice."""
    seen = tower(pixels, grid, return_dict=True)
    maps = {"last map but one": seen.feature_maps[-2], "last map": seen.feature_maps[-1]}
    means = {f"{name}, mean": one.mean((0, 2, 3)) for name, one in maps.items()}
    highest = {f"{name}, maximum": one.amax((0, 2, 3)) for name, one in maps.items()}
    return {**means, **highest, "token": seen.last_hidden_state.mean(0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--first", type=int, default=950_000, help="seed of the first slice")
    options = parser.parse_args()
    tower = CTInstructForPretraining.from_pretrained(options.model).eval().vision_tower
    processor = CTInstructImageProcessor.from_pretrained(options.model)
    for name in FINDINGS:
        places: dict[str, list[torch.Tensor]] = {}
        labels: list[int] = []
        for number in range(options.slices):
            seed = options.first + number
            phantom = make_phantom(seed, (1, 128, 128), (5, 3, 3), "slice", {name: seed % 2}, through=name)
            rows, _ = processor.prepare(phantom.volume)
            for place, values in read(tower, rows.float(), torch.tensor([[1, 1, 1, 1]])).items():
                places.setdefault(place, []).append(values)
            labels.append(phantom.labels[name])
        half = options.slices // 2
        told = []
        for place, values in places.items():
            seen = torch.stack(values).numpy()
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=500)).fit(
                seen[:half], labels[:half]
            )
            told.append(f"{place} {roc_auc_score(labels[half:], probe.predict_proba(seen[half:])[:, 1]):.2f}")
        print(f"{name}: {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
