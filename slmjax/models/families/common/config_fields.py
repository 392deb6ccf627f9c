"""Reads and writes the config.json of transformers, and refuses fields that nothing has read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from slmjax.data import generation_config
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.nn.initial import Normal
from slmjax.nn.mlp import MLP, GatedMLP, gelu, gelu_tanh, relu, silu

AnyModel = TypeVar("AnyModel", bound=Assembly)

NUMBER = (float, int)

ACTIVATIONS: Mapping[str, Callable] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
}
"""Activation functions by their names in transformers; of several names for a function, export writes the first"""

HARMLESS = frozenset(
    (
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "layerdrop",
        "model_type",
        "n_ctx",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "reorder_and_upcast_attn",
        "resid_pdrop",
        "return_dict",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    )
)
"""Fields without influence on the logits of a model in evaluation"""

GENERATION = frozenset((*generation_config.FIELDS, *generation_config.NEUTRAL))
"""Fields that older files hold here rather than in generation_config.json"""


def activation_name(function: Callable) -> str | None:
    """The name of an activation function in transformers, or None."""
    return next((name for name, f in ACTIVATIONS.items() if f is function), None)


class Fields:
    """The fields of a config.json. Each is taken once; `close` refuses those that were not taken and may change the
    model."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self._left = {
            k: v
            for k, v in config.items()
            if k not in HARMLESS and k not in GENERATION and not k.startswith(("_", "transformers."))
        }

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of a field, removed from those left; null counts as absent.

        Raises:
            UserError: it is absent and has no default, or is of another type.
        """
        value = self._left.pop(key, None)
        value = default if value is None else value
        if value is ...:
            raise UserError(f"config.json: {key} is missing")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if value is not default and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise UserError(f"config.json: {key} = {value!r} is not {' or '.join(k.__name__ for k in kinds)}")
        return value

    def nullable(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """`take` for fields where null differs from absent: it means None (no window, no limit)."""
        if key in self._left and self._left[key] is None:
            return self._left.pop(key)
        return self.take(key, kind, default)

    def either(self, *keys: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The value of a field that has several names.

        Raises:
            UserError: two of them have different values, or a value is of another type.
        """
        values = {key: self.take(key, kind, None) for key in keys}
        given = {key: value for key, value in values.items() if value is not None}
        if len(set(given.values())) > 1:
            conflict = " but ".join(f"{key} = {value!r}" for key, value in given.items())
            raise UserError(f"config.json: {conflict}; remove one of them")
        return next(iter(given.values()), default)

    def expect(self, key: str, value: Any) -> None:
        """Take a field that has to be absent, null or equal to `value`.

        Raises:
            UserError: it has another value.
        """
        actual = self._left.pop(key, None)
        if actual is not None and actual != value:
            raise UserError(f"config.json: {key} = {actual!r} is not supported; only {value!r} is")

    def ignore(self, *keys: str) -> None:
        """Drop fields that published files hold but this class does not use."""
        for key in keys:
            self._left.pop(key, None)

    def activation(self, key: str, default: str) -> Callable:
        """The activation function that a field names.

        Raises:
            UserError: no function of this name is supported.
        """
        name = self.take(key, str, default)
        if name not in ACTIVATIONS:
            raise UserError(f"config.json: {key} = {name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def close(self) -> None:
        """Refuse fields that were not taken, unless they are null, false or empty.

        Raises:
            UserError: the first such field.
        """
        for key, value in self._left.items():
            if value:
                raise UserError(
                    f"config.json: {key} = {str(value)[:60]!s} is not supported for this model and may change what it "
                    "computes; remove the field if it does not"
                )


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names, in a class of transformers, of the fields that all classes have."""

    layers: str = "num_hidden_layers"
    width: str = "hidden_size"
    heads: str = "num_attention_heads"
    hidden: str = "intermediate_size"
    vocab: str = "vocab_size"
    context: str = "max_position_embeddings"
    activation: str = "hidden_act"
    std: str = "initializer_range"

    def written(
        self, model: Assembly, architecture: str, model_type: str, heads: int, mlp: MLP | GatedMLP
    ) -> dict[str, Any]:
        """These fields for a model with layers of `heads` heads and this `mlp`."""
        return {
            "architectures": [architecture],
            "model_type": model_type,
            self.vocab: model.vocab,
            self.width: model.width,
            self.layers: model.layers,
            self.heads: heads,
            self.hidden: mlp.hidden,
            self.activation: activation_name(mlp.activation),
            self.context: model.context,
            self.std: model.initial.stated,
        }

    def read(
        self, fields: Fields, *, layers: int, width: int, heads: int, hidden: int | None, vocab: int, context: int,
        activation: str,
    ) -> dict[str, Any]:  # fmt: skip
        """The values of these fields as keyword arguments; the arguments are the defaults of the class.

        Raises:
            UserError: a field is of another type, or the activation is not supported.
        """
        return {
            "layers": fields.take(self.layers, int, layers),
            "width": fields.take(self.width, int, width),
            "heads": fields.take(self.heads, int, heads),
            "hidden": fields.take(self.hidden, int, hidden),
            "vocab": fields.take(self.vocab, int, vocab),
            "context": fields.take(self.context, int, context),
            "activation": fields.activation(self.activation, activation),
        }


def finished(fields: Fields, model: AnyModel, std: str = Names.std) -> AnyModel:
    """The model with its initial distribution, whose standard deviation is the field `std`. Checks that every field was
    taken.

    Raises:
        UserError: a field was not taken that may change what the model computes.
    """
    initial = Normal(std=fields.take(std, NUMBER, 0.02))
    fields.close()
    return replace(model, initial=initial)


def exact(
    config: dict[str, Any], from_config: Callable[[Mapping[str, Any]], Assembly], model: Assembly
) -> dict[str, Any] | None:
    """`config` if reading it gives exactly this model (initial values aside), else None."""
    try:
        read = from_config(config)
    except UserError:
        return None
    return config if replace(read, initial=model.initial) == model else None


def labels_to_config(labels: Sequence[str]) -> dict[str, Any]:
    """The fields that name the labels of a classifier."""
    numbers = {name: i for i, name in enumerate(labels)}
    return {"id2label": {str(i): name for name, i in numbers.items()}, "label2id": numbers}


def labels_from_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a classifier; two where a config.json names none, as in `transformers`.

    Raises:
        UserError: they are not numbered from 0.
    """
    names = config.get("id2label")
    if names is None:
        return ("LABEL_0", "LABEL_1")
    try:
        return tuple(str(names[str(i)]) for i in range(len(names)))
    except (KeyError, TypeError):
        raise UserError(f'config.json: id2label = {str(names)[:60]} does not number its labels from "0" on') from None
