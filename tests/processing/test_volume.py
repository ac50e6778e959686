"""Reading: formats, orientation, and the trouble that hospitals' files have."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from bad_scans import bad_files
from PIL import Image
from repository import shared
from scans import AXIS_ORDERS, as_nifti, asymmetric, dicom_series, dicom_slice, enhanced, save

from ctinstruct_hf import CTInstructError, read_volume


@pytest.mark.parametrize("codes", AXIS_ORDERS)
def test_left_stays_left_in_all_48_axis_orders(codes: str, tmp_path: Path) -> None:
    hu = asymmetric()
    image = as_nifti(hu, codes)
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert np.array_equal(volume.hu, hu)
    assert volume.spacing == pytest.approx((2.0, 1.5, 1.0))
    label = (volume.hu == 1000).astype(np.uint8)
    back = volume.to_source(label)
    assert np.array_equal(np.asarray(back.dataobj), (np.asarray(image.dataobj) == 1000).astype(np.uint8))
    assert np.allclose(back.affine, image.affine)
    # the world position of the corner is the same in both grids
    corner = volume.affine @ [volume.shape[2] - 1, volume.shape[1] - 1, volume.shape[0] - 1, 1]
    assert np.allclose(corner[:3], [40 - 12, 50 - 15, -60 + 16])


ORIENTATIONS = {
    "axial": ((1, 0, 0, 0, 1, 0), lambda hu: hu),
    "axial, feet first": ((-1, 0, 0, 0, 1, 0), lambda hu: hu[::-1, :, ::-1]),
    "prone": ((-1, 0, 0, 0, -1, 0), lambda hu: hu[:, ::-1, ::-1]),
    "coronal": ((1, 0, 0, 0, 0, -1), lambda hu: hu.transpose(1, 0, 2)[:, ::-1]),
    "sagittal": ((0, 1, 0, 0, 0, -1), lambda hu: hu.transpose(2, 0, 1)[::-1, ::-1]),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_left_stays_left_in_dicom_of_any_plane(name: str, tmp_path: Path) -> None:
    hu = asymmetric()
    orientation, turn = ORIENTATIONS[name]
    stored = turn(hu)
    volume = read_volume(dicom_series(tmp_path / "series", stored, orientation=orientation))
    assert np.array_equal(volume.hu, hu)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    theirs = reader.Execute()
    back = volume.to_source((volume.hu == 1000).astype(np.uint8))
    assert back.shape == theirs.GetSize()
    assert np.array_equal(np.asarray(back.dataobj), (SimpleITK.GetArrayFromImage(theirs).transpose(2, 1, 0) == 1000))
    rows = np.diag([-1, -1, 1]) @ np.reshape(theirs.GetDirection(), (3, 3)) * theirs.GetSpacing()
    assert np.allclose(back.affine[:3, :3], rows, atol=1e-4)
    assert np.allclose(back.affine[:3, 3], np.diag([-1, -1, 1]) @ theirs.GetOrigin(), atol=1e-4)


def test_an_oblique_nifti_comes_back_voxel_for_voxel(tmp_path: Path) -> None:
    image = as_nifti(asymmetric(), "RAS")
    angle = np.radians(12)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    affine = image.affine.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert np.array_equal(volume.hu, asymmetric())
    back = volume.to_source(volume.hu == 1000)
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(image.dataobj) == 1000)
    assert np.allclose(back.affine, affine, atol=1e-5)


@pytest.mark.parametrize(("slope", "inter", "dtype"), [(1, -1024, np.int16), (0.5, 3, np.float32), (2, 0, np.int16)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_scale_factors_are_applied_once(slope: float, inter: float, dtype: type, kind: type, tmp_path: Path) -> None:
    stored = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = kind(stored, np.diag([-1, -1, 1, 1]))
    image.header.set_slope_inter(slope, inter)
    image.to_filename(tmp_path / "scan.nii.gz")
    raw = nib.load(tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert volume.hu.dtype == dtype
    assert np.allclose(volume.hu, raw.get_fdata().transpose(2, 1, 0).clip(-1024))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64, ">i2"])
def test_storage_types_give_the_same_hu(dtype: str, tmp_path: Path) -> None:
    stored = np.arange(60).reshape(3, 4, 5).astype(dtype)
    nib.save(nib.Nifti1Image(stored, np.diag([-1, -1, 1, 1])), tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.hu.dtype in (np.int16, np.float32)
    assert np.array_equal(volume.hu, np.arange(60).reshape(3, 4, 5).transpose(2, 1, 0))


def test_disagreeing_forms_and_missing_orientation_are_told(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([-1, -1, 1, 1]))
    image.header.set_qform(np.diag([1, 1, 1, 1]), code=1)
    image.header.set_sform(np.diag([-1, -1, 1, 1]), code=1)
    nib.save(image, tmp_path / "two.nii")
    assert any("disagree" in note for note in read_volume(tmp_path / "two.nii").warnings)
    bare = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), None)
    bare.header.set_qform(None, code=0)
    bare.header.set_sform(None, code=0)
    nib.save(bare, tmp_path / "none.nii")
    assert any("no orientation" in note for note in read_volume(tmp_path / "none.nii").warnings)


def test_a_sheared_nifti_is_made_upright_and_masks_go_back(tmp_path: Path) -> None:
    hu = np.full((16, 24, 24), -50, np.int16)
    hu[:, 8:16, 8:16] = 500
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[:3, 2] = [0, -0.6, 2.0]  # slices drift toward the back
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), affine), tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert any("tilt" in note for note in volume.warnings)
    back = np.asarray(volume.to_source(volume.hu > 200).dataobj)
    truth = (hu > 200).transpose(2, 1, 0)
    assert back.shape == truth.shape
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.9


def test_padding_and_broken_voxels_become_air(tmp_path: Path) -> None:
    hu = np.full((4, 5, 6), 20.0, np.float32)
    hu[0], hu[1, 0], hu[2, 0, 0] = -3024, np.nan, np.inf
    nib.save(nib.Nifti1Image(hu, np.diag([-1, -1, 1, 1])), tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.hu.min() == -1024
    assert np.isfinite(volume.hu).all()
    assert any("NaN" in note for note in volume.warnings)
    assert read_volume(tmp_path / "scan.nii", keep_padding=True).hu.min() == -3024


def test_gantry_tilt_is_made_upright_and_masks_go_back(tmp_path: Path) -> None:
    hu = np.full((12, 32, 32), -50, np.int16)
    hu[:, 10:20, 10:20] = 400
    series = dicom_series(tmp_path / "series", hu, step=(0.0, 0.8, 2.0))
    volume = read_volume(series)
    assert any("tilted by 21.8 degrees" in note for note in volume.warnings)
    back = np.asarray(volume.to_source(volume.hu > 150).dataobj)
    truth = (hu > 150).transpose(2, 1, 0)
    assert back.shape == truth.shape
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.95


def test_uneven_and_missing_slices_are_evened_and_named(tmp_path: Path) -> None:
    hu = np.repeat(np.arange(10, dtype=np.int16)[:, None, None] * 10, 8, 1).repeat(8, 2)
    places = [np.array([0.0, 0.0, 2.0 * k + (4.0 if k > 5 else 0.0)]) for k in range(10)]
    volume = read_volume(dicom_series(tmp_path / "series", hu, positions=places))
    assert volume.shape[0] == 12
    assert volume.spacing[0] == pytest.approx(2.0)
    assert any("6.00 mm after slice 6" in note for note in volume.warnings)
    assert np.allclose(volume.hu[:, 0, 0], [0, 10, 20, 30, 40, 50, 53.3, 56.7, 60, 70, 80, 90], atol=0.1)
    assert volume.to_source(volume.hu > 45).shape == (8, 8, 10)


def test_repeated_slices_are_dropped_and_four_dimensions_refused(tmp_path: Path) -> None:
    hu = asymmetric((6, 8, 8))
    series = dicom_series(tmp_path / "one", hu)
    again = dicom_slice(np.ascontiguousarray(hu[2]), ImagePositionPatient=[-30.0, -40.0, 14.0])
    save(again, series / "again")
    volume = read_volume(series)
    assert volume.shape[0] == 6
    assert any("1 repeated" in note for note in volume.warnings)
    places = [np.array([0.0, 0.0, 2.0 * (k % 3)]) for k in range(6)]
    with pytest.raises(CTInstructError, match="4D"):
        read_volume(dicom_series(tmp_path / "phases", hu, positions=places))


def test_rescale_of_each_slice_and_its_absence(tmp_path: Path) -> None:
    stored = np.full((4, 8, 8), 100, np.int16)
    volume = read_volume(dicom_series(tmp_path / "each", stored, RescaleIntercept=[0, 10, 20, 30]))
    assert np.array_equal(volume.hu[:, 0, 0], [100, 110, 120, 130])
    assert any("differ between slices" in note for note in volume.warnings)
    volume = read_volume(dicom_series(tmp_path / "none", stored, RescaleIntercept=None, RescaleSlope=None))
    assert any("no rescale" in note for note in volume.warnings)
    volume = read_volume(dicom_series(tmp_path / "half", stored, RescaleSlope="0.5"))
    assert volume.hu.dtype == np.float32
    assert volume.hu[0, 0, 0] == 50


def test_wrong_sign_and_padding_values_of_dicom(tmp_path: Path) -> None:
    hu = asymmetric((4, 16, 16))
    hu[:, :4] = -2000
    volume = read_volume(dicom_series(tmp_path / "wrong", hu.view(np.uint16)))
    assert any("read as signed" in note for note in volume.warnings)
    assert np.array_equal(volume.hu, hu.clip(-1024))
    padded = (hu.clip(-1000) + 1024).astype(np.uint16)
    padded[:, 12:] = 63
    volume = read_volume(dicom_series(tmp_path / "padded", padded, RescaleIntercept=-1024, PixelPaddingValue=63))
    assert (volume.hu[:, 12:] == -1024).all()


def test_what_lies_beside_the_ct_is_left_out_and_named(tmp_path: Path) -> None:
    hu = asymmetric((6, 8, 8))
    folder = dicom_series(tmp_path / "study" / "ct", hu).parent
    (folder / "other").mkdir()
    save(
        dicom_slice(hu[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.9"),
        folder / "other" / "scout",
    )
    save(dicom_slice(hu[0], Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67"), folder / "other" / "dose")
    (folder / "other" / "notes.txt").write_text("not DICOM")
    volume = read_volume(folder)
    assert volume.shape == (6, 8, 8)
    assert any("1 scout" in note and "1 dose report" in note for note in volume.warnings)


def test_several_series_ask_which(tmp_path: Path) -> None:
    hu = asymmetric((4, 8, 8))
    dicom_series(tmp_path / "study" / "a", hu, SeriesInstanceUID="1.2.1")
    dicom_series(tmp_path / "study" / "b", hu + 1, SeriesInstanceUID="1.2.2")
    with pytest.raises(CTInstructError, match=r"2 CT series.*1\.2\.1.*1\.2\.2"):
        read_volume(tmp_path / "study")
    assert np.array_equal(read_volume(tmp_path / "study", series="1.2.2").hu, hu + 1)
    with pytest.raises(CTInstructError, match=r"no CT series 9\.9"):
        read_volume(tmp_path / "study", series="9.9")


@pytest.mark.parametrize("modality", ["MR", "PT", "CR"])
def test_other_modalities_are_refused(modality: str, tmp_path: Path) -> None:
    series = dicom_series(tmp_path / "series", asymmetric((3, 8, 8)), Modality=modality)
    with pytest.raises(CTInstructError, match=rf"no CT image \(3 {modality}\)"):
        read_volume(series)


def test_spacing_that_is_missing_must_be_given(tmp_path: Path) -> None:
    series = dicom_series(tmp_path / "series", asymmetric((3, 8, 8)), PixelSpacing=[0, 0])
    with pytest.raises(CTInstructError, match="no pixel spacing"):
        read_volume(series)
    assert read_volume(series, spacing=(2.0, 0.7, 0.7)).spacing == pytest.approx((2.0, 0.7, 0.7))


def test_enhanced_multiframe_and_zip(tmp_path: Path) -> None:
    hu = asymmetric((5, 8, 9))
    assert np.array_equal(read_volume(enhanced(hu, tmp_path / "enhanced.dcm")).hu, hu)
    series = dicom_series(tmp_path / "series", hu)
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in series.iterdir():
            archive.write(file, f"../../outside/{file.name}")
    volume = read_volume(tmp_path / "study.zip")
    assert np.array_equal(volume.hu, hu)
    assert volume.source.name == "study.zip"
    assert not (tmp_path.parent / "outside").exists()


def test_the_ten_lossless_encodings_decode_to_equal_pixels() -> None:
    folder = shared("data/dicom_transfer_syntaxes")
    lossy = ("Process1T", "Process2_4", "Process6_8", "Process10_12", "JPEGLSLossy", "JPEG2000Transfer")
    hashes = {}
    for file in sorted(folder.glob("*.dcm")):
        if any(part in file.name for part in lossy):
            continue
        hu = read_volume(file, keep_padding=True).hu
        hashes[file.name] = hashlib.md5(np.ascontiguousarray(hu).tobytes()).hexdigest()
    assert len(hashes) == 10
    assert len(set(hashes.values())) == 1


@pytest.mark.parametrize(("part", "message"), [("Process1T", "8 bits"), ("Process2_4", "8 bits"), ("Process6_8", "no decoder"), ("Process10_12", "no decoder")])  # fmt: skip
def test_encodings_that_lose_hu_are_refused(part: str, message: str) -> None:
    file = next(shared("data/dicom_transfer_syntaxes").glob(f"*{part}*"))
    with pytest.raises(CTInstructError, match=message):
        read_volume(file)


def test_real_dicom_has_the_spacing_of_its_positions() -> None:
    volume = read_volume(shared("data/body_dicom"))
    assert volume.shape == (20, 512, 512)
    assert volume.spacing == pytest.approx((2.0, 0.9766, 0.9766), abs=1e-3)  # 3 mm thick
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(shared("data/body_dicom"))))
    theirs = reader.Execute()
    image = volume.to_source(volume.hu)
    assert image.shape == theirs.GetSize()
    assert np.array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), SimpleITK.GetArrayFromImage(theirs).clip(-1024))


def test_other_files_and_objects(tmp_path: Path) -> None:
    hu = asymmetric((5, 8, 9))
    image = SimpleITK.GetImageFromArray(hu)
    image.SetSpacing((1.0, 1.5, 2.0))
    for suffix in ("mha", "mhd", "nrrd"):
        SimpleITK.WriteImage(image, str(tmp_path / f"scan.{suffix}"))
        volume = read_volume(tmp_path / f"scan.{suffix}")
        assert np.array_equal(volume.hu, hu)
        assert volume.spacing == pytest.approx((2.0, 1.5, 1.0))
    assert np.array_equal(read_volume(image).hu, hu)
    assert np.array_equal(read_volume(as_nifti(hu, "PIR")).hu, hu)
    assert np.array_equal(read_volume(hu, spacing=(2, 1.5, 1)).hu, hu)
    assert np.array_equal(read_volume(torch.from_numpy(hu), spacing=(2, 1.5, 1)).hu, hu)
    np.save(tmp_path / "scan.npy", hu)
    with pytest.raises(CTInstructError, match="no voxel spacing"):
        read_volume(tmp_path / "scan.npy")
    (tmp_path / "scan.json").write_text(json.dumps({"spacing": [2, 1.5, 1]}))
    assert read_volume(tmp_path / "scan.npy").spacing == (2, 1.5, 1)
    np.savez(tmp_path / "rad.npz", ct=hu)
    assert np.array_equal(read_volume(tmp_path / "rad.npz", spacing=(0.8, 0.8, 0.8)).hu, hu)
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CTInstructError, match="no readable numpy file"):
        read_volume(tmp_path / "pickled.npy", spacing=(1, 1, 1))


@pytest.mark.parametrize("suffix", ["png", "bmp", "jpg"])
def test_pictures_are_slices_in_a_stated_window(suffix: str, tmp_path: Path) -> None:
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    Image.fromarray(grey).save(tmp_path / f"slice.{suffix}")
    volume = read_volume(tmp_path / f"slice.{suffix}", window=(-1000, 400))
    assert volume.shape == (1, 32, 32)
    assert abs(float(volume.hu[0, 0, 0]) + 1000) < 20
    assert any("black to white" in note for note in read_volume(tmp_path / f"slice.{suffix}").warnings)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "grey.png")
    assert read_volume(tmp_path / "grey.png").shape == (1, 32, 32)


def test_sixteen_bit_pictures(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / "slice.png")
    assert read_volume(tmp_path / "slice.png", window=(-1000, 1000)).hu.max() == pytest.approx(1000)


def test_bad_files_give_one_sentence(tmp_path: Path) -> None:
    for path, message in bad_files(tmp_path).values():
        with pytest.raises(CTInstructError, match=message) as error:
            read_volume(path)
        assert "\n" not in str(error.value)
        assert path.name in str(error.value)


def test_sizes_are_checked_before_anything_is_unpacked(tmp_path: Path) -> None:
    nib.save(as_nifti(asymmetric((8, 16, 16)), "RAS"), tmp_path / "scan.nii.gz")
    with pytest.raises(CTInstructError, match="pass max_bytes"):
        read_volume(tmp_path / "scan.nii.gz", max_bytes=1000)


def test_a_mask_of_another_shape_is_refused() -> None:
    volume = read_volume(asymmetric(), spacing=(1, 1, 1))
    with pytest.raises(CTInstructError, match="must be equal"):
        volume.to_source(np.zeros((2, 2, 2)))
