"""Writes tokenizer files that stock `AutoTokenizer` loads and that encode text as in training."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tokenizers import processors

from slmjax.data.tokenizer import TEMPLATE, Tokenizer
from slmjax.errors import UserError

PROBES = ("The quick brown fox.", "naïve café, 北京 🙂", "  def f(x):\n\treturn x + 1\n", "a")


def write_tokenizer(
    folder: pathlib.Path,
    tokenizer: Tokenizer,
    *,
    context: int,
    vocab: int,
    pads: str = "left",
    closes: bool = False,
    pad: int | None = None,
) -> dict[str, int | None]:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, and chat_template.jinja if there is one.

    In training a document is [BOS] text [EOS]; a prompt is the beginning of one, so encoding adds BOS. It adds EOS only
    if `closes`, for encoders, which read whole documents. Post-processing that does otherwise is replaced.

    Args:
        pads: "left" or "right", the side of padding.
        context: longest sequence of the model, in tokens.
        vocab: rows of the model's embedding table.
        pad: the padding token, if the model's folder names one; else it is EOS, or BOS.

    Returns:
        bos_token_id, eos_token_id and pad_token_id, for config.json.

    Raises:
        UserError: the tokenizer has more ids than the model has rows.
    """
    if tokenizer.rows > vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.rows} ids but the model only {vocab}: they do not belong together"
        )
    raw = tokenizer.raw.from_str(tokenizer.raw.to_str())
    if any(raw.encode(text).ids != tokenizer.encode(text, bos=True, eos=closes) for text in PROBES):
        begin, end = (tokenizer.bos, tokenizer.bos_id), (tokenizer.eos, tokenizer.eos_id)
        raw.post_processor = _framed(begin, end if closes else (None, None))
    (folder / "tokenizer.json").write_text(raw.to_str(pretty=True), "utf-8")
    padding = None if pad is None else raw.id_to_token(pad)
    names = {
        "pad_token": tokenizer.eos or tokenizer.bos,  # transformers cannot batch without one; the mask hides it
        "unk_token": getattr(raw.model, "unk_token", None),
        **tokenizer.names,
        **({} if padding is None else {"pad_token": padding}),
        # the names that pipelines for encoders use
        **({"cls_token": tokenizer.bos, "sep_token": tokenizer.eos} if closes else {}),
    }
    names = {name: token for name, token in names.items() if token is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # no token types: exported models take none
        "clean_up_tokenization_spaces": False,
        "padding_side": pads,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {k: v for k, v in names.items() if isinstance(v, str)})
    if tokenizer.chat is not None:
        (folder / TEMPLATE).write_text(tokenizer.chat.source, "utf-8")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {**ids, "pad_token_id": tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id}


def _framed(bos: tuple[str | None, int | None], eos: tuple[str | None, int | None]) -> Any:
    """Post-processor for [BOS] text [EOS], without those that are None; the second text of a pair has token type 1."""
    before, after = (f"{bos[0]} " if bos[0] else "", f" {eos[0]}" if eos[0] else "")
    second = f" $B:1{after}:1" if after else f" {before}$B:1"
    return processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after}{second}",
        special_tokens=[(token, i) for token, i in dict.fromkeys((bos, eos)) if token],
    )


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
