"""Which quantized parameters of an imported model a file of another format can hold as codes.

A model that slmjax has quantized is exported with its codes or not at all. Of one that was quantized elsewhere, a
parameter whose codes the format cannot hold is written as floats, which are its exact values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from slmjax.compress.prune.layout import to_matrices
from slmjax.compress.quant.view import Packed
from slmjax.convert import pack_quantized, table
from slmjax.convert.expressed import expressed
from slmjax.convert.gguf.arch import layers_of
from slmjax.convert.gguf.carriers import carrier_of
from slmjax.convert.gguf.load import scale_name, written_as
from slmjax.convert.hf import abstract, check_embeddings, check_not_folded
from slmjax.convert.packed import PackedTensor, spread
from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.models.families.common.rows import Family
from slmjax.runs.loading import Loaded

Check = Callable[[str, Packed, Sequence[table.Entry]], None]
"""(path, its codes, the tensors of the file): raises UserError where the format cannot hold them"""
Format = Callable[[Family, Decoder], tuple[Family, Check]]
"""(family, decoder) -> the family as which the format writes it, and its check"""


def hugging_face(dtype: str) -> Format:
    """Args: dtype: of the folder, which is that of its scales."""

    def check(path: str, packed: Packed, entries: Sequence[table.Entry]) -> None:
        check_embeddings({path: packed})
        for tensor in _matrices(path, packed):
            pack_quantized.carrier(path, tensor).scales(path, tensor, dtype)

    return lambda family, decoder: (family, check)


def gguf(family: Family, decoder: Decoder) -> tuple[Family, Check]:
    """A `Format`."""
    family, architecture, config = written_as(decoder)

    def check(path: str, packed: Packed, entries: Sequence[table.Entry]) -> None:
        for tensor in _matrices(path, packed):
            if carrier_of(path, tensor).of_matrix(tensor) is not None:
                for entry in entries:
                    if path in dict(entry.parts):
                        scale_name(architecture.rename(entry.key, layers_of(config)))

    return family, check


def carried(loaded: Loaded, format: Format, say: Callable[[str], None]) -> Mapping[str, Packed]:
    """The codes to export; of a model that slmjax has quantized, all.

    Args:
        say: called with a line if parameters become floats.
    """
    if not (loaded.packed and loaded.foreign):
        return loaded.packed
    family, folded = expressed(loaded.decoder, loaded.numerics)
    family, check = format(family, folded.decoder)
    entries = table.entries(family.rows(folded.decoder), abstract(folded.decoder))
    wrong: dict[str, str] = {}
    for path, packed in loaded.packed.items():
        try:
            check_not_folded(folded, {path: packed})
            check(path, packed, entries)
        except UserError as e:
            wrong[path] = str(e)
    for entry in entries:  # a tensor is packed as a whole
        paths = [path for path, _ in entry.parts]
        reason = next((wrong[path] for path in paths if path in wrong), None)
        wrong |= {path: reason for path in paths if reason is not None and path in loaded.packed}
    if wrong:
        first, of = next(iter(wrong)), len(loaded.packed)
        reason = re.split("[:;]", wrong[first].removeprefix(f"{first}: "))[0]  # what to train otherwise is no help here
        say(f"{len(wrong)} of {of} packed parameters are written as floats, first {first}: {reason}")
    return {path: x for path, x in loaded.packed.items() if path not in wrong}


def _matrices(path: str, packed: Packed) -> list[PackedTensor]:
    """The matrices of a parameter, with codes that only say how wide they are."""
    steps = to_matrices(spread(packed, packed.codes.steps), packed.axes, path)
    zeros = None if packed.codes.zeros is None else to_matrices(spread(packed, packed.codes.zeros), packed.axes, path)
    size = packed.blocks.group or steps.shape[2]
    codes = np.broadcast_to(np.int16(packed.grid.low), steps.shape)
    return [
        PackedTensor(
            codes[i], steps[i, :, ::size], None if zeros is None else zeros[i, :, ::size].astype(np.int16), packed.grid
        )
        for i in range(len(steps))
    ]
