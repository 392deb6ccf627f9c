"""How a family is proved right, on one configuration in the words of transformers."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from contract.shapes import padded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference.client import positions_of

from slmjax.convert.gate import Probe, greedy
from slmjax.convert.hf import import_hf, write_hf
from slmjax.convert.safetensors_io import Tensors
from slmjax.nn.compute import Compute

FEW = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
"""An example takes seconds: few of them, the same in each run, none of them shrunk"""

NOTHING = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


def logits(decoder, params, tokens, mask):
    """[B, T, V] in float32; rows are padded on the left where mask is 0."""
    model = decoder.build(Compute(dtype="float32"))

    @jax.jit
    def run(params, tokens, positions, mask):
        return model.unembed(params, model.apply(params, tokens, positions, mask).hidden)

    return np.asarray(run(params, tokens, positions_of(mask), mask))


def assert_close(ours, theirs, mask, least=1.0):
    """max|Δ| <= 1e-5 * max(1, max|logit|) wherever there is no padding."""
    ours, theirs = ours[mask == 1], theirs[mask == 1]
    assert np.isfinite(ours).all()
    assert np.abs(theirs).max() > least, "logits too small to tell anything"
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max())


def same_tensors(ours, theirs):
    """The same keys, shapes and bytes."""
    assert set(ours) == set(theirs)
    for key in theirs:
        assert ours[key].shape == theirs[key].shape, key
        assert np.asarray(ours[key]).tobytes() == np.asarray(theirs[key]).tobytes(), key


def prove(reference, folder, config, *, seed=0, length=24, rows=2, tokens=0):
    """A stock model with random weights, read, computed, written again and read by stock transformers.

    - Logits agree in both directions, the second row padded on the left (length: choose it longer than windows and
      original contexts).
    - What is written has the keys, shapes and bytes that transformers saved, and nothing is missing or unexpected.
    - config -> decoder -> config -> decoder is stable.
    - `tokens` > 0: so many greedy tokens are identical, decoded with our cache and theirs.

    Returns what was imported.
    """
    reference.make(folder / "theirs", config, seed=seed)
    imported = import_hf(folder / "theirs")
    decoder, family = imported.decoder, imported.family
    written = family.to_config(decoder)
    assert written is not None, f"{family.name} cannot write what it has read"
    assert family.from_config(written) == decoder

    x, mask = padded(decoder, rows=rows, length=length, seed=seed)
    ours = logits(decoder, imported.params, x, mask)
    theirs, _ = reference.logits(folder / "theirs", x, mask)
    assert_close(ours, theirs["logits"], mask)

    (folder / "ours").mkdir()
    write_hf(folder / "ours", decoder, imported.params, family=family)
    same_tensors(Tensors(folder / "ours"), Tensors(folder / "theirs"))
    back, report = reference.logits(folder / "ours", x, mask)
    assert report == NOTHING
    assert_close(ours, back["logits"], mask)
    if tokens:
        same_greedy(reference, folder / "ours", imported, tokens, seed=seed)
    return imported


def same_greedy(reference, folder, imported, tokens, *, seed=0, prompt=8):
    """Prompts of unequal length go on alike, token for token."""
    x, mask = padded(imported.decoder, rows=3, length=prompt, seed=seed + 1)
    theirs = reference.generate(folder, x, tokens, mask)
    ours, _ = greedy(imported.decoder.build(Compute(dtype="float32")), imported.params, Probe(x, mask), tokens)
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(ours)) > 3, "a constant continuation would prove nothing"


def decodes_as_it_computes(imported, length=20, seed=0):
    """Prefill and single tokens from the cache equal the full forward pass, with left padding."""
    decoder, params = imported.decoder, jax.tree.map(jnp.asarray, imported.params)
    model = decoder.build(Compute(dtype="float32"))
    x, mask = padded(decoder, rows=2, length=length, seed=seed)
    positions = positions_of(mask)
    step = jax.jit(lambda cache, *tokens: model.apply(params, *tokens, cache=cache))
    cache, pieces = model.init_cache(2, length + 3), []
    for start, stop in [(0, length - 4), *((i, i + 1) for i in range(length - 4, length))]:
        out = step(cache, *(a[:, start:stop] for a in (x, positions, mask)))
        cache = out.cache
        pieces.append(model.unembed(params, out.hidden))
    assert_close(np.asarray(jnp.concatenate(pieces, axis=1)), logits(decoder, params, x, mask), mask)


def moves(right, wrong, params, *, length=24, seed=0):
    """Whether the same parameters give other logits, by more than 1e-3: else parity would not prove the switch."""
    x, mask = padded(right, rows=2, length=length, seed=seed)
    a, b = (logits(d, params, x, mask)[mask == 1] for d in (right, wrong))
    return float(np.abs(a - b).max()) > 1e-3


def each(configs, check):
    """`check(folder, config, seed)` over a Hypothesis strategy of configurations."""

    @FEW
    @given(configs, st.integers(0, 9))
    def run(config, seed):
        with tempfile.TemporaryDirectory() as folder:
            check(pathlib.Path(folder), config, seed)

    run()


def prove_any(reference, configs):
    """`prove` and `decodes_as_it_computes` over a Hypothesis strategy of configurations."""
    each(
        configs,
        lambda folder, config, seed: decodes_as_it_computes(prove(reference, folder, config, seed=seed), seed=seed),
    )
