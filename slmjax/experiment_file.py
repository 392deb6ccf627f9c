"""Finds the experiment that a user names: a Python file, `file.py:function`, `module:function`, or a config.json."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from slmjax.errors import UserError
from slmjax.files import at
from slmjax.serialise import from_json
from slmjax.user_code import find_beside, mistakes_in


def load_module(file: str | Path) -> ModuleType:
    """Imports a Python file as the module named like the file without .py; it can import modules in its folder.

    Raises:
        UserError: no such file, not a Python file, or another module has its name.
    """
    path = at(file).resolve()
    if not path.is_file():
        raise UserError(f"{file}: no such file; expected a Python file")
    if path.suffix != ".py":
        raise UserError(f"{file}: expected a Python file (.py)")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) and Path(str(loaded.__file__)).resolve() == path:
        return loaded
    if loaded is not None or (importlib.util.find_spec(path.stem) is not None and not _beside(path)):
        raise UserError(f"{file}: there is already a Python module named {path.stem!r}; rename the file")
    find_beside(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        with mistakes_in(path, str(file)):
            spec.loader.exec_module(module)
    except UserError:
        del sys.modules[path.stem]
        raise
    return module


def _beside(path: Path) -> bool:
    spec = importlib.util.find_spec(path.stem)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path


def load_value(ref: str, function: str) -> tuple[Any, Path | None]:
    """What `function` (or the one named after a colon in `ref`) returns, and the file it came from.

    Raises:
        UserError: no such file, module or function, or it fails.
    """
    place, _, name = ref.rpartition(":") if ":" in ref else (ref, "", "")
    name = name or function
    module = load_module(place) if place.endswith(".py") or "/" in place else _import(ref, place)
    make = getattr(module, name, None)
    if not callable(make):
        raise UserError(f"{ref}: there is no function {name}() in it; define `def {name}():` that returns the value")
    file = Path(str(module.__file__))
    with mistakes_in(file, place if place.endswith(".py") else str(file)):
        value = make()
    return value, file


def _import(ref: str, place: str) -> ModuleType:
    """The module named `place`, installed or in the working directory."""
    if "" not in sys.path and os.getcwd() not in sys.path:  # an installed command does not look here, python -m does
        sys.path.append(os.getcwd())
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"{ref}: expected a Python file, module:function, or a config.json")
    with mistakes_in(Path(spec.origin or place), place):
        return importlib.import_module(place)


def load_config(path: Path) -> dict[str, Any]:
    """A run's config.json as JSON.

    Raises:
        UserError: it cannot be read, or slmjax did not write it.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable config.json ({error})") from None
    if not isinstance(data, dict) or "experiment" not in data:
        raise UserError(f"{path}: it holds no experiment; expected the config.json of a run folder")
    return data


def load_experiment(ref: str) -> tuple[Any, Path | None]:
    """The `Experiment` a user names, and the Python file it was defined in (None for a config.json).

    Raises:
        UserError: there is nothing of this name, or it is not an Experiment.
    """
    from slmjax.config import Experiment

    path = at(ref)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"{ref}: no such file; expected a Python file, module:function, or a config.json")
        value, source = from_json(load_config(path)["experiment"]), None
    else:
        value, source = load_value(ref, "experiment")
    if not isinstance(value, Experiment):
        raise UserError(f"{ref}: experiment() returned a {type(value).__name__}; expected slmjax.config.Experiment")
    return value, source
