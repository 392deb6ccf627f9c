"""The trained models that an objective reads, such as a teacher: opened, checked, and given to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax

from slmjax.config import Experiment
from slmjax.data.generation_config import NOTHING_SAID, GenerationConfig, end_tokens
from slmjax.data.spec import Opened
from slmjax.data.tokenizer import Tokenizer
from slmjax.distill.agreement import Agreement, agreement
from slmjax.distill.teacher import Teacher, check
from slmjax.errors import UserError
from slmjax.files import at
from slmjax.nn.compute import Compute
from slmjax.runs.loading import Loaded, load
from slmjax.start import content_hash
from slmjax.types import Params, Special


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models that the objective of an experiment reads."""

    hashes: Mapping[str, str] = field(default_factory=dict)
    """Content hash of each, by its path"""
    loaded: tuple[Loaded, ...] = ()
    """Empty if one of them is no longer there: a run that is complete needs none"""


def read(experiment: Experiment, tokenizer: Tokenizer, folder: Path | None = None) -> Models:
    """Opens the models.

    Args:
        tokenizer: of the data.
        folder: of the run; if it has begun already, models that are no longer there are known by their recorded hashes.

    Raises:
        UserError: no such model, one of another kind than the trained model, or one whose tokenizer gives tokens other
            ids than that of the data.
    """
    paths = experiment.objective.models()
    recorded = {} if folder is None else _recorded(folder)
    if any(not at(path).exists() for path in paths) and all(path in recorded for path in paths):
        hashes = {path: recorded[path] for path in paths}
        experiment.objective.ready(experiment.data, hashes)
        return Models(hashes=hashes)
    loaded = tuple(load(at(path), part=experiment.objective.output_tables) for path in paths)
    for path, model in zip(paths, loaded, strict=True):
        experiment.objective.accepts(path, model.decoder, experiment.model, experiment.data.length)
        if experiment.objective.same_tokens:
            check_vocabulary(path, model.tokenizer(), tokenizer)
    hashes = {p: content_hash(jax.device_get(m.params)) for p, m in zip(paths, loaded, strict=True)}
    experiment.objective.ready(experiment.data, hashes)
    return Models(hashes=hashes, loaded=loaded)


def with_models(
    experiment: Experiment,
    models: Models,
    tokenizer: Tokenizer,
    compute: Compute,
    generation: GenerationConfig = NOTHING_SAID,
) -> Experiment:
    """The experiment whose objective has the special token ids of the tokenizer, and its models in memory.

    Args:
        generation: what is known of text that the trained model generates: further tokens that end it.

    Raises:
        UserError: a model is not there.
    """
    special = replace(tokenizer.special, ends=end_tokens(tokenizer.eos_id, generation.ends))
    objective = experiment.objective.with_special(special)
    if missing := [path for path in objective.models() if not at(path).exists()]:
        raise UserError(f"objective.teachers: {missing[0]} is not there; put the model back to continue this run")
    return _bound(replace(experiment, objective=objective), models.loaded, tokenizer.rows, compute)


def for_estimates(experiment: Experiment, compute: Compute) -> Experiment:
    """The experiment with the models of its objective in memory, without looking at its data.

    Raises:
        UserError: no such model, or one of another kind than the trained model.
    """
    paths = experiment.objective.models()
    loaded = tuple(load(at(path), part=experiment.objective.output_tables) for path in paths)
    for path, model in zip(paths, loaded, strict=True):
        experiment.objective.accepts(path, model.decoder, experiment.model, experiment.data.length)
    objective = experiment.objective.with_special(Special(mask=0))  # no size depends on the ids
    return _bound(replace(experiment, objective=objective), loaded, experiment.model.vocab, compute)


def _bound(experiment: Experiment, loaded: Sequence[Loaded], tokens: int, compute: Compute) -> Experiment:
    paths = experiment.objective.models()
    teachers = [_teacher(path, model, model.params, compute) for path, model in zip(paths, loaded, strict=True)]
    return replace(experiment, objective=experiment.objective.with_models(teachers, tokens=tokens))


def _teacher(source: str, loaded: Loaded, params: Params, compute: Compute) -> Teacher:
    model = loaded.decoder.build(compute, loaded.numerics)
    tokens = loaded.tokenizer().rows if loaded.has_tokenizer else None
    return Teacher(source=source, assembly=loaded.decoder, model=model, params=params, tokens=tokens)


def check_vocabulary(source: str, theirs: Tokenizer, ours: Tokenizer, field: str = "objective.teachers: ") -> None:
    """Checks that the same ids stand for the same tokens. `field`: what a message begins with.

    Raises:
        UserError: an id stands for another token, or is in one of the two alone.
    """
    vocabularies = [tokenizer.raw.get_vocab(with_added_tokens=True) for tokenizer in (theirs, ours)]
    if vocabularies[0] == vocabularies[1]:
        return
    by_id = [{i: token for token, i in vocabulary.items()} for vocabulary in vocabularies]
    first = min(i for i in {*by_id[0], *by_id[1]} if by_id[0].get(i) != by_id[1].get(i))
    here, there = (f"{tokens[first]!r}" if first in tokens else "no token" for tokens in by_id)
    raise UserError(
        f"{field}{source} has another vocabulary than the data (id {first} is {here} there and {there} "
        f"in the data); build the data with {source}'s tokenizer.json"
    )


def _recorded(folder: Path) -> dict[str, str]:
    """The hashes of the models that the run in this folder began with."""
    try:
        return dict(json.loads((folder / "config.json").read_text()).get("models", {}))
    except (OSError, ValueError, TypeError):
        return {}


def teacher_of(loaded: Loaded, chosen: str | None) -> str | None:
    """The model to compare this one with: the chosen one, or the first teacher of its run that is still there."""
    if chosen is not None:
        return chosen
    objective = loaded.experiment.objective if loaded.experiment else None
    teachers = objective.models() if objective is not None and objective.same_tokens else ()
    return next((path for path in teachers if at(path).exists()), None)


def compared(
    loaded: Loaded,
    source: str,
    data: Opened,
    *,
    batches: int | None = None,
    compute: Compute = Compute(),  # noqa: B008
) -> Agreement:
    """How closely a model agrees with its teacher on held-out text.

    Args:
        source: the teacher.
        batches: at most this many; None: the whole split.

    Raises:
        UserError: no such model, or one of another kind or vocabulary.
        DataError: no token to compare on.
    """
    theirs, tokenizer = load(at(source)), loaded.tokenizer()
    length = max((batch.tokens.shape[1] for batch in data.validation(1)), default=1)
    check(source, theirs.decoder, loaded.decoder, length)
    check_vocabulary(source, theirs.tokenizer(), tokenizer)
    return agreement(
        loaded.decoder.build(compute, loaded.numerics),
        loaded.weights,
        _teacher(source, theirs, theirs.weights, compute),
        data.validation(batches),
        tokens=tokenizer.rows,
        prepare=lambda batch, key: loaded.decoder.evaluation_batch(batch, key, tokenizer.special),
    )
