"""Hugging Face folders: config.json, safetensors and tokenizer files <-> a decoder and its parameters."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax

from slmjax.compress.quant.view import Packed
from slmjax.convert import coded, table
from slmjax.convert.expressed import expressed
from slmjax.convert.fold import Folded
from slmjax.convert.pack_float4 import GLOBAL
from slmjax.convert.pack_quantized import Stored, Writing
from slmjax.convert.safetensors_io import SHARD_BYTES, Tensors, unique, write
from slmjax.convert.selection import select
from slmjax.convert.tokenizer_files import write_tokenizer
from slmjax.convert.unpack_quantized import Unpacked
from slmjax.data import chat
from slmjax.data.generation_config import FILE, NOTHING_SAID, GenerationConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import StorageError, UserError
from slmjax.models.assembly import Assembly, is_declared
from slmjax.models.families import FAMILIES
from slmjax.models.families.common.rows import Family
from slmjax.types import Params

CONFIG_BYTES = 2**24
LAYERS = ("num_hidden_layers", "n_layer", "num_transformer_layers", "num_feedforward_networks")
WIDTHS = (
    "vocab_size", "hidden_size", "n_embd", "n_embed", "model_dim", "intermediate_size", "n_inner", "ffn_dim",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "word_embed_proj_dim",
    "conv_L_cache", "embedding_size", "intra_bottleneck_size",
)  # fmt: skip
"""Fields of config.json that are dimensions of weights"""
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")
NOT_QUANTIZED: Mapping[str, Packed] = MappingProxyType({})
BASES = ("rope_theta", "rope_local_base_freq", "rotary_emb_base")
"""Fields that may be integers larger than any dimension"""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model read from a Hugging Face folder."""

    decoder: Assembly
    params: Params
    """float32, as numpy arrays; quantized ones as codes (`InMemory`), if asked for"""
    family: Family
    tokenizer_path: pathlib.Path | None
    """The folder, if it has a tokenizer.json"""
    config: Mapping[str, Any]
    """The contents of config.json"""


def family_of(decoder: Assembly) -> Family:
    """The class of `transformers` that computes the same function, if need be with scalars folded into the weights.

    Raises:
        UserError: there is no such class.
    """
    return expressed(decoder).family


def abstract(decoder: Assembly) -> Params:
    """The parameter tree with jax.ShapeDtypeStruct leaves."""
    return jax.tree.map(lambda p: p.value, decoder.declared(), is_leaf=is_declared)


def write_hf(
    folder: pathlib.Path,
    decoder: Assembly,
    params: Params,
    *,
    dtype: str = "float32",
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    family: Family | None = None,
    packed: Mapping[str, Packed] = NOT_QUANTIZED,
    generation: GenerationConfig = NOTHING_SAID,
) -> Mapping[str, Stored]:
    """Writes weights, config.json, generation_config.json and tokenizer files into an existing folder.

    `export.export_hf` writes atomically and checks the result; this function only writes. `family` chooses among
    classes that compute the same; None: the first of `FAMILIES` that does, with scalars it lacks folded into the
    weights where that is exact (`fold.py`). `packed` holds the codes of quantized parameters, by path
    (`ParamView.pack`): they are written as codes (`pack_quantized.py`). `generation`: what the model's folder says of
    generated text; it comes before what the tokenizer says.

    Returns:
        How each quantized matrix is stored, by the name of its module.

    Raises:
        UserError: no class of transformers fits, a parameter is not finite, the tokenizer has too many ids, or a
            quantized parameter cannot be stored exactly.
        StorageError: the disk is full or not writable.
    """
    if family is None:
        family, folded = expressed(decoder)
        check_not_folded(folded, packed)
        decoder, params = folded.decoder, folded.apply(params)
    # without a tokenizer the ids stay unset: the defaults of a class (1 and 2 for Llama) would be made up
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stock = family.stock(decoder)
    if stock.last:
        ids["pad_token_id"] = pad_id(tokenizer, generation)
    if tokenizer is not None:
        ids |= write_tokenizer(
            folder,
            tokenizer,
            context=decoder.context,
            vocab=decoder.vocab,
            pads=stock.pads,
            closes=stock.closes,
            pad=generation.ids.get("pad_token_id", generation.said.get("pad_token_id")),
        )
    ids, text = generation.with_ids(ids)
    if tokenizer is not None and "eos_token_id" not in generation.said and (turn := chat.ends(tokenizer)):
        text["eos_token_id"] = [*([] if tokenizer.eos_id is None else [tokenizer.eos_id]), *turn]
    config = {**(family.to_config(decoder) or {}), "dtype": dtype, **ids}
    stored: Mapping[str, Stored] = {}
    if packed:
        check_embeddings(packed)
        tensors = Writing(family.rows(decoder), params, packed, dtype)
        write(folder, tensors, dtype=dtype, shard_bytes=shard_bytes, unrounded=(GLOBAL,))
        config["quantization_config"], stored = tensors.config(), tensors.stored
    else:
        write(folder, table.to_theirs(family.rows(decoder), params), dtype=dtype, shard_bytes=shard_bytes)
    _write_json(folder / "config.json", config)
    if stock.generates:
        _write_json(folder / FILE, text)
    return stored


def check_not_folded(folded: Folded, packed: Mapping[str, Packed]) -> None:
    """
    Raises:
        UserError: a quantized parameter would be multiplied by a scalar, which its codes and scales cannot follow.
    """
    if changed := [step.path for step in folded.steps if step.path in packed]:
        raise UserError(
            f"{changed[0]} is quantized, and {', '.join(folded.scalars)} would be multiplied into the weights because "
            "no class of transformers has such a field: leave that parameter out of the quantization rules"
        )


def check_embeddings(packed: Mapping[str, Packed]) -> None:
    """
    Raises:
        UserError: an embedding is quantized. compressed-tensors packs it, but transformers 5.23 fails to load it: it
            gives an embedding its initial values first, and a packed one has none.
    """
    if tables := [path for path in packed if path.startswith("embed/")]:
        raise UserError(
            f"{tables[0]} is quantized, but stock transformers cannot load a packed embedding: leave it out of the "
            "quantization rules (unembed/table of a model with tied=False may be quantized), or export GGUF"
        )


def pad_id(tokenizer: Tokenizer | None, generation: GenerationConfig = NOTHING_SAID) -> int:
    """The padding id written to an export: what the model's folder says, else EOS, else BOS, or 0 without a tokenizer.
    A classifier needs one to find the last token of a text."""
    ids = (generation.ids.get("pad_token_id"), *((tokenizer.eos_id, tokenizer.bos_id) if tokenizer else ()))
    return next((i for i in ids if i is not None), 0)


def import_hf(folder: pathlib.Path, *, packed: bool = False) -> Imported:
    """Reads a folder saved by `transformers` or `export`. Runs no code from it.

    Args:
        packed: whether weights that compressed-tensors has packed (integers, MXFP4, NVFP4) stay codes
            (`compress.quant.in_memory.InMemory`); else they become the values.

    Raises:
        UserError: it holds no model or only a pickle, or its model type, one of its fields or its quantization is not
            supported.
        StorageError: a file is missing, damaged, or does not fit the configuration.
    """
    config = read_config(folder)
    families = {family.model_type: family for family in FAMILIES if family.model_type}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        raise UserError(
            f"{folder}/config.json: model_type = {kind!r} is not supported; there are {', '.join(families)}"
        )
    family = families[kind]
    tensors = Tensors(folder)
    described = {name: value for name, value in config.items() if name != "quantization_config"}
    if quantization := config.get("quantization_config"):
        try:
            tensors = Unpacked(tensors, quantization)
        except (UserError, StorageError) as e:
            raise type(e)(f"{folder}: {e}") from e
    _check_sizes(folder / "config.json", described, tensors)
    decoder, tree = _described(folder / "config.json", family, described)
    try:
        chosen = select(tensors, family)
        rows = family.rows(decoder)
        if packed and quantization:
            params = coded.to_ours(rows, chosen, tree, decoder.axes(), chosen.shapes)
        else:
            params = table.to_ours(rows, chosen, tree, chosen.shapes)
    except StorageError as e:
        raise StorageError(f"{folder}: {e}") from e
    tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    return Imported(decoder=decoder, params=params, family=family, tokenizer_path=tokenizer, config=config)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no config.json; expected a folder written by save_pretrained or export")
    try:
        if file.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes, more than any configuration")
        config = json.loads(file.read_text("utf-8"), object_pairs_hook=unique, parse_constant=_not_json)
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} is not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}; expected an object")
    return config


def _described(file: pathlib.Path, family: Family, config: Mapping[str, Any]) -> tuple[Assembly, Params]:
    """The decoder that a config.json describes, and its abstract parameters."""
    try:
        decoder = family.from_config(config)
        return decoder, abstract(decoder)
    except UserError as e:
        raise type(e)(str(e) if str(e).startswith("config.json: ") else f"{file}: {e}") from e
    except (ValueError, TypeError, ArithmeticError, LookupError) as e:  # numbers that do not fit together
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"{file} describes no {family.name} model that can be built: {reason}") from e


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _check_sizes(file: pathlib.Path, config: Mapping[str, Any], tensors: Tensors | Unpacked) -> None:
    """Refuses sizes that do not fit the weights, before anything of such a size is allocated."""
    weights = sum(math.prod(shape) for shape in tensors.shapes.values())
    positive = (*LAYERS, *WIDTHS, *CONTEXTS)
    for key in (key for key, value in config.items() if isinstance(value, int) and key not in BASES):
        most, what = 2**31 - 1, "numbers of an int32 position"
        if key in LAYERS:
            most, what = len(tensors), "tensors in the file"
        elif key in WIDTHS:
            most, what = weights, "weights in the file"
        if config[key] > most or (key in positive and config[key] < 1):
            raise StorageError(f"{file}: {key} = {config[key]} is impossible: there are {most} {what}")


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
