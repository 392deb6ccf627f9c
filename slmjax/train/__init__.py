"""Step, loop, hooks, checkpoints, sharding: written for any model, loss and quantizer, and importing none of them.

The package can be called: `slmjax.train(experiment)` is `slmjax.runs.library.train`. Python binds a subpackage to its
name in `slmjax` as soon as it is imported, so a function of that name would be lost.
"""

import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("slmjax.runs.library").train(*args, **options)


sys.modules[__name__].__class__ = _Callable
