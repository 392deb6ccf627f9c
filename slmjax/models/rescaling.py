"""Factors on channels inside a layer that cancel out: a matrix reads its input times s, what produces the input is
divided by s, and the model computes what it did before.

This holds where the input passes to those matrices alone, and what produces it is linear in parameters of its own: the
gain of a norm before them, or the rows of another matrix with only linear steps between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from slmjax.nn.attention import Attention, SharedAttention
from slmjax.nn.block import AnyBlock, Block, NormedStream, Parallel, ParallelShared, PostBranch, PostNorm, Sandwich
from slmjax.nn.mlp import MLP, GatedMLP, relu
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.parts import FeedForward, Mixer
from slmjax.nn.short_conv import ShortConv


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Where a layer can exchange factors. Paths are those inside the layer."""

    source: str
    """What produces the channels: a norm (`attn_norm`), or a matrix (`mlp/up`) by its output channels"""
    readers: tuple[str, ...]
    """The matrices that read them, all there are"""
    norm: bool = True
    """Whether `source` is a norm"""
    offset: float = 0.0
    """`RMSNorm.offset`"""
    copies: int = 1
    """Query heads that read one head of values: their channels share factors"""
    run: int = 1
    """Channels of a head of values, which are copied together"""

    def spread(self, factors: np.ndarray) -> np.ndarray:
        """Of the channels of the source [C] -> of the channels that are read [C * copies]."""
        return np.repeat(factors.reshape(-1, 1, self.run), self.copies, axis=1).reshape(-1)

    def gathered(self, sizes: np.ndarray) -> np.ndarray:
        """The mean over the copies: channels that are read [C * copies] -> those of the source [C]."""
        return sizes.reshape(-1, self.copies, self.run).mean(axis=1).reshape(-1)

    def apply(self, params: Mapping[str, np.ndarray], factors: np.ndarray) -> dict[str, np.ndarray]:
        """Those parameters of a layer that change, by path.

        Args:
            params: of the layer; their first dimensions are those of the input, their last those of the output.
            factors: s of the source's channels [C], positive: the readers are multiplied by it.
        """
        names = [f"{self.source}/scale", f"{self.source}/bias"] if self.norm else [self.source, f"{self.source}_bias"]
        changed = {}
        for name in (name for name in names if name in params):
            offset = np.float32(self.offset if name.endswith("/scale") else 0.0)
            x = params[name]
            divided = (x.reshape(-1, len(factors)) + offset) / factors - offset
            changed[name] = divided.reshape(x.shape).astype(x.dtype)
        spread = self.spread(factors)[:, None]
        for name in self.readers:
            x = params[name]
            changed[name] = (x.reshape(len(spread), -1) * spread).reshape(x.shape).astype(x.dtype)
        return changed


READS: Mapping[type, tuple[str, ...]] = {
    Attention: ("q", "k", "v"),
    SharedAttention: ("q",),
    ShortConv: ("b", "c", "x"),
    MLP: ("up",),
    GatedMLP: ("gate", "up"),
}
"""The matrices that read the input of a part, which reads it in no other way"""


def exchanges(block: AnyBlock) -> tuple[Exchange, ...]:
    """Where this kind of layer can exchange factors; parts of a kind that is not known here have no such place.

    A norm whose output is also added to the residual stream (`PostNorm`, `NormedStream`) cannot take part, nor values
    that later layers use, too, nor the up projection of an MLP whose activation is not linear in positive factors, as
    ReLU is.
    """
    known = (Block, Sandwich, Parallel, ParallelShared, PostBranch, PostNorm, NormedStream)
    if type(block) not in known:
        return ()
    return (*_of_norms(block), *_of_mixer(block.mixer, block.mixer.label), *_of_mlp(block.mlp))


def _of_norms(block: AnyBlock) -> list[Exchange]:
    norm, before = block.norm, f"{block.mixer.label}_norm"
    if not (type(norm) is RMSNorm or (type(norm) is LayerNorm and norm.gain)):
        return []
    mixer = tuple(f"{block.mixer.label}/{name}" for name in READS.get(type(block.mixer), ()))
    mlp = tuple(f"mlp/{name}" for name in READS.get(type(block.mlp), ()))
    if type(block) is ParallelShared:
        readers = {before: (*mixer, *mlp) if mixer and mlp else ()}
    elif type(block) in (Block, Sandwich, Parallel):
        readers = {before: mixer, "mlp_norm": mlp}
    else:
        readers = {}
    offset = norm.offset if isinstance(norm, RMSNorm) else 0.0
    return [Exchange(source=source, readers=read, offset=offset) for source, read in readers.items() if read]


def _of_mixer(mixer: Mixer, label: str) -> list[Exchange]:
    if type(mixer) is Attention and mixer.shares is None:
        of = Exchange(source=f"{label}/v", readers=(f"{label}/o",), norm=False)
        return [replace(of, copies=mixer.heads // mixer.kv_heads, run=mixer.head_dim)]
    if type(mixer) is ShortConv:
        return [Exchange(source=f"{label}/c", readers=(f"{label}/out",), norm=False)]
    return []


def _of_mlp(mlp: FeedForward) -> list[Exchange]:
    if type(mlp) is GatedMLP or (type(mlp) is MLP and mlp.activation is relu):
        return [Exchange(source="mlp/up", readers=("mlp/down",), norm=False)]
    return []
