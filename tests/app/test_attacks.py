"""What a client sends never makes the server read a file that was not uploaded for that study."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from running import Running
from scans import asymmetric, dicom_series

SIDE = 8
SECRET = 777  # HU, all over the file that is not the client's


@pytest.fixture(scope="module")
def server(untrained: Path) -> Iterator[Running]:
    one = Running(str(untrained), uploads=400)
    yield one
    one.close()
    assert not one.engine.root.exists()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder of somebody else's scans: the voxels of one, slices of it, and a whole file."""
    folder = tmp_path / "other patient"
    folder.mkdir()
    voxels = np.full((SIDE, SIDE, SIDE), SECRET, np.int16)
    (folder / "scan.raw").write_bytes(voxels.tobytes())
    for number in range(SIDE):
        (folder / f"slice{number}.raw").write_bytes(voxels[number].tobytes())
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "scan.nii")
    return folder


def mhd(data: str) -> bytes:
    head = f"ObjectType = Image\nNDims = 3\nDimSize = {SIDE} {SIDE} {SIDE}\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
    return f"{head}ElementDataFile = {data}\n".encode()


def nrrd(data: str) -> bytes:
    head = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {SIDE} {SIDE} {SIDE}\nspacings: 1 1 1\nendian: little\nencoding: raw\n"
    return f"{head}data file: {data}\n\n".encode()


def send(server: Running, files: dict[str, bytes]) -> Any:
    """The answer to opening these files as one study."""
    upload = server.client.post("/api/uploads").json()["upload"]
    for name, content in files.items():
        assert server.client.put(f"/api/uploads/{upload}", params={"name": name}, content=content).status_code == 201
    return server.client.post("/api/studies", json={"upload": upload})


def voxels(server: Running, answer: Any) -> np.ndarray:
    scan = server.client.get(f"/api/studies/{answer.json()['study']}/scan.nii").content
    return np.asarray(nib.Nifti1Image.from_bytes(scan).dataobj)


def refused(server: Running, answer: Any) -> None:
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]
    for folder in (str(server.engine.root), "upload-", "Traceback"):  # what the client wrote may come back
        assert folder not in answer.text
    assert not list(server.engine.root.glob("*"))


@pytest.mark.parametrize("suffix", [".mhd", ".mha", "", ".download"])
@pytest.mark.parametrize(
    "data",
    [
        "{folder}/scan.raw",
        "{up}/scan.raw",
        "x/{up}/scan.raw",
        "LIST\n" + "\n".join(f"{{folder}}/slice{number}.raw" for number in range(SIDE)),
        "LIST\n" + "\n".join(f"{{up}}/slice{number}.raw" for number in range(SIDE)),
        "{folder}/slice%d.raw 0 7 1",
        "{up}/slice%d.raw 0 7 1",
        "file://{folder}/scan.raw",
        "scan.raw",  # of no other study either
    ],
)
def test_a_metaimage_header_reaches_only_what_came_with_it(server: Running, secret: Path, suffix: str, data: str) -> None:  # fmt: skip
    refused(server, send(server, {f"scan{suffix}": mhd(named(server, secret, data))}))


@pytest.mark.parametrize("suffix", [".nhdr", ".nrrd", ""])
@pytest.mark.parametrize(
    "data",
    [
        "{folder}/scan.raw",
        "{up}/scan.raw",
        "LIST\n" + "\n".join(f"{{folder}}/slice{number}.raw" for number in range(SIDE)),
        "LIST 2\n" + "\n".join(f"{{up}}/slice{number}.raw" for number in range(SIDE)),
        "{folder}/slice%d.raw 0 7 1",
        "{up}/slice%d.raw 0 7 1 2",
        "scan.raw",
    ],
)
def test_an_nrrd_header_reaches_only_what_came_with_it(server: Running, secret: Path, suffix: str, data: str) -> None:
    refused(server, send(server, {f"scan{suffix}": nrrd(named(server, secret, data))}))


def named(server: Running, secret: Path, data: str) -> str:
    """The way from an upload's folder to the secret one, absolute or by steps up."""
    up = "/".join([".."] * len((server.engine.root / "upload").parts)) + str(secret)
    return data.format(folder=secret, up=up)


def test_data_sent_along_with_its_header_is_read(server: Running) -> None:
    hu = asymmetric((SIDE, SIDE, SIDE))
    for name, head in (("scan.mhd", mhd), ("scan.nhdr", nrrd), ("胸部 (1).mhd", mhd), ("грудь.nhdr", nrrd)):
        data = name.rsplit(".", 1)[0] + ".raw"
        answer = send(server, {data: hu.tobytes(), name: head(data)})
        assert answer.status_code == 201, answer.text
        assert sorted(voxels(server, answer).ravel()) == sorted(hu.ravel())
        assert server.client.delete(f"/api/studies/{answer.json()['study']}").status_code == 204


def archive(members: dict[str, bytes], link: str | None = None) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            if link == name:
                member.create_system = 3
                member.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(member, content)
    return packed.getvalue()


def test_members_of_a_zip_stay_in_it(server: Running, secret: Path) -> None:
    target = str(secret / "scan.nii").encode()
    header = mhd(f"{secret}/scan.raw")
    escaping = named(server, secret, "{up}/planted.nii")
    for name, members in {
        "scan.nii": {"scan.nii": target},
        "a/IM1": {"a/IM1": target, "a/IM2": target},
        "folder": {"folder": str(secret).encode(), "folder/scan.nii": b"0"},
        "": {"scan.mhd": header},
        " ": {escaping: b"planted", "/etc/planted": b"planted"},
    }.items():
        refused(server, send(server, {"scan.zip": archive(members, link=name)}))
    assert not list(secret.glob("planted*"))


def test_a_dicomdir_reaches_only_what_came_with_it(server: Running, secret: Path, tmp_path: Path) -> None:
    series = sorted(dicom_series(secret / "series", asymmetric((4, 16, 16))).iterdir())
    records = []
    for file in series:
        record = Dataset()
        record.DirectoryRecordType = "IMAGE"
        record.ReferencedFileID = [*[".."] * 9, *file.parts[1:]]
        records.append(record)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    directory = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    directory.DirectoryRecordSequence = records
    path = tmp_path / "DICOMDIR"
    pydicom.dcmwrite(path, directory)
    for files in (
        {"DICOMDIR": path.read_bytes()},
        {"scan.dcm": path.read_bytes()},
        {"DICOMDIR": path.read_bytes(), "other": b"0"},
        {"scan.zip": archive({"DICOMDIR": path.read_bytes()})},
    ):
        refused(server, send(server, files))


@pytest.mark.parametrize("key", ["upload", "sample", "source", "path", "file", "name", "study"])
def test_json_names_no_file_of_the_server(server: Running, secret: Path, key: str) -> None:
    for name in (f"{secret}/scan.nii", f"file://{secret}/scan.nii", f"phantom:{secret}", f"../{secret.name}"):
        answer = server.client.post("/api/studies", json={key: name})
        assert answer.status_code in (400, 404)
        assert str(secret) not in answer.text


def test_names_of_files_lead_nowhere(server: Running, secret: Path) -> None:
    upload = server.client.post("/api/uploads").json()["upload"]
    folder = server.engine.uploads.open[upload].folder
    for name in (f"{secret}/planted", named(server, secret, "{up}/planted"), "..", ".", "a\\..\\..\\planted", "\0", "\n/..", "‮gpj"):  # fmt: skip
        answer = server.client.put(f"/api/uploads/{upload}", params={"name": name}, content=b"0")
        assert (folder / answer.json()["file"]).parent == folder
        answer = server.client.put(f"/api/uploads/{upload}", files={"file": (name.replace("\0", "") or "x", b"0")})
        assert (folder / answer.json()["file"]).parent == folder
    assert len(list(folder.iterdir())) == 16
    assert all(file.is_file() and not file.is_symlink() for file in folder.iterdir())
    assert not list(secret.glob("planted*"))
    server.engine.uploads.drop(upload)
    assert server.client.put("/api/uploads/..%2f..", params={"name": "x"}, content=b"0").status_code == 404
