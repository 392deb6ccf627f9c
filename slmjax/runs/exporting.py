"""Writes a model in a format that stock runtimes load, with the facts that its run recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmjax.convert.card import Facts
from slmjax.convert.export import export_hf
from slmjax.convert.folder import check_free
from slmjax.convert.gguf.export import check_file_free, export_gguf
from slmjax.errors import UserError
from slmjax.runs import facts
from slmjax.runs.loading import Loaded
from slmjax.track.ledger import Ledger


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
        UserError: the file may not be written.
    """
    check_file_free(export.out, overwrite=export.overwrite)


def write_hf(export: Export, loaded: Loaded, *, donate: bool = False) -> Any:
    """-> `convert.export.Exported`. `donate`: delete the parameters once they are written and compared."""
    tokenizer = loaded.tokenizer() if loaded.has_tokenizer else None
    return _written(export, loaded, export_hf, tokenizer=tokenizer, donate=donate, packed=loaded.packed)


def write_gguf(export: Export, loaded: Loaded, *, donate: bool = False) -> Any:
    """-> `convert.gguf.export.Exported`. `donate`: delete the parameters once they are written and compared."""
    return _written(export, loaded, export_gguf, tokenizer=loaded.tokenizer(), packed=loaded.packed, donate=donate)


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
