"""The central types: arrays, and pure functions over them.

Nothing here imports jax, so that `data/` can build batches without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from jax import Array

Params: TypeAlias = Any
"""A nested dict with string keys whose leaves are arrays."""
Frozen: TypeAlias = Any
"""Arrays without gradients (a teacher's parameters), passed to the step and never donated."""
Key: TypeAlias = Any
"""A jax PRNG key."""
Metrics: TypeAlias = Mapping[str, Any]
"""Name to scalar array. Always holds `loss` and `weight`."""


class Batch(NamedTuple):
    """What one step reads. Every array has the rows of the batch as its first dimension, B.

    Code that cuts a batch into micro-batches, places it on devices or hashes it works on each array by its rows. What
    must stay together, such as the two answers of a preference pair, is therefore one row.

    A position whose weight is 0 (padding, or the last token of a document in a packed row) adds nothing to the loss.
    Attention stays inside a segment: token i sees token j iff j <= i and their segment ids are equal. Padding has
    segment id 0, documents count from 1. Positions restart at 0 in each segment.
    """

    tokens: Array  # int32 [B, T]
    targets: Array  # int32 [B, T]: the token that follows
    weights: Array  # float32 [B, T]
    positions: Array  # int32 [B, T]
    segment_ids: Array  # int32 [B, T]
    extra: Mapping[str, Array] = {}
    """Further arrays by name, each [B, ...]: labels, token types, targets of a teacher"""


@runtime_checkable
class BatchStream(Protocol):
    """An endless iterator over this process's rows, whose position can be saved."""

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]:
        """The position, as JSON: after `restore(state)`, `__next__` goes on from there. May hold `epoch` (a number)."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Special:
    """Special token ids of a tokenizer."""

    mask: int | None = None
    """Id of the mask token; None if there is none"""
    all: tuple[int, ...] = ()
    """Every special token id: beginning, end, mask, padding and any others"""
    ends: tuple[int, ...] = ()
    """Ids of the tokens that end a text"""


class Output(NamedTuple):
    """What a model returns for tokens [B, T]."""

    hidden: Array  # [B, T, D]: after the final norm, the input of `unembed`
    cache: Any = None  # the key-value cache after these tokens, if `apply` was given one
    blocks: Any = None  # [L + 1, B, T, D]: the residual stream before block 0, 1, ..., and after the last, if collected
    auxiliary: Mapping[str, Array] = {}  # each [B, T]: terms that parts of the model add to the loss, by name
    attention: Any = None
    """If collected: for each layer its queries "q" [B, T, H, K], keys "k" and values "v" [B, T, G, K], as its attention
    reads them (after norm and position); None for a layer without attention"""


def first_token(segment_ids: Any) -> Any:
    """[B, T] -> 0 for each row."""
    return segment_ids[:, 0] * 0


def last_token(segment_ids: Any) -> Any:
    """[B, T] -> the index of each row's last token that is not padding; 0 in rows of padding alone."""
    return ((segment_ids > 0).sum(axis=1) - 1).clip(0)


class Model(NamedTuple):
    """Pure functions over `Params`. Made by `Assembly.build(compute, numerics)`.

    Logits are not returned by `apply`: [B, T, V] in fp32 is often the largest array of a step, so the loss decides
    how much of it exists at once by calling `unembed` on pieces of `hidden`.
    """

    init: Callable[[Key], Params]
    """key -> float32 parameters"""
    apply: Callable[..., Output]
    """(params, tokens [B,T], positions [B,T], segment_ids [B,T], *, cache=None, collect=False) -> Output"""
    unembed: Callable[[Params, Any], Any]
    """(params, hidden [..., D]) -> logits [..., V], float32; with a head, its output for each token"""
    axes: Any
    """The tree of `init`, each leaf a tuple with one logical axis name (or None) a dimension"""
    init_cache: Callable[[int, int], Any]
    """(batch, length) -> an empty key-value cache. Raises UserError for a model that cannot generate text"""
    context: int
    """The longest sequence, in tokens, that the positions of this model can represent"""
    vocab: int
    """V: rows of the embedding table"""
    read_at: Callable[[Any], Any] = first_token
    """Segment ids [B, T] of texts, one a row and padded on the right -> int [B]: the token whose hidden vector a head
    for a whole text reads"""
    rules: tuple[Any, ...] = ()
    """For each layer, how its attention scores follow from queries and keys (nn.attention_kernels.Scores); None for one
    without attention"""


@dataclass(frozen=True, kw_only=True)
class Group:
    """How the optimizer treats parameters that a view adds: with the direction of the experiment's optimizer, but with
    a learning rate and a weight decay of their own."""

    rate: Any = 1.0
    """Factor on the learning rate of the schedule: a number, or an array []"""
    weight_decay: Any = 0.0
    """Decoupled, in place of the optimizer's"""
    eps: Any = 1.0
    """Factor on Adam's epsilon"""


class Factors(NamedTuple):
    """How one parameter of a model trains beside the others, as the sizes of the model demand
    (`models.parametrisation`): factors on numbers of the optimizer."""

    rate: Any = 1.0
    """On the learning rate"""
    weight_decay: Any = 1.0
    """On the weight decay, where the optimizer decays this parameter"""
    eps: Any = 1.0
    """On Adam's epsilon"""


def nothing_packed(params: Params, own: Params, state: Any) -> dict[str, Any]:
    """`ParamView.pack` of views whose effective parameters have no shorter form."""
    return {}


class ParamView(NamedTuple):
    """Stored parameters -> the effective parameters that the model computes with.

    Fake quantization, pruning masks, LoRA, casts and EMA are views, composed by `chain`. A view may add trainable
    parameters of its own, such as learned scales or adapters, and freeze parameters of the model. Made by
    `View.build(axes)`.
    """

    init: Callable[[Params, Key], tuple[Params, Any]]
    """(model's parameters, key) -> (the view's own trainable parameters, `{}` if none; the view's state, arrays only,
    `()` if none)"""
    apply: Callable[[Params, Params, Any], Params]
    """(model's parameters, own, state) -> effective parameters, differentiated through in the training step"""
    update: Callable[[Any, Params, Params, Any], Any]
    """(state, model's parameters after the update, own after the update, step) -> state"""
    evaluate: Callable[[Params, Params, Any], Params]
    """(model's parameters, own, state) -> the effective parameters of evaluation, sampling and export"""
    axes: Mapping[str, Any] = {}
    """Logical axes of the view's own parameters, a nested dict like the one that `init` returns"""
    groups: Mapping[str, Group] = {}
    """How each of the view's own parameters is optimized, by path; those not named: `Group()`"""
    frozen: frozenset[str] = frozenset()
    """Paths of the model's parameters that are not trained: no gradient, no optimizer state, no copy"""
    pack: Callable[[Params, Params, Any], Mapping[str, Any]] = nothing_packed
    """(model's parameters, own, state), as `evaluate` gets them, of concrete values -> {path: the codes of a parameter
    that `evaluate` rounds to a grid} (compress.quant.view.Packed)"""


def unchanged(batch: Batch, key: Key) -> Batch:
    """`Objective.prepare` for batches that hold their targets already: the next token of each position."""
    return batch


class Objective(NamedTuple):
    """What is minimised. `loss` is the mean over tokens weighted by `batch.weights`."""

    loss: Callable[[Params, Frozen, Batch, Key], tuple[Any, Metrics]]
    """(effective params, frozen, batch, key) -> (loss [], metrics)

    `metrics` holds scalars; `metrics["weight"]` is the sum of the weights that `loss` and every other metric are the
    mean over: accumulation over micro-batches and over evaluation batches weighs by it, and so gives exactly the
    mean of the large batch."""
    frozen: Frozen = ()
    """Passed to `loss` in every step, never donated"""
    axes: Any = None
    """Logical axes of `frozen`, a nested dict like it, by which it is split over devices; None: a copy on each"""
    prepare: Callable[[Batch, Key], Batch] = unchanged
    """(the batch of a step, key) -> the batch that `loss` reads, such as one with tokens masked. Called inside the step
    before it is cut into micro-batches, so that their number does not change what is drawn"""


class Optimizer(NamedTuple):
    """An optax transformation, and which parameters to evaluate (schedule-free optimizers evaluate an average)."""

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Any, Any]]
    """(gradients, state, params) -> (updates, state)"""
    evaluate: Callable[[Any, Params], Params]
    """(state, params) -> parameters for evaluation and export"""


class TrainState(NamedTuple):
    """Everything that changes from step to step. Arrays only; randomness is `fold_in(key, step)`."""

    step: Array  # int32 []
    params: Params  # the model's; with the view's own under the key "view", where it has any (train/stored.py)
    opt: Any
    view: Any
