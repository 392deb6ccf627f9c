"""Tokenizers in GGUF metadata <-> `tokenizers`, whose tokenizer.json stock `transformers` reads.

Small decoders use two kinds: `gpt2`, byte-level BPE with a named rule that splits text into words before merging, and
`llama`, SentencePiece's BPE, which merges by the score of the result and falls back to bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from slmjax.convert.gguf.file import named, shown
from slmjax.data.chat import ChatTemplate
from slmjax.data.chat import ends as turns
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import StorageError, UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    rf"|\p{{N}}{{1,3}}|{_REST}"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


class Cut(NamedTuple):
    """How text is split into words before merging (pre-tokenization)."""

    names: tuple[str, ...]
    """Names in llama.cpp; export writes the first"""
    rules: tuple[str, ...]
    """Regular expressions, by which text is split one after another"""
    ignore_merges: bool = False
    """Whether a word that is a token as a whole becomes that token, without merging"""
    bos: bool = False
    """Whether BOS is added where the file does not say"""


CUTS = (
    Cut(("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "exaone4"), (GPT2,)),
    Cut(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", GPT2)),
    Cut(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), (LLAMA3,), ignore_merges=True, bos=True),
    Cut(("smaug-bpe", "dbrx"), (LLAMA3,)),
    Cut(("qwen2", "stablelm2", "deepseek-r1-qwen"), (QWEN2,)),
    Cut(("tekken",), (TEKKEN,), ignore_merges=True, bos=True),
    Cut(("gpt-4o",), (GPT4O,)),
    Cut(("bloom",), (BLOOM,)),
)
IMPOSSIBLE = "ÿ ÿ"
"""A merge of two bytes that never occur in UTF-8, written where there are no merges: llama.cpp needs at least one"""
SPACE = "\u2581"
PADDING = "[PAD{}]"
KEY = "tokenizer.ggml."
ENDS = ("eos", "eot", "eom")
"""The tokens at which llama.cpp ends: of a text, of a turn, of a message"""
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens by their name in `transformers` -> in a file"""


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a file's metadata.

    Raises:
        UserError: this kind of tokenizer is not supported.
        StorageError: its parts are missing or contradict one another.
    """
    kind = named(metadata, f"{KEY}model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{KEY}model = {kind!r} is not supported; expected gpt2 (byte-level BPE) or llama (SentencePiece)"
        )
    tokens = metadata.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise StorageError(f"{KEY}tokens is missing or not a list of strings")
    vocab: dict[str, int] = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocab[t] != i)
        raise StorageError(f"{KEY}tokens holds {twice[:80]!r} twice")
    types = _numbers(metadata, f"{KEY}token_type", "iu", len(tokens), TokenType.NORMAL).tolist()
    # unused rows at the end of the embedding table are padding of the model, not tokens
    for i in range(len(tokens) - 1, -1, -1):
        if types[i] != TokenType.UNUSED or tokens[i] != PADDING.format(i):
            break
        del vocab[tokens[i]]
    names = {}
    for key in dict.fromkeys((*NAMED.values(), *ENDS)):
        i = metadata.get(f"{KEY}{key}_token_id")
        if i is not None and (isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(tokens)):
            raise StorageError(f"{KEY}{key}_token_id is {shown(i)}; expected one of {len(tokens)} ids")
    for name, key in NAMED.items():
        if (i := metadata.get(f"{KEY}{key}_token_id")) is not None:
            names[f"{name}_token"] = tokens[i]
    try:
        raw, bos = (_byte_level if kind == "gpt2" else _sentencepiece)(metadata, vocab, names)
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in _of(tokens, types, special)])
        raw.add_tokens([AddedToken(t, normalized=False) for t in _of(tokens, types, (TokenType.USER_DEFINED,))])
    except (UserError, StorageError):
        raise
    except Exception as e:  # the library raises a bare Exception
        raise StorageError(f"the tokenizer in the file cannot be built: {' '.join(str(e).split())[:200]}") from None
    bos = _flag(metadata, f"{KEY}add_bos_token", bos)
    source = metadata.get("tokenizer.chat_template")
    chat = ChatTemplate(source=source, tokens=names) if isinstance(source, str) and source else None
    return Tokenizer(raw, bos=names.get("bos_token") if bos else None, eos=names.get("eos_token"), chat=chat)


def _of(tokens: list[str], types: list[int], wanted: tuple[int, ...]) -> list[str]:
    return [t for t, kind in zip(tokens, types, strict=True) if kind in wanted]


def _numbers(metadata: Mapping[str, Any], key: str, kinds: str, length: int, default: int | None = None) -> np.ndarray:
    """A number for each token. `kinds`: allowed dtypes, by numpy's one-letter kinds."""
    value = metadata.get(key, None if default is None else [default] * length)
    numbers = np.asarray(value) if isinstance(value, (list, np.ndarray)) else None
    if numbers is None or numbers.dtype.kind not in kinds:
        raise StorageError(f"{key} = {shown(value)}; expected a number for each token")
    if len(numbers) != length:
        raise StorageError(f"{key} has {len(numbers)} entries for {length} tokens")
    return numbers


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise StorageError(f"{key} = {shown(value)}; expected true or false")
    return value


def _byte_level(
    metadata: Mapping[str, Any], vocab: dict[str, int], names: Mapping[str, str]
) -> tuple[tokenizers.Tokenizer, bool]:
    name = named(metadata, f"{KEY}pre")
    cut = next((cut for cut in CUTS if name in cut.names), None)
    if cut is None:
        known = ", ".join(cut.names[0] for cut in CUTS)
        raise UserError(f"{KEY}pre = {name!r}: this rule for splitting text is not supported; expected one of {known}")
    merges = [tuple(pair.split(" ")) for pair in metadata.get(f"{KEY}merges", []) if pair != IMPOSSIBLE]
    if bad := next((pair for pair in merges if len(pair) != 2), None):
        raise StorageError(f"{KEY}merges holds {' '.join(bad)[:80]!r}; expected two tokens")
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.ignore_merges))
    if cut.rules[-1] == GPT2:
        last: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        last = [_split(cut.rules[-1]), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    steps = [*(_split(rule) for rule in cut.rules[:-1]), *last]
    raw.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    raw.decoder = decoders.ByteLevel()
    return raw, cut.bos


def _split(rule: str) -> Any:
    if rule == r"\p{N}":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(rule), "isolated")


def _sentencepiece(
    metadata: Mapping[str, Any], vocab: dict[str, int], names: Mapping[str, str]
) -> tuple[tokenizers.Tokenizer, bool]:
    scores = _numbers(metadata, f"{KEY}scores", "f", len(metadata[f"{KEY}tokens"]))
    merges = [
        (-float(scores[i]), vocab[token[:at]], vocab[token[at:]], token[:at], token[at:])
        for token, i in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    merges.sort(key=lambda m: m[:3])  # the best score first, as SentencePiece merges
    pairs = [m[3:] for m in merges]
    unknown = names.get("unk_token")
    raw = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = _flag(metadata, f"{KEY}add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    raw.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return raw, True


def to_gguf(tokenizer: Tokenizer, rows: int, ends: Sequence[int] = ()) -> dict[str, Any]:
    """The metadata of a tokenizer, padded with unused tokens to the rows of the model's embedding table.

    Args:
        ends: further tokens that end a text. A file has room for two besides EOS, one of them the end of a turn; those
            that do not fit are left out (`ends_of` says which are there).

    Raises:
        UserError: llama.cpp has no tokenizer that splits text as this one does; the message says what it lacks.
    """
    if tokenizer.rows > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.rows} ids but the model only {rows}: they do not belong together"
        )
    spec = json.loads(tokenizer.raw.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise UserError(f"a {model['type']} tokenizer cannot be written as GGUF; only BPE can")
    tokens = [PADDING.format(i) for i in range(rows)]
    types = [TokenType.UNUSED.value] * rows
    for token, i in ((token, i) for token, i in model["vocab"].items() if i < rows):
        is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[i], types[i] = token, (TokenType.BYTE if is_byte else TokenType.NORMAL).value
    for added in (added for added in spec["added_tokens"] if added["id"] < rows):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = (TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED).value
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    out: dict[str, Any] = {f"{KEY}tokens": tokens, f"{KEY}token_type": types}
    if model.get("byte_fallback"):
        if model.get("unk_token") in model["vocab"]:
            types[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN.value
        scores = _scores(merges, tokens)
        out |= {f"{KEY}model": "llama", f"{KEY}pre": "default", f"{KEY}scores": scores}
        out[f"{KEY}add_space_prefix"] = _space_prefix(spec)
    else:
        out |= {f"{KEY}model": "gpt2", f"{KEY}pre": _cut_of(spec).names[0], f"{KEY}add_space_prefix": False}
        out[f"{KEY}merges"] = [" ".join(pair) for pair in merges] or [IMPOSSIBLE]
    for name, key in NAMED.items():
        token = tokenizer.names.get(f"{name}_token")
        i = None if token is None else tokenizer.raw.token_to_id(token)
        if i is not None and i < rows:
            out[f"{KEY}{key}_token_id"] = i
    out |= {f"{KEY}add_bos_token": tokenizer.bos is not None, f"{KEY}add_eos_token": False}
    if tokenizer.chat is not None:
        out["tokenizer.chat_template"] = tokenizer.chat.source
    known = {out.get(f"{KEY}eos_token_id")}
    others = [i for i in dict.fromkeys((*turns(tokenizer), *ends)) if i not in known and 0 <= i < rows]
    if known == {None} and others:
        out[f"{KEY}eos_token_id"] = others.pop(0)
    return out | dict(zip((f"{KEY}{key}_token_id" for key in ENDS[1:]), others, strict=False))


def ends_of(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text or a turn in a file's metadata."""
    ids = (metadata.get(f"{KEY}{key}_token_id") for key in ENDS)
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool)))


def _cut_of(spec: Mapping[str, Any]) -> Cut:
    rules = _rules(spec["pre_tokenizer"])
    normal = spec["normalizer"]
    if normal is not None and normal["type"] != "NFC":  # llama.cpp does not normalize; NFC changes hardly any text
        raise UserError(f"a tokenizer with the normalizer {normal['type']} cannot be written as GGUF")
    merging = bool(spec["model"]["merges"])
    ignore = bool(spec["model"].get("ignore_merges"))
    for cut in CUTS:
        if not merging or (cut.rules == rules and cut.ignore_merges == ignore):
            return cut
    shown = " then ".join(rules) or "nothing"
    raise UserError(f"llama.cpp has no rule that splits text into words as this tokenizer does, by {shown[:200]}")


def _rules(pre: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The regular expressions by which a pre-tokenizer of tokenizer.json splits text."""
    match pre:
        case {"type": "Sequence", "pretokenizers": steps}:
            return tuple(rule for step in steps for rule in _rules(step))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses}:
            return (GPT2,) if uses else ()
        case {"type": "Digits", "individual_digits": True}:
            return (r"\p{N}",)
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
            return (rule,)
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Removed", "invert": True}:
            return (rule,)
    raise UserError(f"llama.cpp has no counterpart of the pre-tokenizer {json.dumps(pre)[:200]}")


def _scores(merges: Iterable[list[str]], tokens: list[str]) -> list[float]:
    """Scores that give the order of `merges`: SentencePiece merges the pair whose result has the best score, so each
    token gets minus the rank of the first merge that produces it."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return [-float(first[t]) if t in first else -1e6 for t in tokens]


def _space_prefix(spec: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    found = json.dumps([spec["normalizer"], spec["pre_tokenizer"]], ensure_ascii=False)
    if SPACE not in found:
        raise UserError(f"a BPE tokenizer that does not write a space as {SPACE} cannot be written as GGUF")
    return '"Prepend"' in found or '"prepend_scheme": "always"' in found or '"prepend_scheme": "first"' in found
