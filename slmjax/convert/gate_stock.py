"""Checks an export with stock transformers, which runs in its own process and environment."""

from __future__ import annotations

import importlib.resources
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slmjax.convert.folder import Rejected
from slmjax.convert.gate import ENVIRONMENT, Check, Forward, Probe, compare, forward, greedy, limit, make_probe
from slmjax.convert.gate_loss import Texts, check_loss, log_probabilities
from slmjax.convert.hf import Imported
from slmjax.convert.tokenizer_files import PROBES
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError
from slmjax.nn.compute import Compute


def check_stock(
    imported: Imported, folder: pathlib.Path, python: str | None, probe: Probe, tokenizer: Tokenizer | None,
    scored: Texts = (),
) -> list[Check]:  # fmt: skip
    """Checks that stock transformers loads the whole folder, computes the same logits and greedy tokens (if the model
    generates), tokenizes the same, and gets the same loss on the texts `scored`. `Family.stock` says how the folder is
    loaded and run."""
    if python is None:
        hint = f"not run: give --reference-python or {ENVIRONMENT}"
        return [Check(name="stock transformers", found=hint, expected="torch and transformers", passed=None)]
    stock = imported.family.stock(imported.decoder)
    prompts = make_probe(probe.tokens, imported.decoder.context, length=max(1, min(9, probe.tokens.shape[1] // 2)))
    new_tokens = min(32, imported.decoder.context - prompts.tokens.shape[1]) if stock.generates else 0
    texts = list(PROBES) if tokenizer else []
    request = {"new_tokens": new_tokens, "texts": texts, "loader": stock.loader, "output": stock.output}
    request["scored"] = scored
    report, tensors = _run_stock(folder, python, probe, prompts, request)

    name = f"transformers {report['transformers']}"
    bad = {k: report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]}
    loads = Check(
        name=f"{name}: {report['class']} loads it",
        found="; ".join(f"{k} {v[0]} ({len(v)})" for k, v in bad.items()) or "nothing missing or unexpected",
        expected="nothing missing or unexpected",
        passed=not bad,
    )
    ours = forward(imported.decoder, imported.params, probe)
    hidden = tuple(tensors[f"hidden.{i}"] for i in range(len(ours.stages)))
    theirs = Forward(tensors["logits"], hidden)
    if stock.first or stock.last:
        at = probe.mask.sum(axis=1) - 1 if stock.last else np.zeros(len(probe.mask), int)
        read = np.take_along_axis(ours.logits, at[:, None, None], axis=1)
        ours, theirs = ours._replace(logits=read), theirs._replace(logits=theirs.logits[:, None])
    checks = [loads, compare(f"{name}: {stock.output}", ours, theirs, probe)]
    if labels := imported.decoder.labels:
        wanted = [labels[i] for i in ours.logits[:, 0].argmax(axis=-1)]
        given = [report["labels"][i] for i in theirs.logits[:, 0].argmax(axis=-1)]
        same = wanted == given and report["labels"] == list(labels)
        checks.append(Check(name=f"{name}: labels", found=", ".join(given), expected=", ".join(wanted), passed=same))
    if stock.generates:
        checks.append(_compare_greedy(f"{name}: greedy tokens", imported, prompts, tensors["generated"], ours))
    if scored:
        found = [tensors[f"scored.{i}"] for i in range(len(scored))]
        checks.append(check_loss(name, log_probabilities(imported.decoder, imported.params, scored), found))
    if tokenizer:
        wanted = [tokenizer.encode(text, bos=True, eos=stock.closes) for text in texts]
        # a BOS that only the chat template uses is named in the tokenizer, too
        special = [tokenizer.raw.token_to_id(tokenizer.names.get(name) or "") for name in ("bos_token", "eos_token")]
        same = report["encoded"] == wanted and report["special"] == special
        found = "identical" if same else f"{report['encoded'][0]}, BOS and EOS {report['special']}"
        checks.append(Check(name=f"{name}: AutoTokenizer", found=found, expected="ids as in training", passed=same))
    return checks


def _compare_greedy(name: str, imported: Imported, prompts: Probe, theirs: np.ndarray, ours: Forward) -> Check:
    model = imported.decoder.build(Compute(dtype="float32"))
    tokens, margins = greedy(model, imported.params, prompts, theirs.shape[1])
    expected = f"{len(theirs)} x {theirs.shape[1]} identical"
    found, passed = expected, True
    for row in np.flatnonzero((tokens != theirs).any(axis=1)):
        at = int(np.argmax(tokens[row] != theirs[row]))
        # between two equally likely tokens rounding decides, which is not an error of the export
        tie = bool(margins[row, at] <= 2 * limit(ours.logits))
        passed = passed and tie
        found = f"prompt {row}: {at} identical, then {'a tie of' if tie else 'differ, margin'} {margins[row, at]:.1e}"
    return Check(name=name, found=found, expected=expected, passed=passed)


def _run_stock(
    folder: pathlib.Path, python: str, probe: Probe, prompts: Probe, request: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    program = importlib.resources.files("slmjax.convert").joinpath("stock_transformers.py.txt")
    arrays = {"tokens": probe.tokens, "mask": probe.mask, "positions": probe.positions}
    arrays |= {"prompts": prompts.tokens, "prompts_mask": prompts.mask}
    with tempfile.TemporaryDirectory() as tmp, importlib.resources.as_file(program) as script:
        request_file, answer_file = pathlib.Path(tmp, "request.safetensors"), pathlib.Path(tmp, "answer.safetensors")
        save_file(
            {k: np.ascontiguousarray(v) for k, v in arrays.items()}, request_file, {"request": json.dumps(request)}
        )
        command = [python, str(script), str(folder), str(request_file), str(answer_file)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = done.stderr.strip().splitlines()
        if done.returncode and lines and lines[-1].startswith(("ModuleNotFoundError", "ImportError")):
            needs = "torch and transformers, and compressed-tensors for quantized weights"
            raise UserError(f"--reference-python {python}: {lines[-1]}; it needs {needs}")
        if done.returncode:
            raise Rejected(f"stock transformers failed on the export: {lines[-1] if lines else done.returncode}")
        try:
            with safe_open(answer_file, "numpy") as f:
                return json.loads(f.metadata()["report"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise Rejected(f"stock transformers left no answer: {e}") from e
