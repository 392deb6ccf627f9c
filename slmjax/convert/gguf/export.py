"""`export_gguf`: write, read back, compare, run with llama.cpp, and only then give the file its name."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from slmjax import __version__
from slmjax.compress.quant.view import Packed
from slmjax.convert import gate, memory
from slmjax.convert.card import Facts
from slmjax.convert.export import TEXT, probe_tokens
from slmjax.convert.expressed import NUMERICS, expressed
from slmjax.convert.folder import Rejected, remove_abandoned
from slmjax.convert.gate_loss import Texts, default_texts
from slmjax.convert.gguf import gate as gguf_gate
from slmjax.convert.gguf.activations import rounding
from slmjax.convert.gguf.file import GGUF
from slmjax.convert.gguf.load import read_params, write_gguf, written, written_as
from slmjax.convert.gguf.tokenizer import ends_of
from slmjax.data.generation_config import NOTHING_SAID, GenerationConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import StorageError, UserError
from slmjax.models.decoder import Decoder
from slmjax.nn.numerics import Numerics
from slmjax.tree import flatten
from slmjax.types import Params


class ExportedGGUF(NamedTuple):
    """The result of an export."""

    file: pathlib.Path
    checks: list[gate.Check]
    folded: tuple[str, ...] = ()
    """Scalars that were multiplied into the weights: "embed_scale = 12.0" """
    ends_left_out: tuple[int, ...] = ()
    """Tokens that end a text, for which the file has no room: it holds three"""


def export_gguf(
    decoder: Decoder,
    params: Params,
    out: pathlib.Path,
    *,
    tokenizer: Tokenizer,
    dtype: str = "float32",
    packed: Mapping[str, Packed] | None = None,
    numerics: Numerics = NUMERICS,
    facts: Facts | None = None,
    overwrite: bool = False,
    reference_python: str | None = None,
    donate: bool = False,
    scored: Texts | None = None,
    generation: GenerationConfig = NOTHING_SAID,
) -> ExportedGGUF:
    """Writes a GGUF file that llama.cpp runs; it appears under its name only when every check has passed.

    Args:
        params: float32 parameters as evaluation uses them (averaged, if the optimizer averages).
        dtype: of the matrices: "float32", "float16", "bfloat16" or "q8_0" (8 bits, a scale for each 32). Vectors and
            norms stay float32.
        packed: {path: codes} of quantized parameters (`ParamView.pack`), whose values `params` holds. They are written
            in the smallest packed type of llama.cpp that holds them exactly; `dtype` is that of the other matrices.
        numerics: the numerics that the model was trained with; only the default can be exported.
        facts: its name and licence are written into the file.
        overwrite: replace a GGUF file.
        reference_python: a Python with xllamacpp; see `gate.find_python`.
        donate: delete `params` once they are written and compared, so that memory never holds the model twice.
        scored: token ids of texts on which the loss of llama.cpp is compared; by default a passage of text.
        generation: what the model's folder says of generated text: the tokens that end it, of which a file holds three.

    Raises:
        UserError: llama.cpp cannot compute the model, has no such tokenizer or no type that holds a quantized tensor,
            or `out` may not be written.
        Rejected: a check failed; the file is kept under a name ending in `.failed`.
        StorageError: the disk is full or not writable; `out` is as it was.
    """
    if decoder.labels:
        raise UserError("--format gguf: a GGUF file cannot hold a classifier; export it with --format hf")
    python = gate.find_python(reference_python, "xllamacpp")
    scored = default_texts(decoder, tokenizer, TEXT) if scored is None else scored
    probe = gate.make_probe(probe_tokens(tokenizer, decoder.vocab), decoder.context)
    about: dict[str, Any] = {"slmjax.version": __version__, "general.name": (facts and facts.name) or out.stem}
    if facts is not None and facts.licence:
        about["general.license"] = facts.licence
    folded = expressed(decoder, numerics).folded
    first = []
    if folded.scalars:
        weights = folded.apply(params)
        first.append(gate.check_fold((decoder, params), (folded.decoder, weights), probe))
        decoder, params = folded.decoder, weights
    check_same(params, packed or {})
    family = written_as(decoder)[0]
    with publish_file(out, overwrite=overwrite) as file:
        architecture, config = write_gguf(
            file, decoder, params, tokenizer=tokenizer, dtype=dtype, about=about, packed=packed, ends=generation.ends
        )
        try:
            opened = GGUF(file)
        except StorageError as e:
            raise Rejected(f"the export cannot be read back: {e}") from e
        wanted = written(architecture, config, family, decoder, params, packed)
        checks = [*first, gguf_gate.check_tensors(opened, wanted, dtype)]
        gate.demand(checks)
        if packed:
            checks.append(gguf_gate.check_sizes(opened))
        ours = gate.forward(decoder, params, probe)
        if donate:
            memory.delete(params)
        stored = memory.to_device(read_params(opened, architecture, config, family, decoder))
        theirs = gate.forward(decoder, stored, probe)
        if dtype == "float32":
            checks.append(gate.compare("reload: logits", ours, theirs, probe))
        else:
            checks.append(gguf_gate.check_rounding(ours, theirs, probe))
        limit = gguf_gate.limit_of(dtype, architecture.drift, quantized=bool(packed))
        alike = rounding(packed, dtype) if packed else None
        checks += gguf_gate.check_llama_cpp(file, decoder, stored, python, probe, tokenizer, limit, alike, scored)
        gate.demand(checks)
    left_out = tuple(i for i in generation.ends if i not in ends_of(opened.metadata))
    return ExportedGGUF(out, checks, folded.scalars, left_out)


def check_same(params: Params, packed: Mapping[str, Packed]) -> None:
    """
    Raises:
        UserError: a quantized parameter is not what its codes say.
    """
    flat = flatten(params)
    for path, codes in packed.items():
        if path not in flat or not np.array_equal(np.asarray(flat[path]), codes.values()):
            raise UserError(
                f"{path} does not have the values of its codes: a factor of the model was multiplied into it, which "
                "llama.cpp does not have; leave it unquantized, or train without the factor"
            )


@contextlib.contextmanager
def publish_file(out: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """Context manager: yields the path of a new file beside `out`, renamed to `out` when the block ends without an
    error. Compare `folder.publish`.

    Raises:
        UserError: `out` exists and may not be replaced.
        StorageError: the disk is full or not writable.
    """
    out = out.absolute()
    check_file_free(out, overwrite=overwrite)
    partial = out.with_name(f".{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        yield partial
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        check_file_free(out, overwrite=overwrite)
        partial.replace(out)
    except Rejected as e:
        failed = out.with_name(f"{out.name}.failed")
        if partial.exists():
            partial.replace(failed)
        raise Rejected(f"{e}; what was written is kept in {failed}") from e
    except OSError as e:
        raise StorageError(f"cannot write {out}: {e.strerror or e}; nothing was changed there") from e
    finally:
        partial.unlink(missing_ok=True)


def check_file_free(out: pathlib.Path, *, overwrite: bool) -> None:
    """Raises UserError unless a GGUF file may be written to `out`."""
    if not out.exists():
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; expected the name of a file such as {out / 'model.gguf'}")
    if not overwrite:
        raise UserError(f"--out {out} already exists; choose another name or add --overwrite")
    with out.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise UserError(f"--out {out} is not a GGUF file, so it is not replaced")
