"""Renders chat templates, as a program of its own: JSON on standard input, JSON on standard output. See `chat.py`.

A template is code of whoever made the model. Jinja's sandbox keeps it from Python's internals, but not from looping
for ever or building a text of gigabytes; limits on a process do. Imports nothing of slmjax, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS, MEMORY_BYTES = 5, 1 << 29
CHARACTERS = 1 << 24
"""Longer than any context: whoever reads the text would need many times its size to cut it into tokens"""


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here they are text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as `transformers` sets it up for chat templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def attempt(function: Callable[[], str]) -> dict[str, str]:
    """{"text": ...} or {"error": one line}."""
    try:
        text = function()
        if len(text) > CHARACTERS:
            return {"error": f"it makes {len(text)} characters; at most {CHARACTERS} are read"}
        text.encode()  # half of a surrogate pair is no text
        return {"text": text}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as e:  # whatever a template can provoke
        return {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}


def limit() -> None:
    """Bounds the process, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main() -> None:
    asked = json.load(sys.stdin)
    limit()
    compiled: list[Any] = []
    failed = attempt(lambda: compiled.append(environment().from_string(asked["template"])) or "")
    if "error" in failed:
        answers = [failed] * len(asked["conversations"])
    else:
        answers = [
            attempt(lambda one=one: compiled[0].render(tools=None, documents=None, **asked["variables"], **one))
            for one in asked["conversations"]
        ]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
