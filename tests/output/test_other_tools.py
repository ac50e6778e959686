"""Results as other programs take them: NRRD of 3D Slicer, RT Structure Sets, images of SimpleITK and MONAI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw
from scans import as_nifti, asymmetric, dicom_series, enhanced

from ctinstruct_hf import CTInstructError, Study, read_volume
from ctinstruct_hf.output.colours import COLOURS
from ctinstruct_hf.output.nrrd import save_nrrd
from ctinstruct_hf.output.rtstruct import contours, save_rtstruct

SHAPE = (8, 20, 24)


def masks_of(volume: Any) -> dict[str, np.ndarray]:
    """A tube (a hole in each slice), one that overlaps it, one that touches the edge, a single voxel, and an empty one."""
    depth, height, width = np.indices(volume.shape)
    distance = (height - 9.0) ** 2 + (width - 11.0) ** 2
    return {
        "liver": (distance < 49) & (distance > 9) & (depth < 6),
        "right lung": (height + depth > 12) & (width < 9),
        "Größe: a\\b": (width == 23) & (height < 4),
        "lung nodule": (depth == 3) & (height == 5) & (width == 2),
        "spleen": np.zeros(volume.shape, bool),
    }


def scan(folder: Path, source: str) -> Any:
    hu = asymmetric(SHAPE)
    if source.startswith("nifti"):
        nib.save(as_nifti(hu, source.removeprefix("nifti ")), folder / "scan.nii.gz")
        return read_volume(folder / "scan.nii.gz")
    if source == "enhanced":
        return read_volume(enhanced(hu, folder / "ct.dcm"))
    options: dict[str, Any] = {"plain": {}, "tilted": {"step": (0.0, 0.4, 2.0)}}
    c, s = np.cos(0.3), np.sin(0.3)
    options["oblique"] = {"orientation": (c, s, 0, -s, c, 0)}
    options["uneven"] = {"positions": [np.array([-30.0, -40.0, z]) for z in (0, 2, 4, 7, 9, 11, 13, 15)]}
    return read_volume(dicom_series(folder / "ct", hu, **options[source]))


@pytest.mark.parametrize("source", ["nifti RAS", "nifti PIL", "plain", "tilted"])
def test_a_segmentation_nrrd_has_names_colours_and_voxels_of_every_structure(tmp_path: Path, source: str) -> None:
    nrrd = pytest.importorskip("nrrd", reason="pynrrd is not installed")
    volume = scan(tmp_path, source)
    masks = masks_of(volume)
    save_nrrd(volume, masks, tmp_path / "masks.seg.nrrd")
    layers, header = nrrd.read(str(tmp_path / "masks.seg.nrrd"))
    assert header["space"] == "left-posterior-superior"
    assert header["kinds"] == ["list", "domain", "domain", "domain"]
    affine = np.diag([-1, -1, 1, 1]) @ volume.source.affine
    assert np.allclose(header["space directions"][1:].T, affine[:3, :3])
    assert np.allclose(header["space origin"], affine[:3, 3])
    assert "Name:=Größe: a b\n".encode() in (tmp_path / "masks.seg.nrrd").read_bytes()
    for number, (name, mask) in enumerate(masks.items()):
        written = name.replace("\\", " ").encode("ascii", "ignore").decode()  # pynrrd drops all other letters
        assert header[f"Segment{number}_Name"] == written
        colour = [round(float(part) * 255) for part in header[f"Segment{number}_Color"].split()]
        assert "#" + bytes(colour).hex() == COLOURS[number]
        layer, label = (int(header[f"Segment{number}_{key}"]) for key in ("Layer", "LabelValue"))
        found = layers[layer] == label
        assert np.array_equal(found, volume.to_source(mask).get_fdata() > 0)
        first_last = [int(index) for index in header[f"Segment{number}_Extent"].split()]
        if found.any():
            inside = np.argwhere(found)
            assert first_last == np.stack([inside.min(0), inside.max(0)]).T.ravel().tolist()
    assert "SCT^10200004^Liver" in header["Segment0_Tags"]
    assert "SCT^24028007^Right" in header["Segment1_Tags"]


def test_a_segmentation_nrrd_without_overlap_is_three_dimensional(tmp_path: Path) -> None:
    nrrd = pytest.importorskip("nrrd", reason="pynrrd is not installed")
    volume = scan(tmp_path, "nifti RAS")
    left = np.indices(volume.shape)[2] > 11
    save_nrrd(volume, {"one": left, "two": ~left}, tmp_path / "m.seg.nrrd")
    labels, header = nrrd.read(str(tmp_path / "m.seg.nrrd"))
    assert labels.ndim == 3
    assert header["Segment1_Layer"] == "0"
    assert np.array_equal(labels, np.where(volume.to_source(left).get_fdata() > 0, 1, 2))


def filled(volume: Any, file: Path) -> dict[str, np.ndarray]:
    """The masks (i, j, k) of a structure set, by filling its contours on the slices that they refer to."""
    rt = pydicom.dcmread(file)
    names = {item.ROINumber: item.ROIName for item in rt.StructureSetROISequence}
    slices = {}
    for k, (path, frame) in enumerate(zip(volume.source.dicom_files, volume.source.dicom_frames, strict=True)):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        numbered = header.get("NumberOfFrames") is not None
        slices[str(header.SOPInstanceUID), frame + 1 if numbered else None] = k, header, frame
    found = {}
    for drawn in rt.ROIContourSequence:
        grid = np.zeros(volume.source.shape, bool)
        for contour in drawn.get("ContourSequence", []):
            image = contour.ContourImageSequence[0]
            k, header, frame = slices[image.ReferencedSOPInstanceUID, image.get("ReferencedFrameNumber")]
            if "ImagePositionPatient" in header:
                origin, spacing = header.ImagePositionPatient, header.PixelSpacing
                axes = np.reshape(header.ImageOrientationPatient, (2, 3))
            else:
                group, shared = header.PerFrameFunctionalGroupsSequence[frame], header.SharedFunctionalGroupsSequence[0]
                origin = group.PlanePositionSequence[0].ImagePositionPatient
                spacing = shared.PixelMeasuresSequence[0].PixelSpacing
                axes = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3))
            points = np.reshape(np.array(contour.ContourData, float), (-1, 3)) - np.array(origin, float)
            flat = points @ np.array(axes, float).T / np.array(spacing, float)[::-1]
            assert np.abs(points @ np.cross(*np.array(axes, float))).max() < 1e-3  # in the slice's plane
            grid[:, :, k] ^= inside(flat, grid.shape[:2])
        found[names[drawn.ReferencedROINumber]] = grid
    return found


def inside(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels (columns, rows) whose middle lies in a polygon, by crossings of a ray (even-odd)."""
    columns, rows = np.meshgrid(np.arange(shape[0]) + 1e-6, np.arange(shape[1]) + 1e-6, indexing="ij")
    odd = np.zeros(shape, bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y1 != y2:
            odd ^= ((y1 > rows) != (y2 > rows)) & (columns < (x2 - x1) * (rows - y1) / (y2 - y1) + x1)
    return odd


@pytest.mark.parametrize("source", ["plain", "tilted", "oblique", "uneven", "enhanced"])
def test_contours_of_an_rt_structure_set_fill_to_the_masks_they_came_from(tmp_path: Path, source: str) -> None:
    volume = scan(tmp_path, source)
    masks = masks_of(volume)
    save_rtstruct(volume, masks, tmp_path / "rt.dcm")
    found = filled(volume, tmp_path / "rt.dcm")
    assert [name.replace("  ", " ") for name in found] == [name.replace("\\", " ") for name in masks]
    for mask, back in zip(masks.values(), found.values(), strict=True):
        truth = volume.to_source(mask).get_fdata() > 0
        assert 2 * (truth & back).sum() >= 0.98 * (truth.sum() + back.sum())


def test_a_structure_set_names_its_series_and_says_that_it_is_for_research(tmp_path: Path) -> None:
    volume = scan(tmp_path, "plain")
    for name in ("a.dcm", "b.dcm"):
        save_rtstruct(volume, masks_of(volume), tmp_path / name, seed="asked")
    rt, again = (pydicom.dcmread(tmp_path / name) for name in ("a.dcm", "b.dcm"))
    assert rt.SOPInstanceUID == again.SOPInstanceUID
    source = pydicom.dcmread(volume.source.dicom_files[0])
    assert rt.StudyInstanceUID == source.StudyInstanceUID
    frame = rt.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    assert len(series.ContourImageSequence) == len(volume.source.dicom_files)
    assert "research use only" in rt.SeriesDescription
    assert len({tuple(item.ROIDisplayColor) for item in rt.ROIContourSequence}) == len(rt.ROIContourSequence)
    assert rt.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0].CodeValue == "10200004"


def test_nested_holes_survive_polygon_filling() -> None:
    image = Image.new("1", (40, 30))
    draw = ImageDraw.Draw(image)
    for box, value in (((2, 2, 37, 27), 1), ((5, 5, 15, 20), 0), ((7, 8, 12, 15), 1), ((20, 5, 30, 12), 0)):
        draw.ellipse(box, fill=value)
    mask = np.array(image).T
    found = np.zeros(mask.shape, bool)
    for ring in contours(mask):
        found ^= inside(ring, mask.shape)
    assert np.array_equal(found, mask)


def test_simpleitk_and_monai_place_the_scan_where_it_lies(tmp_path: Path) -> None:
    import SimpleITK

    nib.save(as_nifti(asymmetric(SHAPE), "PIL"), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    image = volume.to_sitk()
    reference = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(tmp_path / "scan.nii.gz")), "LPS")
    assert np.array_equal(SimpleITK.GetArrayFromImage(image), SimpleITK.GetArrayFromImage(reference))
    for found, wanted in zip(
        (image.GetOrigin(), image.GetSpacing(), image.GetDirection()),
        (reference.GetOrigin(), reference.GetSpacing(), reference.GetDirection()),
        strict=True,
    ):
        assert np.allclose(found, wanted, atol=1e-5)
    assert SimpleITK.GetArrayFromImage(volume.to_sitk(volume.hu > 0)).sum() == (volume.hu > 0).sum()
    with pytest.raises(CTInstructError, match=r"shape \(1, 2, 3\)"):
        volume.to_sitk(np.zeros((1, 2, 3)))


def test_monai_gets_channel_first_and_the_affine(tmp_path: Path) -> None:
    transforms = pytest.importorskip("monai.transforms", reason="MONAI is not installed")
    nib.save(as_nifti(asymmetric(SHAPE), "PIL"), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    found = transforms.Orientation(axcodes="RAS")(volume.to_monai())
    load = transforms.LoadImage(image_only=True, ensure_channel_first=True)
    wanted = transforms.Orientation(axcodes="RAS")(load(tmp_path / "scan.nii.gz"))
    assert np.array_equal(np.asarray(found), np.asarray(wanted))
    assert np.allclose(found.affine, wanted.affine, atol=1e-5)


FILES = [("nrrd", "masks.seg.nrrd"), ("dicom-seg-labelmap", "masks_labelmap.dcm"), ("rtstruct", "rtstruct.dcm")]


@pytest.mark.parametrize(("output_type", "file"), FILES)
def test_a_study_is_saved_as_other_programs_take_it(
    tmp_path: Path, untrained: Path, output_type: str, file: str
) -> None:
    series = dicom_series(tmp_path / "ct", asymmetric((6, 32, 32)))
    study = Study.open(series, str(untrained))
    study.results.masks = {"liver": study.volume.hu > 500}
    study.save(tmp_path / "out", output_types=(output_type.upper(),))
    assert (tmp_path / "out" / file).is_file()
    assert f'"file": "{file}"' in (tmp_path / "out" / "findings.json").read_text()
    assert not (tmp_path / "out" / "masks").exists()
