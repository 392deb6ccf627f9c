"""MODEL, as every verb takes it: a run or one of its checkpoints, an import, a Hugging Face folder, or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from slmjax.config import Experiment
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import DataError, StorageError, UserError
from slmjax.models.assembly import Assembly
from slmjax.models.decoder import Decoder
from slmjax.models.encoder import CANNOT
from slmjax.nn.numerics import Numerics
from slmjax.runs import packed_folder
from slmjax.serialise import from_json
from slmjax.types import Params

EXPECTED = "expected a run folder, a checkpoint (RUN/checkpoints/STEP), a Hugging Face folder, or a .gguf file"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, and where it came from."""

    decoder: Assembly
    params: Params
    """The effective parameters of evaluation, float32, on the first device"""
    tokenizer_path: Path | None
    """A folder with tokenizer.json"""
    source: Path
    """The run, import or Hugging Face folder, or the GGUF file"""
    step: int | None = None
    """The number of optimizer updates that made the parameters; None where unknown"""
    experiment: Experiment | None = None
    """The experiment of the run; None for models that slmjax has not trained"""
    config: dict[str, Any]
    """config.json of the folder"""
    embedded: Tokenizer | None = None
    """The tokenizer inside a GGUF file"""
    packed: Mapping[str, Any] = field(default_factory=dict)
    """The codes of the parameters that the run's view rounds to a grid, by path (`compress.quant.view.Packed`); their
    values are in `params`"""

    @property
    def numerics(self) -> Numerics:
        """How the model computes (`Experiment.numerics`): as in training; the default if slmjax did not train it."""
        return Numerics() if self.experiment is None else self.experiment.numerics

    @property
    def has_tokenizer(self) -> bool:
        return self.embedded is not None or self.tokenizer_path is not None

    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            UserError: the model has none, or one of another model.
        """
        if self.embedded is None and self.tokenizer_path is None:
            raise UserError(f"{self.source} has no tokenizer.json; copy the one that the model was trained with there")
        tokenizer = self.embedded or Tokenizer.load(self.tokenizer_path or self.source)
        return fitting(tokenizer, self.decoder.vocab, self.source)


def load(path: str | Path, *, step: int | None = None, say: Callable[[str], None] = print) -> Loaded:
    """Reads a model; of a run, its newest undamaged checkpoint.

    Args:
        step: the checkpoint of a run to take, and no other.
        say: called with one line if an older checkpoint is used because a newer one is damaged.

    Raises:
        UserError: the path is none of these; the message says what is there.
        StorageError: no checkpoint, or only damaged ones.
    """
    if Path(path).suffix == ".gguf" and not Path(path).is_dir():
        return _gguf(Path(path), step)
    folder, step = _resolve(Path(path), step)
    config = _config(folder)
    tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    about = {"source": folder, "config": config, "tokenizer_path": tokenizer}
    if "model_type" in config:
        from slmjax.convert.hf import import_hf
        from slmjax.convert.memory import to_device

        if step is not None:
            raise UserError(f"{folder} is a Hugging Face folder, without checkpoints: there is no step {step} to take")
        imported = import_hf(folder)
        return Loaded(decoder=imported.decoder, params=to_device(imported.params), **about)
    if packed_folder.KEY in config:
        if step is not None:
            raise UserError(f"{folder} was written by slmjax quantize, without checkpoints: there is no step {step}")
        decoder, params, packed = packed_folder.read(folder, config)
        return Loaded(decoder=decoder, params=_on_device(params), packed=packed, **about)
    step = _good_step(folder / "checkpoints", step, say)
    if "experiment" in config:
        experiment = from_json(config["experiment"])
        params, packed = _run_params(folder / "checkpoints", step, experiment)
        return Loaded(decoder=experiment.model, params=params, packed=packed, step=step, experiment=experiment, **about)
    from slmjax.train.checkpoint_folder import restore_params

    params = restore_params(folder / "checkpoints", step)
    return Loaded(decoder=from_json(config["model"]), params=_on_device(params), **about)


def _gguf(file: Path, step: int | None) -> Loaded:
    from slmjax.convert.gguf.load import import_gguf
    from slmjax.convert.memory import to_device

    if step is not None:
        raise UserError(f"{file} is a GGUF file, without checkpoints: there is no step {step} to take")
    imported = import_gguf(file)
    return Loaded(
        decoder=imported.decoder,
        params=to_device(imported.params),
        tokenizer_path=None,
        embedded=imported.tokenizer,
        source=file,
        config={"imported": {"folder": file.name, "licence": imported.licence}},
    )


def fitting(tokenizer: Tokenizer, rows: int, source: str | Path) -> Tokenizer:
    """Checks that the tokenizer fits a model with this many rows in its table of tokens, and returns it.

    Raises:
        DataError: it has ids that the table does not have.
    """
    if tokenizer.rows > rows:
        raise DataError(
            f"{source}: the tokenizer has ids up to {tokenizer.rows - 1}, but the model has {rows} rows: they do not "
            "belong together; put the tokenizer.json that the model was trained with there"
        )
    return tokenizer


def generative(model: Assembly) -> Decoder:
    """The model, if it can continue a text.

    Raises:
        UserError: it is an encoder, or a classifier.
    """
    if not isinstance(model, Decoder):
        raise UserError(CANNOT)
    if not model.predicts_tokens:
        raise UserError(
            f"this model is a classifier ({', '.join(model.labels)}): it labels texts and cannot continue them; "
            "`slmjax eval` measures it"
        )
    return model


def _resolve(path: Path, step: int | None) -> tuple[Path, int | None]:
    """RUN/checkpoints/STEP and RUN/checkpoints -> RUN, and the step."""
    if not path.exists():
        raise UserError(f"{path}: no such folder; {EXPECTED}")
    if not path.is_dir():
        raise UserError(f"{path} is a file; {EXPECTED}")
    whole = path.absolute()
    if whole.name.isdigit() and whole.parent.name == "checkpoints":
        if step not in (None, int(whole.name)):
            raise UserError(f"{path} is the checkpoint of step {whole.name}, but step is {step}; leave out one of them")
        return path.parent.parent, int(whole.name)
    if whole.name == "checkpoints":
        return path.parent, step
    return path, step


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        inside = sorted(p.name for p in folder.iterdir())
        content = f"{', '.join(inside[:4])}{', ...' if len(inside) > 4 else ''}" if inside else "nothing"
        raise UserError(f"{folder} has no config.json (it holds {content}); {EXPECTED}")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict) or not {"experiment", "model", "model_type"} & set(config):
        raise UserError(f"{file} describes no model (no experiment, model or model_type); {EXPECTED}")
    return config


def _good_step(checkpoints: Path, wanted: int | None, say: Callable[[str], None]) -> int:
    """The newest undamaged step, or the wanted one. Damaged checkpoints are not moved: the run may be training."""
    from slmjax.train import manifest
    from slmjax.train.checkpoint_folder import newest_good, steps

    if wanted is not None:
        existing = steps(checkpoints)
        if wanted not in existing:
            raise StorageError(f"{checkpoints}: no checkpoint of step {wanted}; there are: {_list(existing)}")
        if wrong := manifest.problems(checkpoints / str(wanted)):
            hint = f"choose another step of: {_list([s for s in existing if s != wanted])}"
            raise StorageError(f"{checkpoints}: checkpoint {wanted} is damaged ({wrong[0]}); {hint}")
        return wanted
    damaged: list[str] = []
    newest = newest_good(checkpoints, lambda step, wrong: damaged.append(f"checkpoint {step} is damaged ({wrong[0]})"))
    if newest is None and damaged:
        raise StorageError(f"{checkpoints}: {damaged[0]}; none of them can be used")
    if newest is None:
        raise StorageError(f"{checkpoints}: no checkpoint yet; train on, or name another run")
    if damaged:
        say(f"{damaged[0]}; using step {newest} instead")
    return newest


def _run_params(checkpoints: Path, step: int, experiment: Experiment) -> tuple[Params, Mapping[str, Any]]:
    """The parameters that training evaluated with: after the optimizer's averaging and the view; and the codes of those
    that the view rounds."""
    from slmjax.compress.quant.view import with_values
    from slmjax.runs.build import pieces, states_of
    from slmjax.train.checkpoint_folder import restore
    from slmjax.train.state import evaluation_params

    states, parts = states_of(experiment), pieces(experiment)
    state = restore(checkpoints, step, states.abstract).state
    packed = evaluation_params(state, parts.optimizer, parts.view._replace(evaluate=parts.view.pack))
    params = states.params(state)
    return with_values(params, packed) if packed else params, packed


def _on_device(params: Params) -> Params:
    return jax.device_put(params, jax.local_devices()[0])


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
