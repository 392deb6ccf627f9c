"""Losses in pieces against whole logits in float64, against torch, and what they keep in memory and send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from losses.jaxprs import largest, shapes

from slmjax.losses.next_token import cross_entropy, next_token
from slmjax.losses.pieces import token_values, weighted_means, weighted_sums

pytestmark = pytest.mark.fast

B, T, D, E, V = 3, 20, 8, 6, 50
"""E: width of the teacher"""


def unembed(params, hidden):
    return hidden @ params["table"].T


def divergence(student, teacher):
    """KL(teacher || student) a token, in nats, from logits [..., V]."""
    teacher, student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def case(dtype=np.float64, seed=0, b=B, t=T, v=V):
    """params, hidden, inputs (targets, and a teacher's hidden states), weights, the teacher's params."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    inputs = {"targets": jnp.asarray(rng.integers(0, v, (b, t)), jnp.int32), "teacher": draw(b, t, E)}
    weights = jnp.asarray(rng.random((b, t)) * (rng.random((b, t)) > 0.3), dtype)
    return {"table": draw(v, D)}, draw(b, t, D), inputs, weights, {"table": draw(v, E)}


def distilled(teacher, temperature):
    """Cross-entropy and divergence from the teacher at a temperature."""

    def per_token(logits, inputs):
        other = unembed(teacher, inputs["teacher"])
        kl = temperature**2 * divergence(logits / temperature, other / temperature)
        return {**cross_entropy(logits, inputs["targets"]), "kl": kl}

    return per_token


@pytest.mark.parametrize(
    ("chunk", "jit"), [(None, jax.jit), (1, jax.jit), (6, jax.jit), (64, jax.jit), (6, lambda f: f)]
)
def test_sums_and_all_gradients_are_those_of_whole_logits(chunk, jit):
    """Of everything that is read: both hidden states, both tables, a temperature that is learned, and the factors."""
    with jax.enable_x64(True):
        params, hidden, inputs, weights, teacher = case()
        factors = {"loss": jnp.float64(0.25), "kl": jnp.float64(0.75)}

        def pieces(params, hidden, teacher_hidden, teacher, temperature, factors):
            given = {**inputs, "teacher": teacher_hidden}
            return weighted_sums(
                distilled(teacher, temperature), unembed, params, hidden, given, weights, factors=factors, chunk=chunk
            )

        def whole(params, hidden, teacher_hidden, teacher, temperature, factors):
            given = {**inputs, "teacher": teacher_hidden}
            found = distilled(teacher, temperature)(unembed(params, hidden), given)
            sums = {name: jnp.sum(weights * x) for name, x in found.items()} | {"weight": jnp.sum(weights)}
            return sum(factors[name] * sums[name] for name in factors), sums

        args = (params, hidden, inputs["teacher"], teacher, jnp.float64(2.0), factors)
        (got, sums), gradient = jit(jax.value_and_grad(pieces, argnums=range(6), has_aux=True))(*args)
        (expected, parts), wanted = jax.value_and_grad(whole, argnums=range(6), has_aux=True)(*args)
        assert sums.keys() == parts.keys() == {"loss", "z_loss", "accuracy", "kl", "weight"}
        close((got, sums, gradient), (expected, parts, wanted))
        assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradient))
        alone = jit(pieces)(*args)  # without a gradient it is another program
        close(alone, (expected, parts))


def close(got, expected, rtol=1e-11):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, expected)


def preference(log_probs, reference, weights):
    """Rafailov et al. 2023, arXiv:2305.18290, equation 7: rows 0, 2, ... are preferred to rows 1, 3, ..."""
    margin = jnp.sum(weights * (log_probs - reference), axis=1)
    return -jnp.mean(jax.nn.log_sigmoid(0.1 * (margin[::2] - margin[1::2])))


@pytest.mark.parametrize("chunk", [None, 6])
def test_a_preference_loss_has_the_gradient_of_whole_logits(chunk):
    with jax.enable_x64(True):
        params, hidden, inputs, weights, _ = case(b=4)
        reference = jnp.asarray(np.random.default_rng(1).normal(size=(4, T)))
        live = (weights != 0).astype(jnp.float64)
        per_token = lambda logits, targets: -cross_entropy(logits, targets)["loss"]  # noqa: E731

        def pieces(params, hidden):
            found = token_values(per_token, unembed, params, hidden, inputs["targets"], weights, chunk=chunk)
            return preference(found, reference, live), found

        def whole(params, hidden):
            found = live * per_token(unembed(params, hidden), inputs["targets"])
            return preference(found, reference, live), found

        got = jax.jit(jax.value_and_grad(pieces, argnums=(0, 1), has_aux=True))(params, hidden)
        close(got, jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)(params, hidden))
        assert got[0][1].shape == (4, T)


@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_tokens_without_weight_may_hold_anything(chunk, bad):
    """Bit for bit: no value and no gradient depends on them, and their own gradient is 0."""
    params, hidden, inputs, weights, teacher = case(np.float32)
    dead = (weights == 0)[..., None]
    spoil = lambda x: jnp.where(dead, bad, x)  # noqa: E731
    spoiled = {"targets": jnp.where(dead[..., 0], -100, inputs["targets"]), "teacher": spoil(inputs["teacher"])}

    @jax.jit
    def total(params, hidden, teacher_hidden, targets):
        given = {"targets": targets, "teacher": teacher_hidden}
        return weighted_sums(
            distilled(teacher, 2.0),
            unembed,
            params,
            hidden,
            given,
            weights,
            factors={"loss": 1.0, "kl": 0.5},
            chunk=chunk,
        )

    @jax.jit
    def squares(params, hidden, teacher_hidden, targets):
        given = {"targets": targets, "teacher": teacher_hidden}
        found = token_values(distilled(teacher, 2.0), unembed, params, hidden, given, weights, chunk=chunk)
        return jnp.sum(found["loss"] ** 2 + found["kl"] ** 2), found

    for f in (total, squares):
        f = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)
        clean = f(params, hidden, inputs["teacher"], inputs["targets"])
        got = f(params, spoil(hidden), spoiled["teacher"], spoiled["targets"])
        jax.tree.map(np.testing.assert_array_equal, got, clean)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        assert not np.asarray(got[1][1])[dead[..., 0]].any()


B2, T2, V2, CHUNK = 2, 64, 4096, 8


def large():
    params, hidden, inputs, weights, teacher = case(np.float32, b=B2, t=T2, v=V2)
    return params, teacher, hidden, inputs["teacher"], inputs["targets"], weights


def distillation(chunk, stop=False):
    """The gradient of the student's parameters and hidden states."""

    def loss(params, hidden, teacher, teacher_hidden, targets, weights):
        if stop:
            teacher, teacher_hidden = jax.lax.stop_gradient((teacher, teacher_hidden))
        return weighted_means(
            distilled(teacher, 2.0), unembed, params, hidden, {"targets": targets, "teacher": teacher_hidden}, weights,
            factors={"kl": 1.0}, chunk=chunk,
        )[0]  # fmt: skip

    return jax.grad(loss, argnums=(0, 1, 2, 3) if stop else (0, 1))


def test_neither_the_logits_of_the_student_nor_of_the_teacher_exist_as_a_whole():
    params, teacher, hidden, other, targets, weights = large()
    args = (params, hidden, teacher, other, targets, weights)
    assert largest(distillation(T2), *args) == B2 * T2 * V2
    assert largest(distillation(CHUNK), *args) == B2 * CHUNK * V2

    def temporary(chunk):
        return jax.jit(distillation(chunk)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(T2) >= 2 * 4 * B2 * T2 * V2
    assert temporary(CHUNK) < 4 * B2 * T2 * V2


@pytest.mark.parametrize("stop", [False, True], ids=["not differentiated", "stop_gradient"])
@pytest.mark.parametrize("chunk", [CHUNK, T2])
def test_no_gradient_is_formed_for_the_teacher(chunk, stop):
    """No matrix product makes anything of the shape of its table or hidden states; the student's are made."""
    params, teacher, hidden, other, targets, weights = large()
    args = (params, hidden, teacher, other, targets, weights)
    made = {tuple(sorted(shape)) for shape in shapes(distillation(chunk, stop), *args, of="dot_general")}
    assert (D, V2) in made
    assert tuple(sorted((B2, chunk, D))) in made
    assert (E, V2) not in made
    assert tuple(sorted((B2, chunk, E))) not in made


def test_values_of_tokens_keep_one_piece_of_logits():
    params, _, hidden, _, targets, weights = large()
    per_token = lambda logits, targets: -cross_entropy(logits, targets)["loss"]  # noqa: E731

    def gradient(chunk):
        def loss(params, hidden):
            found = token_values(per_token, unembed, params, hidden, targets, weights, chunk=chunk)
            return preference(found, 0.0, weights)

        return jax.grad(loss, argnums=(0, 1))

    assert largest(gradient(T2), params, hidden) == B2 * T2 * V2
    assert largest(gradient(CHUNK), params, hidden) == B2 * CHUNK * V2
    temporary = jax.jit(gradient(CHUNK)).lower(params, hidden).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * B2 * T2 * V2


def test_integers_of_an_outer_program_may_be_read():
    """Such as a quantized teacher, under jit, where they are no constants."""
    params, hidden, inputs, weights, _ = case(np.float32)
    shift = jnp.arange(V, dtype=jnp.int32)

    @jax.jit
    def gradient(params, shift, targets):
        per_token = lambda logits, _: cross_entropy(logits + shift / V, targets[:, : logits.shape[1]])  # noqa: E731
        f = lambda p: weighted_means(  # noqa: E731
            per_token, unembed, p, hidden, None, weights, factors={"loss": 1.0}, chunk=T
        )[0]
        return jax.grad(f)(params)

    biased = lambda p, h: unembed(p, h) + shift / V  # noqa: E731
    wanted = jax.grad(lambda p: next_token(biased, p, hidden, inputs["targets"], weights)[0])(params)
    close(gradient(params, shift, inputs["targets"]), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("per_token", "words"),
    [
        (lambda logits, _: {"loss": logits}, r"value\['loss'\] has shape \(3, 20, 50\) for tokens \(3, 20\)"),
        (lambda logits, _: {"kl": logits.sum(-1)}, r"returns \['kl'\]; expected every name of factors"),
        (lambda logits, _: {x: logits.sum(-1) for x in ("loss", "weight")}, "not `weight`"),
    ],
)
def test_what_is_not_one_number_a_token_is_refused(per_token, words):
    params, hidden, inputs, weights, _ = case(np.float32)
    with pytest.raises(ValueError, match=words):
        weighted_sums(per_token, unembed, params, hidden, inputs, weights, factors={"loss": 1.0})


@pytest.mark.parametrize("values", [False, True], ids=["sums", "values"])
@pytest.mark.parametrize(
    ("where", "chunk"),
    [(P("rows", None), 4), (P("rows", None), 16), (P("rows", "length"), 16), (P(None, "length"), 99)],
)
def test_a_split_batch_stays_where_it_is(where, chunk, values):
    """On 8 devices: pieces along T leave rows alone, and where T is split one piece leaves all tokens alone. The only
    communication is the sum of the gradients of the table and of the loss."""
    t = 16
    shape = (8, 1) if where[1] is None else (4, 2)
    mesh = jax.make_mesh(shape, ("rows", "length"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params, hidden, inputs, weights, _ = case(np.float32, b=8, t=t)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P(*where, *(None,) * (x.ndim - 2))))  # noqa: E731
    hidden, targets, weights = map(place, (hidden, inputs["targets"], weights))
    params = jax.device_put(params, NamedSharding(mesh, P()))

    def loss(params, hidden, targets, weights):
        if values:
            per_token = lambda logits, targets: cross_entropy(logits, targets)["loss"]  # noqa: E731
            found = token_values(per_token, unembed, params, hidden, targets, weights, chunk=chunk)
            return jnp.sum(jnp.tanh(found.sum(axis=1)))
        return next_token(unembed, params, hidden, targets, weights, chunk=chunk)[0]

    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = f.lower(params, hidden, targets, weights).compile().as_text()
    assert "all-reduce" in text
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert name not in text, name
    got, wanted = f(params, hidden, targets, weights), f(*jax.device_get((params, hidden, targets, weights)))
    close(got, wanted, rtol=2e-5)
    assert got[1][1].sharding.is_equivalent_to(hidden.sharding, 3)
