"""MODEL, as every verb takes it: a run or one of its checkpoints, an import, a Hugging Face folder, or a GGUF file."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from slmjax.compress.quant.into_memory import floats, held, packed_in, with_codes
from slmjax.compress.quant.view import Packed
from slmjax.config import Experiment
from slmjax.convert.memory import to_device
from slmjax.data import generation_config
from slmjax.data.generation_config import GenerationConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import DataError, StorageError, UserError
from slmjax.files import at
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
    weights: Params
    """The effective parameters of evaluation, on the first device: float32, those that are rounded to a grid as codes
    (`compress.quant.in_memory.InMemory`), with which a model computes as with arrays"""
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
    told: GenerationConfig | None = None
    """What a GGUF file says of generated text"""

    @functools.cached_property
    def params(self) -> Params:
        """`weights` as float32 arrays."""
        return floats(self.weights)

    @functools.cached_property
    def packed(self) -> Mapping[str, Packed]:
        """The codes of the parameters that are rounded to a grid, by path."""
        return packed_in(self.weights)

    @property
    def numerics(self) -> Numerics:
        """How the model computes (`Experiment.numerics`): as in training; the default if slmjax did not train it."""
        return Numerics() if self.experiment is None else self.experiment.numerics

    @property
    def foreign(self) -> bool:
        """Whether slmjax has neither trained nor quantized it: then its codes stand for weights like any others."""
        return self.experiment is None and "quantized" not in self.config

    @property
    def has_tokenizer(self) -> bool:
        return self.embedded is not None or self.tokenizer_path is not None

    @functools.cached_property
    def generation(self) -> GenerationConfig:
        """What the folder says of text generated from the model.

        Raises:
            UserError: its generation_config.json has a value that cannot be.
        """
        return self.told or generation_config.read(self.source, self.config)

    def save_texts(self, folder: Path) -> None:
        """Writes what turns text into tokens and back, so that `folder` generates as this model does: the tokenizer, if
        there is one, and generation_config.json, if it says anything."""
        self.generation.save(folder)
        if self.has_tokenizer:
            self.tokenizer().save(folder)

    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            UserError: the model has none, or one of another model.
        """
        if self.embedded is None and self.tokenizer_path is None:
            raise UserError(f"{self.source} has no tokenizer.json; copy the one that the model was trained with there")
        tokenizer = self.embedded or Tokenizer.load(self.tokenizer_path or self.source)
        return fitting(tokenizer, self.decoder.vocab, self.source)


PART = "part"
"""Key of config.json in folders that hold some of a model's parameters alone: what they are, for messages"""


def load(
    path: str | Path, *, step: int | None = None, say: Callable[[str], None] = print, part: bool = False
) -> Loaded:
    """Reads a model; of a run, its newest undamaged checkpoint.

    Args:
        step: the checkpoint of a run to take, and no other.
        say: called with one line if an older checkpoint is used because a newer one is damaged.
        part: whether a folder with some of a model's parameters alone will do.

    Raises:
        UserError: the path is none of these; the message says what is there.
        StorageError: no checkpoint, or only damaged ones.
    """
    place = at(path)
    if place.suffix == ".gguf" and not place.is_dir():
        return _gguf(place, step)
    folder, step = _resolve(place, step)
    config = _config(folder)
    tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    if PART in config and not part:
        raise UserError(f"{path} holds {config[PART]} alone, which is no model by itself; name the whole model")
    about = {"source": folder, "config": config, "tokenizer_path": tokenizer}
    if "model_type" in config:
        from slmjax.convert.hf import import_hf

        if step is not None:
            raise UserError(f"{folder} is a Hugging Face folder, without checkpoints: there is no step {step} to take")
        imported = import_hf(folder, packed=True)
        return Loaded(decoder=imported.decoder, weights=to_device(held(imported.params)), **about)
    if packed_folder.KEY in config:
        if step is not None:
            raise UserError(f"{folder} holds packed weights, without checkpoints: there is no step {step} to take")
        decoder, params = packed_folder.read(folder, config)
        return Loaded(decoder=decoder, weights=to_device(held(params)), **about)
    step = _good_step(folder / "checkpoints", step, say)
    if "experiment" in config:
        experiment = from_json(config["experiment"])
        weights = _run_weights(folder / "checkpoints", step, experiment)
        return Loaded(decoder=experiment.model, weights=weights, step=step, experiment=experiment, **about)
    from slmjax.train.checkpoint_folder import restore_params

    params = restore_params(folder / "checkpoints", step)
    return Loaded(decoder=from_json(config["model"]), weights=_on_device(params), **about)


def _gguf(file: Path, step: int | None) -> Loaded:
    from slmjax.convert.gguf.load import import_gguf

    if step is not None:
        raise UserError(f"{file} is a GGUF file, without checkpoints: there is no step {step} to take")
    imported = import_gguf(file, packed=True)
    return Loaded(
        decoder=imported.decoder,
        weights=to_device(held(imported.params)),
        tokenizer_path=None,
        embedded=imported.tokenizer,
        told=imported.generation,
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


def _run_weights(checkpoints: Path, step: int, experiment: Experiment) -> Params:
    """The parameters that training evaluated with, after the optimizer's averaging and the view; those that the view
    rounds as codes."""
    from slmjax.runs.build import pieces, states_of
    from slmjax.train.checkpoint_folder import restore
    from slmjax.train.state import evaluation_params

    states, parts = states_of(experiment), pieces(experiment)
    state = restore(checkpoints, step, states.abstract).state
    packed = evaluation_params(state, parts.optimizer, parts.view._replace(evaluate=parts.view.pack))
    params = states.params(state)
    return held(with_codes(params, packed)) if packed else params


def _on_device(params: Params) -> Params:
    return jax.device_put(params, jax.local_devices()[0])


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
