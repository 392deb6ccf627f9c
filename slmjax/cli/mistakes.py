"""What is wrong with a command line, in one line, from what tyro's parser found and not from the box that it draws.

tyro 1 has no public way to learn why it refuses a command line: `tyro.cli` draws a box on stderr and exits. Its
private module `tyro._errors` calls a function with an event instead: what kind of mistake it is, in which argument,
with which words. tyro may change that module in any release. So this is the only file that imports it, pyproject.toml
admits only the tyro versions that have it and no later minor version, and tests/cli/test_args.py makes each kind of
mistake. Where the module is missing, or the kind of event is not known here, tyro prints its own message; the exit code
is 2 then as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

LONGEST = 80
"""Characters of a word from the command line that a message repeats"""

KINDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "text", "PATH": "a path"}
"""tyro's names of types, for people"""


class Refused(Exception):
    """tyro refuses a command line.

    Attributes:
        event: one of the events of `tyro._errors`.
    """

    def __init__(self, event: Any):
        super().__init__(event)
        self.event = event


def refusals() -> AbstractContextManager[None]:
    """Within it, `tyro.cli` raises `Refused` where it would draw its box and exit."""
    try:
        from tyro import _errors
    except ImportError:
        return contextlib.nullcontext()

    known = (
        _errors.MissingArgs,
        _errors.UnrecognizedArgs,
        _errors.BadValue,
        _errors.InvalidChoice,
        _errors.InstantiationFailure,
    )

    def refuse(event: Any) -> None:
        if isinstance(event, known):
            raise Refused(event) from None

    return _errors.on_parse_error(refuse)


def explain(event: Any, argv: Sequence[str], options: Callable[[], Mapping[str, bool]]) -> str:
    """One line: the option, its value, and what is expected or which options have a similar name.

    Args:
        event: what `Refused` carries.
        argv: the command line.
        options: gives every `--option` there is, and whether it takes a value; called only for unknown words.
    """
    kind = type(event).__name__
    if kind == "MissingArgs":
        missing = f"missing: {', '.join(_usage(context.arg) for context in event.missing_arguments)}"
        unknown = event.unrecognized_tokens
        return f"{missing}; {_unknown(unknown, argv, options())}" if unknown else missing
    if kind == "UnrecognizedArgs":
        return _unknown(event.tokens, argv, options())
    if event.argument is None:  # a dataclass was made of the values, and raised a ValueError
        return " ".join(str(event.message).split())
    name, lowered = event.argument.display_name(), event.argument.lowered
    if lowered.is_fixed():
        return f"{name} cannot be set on the command line, only in Python"
    if kind == "BadValue":
        return f"{name} needs {'a value' if lowered.nargs in (1, None) else f'{lowered.nargs} values'}"
    if kind == "InvalidChoice":
        # tyro keeps the choices of a union in a set: the order of its help is always the same.
        choices = sorted(event.choices, key=(lowered.metavar or "").find)
        return f"{name} is {_quoted(event.value)}; expected one of: {', '.join(choices)}"
    given = _given(lowered, argv)
    if given is None:
        return f"{name}: {' '.join(str(event.message).split())}"
    return f"{name} is {_quoted(' '.join(given))}; expected {_expected(lowered.metavar)}"


def options_of(read: Callable[[Any], Any], args: Any, default: Any = None) -> dict[str, bool]:
    """Every `--option` of the dataclass `args`, and whether it takes a value; {} where tyro does not tell.

    tyro lists its arguments in one event only, that something is missing. So it is asked for a class with the same
    fields and one positional argument more, which is not given.

    Args:
        read: calls `tyro.cli` for a class, with an empty command line.
        default: an instance of `args`, for its values without a default.
    """
    import tyro

    value = dataclasses.field() if default is None else dataclasses.field(default_factory=lambda: default)
    fields = [
        ("not_given", tyro.conf.Positional[str]),
        ("args", Annotated[args, tyro.conf.arg(name="")], value),
    ]
    try:
        with refusals():
            read(dataclasses.make_dataclass("WithOneMore", fields))
    except Refused as refused:
        everything = refused.event.missing_arguments[0].local_root_parser.get_args_including_children()
        settable = [context.arg for context in everything if not context.arg.lowered.is_fixed()]
        return {
            flag: arg.lowered.action in (None, "append")
            for arg in settable
            for flag in arg.lowered.name_or_flags
            if flag.startswith("--")
        }
    return {}


def _usage(argument: Any) -> str:
    """`MODEL` or `--out STR`."""
    metavar = argument.lowered.metavar
    if argument.is_positional():
        return metavar or argument.display_name()
    return f"{argument.display_name()} {metavar}" if metavar else argument.display_name()


def _given(lowered: Any, argv: Sequence[str]) -> list[str] | None:
    """The words after the last `--option` of that name; None for a positional argument."""
    # In the name of an option, _ is read as -.
    names = {name.replace("_", "-") for name in lowered.name_or_flags if name.startswith("-")}
    given = None
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") not in names:
            continue
        given = [value] if equals else []
        for after in argv[i + 1 :]:
            if re.match("--?[a-zA-Z]", after) or len(given) == lowered.nargs:
                break
            given.append(after)
    return given


def _expected(metavar: str | None) -> str:
    """What tyro's help shows as the values of an option, such as `{None}|INT`, in words."""
    metavar = metavar or "a value"
    if repeated := re.fullmatch(r"\[(.*) \[\1 \.\.\.\]\]", metavar):
        each = _expected(repeated[1])
        return f"any number of {'groups of ' if ' values: ' in each else 'values, each '}{each}"
    kinds = [
        re.sub(r"[A-Z]+", lambda kind: KINDS.get(kind[0], kind[0]), word).replace("|", " or ")
        for word in re.sub(r"\{(.*?)\}", lambda choices: choices[1].replace(",", "|"), metavar).split(" ")
    ]
    if len(kinds) == 1 or metavar == "a value":
        return " ".join(kinds)
    return f"{len(kinds)} values: {', '.join(kinds)}"


def _unknown(words: Sequence[str], argv: Sequence[str], options: Mapping[str, bool]) -> str:
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    if not names:
        for word in argv:  # tyro takes `--switch=value` apart, and does not know what to do with the value
            name, equals, value = word.partition("=")
            if equals and value in words and not options.get(name.replace("_", "-"), True):
                return f"{_plain(name)} takes no value; it is given {_quoted(value)}"
        return f"unexpected {', '.join(map(_plain, words))}"
    near = dict.fromkeys(option for name in names for option in nearest(name, options))
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    group = names[0].rpartition(".")[0]
    there = [option for option in options if group and option.rpartition(".")[0] == group]
    if there and not near:
        hint = f"; {group.lstrip('-')} has {', '.join(there)}"
    return f"unknown option {', '.join(map(_plain, names))}{hint}"


def nearest(name: str, options: Iterable[str]) -> list[str]:
    """At most three options that someone who wrote `name` may have meant, the likeliest first.

    First come those of the same group (`--data.bach`: `--data.batch`), then those that hold every part of the name
    (`--peak-lr`: `--schedule.peak-lr`), then, where there is no such group, those of a similar spelling
    (`--dtaa.batch`).
    """
    name = name.replace("_", "-").lstrip("-")
    group, _, last = name.rpartition(".")
    known = {option.lstrip("-"): option for option in options}
    same_group = {option.rpartition(".")[2]: option for option in known if option.rpartition(".")[0] == group}
    near = [same_group[match] for match in difflib.get_close_matches(last, same_group, cutoff=0.7)]
    if not near and len(name) > 1:
        holding = [option for option in known if all(part in option for part in name.split("."))]
        near = difflib.get_close_matches(name, holding, cutoff=0)
    if not near and not (group and same_group):
        near = difflib.get_close_matches(name, known, cutoff=0.8)
    return [known[option] for option in near]


def _quoted(word: str) -> str:
    """A value in quotation marks, cut where it is long; what is not printable is escaped."""
    return repr(word) if len(word) <= LONGEST else f"{word[:LONGEST]!r}..."


def _plain(word: str) -> str:
    """A word as it was written, in quotation marks only where it could be misread."""
    return word if word.isprintable() and " " not in word and 0 < len(word) <= LONGEST else _quoted(word)
