"""Command-line arguments from frozen dataclasses, by tyro; a mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from slmjax.cli.mistakes import Refused, explain, options_of, refusals
from slmjax.errors import UserError
from slmjax.files import at

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

    config = (
        tyro.conf.AvoidSubcommands,
        tyro.conf.HelptextFromCommentsOff,
        tyro.conf.PositionalMetavarFromFieldName,
        tyro.conf.SuppressFixed,
    )
    about = f"{description}\n\nExample:\n  {example}"

    def read(kind: Any, words: Sequence[str], **given: Any) -> Any:
        registry = _taking(as_text)
        return tyro.cli(kind, args=words, prog=prog, description=about, config=config, registry=registry, **given)

    try:
        with refusals():
            return read(args, argv, **({} if default is None else {"default": default}))
    except Refused as refused:
        wrong = explain(refused.event, argv, lambda: options_of(lambda kind: read(kind, []), args, default))
        raise UserError(f"{prog}: {wrong}; `{prog} --help` lists every field") from None


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
        return text_of(flag, sys.stdin.read() if name == "-" else at(name).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {name} cannot be read as text: {error}") from None


def fail(error: BaseException) -> None:
    """The one line a user sees for a mistake. What files say in it may be long, or speak to the terminal."""
    said = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    print(f"slmjax: error: {said if len(said) <= MOST else said[: MOST - 3] + '...'}", file=sys.stderr)
