"""The Hub's endpoints that publishing and loading use, on this machine: what is sent is kept in memory and given back."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {"private": bool, "files": {path: bytes}}}, data sets as `datasets/user/name`; `refuses` is
    answered to every commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.refuses = 0
        self.asked: list[str] = []
        self.answers: dict[
            str, tuple[int, str, str]
        ] = {}  # name -> status, X-Error-Code and sentence instead of a model
        self.refused: set[str] = set()  # files that are not given out
        self.cut: set[str] = set()  # files whose connection breaks halfway, once each

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.asked.append(f"POST {self.path}")
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            told = json.loads(body)
            name = f"{told.get('organization') or 'someone'}/{told['name']}"
            name = f"datasets/{name}" if told.get("type") == "dataset" else name
            self.server.repositories.setdefault(
                name, {"private": told.get("private", told.get("visibility") == "private"), "files": {}}
            )
            return self._answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            told = json.loads(body)
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
                for one in told["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if parts == ["api", "validate-yaml"]:  # the client has the card's metadata checked
            return self._answer({"errors": [], "warnings": []})
        name = ("datasets/" if parts[1] == "datasets" else "") + "/".join(parts[2:4])
        if name not in self.server.repositories:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if parts[4] == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".parquet") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if parts[4] == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            files = self.server.repositories[name]["files"]
            return self._answer([_entry(path, files[path]) for path in wanted if path in files])
        if parts[4] == "commit":
            if self.server.refuses:
                return self._answer({"error": "no"}, self.server.refuses)
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.repositories[name]["files"][entry["value"]["path"]] = content
                if entry["key"] == "lfsFile":
                    value = entry["value"]
                    self.server.repositories[name]["files"][value["path"]] = self.server.large[value["oid"]]
            return self._answer(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}"}
            )
        return self._answer({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.large[self.path.rpartition("/")[2]] = content
        self._answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        start = self.headers.get("Range")
        self.server.asked.append(f"{self.command} {self.path}" + (f" {start}" if start else ""))
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            name = ("datasets/" if parts[1] == "datasets" else "") + "/".join(parts[2:4])
            repository = self.server.repositories.get(name)
            if name in self.server.answers:
                status, code, sentence = self.server.answers[name]
                return self._answer({"error": sentence}, status, {"X-Error-Code": code} if code else {})
            if "revision" in parts and parts[-1] not in ("main", COMMIT):
                return self._answer(
                    {"error": f"Invalid rev id: {parts[-1]}"}, 404, {"X-Error-Code": "RevisionNotFound"}
                )
            if repository is None:
                return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:
                inside = "/".join([*parts[6:], ""]) if parts[6:] else ""
                found = {path: one for path, one in repository["files"].items() if path.startswith(inside)}
                if not found:
                    return self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                entries = [_entry(path, one) for path, one in found.items() if "/" not in path[len(inside) :]]
                deep = [path for path in found if "/" in path[len(inside) :]]
                if "recursive=false" in self.path:
                    folders = sorted({inside + path[len(inside) :].split("/")[0] for path in deep})
                    entries += [{"type": "directory", "path": one, "size": 0, "oid": COMMIT} for one in folders]
                else:
                    entries += [_entry(path, found[path]) for path in deep]
                return self._answer(entries)
            told = [{"rfilename": path} for path in repository["files"]]
            return self._answer(
                {"id": name, "modelId": name, "sha": COMMIT, "private": True, "siblings": told, "tags": []}
            )
        if "resolve" in parts:
            owner = parts.index("resolve")
            name, path = "/".join(parts[:owner]), "/".join(parts[owner + 2 :])
            content = self.server.repositories.get(name, {"files": {}})["files"].get(path)
            if content is None:
                return self._answer(
                    {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                )
            if path in self.server.refused and self.command == "GET":
                return self._answer({"error": f"{path} is not given out today"}, 403)
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if path in self.server.cut and self.command == "GET":
                self.server.cut.remove(path)
                self.send_response(200)
                for header, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return None
            return self._answer(content[start:], 206 if start else 200, headers)
        return self._answer({"error": "unknown"}, 404)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
