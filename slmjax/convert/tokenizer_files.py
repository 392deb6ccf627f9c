"""Tokenizer files that stock `AutoTokenizer` loads, and that encode a text as training encoded its documents."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tokenizers import processors

from slmjax.data.tokenizer import TEMPLATE, Tokenizer
from slmjax.errors import UserError

PROBES = ("The quick brown fox.", "naïve café, 北京 🙂", "  def f(x):\n\treturn x + 1\n", "a")


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, *, context: int, vocab: int) -> dict[str, int | None]:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, and chat_template.jinja if there is one.

    In training a document is [BOS] text [EOS]; a prompt is its beginning, so encoding adds BOS and no EOS. If the
    tokenizer's own post-processing does something else it is replaced.

    Args:
        context: longest sequence of the model, in tokens.
        vocab: rows of the model's embedding table.

    Returns:
        bos_token_id, eos_token_id and pad_token_id, for config.json.

    Raises:
        UserError: the tokenizer has more ids than the model has rows.
    """
    if tokenizer.vocab > vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab} ids but the model only {vocab}: they do not belong together"
        )
    raw = tokenizer.raw.from_str(tokenizer.raw.to_str())
    if any(raw.encode(text).ids != tokenizer.encode(text, bos=True) for text in PROBES):
        raw.post_processor = _prepend(tokenizer.bos, tokenizer.bos_id)
    (folder / "tokenizer.json").write_text(raw.to_str(pretty=True), "utf-8")
    names = {
        "pad_token": tokenizer.eos or tokenizer.bos,  # transformers cannot batch without one; the mask hides it
        "unk_token": getattr(raw.model, "unk_token", None),
        **tokenizer.names,
    }
    names = {name: token for name, token in names.items() if token is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # no token types: the models take none
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {k: v for k, v in names.items() if isinstance(v, str)})
    if tokenizer.chat is not None:
        (folder / TEMPLATE).write_text(tokenizer.chat.source, "utf-8")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {**ids, "pad_token_id": tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id}


def _prepend(bos: str | None, bos_id: int | None) -> Any:
    if bos is None:
        return processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
    )


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
