"""What `slmjax quantize` and `slmjax prune` share: the options of the data that they read, and the loss before and
after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slmjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HeldOutArgs:
    """The options."""

    data: str | None = None
    """Calibration data: a token store, whose validation split is read; default: the validation data of the run"""
    batches: int = 16
    """Batches of calibration data"""
    batch: int = 8
    """Sequences a batch"""
    length: int | None = None
    """Tokens a sequence; default: as in training, or the model's context up to 1024"""
    step: int | None = None
    """The checkpoint of a run; default: the latest"""


def opened_for(args: HeldOutArgs, loaded: Any, *, reads_data: bool) -> Any:
    """The data (`data.spec.Opened`); None if there are none and none are needed.

    Raises:
        UserError: the model does not say which data, they do not fit it, or `batches` is not positive.
        DataError: they are missing, or were written by another tokenizer.
    """
    from slmjax.runs.evaluating import HeldOut, opened

    if args.batches < 1:
        raise UserError(f"--batches is {args.batches}; expected at least 1")
    if args.data is None and loaded.experiment is None and not reads_data:
        return None
    return opened(HeldOut(data=args.data, batch=args.batch, length=args.length), loaded)


def compared(
    args: HeldOutArgs,
    held_out: Any,
    before: Any,
    after: Callable[[], Any],
    keep: Callable[[Any, Any], None] = lambda old, new: None,
) -> str:
    """The loss of a model before and after, as a line of text.

    Args:
        held_out: the data; None if there are none.
        before: the model (`runs.loading.Loaded`); a classifier has no loss a token.
        after: reads the changed model.
        keep: called with both results of `measure`.
    """
    from slmjax.runs.evaluating import measure

    if held_out is None or before.decoder.labels:
        return "loss not measured: add --data with a token store"
    old: Any = measure(before, held_out, batches=args.batches)
    new: Any = measure(after(), held_out, batches=args.batches)
    keep(old, new)
    change = new.loss.value - old.loss.value
    return (
        f"loss {old.loss.value:.4f} before, {new.loss.value:.4f} after: {change:+.4f} nats a token, on "
        f"{int(old.tokens):,} held-out tokens"
    )
