"""Layers in order become stages that compile fast, and are the same layers."""

from dataclasses import replace

import pytest
from models.tiny import tiny_llama

from slmjax.models.arrange import arranged

pytestmark = pytest.mark.fast

BLOCK = tiny_llama().pattern[0]
KINDS = {name: replace(BLOCK, mixer=replace(BLOCK.mixer, window=ord(name))) for name in "abcd"}


@pytest.mark.parametrize(
    ("layers", "stages"),
    [
        ("a", [("a", 1)]),
        ("aaaa", [("a", 4)]),
        ("ababab", [("ab", 3)]),
        ("abababa", [("ab", 3), ("a", 1)]),
        ("aaabbbb", [("a", 3), ("b", 4)]),
        ("aaaaab" * 4 + "aa", [("aaaaab", 4), ("a", 2)]),
        ("aaab" * 9, [("aaab", 9)]),
        ("abcd", [("abcd", 1)]),
        ("aaaaab", [("a", 5), ("b", 1)]),
    ],
)
def test_stages(layers, stages):
    found = arranged([KINDS[name] for name in layers])
    assert [(stage.pattern, stage.repeats) for stage in found] == [
        (tuple(KINDS[name] for name in pattern), repeats) for pattern, repeats in stages
    ]
    assert [b for stage in found for b in stage.pattern * stage.repeats] == [KINDS[name] for name in layers]
