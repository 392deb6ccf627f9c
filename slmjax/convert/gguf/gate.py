"""The checks of a GGUF export: the file is read back tensor by tensor, run by slmjax, and run by stock llama.cpp."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from slmjax.convert.folder import Rejected
from slmjax.convert.gate import PLAIN, Check, Forward, Probe, forward
from slmjax.convert.gate_loss import Texts, check_loss, log_probabilities
from slmjax.convert.gguf.file import GGUF
from slmjax.convert.gguf.layouts import NAMES
from slmjax.convert.packed import PackedTensor
from slmjax.convert.tokenizer_files import PROBES
from slmjax.data.tokenizer import Tokenizer
from slmjax.models.decoder import Decoder
from slmjax.nn.numerics import Numerics
from slmjax.types import Params

NEW_TOKENS, TOP = 24, 20
MOST_COMPARED = 1024
"""Likeliest tokens by which the divergence of a quantized model is measured; those beyond are taken together"""
MOST_DIVERGENCE, TIMES = 1e-3, 2
"""A quantized model: the KL divergence of llama.cpp's probabilities from ours, in nats a token, may be 1e-3 + 2 times
what rounding activations to 8 bits as llama.cpp does costs in our own forward pass"""
MAY_DRIFT = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2, "q8_0": 4e-2}
"""Largest allowed difference of a log-probability by dtype, in nats times max(1, max|logit|): llama.cpp rounds
activations to the format of the matrix they are multiplied with. About three times the differences of SmolLM2-135M"""
REST = 1e-6  # a smaller probability of all other tokens together is lost in rounding
ROWS = 4096  # compared at a time
HALF: Mapping[int, type] = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.BF16: ml_dtypes.bfloat16}


def limit_of(dtype: str, drift: float, *, quantized: bool) -> float:
    """How far a log-probability of llama.cpp may be off, in the unit of `MAY_DRIFT`. `drift`: of the architecture."""
    return drift + (max(MAY_DRIFT[dtype], MAY_DRIFT["q8_0"]) if quantized else MAY_DRIFT[dtype])


def check_sizes(file: GGUF) -> Check:
    """The size of the file, and of the weights of each format in it: for information."""
    parts = []
    for kind in dict.fromkeys(info.kind for info in file.infos.values()):
        infos = [info for info in file.infos.values() if info.kind == kind]
        weights, size = sum(math.prod(info.shape) for info in infos), sum(info.size for info in infos)
        parts.append(f"{NAMES[kind]} {weights} weights of {8 * size / weights:.4g} bits")
    found = f"{file.file.stat().st_size} bytes; {', '.join(parts)}"
    return Check(name="size", found=found, expected="for information", passed=None)


def check_tensors(file: GGUF, wanted: Iterator[tuple[str, np.ndarray | PackedTensor]], dtype: str) -> Check:
    """Compares every tensor of the file with the model's, rounded to the tensor's format. Quantized tensors have to
    have the model's values bit for bit."""
    names, wrong = set(), []
    for name, x in wanted:
        names.add(name)
        exact = isinstance(x, PackedTensor)
        x = x.values() if isinstance(x, PackedTensor) else np.asarray(x, np.float32)
        kind = file.infos[name].kind if name in file.infos else None
        if kind is None or file.infos[name].shape != x.shape:
            wrong.append(name)
            continue
        found = file[name]
        if exact:
            same = np.array_equal(found.view(np.uint32), x.view(np.uint32))
            wrong += [] if same else [name]
        elif not all(_fits(x[i : i + ROWS], found[i : i + ROWS], kind) for i in range(0, len(x), ROWS)):
            wrong.append(name)
    wrong += sorted(set(file.infos) - names)
    total = f"all {len(names)} equal the model's"
    found = f"{len(wrong)} differ, first {wrong[0]}" if wrong else total
    return Check(name=f"reload: tensors ({dtype})", found=found, expected=total, passed=not wrong)


def _fits(x: np.ndarray, found: np.ndarray, kind: int) -> bool:
    """Whether `found` is x [..., D] rounded to a format."""
    if kind in HALF:
        return np.array_equal(found, x.astype(HALF[kind]).astype(np.float32))
    if kind != GGMLQuantizationType.Q8_0:
        return np.array_equal(found, x)
    # at most half a step; the step is 1/127 of the largest value in each block of 32, stored as float16
    largest = np.abs(x).reshape(*x.shape[:-1], -1, 32).max(axis=-1, keepdims=True)
    error = np.abs(found - x).reshape(*largest.shape[:-1], 32)
    return bool((error <= largest * (0.5 / 127 + 2**-10) + 2**-24 * 127).all())


def check_rounding(ours: Forward, stored: Forward, probe: Probe) -> Check:
    """How much rounding to the file's format changes the logits: for information."""
    real = probe.mask.astype(bool)
    a, b = (_log_softmax(x.logits[real]) for x in (ours, stored))
    divergence = float((np.exp(a) * (a - b)).sum(axis=-1).mean())
    found = f"KL {divergence:.1e} nats a token, max|Δ logit| {np.abs(ours.logits - stored.logits)[real].max():.1e}"
    return Check(name="rounded: logits", found=found, expected="for information", passed=None)


def check_llama_cpp(
    file: pathlib.Path, decoder: Decoder, params: Params, python: str | None, probe: Probe, tokenizer: Tokenizer,
    limit: float, numerics: Numerics | None = None, scored: Texts = (),
) -> list[Check]:  # fmt: skip
    """Checks that stock llama.cpp loads the file, tokenizes as in training, computes the same probabilities, and
    gets the same loss on the texts `scored`.

    Args:
        params: as read back from the file.
        limit: see `limit_of`.
        numerics: of a quantized model: how llama.cpp rounds activations (`activations.rounding`). Its divergence is
            checked, too.
    """
    missing = "not run: give --reference-python or SLMJAX_REFERENCE_PYTHON, a Python with xllamacpp"
    skipped = [Check(name="stock llama.cpp", found=missing, expected="xllamacpp", passed=None)]
    if python is None:
        return skipped
    lengths = [max(1, probe.tokens.shape[1] // 4), max(1, probe.tokens.shape[1] // 2)]
    prompts = [row[:n].tolist() for row, n in zip(probe.tokens, lengths, strict=False)]
    new_tokens = min(NEW_TOKENS, decoder.context - max(lengths) - 1)
    top = min(TOP if numerics is None else MOST_COMPARED, decoder.vocab)
    request = {"prompts": prompts, "new_tokens": new_tokens, "top": top, "texts": list(PROBES), "scored": scored}
    answer = _run(file, python, request)
    if answer is None:
        return skipped
    name = f"llama.cpp (xllamacpp {answer['version']})"
    checks = _compare(name, decoder, params, prompts, answer["rows"], new_tokens, limit, tokenizer, numerics)
    if scored:
        theirs = [np.array(row, np.float64) for row in answer["scored"]]
        checks.append(check_loss(name, log_probabilities(decoder, params, scored), theirs))
    wanted = [tokenizer.encode(text, bos=True) for text in PROBES]
    wrong = [i for i, ids in enumerate(wanted) if ids != answer["encoded"][i]]
    found = f"{PROBES[wrong[0]]!r} becomes {answer['encoded'][wrong[0]]}" if wrong else "identical"
    checks.append(Check(name=f"{name}: tokenizer", found=found, expected="ids as in training", passed=not wrong))
    return checks


def _compare(
    name: str, decoder: Decoder, params: Params, prompts: list[list[int]], rows: list[Any], new_tokens: int,
    limit: float, tokenizer: Tokenizer, numerics: Numerics | None = None,
) -> list[Check]:  # fmt: skip
    """Compares our probabilities along llama.cpp's greedy continuation: each of its tokens has to be our likeliest, or
    a near tie, and the log-probabilities have to agree. For a quantized model, ours are those with rounded activations.
    """
    whole = [prompt + row["tokens"] for prompt, row in zip(prompts, rows, strict=True)]
    longest = max(map(len, whole))
    tokens = np.zeros((len(whole), longest), np.int32)
    for i, ids in enumerate(whole):
        tokens[i, : len(ids)] = ids  # causal: what follows a row's end does not change it
    probe = Probe(tokens, np.ones_like(tokens))
    logits = forward(decoder, params, probe, numerics or PLAIN).logits
    limit *= max(1.0, float(np.abs(logits).max()))
    scores = _log_softmax(logits)
    worst, lead, same, made = 0.0, 0.0, 0, 0
    exact = scores if numerics is None else _log_softmax(forward(decoder, params, probe).logits)
    divergences: list[Divergence] = []
    ends = set(tokenizer.special_tokens.values())
    for score, plain, prompt, row in zip(scores, exact, prompts, rows, strict=True):
        for step, token in enumerate(row["tokens"]):
            at = len(prompt) + step - 1
            here = score[at]
            if step < len(row["top"]):
                ids, theirs = (np.array(x) for x in zip(*row["top"][step], strict=True))
                theirs = theirs.astype(np.float64)  # a log-probability that is no number comes as None
                error = np.abs(here[ids] - theirs)[:TOP].max()
                worst = float(np.maximum(worst, error))  # NaN is kept, and fails the check
                one = plain[at]
                divergences.append(Divergence(kl(one, ids, theirs), kl(here, ids, theirs), kl(one, ids, here[ids])))
            lead = max(lead, float(here.max() - here[token]))
            same += int(here.argmax() == token)
            made += 1
        ended = ends & {*row["tokens"][-1:], int(score[len(prompt) + len(row["tokens"]) - 1].argmax())}
        if len(row["tokens"]) < new_tokens and not ended:
            worst = math.inf  # llama.cpp stopped where slmjax goes on
    if not made and worst <= limit:
        nothing = "nothing to compare: both end every text of the probe immediately"
        return [Check(name=f"{name}: tokens", found=nothing, expected="for information", passed=None)]
    found = f"{same} of {made} greedy tokens identical, max|Δ log p| {worst:.1e}"
    passed = worst <= limit and lead <= 2 * limit  # near ties are decided by rounding
    checks = [Check(name=f"{name}: tokens", found=found, expected=f"≤ {limit:.1e}, or a tie", passed=passed)]
    if numerics is not None:
        checks.append(_check_divergence(name, divergences))
    return checks


class Divergence(NamedTuple):
    """KL divergences at one token, nats."""

    exact: float
    """Of llama.cpp's probabilities from ours"""
    rounded: float
    """Of llama.cpp's from ours with rounded activations: next to 0 until an activation lies between two codes and is
    rounded to the other one; from then on, in a deep model, as large as the first"""
    cost: float
    """Of ours with rounded activations from ours"""


def _check_divergence(name: str, divergences: list[Divergence]) -> Check:
    mean = Divergence(*np.mean(divergences, axis=0).tolist()) if divergences else Divergence(math.inf, math.inf, 0.0)
    found = f"KL {mean.exact:.1e} nats a token, {mean.rounded:.1e} with activations in 8 bits on both sides"
    limit = MOST_DIVERGENCE + TIMES * mean.cost
    expected = f"≤ {limit:.1e}: {MOST_DIVERGENCE:.0e} + {TIMES} * the cost of activations in 8 bits, {mean.cost:.1e}"
    return Check(name=f"{name}: KL", found=found, expected=expected, passed=mean.exact <= limit)


def kl(ours: np.ndarray, ids: np.ndarray, theirs: np.ndarray) -> float:
    """KL(ours || theirs), nats.

    Args:
        ours: log-probabilities of all tokens [V].
        ids: the likeliest tokens of the other model [N].
        theirs: their log-probabilities in it [N]. The other tokens are taken together as one, which can only make the
            divergence smaller.
    """
    here, theirs = ours[ids].astype(np.float64), theirs.astype(np.float64)
    total = float((np.exp(here) * (here - theirs)).sum())
    left = 1 - float(np.exp(here).sum())
    if len(ids) < len(ours) and left > REST:
        total += left * math.log(left / max(1 - float(np.exp(theirs).sum()), REST))
    return total


def _run(file: pathlib.Path, python: str, request: dict[str, Any]) -> dict[str, Any] | None:
    """The answer of the program; None if this Python has no llama.cpp."""
    program = importlib.resources.files("slmjax.convert").joinpath("stock_llama_cpp.py.txt")
    with tempfile.TemporaryDirectory() as tmp, importlib.resources.as_file(program) as script:
        request_file, answer_file = pathlib.Path(tmp, "request.json"), pathlib.Path(tmp, "answer.json")
        request_file.write_text(json.dumps(request))
        command = [python, str(script), str(file), str(request_file), str(answer_file)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=os.environ, timeout=1800
            )
        except subprocess.TimeoutExpired:
            raise Rejected("stock llama.cpp did not answer within half an hour") from None
        if answer_file.is_file():
            return json.loads(answer_file.read_text())
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if lines and "ModuleNotFoundError" in lines[-1] and "xllamacpp" in lines[-1]:
            return None
        errors = [line for line in lines if "error" in line.lower()] or lines or [str(done.returncode)]
        raise Rejected(f"stock llama.cpp failed on the export: {errors[0].strip()[:300]}")


def _log_softmax(x: np.ndarray) -> np.ndarray:
    top = x.max(axis=-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True))
