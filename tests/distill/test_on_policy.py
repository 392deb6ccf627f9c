"""Learning from what the student writes: what is sampled, what is learned from it, and that chance is reproducible."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from invariance.test_invariance import QUICK, VOCAB, Document, Given, alone, drawn, text, token_batch, toy, training
from scipy.special import rel_entr

from slmjax.config import Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.distill.minillm import MiniLLM
from slmjax.distill.objective import Distill
from slmjax.distill.sequences import CHOSEN, KEYS, FromData, OnPolicy, Reader, prompts
from slmjax.distill.source import OnDisk
from slmjax.distill.teacher import Teacher
from slmjax.distill.terms import Ramp
from slmjax.errors import UserError
from slmjax.evals.decoding import NOTHING, decoding
from slmjax.evals.sampling import Sampler, Temperature, keep
from slmjax.losses.divergences import JSD
from slmjax.models.families.bert import bert
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.objectives import MaskedLM
from slmjax.optim.schedules import Cosine
from slmjax.runs.estimate_memory import estimate
from slmjax.train.sharding import Layout, Mesh
from slmjax.train.state import init_state
from slmjax.train.step import SKIP, make_step
from slmjax.types import Batch, Optimizer
from slmjax.views import IDENTITY, Carried, carrying

FLOAT32 = Compute(dtype="float32")
PROMPT, NEW, ENDS = 3, 6, (2, 4, 7)
KNOWN = VOCAB - 1
"""Ids of the tokenizer: the last row of the tables stands for no token, though the text has it"""


def decoder(width, vocab):
    return llama(layers=1, width=width, heads=2, kv_heads=1, hidden=24, vocab=vocab, context=64)


STUDENT, TEACHER = decoder(16, VOCAB + 5), decoder(24, VOCAB)
SAMPLED = OnPolicy(fraction=0.7, prompt=PROMPT, new_tokens=NEW, temperature=1.5, ends=ENDS)
MATCHED = Distill(teachers=("t",), divergence=JSD(beta=0.3), match=0.75, cross_entropy=0.25, sequences=SAMPLED)
REWARDED = MiniLLM(
    teachers=("t",),
    sequences=OnPolicy(fraction=0.7, prompt=PROMPT, new_tokens=NEW, teacher_share=0.3, ends=ENDS),
    clip=1.5,
    language_model=0.4,
)


@pytest.fixture
def double():
    """float64"""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def models():
    """Student, its parameters, teacher."""
    model, params = toy(VOCAB, 7, 1)
    return *toy(VOCAB + 5, 5, 0), Teacher(source="t", assembly=TEACHER, model=model, params=params)


def batch():
    found = token_batch(alone(text()), 16)
    return jax.tree.map(jnp.asarray, found._replace(weights=np.float64(found.weights)))


def built(spec, models):
    student, _, teacher = models
    return spec.with_models((teacher,), tokens=KNOWN).build(student)


def prepared(batch):
    """Of the rows that are long enough, two are left alone; one that is too short is chosen."""
    keys = np.random.default_rng(0).integers(0, 1 << 32, (len(CHOICE), 2), dtype=np.uint32)
    return batch._replace(extra={CHOSEN: jnp.array(CHOICE), KEYS: jnp.asarray(keys)})


def sampler(sequences, student, teachers=()):
    """The compiled `sequences`: (the batch after `prepare`, parameters of the student) -> `Learned`"""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def f(params, frozen, batch):
        readers = [Reader(teacher.model, own) for teacher, own in zip(teachers, frozen, strict=True)]
        return sequences(Reader(student, params), readers, batch, tokens=KNOWN)

    return lambda batch, params: jax.device_get(f(params, [teacher.params for teacher in teachers], batch))


@pytest.fixture(scope="module")
def drawing(models):
    """What is drawn for `MATCHED`"""
    return sampler(SAMPLED, models[0])


def measure(spec, models, step=0):
    """`Learned` -> loss, metrics, gradients of student and teacher, the student's hidden vectors and the logits of
    both."""
    student, params, teacher = models
    objective = built(replace(spec, sequences=Given(**vars(spec.sequences))), models)
    loss = training(objective, step)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def f(params, frozen, batch):
        of_both = jax.value_and_grad(lambda p, f: loss(p, f, batch, None), argnums=(0, 1), has_aux=True)
        readers = (student, params), (teacher.model, frozen["0"])
        hidden = [m.apply(p, batch.tokens, batch.positions, batch.segment_ids).hidden for m, p in readers]
        logits = [m.unembed(p, h) for (m, p), h in zip(readers, hidden, strict=True)]
        return of_both(params, frozen), hidden[0], logits

    def measured(learned):
        batch = learned.batch._replace(extra={"sampled": learned.sampled})
        return jax.device_get(f(params, objective.frozen, jax.tree.map(jnp.asarray, batch)))

    return measured


@pytest.fixture(scope="module")
def matched(models):
    return measure(MATCHED, models)


CHOICE = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
LONG = np.array([len(document.tokens) > PROMPT for document in text()])
"""Rows that can be continued"""


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def precise(logits):
    """Log-probabilities of student and teacher, the latter -inf where there is no token."""
    ours, theirs = logits
    known = np.where(np.arange(theirs.shape[-1]) < KNOWN, theirs, -np.inf)
    missing = np.full((*theirs.shape[:-1], ours.shape[-1] - theirs.shape[-1]), -np.inf)
    with np.errstate(divide="ignore"):
        return log_softmax(ours), np.concatenate([log_softmax(known), missing], axis=-1)


def test_samples_are_those_of_generation(models):
    """From the same keys, the same tokens, up to the end of a text."""
    rows, student = prepared(batch()), STUDENT.build(FLOAT32)
    params = jax.tree.map(jnp.asarray, drawn(student))
    seen, sampled = sampler(SAMPLED, student)(rows, params)
    known = lambda logits, _: keep(jnp.arange(logits.shape[-1]) < KNOWN, logits)  # noqa: E731
    programs = decoding(STUDENT, FLOAT32, Sampler(rules=(known, Temperature(1.5)), greedy=False), ENDS)
    ready = programs.prepare(params)
    prompt = rows.tokens[:, :PROMPT]
    keys, limits = jax.random.wrap_key_data(rows.extra[KEYS]), np.full(len(prompt), NEW, np.int32)
    state = programs.prefill(ready, prompt, jnp.ones_like(prompt), keys, limits, length=16)
    first = np.asarray(state.token)
    rest, _ = programs.decode(ready, state, keys, limits, count=NEW - 1)
    wanted = np.concatenate([first[:, None], rest], axis=1)
    live = CHOICE & LONG
    counts = (wanted != NOTHING).sum(axis=1)
    assert len(set(counts[live])) > 1, "some end early"
    assert len(np.unique(wanted[live])) > 4
    for row in range(len(live)):
        if not live[row]:
            for name in ("tokens", "targets", "weights", "positions", "segment_ids"):
                np.testing.assert_array_equal(getattr(seen, name)[row], getattr(rows, name)[row])
            assert not sampled[row].any()
            continue
        n, ids = counts[row], wanted[row, : counts[row]]
        whole = np.concatenate([prompt[row], ids, np.zeros(16 - PROMPT - n, np.int32)])
        np.testing.assert_array_equal(seen.tokens[row], whole)
        at = np.zeros(16, bool)
        at[PROMPT - 1 : PROMPT - 1 + n] = True
        np.testing.assert_array_equal(sampled[row], at)
        np.testing.assert_array_equal(seen.weights[row], at)
        np.testing.assert_array_equal(seen.targets[row][at], ids)
        np.testing.assert_array_equal(seen.segment_ids[row], np.arange(16) < PROMPT + n)
        np.testing.assert_array_equal(seen.positions[row][: PROMPT + n], np.arange(PROMPT + n))


@pytest.mark.usefixtures("double")
def test_both_are_compared_on_what_was_sampled_and_the_data_teach_what_follows(models, drawing, matched):
    learned = drawing(prepared(batch()), models[1])
    seen, sampled = learned
    ((loss, metrics), (grads, by_teacher)), *_, logits = matched(learned)
    q, p = (log_softmax(x / 2) for x in precise(logits))
    middle = 0.3 * np.exp(p) + 0.7 * np.exp(q)
    jsd = 0.3 * rel_entr(np.exp(p), middle).sum(-1) + 0.7 * rel_entr(np.exp(q), middle).sum(-1)
    nll = -np.take_along_axis(log_softmax(logits[0]), seen.targets[..., None], -1)[..., 0]
    share = seen.weights / seen.weights.sum()
    assert metrics["divergence"] == pytest.approx((share * jsd).sum(), rel=1e-9)
    assert metrics["loss"] == pytest.approx((share * nll).sum(), rel=1e-5)
    assert metrics["sampled"] == pytest.approx(share[sampled].sum(), rel=1e-6)
    assert 0.1 < metrics["sampled"] < 0.9
    wanted = 0.75 * 4 * (share * jsd).sum() + 0.25 * (share * nll)[~sampled].sum()
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert all(not np.any(g) for g in jax.tree.leaves(by_teacher)), "no gradient reaches the teacher"


@pytest.mark.usefixtures("double")
def test_with_nothing_chosen_it_is_plain_distillation(models, drawing, matched):
    """And evaluation, which has no carried step, is too."""
    student, params, teacher = models
    rows = prepared(batch())
    rows = rows._replace(extra={**rows.extra, CHOSEN: jnp.zeros(len(LONG), bool)})
    learned = drawing(rows, params)
    bare = rows._replace(extra={})
    jax.tree.map(np.testing.assert_array_equal, learned.batch, bare)
    assert not learned.sampled.any()
    ((loss, metrics), (grads, _)), *_ = matched(learned)
    plain = replace(MATCHED, sequences=FromData()).with_models((teacher,), tokens=KNOWN).build(student)

    def of(objective, batch):
        f = lambda p: objective.loss(p, objective.frozen, batch, None)  # noqa: E731
        return jax.value_and_grad(f, has_aux=True)

    wanted = jax.device_get(jax.jit(of(plain, bare), compiler_options=QUICK)(params))
    assert metrics.pop("sampled") == 0
    for a, b in zip(jax.tree.leaves(((loss, metrics), grads)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    evaluated = jax.make_jaxpr(of(built(MATCHED, models), rows))(params)
    assert str(evaluated) == str(jax.make_jaxpr(of(plain, bare))(params))


@pytest.mark.usefixtures("double")
def test_steps_resume_bit_for_bit_and_micro_batches_and_devices_change_nothing(models, drawing, matched):
    """Real steps of rate 1, in 2 micro-batches over 2 devices: their first gradient is that of the whole batch."""
    params = models[1]
    objective, key = built(MATCHED, models), jax.random.key(7)
    sgd = optax.sgd(1.0)
    optimizer = Optimizer(sgd.init, sgd.update, lambda state, params: params)
    view = carrying(IDENTITY, Carried(matrices={}))
    mesh = Mesh(data=2).build(jax.devices()[:2])
    step = make_step(objective, optimizer, view, key, pieces=lambda batch: 2)
    step = jax.jit(step, compiler_options=QUICK)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed, frozen = Layout().put(batch(), mesh), jax.device_put(objective.frozen, everywhere)
    start = jax.device_put(init_state(lambda key: params, optimizer, view, SKIP, key), everywhere)

    def steps(state, count):
        rows = []
        for _ in range(count):
            state, metrics = step(state, frozen, placed)
            rows.append(jax.device_get(metrics))
        return state, rows

    one, first = steps(start, 1)
    prepare_key, _ = jax.random.split(jax.random.fold_in(key, 0))
    learned = drawing(objective.prepare(batch(), prepare_key), params)
    assert learned.sampled.sum() > 0
    ((_, metrics), (wanted, _)), *_ = matched(learned)
    found = jax.tree.map(np.subtract, params, jax.device_get(one.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, wanted)
    for name, x in metrics.items():
        assert first[0][name] == pytest.approx(x, rel=1e-5), name

    whole, rows = steps(start, 4)
    half, _ = steps(start, 2)
    again, after = steps(jax.device_put(jax.device_get(half), everywhere), 2)
    assert after == rows[2:]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(whole))
    assert len({float(row["sampled"]) for row in rows}) > 1, "each step draws anew"


@pytest.mark.usefixtures("double")
def test_weights_follow_their_schedules(models, drawing, matched):
    learned = drawing(prepared(batch()), models[1])
    ramps = Ramp(start=0.25, end=1.25, steps=10), Ramp(start=0.5, end=0.0, steps=10)
    spec = replace(MATCHED, match=ramps[0], cross_entropy=ramps[1])
    found, wanted = measure(spec, models, step=5)(learned), matched(learned)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, wanted)
    assert spec.carried(STUDENT) == Carried(matrices={})


@pytest.mark.usefixtures("double")
def test_minillm_is_the_policy_gradient_of_samples_and_the_likelihood_of_the_data(models):
    """In float64 from the logits: the value, and the gradient of the output table."""
    seen, sampled = learned = sampler(REWARDED.sequences, models[0], models[2:])(prepared(batch()), models[1])
    ((loss, metrics), (grads, by_teacher)), hidden, logits = measure(REWARDED, models)(learned)
    q, p = precise(logits)
    assert np.any(p == -np.inf)
    assert seen.tokens[CHOICE & LONG, PROMPT:].max() < KNOWN
    total, by_logits = 0.0, np.zeros_like(q)
    for row, t in zip(*np.nonzero(seen.weights), strict=True):
        mine, target = np.exp(q[row, t]), seen.targets[row, t]
        minus_q = np.eye(q.shape[-1])[target] - mine  # the gradient of log q of the target
        if not sampled[row, t]:
            value, gradient = -0.4 * q[row, t, target], -0.4 * minus_q
        else:
            allowed = p[row, t] > -np.inf
            kept = np.where(allowed, mine, 0) / mine[allowed].sum()
            ratio = np.log(kept[allowed]) - p[row, t, allowed]
            kl, log_mass = (kept[allowed] * ratio).sum(), np.log(mine[allowed].sum())
            by_kl = np.zeros_like(mine)
            by_kl[allowed] = kept[allowed] * (ratio - kl)
            later = [s for s in range(t + 1, 16) if sampled[row, s]]
            rewards = [p[row, s, seen.targets[row, s]] - q[row, s, seen.targets[row, s]] for s in later]
            come = np.clip(rewards, -1.5, 1.5).sum() / max(1, len(later))
            here = mine[target] / (0.3 * np.exp(p[row, t, target]) + 0.7 * mine[target])
            value = here * (kl - log_mass - come * q[row, t, target])
            gradient = here * (by_kl - (kept - mine) - come * minus_q)
        total += seen.weights[row, t] * value
        by_logits[row, t] = seen.weights[row, t] * gradient
    weight = seen.weights.sum()
    assert loss == pytest.approx(total / weight, rel=1e-9)
    wanted = np.einsum("btv,btd->vd", by_logits, hidden) / weight
    np.testing.assert_allclose(grads["unembed"], wanted, rtol=0, atol=1e-10)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert all(not np.any(g) for g in jax.tree.leaves(by_teacher))
    assert metrics["weight"] == weight
    assert 0 < metrics["sampled"] < 1


def test_the_first_document_that_is_longer_than_a_prompt_is_continued():
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, VOCAB, n, dtype=np.int32) for n in range(8)]
    document = lambda n: Document(tokens[n], tokens[n], np.ones(n, np.float32))  # noqa: E731
    packed = [[2, 3, 5, 4], [3, 3], [7, 6], [], [1, 4]]
    batch = token_batch([[document(n) for n in row] for row in packed], 14)
    start, there = prompts(Batch(*map(jnp.asarray, batch[:5])), 3)
    assert there.tolist() == [True, False, True, False, True]
    assert np.asarray(start)[np.asarray(there)].tolist() == [5, 0, 1]


def test_sampling_is_counted():
    """Half of the rows, half of their length, forward only: parameters, the logits of new tokens alone, attention."""
    flops = OnPolicy(fraction=0.5, prompt=8, new_tokens=24).flops(STUDENT, [TEACHER], 64)
    parameters = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 24 + 3 * 16
    each = 2 * parameters + 2 * (VOCAB + 5) * 16 * 24 / 32 + 4 * 16 * 32 / 2
    assert flops == pytest.approx(0.5 * 0.5 * each)


def test_the_estimate_of_memory_traces_the_sampling(models):
    experiment = Experiment(
        name="x",
        model=STUDENT,
        data=PackedText(train=(Part(source="x"),), batch=2, length=16),
        schedule=Cosine(peak_lr=1e-3, warmup_steps=1),
        steps=10,
        objective=MATCHED.with_models(models[2:], tokens=KNOWN),
    )
    assert estimate(experiment, FLOAT32, {"data": 1, "fsdp": 1, "tensor": 1}).activations > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnPolicy(fraction=1.1), "sequences.fraction: 1.1 is not between 0 and 1"),
        (lambda: OnPolicy(teacher_share=-0.1), "sequences.teacher_share: -0.1 is not between 0 and 1"),
        (lambda: OnPolicy(prompt=0), "sequences.prompt: 0 is not a positive number"),
        (lambda: OnPolicy(temperature=0.0), "sequences.temperature: 0.0 is not above 0"),
        (
            lambda: OnPolicy(prompt=200).reads(PackedText(train=(Part(source="x"),), length=256)),
            "prompt 200 and new_tokens 64 .* more than the 256 tokens",
        ),
        (lambda: replace(MATCHED, task=MaskedLM()), "sequences is OnPolicy, .* but objective.task is MaskedLM"),
        (lambda: replace(MATCHED, source=OnDisk()), "OnDisk knows nothing of new texts"),
        (lambda: MATCHED.fits(ENCODER), "an encoder sees the next token"),
        (lambda: REWARDED.fits(ENCODER), "MiniLLM, which is for decoders"),
        (lambda: replace(REWARDED, sequences=SAMPLED), "temperature: 1.5, but the policy gradient"),
        (lambda: replace(REWARDED, sequences=OnPolicy(fraction=0.0)), "fraction: 0, so nothing would be learned"),
        (lambda: replace(REWARDED, teachers=()), "teachers is empty"),
        (lambda: replace(REWARDED, clip=0.0), "clip: 0.0 is not a positive number"),
        (lambda: replace(REWARDED, language_model=-1.0), "language_model: -1.0 is negative"),
        (lambda: REWARDED.build(toy(VOCAB, 5, 0)[0]), "without its teachers"),
        (lambda: REWARDED.accepts("t", ENCODER, STUDENT, 16), "t is an encoder and the student is a decoder"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


ENCODER = bert(layers=1, width=16, heads=2, hidden=24, vocab=VOCAB, context=64)
