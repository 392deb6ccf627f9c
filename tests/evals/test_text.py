"""Streaming text: the pieces make the whole, characters are never torn, stop strings never shown."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from slmjax.errors import UserError
from slmjax.evals.text import Detokenizer, StopStrings, token_bytes

pytestmark = pytest.mark.fast


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the naïve café 東京 😀"] * 4, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    pieces = ["<unk>", "▁the", "▁cat", "s", "▁", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTES, PIECES = byte_level(), sentencepiece_like()


def stream(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    texts = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(bounds)]
    return [*texts, detokenizer.close()]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=80), st.lists(st.integers(0, 1000), max_size=20))
def test_any_tokens_any_cuts_join_to_the_decoding(ids, cuts):
    """Random byte-level tokens are mostly invalid UTF-8: the hard case."""
    assert "".join(stream(Detokenizer(BYTES), ids, cuts)) == BYTES.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
@example("日本語" * 30)
@example("e\u0301😀👩‍👩‍👧‍👦")
def test_valid_text_is_never_torn(text):
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push([i]) for i in BYTES.encode(text).ids]
    assert "".join(pieces) + detokenizer.close() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_over_several_tokens_comes_out_whole():
    ids = BYTES.encode("a😁").ids
    assert len(ids) > 3
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push([i]) for i in ids] == ["a", *[""] * (len(ids) - 2), "😁"]


def test_byte_fallback_and_leading_spaces():
    the, cat, s = (PIECES.token_to_id(t) for t in ("▁the", "▁cat", "s"))
    kyo = [PIECES.token_to_id(f"<0x{b:02X}>") for b in "京".encode()]
    assert Detokenizer(PIECES).push([the]) == "the"
    after_prompt = Detokenizer(PIECES, prompt=[the])
    assert [after_prompt.push([i]) for i in [cat, s, *kyo]] == [" cat", "s", "", "", "京"]
    long = [the, cat, s, *kyo] * 30
    assert "".join(stream(Detokenizer(PIECES), long, list(range(180)))) == PIECES.decode(long)


def test_special_tokens_are_skipped_and_the_window_stays_short():
    eot = BYTES.token_to_id("<|endoftext|>")
    detokenizer = Detokenizer(BYTES)
    ids = BYTES.encode("the cat sat on the mat " * 40).ids
    assert "".join(detokenizer.push([i, eot]) for i in ids).strip() == ("the cat sat on the mat " * 40).strip()
    assert len(detokenizer.window) < 40


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 1000), max_size=12),
)
def test_stop_strings_wherever_the_cuts_are(text, stops, cuts):
    """Against the definition: the first stop string to be complete, cut before its beginning."""
    ends = [(end, end - len(s)) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    expected = text[: min(ends)[1]] if ends else text
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    stopper = StopStrings(stops)
    shown = ""
    for a, b in itertools.pairwise(bounds):
        shown += stopper.push(text[a:b])
        assert expected.startswith(shown)
    assert shown + stopper.close() == expected
    assert stopper.stopped == bool(ends)


def test_text_that_cannot_become_a_stop_string_is_shown_at_once():
    stopper = StopStrings(["\n\n", "User:"])
    assert stopper.push("Hello\nUs") == "Hello\n"
    assert stopper.push("eful") == "Useful"
    assert stopper.push(".\n") == "."
    assert stopper.push("\nmore") == ""
    assert stopper.stopped


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="empty"):
        StopStrings([""])


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(text):
    sizes = token_bytes(BYTES)
    assert sum(sizes[i] for i in BYTES.encode(text).ids) == len(text.encode())


def test_bytes_of_special_and_fallback_tokens():
    assert token_bytes(BYTES)[BYTES.token_to_id("<|endoftext|>")] == 0
    sizes = token_bytes(PIECES)
    assert [sizes[PIECES.token_to_id(t)] for t in ("▁the", "s", "<0xE4>")] == [4, 1, 1]
