"""Thousands of broken files: never a hang, never a foreign traceback, never more memory than allowed."""

from __future__ import annotations

import os
import random
import resource
import struct
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from isal import igzip
from scans import as_nifti, asymmetric, dicom_series, dicom_slice, enhanced, save

from ctinstruct_hf import CTInstructError, read_volume

LIMIT = 64 * 2**20


def attempt(path: Path) -> str:
    """Read a file that may be broken: its shape, or our own sentence; anything else is a failure."""
    start = time.monotonic()
    try:
        result = str(read_volume(path, max_bytes=LIMIT).shape)
    except CTInstructError as error:
        result = str(error)
        assert "\n" not in result
    assert time.monotonic() - start < 5, f"{path} took {time.monotonic() - start:.1f} s"
    return result


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite, repeat or insert, mostly near the start, where headers are."""
    kind = rng.randrange(5)
    place = (
        min(int(rng.expovariate(1 / 400)), max(len(data) - 1, 0)) if rng.random() < 0.8 else rng.randrange(len(data))
    )
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 12)):
            changed[min(place + rng.randrange(40), len(data) - 1)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:
        junk = rng.choice(
            [b"\xff" * 8, b"\0" * 8, struct.pack("<q", 2**40), struct.pack("<d", float("nan")), os.urandom(8)]
        )
        return data[:place] + junk + data[place + len(junk) :]
    if kind == 3:
        return data[:place] + data[max(0, place - 16) :]
    return data[:place] + os.urandom(rng.randrange(1, 64)) + data[place:]


def seeds(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    hu = asymmetric((4, 16, 16))
    nib.save(as_nifti(hu, "LAS"), folder / "plain.nii")
    nib.save(as_nifti(hu, "RPS"), folder / "packed.nii.gz")
    nib.save(nib.Nifti2Image(hu.astype(np.float32), np.eye(4)), folder / "two.nii")
    save(dicom_slice(hu[0]), folder / "slice.dcm")
    enhanced(hu, folder / "frames.dcm")
    return {file.name: file for file in folder.iterdir()}


def fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    originals = {name: path.read_bytes() for name, path in seeds(folder / "seeds").items()}
    outcomes = {"read": 0, "refused": 0}
    for number in range(count):
        name = rng.choice(sorted(originals))
        data = originals[name]
        if name.endswith(".gz") and rng.random() < 0.7:  # break what is inside, too
            data = igzip.compress(mutate(igzip.decompress(data), rng))
        else:
            data = mutate(data, rng)
        path = folder / f"case{name[name.index('.') :]}"
        path.write_bytes(data)
        try:
            outcome = attempt(path)
        except Exception as error:
            raise AssertionError(f"case {number} of {name}, seed {seed}: {type(error).__name__}: {error}") from error
        outcomes["read" if outcome.startswith("(") else "refused"] += 1
    return outcomes


def test_a_few_hundred_broken_files_end_in_our_own_error(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, 400, seed=1)
    assert outcomes["read"] > 20
    assert outcomes["refused"] > 20


@pytest.mark.slow
def test_a_few_thousand_broken_files_end_in_our_own_error(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(tmp_path, 6000, seed=2)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 6 * LIMIT


def header(dims: tuple[int, ...], dtype: type = np.int16) -> bytes:
    image = nib.Nifti1Header()
    image.set_data_dtype(dtype)
    image["dim"][: len(dims) + 1] = [len(dims), *dims]
    image["pixdim"][1:4] = 1
    image["vox_offset"] = 352
    image["magic"] = b"n+1"
    return image.binaryblock + b"\0" * 4


def test_a_header_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "huge.nii").write_bytes(header((32000, 32000, 512)))
    assert "more than the" in attempt(tmp_path / "huge.nii")
    (tmp_path / "negative.nii").write_bytes(header((-5, 10, 10)))
    assert "impossible size" in attempt(tmp_path / "negative.nii")
    slice_ = dicom_slice(asymmetric((1, 8, 8))[0], Rows=65535, Columns=65535)
    assert "GiB allowed" in attempt(save(slice_, tmp_path / "huge.dcm"))


def test_a_gzip_bomb_is_read_no_further_than_its_header_promises(tmp_path: Path) -> None:
    with igzip.open(tmp_path / "bomb.nii.gz", "wb") as file:
        file.write(header((8, 8, 8)))
        for _ in range(64):
            file.write(b"\0" * 2**24)  # one GiB behind a promise of one KiB
    start = time.monotonic()
    assert attempt(tmp_path / "bomb.nii.gz") == "(8, 8, 8)"
    assert time.monotonic() - start < 1


def test_a_zip_bomb_and_a_zip_that_lies_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * (2 * LIMIT))
    assert "GiB allowed" in attempt(tmp_path / "bomb.zip")
    data = (tmp_path / "bomb.zip").read_bytes()
    lie = data.replace(struct.pack("<I", 2 * LIMIT), struct.pack("<I", 10))
    (tmp_path / "lie.zip").write_bytes(lie)
    attempt(tmp_path / "lie.zip")


def test_links_in_a_circle_do_not_hang(tmp_path: Path) -> None:
    series = dicom_series(tmp_path / "series", asymmetric((3, 8, 8)))
    (series / "loop").symlink_to(series)
    (series / "self").symlink_to(series / "self")
    assert attempt(series) == "(3, 8, 8)"
