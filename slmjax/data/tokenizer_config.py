"""tokenizer_config.json: what the special tokens are called, and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slmjax.errors import DataError


def read(file: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty if it is not there.

    Raises:
        DataError: it is not a JSON object.
    """
    try:
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: expected a JSON object, found a {type(config).__name__}")
    return config


def special_tokens(config: dict[str, Any], file: Path) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, as text or as objects with `content`: bos_token, ...

    Raises:
        DataError: BOS or EOS is of another type.
    """
    named = {}
    for field in sorted(key for key in config if key.endswith("_token")):
        token = config[field]
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            named[field] = name
        elif field in ("bos_token", "eos_token") and (name is not None or isinstance(token, dict)):
            raise DataError(f"{file}: {field} is {token!r}; expected a string, an object with `content`, or null")
    return {field: name for field, name in named.items() if name}


def template(file: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own, or a field of tokenizer_config.json; of several the default one."""
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as text: {error}") from None
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}.get("default")
    return source if isinstance(source, str) and source else None
