"""The kind of targets that the options of `slmjax data teacher` ask for."""

from __future__ import annotations

from typing import Literal

from slmjax.distill.stored import LastHidden, Sampled, Stored, Tail, TopK
from slmjax.errors import UserError

Name = Literal["top-k", "sampled", "tail", "hidden"]


def kind_of(targets: Name, *, k: int | None, draws: int | None, dtype: Literal["bfloat16", "float16"] | None) -> Stored:
    """The kind of this name; options that are None have its defaults.

    Raises:
        UserError: an option of another kind is given.
    """
    used = {"top-k": "k", "tail": "k", "sampled": "draws", "hidden": "dtype"}[targets]
    for name, value in (("k", k), ("draws", draws), ("dtype", dtype)):
        if name != used and value is not None:
            raise UserError(f"--{name} is not used with --targets {targets}; leave it out")
    if targets == "hidden":
        return LastHidden(dtype=dtype or "bfloat16")
    if targets == "sampled":
        return Sampled(draws=64 if draws is None else draws)
    likeliest = 64 if k is None else k
    return TopK(k=likeliest) if targets == "top-k" else Tail(k=likeliest)
