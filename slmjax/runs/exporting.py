"""Writes a model in a format that stock runtimes load, with the facts that its run recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.convert.card import Facts
from slmjax.convert.export import export_hf
from slmjax.convert.folder import check_free
from slmjax.convert.gate_loss import Texts
from slmjax.convert.gguf.export import check_file_free, export_gguf
from slmjax.convert.gguf.write import KINDS
from slmjax.errors import UserError
from slmjax.runs import facts
from slmjax.runs.carrying import carried, gguf, hugging_face
from slmjax.runs.evaluating import HeldOut, opened
from slmjax.runs.loading import Loaded, generative
from slmjax.track.ledger import Ledger

TOKENS = 1024
"""Held-out tokens on which the loss of a stock runtime is compared: llama.cpp is asked for one after another"""


@dataclass(frozen=True, kw_only=True)
class Export:
    """How a model is written."""

    out: Path
    dtype: str = "float32"
    overwrite: bool = False
    """Replace what an earlier export wrote"""
    reference_python: str | None = None
    """A Python with the stock runtime; see `convert.gate.find_python`"""
    name: str | None = None
    """The model's name on its card or in the file; None: the run's"""
    licence: str | None = None
    data: str | None = None
    """A token store on whose validation split the loss of the stock runtime is compared; None: a passage of text"""

    def scored(self, loaded: Loaded) -> Texts | None:
        """Documents of `data`, about `TOKENS` tokens; None without data.

        Raises:
            UserError: the model does not continue text, or they do not fit it.
            DataError: the data are missing, or were written by another tokenizer.
        """
        if self.data is None:
            return None
        generative(loaded.decoder)
        held_out = opened(HeldOut(data=self.data, batch=1), loaded)
        texts: list[tuple[int, ...]] = []
        for batch in held_out.validation(None):
            tokens, targets, segments = (np.asarray(x[0]) for x in (batch.tokens, batch.targets, batch.segment_ids))
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                last = targets[at[-1:]][np.asarray(batch.weights[0])[at[-1:]] > 0]  # none at the end of a document
                texts.append((*tokens[at].tolist(), *last.tolist()))
            if sum(map(len, texts)) >= TOKENS:
                break
        return tuple(text[: loaded.decoder.context] for text in texts if len(text) > 1)

    def about(self, loaded: Loaded) -> Facts:
        """Facts about the model, for its card."""
        if loaded.experiment is None:
            imported = loaded.config.get("imported", {})
            return Facts(
                name=self.name or self.out.stem,
                licence=self.licence or imported.get("licence"),
                parent=imported.get("folder", loaded.source.name),
            )
        name = self.name or loaded.experiment.name
        step = loaded.step or 0
        return facts.collect(loaded.source, loaded.experiment, step=step, name=name, licence=self.licence)


def check_hf(export: Export) -> None:
    """
    Raises:
        UserError: the folder may not be written, or the format does not have this dtype.
    """
    if export.dtype not in ("float32", "float16", "bfloat16"):
        known = "float32, float16, bfloat16"
        raise UserError(f"--dtype {export.dtype} is for --format gguf; a Hugging Face folder: {known}")
    check_free(export.out, overwrite=export.overwrite)


def check_gguf(export: Export) -> None:
    """
    Raises:
        UserError: the file may not be written, or the format does not have this dtype.
    """
    if export.dtype not in KINDS:
        raise UserError(f"--dtype {export.dtype} is unknown; a GGUF file: {', '.join(KINDS)}")
    check_file_free(export.out, overwrite=export.overwrite)


def write_hf(export: Export, loaded: Loaded, *, donate: bool = False, say: Callable[[str], None] = print) -> Any:
    """-> `convert.export.Exported`.

    Args:
        donate: delete the parameters once they are written and compared.
        say: called with a line if parameters that an imported model holds as codes become floats (`carrying.carried`).
    """
    tokenizer = loaded.tokenizer() if loaded.has_tokenizer else None
    packed = carried(loaded, hugging_face(export.dtype), say)
    return _written(export, loaded, export_hf, tokenizer=tokenizer, donate=donate, packed=packed)


def write_gguf(export: Export, loaded: Loaded, *, donate: bool = False, say: Callable[[str], None] = print) -> Any:
    """-> `convert.gguf.export.ExportedGGUF`. Args: as `write_hf`; `say` also tells end tokens that do not fit."""
    packed, tokenizer = carried(loaded, gguf, say), loaded.tokenizer()
    done = _written(export, loaded, export_gguf, tokenizer=tokenizer, packed=packed, donate=donate)
    if done.ends_left_out:
        names = ", ".join(f"{i} ({tokenizer.raw.id_to_token(i)!r})" for i in done.ends_left_out)
        say(f"a GGUF file has room for three tokens that end a text; these are left out: {names}")
    return done


def _written(export: Export, loaded: Loaded, write: Callable[..., Any], **options: Any) -> Any:
    done = write(
        loaded.decoder,
        loaded.params,
        export.out,
        dtype=export.dtype,
        numerics=loaded.numerics,
        facts=export.about(loaded),
        overwrite=export.overwrite,
        reference_python=export.reference_python,
        scored=export.scored(loaded),
        generation=loaded.generation,
        **options,
    )
    if loaded.experiment is not None:
        ledger = Ledger(loaded.source / "ledger.jsonl")
        ledger.append("exported", path=str(export.out), dtype=export.dtype, step=loaded.step)
    return done


FORMATS: Mapping[str, tuple[Callable[[Export], None], Callable[..., Any]]] = {
    "hf": (check_hf, write_hf),
    "gguf": (check_gguf, write_gguf),
}
"""Format -> (the check before the model is read, the function that writes it)"""
DTYPES: Mapping[str, str] = {"hf": "float32", "gguf": "float16"}
"""Format -> the dtype of the weights where `LoadedModel.export` is given none"""
