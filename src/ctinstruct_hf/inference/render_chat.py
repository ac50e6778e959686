"""Run as a program by `chat_templates`: renders chat templates, a line of JSON in and out; imports nothing of the package."""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import Any

SECONDS, MEMORY, LENGTH = 2, 2**29, 2**20  # CPU time of a rendering, bytes of the process, characters written


def environment() -> Any:
    """Jinja as Transformers sets it up for chat templates."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: what it encloses is written as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


def answer(jinja: Any, request: dict[str, Any]) -> dict[str, str]:
    """The text of a request, or what went wrong with it."""
    try:
        template = jinja.from_string(request["template"])
        values = {**request["tokens"], "add_generation_prompt": request["add_generation_prompt"]}
        parts, length = [], 0
        for part in template.generate(messages=request["messages"], tools=None, documents=None, **values):
            length += len(part)
            if length > LENGTH:
                return {"error": f"it writes more than {LENGTH} characters"}
            parts.append(part)
        return {"text": "".join(parts)}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB"}
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        line = getattr(error, "lineno", None)
        return {"error": first[:200].rstrip(".") + (f" in line {line}" if line else "")}


def main() -> None:
    """Answer until the other side closes. A rendering beyond its time ends the process, whatever it is doing."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # not there on every system
        pass
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    jinja = environment()
    timed = hasattr(signal, "setitimer")
    for line in sys.stdin:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        response = json.dumps(answer(jinja, json.loads(line)))
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(response, flush=True)


if __name__ == "__main__":
    main()
