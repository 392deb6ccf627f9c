"""The curve of a run folder: its losses on the learning rates of all its steps."""

import numpy as np
import pytest
from running import slmjax

from slmjax.errors import UserError
from slmjax.runs.learning_curves import of_run
from slmjax.track.jsonl import read


def test_the_curve_of_a_run(tiny_run, tmp_path):
    rows = read(tiny_run / "metrics.jsonl")
    curve = of_run(tiny_run)
    np.testing.assert_allclose(curve.schedule.lr, [row["lr"] for row in rows], rtol=1e-6)
    np.testing.assert_array_equal(curve.step, np.arange(2, 12))  # of 12 steps, after a warm-up of 2
    np.testing.assert_array_equal(curve.loss, [row["loss"] for row in rows[2:]])
    shown = slmjax("fit", "curves", tiny_run, "--of", tiny_run)
    assert shown.code == 0, shown.err
    assert "after step 12, by the law" in shown.out
    (tmp_path / "config.json").write_text((tiny_run / "config.json").read_text())
    with pytest.raises(UserError, match="0 steps after the warm-up are no curve"):
        of_run(tmp_path)
