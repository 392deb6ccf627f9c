"""What `slmjax prune` writes: a folder like that of `slmjax import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmjax import __version__
from slmjax.convert.folder import publish
from slmjax.convert.memory import to_device
from slmjax.models.assembly import Assembly
from slmjax.runs.folder import write_json
from slmjax.runs.loading import Loaded
from slmjax.serialise import to_json
from slmjax.train.checkpoint_folder import save_params
from slmjax.types import Params


def write(out: Path, loaded: Loaded, model: Assembly, params: Params, about: dict[str, Any]) -> None:
    """Writes the pruned model; the folder appears once it is complete.

    Raises:
        UserError: `out` may not be written.
        StorageError: the disk is full or not writable.
    """
    described = {"format": 1, "slmjax": __version__, "model": to_json(model), "pruned": about}
    described["imported"] = {"folder": loaded.source.name}
    with publish(out, overwrite=None) as folder:
        write_json(folder / "config.json", described)
        save_params(folder / "checkpoints", to_device(params), described["imported"])
        loaded.save_texts(folder)
