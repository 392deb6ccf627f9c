"""How a family without a class in transformers is proved right: against tests/reference/paper_models.py."""

import numpy as np
from contract.shapes import padded
from families.proof import assert_close, decodes_as_it_computes, each, logits, same_tensors

from slmjax.convert import table
from slmjax.convert.gate import Probe, greedy
from slmjax.convert.hf import import_hf
from slmjax.convert.safetensors_io import Tensors
from slmjax.nn.compute import Compute


def prove_paper(reference, folder, kind, config, *, seed=0, length=24, tokens=0):
    """A random model in the published layout is read and computes what the paper says; written again it is the same.

    Logits with a row padded on the left; keys, shapes and bytes both ways; prefill and decode; `tokens` > 0: so many
    greedy tokens are identical. Returns what was imported.
    """
    reference.make_paper(kind, folder / "theirs", config, seed=seed)
    imported = import_hf(folder / "theirs")
    decoder = imported.decoder
    x, mask = padded(decoder, rows=2, length=length, seed=seed)
    theirs, _ = reference.paper_logits(kind, folder / "theirs", x, mask)
    assert_close(logits(decoder, imported.params, x, mask), theirs, mask)

    again = dict(table.to_theirs(imported.family.rows(decoder), imported.params))
    same_tensors(again, Tensors(folder / "theirs"))
    decodes_as_it_computes(imported, seed=seed)
    if tokens:
        x, mask = padded(decoder, rows=3, length=8, seed=seed + 1)
        _, theirs = reference.paper_logits(kind, folder / "theirs", x, mask, tokens)
        ours, _ = greedy(decoder.build(Compute(dtype="float32")), imported.params, Probe(x, mask), tokens)
        np.testing.assert_array_equal(ours, theirs)
        assert len(np.unique(ours)) > 3, "a constant continuation would prove nothing"
    return imported


def prove_any_paper(reference, kind, configs):
    """`prove_paper` over a Hypothesis strategy of configurations."""
    each(configs, lambda folder, config, seed: prove_paper(reference, folder, kind, config, seed=seed))
