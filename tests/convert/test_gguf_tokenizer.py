"""Tokenizers in GGUF metadata: there and back, and the ids of stock llama.cpp."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from contract.shapes import perturbed
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from slmjax.convert.gguf import gate as gguf_gate
from slmjax.convert.gguf.load import write_gguf
from slmjax.convert.gguf.tokenizer import CUTS, GPT2, from_gguf, to_gguf
from slmjax.data.tokenizer import BPE, Bytes, Tokenizer
from slmjax.errors import StorageError, UserError
from slmjax.models.families.llama import llama

TEXT = (pathlib.Path(__file__).with_name("wikipedia") / "leads.txt").read_text("utf-8")
PROBES = [
    "The quick brown fox.", "naïve café, 北京 🙂", "  def f(x):\n\treturn x + 1\n", "a", "1234567 3.14 don't I'LL",
    "Ünïcödé ＷＩＤＥ\u00a0space", "line\r\n\r\n  end  ", "x_y-z/!?… «quote» ¼ ²", " \n \n", TEXT[:600],
]  # fmt: skip
ROWS = 700


def byte_level(cut):
    """A byte-level BPE trained on text that is cut into words by the rules of one of llama.cpp's."""
    raw = tokenizers.Tokenizer(models.BPE(ignore_merges=cut.ignore_merges))
    rules = [pre_tokenizers.Digits(individual_digits=True)] if cut.rules[0] == r"\p{N}" else []
    whole = cut.rules[-1] == GPT2
    if not whole:
        rules.append(pre_tokenizers.Split(tokenizers.Regex(cut.rules[-1]), "isolated"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [*rules, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator([TEXT, *PROBES], trainer)
    return Tokenizer(raw, bos="<s>", eos="</s>")


def sentencepiece(prefix=True):
    """BPE as SentencePiece makes it: a space is U+2581, what is not in the vocabulary falls back to bytes."""
    raw = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=special, show_progress=False)
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    raw.train_from_iterator([" ".join(w for w in TEXT.split() if w.isascii())], trainer)
    spec = json.loads(raw.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    spec["pre_tokenizer"] = None
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), bos="<s>", eos="</s>")


MADE = {cut.names[0]: (lambda cut=cut: byte_level(cut)) for cut in CUTS}
MADE |= {
    "bytes, no merges": lambda: Bytes().make([], pathlib.Path()),
    "our own BPE": lambda: BPE(vocab=640).make([TEXT], pathlib.Path()),
    "sentencepiece": sentencepiece,
    "sentencepiece without a first space": lambda: sentencepiece(prefix=False),
}


@pytest.fixture(scope="module")
def llama_cpp(reference, tmp_path_factory):
    """Ids of the texts by stock llama.cpp, in a model with this tokenizer."""
    decoder = llama(layers=1, width=32, heads=2, kv_heads=1, hidden=32, vocab=ROWS, context=64)
    params = perturbed(decoder)

    def encode(tokenizer, texts):
        out = tmp_path_factory.mktemp("tokenizer") / "a.gguf"
        write_gguf(out, decoder, params, tokenizer=tokenizer)
        request = {"prompts": [[1, 2, 3]], "new_tokens": 1, "top": 1, "texts": texts}
        answer = gguf_gate._run(out, reference.python, request)
        assert answer is not None
        return answer["encoded"]

    return encode


@pytest.mark.parametrize("name", MADE)
def test_there_and_back_and_in_llama_cpp(llama_cpp, name):
    tokenizer = MADE[name]()
    expected = [tokenizer.encode(text, bos=True) for text in PROBES]
    if "bytes" not in name:
        assert sum(map(len, expected)) < 0.8 * sum(len(text.encode()) for text in PROBES), "it merges"
    back = from_gguf(to_gguf(tokenizer, ROWS))
    assert [back.encode(text, bos=True) for text in PROBES] == expected
    assert (back.bos_id, back.eos_id, back.vocab) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab)
    assert [back.decode(ids) for ids in expected] == [tokenizer.decode(ids) for ids in expected]
    if "sentencepiece" not in name:
        assert [back.decode(ids) for ids in expected] == PROBES
    assert llama_cpp(tokenizer, PROBES) == expected


def test_added_tokens_keep_their_kind():
    raw = byte_level(CUTS[0]).raw
    raw.add_tokens([tokenizers.AddedToken("<plain>", normalized=False)])
    raw.add_special_tokens(["<|turn|>"])
    tokenizer = Tokenizer(raw, bos=None, eos="</s>")
    about = to_gguf(tokenizer, ROWS)
    kinds = dict(zip(about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<plain>"], kinds["<|turn|>"], kinds["</s>"], kinds["a"], kinds[f"[PAD{ROWS - 1}]"]) == (
        4,
        3,
        3,
        1,
        5,
    )
    assert about["tokenizer.ggml.add_bos_token"] is False
    back = from_gguf(about)
    for text in ("a<plain>b", "a<|turn|>b"):
        assert back.encode(text) == tokenizer.encode(text)
        assert back.encode_template(text) == tokenizer.encode_template(text)
    fewer = to_gguf(tokenizer, tokenizer.rows)["tokenizer.ggml.tokens"]  # of a model without a row for <|turn|>
    assert fewer == about["tokenizer.ggml.tokens"][: tokenizer.vocab - 1]


def changed(tokenizer, **fields):
    spec = json.loads(tokenizer.raw.to_str())
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps({**spec, **fields})), bos=None, eos=None)


def test_what_llama_cpp_cannot_tokenize_is_refused():
    ours = BPE(vocab=640).make([TEXT], pathlib.Path())
    unigram = tokenizers.Tokenizer(models.Unigram([("a", -1.0)], unk_id=0))
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for tokenizer, message in (
        (Tokenizer(unigram, bos=None, eos=None), "a Unigram tokenizer cannot be written as GGUF"),
        (changed(ours, normalizer={"type": "Lowercase"}), "with the normalizer Lowercase"),
        (changed(ours, pre_tokenizer={"type": "Whitespace"}), "no counterpart of the pre-tokenizer"),
        (changed(ours, pre_tokenizer=whole), "no rule that splits text into words as this tokenizer does, by nothing"),
    ):
        with pytest.raises(UserError, match=message):
            to_gguf(tokenizer, ROWS)
    with pytest.raises(UserError, match="has 640 ids but the model only 100"):
        to_gguf(ours, 100)


def test_metadata_that_contradicts_itself_is_refused():
    about = to_gguf(BPE(vocab=640).make([TEXT], pathlib.Path()), ROWS)
    spm = to_gguf(sentencepiece(), ROWS)
    for metadata, message in (
        ({**about, "tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({**about, "tokenizer.ggml.merges": ["a b c"]}, "expected two tokens"),
        ({**about, "tokenizer.ggml.merges": ["nothing there"]}, "the tokenizer in the file cannot be built"),
        ({**about, "tokenizer.ggml.bos_token_id": -1}, "bos_token_id is -1"),
        ({**spm, "tokenizer.ggml.scores": np.zeros(3)}, "scores has 3 entries for 700 tokens"),
    ):
        with pytest.raises(StorageError, match=message):
            from_gguf(metadata)
