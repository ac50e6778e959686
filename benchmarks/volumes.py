"""From a file to patches, against the MONAI chain of the release, the bare inflate, and SimpleITK's series reader.

    python benchmarks/volumes.py [--quick] [--check] [--runs 5]

On a generated 512 x 512 x 300 int16 volume, 0.7 x 0.7 x 1 mm, with texture, so that it packs like a real scan.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from common import PeakMemory, alternate, arguments, header, ratio, table, write_figures
from isal import igzip

from ctinstruct_hf import CTInstructImageProcessor, read_volume


def make_volume(shape: tuple[int, int, int]) -> np.ndarray:
    """HU (i, j, k): a body in air, organs, noise."""
    rng = np.random.default_rng(0)
    i, j, k = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    body = (i[:, None, None] / 0.85) ** 2 + (j[None, :, None] / 0.6) ** 2 < 1 + 0.1 * np.sin(3 * k)
    hu = np.where(body, np.float32(40), np.float32(-1000))
    lungs = ((np.abs(i)[:, None, None] - 0.4) / 0.3) ** 2 + (j[None, :, None] / 0.4) ** 2 < 1 - k**2
    hu[lungs & body] = -860
    hu += rng.normal(0, 18, shape).astype(np.float32)
    return np.rint(hu).astype(np.int16)


def monai_chain(path: Path, canvas: tuple[int, int, int]):
    """The release's preparation as its users write it with MONAI."""
    import torch
    from monai.transforms import (
        Compose,
        CropForeground,
        EnsureChannelFirst,
        LoadImage,
        NormalizeIntensity,
        Resize,
        ScaleIntensityRangePercentiles,
        SpatialPad,
    )

    class Clip(ScaleIntensityRangePercentiles):
        """Percentile clip that keeps HU."""

        def __call__(self, image):
            low, high = (float(np.percentile(np.asarray(image), q)) for q in (0.5, 99.5))
            return image.clamp(low, high)

    load = Compose([LoadImage(image_only=True), EnsureChannelFirst(), CropForeground(select_fn=lambda x: x > 0), Clip(0.5, 99.5, None, None), NormalizeIntensity()])  # fmt: skip

    def run() -> torch.Tensor:
        image = load(str(path))
        scale = min(side / length for side, length in zip(canvas, image.shape[1:], strict=True))
        size = [min(side, int(np.ceil(length * scale))) for side, length in zip(canvas, image.shape[1:], strict=True)]
        image = SpatialPad(canvas)(Resize(size, mode="trilinear", align_corners=True)(image))
        patches = image[0].unfold(0, 256, 256).unfold(1, 256, 256).unfold(2, 32, 32)
        return patches.permute(2, 0, 1, 5, 3, 4).reshape(-1, 256, 256).contiguous()

    return run


def write_series(hu: np.ndarray, folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from scans import dicom_series

    dicom_series(folder, np.ascontiguousarray(hu.transpose(2, 1, 0)), PixelSpacing=[0.7, 0.7], step=(0.0, 0.0, 1.0))


def main() -> int:
    options = arguments(__doc__)
    runs = 1 if options.quick else options.runs
    shape = (128, 128, 40) if options.quick else (512, 512, 300)
    import SimpleITK

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        hu = make_volume(shape)
        path = folder / "scan.nii.gz"
        nib.save(nib.Nifti1Image(hu, np.diag([-0.7, -0.7, 1.0, 1.0])), path)
        write_series(hu, folder / "series")
        raw = hu.nbytes
        print(header("torch", "monai", "nibabel", "SimpleITK", "isal", "pydicom"))
        print(f"{'x'.join(map(str, shape))} int16, {raw / 1e6:.0f} MB raw, {path.stat().st_size / 1e6:.0f} MB packed")
        released = CTInstructImageProcessor(fit="released", axes="file", intensity="zscore")
        default = CTInstructImageProcessor()
        grid = released.fit_of(read_volume(path, keep_padding=True)).grid
        canvas = (grid[1] * 256, grid[2] * 256, grid[0] * 32)
        del hu

        def inflate() -> bytes:
            with igzip.open(path, "rb") as file:
                return file.read()

        def itk_series() -> object:
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder / "series")))
            return SimpleITK.GetArrayFromImage(reader.Execute())

        stated = not options.quick
        pairs = [
            alternate("file to patches, release's settings / MONAI", lambda: released(path, return_tensors="pt"), monai_chain(path, canvas), runs, 5 if stated else None),
            alternate("file to patches, our defaults / MONAI", lambda: default(path, return_tensors="pt"), monai_chain(path, canvas), runs, 6 if stated else None),
            alternate("file to patches, our defaults / bare inflate", lambda: default(path, return_tensors="pt"), inflate, runs, 1 / 2.5 if stated else None),
            alternate("DICOM series to HU / SimpleITK", lambda: read_volume(folder / "series"), itk_series, runs, 1 if stated else None),
        ]  # fmt: skip
        print(table(pairs))
        ratios = []
        for name, processor in (("release's settings", released), ("our defaults", default)):
            with PeakMemory() as peak:
                processor(path, return_tensors="pt")
            ratios.append(peak.most / raw)
            print(
                f"peak memory of file to patches, {name}: {peak.most / 1e6:.0f} MB, {ratios[-1]:.2f} times the raw volume"
            )
        write_figures(
            options,
            released=ratio(pairs[0]),
            defaults=ratio(pairs[1]),
            inflate=f"{1 / statistics.median(pairs[2].ratios):.2f} times as long",
            series=ratio(pairs[3]),
            memory=f"{ratios[1]:.1f} times the raw int16 volume",
        )
        missed = stated and (any(pair.missed for pair in pairs) or max(ratios) > 2.5)
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
