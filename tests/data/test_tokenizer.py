"""Parity with the bare `tokenizers` library, the policy of BOS and EOS, and files that load again."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from slmjax.data.tokenizer import BOS, BPE, EOS, Bytes, File, Tokenizer
from slmjax.errors import DataError

pytestmark = pytest.mark.fast

CORPUS = ["the white whale sailed the white sea", "the old captain and the white ship", "über Straße 鲸鱼 🐳"] * 20


@pytest.fixture(scope="module")
def bpe():
    from pathlib import Path

    return BPE(vocab=320).make(CORPUS, Path())


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_the_bytes_of_utf8(text):
    tokenizer = bytes_tokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def bytes_tokenizer(made=[]):  # noqa: B006
    from pathlib import Path

    if not made:
        made.append(Bytes().make([], Path()))
    return made[0]


def test_bytes_have_258_ids():
    tokenizer = bytes_tokenizer()
    assert (tokenizer.vocab, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.dtype == np.uint16


def test_bpe_equals_the_bare_library(bpe):
    bare = tokenizers.Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, min_frequency=2, special_tokens=[BOS, EOS], initial_alphabet=letters),
    )
    for text in [*CORPUS, "unseen words: zyxwv", ""]:
        assert bpe.encode(text) == bare.encode(text).ids
        assert bpe.decode(bpe.encode(text)) == text


def test_training_is_deterministic(bpe):
    from pathlib import Path

    assert BPE(vocab=320).make(CORPUS, Path()).fingerprint == bpe.fingerprint


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6))
def test_documents_are_bos_text_eos(texts):
    tokenizer = bytes_tokenizer()
    flat, lengths = tokenizer.documents(texts)
    pieces = np.split(flat, np.cumsum(lengths))[:-1]
    assert [p.tolist() for p in pieces] == [[256, *t.encode(), 257] for t in texts]
    assert flat.dtype == np.uint16


def test_text_never_becomes_a_special_token(bpe):
    ids = bpe.encode(f"end {EOS}{BOS}")
    assert not {bpe.bos_id, bpe.eos_id} & set(ids)
    assert bpe.decode(ids) == f"end {EOS}{BOS}"
    assert bpe.encode("x", bos=True, eos=True) == [bpe.bos_id, *bpe.encode("x"), bpe.eos_id]


def test_special_tokens_that_no_text_becomes_need_no_rows(bpe):
    raw = bpe.raw.from_str(bpe.raw.to_str())
    size = raw.get_vocab_size()
    raw.add_special_tokens(["<image>"])
    assert Tokenizer(raw, bos=bpe.bos, eos=bpe.eos).rows == size
    assert Tokenizer(raw, bos=bpe.bos, eos="<image>").rows == size + 1
    raw.add_tokens(["a word of its own"])
    assert Tokenizer(raw, bos=bpe.bos, eos=bpe.eos).rows == Tokenizer(raw, bos=bpe.bos, eos=bpe.eos).vocab == size + 2


def test_saved_and_loaded(bpe, tmp_path):
    bpe.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.bos, again.eos, again.vocab) == (bpe.fingerprint, BOS, EOS, bpe.vocab)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == BOS
    # a prompt gets its BOS from tokenizer.json itself, as `transformers` does it
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a").ids[0] == bpe.bos_id


def test_the_fingerprint_covers_bos_and_eos(bpe, tmp_path):
    bpe.save(tmp_path)
    assert File(path="tokenizer.json", eos="").make([], tmp_path).fingerprint != bpe.fingerprint
    assert File(path=".").make([], tmp_path).fingerprint == bpe.fingerprint


def test_no_bos_where_there_is_none(bpe, tmp_path):
    bpe.save(tmp_path)
    tokenizer = File(path="tokenizer.json", bos="").make([], tmp_path)
    flat, _ = tokenizer.documents(["a"])
    assert flat.tolist() == [*bpe.encode("a"), bpe.eos_id]


def test_errors(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer.json: no such tokenizer"):
        File(path="tokenizer.json").make([], tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.json"):
        File(path="tokenizer.json").make([], tmp_path)
    bytes_tokenizer().save(tmp_path)
    with pytest.raises(DataError, match="special token '</s>' is not in the vocabulary"):
        File(path="tokenizer.json", eos="</s>").make([], tmp_path)
    with pytest.raises(DataError, match=r"BPE.vocab is 100; it needs at least 258"):
        BPE(vocab=100)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ('{"bos_token": 1}', "bos_token is 1; expected a string"),
        ('{"eos_token": {"lstrip": false}}', "eos_token is {'lstrip': False}; expected a string"),
        ('{"eos_token": {"content": ["x"]}}', "eos_token is"),
    ],
)
def test_a_malformed_tokenizer_config_is_named(tmp_path, text, words):
    bytes_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        Tokenizer.load(tmp_path)
    assert "tokenizer_config.json: " in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
