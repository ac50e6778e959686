"""A real Orthanc with its DICOMweb plugin on loopback, for tests; its files lie in a folder of the test."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
MISSING = "Orthanc with DICOMweb is not installed: scripts/install_pacs.sh"


def is_installed() -> bool:
    return shutil.which("Orthanc") is not None and PLUGIN.exists()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Orthanc:
    """A running server.

    Attributes:
        web: address of its DICOMweb.
        port, title: of its DIMSE.
    """

    def __init__(self, folder: Path, users: dict[str, str] | None = None, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.http, self.port, self.title = free_port(), free_port(), "ORTHANC"
        self.rest, self.web = f"http://127.0.0.1:{self.http}", f"http://127.0.0.1:{self.http}/dicom-web"
        self.users = users
        self.configuration = folder / "orthanc.json"
        self.log = folder / "log"
        settings = {
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": self.http,
            "DicomPort": self.port,
            "DicomAet": self.title,
            "DicomAlwaysAllowStore": True,
            "DicomCheckCalledAet": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": users is not None,
            "RegisteredUsers": users or {},
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "StudiesMetadata": "Full", "SeriesMetadata": "Full"},
            "StableAge": 1,
            "HttpThreadsCount": 4,
            **options,
        }
        self.configuration.write_text(json.dumps(settings))
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(["Orthanc", str(self.configuration)], stdout=log, stderr=log)
        for _ in range(200):
            try:
                self.get("/system")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise RuntimeError(f"Orthanc does not start: {self.log.read_text()[-2000:]}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _open(self, request: urllib.request.Request) -> Any:
        if self.users:
            import base64

            pair = ":".join(next(iter(self.users.items())))
            request.add_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.loads(response.read() or b"null")

    def get(self, path: str) -> Any:
        """JSON of the server's own interface."""
        return self._open(urllib.request.Request(self.rest + path))

    def add(self, folder: Path) -> None:
        """Store every file of a folder."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self._open(urllib.request.Request(f"{self.rest}/instances", data=file.read_bytes(), method="POST"))

    def instances(self, *modalities: str) -> list[dict[str, Any]]:
        """Tags of the stored objects, of these modalities where some are given."""
        found = [self.get(f"/instances/{one}/simplified-tags") for one in self.get("/instances")]
        return [tags for tags in found if not modalities or tags.get("Modality") in modalities]
