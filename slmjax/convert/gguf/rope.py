"""Rotary positions in GGUF files. Scalings other than a linear one are kept as a factor for each frequency."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from slmjax.convert.gguf.fields import Config, Field, Keys, expect, head_dim, shortest
from slmjax.convert.gguf.file import shown
from slmjax.errors import StorageError, UserError

ORIGINAL = 8192
"""Context before the scaling, of Llama 3.1 to 3.3"""
ORIGINAL_KEY = "rope.scaling.original_context_length"
GROWTH = "rope.scaling.attn_factor"
"""Factor on sines and cosines, besides the one that llama.cpp has for YaRN"""
FACTORS = "rope_freqs.weight"
LONG = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}


class Told(NamedTuple):
    """What the keys of a file say of scaling."""

    kind: str
    factor: float


class Scaling(NamedTuple):
    """A kind of scaling, besides a linear one."""

    name: str
    """`rope_type` in transformers"""
    tensors: Callable[[Config], Mapping[str, np.ndarray]]
    """config.json with this scaling -> the factors of the frequencies"""
    read: Callable[[Keys, Config, Config, Told], Mapping[str, Any] | None]
    """Keys, config.json so far, base and rotated fraction, what is told -> the scaling's fields of `rope_parameters`;
    None: no such scaling"""
    write: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    """config.json with this scaling -> further keys"""
    is_told: bool = False
    """Whether `rope.scaling.type` may name it"""


def rope_of(config: Config) -> Config:
    """The rotary parameters as transformers 5 writes them."""
    return config["rope_parameters"]


def rotated(config: Config) -> int:
    """Number of channels of a head that are rotated."""
    return int(head_dim(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def rotary(*scalings: Scaling) -> Field:
    """Rotary positions, scaled linearly, in one of these ways, or not at all."""
    kinds = {one.name: one for one in scalings}

    def write(config: Config) -> dict[str, Any]:
        rope = rope_of(config)
        kind = rope["rope_type"]
        if kind not in ("default", "linear", *kinds):
            raise UserError(f"rope_type = {kind!r} cannot be written as GGUF for this architecture")
        keys = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": rotated(config)}
        if kind == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        return {**keys, **(kinds[kind].write(config) if kind in kinds else {})}

    def tensors(config: Config) -> Mapping[str, np.ndarray]:
        kind = rope_of(config)["rope_type"]
        return kinds[kind].tensors(config) if kind in kinds else {}

    def read(keys: Keys, config: Config) -> dict[str, Any]:
        size = head_dim(config)
        turned = keys.count("rope.dimension_count", size)
        if turned > size or turned % 2:
            raise keys.wrong("rope.dimension_count", turned, f"an even number up to the width of a head, {size}")
        rope = {"rope_theta": keys.real("rope.freq_base", 1e4), "partial_rotary_factor": turned / size}
        return {"rope_parameters": {**rope, **_scaling(keys, config, rope, scalings)}}

    return Field(write=write, read=read, tensors=tensors)


def _scaling(keys: Keys, config: Config, rope: Config, scalings: tuple[Scaling, ...]) -> Mapping[str, Any]:
    """The fields of `rope_parameters` that say how frequencies are scaled.

    Raises:
        UserError: the scaling is not supported.
        StorageError: the factors have another shape.
    """
    # llama.cpp takes a factor without a type as linear
    known = ("none", "linear", *(one.name for one in scalings if one.is_told))
    kind = keys.take("rope.scaling.type", "linear")
    older = keys.take("rope.scale_linear", 1.0)
    factor = keys.real("rope.scaling.factor", older)
    if not isinstance(kind, str) or kind not in known:
        expected = " or ".join(known)
        raise UserError(f"{keys.prefix}rope.scaling.type = {shown(kind)} is not supported; expected {expected}")
    linear = kind == "linear" and factor != 1.0
    for one in scalings:
        found = one.read(keys, config, rope, Told(kind, factor))
        if found is not None and linear:
            raise UserError(f"{keys.prefix}rope.scaling.type = 'linear' with factors of frequencies is not supported")
        if found is not None:
            return found
    if kind == "longrope":
        raise StorageError(f"{keys.file.file}: tensor {LONG['long_factor']!r} of a longrope scaling is missing")
    return {"rope_type": "linear", "factor": factor} if linear else {"rope_type": "default"}


def _factors(keys: Keys, name: str, config: Config, rope: Config) -> np.ndarray:
    """Factors of the frequencies, float32 [rotated channels / 2].

    Raises:
        StorageError: they have another shape.
    """
    expected = (rotated({**config, "rope_parameters": rope}) // 2,)
    if keys.file.infos[name].shape != expected:
        found = list(keys.file.infos[name].shape)
        raise StorageError(f"{keys.file.file}: tensor {name!r} has shape {found}; expected {list(expected)}")
    return keys.file[name]


def llama3_factors(config: Config) -> dict[str, np.ndarray]:
    """The tensor of the llama3 scaling: llama.cpp divides the frequencies by it."""
    rope, size = rope_of(config), rotated(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((rope["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return {FACTORS: (1 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32)}


def _read_llama3(keys: Keys, config: Config, rope: Config, told: Told) -> Mapping[str, Any] | None:
    original = keys.count(ORIGINAL_KEY, ORIGINAL)
    if FACTORS not in keys.file:
        return None
    factors = _factors(keys, FACTORS, config, rope)
    if np.all(factors == 1):
        return {"rope_type": "default"}
    for candidate in _candidates(factors, rope["rope_theta"], 2 * len(factors), original):
        described = {**config, "rope_parameters": {**rope, **candidate}}
        if np.allclose(llama3_factors(described)[FACTORS], factors, rtol=1e-6, atol=0):
            return candidate
    raise UserError(f"tensor {FACTORS!r} is not a llama3 scaling; no other is supported")


def _candidates(factors: np.ndarray, theta: float, size: int, original: float) -> list[dict[str, Any]]:
    """llama3 scalings that could give these factors: Llama's own, and one fitted to the factors between the extremes.

    1 / factor is linear in the blend, and the blend is linear in 1 / wavelength, so that two points determine the line.
    It determines only low/original and high/original; `original` is taken from the file.
    """
    full = float(factors.max())

    def scaling(low: float, high: float) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": full,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(original),
        }

    wavelength = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    with np.errstate(divide="ignore", invalid="ignore"):
        blend = (1 / factors.astype(np.float64) - 1 / full) / (1 - 1 / full)
    inside = np.flatnonzero((blend > 1e-6) & (blend < 1 - 1e-6))
    found = [scaling(1.0, 4.0)]
    if len(inside) >= 2:
        slope, start = np.polyfit(1 / wavelength[inside], blend[inside], 1)
        low, high = -start * original / slope, (1 - start) * original / slope
        if 0 < low < high:
            found += [scaling(float(round(low, 3)), float(round(high, 3))), scaling(float(low), float(high))]
    return found


def _magnitude(factor: float, original: int) -> float:
    """How much sines and cosines grow with longrope, where a configuration does not say."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _long_keys(config: Config) -> dict[str, Any]:
    rope = rope_of(config)
    old = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / old
    return {ORIGINAL_KEY: old, GROWTH: rope.get("attention_factor") or _magnitude(factor, old)}


def _read_long(keys: Keys, config: Config, rope: Config, told: Told) -> Mapping[str, Any] | None:
    context = config["max_position_embeddings"]
    old = keys.count(ORIGINAL_KEY, context)
    growth = keys.real(GROWTH, 1.0)
    if not any(name in keys.file for name in LONG.values()):
        if growth != 1.0:
            raise keys.wrong(GROWTH, growth, f"1.0 in a file without a tensor {LONG['long_factor']}")
        return None
    for name in LONG.values():
        if name not in keys.file:
            raise StorageError(f"{keys.file.file}: tensor {name!r} is missing")
    factors = {key: [shortest(x) for x in _factors(keys, name, config, rope).tolist()] for key, name in LONG.items()}
    usual = old > 1 and np.float32(_magnitude(context / old, old)) == np.float32(growth)
    return {
        "rope_type": "longrope",
        **factors,
        "original_max_position_embeddings": old,
        **({} if usual else {"attention_factor": growth}),
    }


def _yarn_growth(factor: float) -> float:
    """What llama.cpp multiplies sines and cosines by, in any case."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_keys(config: Config) -> dict[str, Any]:
    rope = rope_of(config)
    expect(rope, "truncate", True)
    expect(rope, "mscale", None)
    expect(rope, "mscale_all_dim", None)
    usual = _yarn_growth(rope["factor"])
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        ORIGINAL_KEY: rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        GROWTH: (rope.get("attention_factor") or usual) / usual,
    }


def _read_yarn(keys: Keys, config: Config, rope: Config, told: Told) -> Mapping[str, Any] | None:
    if told.kind != "yarn":
        return None
    growth = keys.real(GROWTH, 1.0)
    whole = float(f"{growth * _yarn_growth(told.factor):.7g}")  # its quotient was rounded to float32
    return {
        "rope_type": "yarn",
        "factor": told.factor,
        "original_max_position_embeddings": keys.count(ORIGINAL_KEY, config["max_position_embeddings"]),
        "beta_fast": keys.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.real("rope.scaling.yarn_beta_slow", 1.0),
        **({} if growth == 1.0 else {"attention_factor": whole}),
    }


LLAMA3 = Scaling(
    "llama3",
    llama3_factors,
    _read_llama3,
    lambda config: {ORIGINAL_KEY: rope_of(config)["original_max_position_embeddings"]},  # the factors do not tell it
)
LONGROPE = Scaling(
    "longrope",
    lambda config: {name: np.asarray(rope_of(config)[key], np.float32) for key, name in LONG.items()},
    _read_long,
    _long_keys,
    is_told=True,
)
"""Factors of Phi-3: `long` for contexts beyond the original one, `short` for others"""
YARN = Scaling("yarn", lambda config: {}, _read_yarn, _yarn_keys, is_told=True)
