"""A run folder belongs to a run from its first step on, and a shortened run needs no second knob."""

import json
import shutil

import pytest
from running import runtime, slmjax

from slmjax.runs.shortening import shortened


@pytest.fixture
def wsd(tiny, tmp_path):
    """The tiny experiment with the schedule WSD(warmup_steps=5, decay_fraction=0.3) over 12 steps."""
    text = tiny.file.read_text().replace("import Cosine", "import WSD")
    file = tmp_path / f"{tmp_path.name}_wsd.py"
    file.write_text(
        text.replace("Cosine(peak_lr=1e-2, warmup_steps=2)", "WSD(peak_lr=1e-2, warmup_steps=5, decay_fraction=0.3)")
    )
    return file


def test_a_refused_start_claims_nothing(tiny, wsd, tmp_path):
    place = runtime(tiny, tmp_path / "run")
    refused = slmjax("train", wsd, *place, "--steps", "6", "--schedule.warmup-steps", "5")
    assert refused.code == 2
    assert "schedule.warmup_steps (5) and decay_fraction (0.3) take more than the run's 6 steps" in refused.err
    assert not (tmp_path / "run").exists()
    done = slmjax("train", wsd, *place, "--steps", "6")
    assert done.code == 0, done.err
    assert "6 steps instead of 12, in proportion: schedule.warmup_steps 5 -> 2\n" in done.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["experiment"]["schedule"]["warmup_steps"] == 2
    again = slmjax("train", wsd, *place, "--steps", "6")
    assert "complete, 6 steps" in again.out
    other = slmjax("train", wsd, *place, "--steps", "6", "--seed", "1")
    assert other.code == 2
    assert "another experiment; it differs in seed: 0 -> 1" in other.err

    # one that had claimed the folder and ended before its first step: nothing is lost by another experiment there
    (tmp_path / "dead").mkdir()
    for name in ("config.json", "compute.json", "experiment.py"):
        shutil.copy(tmp_path / "run" / name, tmp_path / "dead")
    (tmp_path / "dead" / "metrics.jsonl").touch()
    done = slmjax("train", wsd, *runtime(tiny, tmp_path / "dead"), "--steps", "6", "--seed", "1")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "dead" / "config.json").read_text())["experiment"]["seed"] == 1


def test_every_number_of_steps_shrinks_in_proportion(wsd):
    from slmjax.compress.quant.quantizers import Quantizer
    from slmjax.compress.quant.uniform import Symmetric
    from slmjax.compress.quant.view import Quantize, Rule
    from slmjax.config import override
    from slmjax.experiment_file import load_experiment

    base, _ = load_experiment(str(wsd))
    quantizer: Quantizer = Symmetric(bits=4)
    late = override(base, "view", Quantize(rules=(Rule(quantizer=quantizer),), start=9))
    cut = shortened(late, 4)
    assert cut.experiment.steps == 4
    assert cut.experiment.schedule.warmup_steps == 2
    assert cut.experiment.view.start == 3
    assert cut.changes == ("schedule.warmup_steps 5 -> 2", "view.start 9 -> 3")
    assert shortened(late, 12).experiment == late
    assert shortened(late, 24).changes == ()


def test_validation_that_cannot_be_is_said_at_the_start(tiny, tmp_path):
    file = tmp_path / "never_validated.py"
    # Under a name of its own: the store of `tiny` lies in the same folder.
    words = tiny.file.read_text().replace('name="moby"', 'name="unvalidated"')
    file.write_text(words.replace("validation=0.1", "validation=0.0"))
    done = slmjax("train", file, *runtime(tiny, tmp_path / "run"), "--steps", "1", "--schedule.warmup-steps", "0")
    assert done.code == 0, done.err
    assert "no validation: evaluation.every is 6, but unvalidated holds no validation data" in done.err
    assert "no validation" not in slmjax("train", tiny.file, *runtime(tiny, tmp_path / "other"), "--steps", "1").err


def test_who_is_refused_leaves_the_folder_to_its_owner(tmp_path):
    """A run holds the folder from before its first step on; nothing of it is removed by another that finds it held."""
    from slmjax.errors import StorageError
    from slmjax.runs.folder import held
    from slmjax.train.lock import Locked

    folder = tmp_path / "run"
    with held(folder, {}):
        with pytest.raises(Locked), held(folder, {}):
            pass
        assert sorted(path.name for path in folder.iterdir()) == [".lock", ".lock.lease"]
    assert not folder.exists()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="the run folder cannot be written"), held(tmp_path / "file" / "run", {}):
        pass
