"""A run computes in one way: in all of its processes, and from its first step to its last however often it resumes.

The choice is written to RUN/compute.json when the run begins. Rounding differs between the choices, so that a run
that resumes with another choice would not be bit for bit equal to one that was never stopped.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from slmjax.config import Runtime
from slmjax.errors import UserError
from slmjax.nn.compute import Compute, for_backend
from slmjax.runs import probe
from slmjax.runs.folder import write_json
from slmjax.serialise import from_json, to_json
from slmjax.train.processes import of_the_first

FILE = "compute.json"


class Choice(NamedTuple):
    """How a run computes, and why."""

    compute: Compute
    reason: str
    """Why, in a few words for the log"""


def settle(runtime: Runtime, folder: Path) -> Choice:
    """How the run in this folder computes, the same in all processes: as `runtime.compute` says; else as the run began;
    else in the way that process 0 has measured to be the fastest on its machine. `record` writes it to the folder."""
    choice = choice_of(runtime, folder) if jax.process_index() == 0 else Choice(Compute(), "")
    if runtime.compute is None:  # else every process has it from its command line
        choice = _of_process_0(choice)
    return choice


def record(choice: Choice, folder: Path) -> None:
    """Writes the choice into the run folder: later starts compute in the same way."""
    write_json(folder / FILE, {"backend": jax.default_backend(), "compute": to_json(choice.compute)})


def choice_of(runtime: Runtime, folder: Path) -> Choice:
    """What process 0 chooses for the run in this folder, which need not exist."""
    dtype = None if runtime.dtype == "auto" else runtime.dtype
    if runtime.compute is not None:
        return Choice(replace(runtime.compute, dtype=dtype or runtime.compute.dtype), "as runtime.compute says")
    begun = recorded(folder / FILE, jax.default_backend())
    if begun is not None and dtype in (None, begun.dtype):
        return Choice(begun, f"as the run began ({FILE})")
    verdict = probe.verdict()
    if verdict is None:
        compute = for_backend(jax.default_backend())
        return Choice(replace(compute, dtype=dtype or compute.dtype), f"the default of {jax.default_backend()}")
    if dtype is None:
        return Choice(verdict.compute, f"chosen for {verdict.processor}")
    slower = "" if dtype == verdict.compute.dtype else f"; {verdict.compute.dtype} is faster on {verdict.processor}"
    return Choice(probe.choose(verdict.seconds, dtype), f"as runtime.dtype says{slower}")


def recorded(file: Path, backend: str) -> Compute | None:
    """The recorded choice; None if the run has not begun, ran on a device of another kind, or the file cannot be read
    by this version."""
    try:
        data: Any = json.loads(file.read_text())
        compute = from_json(data["compute"]) if data["backend"] == backend else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return compute if isinstance(compute, Compute) else None


def _of_process_0(choice: Choice) -> Choice:
    """The choice that process 0 made, in every process."""
    compute, reason = of_the_first([to_json(choice.compute), choice.reason])
    return Choice(from_json(compute), reason)
