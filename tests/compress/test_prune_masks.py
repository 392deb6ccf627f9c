"""Masks against loops in numpy: exact counts, ties, and N of M along the inputs whatever the order of dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.compress.prune.layout import from_matrices, prunable, to_matrices
from slmjax.compress.prune.masks import Global, NOfM, PerLayer, PerRow, lowest, share
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.tree import flatten

pytestmark = pytest.mark.fast

DECODER = llama(layers=2, width=32, heads=4, kv_heads=2, hidden=48, vocab=64, context=16, tied=True)
MODEL = DECODER.build()
PATHS = ("layers/attn/q", "layers/attn/o", "layers/mlp/down", "embed/table")


def weights(paths=PATHS):
    axes = prunable(MODEL.axes, paths)
    flat = flatten(MODEL.init(jax.random.key(0)))
    return {path: flat[path] for path in axes}, axes


def by_hand(path, w):
    """[..., out, in] of each of these parameters, spelled out."""
    w = np.asarray(w)
    layers = w.shape[0]
    return {
        "layers/attn/q": lambda: w.reshape(layers, 32, 32).swapaxes(1, 2),  # [D, (H, K)]
        "layers/attn/o": lambda: w.reshape(layers, 32, 32).swapaxes(1, 2),  # [(H, K), D]
        "layers/mlp/down": lambda: w.swapaxes(1, 2),  # [F, D]
        "embed/table": lambda: w[None],  # [V, D]: a token's logit sums over D
    }[path]()


def lowest_by_hand(scores, count):
    """bool [n]: by sorting (score, index) pairs."""
    out = np.zeros(len(scores), bool)
    for _, i in sorted((s, i) for i, s in enumerate(scores))[:count]:
        out[i] = True
    return out


@pytest.mark.parametrize("path", PATHS)
def test_matrices_are_outputs_by_inputs_and_back(path):
    flat, axes = weights()
    matrices = to_matrices(flat[path], axes[path], path)
    np.testing.assert_array_equal(matrices, by_hand(path, flat[path]))
    np.testing.assert_array_equal(from_matrices(matrices, flat[path].shape, axes[path], path), flat[path])


@pytest.mark.parametrize("count", [0, 1, 7, 24, 25])
def test_lowest_is_exact_with_ties_inside_jit(count):
    scores = np.random.default_rng(0).integers(0, 4, (6, 25)).astype(np.float32)  # few values: ties everywhere
    pruned = jax.jit(lowest)(scores, jnp.int32(count))
    np.testing.assert_array_equal(pruned, [lowest_by_hand(row, count) for row in scores])


def test_equal_weights_lose_the_first():
    assert np.asarray(lowest(jnp.ones((1, 10)), 5))[0].tolist() == [True] * 5 + [False] * 5


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("scope", [PerLayer(), PerRow()], ids=lambda s: type(s).__name__)
def test_per_layer_and_per_row(scope, sparsity):
    flat, axes = weights()
    masks = scope.keep({path: jnp.abs(w) for path, w in flat.items()}, axes, share(sparsity))
    for path, w in flat.items():
        for matrix, mask in zip(by_hand(path, np.abs(w)), by_hand(path, masks[path]), strict=True):
            rows = [(matrix.ravel(), mask.ravel())] if scope == PerLayer() else zip(matrix, mask, strict=True)
            for scores, kept in rows:
                count = round(sparsity * kept.size)
                assert (~kept).sum() == count
                np.testing.assert_array_equal(np.sort(scores[~kept]), np.sort(scores)[:count])


def test_global_ranks_all_matrices_together():
    flat, axes = weights(("layers/attn/[qo]", "layers/mlp/down"))
    flat = {path: w * factor for (path, w), factor in zip(flat.items(), (1.0, 2.0, 4.0), strict=True)}
    masks = jax.jit(lambda flat: Global().keep({p: jnp.abs(w) for p, w in flat.items()}, axes, share(0.4)))(flat)
    scores = np.concatenate([np.abs(w).ravel() for w in flat.values()])
    kept = np.concatenate([np.asarray(masks[path]).ravel() for path in flat])
    np.testing.assert_array_equal(~kept, lowest_by_hand(scores, round(0.4 * scores.size)))
    lost = [1 - np.mean(masks[path]) for path in flat]
    assert max(lost) > 0.6, "matrices of small weights lose more"
    assert min(lost) < 0.25


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("path", PATHS)
def test_n_of_m_along_the_inputs(path, m):
    flat, axes = weights()
    mask = NOfM(m=m).keep({path: jnp.abs(flat[path])}, axes, share(0.5))[path]
    kept, scores = by_hand(path, mask), by_hand(path, np.abs(flat[path]))
    groups, of_scores = kept.reshape(-1, m), scores.reshape(-1, m)
    assert np.all(groups.sum(1) == m // 2)
    assert all(s[k].min() > s[~k].max() for s, k in zip(of_scores, groups, strict=True))
    across = kept.swapaxes(1, 2).reshape(-1, m)  # the groups of a kernel whose dimensions were mistaken
    assert np.any(across.sum(1) != m // 2)


def test_a_kernel_of_inputs_by_outputs_is_not_mistaken():
    """down [F, D] whose outputs have very different sizes: 2:4 along D would empty whole outputs."""
    axes = ("layers", "mlp", "embed")
    w = jnp.ones((1, 8, 4)) * jnp.asarray([1.0, 2.0, 3.0, 4.0])
    w = w.at[0, ::4].mul(0.5).at[0, 1::4].mul(0.25)
    mask = np.asarray(NOfM(m=4).keep({"w": w}, {"w": axes}, share(0.5))["w"])[0]
    np.testing.assert_array_equal(mask, np.tile([[False], [False], [True], [True]], (2, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prunable(MODEL.axes, ("final_norm/*",)), "final_norm/scale has the axes embed, so it is not a matrix"),
        (lambda: prunable(MODEL.axes, ("layers/attn/w",)), "matches no parameter"),
        (lambda: NOfM(m=1), "scope.m is 1"),
        (lambda: NOfM(m=4).check(0.3), "0.3, which is not a whole number of every 4"),
        (lambda: NOfM(m=5).keep(*weights(("layers/attn/q",)), share(0.4)), "does not divide the 32 input channels"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
