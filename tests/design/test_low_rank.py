"""LoRA in one file: the model stays frozen, the optimizer keeps little, and a checkpoint opens without the base."""

import shutil

import jax
import numpy as np
import pytest
from running import ROOT, slmjax

from slmjax import tree
from slmjax.config import Runtime
from slmjax.convert.hf import write_hf
from slmjax.experiment_file import load_experiment, load_module
from slmjax.runs.build import build
from slmjax.runs.loading import load
from slmjax.train import stored
from slmjax.train.checkpoint_folder import restore_params

FILE = ROOT / "tests" / "design" / "low_rank.py"


@pytest.fixture(scope="module")
def base(small, tmp_path_factory):
    """An import: a Hugging Face folder of a trained model."""
    run = small(ROOT / "experiments/pretrain/quickstart.py", "base")
    folder = tmp_path_factory.mktemp("base") / "hf"
    loaded = load(run)
    folder.mkdir()
    write_hf(folder, loaded.decoder, loaded.params)
    return folder


@pytest.fixture(scope="module")
def adapted(small, base):
    return small(FILE, "lora", "--start.model", base)


def test_one_file_of_at_most_sixty_lines():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 60
    assert not [p for p in (ROOT / "slmjax").rglob("*.py") if "LoRA(" in p.read_text()]


def test_only_the_adapters_are_trained(adapted, base):
    params, own = stored.parts(restore_params(adapted / "checkpoints"))
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(load(base).params))
    up = [x for path, x in tree.flatten(own).items() if path.endswith("/up")]
    assert all(np.abs(x).max() > 0 for x in up)


def test_optimizer_state_is_that_of_the_adapters(adapted):
    load_module(FILE)
    experiment, _ = load_experiment(str(adapted / "config.json"))
    state = build(experiment, Runtime()).program.abstract
    _, own = stored.parts(state.params)
    assert tree.nbytes(state.opt.optimizer) <= 1.1 * 2 * tree.nbytes(own)  # AdamW: two moments a parameter
    assert tree.nbytes(own) < 0.02 * tree.nbytes(state.params)


def test_the_frozen_parameters_are_not_copied(adapted):
    """The compiled step gives back the very buffers of the frozen parameters that it was given."""
    load_module(FILE)
    experiment, _ = load_experiment(str(adapted / "config.json"))
    program = build(experiment, Runtime()).program
    from train.toy import batch

    state = program.init()
    frozen = tree.flatten(state.params)["layers/mlp/up"]
    before = frozen.addressable_shards[0].data.unsafe_buffer_pointer()
    state, _ = program.step(state, (), program.put(batch(0)))
    after = tree.flatten(state.params)["layers/mlp/up"].addressable_shards[0].data.unsafe_buffer_pointer()
    assert before == after


def test_a_run_goes_on_and_opens_when_its_base_is_gone(adapted, base, small, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(base, moved)
    try:
        again = slmjax("train", adapted / "config.json", "--code", FILE, "--runtime.workdir", adapted)
        assert "complete, 30 steps" in again.out, again.err
        assert load(adapted).step == 30
    finally:
        shutil.move(moved, base)


def test_another_base_is_another_experiment(adapted, small, base, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    (weights,) = (tmp_path / "other").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    arguments = ("--code", FILE, "--runtime.workdir", adapted, "--start.model", tmp_path / "other")
    refused = slmjax("train", adapted / "config.json", *arguments)
    assert refused.code == 2
    assert "another experiment; it differs in start.model" in refused.err
