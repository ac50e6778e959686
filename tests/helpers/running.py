"""The app as a server in this process."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from ctinstruct_hf.app.engine import Engine, Limits
from ctinstruct_hf.app.server import create_app, listen


class Running:
    """A server in a thread, with its engine and a client."""

    def __init__(self, model: str, page: bool = True, **limits: Any) -> None:
        names, pacs = limits.pop("names", None), limits.pop("pacs", None)
        self.engine = Engine(model, "cpu", limits=Limits(**{"new_tokens": 12, **limits}), names=names)
        self.server = uvicorn.Server(uvicorn.Config(create_app(self.engine, page=page, pacs=pacs), log_level="error"))
        listener = listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        self.client = httpx.Client(base_url=self.address, timeout=60)
        while not self.server.started:
            time.sleep(0.02)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(timeout=30)

    def open(self, path: Path) -> str:
        answer = self.client.post("/api/studies", params={"name": path.name}, content=path.read_bytes())
        assert answer.status_code == 201, answer.text
        return answer.json()["study"]

    def ask(self, study: str, **words: Any) -> Any:
        return self.client.post(f"/api/studies/{study}/jobs", params={"wait": True}, json={"kind": "ask", **words})
