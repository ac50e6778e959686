"""From volumes in HU to the batch's `pixel_values`, `patch_grid` and `slice_mask`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .any_resolution import (
    CanvasFit,
    fit_to_canvas,
    labels_on_canvas,
    logits_inside,
    mask_from_canvas,
    place_on_canvas,
)
from .arguments_ctinstruct import CTInstructImageProcessorKwargs
from .image_fetching import content_of, read_content
from .volume import CTInstructError, CTVolume, is_volume
from .volume_reading import read_volume

CHOICES = {
    "fit": ("aspect", "released"),
    "axes": ("anatomical", "file"),
    "intensity": ("window", "zscore", "unit"),
}


class CTInstructImageProcessor(BaseImageProcessor):
    """Fits each volume to a canvas of patches (any resolution) and scales its intensities.

    Args:
        patch_size: voxels {"depth", "height", "width"} of a patch; height and width divide by 32.
        max_patches: the most patches a volume may take.
        fit: `aspect` keeps the aspect of voxels; `released` repeats the release's resize.
        axes: `anatomical` works in the axes of `CTVolume.hu`; `file` takes height, width and depth from the file's
            first, second and third axis as stored (the release).
        intensity: `window` maps `hu_window` to −1…1; `zscore` crops to voxels above 0 HU, clips to the 0.5 and 99.5
            percentiles where the range exceeds 1000 and standardises (the release); `unit` maps the volume's range
            to 0…1.
        hu_window: [low, high] in HU for `window`.
        target_spacing: mm (depth, height, width) that a volume is resampled to before the fit; None keeps the stored.
        antialias: a voxel of a canvas coarser than the volume is a weighted mean of all voxels that it covers (less noise
            from thin slices), instead of linear interpolation between the nearest, as in the release.
        mask_floors: {structure: [mL, logit]}: the structure's mask is empty unless more than that volume of the scan has
            a higher logit. From `ctinstruct calibrate`; {} turns it off.
    """

    model_input_names = ["pixel_values", "patch_grid", "slice_mask"]
    valid_kwargs = CTInstructImageProcessorKwargs

    def __init__(
        self,
        patch_size: dict[str, int] | None = None,
        max_patches: int = 6,
        fit: str = "aspect",
        axes: str = "anatomical",
        intensity: str = "window",
        hu_window: Sequence[float] = (-1000.0, 1000.0),
        target_spacing: Sequence[float] | None = None,
        antialias: bool = False,
        mask_floors: dict[str, Sequence[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size = dict(patch_size or {"depth": 32, "height": 256, "width": 256})
        self.max_patches = max_patches
        self.fit = fit
        self.axes = axes
        self.intensity = intensity
        self.hu_window = [float(value) for value in hu_window]
        self.target_spacing = None if target_spacing is None else [float(value) for value in target_spacing]
        self.antialias = bool(antialias)
        self.mask_floors = {name: [float(value) for value in floor] for name, floor in (mask_floors or {}).items()}
        self._check(self._settings({}))
        wrong = [name for name, floor in self.mask_floors.items() if len(floor) != 2]
        if wrong:
            raise CTInstructError(f"mask_floors of {', '.join(wrong)}: give [mL, logit] each.")

    def _settings(self, overrides: dict[str, Any]) -> dict[str, Any]:
        names = ("patch_size", "max_patches", "fit", "axes", "intensity", "hu_window", "target_spacing", "antialias")
        return {name: overrides[name] if overrides.get(name) is not None else getattr(self, name) for name in names}

    @staticmethod
    def _check(settings: dict[str, Any]) -> None:
        for name, allowed in CHOICES.items():
            if settings[name] not in allowed:
                raise CTInstructError(f"{name} is '{settings[name]}': use one of {', '.join(allowed)}.")
        if settings["antialias"] and settings["fit"] == "released":
            raise CTInstructError("antialias is for the fit 'aspect': the release interpolates linearly.")
        patch = settings["patch_size"]
        if (
            not {"depth", "height", "width"} <= set(patch)
            or patch["height"] % 32
            or patch["width"] % 32
            or min(patch.values()) < 1
        ):
            raise CTInstructError(f"patch_size is {patch}: give depth, height and width, the last two divisible by 32.")
        if settings["max_patches"] < 1:
            raise CTInstructError(f"max_patches is {settings['max_patches']}: at least 1 is needed.")
        if not settings["hu_window"][0] < settings["hu_window"][1]:
            raise CTInstructError(f"hu_window is {settings['hu_window']}: give [low, high] in HU.")

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, without `auto_map`, which belongs to the saved file only."""
        return settings_of(self, super().to_dict())

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in Transformers; the folder then loads with `trust_remote_code=True` without this package."""
        with as_auto_class(self, "AutoImageProcessor"):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """The references unchanged: `read` loads each image when it is prepared."""
        return image_url_or_urls

    def read(self, image: Any, spacing: Sequence[float] | None = None, intensity: str | None = None) -> CTVolume:
        """What `read_volume` takes, and also bytes, an open binary file, base64, a URL or a data URL.

        The release's intensities also see a scanner's padding values, so these are kept for it.
        """
        if is_volume(image):
            return image
        keep = (intensity or self.intensity) == "zscore"
        options: dict[str, Any] = {"spacing": None if spacing is None else tuple(spacing), "keep_padding": keep}
        content = content_of(image)
        if content is not None:
            return read_content(content, lambda file: read_volume(file, **options))
        return read_volume(image, **options)

    def preprocess(
        self,
        images: Any,
        spacing: Sequence[Any] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """A batch of any volumes.

        Args:
            images: what `read` takes, an HU array (depth, height, width), or a (nested) list of them.
            spacing: mm (depth, height, width) of arrays, for all or a list.
            return_tensors: "pt" for torch tensors, "np" for numpy; lists of arrays otherwise.
            kwargs: settings of this class that replace the stored settings for this call.

        Returns:
            pixel_values float32 [N, patch height, patch width], patch_grid int64 [images, 4], slice_mask bool [N].
        """
        unknown = sorted(set(kwargs) - set(CTInstructImageProcessorKwargs.__annotations__))
        if unknown:
            raise CTInstructError(f"{', '.join(unknown)}: the image processor has no such argument.")
        settings = self._settings(kwargs)
        self._check(settings)
        flat = flatten_images(images)
        spacings = spacing_of_each(spacing, len(flat))
        pixels, grids, masks = [], [], []
        for image, mm in zip(flat, spacings, strict=True):
            volume = self.read(image, mm, settings["intensity"])
            rows, fit = self.prepare(volume, **settings)
            pixels.append(rows)
            grids.append([*fit.grid, fit.patch[0]])
            masks.append(fit.slice_mask().flatten())
        if not pixels:
            raise CTInstructError("images is empty: give at least one volume.")
        data: dict[str, Any] = {
            "pixel_values": pixels[0] if len(pixels) == 1 else torch.cat(pixels),
            "patch_grid": torch.tensor(grids),
            "slice_mask": torch.cat(masks),
        }
        if return_tensors is None or str(return_tensors).rsplit(".", 1)[-1].lower() in ("np", "numpy"):
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def prepare(self, volume: CTVolume, **settings: Any) -> tuple[torch.Tensor, CanvasFit]:
        """A volume's rows of `pixel_values` [N, patch height, patch width], and its fit to the canvas."""
        settings = self._settings(settings)
        array = self.model_axes(volume, settings["axes"])
        fit = self.fit_of(volume, **settings)
        box = array[tuple(slice(first, first + length) for first, length in zip(fit.start, fit.size, strict=True))]
        tensor = as_tensor(box)
        low, high, middle, half = self.scale_of(box, settings["intensity"], settings["hu_window"])
        # clipped before the resize, as in the release; the scale is linear and can wait until after it
        fill = low if settings["intensity"] != "zscore" else middle
        rows = place_on_canvas(Clipped(tensor, low, high), fit, fill)
        return rows.sub_(middle).div_(half), fit

    @staticmethod
    def scale_of(box: np.ndarray, intensity: str, window: Sequence[float]) -> tuple[float, float, float, float]:
        """(low, high, middle, half): values are clipped to low and high and become (value - middle) / half.

        Padding is −1 with `window`, the volume's mean (0) with `zscore`, 0 with `unit`.
        """
        if intensity == "window":
            low, high = float(window[0]), float(window[1])
            return low, high, (low + high) / 2, (high - low) / 2
        if intensity == "zscore":
            return released_statistics(box)
        low, high = float(box.min()), float(box.max())
        return low, high, low, max(high - low, 1e-6)

    def model_axes(self, volume: CTVolume, axes: str | None = None) -> np.ndarray:
        """HU in the axes the model sees (depth, height, width)."""
        if (axes or self.axes) == "anatomical" or volume.source.kind == "array":
            return volume.hu
        return volume.in_file_axes(volume.hu).transpose(2, 0, 1)

    def fit_of(self, volume: CTVolume, **settings: Any) -> CanvasFit:
        """The fit of a volume to its canvas; it depends on the volume and the settings only."""
        settings = self._settings(settings)
        array = self.model_axes(volume, settings["axes"])
        patch = settings["patch_size"]
        zoom = (1.0, 1.0, 1.0)
        if settings["target_spacing"] is not None:
            stored = volume.spacing
            if array is not volume.hu:
                widths = np.linalg.norm(volume.source.affine[:3, :3], axis=0)
                stored = (float(widths[2]), float(widths[0]), float(widths[1]))
            zoom = tuple(mm / goal for mm, goal in zip(stored, settings["target_spacing"], strict=True))  # type: ignore[assignment]
            if array.shape[0] == 1:
                zoom = (1.0, *zoom[1:])
        return fit_to_canvas(
            array.shape,
            (patch["depth"], patch["height"], patch["width"]),
            settings["max_patches"],
            settings["fit"],
            foreground_box(array) if settings["intensity"] == "zscore" else None,
            zoom,
            settings["antialias"],
        )

    def labels_to_canvas(self, labels: Any, volume: CTVolume) -> torch.Tensor:
        """A label volume in the axes of `volume.hu` as `mask_labels`: int8 [D, H, W] on the canvas, −1 = padding."""
        array = np.asarray(labels)
        if array.shape != volume.hu.shape:
            raise CTInstructError(
                f"The labels have shape {array.shape}, the volume {volume.hu.shape}: they must be equal."
            )
        if self.axes == "file" and volume.source.kind != "array":
            array = volume.in_file_axes(array).transpose(2, 0, 1)
        return labels_on_canvas(as_tensor(array.astype(np.int8)), self.fit_of(volume))

    def mask_from_canvas(
        self, logits: torch.Tensor, volume: CTVolume, threshold: float = 0.0, name: str | None = None
    ) -> np.ndarray:
        """A mask in the axes and shape of `volume.hu`.

        Args:
            logits: [D, H, W] on the volume's canvas.
            threshold: logit above which a voxel belongs to the mask.
            name: of the structure; where `mask_floors` has it, the mask is empty unless it reaches its floor.

        Returns:
            bool (depth, height, width).
        """
        fit = self.fit_of(volume)
        if tuple(logits.shape) != fit.canvas:
            raise CTInstructError(f"The mask has shape {tuple(logits.shape)}, the volume's canvas is {fit.canvas}.")
        if name in self.mask_floors:
            least, level = self.mask_floors[name]
            if self.volume_above(logits, volume, level, fit) <= least:
                return np.zeros(volume.shape, bool)
        mask = mask_from_canvas(logits.detach(), fit, threshold).numpy()
        if self.axes == "file" and volume.source.kind != "array":
            mask = volume.from_file_axes(mask.transpose(1, 2, 0))
        return mask

    def volume_above(self, logits: torch.Tensor, volume: CTVolume, level: float, fit: CanvasFit | None = None) -> float:
        """mL of the volume with a logit above `level`, from logits [D, H, W] on its canvas; `fit` is computed if None."""
        fit = fit or self.fit_of(volume)
        return int((logits_inside(logits, fit) > level).sum()) * fit.voxel_volume(volume.spacing)


def settings_of(processor: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A processor's settings, without `auto_map` unless it is being saved (see `as_auto_class`)."""
    if type(processor)._auto_class is None:
        settings.pop("auto_map", None)
    return settings


@contextmanager
def as_auto_class(processor: Any, auto_class: str) -> Iterator[None]:
    """Within the context `processor` counts as custom code, so that Transformers copies its files."""
    cls = type(processor)
    before = cls._auto_class
    cls._auto_class = auto_class
    try:
        yield
    finally:
        cls._auto_class = before


class Clipped:
    """A tensor whose slices are clipped when they are taken, so that the whole is never copied."""

    def __init__(self, tensor: torch.Tensor, low: float, high: float) -> None:
        self.tensor, self.low, self.high = tensor, low, high

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index].float().clamp_(self.low, self.high)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over the array's memory where torch can view it: flipped axes and foreign dtypes are copied."""
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable or not array.dtype.isnative:
        # `copy`, not `ascontiguousarray`, which keeps a negative stride of an axis of length 1
        array = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
    return torch.from_numpy(array)


def foreground_box(array: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(start, size) of the smallest box around voxels above 0; everything where there is none."""
    order: Literal["C", "F"] = (
        "F" if abs(array.strides[1]) < abs(array.strides[2]) else "C"
    )  # the memory order of a plane
    seen = np.zeros(array.shape[1:], bool, order=order)
    lines: list[np.ndarray] = [np.zeros(array.shape[0], bool)]
    for depth, plane in enumerate(array):  # a plane at a time, which stays in the cache
        above = plane > 0
        lines[0][depth] = above.any()
        seen |= above
    lines += [np.asarray(seen.any(axis=1)), np.asarray(seen.any(axis=0))]
    if not lines[0].any():
        return (0, 0, 0), array.shape  # type: ignore[return-value]
    found = [np.flatnonzero(line) for line in lines]
    return tuple(int(line[0]) for line in found), tuple(int(line[-1] - line[0] + 1) for line in found)  # type: ignore[return-value]


def released_statistics(box: np.ndarray) -> tuple[float, float, float, float]:
    """(low, high, mean, standard deviation): clip limits of the release, and the moments after clipping."""
    low, high = float(box.min()), float(box.max())
    if box.dtype == np.int16:
        return histogram_statistics(box)
    if high - low > 1000:
        low, high = (float(value) for value in np.percentile(box, (0.5, 99.5)))
    clipped = np.clip(box, low, high)
    return low, high, float(clipped.mean(dtype=np.float64)), max(float(clipped.std(dtype=np.float64)), 1e-8)


def histogram_statistics(box: np.ndarray) -> tuple[float, float, float, float]:
    """`released_statistics` of int16 from a histogram over its 65,536 values: exact, without sorting or a float copy."""
    codes = np.zeros(2**16, dtype=np.int64)  # by the unsigned reading of each value
    for plane in box:
        codes += np.bincount(plane.ravel(order="K").view(np.uint16), minlength=2**16)
    counts = np.concatenate([codes[2**15 :], codes[: 2**15]])
    values = np.arange(-(2**15), 2**15)
    present = np.flatnonzero(counts)
    low, high = float(values[present[0]]), float(values[present[-1]])
    if high - low > 1000:
        cumulative = np.cumsum(counts)

        def percentile(share: float) -> float:
            rank = share / 100 * (cumulative[-1] - 1)
            below = values[np.searchsorted(cumulative, np.floor(rank), side="right")]
            above = values[np.searchsorted(cumulative, np.ceil(rank), side="right")]
            return float(below + (above - below) * (rank - np.floor(rank)))

        low, high = percentile(0.5), percentile(99.5)
    clipped = np.clip(values, low, high)
    total = counts.sum()
    mean = float((clipped * counts).sum() / total)
    variance = float((((clipped - mean) ** 2) * counts).sum() / total)
    return low, high, mean, max(variance**0.5, 1e-8)


def flatten_images(images: Any) -> list[Any]:
    """Nested lists of images as a flat list."""
    if isinstance(images, list | tuple):
        return [image for part in images for image in flatten_images(part)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def spacing_of_each(spacing: Any, count: int) -> list[Any]:
    """A spacing in mm per image, from a single spacing or a list of them."""
    if spacing is None:
        return [None] * count
    listed = list(spacing)
    if listed and np.isscalar(listed[0]):
        return [tuple(listed)] * count
    if len(listed) != count:
        raise CTInstructError(f"spacing has {len(listed)} entries for {count} images.")
    return listed


__all__ = ["CTInstructImageProcessor"]
