"""HU of DICOM pixels, however they are stored, and where the slices lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEGLSLossless, RLELossless
from scans import asymmetric, dicom_series, dicom_slice, enhanced, save

from ctinstruct_hf import CTInstructError, read_volume

HU = asymmetric((4, 16, 16))


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
@pytest.mark.parametrize("shape", ["slice", "enhanced", "inverted"])
def test_compressed_pixels_are_rescaled_once_and_never_inverted(shape: str, syntax: str, tmp_path: Path) -> None:
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls")
    stored = (HU + 1024).astype(np.uint16)
    if shape == "enhanced":
        data = pydicom.dcmread(enhanced(stored, tmp_path / "scan"))
        data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleIntercept = -1024
    else:
        inverted = {"PhotometricInterpretation": "MONOCHROME1"} if shape == "inverted" else {}
        data = dicom_slice(np.ascontiguousarray(stored[0]), RescaleIntercept=-1024, **inverted)
    data.compress(syntax)
    volume = read_volume(save(data, tmp_path / "scan"))
    assert np.array_equal(volume.hu, HU if shape == "enhanced" else HU[:1])
    assert volume.warnings == []


def test_a_compressed_image_larger_than_its_header_says_is_not_unpacked(tmp_path: Path) -> None:
    pytest.importorskip("jpeg_ls")
    data = dicom_slice(np.zeros((600, 500), np.uint16))
    data.compress(JPEGLSLossless)
    data.Rows = data.Columns = 8
    with pytest.raises(CTInstructError, match=r"image of \(600, 500\) pixels, its header says \(8, 8\)"):
        read_volume(save(data, tmp_path / "scan"))


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (16, np.uint16), (32, np.uint32), (32, np.int32)])
def test_pixels_of_8_16_and_32_bits(bits: int, dtype: type, tmp_path: Path) -> None:
    hu = HU.clip(-100, 150)[0]
    signed = np.dtype(dtype).kind == "i"
    data = dicom_slice(
        (hu if signed else hu + 100).astype(dtype),
        BitsAllocated=bits,
        BitsStored=bits,
        HighBit=bits - 1,
        PixelRepresentation=int(signed),
        RescaleIntercept=0 if signed else -100,
    )
    assert np.array_equal(read_volume(save(data, tmp_path / "scan")).hu[0], hu)


@pytest.mark.parametrize(("high", "signed"), [(11, 0), (11, 1), (13, 0), (15, 0), (15, 1)])
def test_only_the_stored_bits_below_the_high_bit_count(high: int, signed: int, tmp_path: Path) -> None:
    hu = HU[0]
    value = (hu.astype(int) + (0 if signed else 1024)) & 0xFFF
    noise = np.random.default_rng(0).integers(0, 2**16, hu.shape) & ~(0xFFF << (high - 11))
    words = ((value << (high - 11)) | noise).astype(np.uint16)
    data = dicom_slice(
        words,
        BitsStored=12,
        HighBit=high,
        PixelRepresentation=signed,
        RescaleIntercept=0 if signed else -1024,
    )
    assert np.array_equal(read_volume(save(data, tmp_path / "scan")).hu[0], hu)


PADDING: dict[str, tuple[int, int | None, np.ndarray, dict[str, Any]]] = {
    "a value": (63, None, np.full(16, 63, np.uint16), {"RescaleIntercept": -1024}),
    "a range": (4000, 4095, np.linspace(4000, 4095, 16).astype(np.uint16), {"RescaleIntercept": -1024}),
    "a range downward": (4095, 4000, np.linspace(4000, 4095, 16).astype(np.uint16), {"RescaleIntercept": -1024}),
    "a signed range": (-20, -10, np.linspace(-20, -10, 16).astype(np.int16), {}),
    "outside the bits": (63536, None, np.full(16, 63536, np.uint16), {"RescaleIntercept": -1024, "BitsStored": 12, "HighBit": 11}),
    "negative as unsigned": (63536, None, np.full(16, 63536, np.uint16), {"RescaleIntercept": -1024}),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDING)
def test_padding_is_air_and_nothing_else_is(name: str, tmp_path: Path) -> None:
    value, limit, row, tags = PADDING[name]
    hu = np.full((16, 16), 100, np.int16)
    stored = (hu - tags.get("RescaleIntercept", 0)).astype(row.dtype)
    stored[3] = row
    data = dicom_slice(stored, **tags)
    vr = "SS" if row.dtype == np.int16 else "US"
    data.add_new("PixelPaddingValue", vr, value)
    if limit is not None:
        data.add_new("PixelPaddingRangeLimit", vr, limit)
    volume = read_volume(save(data, tmp_path / "scan"))
    hu[3] = -1024
    assert np.array_equal(volume.hu[0], hu)
    assert volume.warnings == []


@pytest.mark.parametrize("unit", ["ED", "Z_EFF", "MGML", "PCT"])
def test_values_in_another_unit_than_hu_are_refused(unit: str, tmp_path: Path) -> None:
    with pytest.raises(CTInstructError, match=f"{unit} .*instead of HU"):
        read_volume(dicom_series(tmp_path / "a", HU, RescaleType=unit))


@pytest.mark.parametrize(("unit", "told"), [("HU", False), ("US", True), ("HU_MOD", True)])
def test_an_unspecified_unit_is_a_warning(unit: str, told: bool, tmp_path: Path) -> None:
    volume = read_volume(dicom_series(tmp_path / "a", HU, RescaleType=unit))
    assert np.array_equal(volume.hu, HU)
    assert any("RescaleType" in note for note in volume.warnings) is told


@pytest.mark.parametrize(
    ("missing", "message", "offset"),
    [
        (["RescaleSlope"], "4 slices have no rescale slope: 1 is taken", 0),
        (["RescaleIntercept"], "4 slices have no rescale intercept: 0 is taken", 24),
        (["RescaleSlope", "RescaleIntercept"], "no rescale slope and intercept: stored values are taken as HU", 24),
    ],
)
def test_what_is_missing_of_a_rescale_is_named_and_the_rest_applied(
    missing: list[str], message: str, offset: int, tmp_path: Path
) -> None:
    tags: dict[str, Any] = {"RescaleIntercept": -24, "RescaleSlope": 1, **dict.fromkeys(missing)}
    volume = read_volume(dicom_series(tmp_path / "a", HU + np.int16(24), **tags))
    assert np.array_equal(volume.hu, HU + offset)
    assert any(message in note for note in volume.warnings)


@pytest.mark.parametrize("tags", [{"RescaleSlope": "0"}, {"RescaleIntercept": "nan"}, {"RescaleSlope": "inf"}])
def test_a_rescale_that_gives_no_number_is_refused(tags: dict[str, str], tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "a", HU)
    keyword, value = next(iter(tags.items()))
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data[keyword] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(keyword), "DS", 4, f"{value:<4}".encode(), 0, False, True
        )
        data.save_as(file)
    with pytest.raises(CTInstructError, match="rescale slope of 0 or a rescale that is no number"):
        read_volume(folder)


def test_pixels_that_were_lossy_once_are_named(tmp_path: Path) -> None:
    volume = read_volume(dicom_series(tmp_path / "a", HU, LossyImageCompression="01"))
    assert any("lossy" in note for note in volume.warnings)


def test_float_pixels_and_missing_modality(tmp_path: Path) -> None:
    assert np.array_equal(read_volume(dicom_series(tmp_path / "a", HU, Modality=None)).hu, HU)
    data = dicom_slice(HU[0], BitsAllocated=32)
    del data.PixelData
    data.FloatPixelData = HU[0].astype(np.float32).tobytes()
    with pytest.raises(CTInstructError, match="no integer pixels"):
        read_volume(save(data, tmp_path / "float"))


@pytest.mark.parametrize("degrees", [5, 20, -30])
def test_a_mask_of_a_tilted_scan_lies_on_the_tilted_grid(degrees: int, tmp_path: Path) -> None:
    hu = asymmetric((24, 20, 20))
    angle = np.radians(degrees)
    orientation = (1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(np.sin(angle)))
    volume = read_volume(dicom_series(tmp_path / "a", hu, orientation=orientation, step=(0.0, 0.0, 2.5)))
    image = volume.to_source(np.zeros(volume.shape, np.uint8))
    assert image.shape == (20, 20, 24)
    # RAS mm of the first pixel of the last slice, as its header has it in LPS
    assert np.allclose((image.affine @ [0, 0, 23, 1])[:3], [30, 40, 10 + 23 * 2.5], atol=1e-4)
    assert np.allclose((image.affine @ [0, 19, 0, 1])[:3], [30, 40 - 28.5 * np.cos(angle), 10 + 28.5 * np.sin(angle)], atol=1e-3)  # fmt: skip


def test_a_mask_of_uneven_slices_has_their_mean_distance_and_says_how_far_off(tmp_path: Path) -> None:
    heights = [0, 2, 4, 6, 8, 13, 18, 23]
    positions = [np.array([0.0, 0.0, float(z)]) for z in heights]
    volume = read_volume(dicom_series(tmp_path / "a", asymmetric((8, 8, 8)), positions=positions))
    image = volume.to_source(np.zeros(volume.shape, np.uint8))
    assert image.affine[2, 2] == pytest.approx(23 / 7)
    farthest = max(abs(z - k * 23 / 7) for k, z in enumerate(heights))
    assert any(f"mean distance, up to {farthest:.1f} mm off" in note for note in volume.warnings)


def test_slices_shifted_sideways_are_not_called_a_tilt(tmp_path: Path) -> None:
    positions = [np.array([3.0 if k > 3 else 0.0, 0.0, 2.0 * k]) for k in range(8)]
    volume = read_volume(dicom_series(tmp_path / "a", asymmetric((8, 16, 16)), positions=positions))
    assert any("shifted against each other" in note for note in volume.warnings)
    assert not any("tilted" in note for note in volume.warnings)


def test_a_slice_without_thickness_says_so(tmp_path: Path) -> None:
    path = save(dicom_slice(HU[0], SliceThickness=None), tmp_path / "scan")
    assert any("no thickness" in note for note in read_volume(path).warnings)
    assert read_volume(path, spacing=(4.0, 1.0, 1.0)).spacing == pytest.approx((4.0, 1.5, 1.0))


def test_one_enhanced_frame_may_have_all_its_groups_shared(tmp_path: Path) -> None:
    data = pydicom.dcmread(enhanced(HU[:1], tmp_path / "scan"))
    data.SharedFunctionalGroupsSequence[0].update(data.PerFrameFunctionalGroupsSequence[0])
    del data.PerFrameFunctionalGroupsSequence
    volume = read_volume(save(data, tmp_path / "scan"))
    assert np.array_equal(volume.hu, HU[:1])
    assert volume.warnings == []


def test_indices_of_colours_and_of_a_table_are_no_hu(tmp_path: Path) -> None:
    with pytest.raises(CTInstructError, match="colour image"):
        read_volume(save(dicom_slice(HU[0], PhotometricInterpretation="PALETTE COLOR"), tmp_path / "colours"))
    data = dicom_slice(HU[0])
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 16]
    data.ModalityLUTSequence = [table]
    with pytest.raises(CTInstructError, match="table"):
        read_volume(save(data, tmp_path / "table"))
