"""Fields whose numbers may be traced arrays, because nothing that is compiled depends on their values: runs that differ
in such numbers alone can be trained as one program (`runs.populations`).

A dataclass says so where it declares the field: `peak_lr: float = field(metadata=TRACED)`. A field that holds another
dataclass says in the same way that this one's fields are looked at, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from slmjax.serialise import type_of

KEY = "traced"
TRACED: Mapping[str, bool] = MappingProxyType({KEY: True})
"""Metadata of a field"""


def declared(cls: type, name: str) -> bool:
    """Whether a dataclass declares the field so. A subclass that only gives the field another default changes
    nothing."""
    fields = (base.__dict__.get("__dataclass_fields__", {}).get(name) for base in cls.__mro__)
    return next((f.metadata[KEY] for f in fields if f is not None and KEY in f.metadata), False)


def numbers(value: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Paths, such as "schedule.peak_lr", of the numbers of a value in JSON (`serialise.to_json`) whose fields are
    declared so, in the order of the fields.

    Raises:
        UserError: it names a type that does not exist.
    """
    cls = type_of(value)
    for name, held in value.items():
        path = f"{where}.{name}".lstrip(".")
        if name == "$type" or not declared(cls, name):
            continue
        if isinstance(held, Mapping):
            if "$type" in held:
                yield from numbers(held, path)
        elif isinstance(held, int | float) and not isinstance(held, bool):
            yield path
