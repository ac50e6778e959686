"""The format is told by a file's first bytes, whatever its name, in Python and on the command line."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image
from scans import as_nifti, asymmetric, dicom_slice, save

from ctinstruct_hf import CTInstructError, read_volume
from ctinstruct_hf.processing import volume_zip
from ctinstruct_hf.processing.volume_reading import format_of

HU = asymmetric((4, 6, 5))
MHD = """ObjectType = Image
NDims = 3
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 1 1 2
DimSize = 5 6 4
ElementType = MET_SHORT
ElementDataFile = a.raw
"""


def written(folder: Path) -> dict[str, tuple[Path, dict]]:
    """One good file of each format under its usual name, and what it needs beside it to be read."""
    image = SimpleITK.GetImageFromArray(HU)
    for name in ("scan.mha", "scan.nrrd"):
        SimpleITK.WriteImage(image, str(folder / name), name == "scan.nrrd")
    nib.save(as_nifti(HU, "LPS"), folder / "scan.nii")
    nib.save(as_nifti(HU, "LPS"), folder / "scan.nii.gz")
    nib.save(nib.Nifti2Image(HU.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0])), folder / "two.nii.gz")
    np.save(folder / "scan.npy", HU)
    np.savez_compressed(folder / "scan.npz", ct=HU)
    for suffix in ("png", "bmp", "tif", "jpg"):
        Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5) * 8).save(folder / f"slice.{suffix}", quality=100)
    save(dicom_slice(HU[0]), folder / "slice.dcm")
    with zipfile.ZipFile(folder / "scan.zip", "w") as archive:
        archive.write(folder / "scan.nii.gz", "a scan (1)")
    spacing = {"spacing": (1.0, 1.0, 1.0)}
    return {path.name: (path, spacing if path.suffix in (".npy", ".npz") else {}) for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", ["scan", "scan.nii (1).gz", "scan.nii.gz.download", "scan.nii.gz ", "scan.dcm", "s.png", "x.nii"]
)
def test_files_of_any_name_are_read_by_their_first_bytes(name: str, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    for usual, (path, needs) in written(tmp_path / "good").items():
        expected = read_volume(path, **needs)
        renamed = tmp_path / name
        renamed.write_bytes(path.read_bytes())
        volume = read_volume(renamed, **needs)
        assert np.array_equal(volume.hu, expected.hu), usual
        assert volume.warnings == expected.warnings, usual
        assert volume.source.kind == expected.source.kind, usual


def test_a_broken_file_is_blamed_as_what_it_is_called(tmp_path: Path) -> None:
    for name, why in {
        "a.nii": "no NIfTI",
        "a.npy": "numpy",
        "a.png": "picture",
        "a.mha": "MetaImage",
        "a": "neither",
    }.items():
        (tmp_path / name).write_bytes(bytes(range(1, 200)) * 4)
        with pytest.raises(CTInstructError, match=why):
            read_volume(tmp_path / name)


@pytest.mark.parametrize("usual", ["scan.npy", "scan.mha", "scan.nrrd", "slice.png"])
def test_other_formats_packed_by_gzip_are_to_be_unpacked(usual: str, tmp_path: Path) -> None:
    path, _ = written(tmp_path)[usual]
    (tmp_path / "packed").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(CTInstructError, match="unpack it first"):
        read_volume(tmp_path / "packed")


def test_a_folder_and_a_slice_are_dicom(tmp_path: Path) -> None:
    assert format_of(tmp_path) == "dicom"
    assert format_of(save(dicom_slice(HU[0]), tmp_path / "scan.nii.gz")) == "dicom"


@pytest.mark.parametrize("name", ["scan", "scan.nii (1).gz", "scan.nii.gz.download"])
def test_the_command_line_takes_a_scan_of_any_name(name: str, small_scan: Path, tmp_path: Path) -> None:
    from ctinstruct_hf.inference.predict import find_scans

    (tmp_path / "in").mkdir()
    renamed = tmp_path / "in" / name
    renamed.write_bytes(small_scan.read_bytes())
    found = find_scans([renamed])
    assert [scan.path for scan in found] == [renamed]
    assert read_volume(found[0].path).shape == (24, 48, 48)


# pictures


def picture(values: np.ndarray, form: str, path: Path, **more) -> Path:
    Image.fromarray(values).save(path, form, **more)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int16])
def test_tiff_of_wide_numbers_holds_hu_as_stored(dtype: type, tmp_path: Path) -> None:
    if dtype is np.int16:  # Pillow writes none
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(HU[0]), str(tmp_path / "slice.tif"))
    else:
        picture(HU[0].astype(dtype), "TIFF", tmp_path / "slice.tif")
    volume = read_volume(tmp_path / "slice.tif")
    assert np.array_equal(volume.hu[0], HU[0])
    assert any("taken as HU" in note for note in volume.warnings)
    with pytest.raises(CTInstructError, match="no window"):
        read_volume(tmp_path / "slice.tif", window=(-1000, 1000))


@pytest.mark.parametrize("form", ["TIFF", "GIF", "PNG", "WEBP"])
def test_several_pages_or_frames_are_refused_and_counted(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)) for _ in range(3)]
    pages[0].save(tmp_path / "pages.png", form, save_all=True, append_images=pages[1:])
    with pytest.raises(CTInstructError, match="holds 3 pages or frames"):
        read_volume(tmp_path / "pages.png")
    with Image.open(tmp_path / "pages.png") as opened, pytest.raises(CTInstructError, match="holds 3 pages or frames"):
        read_volume(opened)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_a_picture_is_turned_as_viewers_turn_it(form: str, turn: int, tmp_path: Path) -> None:
    upright = np.add.outer(np.arange(0, 160, 4), np.arange(0, 90, 3)).astype(np.uint8)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1],
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = turn
    path = picture(
        np.ascontiguousarray(stored),
        form,
        tmp_path / "slice",
        exif=exif,
        **({"quality": 100} if form == "JPEG" else {}),
    )
    volume = read_volume(path, window=(0, 255))
    assert volume.shape == (1, *upright.shape)
    assert np.abs(volume.hu[0] - upright).max() <= 3
    assert any("turned" in note for note in volume.warnings) == (turn != 1)


def test_twelve_bits_in_sixteen_and_pictures_of_masks_are_told(tmp_path: Path) -> None:
    ramp = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    assert any("12 bits" in note for note in read_volume(picture(ramp, "PNG", tmp_path / "a")).warnings)
    assert not any("12 bits" in note for note in read_volume(picture(ramp * 16, "PNG", tmp_path / "b")).warnings)
    mask = ((ramp > 1000) * 255).astype(np.uint8)
    assert any("mask" in note for note in read_volume(picture(mask, "PNG", tmp_path / "c")).warnings)


def test_a_cut_picture_is_refused_in_one_sentence(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(data, "PNG")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:2000])
    with pytest.raises(CTInstructError, match="no readable picture"):
        read_volume(tmp_path / "cut.png")


def test_a_tiff_of_16_bits_with_white_as_0_is_refused(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000)
    picture.save(tmp_path / "slice.tif", tiffinfo={262: 0})
    with pytest.raises(CTInstructError, match="white as 0"):
        read_volume(tmp_path / "slice.tif")


@pytest.mark.parametrize("window", [(float("nan"), 1.0), (40.0, 40.0), (0.0, float("inf"))])
def test_a_window_of_a_picture_is_two_numbers(window: tuple[float, float], tmp_path: Path) -> None:
    Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5)).save(tmp_path / "slice.png")
    with pytest.raises(CTInstructError, match="window"):
        read_volume(tmp_path / "slice.png", window=window)


# packed files


def nifti_bytes() -> bytes:
    return nib.Nifti1Image(HU.transpose(2, 1, 0), np.diag([-1.0, -1.0, 2.0, 1.0])).to_bytes()


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "members",
    [
        {"scan.nii": nifti_bytes(), "__MACOSX/._scan.nii": b"Mac", ".DS_Store": b"Mac"},
        {"study/scan.nii.gz": gzip.compress(nifti_bytes()), "study/readme.txt": b"A study.", "LICENSE": b""},
        {
            "/abs/a.hdr": nifti_bytes()[:108] + bytes(4) + nifti_bytes()[112:344] + b"ni1\0",
            "/abs/a.img": nifti_bytes()[352:],
        },
        {"x/a.mhd": MHD.encode(), "x/a.raw": HU.astype("<i2").tobytes(), "y/a.raw": b"another one"},
    ],
    ids=["of a Mac", "with a text", "two parts", "header and data"],
)
def test_the_only_scan_of_a_zip_is_read_whatever_lies_beside_it(members: dict[str, bytes], tmp_path: Path) -> None:
    volume = read_volume(zipped(tmp_path / "scan.zip", members))
    assert np.array_equal(volume.in_file_axes(volume.hu), HU.transpose(2, 1, 0))
    assert volume.source.name == "scan.zip"


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"a.nii": nifti_bytes(), "b.nii": nifti_bytes()}, r"2 scans \(a.nii, b.nii\)"),
        ({"inner.zip": b"PK\x05\x06" + bytes(18)}, r"a zip \(inner.zip\)"),
        ({f"{number}": b"" for number in range(11)}, "11 files"),
        ({".hidden": b"x"}, "empty"),
    ],
    ids=["two scans", "a zip", "many files", "hidden files"],
)
def test_a_zip_with_no_single_scan_says_what_it_holds(
    members: dict[str, bytes], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_zip, "MOST_FILES", 10)
    with pytest.raises(CTInstructError, match=found):
        read_volume(zipped(tmp_path / "scan.zip", members))


@pytest.mark.parametrize("behind", [b"\0" * 100, b"x", b"\x1f", b"signature of an archive"])
def test_bytes_behind_the_end_of_gzip_are_left_unread(behind: bytes, tmp_path: Path) -> None:
    whole = nifti_bytes()
    parts = gzip.compress(whole[:400]) + gzip.compress(whole[400:])
    for packed in (gzip.compress(whole), parts):
        (tmp_path / "scan.nii.gz").write_bytes(packed + behind)
        volume = read_volume(tmp_path / "scan.nii.gz")
        assert np.array_equal(volume.in_file_axes(volume.hu), HU.transpose(2, 1, 0))
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(whole)[:-30])
    with pytest.raises(CTInstructError, match="cut short"):
        read_volume(tmp_path / "scan.nii.gz")
