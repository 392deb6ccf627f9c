"""Importance of layers, channels and heads against loops in numpy, and which are kept."""

import numpy as np
import pytest

from slmjax.compress.prune.structured import (
    block_influence,
    channel_importance,
    groups_of,
    head_importance,
    most_important,
    most_important_heads,
)
from slmjax.errors import UserError

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)


def test_block_influence():
    blocks = RNG.normal(size=(4, 2, 5, 8)).astype(np.float32)
    blocks[2] = 3.0 * blocks[1]  # layer 1 only scales, layer 2 turns round
    blocks[3] = -blocks[2]
    found = np.asarray(block_influence(blocks))
    cosines = [
        np.dot(blocks[0, b, t], blocks[1, b, t]) / np.linalg.norm(blocks[0, b, t]) / np.linalg.norm(blocks[1, b, t])
        for b in range(2)
        for t in range(5)
    ]
    np.testing.assert_allclose(found, [1 - np.mean(cosines), 0.0, 2.0], atol=1e-6)


def test_padding_does_not_count():
    blocks, weights = RNG.normal(size=(3, 2, 6, 8)).astype(np.float32), np.ones((2, 6), np.float32)
    weights[:, 4:] = 0.0
    for function in (block_influence, channel_importance):
        np.testing.assert_allclose(function(blocks, weights), function(blocks[:, :, :4]), rtol=1e-5)
        assert not np.allclose(function(blocks, weights), function(blocks))


def test_channels_and_heads():
    a = RNG.normal(size=(3, 5, 7)).astype(np.float32)
    expected = [np.sqrt(sum(np.mean([abs(a[b, t, c]) for t in range(5)]) ** 2 for b in range(3))) for c in range(7)]
    np.testing.assert_allclose(channel_importance(a), expected, rtol=1e-5)
    heads = RNG.normal(size=(3, 5, 4, 8)).astype(np.float32)
    lengths = np.sqrt(np.square(heads).sum(-1))
    np.testing.assert_allclose(head_importance(heads), np.sqrt(np.square(lengths.mean(1)).sum(0)), rtol=1e-5)
    np.testing.assert_allclose(head_importance(np.stack([heads, 2 * heads]))[1], 2 * head_importance(heads), rtol=1e-5)


def test_the_most_important_in_order():
    assert most_important([0.1, 3.0, 2.0, 3.0, 0.2], 3) == (1, 2, 3)
    assert most_important([1.0, 1.0, 1.0], 2) == (0, 1)


def test_heads_stay_in_groups():
    importance = [5.0, 1.0, 2.0, 1.0, 1.0, 1.0, 4.0, 4.5, 0.0]  # three groups of three
    assert most_important_heads(importance, 3, keep=6, keep_kv=3) == (0, 2, 3, 4, 6, 7)
    assert most_important_heads(importance, 3, keep=4, keep_kv=2) == (0, 2, 6, 7)
    assert most_important_heads(importance, 3, keep=2, keep_kv=2) == (0, 7)
    assert groups_of((0, 2, 6, 7), 9, 3) == (0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: most_important([1.0, 2.0], 3), "keep is 3; expected 1 to 2"),
        (lambda: most_important_heads([1.0] * 6, 3, keep=5, keep_kv=3), "keep is 5 and keep_kv 3"),
        (lambda: most_important_heads([1.0] * 6, 3, keep=6, keep_kv=2), "1 to 2 each"),
        (lambda: most_important_heads([1.0] * 6, 4, keep=4, keep_kv=4), "does not divide the 6 heads"),
        (lambda: groups_of((0, 1, 3), 6, 2), "unequal numbers of heads"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
