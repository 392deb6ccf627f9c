"""The output table of a teacher in a folder of its own: all that hidden states on disk need to give logits."""

from __future__ import annotations

from pathlib import Path

from slmjax import __version__
from slmjax.convert.folder import publish
from slmjax.distill.source import OnDisk
from slmjax.distill.teacher import Teacher
from slmjax.runs.folder import write_json
from slmjax.runs.loading import PART, Loaded
from slmjax.serialise import to_json
from slmjax.train.checkpoint_folder import save_params
from slmjax.types import Model, Params


def head_of(loaded: Loaded, model: Model) -> Params:
    """The parameters that the logits follow from, given the last hidden state. `model`: that of `loaded`."""
    return OnDisk().reduced(Teacher(source="", assembly=loaded.decoder, model=model, params=loaded.params)).params


def write_head(out: Path, loaded: Loaded, model: Model, name: str) -> None:
    """Writes a folder that distillation takes for a teacher, and every other verb refuses.

    Args:
        name: of the teacher, for messages.
    """
    described = {"format": 1, "slmjax": __version__, "model": to_json(loaded.decoder)}
    described |= {PART: f"the output table of {name}", "imported": {"folder": loaded.source.name}}
    with publish(out, overwrite=None) as folder:
        write_json(folder / "config.json", described)
        save_params(folder / "checkpoints", head_of(loaded, model), described["imported"])
        loaded.tokenizer().save(folder)
