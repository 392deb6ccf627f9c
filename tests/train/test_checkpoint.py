"""Checkpoints: what goes in comes out, on any mesh; what is damaged is noticed, set aside and never used."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import toy

from slmjax import tree
from slmjax.errors import StorageError, UserError
from slmjax.train import checkpoint_folder, manifest
from slmjax.train.checkpoint import Checkpointer, Checkpoints
from slmjax.train.checkpoint_folder import storage
from slmjax.train.sharding import Mesh
from slmjax.types import TrainState

HERE = Path(__file__).parent
EXTRA = {"data": {"next": 3}, "tracker": {"id": "x"}, "rollbacks": 0}


def trained(program, n=3):
    state = program.init()
    for i in range(n):
        state, _ = program.step(state, (), program.put(toy.batch(i)))
    return state


@pytest.fixture(scope="module")
def one():
    """A program on one device, and its state after 3 steps."""
    program = toy.program()
    return program, trained(program)


def assert_equal(a, b):
    flat = tree.flatten(jax.device_get(b))
    for path, x in tree.flatten(jax.device_get(a)).items():
        assert x.dtype == flat[path].dtype
        np.testing.assert_array_equal(x, flat[path], err_msg=path)


def save(folder, state, *steps, policy=None, said=None, metrics=None):
    with Checkpointer(folder, policy or Checkpoints(), (said or []).append) as saved:
        for step in steps:
            saved.save(step, state, EXTRA | {"at": step}, (metrics or {}).get(step, {}))


def restore(folder, program, said=None):
    with Checkpointer(folder, Checkpoints(), [].append if said is None else said.append) as saved:
        return saved.restore(program.abstract)


def test_everything_comes_back_bit_for_bit(tmp_path, one):
    program, state = one
    save(tmp_path, state, 3)
    restored = restore(tmp_path, program)
    assert_equal(restored.state, state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert (restored.step, restored.extra) == (3, EXTRA | {"at": 3, "metrics": {}})
    assert checkpoint_folder.extra(tmp_path)["data"] == {"next": 3}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(data=2, fsdp=4), Mesh(data=2, fsdp=2, tensor=2)])
def test_a_checkpoint_moves_between_meshes(tmp_path, one, mesh):
    """One device -> eight -> one, and training goes on alike."""
    program, state = one
    many = toy.program(mesh, jax.devices())
    save(tmp_path / "a", state, 3)
    there = restore(tmp_path / "a", many).state
    assert_equal(there, state)
    for path, x in tree.flatten(there).items():
        assert x.sharding == tree.flatten(many.abstract)[path].sharding, path
    save(tmp_path / "b", there, 3)
    assert_equal(restore(tmp_path / "b", program).state, state)
    _, metrics = many.step(there, (), many.put(toy.batch(3)))
    again = restore(tmp_path / "a", program).state
    _, expected = program.step(again, (), program.put(toy.batch(3)))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


def test_steps_that_follow_do_not_touch_a_save_in_flight(tmp_path):
    """The step donates the very buffers that a save is still writing."""
    params = jax.jit(lambda: {"w": jnp.full((64, 2**14), 1.0), "b": jnp.full(3, 1.0)})()
    advance = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    folder = tmp_path / "checkpoints"
    policy = Checkpoints(keep_last=5)
    with Checkpointer(folder, policy, print) as saved:
        for step in range(1, 5):
            state = TrainState(jnp.asarray(step), params, (), ())
            saved.save(step, state, EXTRA, {})
            for _ in range(3):
                params = advance(params)
    for step in range(1, 5):
        got = checkpoint_folder.restore_params(folder, step)
        assert (np.asarray(got["w"]) == 3 * step - 2).all()


def test_what_is_kept(tmp_path, one):
    _, state = one
    policy = Checkpoints(keep_last=2, keep_every=40, best="loss")
    losses = {10: 5.0, 20: 3.0, 30: np.nan, 40: 3.5, 50: 3.2, 60: 3.1}
    metrics = {step: {"loss": x} for step, x in losses.items()}
    save(tmp_path, state, *losses, policy=policy, metrics=metrics)
    assert checkpoint_folder.steps(tmp_path) == [20, 40, 50, 60]
    with Checkpointer(tmp_path, policy, print) as saved:
        assert saved.improves({"loss": 2.9})
        assert not saved.improves({"loss": 3.05})
        assert not saved.improves({"accuracy": 0.5})


@pytest.mark.parametrize("wrong", [{"every": -1}, {"keep_last": 0}, {"seconds": -0.5}])
def test_policies_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=f"checkpoints.{next(iter(wrong))} is "):
        Checkpoints(**wrong)


def test_saving_a_step_again_keeps_the_first(tmp_path, one):
    program, state = one
    save(tmp_path, state, 3)
    other = jax.tree.map(jnp.zeros_like, state)
    save(tmp_path, other, 3)
    assert_equal(restore(tmp_path, program).state, state)


def test_the_sums_are_those_of_sha256sum(tmp_path, one):
    save(tmp_path, one[1], 3)
    done = subprocess.run(["sha256sum", "-c", manifest.NAME], cwd=tmp_path / "3", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) > 10


def flip(path: Path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def listed(folder):
    return [line.split("  ", 1)[1] for line in (folder / manifest.NAME).read_text().splitlines()]


def test_any_flipped_bit_is_noticed(tmp_path, one):
    """Every file of a checkpoint, a random bit in each: Orbax alone restores most of these silently."""
    save(tmp_path, one[1], 3)
    folder, rng = tmp_path / "3", np.random.default_rng(0)
    for name in [*listed(folder), manifest.NAME]:
        path = folder / name
        original = path.read_bytes()
        for _ in range(4):
            flip(path, rng)
            assert manifest.problems(folder), name
            path.write_bytes(original)
    assert not manifest.problems(folder)


def damage_flip(folder):
    flip(max((folder / n for n in listed(folder)), key=lambda p: p.stat().st_size), np.random.default_rng(1))


def damage_truncate(folder):
    path = max((folder / n for n in listed(folder)), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def damage_missing(folder):
    (folder / "train" / "manifest.ocdbt").unlink()


def damage_zeroed(folder):
    path = max((folder / n for n in listed(folder)), key=lambda p: p.stat().st_size)
    path.write_bytes(b"\0" * path.stat().st_size)


def damage_sums(folder):
    (folder / manifest.NAME).unlink()


def damage_extra(folder):
    (folder / "extra" / "metadata").write_text(json.dumps({"data": {"next": 7}}))


@pytest.mark.parametrize(
    "damage", [damage_flip, damage_truncate, damage_missing, damage_zeroed, damage_sums, damage_extra]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, one, damage):
    program, state = one
    earlier = trained(toy.program(), 1)
    save(tmp_path, earlier, 1)
    save(tmp_path, state, 3)
    damage(tmp_path / "3")
    with pytest.raises(StorageError, match="3 is damaged"):
        checkpoint_folder.restore_params(tmp_path, 3)
    said = []
    restored = restore(tmp_path, program, said)
    assert restored.step == 1
    assert_equal(restored.state, earlier)
    assert len(said) == 1
    assert "checkpoint 3 is damaged: " in said[0]
    assert said[0].endswith("renamed to bad-3, trying the one before")
    assert (tmp_path / "bad-3").is_dir()  # nothing is deleted
    save(tmp_path, state, 3)
    assert_equal(restore(tmp_path, program).state, state)


def test_with_all_damaged_there_is_nothing_to_restore(tmp_path, one):
    program, state = one
    save(tmp_path, state, 1, 2)
    for step in (1, 2):
        damage_flip(tmp_path / str(step))
    said = []
    assert restore(tmp_path, program, said) is None
    assert [line.rsplit(", ", 1)[1] for line in said] == [
        "trying the one before",
        "no other is left: training starts over from step 0",
    ]
    assert sorted(p.name for p in tmp_path.glob("bad-*")) == ["bad-1", "bad-2"]


def test_a_checkpoint_of_another_model_is_not_damaged_but_refused(tmp_path, one):
    program, state = one
    save(tmp_path, state._replace(params={"other": jnp.ones(3)}), 3)
    with pytest.raises(StorageError, match="cannot restore step 3"):
        restore(tmp_path, program)
    assert checkpoint_folder.steps(tmp_path) == [3]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: writing"), ValueError("DATA_LOSS: sums")],
)
def test_what_storage_raises_is_one_line(tmp_path, error):
    with (
        pytest.raises(StorageError, match=r"cannot save step 3: .*earlier checkpoints are intact"),
        storage(tmp_path, "save step 3"),
    ):
        raise error


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), KeyError("a"), AssertionError()])
def test_a_bug_is_not_blamed_on_storage(tmp_path, error):
    with pytest.raises(type(error)) as raised, storage(tmp_path, "save step 3"):
        raise error
    assert raised.value is error


def test_the_sums_are_written_before_a_step_is_committed(tmp_path, one, monkeypatch):
    """If they cannot be, there is no step, and the one before is used."""
    program, state = one
    save(tmp_path, state, 1)
    seen = []

    def fail(folder):
        seen.append((folder.name, sorted(p.name for p in folder.iterdir() if p.is_dir())))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write", fail)
        with pytest.raises(StorageError, match="No space left on device"):
            save(tmp_path, state, 3)
    ((name, items),) = seen
    assert name.startswith("3.")
    assert items == ["extra", "params", "train"]  # all of them under their last names: nothing is written after
    assert checkpoint_folder.steps(tmp_path) == [1]
    assert restore(tmp_path, program).step == 1
    assert not (tmp_path / name).exists()  # removed as the folder was opened again


def test_nothing_is_removed_before_a_newer_step_is_saved(tmp_path, one):
    """The newest may be damaged: a run that starts with a stricter policy still falls back to the older ones."""
    program, state = one
    save(tmp_path, state, 1, 2, 3)
    damage_flip(tmp_path / "3")
    with Checkpointer(tmp_path, Checkpoints(keep_last=1), [].append) as saved:
        assert saved.restore(program.abstract).step == 2
        assert checkpoint_folder.steps(tmp_path) == [1, 2]
        saved.save(4, state, EXTRA, {})
    assert checkpoint_folder.steps(tmp_path) == [4]


def test_parameters_alone(tmp_path, one):
    _, state = one
    save(tmp_path / "run", state, 3)
    got = checkpoint_folder.restore_params(tmp_path / "run")
    assert_equal(got, state.params)
    checkpoint_folder.save_params(tmp_path / "imported", got, {"from": "elsewhere"})
    assert_equal(checkpoint_folder.restore_params(tmp_path / "imported"), state.params)
    assert checkpoint_folder.extra(tmp_path / "imported") == {"from": "elsewhere"}
    with pytest.raises(StorageError, match="no checkpoint of step 7; there are: 3"):
        checkpoint_folder.restore_params(tmp_path / "run", 7)
    with pytest.raises(StorageError, match="there are: none"):
        checkpoint_folder.restore_params(tmp_path / "nowhere")


def test_two_runs_on_one_folder(tmp_path, one):
    """Another process holds it; killed, it holds it no more."""
    _, state = one
    code = (
        "import sys, time, pathlib\nfrom slmjax.train.lock import lock\n"
        "with lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} on .* is at work here"):
            save(tmp_path, state, 3)
        other.kill()
        other.wait()
    save(tmp_path, state, 3)
    assert checkpoint_folder.steps(tmp_path) == [3]


@contextlib.contextmanager
def without_permission(folder):
    """The folder may be read only. Root ignores modes, so it acts as nobody meanwhile."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_folder_that_may_not_be_written(tmp_path, one):
    program, state = one
    save(tmp_path, state, 3)
    with pytest.raises(StorageError, match="Permission denied") as raised, without_permission(tmp_path):
        save(tmp_path, state, 4)
    assert raised.value.code == 5
    assert checkpoint_folder.steps(tmp_path) == [3]
    assert_equal(restore(tmp_path, program).state, state)


WRITER = """
import pathlib, sys
import jax.numpy as jnp
import numpy as np
from slmjax.train.checkpoint import Checkpointer, Checkpoints
from slmjax.types import TrainState

def state(step):
    w = np.random.default_rng(step).standard_normal(int(sys.argv[2]), np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(w)}, (), {"e": jnp.ones(9) * step})

if __name__ == "__main__":
    with Checkpointer(pathlib.Path(sys.argv[1]), Checkpoints(keep_last=2)) as saved:
        for step in range(1, int(sys.argv[3])):
            saved.save(step, state(step), {"step": step}, {})
            print(step, flush=True)
            saved.wait()
"""


READER = """
import pathlib, sys
import numpy as np
from slmjax.train import checkpoint_folder

folder = pathlib.Path(sys.argv[1])
for step in checkpoint_folder.steps(folder):
    written = np.random.default_rng(step).standard_normal(int(sys.argv[2]), np.float32)
    print("intact", step, (checkpoint_folder.restore_params(folder, step)["w"] == written).all())
"""


def test_a_full_disk(tmp_path):
    """A real file system (a tmpfs in a mount namespace of its own) that fills up in the middle of the third save."""
    (tmp_path / "writer.py").write_text(WRITER)
    (tmp_path / "reader.py").write_text(READER)
    inside = (
        "mkdir disk && mount -t tmpfs -o size=21m none disk && head -c 16M /dev/urandom > disk/other && "
        "$PYTHON writer.py disk 500000 50; rm disk/other; $PYTHON reader.py disk 500000"
    )
    env = os.environ | {"PYTHON": sys.executable}
    command = ["unshare", "-rm", "sh", "-c", inside]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "slmjax.errors.StorageError: " in done.stderr, done.stdout + done.stderr
    assert "earlier checkpoints are intact; free some space and run the same command again" in done.stderr
    assert "ERROR:absl" not in done.stderr  # Orbax's own account, of hundreds of lines
    assert done.stdout.splitlines() == ["1", "2", "3", "intact 1 True", "intact 2 True"], done.stdout + done.stderr


def test_killed_in_mid_save(tmp_path):
    """SIGKILL at many moments of a stream of saves: the newest good checkpoint is whole, and of the last steps said."""
    script, folder = tmp_path / "writer.py", tmp_path / "checkpoints"
    script.write_text(WRITER)
    rng = np.random.default_rng(0)
    in_flight = 0
    for attempt in range(6):
        first = max(checkpoint_folder.steps(folder), default=0) + 1
        code = script.read_text().replace("range(1,", f"range({first},")
        with subprocess.Popen(
            [sys.executable, "-c", code, folder, "2000000", "1000"], stdout=subprocess.PIPE, text=True
        ) as writer:
            for _ in range(1 + attempt % 2):
                step = int(writer.stdout.readline())
            time.sleep(rng.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            step = max([step, *map(int, writer.stdout.read().split())])
        in_flight += any("tmp" in p.name for p in folder.iterdir())
        newest = max(checkpoint_folder.steps(folder), default=0)
        assert step - 1 <= newest <= step
        if newest:
            assert not manifest.problems(folder / str(newest))
            written = np.random.default_rng(newest).standard_normal(2_000_000, np.float32)
            np.testing.assert_array_equal(checkpoint_folder.restore_params(folder, newest)["w"], written)
    assert in_flight >= 3
