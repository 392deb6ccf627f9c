"""Command-line arguments from frozen dataclasses, by tyro; a mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from slmjax.errors import UserError

T = TypeVar("T")
MOST = 900
"""Characters of a message"""


def parse(
    args: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    example: str,
    default: Any = None,
    as_text: Sequence[Any] = (),
) -> T:
    """Parses `argv` into the dataclass `args`.

    A field becomes `--field`; nested dataclasses become `--outer.inner`; `tyro.conf.Positional[...]` marks positionals.
    `--help` prints `description`, every field with its default, and `example`, and exits with 0. Fields that hold
    functions, or that choose between classes, are not listed.

    Args:
        as_text: types of fields that take a string as it is, such as `str | Recipe`.

    Raises:
        UserError: an unknown flag (with the nearest known ones), a missing or a badly typed value.
    """
    import tyro

    stderr = io.StringIO()
    extra: dict[str, Any] = {"registry": _taking(as_text)} | ({} if default is None else {"default": default})
    config = (
        tyro.conf.AvoidSubcommands,
        tyro.conf.HelptextFromCommentsOff,
        tyro.conf.PositionalMetavarFromFieldName,
        tyro.conf.SuppressFixed,
    )
    try:
        with contextlib.redirect_stderr(stderr), _wide({"-h", "--help"}.isdisjoint(argv)):
            about = f"{description}\n\nExample:\n  {example}"
            return tyro.cli(args, args=list(argv), prog=prog, description=about, config=config, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        wrong = one_line(stderr.getvalue(), lambda: _flags(args, config, extra))
        raise UserError(f"{prog}: {wrong}; `{prog} --help` lists every field") from None


@contextlib.contextmanager
def _wide(wanted: bool) -> Iterator[None]:
    """Nothing that tyro says within is broken over lines: one line is made of it."""
    before = os.environ.get("COLUMNS")
    if wanted:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif wanted:
            del os.environ["COLUMNS"]


def _taking(kinds: Sequence[Any]) -> Any:
    """tyro's rules, and one more: values of these types are strings on the command line."""
    import tyro

    rules = tyro.constructors.ConstructorRegistry()

    @rules.primitive_rule
    def rule(info: Any) -> Any:
        if info.type not in kinds:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: True,
            str_from_instance=lambda value: [value if isinstance(value, str) else f"a {type(value).__name__}"],
        )

    return rules


def choose(flag: str, kinds: Mapping[str, type], argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Takes `flag NAME` off the command line: one of several dataclasses, whose fields the rest may set.

    Returns:
        What `parse` takes as the default value for that name (the first one if there is none), and the rest.

    Raises:
        UserError: there is none of that name.
    """
    name, rest = next(iter(kinds)), list(argv)
    for i, word in enumerate(argv):
        if word == flag or word.startswith(f"{flag}="):
            wide = 1 if "=" in word else 2
            name = word.partition("=")[2] if wide == 1 else "".join(argv[i + 1 : i + 2])
            del rest[i : i + wide]
            break
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{flag} is {name!r}; expected one of: {', '.join(kinds)}{hint}")
    return _unset(kinds[name]), rest


def _unset(kind: type) -> Any:
    """An instance whose fields without a default `parse` demands."""
    import tyro

    value = object.__new__(kind)
    for field in dataclasses.fields(kind):
        default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        object.__setattr__(value, field.name, default)
    return value


def _flags(args: type, config: Any, extra: dict[str, Any]) -> list[str]:
    """Every `--flag` there is, from the help."""
    import tyro

    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.suppress(SystemExit):
        tyro.cli(args, args=["--help"], config=config, **extra)
    return re.findall(r"^\W{2,4}(--[\w.-]+)", stdout.getvalue(), re.MULTILINE)


def one_line(message: str, flags: Callable[[], Sequence[str]] = tuple) -> str:
    """What is wrong, of tyro's message in a box: the name, the value, what is expected or the nearest names.

    Args:
        flags: those that there are, for where tyro finds none that is near.
    """
    (heading, *_), *sections = _sections(message)
    text = " ".join(line.strip() for line in sections[0]) if sections else heading
    shown = [line for section in sections for line in section if re.match(r" {4}\S", line)]  # flags, above their help
    if wrong := re.match(
        r"Error parsing (\S+): .*?(?:base 10: |to float: |instantiated from \[)('.*?'(?=\]|$)|\".*\")", text
    ):
        expected = re.sub(r"\w+", lambda kind: KINDS.get(kind[0], kind[0]), shown[0].split(maxsplit=1)[1])
        return f"{wrong[1]} is {wrong[2]}; expected {expected.replace('{None}', 'None').replace('|', ' or ')}"
    if wrong := re.match(r"invalid choice (.*) for argument '(.*)'. Expected one of \((.*?),?\)\.", text):
        return f"{wrong[2]} is {wrong[1]}; expected one of: {wrong[3].replace(chr(39), '')}"
    if heading == "Required options":
        return f"missing: {', '.join(line.strip() for line in shown)}"
    if wrong := re.match(r"Missing value for argument '(.*?)'", text):
        return f"{wrong[1]} needs a value"
    if wrong := re.match(r"Unrecognized options: (.*)", text):
        words = wrong[1].split(", ")
        names = [word.partition("=")[0] for word in words if word.startswith("--")]
        if not names:
            return f"unexpected {', '.join(words)}"
        near = dict.fromkeys(re.split(r"[ ,]", line.strip())[0] for line in shown)
        hint = f"; did you mean {' or '.join(near)}?" if near else _beside(names[0], flags())
        return f"unknown option {', '.join(names)}{hint}"
    return text


def _beside(name: str, flags: Sequence[str]) -> str:
    """The fields of what `name` goes into: `--model.layers` is told those of `--model`."""
    parent = name.rpartition(".")[0]
    there = [flag for flag in flags if parent and flag.rpartition(".")[0] == parent]
    return f"; {parent.lstrip('-')} has {', '.join(there)}" if there else ""


KINDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "text"}
"""tyro's names of types, for people"""


def _sections(message: str) -> list[list[str]]:
    """tyro's box, or what it prints where there are no box characters, by its rules: the heading is the first section,
    and the pointer to --help, the last one, is left out."""
    sections: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines():
        inner = line.strip("│ ") if line.startswith("╭") else re.sub(r"^(│ |  ?)", "", line.rstrip(" │"))
        if line.startswith("╭"):
            sections += [[inner.strip("╭╮─ ")], []]
        elif inner and not inner.strip("─- "):
            sections.append([])
        elif inner and not line.startswith("╰"):
            sections[-1].append(inner)
    return [section for section in sections if section and not section[0].startswith("For full helptext")]


def text_of(flag: str, text: str) -> str:
    """The text of an argument.

    Raises:
        UserError: it holds bytes that are not UTF-8, which Python hands on as halves of surrogate pairs.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {text[:40]!r} is not UTF-8 text") from None
    return text


def read_text(flag: str, name: str) -> str:
    """The text of a file that is named on the command line; - is standard input.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        return text_of(flag, sys.stdin.read() if name == "-" else Path(name).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {name} cannot be read as text: {error}") from None


def fail(error: BaseException) -> None:
    """The one line a user sees for a mistake. What files say in it may be long, or speak to the terminal."""
    said = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    print(f"slmjax: error: {said if len(said) <= MOST else said[: MOST - 3] + '...'}", file=sys.stderr)
