"""`export_hf`: write, read back, compare, and only then give the folder its name."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from slmjax import __version__
from slmjax.compress.quant.view import Packed
from slmjax.convert import gate, gate_stock, memory
from slmjax.convert.card import Facts, render
from slmjax.convert.expressed import NUMERICS, expressed
from slmjax.convert.folder import MARK, Rejected, publish
from slmjax.convert.gate_loss import Texts, default_texts
from slmjax.convert.hf import NOT_QUANTIZED, check_not_folded, import_hf, pad_id, write_hf
from slmjax.convert.quantized_size import measure
from slmjax.convert.safetensors_io import SHARD_BYTES
from slmjax.convert.tokenizer_files import PROBES
from slmjax.data.generation_config import NOTHING_SAID, GenerationConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.models.assembly import Assembly
from slmjax.models.flops import parameter_count
from slmjax.nn.numerics import Numerics
from slmjax.types import Params

TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want
of a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this
truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property of
some one or other of their daughters."""  # Jane Austen, Pride and Prejudice, 1813; public domain


class Exported(NamedTuple):
    """The result of an export."""

    folder: pathlib.Path
    checks: list[gate.Check]
    folded: tuple[str, ...] = ()
    """Scalars that were multiplied into the weights because the transformers class has no such field:
    "embed_scale = 12.0" """


def export_hf(
    decoder: Assembly,
    params: Params,
    out: pathlib.Path,
    *,
    dtype: str = "float32",
    numerics: Numerics = NUMERICS,
    tokenizer: Tokenizer | None = None,
    facts: Facts | None = None,
    tokens: np.ndarray | None = None,
    overwrite: bool = False,
    reference_python: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    donate: bool = False,
    packed: Mapping[str, Packed] = NOT_QUANTIZED,
    scored: Texts | None = None,
    generation: GenerationConfig = NOTHING_SAID,
) -> Exported:
    """Writes a Hugging Face folder and checks that it computes the same logits as the model.

    The folder appears under its name only when every check has passed; slmjax_export.json in it lists the checks.
    Scalars of the decoder that no class of transformers has (muP, Granite, MiniCPM) are multiplied into the weights;
    the logits of the model before and after that are compared first.

    Args:
        params: float32 parameters as evaluation uses them (averaged, if the optimizer averages).
        dtype: of the weights in the file, and of the scales of quantized ones: "float32", "float16" or "bfloat16".
        numerics: the numerics that the model was trained with; only the default can be exported.
        facts: for the model card; sizes of the model are filled in here.
        tokens: int [B, T] to compare logits on, B >= 2; by default a passage of text, or random without a tokenizer.
        overwrite: replace a folder that an earlier export wrote.
        reference_python: a Python with torch and transformers; see `gate.find_python`.
        shard_bytes: maximum bytes of weights in one file.
        donate: delete `params` once they are written and compared, so that memory never holds the model twice.
        packed: the codes of quantized parameters by path (`ParamView.pack`), whose values are in `params`. They are
            stored as codes, in the format `pack-quantized` of compressed-tensors.
        scored: token ids of texts on which the loss of transformers is compared; by default a passage of text.
        generation: what the model's folder says of generated text; it is written back.

    Raises:
        UserError: no class of transformers fits, `out` may not be written, a parameter is not finite, or a quantized
            one cannot be stored exactly.
        Rejected: a check failed; the folder is kept under a name ending in `.failed`.
        StorageError: the disk is full or not writable; `out` is as it was.
    """
    family, folded = expressed(decoder, numerics)
    check_not_folded(folded, packed)
    python = gate.find_python(reference_python)
    scored = default_texts(decoder, tokenizer, TEXT) if scored is None else scored
    tokens = probe_tokens(tokenizer, decoder.vocab) if tokens is None else tokens
    stock = family.stock(decoder)
    pad = pad_id(tokenizer, generation) if stock.last else None  # transformers finds the end of a text by this id
    probe = gate.make_probe(tokens, decoder.context, pads=stock.pads, pad=pad)
    facts = facts or Facts(name=out.name)
    facts = replace(
        facts,
        family=family.name,
        parameters=parameter_count(decoder),
        context=decoder.context,
        vocab=decoder.vocab,
        dtype=dtype,
        tokenizer=tokenizer is not None,
        folded=folded.scalars,
        labels=decoder.labels,
        version=__version__,
    )
    checks = []
    if folded.scalars:
        weights = folded.apply(params)
        checks.append(gate.check_fold((decoder, params), (folded.decoder, weights), probe))
        decoder, params = folded.decoder, weights
    with publish(out, overwrite=overwrite) as folder:
        stored = write_hf(
            folder,
            decoder,
            params,
            dtype=dtype,
            tokenizer=tokenizer,
            shard_bytes=shard_bytes,
            packed=packed,
            generation=generation,
        )
        sizes = measure(folder, stored, dtype) if packed else None
        facts = replace(facts, quantized=sizes.lines() if sizes else ())
        (folder / "README.md").write_text(render(facts), "utf-8")
        before = gate.remember(decoder, params, dtype, probe, donate=donate, packed=packed)
        try:
            imported = import_hf(folder)
        except Exception as e:
            raise Rejected(f"the export cannot be read back: {e}") from e
        imported = replace(imported, params=memory.to_device(imported.params))
        checks += gate.check_reload(before, imported, probe)
        checks += [sizes.check()] if sizes else []
        checks += gate_stock.check_stock(imported, folder, python, probe, tokenizer, scored)
        record = {"slmjax": __version__, "dtype": dtype, "folded": list(folded.scalars)}
        record |= {"quantized": sizes.json()} if sizes else {}
        record["checks"] = [check.json() for check in checks]
        (folder / MARK).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        gate.demand(checks)
    return Exported(out, checks, folded.scalars)


def probe_tokens(tokenizer: Tokenizer | None, vocab: int) -> np.ndarray:
    """int32 [2, T]: a passage of prose, and text that is hard to encode. Random ids where there is no tokenizer."""
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, vocab, (2, 64), dtype=np.int32)
    rows = [tokenizer.encode(text, bos=True) for text in (TEXT, " ".join(PROBES) + TEXT)]
    length = min(map(len, rows))
    return np.array([row[:length] for row in rows], np.int32)
