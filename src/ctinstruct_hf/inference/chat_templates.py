"""Chat templates of other people's models, rendered in a process of its own with limits of time, memory and length.

A template is a program. Jinja's sandbox keeps it from files and from Python's insides, but not from running without end.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess  # nosec B404
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..processing.processing_ctinstruct import CHAT_TEMPLATE
from .folders import BUNDLED_MODEL

# of the authors' checkpoint
QWEN2_VL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IMAGE = {"type": "image"}
# what is rendered when a model is loaded: each place where templates of broken models fail
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": [_IMAGE, _IMAGE, {"type": "text", "text": "Is there a nodule?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Sure."}]},
    {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
]


def render_chat(processor: Any, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    """`processor.apply_chat_template` as text; a template that this package did not write is rendered within limits.

    Args:
        processor: a `CTInstructProcessor`.
        messages: roles and contents; images without their data.
        add_generation_prompt: end where the answer begins.

    Raises:
        CTInstructError: where the template fails, takes too long, or writes too much.
    """
    if processor.chat_template in _known():
        return str(processor.apply_chat_template(list(messages), add_generation_prompt=add_generation_prompt))
    tokens = getattr(processor.tokenizer, "special_tokens_map", {})
    values = {name: token for name, token in tokens.items() if isinstance(token, str)}
    return _render(processor.chat_template, json.dumps([list(messages), add_generation_prompt, values]))


def check_template(template: Any, folder: Path) -> None:
    """Render a short conversation.

    Raises:
        CTInstructError: naming the template's file, where it cannot be used.
    """
    names = ("chat_template.jinja", "chat_template.json", "processor_config.json")
    file = folder / next((name for name in names if (folder / name).exists()), names[0])
    if not isinstance(template, str):
        raise CTInstructError(f"{file} holds a {type(template).__name__} as the chat template: expected one text.")
    if template in _known():
        return
    try:
        text = _render(template, json.dumps([_PROBE, True, {}]))
    except CTInstructError as error:
        raise CTInstructError(f"{file} cannot be used: {error}") from error
    images = text.count("<|image_pad|>")
    if images != 2:
        raise CTInstructError(f"{file} cannot be used: it writes <|image_pad|> {images} times for two images.")


@functools.cache
def _known() -> set[str]:
    """The templates that this package wrote."""
    bundled = BUNDLED_MODEL / "chat_template.jinja"
    return {CHAT_TEMPLATE, QWEN2_VL_TEMPLATE, *([bundled.read_text(encoding="utf-8")] if bundled.exists() else [])}


@functools.lru_cache(maxsize=256)
def _render(template: str, arguments: str) -> str:
    messages, add_generation_prompt, tokens = json.loads(arguments)
    request = {
        "template": template,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tokens": tokens,
    }
    answer = _CHILD.ask(json.dumps(request))
    if answer is None:
        raise CTInstructError("the chat template does not end within 2 seconds and 512 MiB.")
    response = json.loads(answer)
    if "error" in response:
        raise CTInstructError(f"the chat template fails: {response['error']}.")
    return str(response["text"])


class _Child:
    """The process that renders, started when it is first needed; a line of JSON in, a line out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0

    def ask(self, request: str) -> str | None:
        """The answer; None where the process ended, by a limit."""
        with self.lock:
            if self.process is None or self.owner != os.getpid():  # a forked process must not share its pipes
                self._start()
            assert self.process is not None
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            try:
                self.process.stdin.write(request + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except OSError:
                answer = ""
            if not answer:
                self.close()
            return answer or None

    def _start(self) -> None:
        # no shell: this interpreter and a file of this package
        command = [sys.executable, "-I", str(Path(__file__).with_name("render_chat.py"))]
        self.process = subprocess.Popen(  # nosec B603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self.owner = os.getpid()

    def close(self) -> None:
        """End the process."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
        self.process = None


_CHILD = _Child()
atexit.register(_CHILD.close)

__all__ = ["QWEN2_VL_TEMPLATE", "check_template", "render_chat"]
