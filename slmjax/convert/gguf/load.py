"""GGUF files, which llama.cpp runs <-> a decoder, its parameters and its tokenizer."""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from slmjax.compress.quant.view import Packed
from slmjax.convert import coded, table
from slmjax.convert.coded import Coded, Source
from slmjax.convert.gguf import write as gguf_write
from slmjax.convert.gguf.arch import GGUFArchitecture, layers_of
from slmjax.convert.gguf.carriers import Carrier, carrier_of
from slmjax.convert.gguf.coded import read_coded
from slmjax.convert.gguf.families import architecture_named, architecture_of
from slmjax.convert.gguf.fields import HEAD, Config, repeats_embedding
from slmjax.convert.gguf.file import GGUF, named
from slmjax.convert.gguf.tokenizer import ends_of, from_gguf, to_gguf
from slmjax.convert.hf import abstract, family_of
from slmjax.convert.packed import PackedTensor, to_theirs
from slmjax.data.generation_config import GenerationConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import StorageError, UserError
from slmjax.models.decoder import Decoder
from slmjax.models.families import FAMILIES
from slmjax.models.families.common.rows import Family
from slmjax.types import Params

SCALED = r"(blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))|output)\.weight"
"""Matrices of dense models that llama.cpp multiplies by a scale of the whole matrix, after the product"""


@dataclass(frozen=True, kw_only=True)
class ImportedGGUF:
    """A model read from a GGUF file."""

    decoder: Decoder
    params: Params
    """float32, as numpy arrays; quantized ones as codes (`InMemory`), if asked for"""
    family: Family
    tokenizer: Tokenizer
    metadata: Mapping[str, Any]

    @property
    def licence(self) -> str | None:
        """The licence that the file names, if any."""
        licence = self.metadata.get("general.license")
        return licence if isinstance(licence, str) else None

    @property
    def generation(self) -> GenerationConfig:
        """What the file says of generated text: the tokens that end it, if others than the tokenizer's EOS do."""
        ends = ends_of(self.metadata)
        alone = set(ends) <= {self.tokenizer.eos_id}
        return GenerationConfig(said={} if alone else {"eos_token_id": [*ends]}, source="the GGUF file")


class Theirs(Source):
    """The tensors of a GGUF file under their `transformers` keys."""

    def __init__(self, tensors: Mapping[str, np.ndarray], architecture: GGUFArchitecture, config: Config, keys: Any):
        self.tensors, self.architecture, self.config, self.known = tensors, architecture, config, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.architecture.theirs(self.config, key, self.tensors.__getitem__)

    def coded(self, key: str) -> Coded | None:
        """As `Source`."""
        if not isinstance(self.tensors, GGUF) or re.search(self.architecture.stacked, key):
            return None
        return read_coded(self.tensors, self._name(key))

    def as_theirs(self, key: str, x: np.ndarray) -> np.ndarray:
        """As `Source`."""
        return self.architecture.theirs(self.config, key, {self._name(key): x}.__getitem__)

    def _name(self, key: str) -> str:
        return self.architecture.rename(key, layers_of(self.config))

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)

    def __contains__(self, key: object) -> bool:
        return key in self.known


def import_gguf(file: pathlib.Path, *, packed: bool = False) -> ImportedGGUF:
    """Reads a model of one of the architectures of `families.ARCHITECTURES`. Runs no code from the file.

    Args:
        packed: whether weights in packed types stay codes (`compress.quant.in_memory.InMemory`), where those are `a
            step times an integer`; else all become float32.

    Raises:
        UserError: the architecture, a key or the tokenizer is not supported.
        StorageError: the file is damaged, or its tensors do not fit its metadata.
    """
    opened = GGUF(file)
    try:
        return _import(opened, packed)
    except UserError as e:
        raise e if str(e).startswith(f"{file}: ") else type(e)(f"{file}: {e}") from e


def _import(file: GGUF, packed: bool) -> ImportedGGUF:
    architecture = architecture_named(named(file.metadata, "general.architecture"), file.metadata)
    tokenizer = from_gguf(file.metadata)
    config = architecture.config(file)
    family = next(family for family in FAMILIES if family.model_type == architecture.model_type)
    try:
        decoder = family.from_config(config)
        tree = abstract(decoder)
    except UserError as e:
        raise type(e)(str(e).removeprefix("config.json: ")) from e
    except (ValueError, TypeError, ArithmeticError, LookupError) as e:  # numbers that do not fit together
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"the keys describe no {family.name} model that can be built: {reason}") from e
    _check_tensors(file, shapes_of(architecture, config, family, decoder, tree))
    params = read_params(file, architecture, config, family, decoder, packed=packed)
    return ImportedGGUF(decoder=decoder, params=params, family=family, tokenizer=tokenizer, metadata=file.metadata)


def shapes_of(
    architecture: GGUFArchitecture, config: Config, family: Family, decoder: Decoder, params: Any
) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape, in the order in which tensors are written; computes no tensor."""
    return {name: x.shape for name, x in architecture.tensors(config, iter(_blank(family, decoder, params).items()))}


def read_params(
    tensors: Mapping[str, np.ndarray], architecture: GGUFArchitecture, config: Config, family: Family, decoder: Decoder,
    *, packed: bool = False,
) -> Params:  # fmt: skip
    """The parameters in a file whose tensors have been checked to fit the decoder. `packed`: as `import_gguf`."""
    tree = abstract(decoder)
    blank = _blank(family, decoder, tree)
    theirs = Theirs(tensors, architecture, config, blank)
    if packed:
        shapes = {key: x.shape for key, x in blank.items()}
        return coded.to_ours(family.rows(decoder), theirs, tree, decoder.axes(), shapes)
    return table.to_ours(family.rows(decoder), theirs, tree)


def write_gguf(
    file: pathlib.Path,
    decoder: Decoder,
    params: Params,
    *,
    tokenizer: Tokenizer,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    packed: Mapping[str, Packed] | None = None,
    ends: Sequence[int] = (),
) -> tuple[GGUFArchitecture, dict[str, Any]]:
    """Writes a file. `gguf/export.py`'s `export_gguf` does so atomically and checks the result.

    Args:
        about: more metadata, such as general.name.
        packed: {path: codes} of quantized parameters, whose values `params` holds. They are written in a packed type
            that holds them exactly; `dtype` is that of the others.
        ends: tokens that end a text, besides the tokenizer's EOS and the end of a turn.

    Returns:
        The architecture and the config.json from which the file was written.

    Raises:
        UserError: llama.cpp cannot compute the model or tokenize like its tokenizer, a value is not finite, or no
            packed type holds a quantized tensor.
        StorageError: the disk is full or not writable.
    """
    family, architecture, config = written_as(decoder)
    metadata = {**(about or {}), **architecture.keys(config), **to_gguf(tokenizer, decoder.vocab, ends)}

    def tensors() -> Iterator[tuple[str, np.ndarray | PackedTensor]]:
        return written(architecture, config, family, decoder, params, packed)

    carriers: dict[str, Carrier] = {}
    scales: dict[str, np.ndarray] = {}
    for name, x in tensors() if packed else ():
        if isinstance(x, PackedTensor):
            carriers[name] = carrier_of(name, x)
            if (scale := carriers[name].of_matrix(x)) is not None:
                scales[scale_name(name)] = scale
    shapes = shapes_of(architecture, config, family, decoder, params) | {name: x.shape for name, x in scales.items()}
    gguf_write.write(
        file, architecture.name, metadata, shapes, lambda: itertools.chain(tensors(), scales.items()), dtype, carriers
    )
    return architecture, config


def scale_name(name: str) -> str:
    """The name of the tensor with the scale of a whole matrix.

    Raises:
        UserError: llama.cpp reads none for this matrix.
    """
    if not re.fullmatch(SCALED, name):
        raise UserError(
            f"{name} is quantized to NVFP4, but llama.cpp has no scale for this whole matrix: quantize it to MXFP4(), "
            "or leave it out of the quantization rules"
        )
    return f"{name.removesuffix('.weight')}.scale"


def written(
    architecture: GGUFArchitecture, config: Config, family: Family, decoder: Decoder, params: Params,
    packed: Mapping[str, Packed] | None,
) -> Iterator[tuple[str, np.ndarray | PackedTensor]]:  # fmt: skip
    """The tensors of a file, one at a time: those of quantized parameters packed."""
    if packed:
        return to_theirs(family.rows(decoder), params, packed, functools.partial(architecture.tensors, config))
    return architecture.tensors(config, table.to_theirs(family.rows(decoder), params))


def written_as(decoder: Decoder) -> tuple[Family, GGUFArchitecture, dict[str, Any]]:
    """The first class of transformers that computes this decoder and that llama.cpp supports, with its config.json.

    Raises:
        UserError: there is none; the message says why the first class is not supported.
    """
    refused = None
    for family in FAMILIES:
        config = family.to_config(decoder) if isinstance(decoder, family.kind) else None
        if config is None:
            continue
        config = {"seq_length": decoder.context, **config}
        try:
            architecture = architecture_of(family.model_type)
            architecture.keys(config)
            return family, architecture, config
        except UserError as e:
            refused = refused or e
    family_of(decoder)  # raises, and says why, if no class of transformers fits
    raise refused or UserError("scalars of this model have to be folded into its weights first (convert/fold.py)")


def _blank(family: Family, decoder: Decoder, params: Any) -> dict[str, np.ndarray]:
    """Keys of transformers, each with a tensor of zeros of its shape that takes no memory."""
    empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params)
    return dict(table.to_theirs(family.rows(decoder), empty))


def _check_tensors(file: GGUF, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks, before anything is unpacked, that the file has exactly the expected tensors, with the expected shapes."""
    for name, shape in expected.items():
        if name not in file.infos:
            raise StorageError(f"{file.file}: tensor {name!r} of shape {list(shape)} is missing")
        if file.infos[name].shape != shape:
            found = list(file.infos[name].shape)
            raise StorageError(f"{file.file}: tensor {name!r} has shape {found}; expected {list(shape)}")
    for name in file.infos:
        if name not in expected and not (name == HEAD and repeats_embedding(file)):
            raise StorageError(f"{file.file}: tensor {name[:120]!r} has no place in this model")
