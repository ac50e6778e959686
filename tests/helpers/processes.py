"""Commands as processes that begin with what they import already loaded: most of a short command's time is imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys
import ctinstruct_hf.cli, ctinstruct_hf.inference.predict, ctinstruct_hf.inference.study
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(request["files"], start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["ctinstruct", *request["arguments"]]
        sys.exit(ctinstruct_hf.cli.main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class WarmCommand:
    """`ctinstruct` with arguments, each call a process of its own, forked from one that has loaded the package."""

    def __init__(self, folder: Path) -> None:
        self.files = [folder / "stdout", folder / "stderr"]
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        request: dict[str, Any] = {
            "arguments": [str(one) for one in arguments],
            "files": [str(file) for file in self.files],
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        stdout, stderr = (file.read_text(encoding="utf-8", errors="replace") for file in self.files)
        return subprocess.CompletedProcess(request["arguments"], code, stdout, stderr)

    def close(self) -> None:
        """End the process that the others come from."""
        self.server.communicate()
