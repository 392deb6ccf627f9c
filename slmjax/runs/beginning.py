"""The parameters that a run begins with, where its experiment starts from another model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from slmjax.config import Experiment
from slmjax.data import generation_config
from slmjax.data.generation_config import NOTHING_SAID, GenerationConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError
from slmjax.files import at
from slmjax.runs.build import Built
from slmjax.start import content_hash
from slmjax.types import Params, TrainState


class Beginning(NamedTuple):
    """A model to start from."""

    hash: str
    """`content_hash` of its parameters"""
    params: Params | None
    """None if the model no longer exists, and the run resumes from its own checkpoints"""
    generation: GenerationConfig = NOTHING_SAID
    """What its folder says of generated text"""
    tokenizer: str | None = None
    """`Tokenizer.fingerprint` of its tokenizer: the token ids of `generation` are those of this one"""


def read(experiment: Experiment, folder: Path) -> Beginning | None:
    """What `experiment.start` begins with; None if parameters are drawn from the seed.

    Args:
        folder: of the run; if it has begun already, the model that it started from need not exist any more.

    Raises:
        UserError: no such model.
    """
    from slmjax.runs.loading import load

    if experiment.start.source is None:
        return None
    source = at(experiment.start.source)
    recorded = _recorded(folder)
    if recorded is not None and not source.exists():
        return Beginning(recorded, None)
    loaded = load(source)
    params = jax.device_get(loaded.params)
    tokenizer = loaded.tokenizer().fingerprint if loaded.has_tokenizer else None
    return Beginning(content_hash(params), params, loaded.generation, tokenizer)


def told(beginning: Beginning | None, tokenizer: Tokenizer, folder: Path) -> GenerationConfig:
    """What is known of text that a run's model generates: what the model says that it starts from, if its tokens are
    those of the run.

    Args:
        tokenizer: of the run's data.
        folder: of the run. One that has begun goes by the copy in there, whatever has become of that model.
    """
    if beginning is None:
        return NOTHING_SAID
    if (folder / "config.json").is_file():
        return generation_config.read(folder, {})
    if beginning.tokenizer != tokenizer.fingerprint:
        return NOTHING_SAID
    found = beginning.generation
    if set(found.ends) <= {tokenizer.eos_id}:
        return found
    return replace(found, said={**found.said, "eos_token_id": [*found.ends]})  # config.json may be what names them


def check(experiment: Experiment, built: Built, beginning: Beginning | None) -> None:
    """Checks the names and shapes of the tensors, without computing anything.

    Raises:
        UserError: see `Start.parameters`.
    """
    if beginning is not None and beginning.params is not None:
        _combined(experiment, built, beginning.params, drawn=False)


def starting(experiment: Experiment, built: Built, beginning: Beginning | None) -> Callable[[], TrainState]:
    """The function that makes the state of step 0, in place of `Program.init`."""

    def init() -> TrainState:
        if beginning is None:
            return built.program.init()
        if beginning.params is None:
            raise UserError(
                f"start.model is {experiment.start.source}, which is not there, and the run has no checkpoint to go on "
                "from; put the model back"
            )
        params = _combined(experiment, built, beginning.params, drawn=False)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            params = _combined(experiment, built, beginning.params, drawn=True)
        return built.program.given(params)

    return init


def _combined(experiment: Experiment, built: Built, given: Params, *, drawn: bool) -> Params:
    """`drawn`: whether new parameters are drawn from the seed, or given as shapes only."""
    key = jax.random.fold_in(jax.random.key(experiment.seed), 0)  # as train/state.py draws them
    init = built.model.init
    fresh: Any = jax.device_get(jax.jit(init)(key)) if drawn else jax.eval_shape(init, key)
    return experiment.start.parameters(fresh, given, built.model.axes)


def _recorded(folder: Path) -> str | None:
    """The hash of the model that the run in this folder began with."""
    try:
        return json.loads((folder / "config.json").read_text())["identity"]["start"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
