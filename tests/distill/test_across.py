"""Distillation from a teacher with another tokenizer: the alignment of tokens by bytes, and the distance (ULD)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariance.test_invariance import QUICK
from models.tiny import parameters

from slmjax.data.retokenized import Retokenized, bytes_of_tokens
from slmjax.data.tokenizer import BPE, Bytes
from slmjax.distill.across import DistillAcross, sorted_distance
from slmjax.distill.dual_space import DualSpace
from slmjax.distill.teacher import Teacher
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.types import Batch

TEXT = "the owl and the pussy-cat went to sea in a beautiful pea-green boat; où? ça là, 東京タワー, naïve. " * 20
ROOM, LENGTH = 96, 48


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Bytes, and a BPE with 400 ids, in folders."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {"bytes": Bytes().make((), root), "bpe": BPE(vocab=400).make([TEXT], root)}
    for name, tokenizer in made.items():
        tokenizer.save(root / name)
    return root, made


def extra(tokenizers, data, other, length=ROOM):
    return Retokenized(data=str(tokenizers[0] / data), other=str(tokenizers[0] / other), length=length)


def row_of(tokenizer, texts, skip=0, length=LENGTH):
    """Documents packed into a row that begins after `skip` tokens of the first."""
    ids, segments = [], []
    for i, text in enumerate(texts, 1):
        tokens = tokenizer.documents([text])[0].tolist()
        tokens = tokens[skip:] if i == 1 else tokens
        ids += tokens
        segments += [i] * len(tokens)
    pad = [0] * length
    return np.array((ids + pad)[:length], np.int32), np.array((segments + pad)[:length], np.int32)


CHARACTERS = st.text(alphabet="the owl sea-où東京naïve 🦉", max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(CHARACTERS, min_size=1, max_size=4), st.integers(0, 8), st.booleans())
def test_aligned_tokens_end_at_the_same_byte(tokenizers, texts, skip, swap):
    data, other = ("bpe", "bytes") if swap else ("bytes", "bpe")
    found = extra(tokenizers, data, other)
    own, theirs = tokenizers[1][data], tokenizers[1][other]
    ids, segments = row_of(own, texts, skip)
    row = found.row(ids, segments)
    mine, yours = (bytes_of_tokens(t) for t in (own, theirs))
    for t in np.flatnonzero(row.at >= 0):
        segment, at = segments[t], row.at[t]
        assert row.segment_ids[at] == segment
        before = b"".join(mine[i] for i in ids[: t + 1][segments[: t + 1] == segment])
        read = b"".join(yours[i] for i in row.tokens[: at + 1][row.segment_ids[: at + 1] == segment])
        lost = len(before) - len(read)  # of a character that was cut at the beginning of the row
        assert 0 <= lost <= 3
        assert before[lost:] == read
    if skip == 0 and all(texts):
        first = {s: np.flatnonzero(segments == s)[0] for s in set(segments[segments > 0].tolist())}
        assert all(row.at[i] >= 0 for i in first.values())  # both begin a document before its first byte
    used = row.segment_ids > 0
    starts = np.flatnonzero(np.diff(row.segment_ids, prepend=0) > 0)
    assert (row.positions[starts] == 0).all()
    assert (np.diff(row.positions[used])[np.diff(row.segment_ids[used]) == 0] == 1).all()


def test_bytes_align_with_every_token_of_any_tokenizer(tokenizers):
    """From BPE to bytes every token of the text is aligned; with too little room the rest is not."""
    ids, segments = row_of(tokenizers[1]["bpe"], [TEXT])
    assert (extra(tokenizers, "bpe", "bytes", 500).row(ids, segments).at >= 0).all()
    short = extra(tokenizers, "bpe", "bytes", 20).row(ids, segments)
    assert 0 < (short.at >= 0).sum() < len(ids)
    assert short.at.max() < 20


def test_the_distance_is_that_of_sorted_probabilities():
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.full(n, 0.3), size=5) for n in (7, 11))
    filled = np.pad(np.sort(p)[:, ::-1], [(0, 0), (0, 4)])
    expected = np.abs(filled - np.sort(q)[:, ::-1]).sum(1)
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        found = sorted_distance(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(sorted_distance(jnp.log(p), jnp.log(p[:, ::-1])), 0, atol=1e-6)


def small(vocab, width=16, tied=True):
    return llama(layers=1, width=width, heads=2, kv_heads=1, hidden=24, vocab=vocab, context=128, tied=tied)


def objective(tokenizers, spec, student, teacher, rows):
    model = teacher.build()
    taught = Teacher(source="", assembly=teacher, model=model, params=parameters(teacher, model), tokens=rows[1])
    return spec.with_models([taught], tokens=rows[0]).build(student.build())


@pytest.fixture(scope="module")
def batch(tokenizers):
    rows = [row_of(tokenizers[1]["bytes"], [TEXT[i:], "owl"], length=LENGTH + 1) for i in range(4)]
    ids, segments = (np.stack(x) for x in zip(*rows, strict=True))
    positions = np.arange(LENGTH, dtype=np.int32)[None].repeat(4, 0)
    weights = np.random.default_rng(1).integers(0, 2, (4, LENGTH)).astype(np.float32)
    made = Batch(ids[:, :-1], ids[:, 1:], weights, positions, segments[:, :-1])
    made = made._replace(extra=dict(extra(tokenizers, "bytes", "bpe")(made)))
    return jax.tree.map(jnp.asarray, made)


def test_loss_and_gradient_are_those_of_the_tokens_however_they_are_split(tokenizers, batch):
    """And the value is the mean of the distances of the aligned tokens, computed apart in NumPy."""
    student, teacher = small(264), small(400)
    built = objective(tokenizers, DistillAcross(teacher="t", chunk=16), student, teacher, (258, 400))
    params = parameters(student, student.build())
    step = jax.jit(jax.value_and_grad(built.loss, has_aux=True), compiler_options=QUICK)

    def half(rows):  # two rows of weight 0, so that one program does for all
        part = batch._replace(weights=np.where(np.isin(np.arange(4), rows)[:, None], batch.weights, 0))
        (value, metrics), gradient = step(params, built.frozen, part, jax.random.key(0))
        return value, metrics, gradient

    whole, one, two = half([0, 1, 2, 3]), half([0, 2]), half([1, 3])
    share = [float(part[1]["weight"]) for part in (one, two)]
    joined = jax.tree.map(lambda a, b: (share[0] * a + share[1] * b) / sum(share), one[2], two[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), joined, whole[2])
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(whole[2]))

    def log_probs(decoder, values, read, rows):
        model = decoder.build()
        logits = model.unembed(values, model.apply(values, *read).hidden)
        return np.asarray(jax.nn.log_softmax(logits[..., :rows]), np.float64)

    of_student = log_probs(student, params, (batch.tokens, batch.positions, batch.segment_ids), 258)
    other = [batch.extra[f"other_{name}"] for name in ("tokens", "positions", "segment_ids")]
    of_teacher = log_probs(teacher, built.frozen, other, 400)
    at, total = np.asarray(batch.extra["other_at"]), 0.0
    for b, t in zip(*np.nonzero(at >= 0), strict=True):
        p, q = np.sort(np.exp(of_teacher[b, at[b, t]]))[::-1], np.sort(np.exp(of_student[b, t]))[::-1]
        total += batch.weights[b, t] * np.abs(p - np.pad(q, (0, len(p) - len(q)))).sum()
    live = float(batch.weights.sum())
    assert float(whole[1]["uld"]) == pytest.approx(float(total) / live, rel=1e-5)
    assert float(whole[1]["aligned"]) == pytest.approx(float((batch.weights * (at >= 0)).sum()) / live, rel=1e-6)
    assert float(whole[0]) == pytest.approx(float(whole[1]["loss"] + 1.5 * whole[1]["uld"]), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda root: DistillAcross(teacher="t", match=0.0), "objective.match: 0.0"),
        (lambda root: DualSpace(teacher="t", teacher_width=8).accepts("t", small(9), small(9), 9), "has 16 channels"),
        (lambda root: Retokenized(data=str(root), other=str(root), length=1), "data.extra.length is 1"),
        (lambda root: Retokenized(data=str(root), other=str(root), length=9).own, "has no tokenizer.json"),
    ],
)
def test_mistakes_are_named(tokenizers, make, names):
    with pytest.raises(UserError, match=names):
        make(tokenizers[0])


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def scaled(x):
    return x / x.std(-1, keepdims=True)


def in_both_spaces(b, own, embed, head, embed_there, ours, hidden):
    """Sums over tokens of the four parts of `DualSpace`, by loops in NumPy; both vocabularies are whole."""
    tokens, segments = (b.extra[f"other_{name}"] for name in ("tokens", "segment_ids"))
    sums = dict.fromkeys(("mapped_loss", "mapped_accuracy", "divergence", "teacher_space_kl"), 0.0)
    for row in range(len(b.tokens)):
        mine = [t for t in range(LENGTH) if b.weights[row, t] > 0]
        yours = [u for u in range(ROOM - 1) if 0 < segments[row, u] == segments[row, u + 1]]
        q = np.stack([np.r_[embed[b.tokens[row, t]], embed[b.targets[row, t]]] @ own["query"] for t in mine])
        following = np.stack([scaled(embed_there[tokens[row, u + 1]]) for u in yours])
        k = np.stack([np.r_[scaled(embed_there[tokens[row, u]]), n] for u, n in zip(yours, following, strict=True)])
        together = b.segment_ids[row][mine][:, None] == segments[row][yours][None]
        scores = np.where(together, q @ k.T / np.sqrt(k.shape[1]), -np.inf)
        mapped = softmax(scores) @ ((scaled(hidden[row, yours]) + following) @ own["value"])
        logits, plain = mapped @ head.T, ours[row, mine] @ head.T
        for i, t in enumerate(mine):
            right = b.targets[row, t]
            hit = float(logits[i].argmax() == right)
            p, r = (softmax(x[i][:258] / 1.5) for x in (logits, plain))
            sums["mapped_loss"] -= np.log(softmax(logits[i])[right])
            sums["mapped_accuracy"] += hit
            sums["divergence"] += hit * np.sum(p * np.log(p / r))
        found = together.any(0)
        back = softmax(scores.T[found]) @ (ours[row, mine] @ own["back"])
        p, r = (softmax(x @ embed_there.T / 1.5) for x in (hidden[row, np.array(yours)[found]], back))
        sums["teacher_space_kl"] += np.sum(p * np.log(p / r))
    return sums


def test_dual_space_is_its_definition_and_every_matrix_learns(tokenizers, batch):
    student, teacher = small(264, tied=False), small(400, width=24)
    spec = DualSpace(teacher="t", teacher_width=24, temperature=1.5, match=0.7, cross_entropy=0.0)
    built = objective(tokenizers, spec, student, teacher, (258, 400))
    model, theirs = student.build(), teacher.build()
    own = {name: m.draw(jax.random.key(i)) for i, (name, m) in enumerate(spec.carried(student).matrices.items())}
    params = parameters(student, model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, own, batch):
        def loss(params, own):
            whole = {**params, "objective": {"own": own, "step": jnp.int32(0)}}
            return built.loss(whole, built.frozen, batch, jax.random.key(0))

        (total, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, own)
        mine = model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
        other = [batch.extra[f"other_{name}"] for name in ("tokens", "positions", "segment_ids")]
        return total, metrics, gradients, mine, theirs.apply(built.frozen, *other).hidden

    total, metrics, (gradient, of_own), ours, hidden = jax.tree.map(np.asarray, run(params, own, batch))
    tables = (params["embed"]["table"], params["unembed"]["table"], built.frozen["embed"]["table"])
    exact = [np.asarray(x, np.float64) for x in (*tables, ours, hidden)]
    b, matrices = jax.tree.map(np.asarray, batch), {name: np.asarray(x, np.float64) for name, x in own.items()}
    weight = b.weights.sum()
    means = {name: value / weight for name, value in in_both_spaces(b, matrices, *exact).items()}
    for name, value in means.items():
        assert float(metrics[name]) == pytest.approx(value, rel=2e-4, abs=1e-6), name
    expected = 0.7 * (means["mapped_loss"] + 1.5**2 * (means["divergence"] + means["teacher_space_kl"]))
    assert float(total) == pytest.approx(expected, rel=2e-4)
    assert all(np.abs(g).max() > 0 for g in of_own.values())
    assert np.abs(gradient["layers"]["mlp"]["down"]).max() > 0  # through the teacher's space
    # No mapped token is right here, so D is 0, and what else is computed in the student's space trains no output table.
    assert means["mapped_accuracy"] == 0
    assert not gradient["unembed"]["table"].any()
