"""Multipliers of a decoder that follow from those of a smaller one: of tables, branches, attention scores, logits."""

from __future__ import annotations

import math
from dataclasses import replace

from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.models.decoder import Decoder
from slmjax.nn.attention import Queries
from slmjax.nn.block import AnyBlock


def multiplied(model: Decoder, base: Decoder, *, branches: float, logits: float, scores: float) -> Decoder:
    """The model with the base's multipliers, whatever its own were. Those of tables do not depend on sizes.

    Args:
        branches, logits: factors on the base's.
        scores: the base's scale of q·k is multiplied by (head width / that of the base) to this power.
    """
    branch_scale = times(base.blocks()[0].branch_scale, branches)
    mixers = [block.mixer for block in base.blocks() if isinstance(block.mixer, Queries)]

    def changed(block: AnyBlock) -> AnyBlock:
        mixer = block.mixer
        if isinstance(mixer, Queries) and mixers:
            mixer = replace(mixer, scale=_scale(mixer, mixers[0], scores))
        return replace(block, mixer=mixer, branch_scale=branch_scale)

    stages = [replace(stage, pattern=tuple(map(changed, stage.pattern))) for stage in model.stages]
    position = model.position
    if position is not None and base.position is not None:
        position = replace(position, scale=base.position.scale)
    return replace(
        model,
        pattern=stages[0].pattern,
        tail=tuple(stages[1:]),
        embed_scale=base.embed_scale,
        position=position,
        logits=replace(model.logits, scale=times(base.logits.scale, logits)),
    )


def _scale(mixer: Queries, of: Queries, power: float) -> float | None:
    if mixer.head_dim == of.head_dim or (of.scale is None and power == -0.5):  # None is head_dim^-1/2
        return of.scale
    return of.rule.scale * (mixer.head_dim / of.head_dim) ** power


def check(base: Decoder) -> None:
    """
    Raises:
        UserError: layers of the base differ in a multiplier, so that those of another model do not follow.
    """
    blocks = base.blocks()
    scores = {
        block.mixer.rule.scale * math.sqrt(block.mixer.head_dim)
        for block in blocks
        if isinstance(block.mixer, Queries) and block.mixer.rule is not None
    }
    for name, values in {"branch_scale": {block.branch_scale for block in blocks}, "mixer.scale": scores}.items():
        if max(values, default=0.0) - min(values, default=0.0) > 1e-9:
            listed = ", ".join(f"{x:.4g}" for x in sorted(values))
            raise UserError(f"parametrisation.base: its layers have several values of {name} ({listed}); expected one")


def decoder(where: str, model: Assembly) -> Decoder:
    """
    Raises:
        UserError: it is no decoder; the message names the field `where`.
    """
    if not isinstance(model, Decoder):
        raise UserError(
            f"{where} is an {type(model).__name__}, whose logits have no multiplier; parametrisations scale decoders"
        )
    return model


def table_width(model: Decoder) -> int:
    """How many numbers are summed for a logit."""
    return model.table_width or model.width


def times(x: float, factor: float) -> float:
    """The product; exactly x if the factor is 1."""
    return x if factor == 1 else x * factor
