"""Renders chat templates, as a program of its own: JSON on standard input, JSON on standard output. See `chat.py`.

A template is code from whoever published the model. Jinja's sandbox keeps it from Python's internals, but not from
looping forever or building a text of gigabytes; limits on the process do. Imports nothing of slmjax, so that it starts
at once.
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
"""The longest text that is accepted, longer than any context: tokenizing it takes many times its size in memory"""


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's tokens for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as `transformers` sets it up for chat templates."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


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
        text.encode()  # raises for a lone surrogate
        return {"text": text}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as e:  # whatever a template can provoke
        return {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}


def limit() -> None:
    """Limits CPU time and memory of this process, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main() -> None:
    request = json.load(sys.stdin)
    limit()
    compiled: list[Any] = []
    failed = attempt(lambda: compiled.append(environment().from_string(request["template"])) or "")
    if "error" in failed:
        answers = [failed] * len(request["conversations"])
    else:
        answers = [
            attempt(lambda one=one: compiled[0].render(tools=None, documents=None, **request["variables"], **one))
            for one in request["conversations"]
        ]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
