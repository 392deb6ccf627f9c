"""Metadata of GGUF files that are of the wrong kind, and scalings that old files say otherwise."""

import pathlib

import pytest
from contract.shapes import perturbed

from slmjax.convert.gguf.activations import rounding
from slmjax.convert.gguf.gate import _compare
from slmjax.convert.gguf.load import import_gguf, write_gguf
from slmjax.data.tokenizer import Bytes, Tokenizer
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.nn.rope_scaling import LinearScaling

pytestmark = pytest.mark.fast

DECODER = llama(layers=1, width=32, heads=2, kv_heads=1, hidden=32, vocab=262, context=64)
PARAMS = perturbed(DECODER)
LIST = [1, 2]


@pytest.fixture
def written(tmp_path):
    """metadata -> a file of `DECODER` with it besides, or in place of its own."""
    made = Bytes().make([], pathlib.Path())

    def write(**about):
        file = tmp_path / "a.gguf"
        write_gguf(file, DECODER, PARAMS, tokenizer=Tokenizer(made.raw, bos=made.bos, eos=made.eos), about=about)
        return file

    return write


@pytest.mark.parametrize(
    ("about", "scaling"),
    [
        ({"llama.rope.scale_linear": 4.0}, LinearScaling(factor=4.0)),
        ({"llama.rope.scaling.factor": 4.0}, LinearScaling(factor=4.0)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, LinearScaling(factor=2.0)),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({}, None),
    ],
)
def test_a_factor_without_a_kind_is_linear_as_in_llama_cpp(written, about, scaling):
    assert import_gguf(written(**about)).decoder.pattern[0].mixer.position.scaling == scaling


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"split.count": LIST}, "it is one of array"),
        ({"split.count": "many"}, "it is one of 'many' parts"),
        ({"llama.rope.scaling.type": LIST}, "llama.rope.scaling.type = array([1, 2]"),
        ({"llama.rope.scaling.factor": LIST}, "llama.rope.scaling.factor = array([1, 2]"),
        ({"llama.rope.scaling.original_context_length": "x"}, "original_context_length = 'x'"),
        ({"llama.something": [str(i) for i in range(1000)]}, "llama.something = ['0', '1'"),
    ],
)
def test_what_is_of_another_kind_is_refused_in_a_short_line(written, about, message):
    with pytest.raises(UserError) as error:
        import_gguf(written(**about))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert str(error.value).count("a.gguf") == 1


def test_probabilities_that_are_no_numbers_fail_the_gate():
    made = Bytes().make([], pathlib.Path())
    tokenizer = Tokenizer(made.raw, bos=made.bos, eos=made.eos)
    for value, passed in ((float("nan"), False), (0.0, True)):
        rows = [{"tokens": [5], "top": [[[0, value], [1, value]]]}]
        given = ("llama.cpp", DECODER, PARAMS, [[1, 2, 3]], rows, 1, 1e6, tokenizer)
        assert [check.passed for check in _compare(*given)] == [passed]
        quantized = _compare(*given, rounding({}, "float32"))
        assert [check.passed for check in quantized] == [passed, False], "log p = 0 of two tokens is no distribution"
