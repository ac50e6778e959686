"""Overlap of masks: volume Dice, the release's Dice along lines (that of the paper's tables), and surface distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CTInstructError
from ..processing.volume import MAX_BYTES, Limits, check_size
from ..processing.volume_arrays import check_npz
from ..processing.volume_files import inside, is_packed


def volume_dice(
    prediction: Any, truth: Any, labels: Sequence[int] | Mapping[str, int] | None = None
) -> dict[Any, float] | float:
    """Dice coefficient over all voxels of a volume, in 0…1.

    Args:
        prediction, truth: masks or label volumes of the same shape.
        labels: label values, or {name: value}, to score each; the volumes are masks without it.

    Returns:
        {label or name: Dice}, or one number for masks. Empty in both: NaN, so that absent structures do not raise a
        mean; empty in one: 0.

    Raises:
        CTInstructError: where the shapes differ.
    """
    predicted, true = _array(prediction), _array(truth)
    if predicted.shape != true.shape:
        raise CTInstructError(f"prediction has shape {predicted.shape}, truth {true.shape}: they must be equal.")
    if labels is None:
        predicted, true = predicted.astype(bool), true.astype(bool)
        return _dice(int((predicted & true).sum()), int(predicted.sum()), int(true.sum()))
    values = dict(labels) if isinstance(labels, Mapping) else {value: value for value in labels}
    # a single pass over the voxels for all labels: sizes on both sides and of the overlap; chunks stay in the CPU's cache
    most = max([0, *values.values()])
    flat = [_labels(array) for array in (predicted, true)]
    sizes = np.zeros((3, most + 1), dtype=np.int64)
    for start in range(0, len(flat[0]), _CHUNK):
        prediction_part, truth_part = (array[start : start + _CHUNK] for array in flat)
        for row, part in enumerate((prediction_part, truth_part, truth_part[prediction_part == truth_part])):
            sizes[row] += np.bincount(part, minlength=most + 1)[: most + 1]
    return {
        name: _dice(int(sizes[2][value]), int(sizes[0][value]), int(sizes[1][value])) for name, value in values.items()
    }


_CHUNK = 2**18


def _labels(array: np.ndarray) -> np.ndarray:
    """Flat whole numbers from 0; what is below counts as background."""
    flat = array.ravel()
    if flat.dtype.kind not in "iu":
        flat = flat.astype(np.int64)
    return np.where(flat < 0, 0, flat) if flat.dtype.kind == "i" and flat.size and int(flat.min()) < 0 else flat


def _dice(overlap: int, predicted: int, true: int) -> float:
    return 2 * overlap / (predicted + true) if predicted + true else float("nan")


def released_dice(prediction: Any, truth: Any, smooth: float = 1e-7) -> float:
    """The release's evaluation: Dice of every line along the first axis, averaged over all lines.

    A line that is empty in both counts as 1, so a small organ scores near 1 even when it is missed: not comparable with
    `volume_dice`.
    """
    predicted, true = _array(prediction).astype(float), _array(truth).astype(float)
    if predicted.shape != true.shape:
        raise CTInstructError(f"prediction has shape {predicted.shape}, truth {true.shape}: they must be equal.")
    overlap = (predicted * true).sum(axis=0)
    total = predicted.sum(axis=0) + true.sum(axis=0)
    return float(((2 * overlap + smooth) / (total + smooth)).mean())


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def surface_scores(
    prediction: Any, truth: Any, spacing: Sequence[float], tolerance: float = 2.0
) -> tuple[float, float]:
    """Normalised surface Dice and the 95th percentile of the Hausdorff distance, by MONAI.

    Args:
        prediction, truth: masks (depth, height, width).
        spacing: mm between voxels in the same order.
        tolerance: mm within which two surfaces agree.

    Returns:
        (NSD in 0…1, HD95 in mm). Empty in both: (NaN, NaN); empty in one: (0, infinity).

    Raises:
        CTInstructError: where the shapes differ, or MONAI is not installed.
    """
    try:
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    except ImportError as error:
        raise CTInstructError("Surface distances need MONAI: pip install 'ctinstruct-hf[eval]'.") from error
    import torch

    predicted, true = _array(prediction).astype(bool), _array(truth).astype(bool)
    if predicted.shape != true.shape:
        raise CTInstructError(f"prediction has shape {predicted.shape}, truth {true.shape}: they must be equal.")
    if not predicted.any() and not true.any():
        return float("nan"), float("nan")
    if not predicted.any() or not true.any():
        return 0.0, float("inf")
    voxels = np.nonzero(predicted | true)
    # cropped to both masks; a voxel of padding keeps surfaces at the border of the box
    box = tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in voxels)
    first, second = (torch.from_numpy(np.pad(mask[box], 1))[None, None].float() for mask in (predicted, true))
    mm = [float(value) for value in spacing]
    nsd = compute_surface_dice(first, second, class_thresholds=[tolerance], include_background=True, spacing=mm, use_subvoxels=True)  # fmt: skip
    hd95 = compute_hausdorff_distance(first, second, include_background=True, percentile=95, spacing=mm)
    return float(nsd[0, 0]), float(hd95[0, 0])


def read_mask_pair(mask: Mapping[str, Any], folder: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """A predicted and a reference mask, bool on the same grid, with mm between their voxels.

    Args:
        mask: {name, prediction: file, reference: file or {path, values}}; files in `folder`, relative to it. A reference
            may also be an absolute path.

    Raises:
        CTInstructError: where a file cannot be read or lies outside of `folder`, or the grids differ.
    """
    reference = mask["reference"]
    labelled = reference if isinstance(reference, dict) else {"path": str(reference)}
    values = [int(value) for value in labelled.get("values") or []]
    predicted, affine = read_prediction(mask, folder)
    path = str(labelled.get("path") or "")
    if not path:  # known to be absent
        truth, other = np.zeros(predicted.shape, bool), affine
    else:
        # absolute: where `evaluate` found it in the data
        named = Path(path) if Path(path).is_absolute() else inside(folder, path, "the file of predictions")
        labels, other = _read_labels(named)
        truth = np.isin(labels, values) if values else labels > 0
    if predicted.shape != truth.shape:
        raise CTInstructError(
            f"{mask['prediction']} has shape {predicted.shape}, its reference {truth.shape}: masks are compared on the scan's grid."
        )
    if affine is not None and other is not None and not np.allclose(affine, other, atol=1e-2):
        raise CTInstructError(f"{mask['prediction']} and its reference {path} have different affines.")
    known = affine if affine is not None else other
    spacing = np.ones(3) if known is None else np.linalg.norm(known[:3, :3], axis=0)
    return predicted > 0, truth, (float(spacing[0]), float(spacing[1]), float(spacing[2]))


def read_prediction(mask: Mapping[str, Any], folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """A predicted mask in its file's axes, and its affine; see `read_mask_pair`."""
    return _read_labels(inside(folder, str(mask["prediction"]), "the file of predictions"))


def _read_labels(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Label values in the file's axes, and its affine where it has one; no more than a volume may unpack to."""
    import nibabel

    if not path.is_file():
        raise CTInstructError(f"mask {path} does not exist.")
    limit = Limits(MAX_BYTES)
    try:
        if path.suffix in (".npy", ".npz"):
            if path.suffix == ".npz":
                check_npz(path, limit)
            loaded = np.load(path, allow_pickle=False, mmap_mode="r")
            array = np.asarray(loaded if path.suffix == ".npy" else loaded[loaded.files[0]])
            check_size(path.name, array.shape, array.itemsize, limit)
            return array, None
        image: Any = nibabel.load(path)
        packed = path.stat().st_size if is_packed(path) else None
        check_size(path.name, image.shape, image.get_data_dtype().itemsize, limit, packed)
        return np.asarray(image.dataobj), image.affine
    except CTInstructError:
        raise
    except Exception as error:
        raise CTInstructError(f"mask {path.name} cannot be read: {error}") from error
