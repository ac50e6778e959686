"""HU and place as a file says them: scale factors, units, signs, sheared axes, and masks of any type back."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from scans import AXIS_ORDERS, as_nifti, asymmetric

from ctinstruct_hf import CTInstructError, CTVolume, read_volume

AFFINE = np.array([[-1.25, 0, 0, 30], [0, -1.5, 0, 28], [0, 0, 2.5, -30], [0, 0, 0, 1.0]])
SIZE = (16, 14, 12)


def field(affine: np.ndarray, size: tuple[int, ...] = SIZE) -> np.ndarray:
    """float64 (i, j, k): HU that are linear in RAS mm, so that linear interpolation is exact."""
    places = np.stack(np.indices(size), -1) @ affine[:3, :3].T + affine[:3, 3]
    return places @ [-4, -3, 5] + 20


def off(volume: CTVolume, inside_of: np.ndarray | None = None) -> float:
    """The largest difference of a volume's voxels from the field; only a voxel inside of a grid's faces where one is given."""
    depth, height, width = np.indices(volume.hu.shape)
    places = np.stack([width, height, depth], -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    wrong = np.abs(volume.hu - (places @ [-4, -3, 5] + 20))
    if inside_of is not None:
        inverse = np.linalg.inv(inside_of)
        stored = places @ inverse[:3, :3].T + inverse[:3, 3]
        wrong = wrong[((stored > 1.5) & (stored < np.array(SIZE) - 2.5)).all(-1)]
        assert len(wrong) > 100
    return float(wrong.max())


def changed(path: Path, change: dict, stored: np.ndarray | None = None, kind: type = nib.Nifti1Image) -> Path:
    """A NIfTI file of the field whose header's fields are changed; a pair by the name of its header."""
    image = kind(np.rint(field(AFFINE)).astype(np.int16) if stored is None else stored, AFFINE)
    nib.save(image, path)
    data = bytearray(path.read_bytes())
    length = 540 if kind is nib.Nifti2Image else 348
    header = kind.header_class(bytes(data[:length]), check=False)
    for name, value in change.items():
        if isinstance(value, dict):
            for index, one in value.items():
                header[name][index] = one
        else:
            header[name] = value
    data[:length] = header.binaryblock
    path.write_bytes(data)
    return path


# values


@pytest.mark.parametrize(("slope", "inter"), [(1, -1024), (2, -1000), (0.5, -600.25), (-1, 300)])
def test_scale_factors_apply_to_objects_and_pairs_as_to_files(slope: float, inter: float, tmp_path: Path) -> None:
    stored = np.rint((field(AFFINE) - inter) / slope).astype(np.int16)
    scale = {"scl_slope": slope, "scl_inter": inter}
    single = changed(tmp_path / "scan.nii", scale, stored)
    pair = changed(tmp_path / "pair.hdr", scale, stored, nib.Nifti1Pair)
    for packed in (".hdr", ".img"):
        (tmp_path / f"packed{packed}.gz").write_bytes(gzip.compress((tmp_path / f"pair{packed}").read_bytes()))
    expected = nib.load(single).get_fdata()
    scans = [single, pair, pair.with_suffix(".img"), tmp_path / "packed.hdr.gz", tmp_path / "packed.img.gz"]
    objects = [nib.load(single), nib.load(pair), nib.load(single).slicer[:, :, :], nib.Nifti1Image(expected, AFFINE)]
    for scan in scans + objects:
        volume = read_volume(scan)
        assert np.allclose(volume.in_file_axes(volume.hu), expected)
        assert off(volume) <= max(1.0, abs(slope)) / 2 + 1e-3


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.int32])
def test_a_slope_without_an_intercept_is_refused_and_no_slope_is_none(dtype: type, tmp_path: Path) -> None:
    stored = np.rint(field(AFFINE)).astype(dtype)
    for inter in (np.nan, np.inf):
        with pytest.raises(CTInstructError, match=r"scl_inter (nan|inf)"):
            read_volume(changed(tmp_path / "scan.nii", {"scl_slope": 2, "scl_inter": inter}, stored))
    for slope, inter in ((0, 5), (np.nan, np.nan), (np.nan, 7)):
        assert off(read_volume(changed(tmp_path / "scan.nii", {"scl_slope": slope, "scl_inter": inter}, stored))) <= 0.5


def test_wide_integers_keep_their_digits_when_scaled(tmp_path: Path) -> None:
    stored = np.rint((field(AFFINE) + 1000) * 1e6).astype(np.int32)
    volume = read_volume(changed(tmp_path / "scan.nii", {"scl_slope": 1e-6, "scl_inter": -1000}, stored))
    assert off(volume) < 1e-3


@pytest.mark.parametrize("slope", [1.0, 2.0])
def test_what_is_no_real_number_is_refused_before_it_is_scaled(slope: float, tmp_path: Path) -> None:
    values = field(AFFINE).astype(np.complex64)
    scans: list = [
        changed(tmp_path / "scan.nii", {"scl_slope": slope, "scl_inter": 0}, values),
        nib.Nifti1Image(values, AFFINE),
    ]
    scans.append(nib.load(scans[0]))
    np.save(tmp_path / "scan.npy", values)
    for scan in scans:
        with pytest.raises(CTInstructError, match="complex64 values"):
            read_volume(scan)
    with pytest.raises(CTInstructError, match="complex64 values"):
        read_volume(tmp_path / "scan.npy", spacing=(1, 1, 1))
    image = SimpleITK.GetImageFromArray(values)
    with pytest.raises(CTInstructError, match="complex64 values"):
        read_volume(image)


def test_voxels_of_nifti_2_begin_after_its_longer_header(tmp_path: Path) -> None:
    assert off(read_volume(changed(tmp_path / "a.nii", {"vox_offset": 0}, kind=nib.Nifti2Image))) <= 0.5
    assert off(read_volume(changed(tmp_path / "b.nii", {"vox_offset": 0}))) <= 0.5
    with pytest.raises(CTInstructError, match="values: expected numbers"):
        read_volume(changed(tmp_path / "c.nii", {"datatype": 0}))


# place


@pytest.mark.parametrize("qfac", [0.0, 1.0, -1.0, 7.0])
def test_qfac_is_minus_one_or_else_one(qfac: float, tmp_path: Path) -> None:
    change = {"sform_code": 0, "qform_code": 1, "pixdim": {0: qfac}}
    volume = read_volume(changed(tmp_path / "scan.nii", change))
    flipped = AFFINE.copy()
    flipped[:3, 2] *= -1 if qfac < 0 else 1
    assert np.allclose(volume.source.affine, flipped, atol=1e-4)


def test_voxel_sizes_without_a_form_have_no_sign_and_it_is_told(tmp_path: Path) -> None:
    change = {"sform_code": 0, "qform_code": 0, "pixdim": {1: -1.25, 2: 1.5, 3: -2.5}}
    path = changed(tmp_path / "scan.nii", change)
    volume = read_volume(path)
    assert np.allclose(volume.source.affine, nib.load(path).affine)
    assert any("no orientation" in note for note in volume.warnings)


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("micron", 1e3), ("mm", 1.0), ("unknown", 1.0)])
def test_units_of_nifti_become_mm(unit: str, factor: float, tmp_path: Path) -> None:
    affine = AFFINE.copy()
    affine[:3] *= factor
    image = nib.Nifti1Image(np.rint(field(AFFINE)).astype(np.int16), affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    for scan in (tmp_path / "scan.nii", nib.load(tmp_path / "scan.nii")):
        volume = read_volume(scan)
        assert off(volume) < 0.51
        assert volume.warnings == []


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1.0), ("mm", 1e-3), ("mm", 1e3), ("micron", 1.0)])
def test_units_that_give_impossible_voxels_are_told(unit: str, factor: float, tmp_path: Path) -> None:
    affine = AFFINE.copy()
    affine[:3] *= factor
    image = nib.Nifti1Image(np.rint(field(AFFINE)).astype(np.int16), affine)
    image.header.set_xyzt_units(unit)
    assert any("unit of length is wrong" in note for note in read_volume(image).warnings)


def test_an_unknown_unit_is_mm_and_told(tmp_path: Path) -> None:
    volume = read_volume(changed(tmp_path / "scan.nii", {"xyzt_units": 7}))
    assert off(volume) <= 0.5
    assert any("unknown unit" in note for note in volume.warnings)


SHEARS = {
    "slices along j": {(1, 2): 1.0},
    "slices along i": {(0, 2): -0.7},
    "rows along i": {(0, 1): 0.5},
    "columns along j": {(1, 0): 0.4},
    "columns along k": {(2, 0): 0.5},
    "all at once": {(0, 1): 0.4, (0, 2): 0.6, (1, 2): -0.8},
}


def as_itk(values: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """The same image as SimpleITK holds it, in LPS."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(lengths.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / lengths).ravel().tolist())
    return image


@pytest.mark.parametrize("name", SHEARS)
@pytest.mark.parametrize("form", ["nii", "mha", "nrrd", "simpleitk", "nibabel"])
def test_sheared_axes_are_made_upright_and_masks_go_back(name: str, form: str, tmp_path: Path) -> None:
    affine = AFFINE.copy()
    for index, value in SHEARS[name].items():
        affine[index] = value
    values = np.rint(field(affine)).astype(np.int16)
    image, itk = nib.Nifti1Image(values, affine), as_itk(values, affine)
    scan = {"nibabel": image, "simpleitk": itk}.get(form, tmp_path / f"scan.{form}")
    if form == "nii":
        nib.save(image, scan)
    elif form in ("mha", "nrrd"):
        SimpleITK.WriteImage(itk, str(scan))
    volume = read_volume(scan)
    assert any("sheared" in note for note in volume.warnings)
    sides = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    assert np.allclose(sides.T @ sides, np.eye(3), atol=1e-6)
    assert off(volume, inside_of=affine) <= 1
    depth, height, width = np.indices(volume.hu.shape)
    places = np.stack([width, height, depth], -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    back = volume.to_source((places @ [-4, -3, 5] + 20) > 40)
    assert back.shape == SIZE
    assert np.allclose(back.affine, affine, atol=1e-5)
    assert ((np.asarray(back.dataobj) > 0) == (field(affine) > 40)).mean() > 0.98


def test_labels_on_sheared_axes_stay_labels() -> None:
    affine = AFFINE.copy()
    affine[0, 1], affine[1, 2] = 0.5, 1.0
    values = np.where(field(affine) > np.median(field(affine)), 7, 3).astype(np.uint8)
    volume = read_volume(nib.Nifti1Image(values, affine), labels=True)
    assert set(np.unique(volume.hu)) == {0, 3, 7}


def test_a_shear_that_would_take_too_much_memory_is_refused() -> None:
    affine = np.diag([-0.01, -0.01, 1.0, 1.0])
    affine[0, 2] = 8.0
    image = nib.Nifti1Image(np.arange(-600, 1000, dtype=np.int16).reshape(10, 10, 16), affine)
    with pytest.raises(CTInstructError, match="upright grid would unpack"):
        read_volume(image, max_bytes=2**20)


# headers of NRRD and MetaImage


def nrrd(path: Path, *lines: str) -> Path:
    """The field as NRRD with these lines of the header for its place."""
    stored = np.rint(field(AFFINE)).astype("<i2").tobytes(order="F")
    head = [
        "NRRD0005",
        "type: int16",
        "dimension: 3",
        f"sizes: {' '.join(map(str, SIZE))}",
        "endian: little",
        "encoding: raw",
    ]
    path.write_bytes("\n".join([*head, *lines, "", ""]).encode() + stored)
    return path


def test_units_of_nrrd_become_mm_and_unknown_ones_are_told(tmp_path: Path) -> None:
    for unit, factor in {"cm": 10.0, "m": 1000.0, "um": 0.001, "mm": 1.0, "furlong": 1.0}.items():
        columns = [tuple(one / factor for one in (side[0] * -1, side[1] * -1, side[2])) for side in AFFINE[:3].T]
        text = ["(" + ",".join(map(repr, map(float, column))) + ")" for column in columns]
        volume = read_volume(
            nrrd(
                tmp_path / "scan.nrrd", "space: left-posterior-superior", f"space directions: {' '.join(text[:3])}",
                f'space units: "{unit}" "{unit}" "{unit}"', f"space origin: {text[3]}",
            )
        )  # fmt: skip
        assert off(volume) < 0.51
        assert any("unknown unit" in note for note in volume.warnings) == (unit == "furlong")


@pytest.mark.parametrize("space", ["scanner-xyz", "3D-right-handed", "right-anterior-inferior"])
def test_a_space_without_a_patient_is_told(space: str, tmp_path: Path) -> None:
    path = nrrd(
        tmp_path / "scan.nrrd",
        f"space: {space}",
        "space directions: (1.25,0,0) (0,1.5,0) (0,0,2.5)",
        "space origin: (-30,-28,-30)",
    )
    volume = read_volume(path)
    assert any("no left and head" in note for note in volume.warnings)


def test_spacing_that_nrrd_and_metaimage_lack_must_be_given(tmp_path: Path) -> None:
    bare = nrrd(tmp_path / "scan.nrrd")
    stored = np.rint(field(AFFINE)).astype("<i2").tobytes(order="F")
    size = " ".join(map(str, SIZE))
    meta = tmp_path / "scan.mha"
    meta.write_bytes(
        f"NDims = 3\nBinaryData = True\nDimSize = {size}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n".encode()
        + stored
    )
    for path in (bare, meta):
        with pytest.raises(CTInstructError, match="no voxel spacing"):
            read_volume(path)
        volume = read_volume(path, spacing=(2.5, 1.5, 1.25))
        assert volume.spacing == (2.5, 1.5, 1.25)
        assert any("no orientation" in note for note in volume.warnings)
    with pytest.raises(CTInstructError, match="expected positive numbers"):
        read_volume(nrrd(tmp_path / "nan.nrrd", "spacings: 1.25 1.5 nan"))
    for line in ("spacings: 1.25 1.5 2.5", "axis mins: 0 0 0\naxis maxs: 18.75 19.5 27.5\ncenters: node node node"):
        volume = read_volume(nrrd(tmp_path / "given.nrrd", line))
        assert volume.spacing == (2.5, 1.5, 1.25)
        assert any("no orientation" in note for note in volume.warnings)


def test_analyze_has_no_orientation_and_says_so(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(np.rint(field(AFFINE)).astype(np.int16), AFFINE), tmp_path / "scan.hdr")
    for scan in (tmp_path / "scan.hdr", tmp_path / "scan.img", nib.load(tmp_path / "scan.hdr")):
        volume = read_volume(scan)
        assert volume.spacing == (2.5, 1.5, 1.25)
        assert any("Analyze file has no orientation" in note for note in volume.warnings)


# writing, and spacing


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"],
)
def test_masks_of_any_number_return_to_the_source_and_to_disk(dtype: str, tmp_path: Path) -> None:
    affine = AFFINE[:, [2, 0, 1, 3]]
    volume = read_volume(nib.Nifti1Image(np.rint(field(affine)).astype(np.int16), affine))
    mask = (np.arange(volume.hu.size).reshape(volume.hu.shape) % 101).astype(dtype)
    back = volume.to_source(mask, tmp_path / "mask.nii.gz")
    assert np.array_equal(volume.from_file_axes(np.asarray(back.dataobj)), mask)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), np.asarray(back.dataobj))
    assert np.array_equal(np.asarray(volume.to_source(torch.from_numpy(mask)).dataobj), np.asarray(back.dataobj))


@pytest.mark.parametrize("codes", AXIS_ORDERS)
def test_file_axes_and_back_is_the_same_array_in_every_axis_order(codes: str) -> None:
    volume = read_volume(as_nifti(asymmetric((3, 4, 5)), codes))
    assert np.array_equal(volume.from_file_axes(volume.in_file_axes(volume.hu)), volume.hu)


def test_masks_of_wide_values_keep_them_and_of_no_numbers_are_refused() -> None:
    volume = read_volume(nib.Nifti1Image(np.rint(field(AFFINE)).astype(np.int16), AFFINE))
    for value in (-5, 2**31, 2**40):
        mask = np.full(volume.hu.shape, value, np.int64)
        assert np.asarray(volume.to_source(mask).dataobj)[0, 0, 0] == value
    for values in (np.zeros(volume.hu.shape, complex), np.zeros(volume.hu.shape, "U1")):
        with pytest.raises(CTInstructError, match="expected numbers"):
            volume.to_source(values)


@pytest.mark.parametrize(
    "stored",
    [
        '"123"',
        "[1, 2]",
        "[1, 2, 3, 4]",
        "5",
        "null",
        '["2.5", "1.5", "1"]',
        "[true, 1, 1]",
        "[0, 1, 1]",
        "[1, NaN, 1]",
        "{}",
    ],
)
def test_a_spacing_that_is_no_three_numbers_is_refused(stored: str, tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.rint(field(AFFINE)).astype(np.int16))
    (tmp_path / "scan.json").write_text(f'{{"spacing": {stored}}}')
    with pytest.raises(CTInstructError, match=r"scan.json: spacing is .*expected three positive numbers"):
        read_volume(tmp_path / "scan.npy")


@pytest.mark.parametrize("spacing", ["123", (1, 2), (1, 2, "3"), (1, 2, -3), (1, 2, np.inf)])
def test_a_spacing_argument_that_is_no_three_numbers_is_refused(spacing: object) -> None:
    with pytest.raises(CTInstructError, match="three positive numbers"):
        read_volume(np.zeros((3, 4, 5)), spacing=spacing)
    assert read_volume(np.zeros((3, 4, 5)), spacing=torch.tensor([1.0, 2.0, 3.0])).spacing == (1, 2, 3)
