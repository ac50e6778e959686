"""The vision tower as an ONNX file, compared with PyTorch before it is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import CTInstructError, first_line
from ..files import whole_file
from ..modeling.configuration_ctinstruct import CTInstructConfig
from ..modeling.vision_ctinstruct import CTInstructVisionModel
from .folders import adapter_base
from .models import check_weights, load_processor, resolve_model
from .released.checkpoint import read_entries

TOLERANCE = 1e-4  # of every output, absolute and relative
PREFIX = "model.vision_tower."


class ExportedTower(torch.nn.Module):
    """Slices [N, patch height, patch width] and slice_mask bool [N] -> tokens [N, D] and the feature maps [N, C, h, w], of
    one `grid` (Z, Y, X, S)."""

    def __init__(self, tower: CTInstructVisionModel, grid: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.tower = tower
        self.grid = grid

    def forward(self, pixel_values: torch.Tensor, slice_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.tower(pixel_values, [self.grid], slice_mask, return_dict=True)
        return features.last_hidden_state, *features.feature_maps


def export_tower(
    scan: str | Path,
    output: Path,
    model: str | None = None,
    attention: str = "sdpa",
    progress: Callable[[str], None] = lambda step: None,
    revision: str | None = None,
) -> float:
    """Write a model's tower in float32 for scans that lie on their canvas as `scan` does, and compare it with PyTorch there.

    The file's inputs are `pixel_values` and `slice_mask` of the image processor, its outputs `tokens` and `feature_map_0` …;
    its metadata has `patch_grid`, for which alone it stands.

    Args:
        scan: what `read_volume` takes.
        output: the file, `.onnx`.
        model, revision: see `resolve_model`.
        attention: sdpa or eager.
        progress: called with the name of each step.

    Returns:
        The largest difference from PyTorch in any output.

    Raises:
        CTInstructError: where the model, the scan or a library cannot be used, and where the outputs differ by more than 1e-4.
    """
    if attention not in ("sdpa", "eager"):
        raise CTInstructError(f"attention is '{attention}': use sdpa or eager.")
    if output.suffix != ".onnx":
        raise CTInstructError(f"output '{output}' must be a file whose name ends in .onnx.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise CTInstructError(f"The export needs {', '.join(missing)}: pip install 'ctinstruct-hf[onnx]'.")
    folder = resolve_model(model, revision, progress=progress).folder
    processor = load_processor(model, revision)
    tower = read_tower(folder)
    tower.set_attn_implementation(attention)
    batch = processor.image_processor(scan, return_tensors="pt")
    grid = tuple(batch["patch_grid"][0].tolist())
    inputs = {name: batch[name] for name in ("pixel_values", "slice_mask")}
    module = ExportedTower(tower, grid).eval()
    with torch.no_grad(), warnings.catch_warnings(), whole_file(output) as draft:
        warnings.simplefilter("ignore")  # of torch's exporter, on itself
        expected = module(*inputs.values())
        names = ["tokens", *(f"feature_map_{number}" for number in range(len(expected) - 1))]
        progress("exporting")
        program: Any = torch.onnx.export(
            module, tuple(inputs.values()), input_names=list(inputs), output_names=names, dynamo=True, verbose=False
        )
        program.model.metadata_props.update(patch_grid=json.dumps(grid), model=folder.name)
        program.save(draft)
        progress("comparing")
        return compare(draft, inputs, dict(zip(names, expected, strict=True)))


def read_tower(folder: Path) -> CTInstructVisionModel:
    """The tower of a saved model in float32; nothing else of the model is read."""
    if adapter_base(folder) is not None:
        raise CTInstructError(f"{folder} has an adapter only: save it merged into its model, and export that.")
    check_weights(folder)
    tower = CTInstructVisionModel(CTInstructConfig.from_pretrained(folder).vision_config)
    entries = read_entries(folder, plain=False).items()
    tower.load_state_dict(
        {name.removeprefix(PREFIX): entry.read() for name, entry in entries if name.startswith(PREFIX)}
    )
    return tower.float().eval()


def compare(path: Path, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of the file's outputs by ONNX Runtime.

    Raises:
        CTInstructError: where it is beyond `TOLERANCE`, or the file does not run.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(list(expected), {name: value.numpy() for name, value in inputs.items()})
    except Exception as error:  # of the library, which names its own classes
        raise CTInstructError(f"ONNX Runtime cannot run the exported tower: {first_line(error)}.") from error
    largest = 0.0
    for (name, right), left in zip(expected.items(), map(torch.from_numpy, found), strict=True):
        difference = float((left - right).abs().max())
        if not torch.allclose(left, right, atol=TOLERANCE, rtol=TOLERANCE):
            raise CTInstructError(
                f"{name} of the exported tower differs from PyTorch by {difference:.2g}: it is not kept."
            )
        largest = max(largest, difference)
    return largest
