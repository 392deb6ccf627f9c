"""MODEL in all its forms, and the one line for what is none."""

import json
import shutil

import jax
import numpy as np
import pytest

from slmjax import tree
from slmjax.config import override
from slmjax.convert.hf import write_hf
from slmjax.errors import StorageError, UserError
from slmjax.runs.loading import load
from slmjax.serialise import from_json, to_json
from slmjax.train.checkpoint_folder import save_params
from slmjax.views import EMA


def same(a, b):
    for path, x in tree.flatten(a).items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(tree.flatten(b)[path]), err_msg=path)


def test_run_checkpoint_and_folder_of_checkpoints(tiny_run):
    whole = load(tiny_run)
    assert whole.step == 12
    assert whole.experiment.name == "tiny"
    assert whole.tokenizer().vocab <= whole.decoder.vocab
    same(whole.params, load(tiny_run / "checkpoints").params)
    early = load(tiny_run / "checkpoints" / "4")
    assert early.step == 4
    same(early.params, load(tiny_run, step=4).params)
    moved = np.abs(np.asarray(early.params["embed"]["table"]) - np.asarray(whole.params["embed"]["table"])).max()
    assert moved > 1e-4


def test_hugging_face_folder_and_import(tiny_run, tmp_path):
    run = load(tiny_run)
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", run.decoder, run.params, tokenizer=run.tokenizer())
    theirs = load(tmp_path / "hf")
    assert (theirs.decoder, theirs.step, theirs.experiment) == (run.decoder, None, None)
    same(theirs.params, run.params)
    assert theirs.tokenizer().fingerprint == run.tokenizer().fingerprint
    with pytest.raises(UserError, match="no step 3 to take"):
        load(tmp_path / "hf", step=3)
    imported = tmp_path / "imported"
    imported.mkdir()
    (imported / "config.json").write_text(json.dumps({"format": 1, "model": to_json(run.decoder)}))
    save_params(imported / "checkpoints", run.params, {})
    same(load(imported).params, run.params)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load(imported).tokenizer()


def test_falls_back_to_the_last_good_checkpoint_and_says_so(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    victim = max((run / "checkpoints" / "12" / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    said = []
    assert load(run, say=said.append).step == 8
    assert len(said) == 1
    assert "checkpoint 12 is damaged" in said[0]
    assert "using step 8" in said[0]
    assert (run / "checkpoints" / "12").is_dir()
    with pytest.raises(StorageError, match=r"checkpoint 12 is damaged .* choose another step of: 4, 8"):
        load(run, step=12)
    with pytest.raises(StorageError, match="no checkpoint of step 5; there are: 4, 8, 12"):
        load(run, step=5)


def test_views_and_optimizers_have_their_say(tiny_run, tmp_path):
    """A checkpoint of a run with EMA gives the average, as training's own evaluation did."""
    from slmjax.runs.build import states_of
    from slmjax.train.checkpoint import Checkpointer, Checkpoints

    config = json.loads((tiny_run / "config.json").read_text())
    experiment = override(from_json(config["experiment"]), "view", EMA(decay=0.9))
    made = states_of(experiment)
    state = made.fresh()
    state = state._replace(view=jax.tree.map(lambda x: x + 1.0, state.view))
    expected = jax.tree.map(np.asarray, made.params(state))
    with Checkpointer(tmp_path / "checkpoints", Checkpoints()) as saver:
        saver.save(3, state, {}, {})
    (tmp_path / "config.json").write_text(json.dumps({**config, "experiment": to_json(experiment)}))
    same(load(tmp_path).params, expected)
    assert abs(float(expected["embed"]["table"].mean()) - 1) < 0.1


def test_what_is_no_model_is_said_in_one_line(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text("")
    empty, other, broken, unknown = (tmp_path / name for name in ("empty", "other", "broken", "unknown"))
    for folder in (empty, other, broken, unknown):
        folder.mkdir()
    (other / "notes.txt").write_text("")
    (broken / "config.json").write_text("{")
    (unknown / "config.json").write_text("{}")
    for path, message in (
        (tmp_path / "nowhere", "no such folder; expected a run folder"),
        (file, "is a file; expected a run folder"),
        (empty, r"no config.json \(it holds nothing\)"),
        (other, r"no config.json \(it holds notes.txt\)"),
        (broken, "cannot be read"),
        (unknown, "describes no model"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    (unknown / "config.json").write_text('{"experiment": {}}')
    with pytest.raises(StorageError, match="no checkpoint yet"):
        load(unknown)
