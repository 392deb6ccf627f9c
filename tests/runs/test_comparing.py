"""`slmjax report A B`: what is read from run folders and from folders of `slmjax quantize`."""

import pytest
from running import slmjax

from slmjax.errors import UserError
from slmjax.models.flops import flops_per_token
from slmjax.runs.comparing import entry
from slmjax.runs.loading import load


@pytest.fixture(scope="module")
def packed(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "rounded"
    done = slmjax("quantize", tiny_run, "--method", "rtn", "--bits", 4, "--batches", 2, "--out", out)
    assert done.code == 0, done.err
    return out, done.out


def test_a_run_and_what_was_rounded_from_it(tiny_run, packed, tmp_path):
    folder, said = packed
    run, rounded = entry(tiny_run), entry(folder)
    loaded = load(tiny_run)
    assert run.flops_per_token == flops_per_token(loaded.decoder, loaded.experiment.data.length).attention
    assert run.sizes["exported to Hugging Face"] == 2 * sum(x.size for x in _leaves(loaded.params))
    assert rounded.sizes == {"written by slmjax quantize": (folder / "weights.safetensors").stat().st_size}
    assert f"{rounded.loss:.4f} after" in said
    page = tmp_path / "page.html"
    done = slmjax("report", tiny_run, folder, "--out", page)
    assert done.code == 0, done.err
    assert f"<td>{rounded.loss:.4f}</td>" in page.read_text()


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_what_cannot_be_compared(tiny_run, tmp_path):
    with pytest.raises(UserError, match="expected a run folder, or one that slmjax quantize wrote"):
        entry(tmp_path)
    assert "which run?" in slmjax("report").err
