"""The run that another one begins as: what `branching` and `extending` read of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from slmjax.config import Experiment, identity
from slmjax.experiment_file import load_config
from slmjax.files import at
from slmjax.serialise import from_json
from slmjax.train.checkpoint_folder import steps


class Parent(NamedTuple):
    """A run folder and its config.json."""

    folder: Path
    config: dict[str, Any]
    experiment: Experiment

    def identity_of(self, experiment: Experiment) -> dict[str, Any]:
        """The identity of a run of `experiment` with this run's data, first parameters and models."""
        known = self.config["identity"]
        start = known["start"].get("model") if self.experiment.start.source is not None else None
        return identity(experiment, known["stores"], start, self.config.get("models"))


def parent_of(folder: str | Path) -> Parent:
    """
    Raises:
        UserError: it is no run folder.
    """
    source = at(folder)
    config = load_config(source / "config.json")
    return Parent(source, config, from_json(config["experiment"]))


def made(folder: str | Path) -> int | None:
    """The step of a run folder's newest checkpoint, 0 if it has none; None if it is no run folder yet."""
    target = at(folder)
    return max(steps(target / "checkpoints"), default=0) if (target / "config.json").is_file() else None
