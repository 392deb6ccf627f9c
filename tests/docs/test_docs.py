"""The tutorial's commands run, and the links of all pages lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from slmjax.convert.hf import import_hf, write_hf
from slmjax.data.tokenizer import Bytes
from slmjax.models.families.bert import bert
from slmjax.nn.heads import Pooler

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(language, what stands after it, text) of each fenced block."""
    return [(m[1], m[2].strip(), m[3]) for m in BLOCK.finditer(page.read_text())]


def test_the_tutorial_runs(tmp_path):
    for name in ("data", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_MODE": "offline"}
    del env["XLA_FLAGS"]  # one device, as a reader has
    ran = 0
    for language, info, text in blocks(ROOT / "docs" / "tutorial.md"):
        if language == "python":
            (tmp_path / info.removeprefix("file=")).write_text(text)
            continue
        if info == "no-test":
            continue
        for command in text.replace("\\\n", " ").strip().splitlines():
            done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
            expected = 2 if info == "fails" else 0
            assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 10
    assert (tmp_path / "exports/mine/model.safetensors").is_file()


def test_the_notebook_runs(tmp_path):
    import nbformat

    for name in ("data", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "the notebook is kept without its outputs"
    program = f"""
import asyncio, nbformat
from nbclient import NotebookClient
notebook = nbformat.read({str(ROOT / "docs" / "notebook.ipynb")!r}, as_version=4)
NotebookClient(notebook, timeout=600, resources={{"metadata": {{"path": {str(tmp_path)!r}}}}}).execute()
nbformat.write(notebook, {str(tmp_path / "ran.ipynb")!r})
"""
    env = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    code = [cell for cell in nbformat.read(tmp_path / "ran.ipynb", as_version=4).cells if cell.cell_type == "code"]
    shown = [out["data"]["text/plain"] for cell in code for out in cell.outputs if "data" in out]
    assert float(shown[-1]) < 1e-4, "the exported model's logits"


def test_an_imported_encoder_is_fine_tuned_as_the_page_says(tmp_path, monkeypatch, capsys):
    """On a small BERT with random weights, where the page has MiniLM."""
    folder = tmp_path / "models" / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    encoder = bert(layers=1, width=32, heads=2, hidden=48, vocab=300, context=64, head=Pooler())
    made = Bytes().make([], tmp_path)
    write_hf(folder, encoder, encoder.build().init(jax.random.key(0)), tokenizer=made)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLMJAX_REFERENCE_PYTHON", raising=False)
    pages = blocks(ROOT / "docs" / "encoders.md")
    (program,) = [text for language, _, text in pages if language == "python" and "export_hf" in text]
    exec(compile(program, "encoders.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0]
    tuned = import_hf(tmp_path / "exports" / "films")
    assert tuned.config["architectures"] == ["BertForSequenceClassification"]
    assert tuned.config["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_verbs_and_files_that_exist(page):
    from slmjax.cli.main import VERBS

    for language, _, text in blocks(page):
        if language != "sh":
            continue
        for verb in re.findall(r"^\s*slmjax ([a-z]+)", text, re.MULTILINE):
            assert verb in VERBS, f"{page.name}: slmjax {verb}"
        for file in re.findall(r"\b((?:experiments|benchmarks|data/recipes|tools)/[\w/.-]+)", text):
            assert (ROOT / file).exists(), f"{page.name}: {file}"
