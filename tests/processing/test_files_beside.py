"""What a file names stays in its folder; packed files grow no further than stated."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from scans import as_nifti, asymmetric

from ctinstruct_hf import CTInstructError, read_volume
from ctinstruct_hf.processing.volume_files import inside

META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = {packed}
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 1 1.5 2
DimSize = {sizes}
ElementType = MET_SHORT
ElementDataFile = {data}
"""
NRRD = """NRRD0005
type: int16
dimension: 3
sizes: {sizes}
endian: little
encoding: {encoding}
space: left-posterior-superior
space directions: (1,0,0) (0,1.5,0) (0,0,2)
space origin: (0,0,0)
{data}
"""


def header(suffix: str, data: str, sizes: str = "13 11 9") -> str:
    """A detached header that names `data`."""
    if suffix == ".mhd":
        return META.format(packed=False, sizes=sizes, data=data)
    return NRRD.format(encoding="raw", sizes=sizes, data=f"data file: {data}\n")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of scans, and another patient's voxels outside of it, as secret.raw."""
    for name in ("scans", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "secret.raw").write_bytes(asymmetric().tobytes())
    (tmp_path / "scans" / "plain.raw").write_bytes(asymmetric().tobytes())
    (tmp_path / "scans" / "slice001.raw").write_bytes(asymmetric().tobytes())
    (tmp_path / "scans" / "link.raw").symlink_to(tmp_path / "other" / "secret.raw")
    (tmp_path / "scans" / "sub").symlink_to(tmp_path / "other")
    return tmp_path / "scans", tmp_path / "other"


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_detached_header_reads_the_plain_file_beside_it(suffix: str, folders: tuple[Path, Path]) -> None:
    scan = folders[0] / f"scan{suffix}"
    scan.write_text(header(suffix, "plain.raw"))
    volume = read_volume(scan)
    assert np.array_equal(volume.hu, asymmetric())
    assert volume.spacing == (2.0, 1.5, 1.0)
    assert volume.warnings == []


@pytest.mark.parametrize("suffix", [".mhd", ".nrrd"])
@pytest.mark.parametrize(
    "data",
    [
        "{other}/secret.raw", "../other/secret.raw", "./../other/secret.raw", "sub/secret.raw", "sub/../../other/secret.raw",
        "link.raw", "..\\other\\secret.raw", "C:\\secret.raw", "missing.raw", "slice%03d.raw 1 1 1",
        "../other/%s.raw 1 1 1", "LIST", "LIST 2\n../other/secret.raw", "sub", ".",
    ],
)  # fmt: skip
def test_a_header_names_no_file_outside_of_its_folder(suffix: str, data: str, folders: tuple[Path, Path]) -> None:
    scans, other = folders
    scan = scans / f"scan{suffix}"
    form = ".mhd" if suffix.startswith(".m") else ".nhdr"
    scan.write_text(header(form, data.format(other=other) if "{" in data else data))
    with pytest.raises(CTInstructError, match=r"outside|leads out|must lie beside|is not beside|a list of") as error:
        read_volume(scan)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("asked", [".hdr", ".img"])
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.AnalyzeImage])
def test_the_other_file_of_a_pair_is_no_link_out_of_its_folder(
    asked: str, kind: type, folders: tuple[Path, Path]
) -> None:
    scans, other = folders
    nib.save(kind(asymmetric(), np.diag([-1.0, -1.0, 1.0, 1.0])), other / "scan.hdr")
    assert read_volume(other / f"scan{asked}").shape == (13, 11, 9)
    for suffix in (".hdr", ".img"):
        target = scans / f"scan{suffix}"
        if suffix == asked:
            target.write_bytes((other / f"scan{suffix}").read_bytes())
        else:
            target.symlink_to(other / f"scan{suffix}")
    with pytest.raises(CTInstructError, match="leads out of its folder"):
        read_volume(scans / f"scan{asked}")


def test_a_spacing_beside_an_array_is_no_link_out_of_its_folder(folders: tuple[Path, Path]) -> None:
    scans, other = folders
    np.save(scans / "scan.npy", asymmetric())
    (other / "scan.json").write_text(json.dumps({"spacing": [1, 1, 1]}))
    (scans / "scan.json").symlink_to(other / "scan.json")
    with pytest.raises(CTInstructError, match="leads out of its folder"):
        read_volume(scans / "scan.npy")


@pytest.mark.parametrize("name", ["a.raw", "a/b.raw", "./a.raw", "a..b"])
def test_names_inside_a_folder_are_taken(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, "the header") == tmp_path / name


@pytest.mark.parametrize("name", ["", "..", "/a", "a/../../b", "\\\\host\\a", "c:/a", "a\0"])
def test_names_outside_of_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CTInstructError, match="outside of its folder"):
        inside(tmp_path, name, "the header")


def test_a_pipe_or_a_device_is_no_data_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.raw")
    (tmp_path / "scan.mhd").write_text(header(".mhd", "pipe.raw"))
    with pytest.raises(CTInstructError, match="is not beside it"):
        read_volume(tmp_path / "scan.mhd")


def packed_zeros(form: str, folder: Path, size: tuple[int, int, int]) -> Path:
    """A packed file whose header promises a volume of zeros of `size`; a MiB of it is there at most."""
    voxels = bytes(min(int(np.prod(size)) * 2, 2**20))
    path = folder / f"scan.{form}"
    sizes = " ".join(map(str, size))
    if form == "npz":
        array = io.BytesIO()
        np.lib.format.write_array_header_1_0(array, {"descr": "<i2", "fortran_order": False, "shape": size})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("ct.npy", array.getvalue() + voxels)
        (folder / "scan.json").write_text('{"spacing": [1, 1, 1]}')
        return path
    image = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.header.set_data_shape(size)
    image.header["vox_offset"] = 352
    if form == "img.gz":
        image.header["magic"], image.header["vox_offset"] = b"ni1", 0
        (folder / "scan.hdr").write_bytes(image.header.binaryblock)
    starts = {
        "nrrd": NRRD.format(encoding="gzip", sizes=sizes, data="").encode(),
        "mha": META.format(packed=True, sizes=sizes, data="LOCAL").encode(),
    }
    first = image.header.binaryblock + bytes(4) if form == "nii.gz" else b""
    packed = zlib.compress(voxels) if form == "mha" else gzip.compress(first + voxels)
    path.write_bytes(starts.get(form, b"") + packed)
    return path


@pytest.mark.parametrize("form", ["nii.gz", "img.gz", "nrrd", "mha", "npz"])
def test_a_packed_file_unpacks_to_a_stated_multiple_of_its_size(form: str, tmp_path: Path) -> None:
    assert read_volume(packed_zeros(form, tmp_path, (64, 64, 64))).shape == (64, 64, 64)  # as tightly packed, but small
    with pytest.raises(CTInstructError, match=r"from [\d.e-]+ to 512 MiB.*256 MiB or 200 times its size"):
        read_volume(packed_zeros(form, tmp_path, (1024, 1024, 256)))


def test_a_real_scan_packs_far_less_than_the_limit(tmp_path: Path) -> None:
    from ctinstruct_hf.processing.volume import PACKED_RATIO

    nib.save(as_nifti(asymmetric((20, 40, 40)), "RAS"), tmp_path / "scan.nii")
    raw = (tmp_path / "scan.nii").read_bytes()
    assert len(raw) / len(gzip.compress(raw)) < PACKED_RATIO / 20


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float64])
def test_files_of_simpleitk_are_read_as_simpleitk_reads_them(
    suffix: str, packed: bool, dtype: type, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-1000, 2000, (7, 6, 5)) if np.dtype(dtype).kind != "u" else rng.integers(0, 250, (7, 6, 5))
    image = SimpleITK.GetImageFromArray(values.astype(dtype))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-10.5, 20.25, 300.0))
    angle = np.radians(20)
    image.SetDirection((1, 0, 0, 0, np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle)))
    SimpleITK.WriteImage(image, str(tmp_path / f"scan{suffix}"), packed)
    ours, theirs = read_volume(tmp_path / f"scan{suffix}"), read_volume(image)
    assert np.array_equal(ours.hu, theirs.hu)
    assert ours.hu.dtype == theirs.hu.dtype
    assert np.allclose(ours.affine, theirs.affine, atol=1e-6)
    assert np.allclose(ours.source.affine, theirs.source.affine, atol=1e-6)
    assert ours.warnings == theirs.warnings


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
@pytest.mark.parametrize("name", ["./plain.raw", "Schnitt ü 胸.raw"])
def test_a_plain_name_beside_the_header_is_read_however_it_is_written(
    folders: tuple[Path, Path], suffix: str, name: str
) -> None:
    scans, _ = folders
    (scans / name).write_bytes(asymmetric().tobytes())
    (scans / f"scan{suffix}").write_text(header(suffix, name), encoding="utf-8", newline="\r\n")
    volume = read_volume(scans / f"scan{suffix}")
    assert np.array_equal(volume.in_file_axes(volume.hu), asymmetric().transpose(2, 1, 0))
