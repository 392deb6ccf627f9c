"""A model on held-out data: which data, whether they fit the model, and what is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from slmjax.data.labelled import LabelledText
from slmjax.data.spec import Opened, PackedText, Part
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import DataError, UserError
from slmjax.evals.classification import Classified, classify
from slmjax.evals.perplexity import Result, evaluate
from slmjax.evals.text import token_bytes
from slmjax.nn.compute import Compute
from slmjax.runs.loading import Loaded
from slmjax.runs.probe import compute_here


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Which data a model is evaluated on."""

    data: str | None = None
    """A token store, or of a classifier a file of labelled texts; None: the validation data of the run"""
    batch: int = 16
    """Sequences a batch"""
    length: int | None = None
    """Tokens a sequence; None: as in training, or the model's context up to 1024"""
    text: str = "text"
    """Column of the texts in `data`, for a classifier that is not a run of slmjax"""
    label: str = "label"
    """Column of the labels, likewise"""


def compute_of(dtype: str | None) -> Compute:
    """How to compute on this machine, in the given precision or else the fastest."""
    compute = compute_here()
    return compute if dtype is None else replace(compute, dtype=dtype)


def opened(held_out: HeldOut, loaded: Loaded) -> Opened:
    """The data, ready to be read.

    Raises:
        UserError: the model does not say which data, or they do not fit it.
        DataError: they are missing, or were written by another tokenizer.
    """
    run, labels = loaded.experiment, loaded.decoder.labels
    if held_out.data is None and run is None:
        kind = "a file of labelled texts" if labels else "a token store"
        raise UserError(f"{loaded.source} does not say which data to evaluate on; add --data with {kind}")
    if held_out.length is not None and held_out.length < 2:
        raise UserError(f"--length is {held_out.length}; expected at least 2")
    length = held_out.length or (run.data.length if run else min(loaded.decoder.context, 1024))
    if length > loaded.decoder.context:
        raise UserError(f"--length is {length}, longer than the model's context {loaded.decoder.context}; shorten it")
    if held_out.batch < 1:
        raise UserError(f"--batch is {held_out.batch}; expected at least 1")
    data = _opened(held_out, loaded, length)
    check_tokenizer(data, loaded.tokenizer(), str(loaded.source))
    return data


def _opened(held_out: HeldOut, loaded: Loaded, length: int) -> Opened:
    run, labels = loaded.experiment, loaded.decoder.labels
    if held_out.data is None:
        assert run is not None
        reopened = replace(run.data, length=length, batch=held_out.batch).reopen(loaded.config["stores"])
        if labels and not reopened.labels:
            raise UserError(
                f"{loaded.source} was trained on data without labels; add --data with a file of labelled texts"
            )
        return reopened
    data: Any = PackedText(train=(Part(source=held_out.data),)) if run is None else run.data
    if labels and not isinstance(data, LabelledText):
        data = LabelledText(train=(held_out.data,), closed=loaded.decoder.reads_end)
    if labels and run is None:
        data = replace(data, text=held_out.text, label=held_out.label)
    elsewhere = data.elsewhere(held_out.data, loaded.tokenizer_path or loaded.source, labels)
    return replace(elsewhere, length=length, batch=held_out.batch).open()


def check_tokenizer(data: Opened, tokenizer: Tokenizer, model: str) -> None:
    """
    Raises:
        DataError: the data were written by another tokenizer than the model's.
    """
    of_data = data.tokenizer()
    if tokenizer.fingerprint != of_data.fingerprint and _ids_of(of_data) != _ids_of(tokenizer):
        raise DataError(
            f"{data.name} was written by another tokenizer ({of_data.fingerprint[:12]}) than that of "
            f"{model} ({tokenizer.fingerprint[:12]}); build the store with the model's tokenizer.json"
        )


def _ids_of(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """All that decides the ids of a text: not the template of BOS and EOS around it, which an export may rewrite."""
    spec = json.loads(tokenizer.raw.to_str())
    deciding = {k: v for k, v in spec.items() if k not in ("post_processor", "truncation", "padding", "version")}
    return deciding, tokenizer.bos_id, tokenizer.eos_id


def measure(
    loaded: Loaded,
    data: Opened,
    *,
    batches: int | None = None,
    compute: Compute | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Result | Classified:
    """Loss, perplexity and bits per byte on the validation data; of a classifier, accuracy and loss.

    Args:
        batches: at most this many; None: the whole split.
        progress: called with the number of batches done.
    """
    if batches is not None and batches < 1:
        raise UserError(f"--batches is {batches}; expected at least 1")
    model = loaded.decoder.build(compute or compute_of(None), loaded.numerics)
    rows = data.validation(batches)
    if loaded.decoder.labels:
        return classify(model, loaded.weights, rows, progress=progress)
    tokenizer = loaded.tokenizer()
    return evaluate(
        model,
        loaded.weights,
        rows,
        token_bytes=token_bytes(tokenizer.raw) if loaded.decoder.causal else (),
        prepare=lambda batch, key: loaded.decoder.evaluation_batch(batch, key, tokenizer.special),
        progress=progress,
    )
