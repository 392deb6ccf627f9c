"""`slmjax prune` on a trained model."""

import numpy as np
import pytest
from running import slmjax

from slmjax import tree
from slmjax.compress.prune.layout import prunable, to_matrices
from slmjax.runs.loading import load


@pytest.fixture(scope="module")
def pruned(tiny_run, tmp_path_factory):
    def make(*options):
        out = tmp_path_factory.mktemp("pruned") / "model"
        done = slmjax("prune", tiny_run, "--out", out, "--batches", 2, *options)
        assert done.code == 0, done.err
        return load(out), done.out

    return make


def matrices(loaded):
    flat = tree.flatten(loaded.params)
    return {
        path: np.asarray(to_matrices(np.asarray(flat[path]), axes, path))
        for path, axes in prunable(loaded.decoder.axes()).items()
    }


def test_two_of_four_inputs_are_zero(pruned):
    loaded, said = pruned("--method", "sparsegpt", "--pattern", "2:4")
    assert "50.0% of the layers' matrices are zero" in said
    for x in matrices(loaded).values():
        assert np.all((x.reshape(*x.shape[:-1], -1, 4) == 0).sum(axis=-1) == 2)


def test_wanda_prunes_each_output_alike_and_magnitude_the_smallest(pruned, tiny_run):
    loaded, _ = pruned("--method", "wanda", "--sparsity", 0.25)
    for x in matrices(loaded).values():
        assert np.all((x == 0).sum(axis=-1) == x.shape[-1] // 4)
    original, smallest = matrices(load(tiny_run)), matrices(pruned("--method", "magnitude", "--sparsity", 0.25)[0])
    for path, x in smallest.items():
        for old, new in zip(original[path], x, strict=True):
            assert np.abs(old[new == 0]).max() <= np.abs(old[new != 0]).min()
            np.testing.assert_array_equal(new[new != 0], old[new != 0])


def test_fewer_layers_and_channels_are_a_smaller_model(pruned, tiny_run, tmp_path):
    whole = load(tiny_run).decoder
    shallow, said = pruned("--method", "depth", "--sparsity", 0.5)
    assert shallow.decoder.layers == whole.layers // 2
    assert "before" in said
    narrow, _ = pruned("--method", "width", "--sparsity", 0.25)
    assert narrow.decoder.blocks()[0].mlp.hidden == 48
    done = slmjax("export", narrow.source, "--out", tmp_path / "hf")
    assert done.code == 0, done.err
    assert load(tmp_path / "hf").decoder.blocks()[0].mlp.hidden == 48


def test_width_keeps_the_channels_with_the_largest_activations(pruned, tiny_run):
    """The kept columns of the down projection are columns of the original, in order."""
    whole = np.asarray(tree.flatten(load(tiny_run).params)["layers/mlp/down"])
    narrow = np.asarray(tree.flatten(pruned("--method", "width", "--sparsity", 0.5)[0].params)["layers/mlp/down"])
    for old, new in zip(whole, narrow, strict=True):
        places = [next(i for i, row in enumerate(old) if np.array_equal(row, kept)) for kept in new]
        assert places == sorted(places)
        assert len(set(places)) == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", 1.5], "--sparsity is 1.5"),
        (["--pattern", "4:2"], "expected N:M"),
        (["--pattern", "2:4", "--sparsity", 0.5], "leave out one"),
        (["--method", "depth", "--pattern", "2:4"], "leave out one"),
        (["--method", "depth", "--sparsity", 0.9], "leaves 0 of 2 layers"),
    ],
)
def test_mistakes(tiny_run, tmp_path, options, message):
    done = slmjax("prune", tiny_run, "--out", tmp_path / "out", *options)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()
