"""A tiny experiment on real text, and a run of it, shared by the tests that need a trained model."""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

ROOT = Path(__file__).resolve().parents[1]

EXPERIMENT = """
from slmjax.config import Evaluation, Experiment
from slmjax.data.recipe import Recipe
from slmjax.data.sources import JSONL
from slmjax.data.spec import PackedText, Part
from slmjax.data.tokenizer import BPE
from slmjax.models.families.llama import llama
from slmjax.optim.schedules import Cosine

TEXT = JSONL(name="Moby-Dick", path="{text}", licence="public domain")
RECIPE = Recipe(name="moby", sources=(TEXT,), tokenizer=BPE(vocab=384), validation=0.1)


def experiment() -> Experiment:
    return Experiment(
        name="tiny",
        model=llama(layers=2, width=32, heads=2, kv_heads=1, hidden=64, vocab=384, context=64),
        data=PackedText(train=(Part(source=RECIPE),), length=32, batch=8),
        schedule=Cosine(peak_lr=1e-2, warmup_steps=2),
        steps=12,
        evaluation=Evaluation(every=6, batches=2),
    )
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`.file`: the experiment; `.data_dir`: where its token store is kept; `.text`: its corpus, 12 chapters."""
    folder = tmp_path_factory.mktemp("tiny")
    packed = ROOT / "data" / "english_classics" / "moby_dick.jsonl.zst"
    with zstandard.open(packed, "rt", encoding="utf-8", newline="\n") as file:
        lines = [next(file).rstrip("\n") for _ in range(12)]
    text = folder / "moby.jsonl"
    text.write_text("\n".join(lines) + "\n")
    assert all(json.loads(line)["text"] for line in lines)
    file = folder / "tiny_experiment.py"
    file.write_text(EXPERIMENT.format(text=text))
    return SimpleNamespace(file=file, data_dir=folder / "data", text=text)


def store_of(tiny):
    """The token store that training built."""
    (manifest,) = (tiny.data_dir / "stores").glob("moby-*/manifest.json")
    return manifest.parent


def slmjax(*argv):
    """The command in this process -> exit code, stdout, stderr, exactly as a shell would see them."""
    from slmjax.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    old, sys.argv = sys.argv, ["slmjax", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        return SimpleNamespace(code=stop.code or 0, out=out.getvalue(), err=err.getvalue())
    finally:
        sys.argv = old
    raise AssertionError("main() returned without an exit code")


@pytest.fixture(scope="session")
def tiny_run(tiny, tmp_path_factory):
    """The folder of a finished run, with checkpoints after steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = slmjax("train", tiny.file, *runtime(tiny, folder), "--runtime.checkpoints.every", "4")
    assert done.code == 0, done.err
    return folder


def runtime(tiny, folder):
    return ["--runtime.workdir", folder, "--runtime.data-dir", tiny.data_dir, "--runtime.tracking.wandb", "offline"]
