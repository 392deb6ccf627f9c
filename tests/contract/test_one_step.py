"""Loss, gradients and three AdamW steps against torch: fp32, several documents a row, uneven weights."""

import jax
import numpy as np
import pytest
from contract.shapes import DECODERS, perturbed

from slmjax.convert.hf import family_of, write_hf
from slmjax.convert.table import to_theirs
from slmjax.nn.compute import Compute
from slmjax.objectives import NextToken
from slmjax.optim.recipes import AdamW
from slmjax.optim.schedules import Constant
from slmjax.train.state import init_state
from slmjax.train.step import SKIP, make_step
from slmjax.types import Batch
from slmjax.views import Identity

NOT_DECAYED = ["bias", "norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"]
STEPS, LR, BETAS, DECAY, CLIP = 3, 0.01, (0.9, 0.95), 0.1, 0.5
EPS = 1e-3  # large: a key's bias has a gradient of exactly 0, and Adam would blow the rounding noise up to a full step


def packed(vocab, rows=4, length=24, seed=0):
    """Rows of two documents and padding; every row has another share of weights, one has none at all."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1), dtype=np.int32)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    weights = np.zeros((rows, length), np.float32)
    for i in range(rows):
        first, end = 5 + 3 * i, length - 2 * i
        segments[i, :first], segments[i, first:end] = 1, 2
        positions[i, :first], positions[i, first:end] = np.arange(first), np.arange(end - first)
        weights[i, : end - 1] = rng.random(end - 1) < 0.3 * i
        weights[i, first - 1] = 0
    assert weights[0].sum() == 0
    assert len({w.sum() for w in weights}) == rows
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, segments)


def attend(batch):
    """[B, T, T]: 1 where i sees j. Padding sees itself, so that no softmax is empty."""
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    return np.tril(same).astype(np.int32)


@pytest.mark.parametrize(
    "name",
    [
        "llama, grouped-query, tied",
        "llama, multi-query, free head_dim, biases, gelu",
        "gpt2, tied",
        "gpt2, untied, odd width of the mlp",
    ],
)
def test_loss_gradients_and_adamw_are_those_of_torch(tmp_path, reference, name):
    decoder = DECODERS[name]
    params = perturbed(decoder)
    write_hf(tmp_path, decoder, params)
    rows = family_of(decoder).rows(decoder)
    batch = packed(decoder.vocab)
    model = decoder.build(Compute(dtype="float32"))
    objective, view = NextToken().build(model), Identity().build(model.axes)
    optimizer = AdamW(b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=DECAY, clip_norm=CLIP).build(
        Constant(peak_lr=LR).build(STEPS), model.axes
    )
    key = jax.random.key(0)

    arrays = {"tokens": batch.tokens, "targets": batch.targets, "positions": batch.positions, "weights": batch.weights}
    scalars, theirs_gradients, theirs_params = reference.train(
        tmp_path, {**arrays, "attend": attend(batch)}, steps=STEPS, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY,
        clip_norm=CLIP, no_decay=NOT_DECAYED,
    )  # fmt: skip

    (loss, _), gradients = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(params, (), batch, key)
    np.testing.assert_allclose(loss, scalars["loss"][0], rtol=1e-5)
    ours_gradients = dict(to_theirs(rows, gradients))
    assert ours_gradients.keys() == theirs_gradients.keys()
    largest = max(np.abs(g).max() for g in theirs_gradients.values())
    for name, g in ours_gradients.items():
        np.testing.assert_allclose(g, theirs_gradients[name], rtol=1e-4, atol=1e-5 * largest, err_msg=name)

    assert scalars["grad_norm"][0] > CLIP, "clipping would not be tested"
    step = jax.jit(make_step(objective, optimizer, view, key))
    state = init_state(lambda _: params, optimizer, view, SKIP, key)
    for i in range(STEPS):
        state, metrics = step(state, (), batch)
        np.testing.assert_allclose(metrics["loss"], scalars["loss"][i], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], scalars["grad_norm"][i], rtol=1e-4)
    before = dict(to_theirs(rows, params))
    for name, x in to_theirs(rows, state.params):
        moved = np.abs(theirs_params[name] - before[name]).max()
        np.testing.assert_allclose(x, theirs_params[name], rtol=0, atol=1e-6 + 1e-3 * moved, err_msg=name)
