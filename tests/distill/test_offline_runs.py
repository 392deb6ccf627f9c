"""Targets of a real teacher on disk by `slmjax data teacher`, and students that learn from them by `slmjax train`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distill.test_runs import rows
from invariance.test_invariance import QUICK
from running import ROOT, runtime, slmjax, store_of

from slmjax.data.loader import validation_batches
from slmjax.data.spec import PackedText, Part
from slmjax.data.teacher_targets import TargetStore, TeacherTargets
from slmjax.data.teacher_windows import windows
from slmjax.data.token_store import TokenStore
from slmjax.distill.objective import Distill
from slmjax.distill.source import OnDisk
from slmjax.distill.teacher import Teacher
from slmjax.errors import DataError, UserError
from slmjax.losses.divergences import JSD
from slmjax.models.families.bert import bert
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.runs.loading import load
from slmjax.serialise import to_json
from slmjax.train.checkpoint_folder import save_params
from slmjax.tree import flatten

V = 384
FLOAT32 = ("--compute", "float32")
STUDENT = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=32, vocab=400, context=64)

FILE = """
from dataclasses import replace
from slmjax.data.teacher_targets import TeacherTargets
from slmjax.distill.objective import Distill
from slmjax.distill.offline import DistillOffline
from slmjax.distill.source import OnDisk
from slmjax.experiment_file import load_experiment
from slmjax.models.families.llama import llama


def experiment():
    base, _ = load_experiment({tiny!r})
    student = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=32, vocab=400, context=64)
    data = replace(base.data, extra=TeacherTargets(folders=({targets!r},)))
    return replace(base, name="student", model=student, data=data, objective={objective})
"""


@pytest.fixture(scope="module")
def made(tiny, tiny_run, tmp_path_factory):
    """`made(kind, *options)` -> the folder of these targets of `tiny_run`, made once."""
    folder = tmp_path_factory.mktemp("targets")

    def make(kind, *options):
        out = folder / "-".join(map(str, (kind, *options)))
        if not out.exists():
            words = ("--data", store_of(tiny), "--out", out, "--targets", kind, *FLOAT32, *options)
            done = slmjax("data", "teacher", tiny_run, *words)
            assert done.code == 0, done.err
            (out / "said.txt").write_text(done.out)
        return out

    return make


def content(folder):
    """Every file that the settings decide: not the locks, nor the checkpoint of the head."""
    files = [p for p in folder.rglob("*") if p.is_file() and "lock" not in p.name and "head" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "said.txt"}


@pytest.fixture(scope="module")
def case(tiny, tiny_run, made):
    """One batch of the validation data with every kind of targets, a student with all parameters drawn, the teacher."""
    store, loaded = TokenStore(store_of(tiny)), load(tiny_run)
    teacher = Teacher(source="", assembly=loaded.decoder, model=loaded.decoder.build(), params=loaded.params)

    def batch(*folders):
        extra = TeacherTargets(folders=tuple(map(str, folders)))
        data = PackedText(train=(Part(source=str(store_of(tiny))),), length=32, batch=8, extra=extra)
        return jax.tree.map(jnp.asarray, next(iter(validation_batches(data, [store], 1, cache=tiny.data_dir))))

    model = STUDENT.build(Compute(dtype="float32"))
    return batch, model, jax.jit(model.init)(jax.random.key(0)), teacher


def computed(spec, model, params, batch):
    objective = spec.build(model)
    f = lambda p, batch: objective.loss(p, objective.frozen, batch, jax.random.key(0))  # noqa: E731
    return jax.jit(jax.value_and_grad(f, has_aux=True), compiler_options=QUICK)(params, batch)


def same(got, wanted, tolerance):
    (loss, metrics), grads = got
    (other, theirs), others = wanted
    assert loss == pytest.approx(float(other), abs=tolerance)
    for name in metrics:
        assert metrics[name] == pytest.approx(float(theirs[name]), abs=tolerance), name
    largest = max(np.abs(g).max() for g in jax.tree.leaves(others))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest), grads, others)


def test_hidden_states_from_disk_give_what_the_running_teacher_gives(case, made):
    batch, model, params, teacher = case
    options = {"divergence": JSD(), "temperature": 1.5}
    online = Distill(teachers=("",), **options).with_models((teacher,), tokens=V)
    read = Distill(teachers=("",), source=OnDisk(), **options).with_models((teacher,), tokens=V)
    wanted = computed(online, model, params, batch(made("sampled")))
    got = computed(read, model, params, batch(made("hidden")))
    same(got, wanted, 1e-2)  # the hidden states are kept in bfloat16
    assert wanted[0][1]["divergence"] > 0.05


def test_the_head_alone_serves_as_teacher(made):
    folder = made("hidden")
    head = load(folder / "head", part=True)
    assert set(flatten(head.params)) == {"embed/table"} or set(flatten(head.params)) == {"unembed/table"}
    done = slmjax("eval", folder / "head")
    assert done.code == 2
    assert "the output table of" in done.err


@pytest.mark.parametrize("kind", ["top-k", "tail"])
def test_what_a_batch_holds_is_what_the_running_teacher_says(case, made, kind):
    batch, _, _, teacher = case
    found = batch(made(kind, "--k", 8))
    read = (teacher.params, found.tokens, found.positions, found.segment_ids)
    hidden = jax.jit(teacher.model.apply, compiler_options=QUICK)(*read).hidden
    full = np.asarray(jax.nn.log_softmax(teacher.model.unembed(teacher.params, hidden)[..., :V]))
    real = np.asarray(found.segment_ids) > 0
    ids, log_probs = (np.asarray(found.extra[name])[real] for name in ("ids", "log_probs"))
    named = np.take_along_axis(full[real], ids[:, :8], axis=1)
    np.testing.assert_allclose(log_probs[:, :8], named, atol=0.03)  # bfloat16
    np.testing.assert_allclose(named[:, -1], np.sort(full[real])[:, -8], atol=1e-4)
    assert real.sum() > 100
    if kind == "tail":
        assert np.all(ids[:, 8] == -1)
        np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, atol=0.02)


def test_what_is_measured_is_what_is_lost(made):
    found = {kind: TargetStore(str(made(kind, "--k", 8))).manifest for kind in ("top-k", "tail")}
    found["sampled"] = TargetStore(str(made("sampled"))).manifest
    found["hidden"] = TargetStore(str(made("hidden"))).manifest
    error = {kind: manifest["calibration_error"] for kind, manifest in found.items()}
    assert found["hidden"]["kl"] < 1e-4 < found["top-k"]["kl"]
    assert found["tail"]["kl"] < 1e-3
    assert 10 * max(error["sampled"], error["tail"], error["hidden"]) < error["top-k"]
    for kind, manifest in found.items():
        disk = sum(f.stat().st_size for s in ("train", "validation") for f in (made_of(made, kind) / s).rglob("c/*"))
        total = sum(split["tokens"] for split in manifest["splits"].values())
        assert manifest["bytes_per_token"] == pytest.approx(disk / total)
    assert "biased" in (made("top-k", "--k", 8) / "said.txt").read_text()


def made_of(made, kind):
    return made(kind, *{"sampled": (), "hidden": ()}.get(kind, ("--k", 8)))


def test_a_document_is_read_by_itself_in_windows_from_its_start(tiny):
    store = TokenStore(store_of(tiny))
    offsets = np.concatenate([b[:-1] for b in store.offsets("train")] + [[store.count("train", "tokens")]])
    tokens = store.tokens("train")[0 : offsets[-1]]
    start, stop = int(offsets[2]) - 100, int(offsets[2]) + 300
    seen = []
    for rows_ in windows(store, "train", start, stop, length=64, rows=3):
        batch, index = rows_
        for i in range(3):
            for segment in range(1, int(batch.segment_ids[i].max()) + 1):
                here = batch.segment_ids[i] == segment
                at = index[i, here]
                np.testing.assert_array_equal(batch.tokens[i, here], tokens[at])
                np.testing.assert_array_equal(batch.positions[i, here], np.arange(len(at)))
                document = np.searchsorted(offsets, at[0], "right") - 1
                assert (at[0] - offsets[document]) % 64 == 0
                assert len(at) == min(64, offsets[document + 1] - at[0])
                seen += at.tolist()
    assert len(set(seen)) == len(seen)
    assert set(range(start, stop)) <= set(seen)
    assert len(seen) < stop - start + 128


SLOW = """
import sys, time
from slmjax.runs import teacher_targets
original = teacher_targets._write_shard
def slow(*args):
    original(*args)
    time.sleep(1000 if args[2].number == 1 else 0)
teacher_targets._write_shard = slow
sys.argv = ["slmjax", *sys.argv[1:]]
from slmjax.cli.main import main
main()
"""


def test_a_killed_process_goes_on_and_shares_give_the_same_bytes(tiny, tiny_run, tmp_path):
    store = store_of(tiny)
    half = TokenStore(store).count("train", "tokens") // 4 // 128 * 128
    common = ("--targets", "tail", "--k", 4, "--shard", half, *FLOAT32)
    words = ("data", "teacher", tiny_run, "--data", store)
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    done = slmjax(*words, "--out", whole, *common)
    assert done.code == 0, done.err
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, (*words, "--out", killed, *common))], env=env)
    deadline = time.monotonic() + 120
    while not (killed / "done" / "train-000001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in (killed / "train").rglob("c/*")}
    assert before
    with pytest.raises(UserError, match="are not complete"):
        TargetStore(str(killed))
    damaged = next(iter(sorted(before)))
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
    assert slmjax(*words, "--out", killed, *common).code == 0
    assert content(killed) == content(whole)
    assert damaged.stat().st_mtime_ns != before[damaged]
    assert [p for p, t in before.items() if p.stat().st_mtime_ns == t], "what was complete is not computed again"

    for share, complete in (("2/2", False), ("1/2", True)):
        done = slmjax(*words, "--out", shared, *common, "--share", share)
        assert done.code == 0, done.err
        assert (shared / "manifest.json").exists() == complete
    assert content(shared) == content(whole)
    TargetStore(str(shared)).verify()
    first = next((shared / "train" / "ids").rglob("c/0"))
    first.write_bytes(b"x" + first.read_bytes()[1:])
    with pytest.raises(DataError, match="corrupt shard"):
        TargetStore(str(shared)).verify()


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("sampled", "DistillOffline()"),
        ("hidden", 'Distill(teachers=({targets!r} + "/head",), source=OnDisk())'),
    ],
)
def test_a_student_resumes_bit_for_bit_and_is_used_without_targets(tiny, made, tmp_path, kind, objective):
    targets = made(kind)
    file, whole, copy = tmp_path / f"student_of_{kind}.py", tmp_path / "whole", tmp_path / "copy"
    text = FILE.format(tiny=str(tiny.file), targets=str(targets), objective=objective.format(targets=str(targets)))
    file.write_text(text)
    every = ("--runtime.checkpoints.every", 4, "--runtime.checkpoints.keep-last", 10)
    reader = ("--runtime.reader", "processes", "--runtime.reader.count", 1) if kind == "hidden" else ()
    done = slmjax("train", file, *runtime(tiny, whole), *every, *reader)
    assert done.code == 0, done.err
    if kind == "sampled":
        shutil.copytree(whole, copy)
        for step in (8, 12):
            shutil.rmtree(copy / "checkpoints" / str(step))
        assert slmjax("train", file, *runtime(tiny, copy), *every).code == 0
        assert rows(copy) == rows(whole)
    moved = targets.with_name("elsewhere")
    targets.rename(moved)
    try:
        done = slmjax("eval", whole, "--batches", 1)
        assert done.code == 0, done.err
        done = slmjax("train", file, *runtime(tiny, tmp_path / "new"))
        assert (done.code, (tmp_path / "new").exists()) == (2, False)
        assert "no targets of a teacher there" in done.err
    finally:
        moved.rename(targets)
    last = {k.removeprefix("val_") for k in rows(whole)[-1]}
    assert {"divergence", "agreement", "loss"} <= last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--targets", "top-k", "--k", V + 1), r"--k is 385; expected 1 to 384"),
        (("--targets", "top-k", "--draws", 3), "--draws is not used with --targets top-k"),
        (("--length", 65), "--length is 65; expected 1 to 64"),
        (("--shard", 100), "--shard is 100; expected a multiple of 128"),
        (("--share", "3/2"), "--share is 3/2"),
        (("--out", "gs://bucket/targets"), "is a URL; expected a folder"),
        (("renamed",), "has another vocabulary than the data"),
        (("encoder",), "is an encoder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tiny, tiny_run, others, tmp_path, options, message):
    model, options = (others[options[0]], ()) if options[0] in others else (tiny_run, options)
    done = slmjax("data", "teacher", model, "--data", store_of(tiny), "--out", tmp_path / "out", *options)
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1), done.err
    assert message in done.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def others(tiny, tmp_path_factory):
    """Folders of untrained models: an encoder, and a decoder for which two ids mean each other's tokens."""
    folder, store = tmp_path_factory.mktemp("others"), store_of(tiny)
    shape = {"layers": 1, "width": 16, "heads": 2, "hidden": 24, "vocab": V, "context": 64}
    for name, model in (("encoder", bert(**shape)), ("renamed", llama(**shape, kv_heads=1))):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model": to_json(model), "imported": {}}))
        shapes = jax.eval_shape(model.build().init, jax.random.key(0))
        save_params(folder / name / "checkpoints", jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), {})
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(store / file, folder / name / file)
    file = folder / "renamed" / "tokenizer.json"
    spec = json.loads(file.read_text())
    vocab = spec["model"]["vocab"]
    one, two = list(vocab)[100:102]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    file.write_text(json.dumps(spec))
    return {path.name: path for path in folder.iterdir()}


def test_targets_of_other_things_are_named(tiny, tiny_run, made, tmp_path):
    targets = made("sampled")
    words = ("--data", store_of(tiny), "--out", targets, "--targets", "sampled", *FLOAT32)
    done = slmjax("data", "teacher", tiny_run / "checkpoints" / "8", *words)
    assert done.code == 2
    assert "holds targets of other settings; they differ in teacher.hash" in done.err
    done = slmjax("data", "teacher", tiny_run, *words, "--draws", 3)
    assert done.code == 2
    assert "kind.draws: 64 -> 3" in done.err
    (tmp_path / "mine.txt").write_text("")
    done = slmjax("data", "teacher", tiny_run, *words[:2], "--out", tmp_path)
    assert (done.code, [p.name for p in tmp_path.iterdir()]) == (2, ["mine.txt"])

    def student(objective, folder, *options):
        file = tmp_path / f"mistaken_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(FILE.format(tiny=str(tiny.file), targets=str(folder), objective=objective))
        done = slmjax("train", file, *runtime(tiny, tmp_path / "run"), *options)
        assert (done.code, (tmp_path / "run").exists()) == (2, False), done.err
        assert len(done.err.strip().splitlines()) == 1
        return done.err

    hidden = made("hidden")
    assert "holds hidden states; use Distill" in student("DistillOffline()", hidden)
    with_teacher = f"Distill(teachers=({str(tiny_run / 'checkpoints' / '8')!r},), source=OnDisk())"
    assert "is another model than the teacher of" in student(with_teacher, hidden)
    assert "has no hidden states" in student(with_teacher, targets)
    online = f"Distill(teachers=({str(hidden / 'head')!r},))"
    assert "alone, which is no model by itself" in student(online, hidden)

    with pytest.raises(UserError, match="differ in columns"):
        _ = TeacherTargets(folders=(str(hidden), str(targets))).opened
    changed = tmp_path / "changed"
    shutil.copytree(targets, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    for field, value, message in (
        ("tokenizer", "a" * 64, "targets for text of the tokenizer aaaaaaaaaaaa, and moby has the tokenizer"),
        ("data", {"name": "other", "fingerprint": "b" * 64}, "targets for other (bbbbbbbbbbbb), and none for moby"),
    ):
        (changed / "manifest.json").write_text(json.dumps(manifest | {field: value}))
        assert message in student("DistillOffline()", changed)
