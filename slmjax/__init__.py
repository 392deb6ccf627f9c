"""slmjax: train, compress and export small language models from scratch in JAX.

    import slmjax

    run = slmjax.train(experiment, workdir="runs/nb")  # an Experiment, or the path of an experiment file
    model = slmjax.load("runs/nb")  # a run, a checkpoint, a Hugging Face folder, a GGUF file
    model.generate("Call me", tokens=20)

Import it before jax: it sets XLA's flags for this machine, which jax reads when it is imported. Everything else is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slmjax import platform

if TYPE_CHECKING:
    from slmjax.config import Experiment as Experiment
    from slmjax.config import Runtime as Runtime
    from slmjax.config import override as override
    from slmjax.runs.library import LoadedModel as LoadedModel
    from slmjax.runs.library import Run as Run
    from slmjax.runs.library import load as load
    from slmjax.runs.library import train as train

__version__ = "0.1.0"

_LAZY = {
    "Experiment": "slmjax.config",
    "Runtime": "slmjax.config",
    "override": "slmjax.config",
    "LoadedModel": "slmjax.runs.library",
    "Run": "slmjax.runs.library",
    "load": "slmjax.runs.library",
    "train": "slmjax.train",  # the package, which can be called
}

__all__ = ["Experiment", "LoadedModel", "Run", "Runtime", "load", "override", "train"]

platform.configure_import()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'slmjax' has no attribute {name!r}; it has: {', '.join(_LAZY)}")
    module = importlib.import_module(_LAZY[name])
    return module if name == "train" else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
