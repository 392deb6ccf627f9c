"""Frozen dataclasses to JSON and back, with their types; differences; fingerprints.

A dataclass becomes `{"$type": "module:Name", field: value, ...}`, a module-level function
`{"$function": "module:name"}`, a tuple a list. Reading creates only dataclasses and functions of modules of slmjax, jax
and optax, or of modules that the caller has imported: a config.json cannot run other code when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from slmjax.errors import UserError

TRUSTED = ("slmjax", "jax", "optax")


def to_json(value: Any) -> Any:
    """A value made of frozen dataclasses, tuples, functions, strings, numbers, bools and None, as JSON.

    Raises:
        UserError: a value of another kind; the message names its field.
    """
    return _to_json(value, "")


def _to_json(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _to_json(getattr(value, f.name), f"{where}.{f.name}".lstrip("."))
            for f in dataclasses.fields(value)
            if f.init
        }
        return {"$type": _name(type(value)), **fields}
    if isinstance(value, tuple | list):
        return [_to_json(v, f"{where}.{i}".lstrip(".")) for i, v in enumerate(value)]
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return {"$function": _name(value)}
    raise UserError(
        f"{where or 'value'}: a {type(value).__name__} cannot be written to config.json; "
        "use a frozen dataclass, a module-level function, a tuple, a number or a string"
    )


def _name(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def from_json(data: Any) -> Any:
    """The inverse of `to_json`; lists become tuples.

    Raises:
        UserError: an unknown type or field, or a type of a module that is neither trusted nor imported.
    """
    if isinstance(data, list):
        return tuple(from_json(v) for v in data)
    if not isinstance(data, Mapping):
        return data
    if "$float" in data:
        return float(data["$float"])
    if "$function" in data:
        return _resolve(data["$function"])
    if "$type" not in data:
        raise UserError(f"config.json: an object without $type: {json.dumps(data)[:80]}")
    cls = _resolve(data["$type"])
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(f"config.json: {data['$type']} is not a dataclass")
    fields = {k: from_json(v) for k, v in data.items() if k != "$type"}
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls) if f.init}
    if unknown:
        raise UserError(
            f"config.json: {data['$type']} has no field {sorted(unknown)[0]!r}; it was written by another version"
        )
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"config.json: {data['$type']}: {error}") from None


def type_of(data: Mapping[str, Any]) -> Any:
    """The class of a dataclass that `to_json` has written.

    Raises:
        UserError: an unknown type, or of a module that is neither trusted nor imported.
    """
    return _resolve(data["$type"])


def _resolve(name: str) -> Any:
    module, _, qualname = str(name).partition(":")
    package = module.split(".")[0]
    if package not in TRUSTED and (module not in sys.modules or package in sys.stdlib_module_names):
        raise UserError(
            f"config.json names {name}, which is not part of slmjax; "
            "if you trust it, give the Python file that defines it with --code FILE"
        )
    try:
        value: Any = importlib.import_module(module)
        for part in qualname.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError):
        raise UserError(f"config.json names {name}, which does not exist in this version of {package}") from None
    return value


def canonical(data: Any) -> str:
    """JSON with sorted keys and no white space: equal values, equal strings."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(data: Any) -> str:
    """sha256 of the canonical JSON, as hexadecimal."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`field: old -> new` for each leaf in which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("$type") != new.get("$type"):
            return [f"{where or 'type'}: {old.get('$type')} -> {new.get('$type')}"]
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}.{i}".lstrip("."))]
    return [] if old == new else [f"{where}: {json.dumps(old)[:60]} -> {json.dumps(new)[:60]}"]
