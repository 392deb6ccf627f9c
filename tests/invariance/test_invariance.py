"""An objective is a mean over tokens, however they are laid out: loss, metrics and gradients are the same when rows are
padded, documents packed into rows, rows shuffled, and the batch cut into micro-batches or spread over processes.

An objective joins by one line in `ENTRIES`: its name, and a function of no arguments that returns a `Case`: the
`Objective`, parameters of a tiny model in float32, and documents of very unequal length and weight. Where its documents
are not of tokens with targets and weights, or several may not share a row, the case brings its own `batch` and the line
says `packs=False`.
"""

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.distill.features import HiddenCosine, HiddenMSE
from slmjax.distill.layer_maps import Last
from slmjax.distill.minillm import MiniLLM
from slmjax.distill.objective import Distill
from slmjax.distill.offline import DistillOffline
from slmjax.distill.relations import AttentionKL, AttentionScores, Relations
from slmjax.distill.sequences import Learned, OnPolicy
from slmjax.distill.similarity import CKA, PairAngles, PairDistances
from slmjax.distill.teacher import Teacher
from slmjax.distill.terms import Term
from slmjax.losses.divergences import JSD
from slmjax.losses.masked_lm import Masking
from slmjax.losses.next_token import next_token
from slmjax.models.families.bert import bert
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.objectives import MaskedLM, NextToken
from slmjax.train import micro, sharding
from slmjax.tree import flatten, map_with_path
from slmjax.types import Batch, Model, Objective, Output, Params, Special

TESTS = Path(__file__).parent.parent
QUICK = {"xla_backend_optimization_level": 0}
"""Programs that run once: most of their time is that of the compiler"""
VOCAB, LENGTHS = 11, (13, 2, 9, 1, 5, 12, 3, 7)
SMALL = {"layers": 1, "width": 32, "heads": 4, "hidden": 48, "vocab": VOCAB, "context": 64}


class Document(NamedTuple):
    """All [n]."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def token_batch(rows: Sequence[Sequence[Document]], length: int) -> Batch:
    """Each row holds its documents one after another, and padding: token 0, weight 0, segment 0."""
    fields = {
        name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "targets", "positions", "segment_ids")
    }
    batch = Batch(**fields, weights=np.zeros((len(rows), length), np.float32))
    for i, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row, start=1):
            n = len(document.tokens)
            here = slice(at, at + n)
            for name in Document._fields:
                getattr(batch, name)[i, here] = getattr(document, name)
            batch.positions[i, here], batch.segment_ids[i, here] = np.arange(n), number
            at += n
    return batch


class Case(NamedTuple):
    """What is measured. `documents` are `len(LENGTHS)` many, of these lengths where they have one."""

    objective: Objective
    params: Params
    documents: Sequence[Any]
    batch: Callable[[Sequence[Sequence[Any]], int], Batch] = token_batch
    """(rows, each some documents or none, length of a row) -> the batch that `Objective.loss` reads"""


class Entry(NamedTuple):
    name: str
    make: Callable[[], Case]
    packs: bool = True
    """Whether several documents may share a row"""
    layouts: Sequence[str] | None = None
    """Those of `LAYOUTS` that are compared, and two processes are not, where compiling it is slow; None: all"""


def text(seed: int = 0) -> list[Document]:
    """Weights 0, 0.5, 1 and 2; the last token of a document has no target."""
    rng, out = np.random.default_rng(seed), []
    for n in LENGTHS:
        tokens = rng.integers(1, VOCAB, n + 1, dtype=np.int32)
        weights = rng.choice(np.array([0, 0.5, 1, 2], np.float32), n)
        weights[-1] = 0
        out.append(Document(tokens[:-1], tokens[1:], weights))
    return out


def masked_text() -> list[Document]:
    """At most 2 of 5 tokens are masked. (Which ones `Masking` draws depends on the shape of the batch.)"""
    rng, out = np.random.default_rng(0), []
    for tokens, _, _ in text():
        masked = np.zeros(len(tokens), bool)
        masked[rng.permutation(len(tokens))[: 2 * len(tokens) // 5]] = True
        out.append(Document(np.where(masked, 3, tokens).astype(np.int32), tokens, masked.astype(np.float32)))
    return out


def drawn(model) -> Params:
    """Parameters far enough from 0 and 1 that every one of them matters."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        return (path.endswith("scale") + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0)))


def decoder():
    model = llama(**SMALL, kv_heads=2).build(Compute(dtype="float32"))
    return model, drawn(model)


def next_tokens(spec: NextToken) -> Case:
    model, params = decoder()
    return Case(spec.build(model), params, text())


def masked_tokens() -> Case:
    model = bert(**SMALL).build(Compute(dtype="float32"))
    spec = MaskedLM(masking=Masking(rate=0.4), z_loss=0.1, chunk=2, special=Special(mask=3, all=(0, 3)))
    return Case(spec.build(model), drawn(model), masked_text())


def in_memory(teacher) -> Teacher:
    built = teacher.build(Compute(dtype="float32"))
    return Teacher(source="", assembly=teacher, model=built, params=jax.tree.map(jnp.asarray, drawn(built)))


def distilled() -> Case:
    model, params = decoder()
    teacher = in_memory(llama(**{**SMALL, "width": 48}, kv_heads=4))
    spec = Distill(teachers=("",), divergence=JSD(beta=0.3), temperature=1.5, chunk=5)
    return Case(spec.with_models((teacher,), tokens=VOCAB - 1).build(model), params, text())


def features() -> Case:
    model, params = decoder()
    larger = llama(**{**SMALL, "width": 48}, kv_heads=4)
    projected = {"layers": Last(), "teacher_width": 48}
    losses = (
        HiddenMSE(**projected), HiddenCosine(**projected), CKA(), PairDistances(), PairAngles(),
        AttentionScores(), AttentionKL(), Relations(heads=8),
    )  # fmt: skip
    more = Term(loss=HiddenMSE(**projected), everywhere=False)
    spec = Distill(teachers=("",), terms=(*(Term(loss=loss) for loss in losses), more), match=0.0)
    objective = spec.with_models((in_memory(larger),), tokens=VOCAB).build(model)
    rng = np.random.default_rng(1)
    own = {i: {"projection": rng.normal(size=(32, 48)).astype(np.float32)} for i in "018"}

    def loss(params, frozen, batch, key):
        inside = {name: x for name, x in params.items() if name != "own"}
        return objective.loss({**inside, "objective": {"own": params["own"], "step": jnp.int32(0)}}, frozen, batch, key)

    return Case(objective._replace(loss=loss), {**params, "own": own}, text())


class Stored(NamedTuple):
    """A document with a teacher's predictions of its tokens: ids and log-probabilities, both [n, 4]."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray


def stored_batch(rows: Sequence[Sequence[Stored]], length: int) -> Batch:
    batch = token_batch([[Document(*d[:3]) for d in row] for row in rows], length)
    extra = {
        "ids": np.zeros((*batch.tokens.shape, 4), np.int32),
        "log_probs": np.zeros((*batch.tokens.shape, 4), np.float32),
    }
    for i, row in enumerate(rows):
        at = 0
        for document in row:
            here = slice(at, at + len(document.tokens))
            extra["ids"][i, here], extra["log_probs"][i, here] = document.ids, document.log_probs
            at = here.stop
    return batch._replace(extra=extra)


def distilled_offline() -> Case:
    """Three tokens and the rest."""
    model, params = decoder()
    rng, documents = np.random.default_rng(1), []
    for document in text():
        ids = np.stack([np.append(rng.permutation(VOCAB)[:3], -1) for _ in document.tokens]).astype(np.int32)
        p = rng.dirichlet(np.ones(4), len(document.tokens))
        documents.append(Stored(*document, ids, np.log(p).astype(np.float32)))
    return Case(DistillOffline(chunk=5).build(model), params, documents, batch=stored_batch)


def toy(vocab: int, width: int, seed: int) -> tuple[Model, Params]:
    """A language model that compiles at once, in float64: logits follow from the last token and its position. Made for
    16 positions: one beyond them is like the last."""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (vocab, width), "positions": (16, width), "unembed": (vocab, width)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def apply(params, tokens, positions, segment_ids, *, cache=None, collect=False):
        return Output(jnp.tanh(params["embed"][tokens] + params["positions"][positions]), cache)

    model = Model(
        init=lambda key: params,
        apply=apply,
        unembed=lambda params, hidden: hidden @ params["unembed"].T,
        axes=dict.fromkeys(shapes, (None, None)),
        init_cache=lambda batch, length: (),
        context=16,
        vocab=vocab,
    )
    return model, params


@dataclass(frozen=True, kw_only=True)
class Given(OnPolicy):
    """Nothing is drawn: `extra["sampled"]` says which targets were sampled."""

    def __call__(self, student, teachers, batch, *, tokens):
        return Learned(batch._replace(extra={}), batch.extra["sampled"])


def training(objective: Objective, step: int = 0) -> Callable[..., Any]:
    """`Objective.loss` as in this training step, where it finds what it has carried."""

    def loss(params, frozen, batch, key):
        return objective.loss({**params, "objective": {"own": {}, "step": jnp.int32(step)}}, frozen, batch, key)

    return loss


class Written(NamedTuple):
    """A document that is alone in its row, and which targets were sampled."""

    document: Document
    sampled: np.ndarray


def written_batch(rows: Sequence[Sequence[Written]], length: int) -> Batch:
    batch = token_batch([[written.document for written in row] for row in rows], length)
    sampled = np.zeros(batch.tokens.shape, bool)
    for i, row in enumerate(rows):
        for written in row:
            sampled[i, : len(written.sampled)] = written.sampled
    return batch._replace(extra={"sampled": sampled})


def on_policy() -> Case:
    (model, params), (teacher, theirs) = (
        (model, jax.tree.map(np.float32, params)) for model, params in (toy(VOCAB, 8, 0), toy(VOCAB, 12, 1))
    )
    frozen = Teacher(source="", assembly=llama(**SMALL, kv_heads=2), model=teacher, params=theirs)
    spec = MiniLLM(teachers=("",), sequences=Given(teacher_share=0.2), clip=2.0)
    objective = spec.with_models((frozen,), tokens=VOCAB).build(model)
    documents = [
        Written(x, (i % 3 < 2) & (np.arange(len(x.tokens)) > 1) & (x.weights > 0)) for i, x in enumerate(text())
    ]
    return Case(objective._replace(loss=training(objective)), params, documents, batch=written_batch)


ENTRIES = (
    Entry("next token", lambda: next_tokens(NextToken())),
    Entry("next token, z-loss, in pieces", lambda: next_tokens(NextToken(z_loss=0.1, chunk=5))),
    Entry("masked tokens, z-loss, in pieces", masked_tokens),
    Entry("distillation, in pieces", distilled),
    Entry("distillation of features", features),
    Entry("distillation from disk, in pieces", distilled_offline),
    Entry("policy gradient of samples", on_policy, packs=False, layouts=("padded", "4 micro-batches")),
)
SPREAD = [entry for entry in ENTRIES if entry.layouts is None]


class Layout(NamedTuple):
    rows: Callable[[Sequence[Any]], Sequence[Sequence[Any]]]
    """documents -> the documents of each row"""
    length: int = max(LENGTHS)
    pieces: int = 1
    packed: bool = False


def alone(documents):
    return [[document] for document in documents]


def packed(documents):
    """In 4 rows, and 4 empty ones. Of 4 micro-batches (i is rows i and i + 4) the second is empty."""
    one, two, three, four = (documents[i::4] for i in range(4))
    return [one, [], two, three, four, [], [], []]


def shuffled(documents):
    return [[documents[i]] for i in np.random.default_rng(0).permutation(len(documents))]


LAYOUTS = {
    "padded": Layout(lambda documents: [[], *alone(documents), [], [], []], length=max(LENGTHS) + 7),
    "packed": Layout(packed, length=2 * max(LENGTHS), packed=True),
    "shuffled": Layout(shuffled),
    "2 micro-batches": Layout(alone, pieces=2),
    "4 micro-batches": Layout(alone, pieces=4),
    "packed, 4 micro-batches": Layout(packed, length=2 * max(LENGTHS), pieces=4, packed=True),
}


def gradient(case: Case):
    """(params, batch, key) -> metrics and gradients, as the training step computes them for a micro-batch."""

    def f(params, batch, key):
        loss = lambda p: case.objective.loss(p, case.objective.frozen, batch, key)  # noqa: E731
        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return {"minimised": total, **metrics}, flatten(grads)

    return f


def measures(case: Case) -> Callable[[Layout], dict[str, np.ndarray]]:
    """layout -> metrics and gradients by name. Layouts of one shape share a program."""

    @functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
    def f(params, batch, pieces):
        return micro.accumulated(gradient(case), params, batch, jax.random.key(0), pieces)

    def measured(layout: Layout) -> dict[str, np.ndarray]:
        batch = case.batch(layout.rows(case.documents), layout.length)
        return named(f(case.params, jax.tree.map(jnp.asarray, batch), layout.pieces))

    return measured


def named(found) -> dict[str, np.ndarray]:
    metrics, grads = jax.device_get(found)
    return {f"metrics/{name}": x for name, x in metrics.items()} | {f"gradient/{name}": x for name, x in grads.items()}


def same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], but: str = "") -> None:
    """Equal but for the rounding of float32 sums in another order."""
    assert got.keys() == wanted.keys()
    largest = max(np.abs(x).max() for name, x in wanted.items() if name.startswith("gradient/"))
    for name, x in wanted.items():
        if name == but:
            continue
        scale = largest if name.startswith("gradient/") else max(1.0, float(np.abs(x)))
        np.testing.assert_allclose(got[name], x, rtol=0, atol=5e-6 * scale, err_msg=name)


@pytest.fixture(scope="module")
def base():
    """Entry -> what measures it, and what is measured with each document in a row of its own."""
    made = {}

    def get(entry):
        if entry.name not in made:
            measured = measures(entry.make())
            made[entry.name] = measured, measured(Layout(alone))
        return made[entry.name]

    return get


@pytest.mark.parametrize(
    ("entry", "layout"),
    [
        pytest.param(entry, layout, id=f"{entry.name}: {name}")
        for entry in ENTRIES
        for name, layout in LAYOUTS.items()
        if (entry.packs or not layout.packed) and (entry.layouts is None or name in entry.layouts)
    ],
)
def test_no_layout_changes_loss_metrics_or_gradients(entry, layout, base):
    measured, wanted = base(entry)
    assert all(np.abs(x).max() > 0 for x in wanted.values())
    same(measured(layout), wanted)


def _mean_of_each_micro_batch(model, params, hidden, batch):
    loss, metrics = next_token(model.unembed, params, hidden, batch.targets, batch.weights)
    return loss, {**metrics, "weight": jnp.ones(())}


def _mean_over_positions(model, params, hidden, batch):
    loss, metrics = next_token(model.unembed, params, hidden, batch.targets, batch.weights)
    size = float(batch.weights.size)
    share = metrics["weight"] / size
    return loss * share, {"loss": loss * share, "weight": jnp.float32(size)}


def _mean_of_rows(model, params, hidden, batch):
    share = batch.weights / jnp.maximum(batch.weights.sum(axis=1, keepdims=True), 1e-9)
    return next_token(model.unembed, params, hidden, batch.targets, share)


def _first_rows_count_more(model, params, hidden, batch):
    weights = batch.weights / (1 + jnp.arange(len(batch.weights), dtype=jnp.float32)[:, None])
    return next_token(model.unembed, params, hidden, batch.targets, weights)


def _sees_other_documents(model, params, hidden, batch):
    joined = jnp.minimum(batch.segment_ids, 1)
    hidden = model.apply(params, batch.tokens, batch.positions, joined).hidden
    return next_token(model.unembed, params, hidden, batch.targets, batch.weights)


@pytest.mark.parametrize(
    ("wrong", "fails", "passes"),
    [
        (_mean_of_each_micro_batch, "2 micro-batches", "shuffled"),
        (_mean_over_positions, "padded", "shuffled"),
        (_mean_of_rows, "packed", "shuffled"),
        (_first_rows_count_more, "shuffled", None),
        (_sees_other_documents, "packed", "shuffled"),
    ],
)
def test_a_wrong_objective_is_found_out(wrong, fails, passes):
    """The checks above can fail: each of these mistakes, and not in every layout."""
    model, params = decoder()

    def loss(params, frozen, batch, key):
        hidden = model.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
        return wrong(model, params, hidden, batch)

    measured = measures(Case(Objective(loss), params, text()))
    wanted = measured(Layout(alone))
    if passes:
        same(measured(LAYOUTS[passes]), wanted)
    with pytest.raises(AssertionError, match="Not equal"):
        same(measured(LAYOUTS[fails]), wanted, but="metrics/weight")


PROCESS = """
import pathlib, sys
rank, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank, heartbeat_timeout_seconds=20)
from invariance import test_invariance
test_invariance.one_of_two(rank, folder)
jax.distributed.shutdown()
"""


def one_of_two(rank: int, folder: Path) -> None:
    """In a process of its own: half of the rows of every case; process 0 writes what came out."""
    mesh = sharding.Mesh(data=2).build()
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for i, entry in enumerate(SPREAD):
        case = entry.make()
        rows = alone(case.documents)
        here = case.batch(rows[rank * len(rows) // 2 : (rank + 1) * len(rows) // 2], max(LENGTHS))
        params = jax.device_put(case.params, everywhere)
        f = jax.jit(gradient(case), out_shardings=everywhere, compiler_options=QUICK)
        found = named(f(params, sharding.Layout().put(here, mesh), jax.random.key(0)))
        if rank == 0:
            np.savez(folder / f"{i}.npz", **found)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with what two processes measured together."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent))),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    words = [[sys.executable, "-c", PROCESS, str(rank), port, str(folder)] for rank in range(2)]
    processes = [subprocess.Popen(w, env=env, stderr=subprocess.PIPE, text=True) for w in words]
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
    return folder


@pytest.mark.parametrize("index", range(len(SPREAD)), ids=[entry.name for entry in SPREAD])
def test_two_processes_change_nothing(index, base, two):
    _, wanted = base(SPREAD[index])
    with np.load(two / f"{index}.npz") as found:
        same(dict(found), wanted)
