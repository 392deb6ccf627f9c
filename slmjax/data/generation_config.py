"""What the folder of a model says of the text that is generated from it: generation_config.json.

Stock `transformers` reads that file, and where there is none the same fields of config.json. Token ids may be one
number or a list. What slmjax does not use is kept, and written back by an export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmjax.errors import UserError, is_number

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOP_K = 50
"""`transformers` samples among so many tokens where a file that samples does not say how many"""


def _counts(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(x: Any) -> bool:
    return is_number(x) and not isinstance(x, bool)


FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda x: isinstance(x, bool), "true or false"),
    "temperature": (lambda x: _number(x) and x >= 0, "a number, at least 0"),
    "top_k": (lambda x: _counts(x) and x >= 0, "a number of tokens, or 0 for all"),
    "top_p": (lambda x: _number(x) and 0 < x <= 1, "a number in (0, 1]"),
    "min_p": (lambda x: _number(x) and 0 <= x <= 1, "a number in [0, 1]"),
    "repetition_penalty": (lambda x: _number(x) and x > 0, "a number greater than 0"),
    "max_new_tokens": (lambda x: _counts(x) and x >= 1, "a number of tokens"),
    "max_length": (lambda x: _counts(x) and x >= 1, "a number of tokens"),
    "stop_strings": (lambda x: all(isinstance(s, str) and s for s in _several(x)), "strings that are not empty"),
}
"""Fields that are used besides the token ids: what they may be"""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "penalty_alpha": (0.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({}, []),
}
"""Fields that change the text, and which slmjax does not use: the values, besides null, that change nothing"""


def _several(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def end_tokens(eos: int | None, also: Sequence[int] = ()) -> tuple[int, ...]:
    """The tokens that end a text, wherever one is generated.

    Args:
        eos: the EOS of the tokenizer; None: it has none.
        also: those that the model's folder names besides (`GenerationConfig.ends`), and the end of a chat's turn.
    """
    return tuple(dict.fromkeys((*(() if eos is None else (eos,)), *also)))


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a model's folder says; empty where it says nothing."""

    said: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json, or the same fields of config.json where there is no such file; without nulls"""
    ids: Mapping[str, Any] = field(default_factory=dict)
    """The token ids of config.json: those of `IDS` that it sets"""
    source: str = FILE
    """The file, for messages"""

    def __post_init__(self) -> None:
        for values in (self.said, self.ids):
            for name in (name for name in IDS if name in values):
                several = _several(values[name])
                if not several or not all(map(_counts, several)) or (name != "eos_token_id" and len(several) > 1):
                    expected = "a token id, or a list of them" if name == "eos_token_id" else "a token id"
                    raise UserError(f"{self.source}: {name} is {values[name]!r}; expected {expected}")
        for name, (fits, expected) in FIELDS.items():
            if name in self.said and not fits(self.said[name]):
                raise UserError(f"{self.source}: {name} is {self.said[name]!r}; expected {expected}")

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text by these files; none if nothing says which. See `end_tokens`."""
        return tuple(dict.fromkeys(_several(self.said.get("eos_token_id", self.ids.get("eos_token_id", [])))))

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a text."""
        return tuple(_several(self.said.get("stop_strings", [])))

    @property
    def unused(self) -> list[str]:
        """Fields that would change the text in `transformers`, and do not here: "num_beams = 4"."""
        return [
            f"{name} = {self.said[name]}"
            for name, neutral in NEUTRAL.items()
            if name in self.said and self.said[name] not in neutral
        ]

    def sampling(self, *, default: float, **given: Any) -> dict[str, Any]:
        """The arguments of `evals.sampling.sampler`: those given, else what the folder says, else none.

        Args:
            default: the temperature where neither says one.
            given: temperature, top_k, top_p, min_p, repetition_penalty; None: not given. `top_k` 0 is all tokens.
        """
        said = {name: self.said[name] for name in FIELDS if name in self.said}
        if said.get("do_sample") is False:
            said["temperature"] = 0.0
        elif said.get("do_sample"):
            said = {"temperature": 1.0, "top_k": TOP_K} | said
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        chosen = {name: said.get(name) if given.get(name) is None else given[name] for name in names}
        defaults = {"temperature": default, "repetition_penalty": 1.0}
        chosen = {name: defaults.get(name) if value is None else value for name, value in chosen.items()}
        return chosen | ({"top_k": None} if chosen["top_k"] == 0 else {})

    def length(self, max_tokens: int | None, default: int) -> dict[str, int]:
        """How long a text becomes, as arguments of a `Generator`: new tokens, and tokens with the prompt.

        Args:
            max_tokens: new tokens; None: what the folder says, else `default`.
        """
        if max_tokens is not None:
            return {"max_tokens": max_tokens}
        if "max_new_tokens" in self.said:
            return {"max_tokens": self.said["max_new_tokens"]}
        if "max_length" in self.said:
            return {"max_tokens": self.said["max_length"], "max_length": self.said["max_length"]}
        return {"max_tokens": default}

    def save(self, folder: Path) -> None:
        """Writes generation_config.json, if there is anything to say."""
        if self.said:
            (folder / FILE).write_text(json.dumps(dict(self.said), indent=2) + "\n", "utf-8")

    def with_ids(self, known: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The token ids of config.json and the whole generation_config.json of an export.

        Args:
            known: ids that the tokenizer has, or None where it has none; what the folder says comes first.
        """
        ids = {name: self.ids.get(name, self.said.get(name, known.get(name))) for name in IDS}
        return ids, {**{name: i for name, i in ids.items() if i is not None}, **self.said}


NOTHING_SAID = GenerationConfig()


def read(folder: Path, config: Mapping[str, Any]) -> GenerationConfig:
    """What a folder says. `config`: its config.json.

    Raises:
        UserError: generation_config.json is not a JSON object, or a field has a value that it cannot have.
    """
    file = folder / FILE
    ids = {name: config[name] for name in IDS if config.get(name) is not None}
    if not file.is_file():
        said = ids | {name: config[name] for name in (*FIELDS, *NEUTRAL) if config.get(name) is not None}
        return GenerationConfig(said=said, ids=ids, source=str(folder / "config.json"))
    try:
        said = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(said, dict):
        raise UserError(f"{file} holds a {type(said).__name__}; expected an object")
    # names that begin with _ are notes of transformers to itself
    said = {name: value for name, value in said.items() if value is not None and not name.startswith("_")}
    return GenerationConfig(said=said, ids=ids, source=str(file))
