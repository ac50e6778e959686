"""How findings have grown between two studies of one patient: matched by position after rigid alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK

from ..output.dicom_source import LPS
from ..processing.volume import CTVolume
from .findings import finding_masks, findings_asked

_GRID_MM = 4.0  # of the images that are aligned
_WINDOW = (-1000.0, 1000.0)  # HU
_REACH_MM = 20.0  # between two places of the same finding, beside its own radius
_SHOWN = ("volume_ml", "diameter_mm", "perpendicular_mm", "side", "place_mm")


def compare_studies(now: Any, before: Any, names: str | Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """How each finding of a study has grown since an earlier one; see `compare_findings`.

    Args:
        now, before: studies of the same patient, each by its last scan.
        names: findings; every one of the model's lists by default.

    Raises:
        CTInstructError: for a name that a model does not know.
    """
    asked = findings_asked(now, names)
    measured = [finding_masks(study, asked) for study in (now, before)]
    return compare_findings(now.volume, measured[0], before.volume, measured[1])


def compare_findings(
    volume: CTVolume, found: Mapping[str, Any], earlier_volume: CTVolume, earlier: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Match the components of findings in two scans, and measure what has changed.

    Args:
        volume, earlier_volume: the scans.
        found, earlier: {finding: what `output.measure.measure_finding` gives} in each.

    Returns:
        {finding: a row each component that is in either: {"change": grown, shrunk, unchanged, new or gone; "before", "now":
        volume_ml, diameter_mm … or None; "growth_mm" and "growth_percent" of the longest axial diameter,
        "volume_growth_percent"; None where one is missing}}. Findings that are in neither have no rows.
    """
    listed = {name: (_parts(earlier.get(name)), _parts(found.get(name))) for name in dict.fromkeys([*found, *earlier])}
    aligned = any(old and new for old, new in listed.values())
    transform = align(earlier_volume, volume) if aligned else SimpleITK.Euler3DTransform()
    return {name: _matched(old, new, transform) for name, (old, new) in listed.items()}


def align(earlier: CTVolume, volume: CTVolume) -> SimpleITK.Transform:
    """The rigid motion that takes a place (LPS mm) of the earlier scan to the same place of the patient in the other."""
    fixed, moving = _image(earlier), _image(volume)
    registration = SimpleITK.ImageRegistrationMethod()
    registration.SetMetricAsMattesMutualInformation(32)
    registration.SetMetricSamplingStrategy(registration.RANDOM)
    registration.SetMetricSamplingPercentage(0.2, 1)
    registration.SetInterpolator(SimpleITK.sitkLinear)
    registration.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 100)
    registration.SetOptimizerScalesFromPhysicalShift()
    registration.SetShrinkFactorsPerLevel([3, 1])
    registration.SetSmoothingSigmasPerLevel([2.0, 0.0])
    starts = [
        SimpleITK.CenteredTransformInitializer(fixed, moving, SimpleITK.Euler3DTransform(), way)
        for way in (
            SimpleITK.CenteredTransformInitializerFilter.MOMENTS,
            SimpleITK.CenteredTransformInitializerFilter.GEOMETRY,
        )
    ]
    still = SimpleITK.Euler3DTransform()  # scans of one session share their frame
    still.SetCenter(SimpleITK.Euler3DTransform(starts[0]).GetCenter())
    found = []
    for start in (*starts, still):
        registration.SetInitialTransform(SimpleITK.Euler3DTransform(start), inPlace=False)
        try:
            transform = registration.Execute(fixed, moving)
        except RuntimeError:  # the scans do not overlap from here
            continue
        found.append((registration.GetMetricValue(), transform))
    return min(found, key=lambda one: one[0])[1] if found else still


def _image(volume: CTVolume) -> SimpleITK.Image:
    """HU above air on a coarse grid, in LPS."""
    image = volume.to_sitk(np.clip(volume.hu, *_WINDOW).astype(np.float32) - _WINDOW[0])
    factors = [max(1, round(_GRID_MM / mm)) for mm in image.GetSpacing()]
    return SimpleITK.BinShrink(
        image, [min(factor, size) for factor, size in zip(factors, image.GetSize(), strict=True)]
    )


def _parts(measured: Any) -> list[dict[str, Any]]:
    return [] if measured is None else measured["components"]


def _matched(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], transform: SimpleITK.Transform
) -> list[dict[str, Any]]:
    """Rows of one finding: pairs that lie nearest to each other, then what is left."""
    moved = [np.array(transform.TransformPoint((LPS @ one["centre_mm"]).tolist())) for one in old]
    places = [LPS @ np.array(one["centre_mm"]) for one in new]
    apart = sorted(
        (float(np.linalg.norm(first - second)), i, j)
        for i, first in enumerate(moved)
        for j, second in enumerate(places)
    )
    pairs: dict[int, int] = {}
    for distance, i, j in apart:
        reach = _REACH_MM + max(old[i]["diameter_mm"], new[j]["diameter_mm"]) / 2
        if distance <= reach and i not in pairs and j not in pairs.values():
            pairs[i] = j
    rows = [_row(old[i], new[j]) for i, j in sorted(pairs.items())]
    rows += [_row(one, None) for i, one in enumerate(old) if i not in pairs]
    return rows + [_row(None, one) for j, one in enumerate(new) if j not in pairs.values()]


def _row(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "change": "new" if old is None else "gone",
        "before": None if old is None else {key: old[key] for key in _SHOWN},
        "now": None if new is None else {key: new[key] for key in _SHOWN},
        "growth_mm": None,
        "growth_percent": None,
        "volume_growth_percent": None,
    }
    if old is not None and new is not None:
        growth = round(new["diameter_mm"] - old["diameter_mm"], 1)
        row |= {
            "change": "grown" if growth > 0 else "shrunk" if growth < 0 else "unchanged",
            "growth_mm": growth,
            "growth_percent": round(100 * growth / old["diameter_mm"], 1),
            "volume_growth_percent": round(100 * (new["volume_ml"] / old["volume_ml"] - 1), 1),
        }
    return row


__all__ = ["align", "compare_findings", "compare_studies"]
