"""The Python interface for notebooks and scripts: train an experiment, open a model, use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.config import Experiment, Runtime
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError
from slmjax.evals.classification import Classified
from slmjax.evals.generate import Generator
from slmjax.evals.perplexity import Result
from slmjax.evals.sampling import sampler
from slmjax.experiment_file import load_experiment
from slmjax.files import at
from slmjax.models.assembly import Assembly
from slmjax.runs import evaluating, exporting, launch, loading
from slmjax.track.jsonl import read
from slmjax.train.hooks import Hook
from slmjax.types import Params


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that `train` has completed."""

    folder: Path
    metrics: dict[str, np.ndarray]
    """By name, float64 [rows]: one row a logged step, `step` its number; nan where a row lacks the metric"""

    @cached_property
    def model(self) -> LoadedModel:
        """The model after the last step."""
        return load(self.folder)


def train(
    experiment: Experiment | str | Path,
    *,
    workdir: str | Path | None = None,
    runtime: Runtime | None = None,
    hooks: Sequence[Any] = (),
) -> Run:
    """Trains an experiment to its end, as `slmjax train` does: resumes a run that was stopped in the same folder.

    Args:
        experiment: a value, or the path of a Python file with `def experiment() -> Experiment`, or of a config.json.
        workdir: the run folder; default: that of `runtime`, or runs/ and the experiment's name.
        runtime: devices, tracking, checkpoints; default: `Runtime()`.
        hooks: called after some steps, with the state (`train.hooks.Hook`).

    Raises:
        UserError, DataError, StorageError, Diverged, Preempted: see `errors`.
    """
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise UserError(
                f"hooks: {hook!r} is not a hook; it needs due(step, last) and __call__(at) (train/hooks.py)"
            )
    value, source = (experiment, None) if isinstance(experiment, Experiment) else load_experiment(str(experiment))
    settings = runtime or Runtime()
    if workdir is not None:
        settings = replace(settings, workdir=str(workdir))
    launch.train(value, settings, source, hooks)
    folder = launch.folder_of(value, settings)
    return Run(folder=folder, metrics=_columns(read(folder / "metrics.jsonl")))


def load(path: str | Path, *, step: int | None = None) -> LoadedModel:
    """Opens a run folder, one of its checkpoints, a Hugging Face folder or a GGUF file.

    Args:
        step: the checkpoint of a run; default: the newest intact one.

    Raises:
        UserError: the path is none of these.
        StorageError: no checkpoint, or only damaged ones.
    """
    return LoadedModel(loading.load(path, step=step))


class LoadedModel:
    """A loaded model, to evaluate, sample from and export."""

    def __init__(self, loaded: loading.Loaded):
        self.loaded = loaded

    def __repr__(self) -> str:
        step = "" if self.loaded.step is None else f", step {self.loaded.step}"
        return f"LoadedModel({str(self.loaded.source)!r}{step})"

    @property
    def params(self) -> Params:
        """The effective parameters of evaluation: a nested dict of float32 arrays."""
        return self.loaded.params

    @property
    def config(self) -> Assembly:
        """The model as a value: a `Decoder` or `Encoder`."""
        return self.loaded.decoder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            UserError: the model has none.
        """
        return self.loaded.tokenizer()

    def evaluate(
        self, data: str | Path | None = None, *, batches: int | None = None, batch: int = 16, length: int | None = None
    ) -> Result | Classified:
        """Loss, perplexity and bits per byte on held-out text, each with its standard error; of a classifier, accuracy.

        Args:
            data: a token store, or of a classifier a file of labelled texts; default: the validation data of the run.
            batches: at most this many batches of `batch` sequences of `length` tokens; default: the whole split.
        """
        place = None if data is None else str(data)
        held_out = evaluating.HeldOut(data=place, batch=batch, length=length)
        opened = evaluating.opened(held_out, self.loaded)
        return evaluating.measure(self.loaded, opened, batches=batches)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Any:
        """Continues a prompt, or each of several.

        Args:
            tokens: new tokens at most; None: as the model's generation_config.json says, else 128.
            temperature: 0 takes the likeliest token, which is the default. Here, too, and for `top_k` and `top_p`,
                None means what generation_config.json says first.

        Returns:
            The new text; for several prompts, a list of texts.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        said = self.loaded.generation
        rule = sampler(**said.sampling(default=0.0, temperature=temperature, top_k=top_k, top_p=top_p))
        length = said.length(tokens, default=128)
        results = self._generator(prompts, sampler=rule, **length, stop=(*stop, *said.stop), seed=seed)
        texts = [result.text for result in results]
        return texts[0] if isinstance(prompt, str) else texts

    def logits(self, ids: Any) -> np.ndarray:
        """Token ids [T] or [B, T] without padding -> logits float32 [T, V] or [B, T, V]; of an encoder, what its head
        gives for each token.

        Raises:
            UserError: an id is not in the vocabulary, or the sequence is longer than the model's context.
        """
        array = np.asarray(ids)
        if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"ids has shape {array.shape} and dtype {array.dtype}; expected integers [T] or [B, T]")
        rows = np.atleast_2d(array).astype(np.int32)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.config.vocab:
            raise UserError(
                f"ids go from {rows.min()} to {rows.max()}; the model's vocabulary is 0 to {self.config.vocab - 1}"
            )
        if rows.shape[1] > self.config.context:
            raise UserError(f"ids has {rows.shape[1]} tokens a row; the model's context is {self.config.context}")
        logits = np.asarray(self._logits(self.loaded.weights, jnp.asarray(rows)))
        return logits[0] if array.ndim == 1 else logits

    def export(
        self,
        out: str | Path,
        *,
        format: Literal["hf", "gguf"] = "hf",
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes the model as stock transformers or llama.cpp load it, reads it back and compares the logits.

        Args:
            dtype: of the weights; default: float32, in GGUF float16.

        Raises:
            UserError: the format cannot express the model, or `out` may not be written.
            Rejected: a comparison failed.
        """
        check, write = exporting.FORMATS[format]
        export = exporting.Export(out=at(out), dtype=dtype or exporting.DTYPES[format], overwrite=overwrite)
        check(export)
        write(export, self.loaded)
        return export.out

    @cached_property
    def _generator(self) -> Generator:
        model = loading.generative(self.config)
        compute = evaluating.compute_of("float32" if jax.default_backend() == "cpu" else None)
        ends = self.loaded.generation.ends
        return Generator(model, self.loaded.weights, self.tokenizer, compute, ends, numerics=self.loaded.numerics)

    @cached_property
    def _logits(self) -> Any:
        model = self.config.build(numerics=self.loaded.numerics)

        def logits(params: Params, tokens: jax.Array) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            return model.unembed(params, model.apply(params, tokens, positions, jnp.ones_like(tokens)).hidden)

        return jax.jit(logits)


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = {name: None for row in rows for name, x in row.items() if isinstance(x, int | float)}
    return {name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in names}
