"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmjax.errors import UserError
from slmjax.models.families.common.config_fields import NUMBER, Fields
from slmjax.nn.position import Rope
from slmjax.nn.rope_scaling import LinearScaling, Llama3Scaling, LongRope, RopeScaling, Yarn


def rope_from_config(
    fields: Fields,
    *,
    theta: float = 1e4,
    fraction: float = 1.0,
    fraction_keys: tuple[str, ...] = ("partial_rotary_factor",),
    theta_keys: tuple[str, ...] = ("rope_theta",),
    context: int = 0,
    original: int | None = None,
) -> Rope:
    """The rotary positions that a config describes. Takes every field about them.

    Args:
        theta, fraction: defaults of the class.
        fraction_keys, theta_keys: names of the rotated fraction of a head, and of theta, at the top level.
        context: longest sequence, for scalings without a factor of their own.
        original: default of the class for `original_max_position_embeddings` at the top level, which transformers
            prefers to that of the scaling.

    Raises:
        UserError: the keys of versions 4 and 5 contradict each other, or a kind of scaling is not supported.
    """
    old = {
        "rope_theta": fields.either(*theta_keys, kind=NUMBER, default=None),
        "partial_rotary_factor": fields.either(*fraction_keys, kind=NUMBER, default=None),
    }
    original = fields.take("original_max_position_embeddings", int, original)
    new = dict(fields.take("rope_parameters", Mapping, {}))
    scaling = dict(fields.take("rope_scaling", Mapping, {}))
    if new and scaling:
        for key in new.keys() & scaling.keys():
            if new[key] != scaling[key]:
                raise UserError(
                    f"config.json: rope_parameters has {key} = {new[key]!r} but rope_scaling has {scaling[key]!r}; "
                    "remove one of them"
                )
    merged = {**scaling, **new}
    for key, value in old.items():
        if value is not None and merged.setdefault(key, value) != value:
            raise UserError(
                f"config.json: {key} = {value!r} but rope_parameters has {merged[key]!r}; remove one of them"
            )
    return _rope(merged, theta, fraction, original, context)


def ropes_by_kind(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """`rope_parameters` of a class with positions of two kinds, as the fields of two configurations with one kind each:
    those of layers with a window, and those of layers without.

    Raises:
        UserError: `rope_parameters` has other keys than `sliding_attention` and `full_attention`.
    """
    nested = dict(fields.take("rope_parameters", Mapping, {}))
    kinds = tuple({"rope_parameters": nested.pop(key, None)} for key in ("sliding_attention", "full_attention"))
    if nested:
        raise UserError(
            f"config.json: rope_parameters has {next(iter(nested))}; it needs sliding_attention and full_attention"
        )
    return kinds[0], kinds[1]


def _rope(given: dict[str, Any], theta: float, fraction: float, original: int | None, context: int) -> Rope:
    kinds = {given.pop(key) for key in ("rope_type", "type") if key in given} or {"default"}
    if len(kinds) > 1:
        raise UserError(f"config.json: rope_type and type differ: {', '.join(sorted(map(str, kinds)))}")
    (kind,) = kinds
    rope = Fields(given)
    theta = float(rope.take("rope_theta", NUMBER, theta))
    fraction = float(rope.take("partial_rotary_factor", NUMBER, fraction))
    scaling: RopeScaling | None
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(factor=float(rope.take("factor", NUMBER)))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(rope.take("factor", NUMBER)),
            low=float(rope.take("low_freq_factor", NUMBER)),
            high=float(rope.take("high_freq_factor", NUMBER)),
            original_context=rope.take("original_max_position_embeddings", int),
        )
    elif kind in ("longrope", "su"):  # "su" is its older name
        scaling = _longrope(rope, original, context)
    elif kind == "yarn":
        scaling = _yarn(rope, original, context)
    else:
        known = "default, linear, llama3, longrope, yarn"
        raise UserError(f"config.json: rope_type = {kind!r} is not supported; expected one of {known}")
    rope.close()
    return Rope(theta=theta, scaling=scaling, fraction=fraction)


def _longrope(rope: Fields, original: int | None, context: int) -> LongRope:
    """Phi-3 keeps the original context at the top level of its config, and may leave the factor to be computed."""
    first = rope.take("original_max_position_embeddings", int, original)
    if first is None:
        raise UserError("config.json: rope_type = 'longrope' needs original_max_position_embeddings")
    if original is not None and first != original:
        raise UserError(
            f"config.json: original_max_position_embeddings = {original} but rope_parameters has {first}; "
            "remove one of them"
        )
    factor = rope.take("factor", NUMBER, None)
    growth = rope.take("attention_factor", NUMBER, None)
    return LongRope(
        short=_numbers(rope, "short_factor"),
        long=_numbers(rope, "long_factor"),
        original_context=first,
        factor=float(context / first if factor is None else factor),
        attention_factor=None if growth is None else float(growth),
    )


def _yarn(rope: Fields, original: int | None, context: int) -> Yarn:
    """The original context may be at the top level (which counts), or left out: then it is the context."""
    first = rope.take("original_max_position_embeddings", int, context)
    first = first if original is None else original
    number = lambda key, default=None: rope.take(key, NUMBER, default)  # noqa: E731
    optional = {name: number(name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
    factor = number("factor")
    return Yarn(
        factor=float(context / first if factor is None else factor),
        original_context=first,
        fast=float(number("beta_fast") or 32),
        slow=float(number("beta_slow") or 1),
        truncate=rope.take("truncate", bool, True),
        **{name: None if value is None else float(value) for name, value in optional.items()},
    )


def _numbers(rope: Fields, key: str) -> tuple[float, ...]:
    numbers = rope.take(key, (list, tuple))
    if not all(isinstance(x, NUMBER) for x in numbers):
        raise UserError(f"config.json: {key} = {str(numbers)[:60]} is not a list of numbers")
    return tuple(float(x) for x in numbers)


def rope_to_config(rope: Rope) -> dict[str, Any]:
    """The value of `rope_parameters` (transformers 5) for these positions."""
    parameters: dict[str, Any] = {"rope_theta": rope.theta, **_kind(rope.scaling)}
    return parameters if rope.fraction == 1.0 else {**parameters, "partial_rotary_factor": rope.fraction}


def both_versions(rope: Rope) -> dict[str, Any]:
    """The fields for these positions of transformers 5 (`rope_parameters`) and of transformers 4."""
    kind = _kind(rope.scaling)
    old = {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling is None else kind}
    partial = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    return {**old, **partial, "rope_parameters": rope_to_config(rope)}


def _kind(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_context,
        }
    if isinstance(scaling, LongRope):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "factor": scaling.factor,
            **({} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}),
            "original_max_position_embeddings": scaling.original_context,
        }
    if isinstance(scaling, Yarn):
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_context,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "truncate": scaling.truncate,
            **{name: getattr(scaling, name) for name in optional if getattr(scaling, name) is not None},
        }
    raise UserError(f"position.scaling: {type(scaling).__name__} has no name in config.json")
