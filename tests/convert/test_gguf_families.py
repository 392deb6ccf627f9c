"""Each architecture of the GGUF table: models that stock transformers made, written as GGUF, run by stock llama.cpp."""

import json
import pathlib
from dataclasses import replace

import numpy as np
import pytest
from contract.gguf_models import CONFIGS, ROPE, VOCAB, YARN
from contract.shapes import perturbed

from slmjax import tree
from slmjax.convert.gguf import gate as gguf_gate
from slmjax.convert.gguf import write as gguf_write
from slmjax.convert.gguf.export import export_gguf
from slmjax.convert.gguf.families import ARCHITECTURES, architecture_of
from slmjax.convert.gguf.file import GGUF
from slmjax.convert.gguf.load import import_gguf
from slmjax.convert.gguf.tokenizer import to_gguf
from slmjax.convert.hf import import_hf
from slmjax.convert.safetensors_io import Tensors
from slmjax.data.tokenizer import Bytes
from slmjax.errors import UserError
from slmjax.models.families import FAMILIES
from slmjax.models.families.gpt2 import gpt2
from slmjax.nn.embedding import Logits

KNOWN = {family.model_type for family in FAMILIES}
OURS = [name for name, config in CONFIGS.items() if config["model_type"] in KNOWN]


def test_every_architecture_is_tried():
    assert {config["model_type"] for config in CONFIGS.values()} == {one.model_type for one in ARCHITECTURES}


def write(folder, out, dtype="float32"):
    """What `write_gguf` does for a decoder, for any folder of transformers."""
    config = json.loads((folder / "config.json").read_text())
    architecture = architecture_of(config["model_type"])
    tensors = Tensors(folder)
    metadata = {**architecture.keys(config), **to_gguf(Bytes().make([], pathlib.Path()), VOCAB)}
    shapes = {name: x.shape for name, x in architecture.tensors(config, iter(tensors.items()))}
    gguf_write.write(
        out, architecture.name, metadata, shapes, lambda: architecture.tensors(config, iter(tensors.items())), dtype
    )
    return architecture, config, tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(tmp_path, reference, name):
    reference.make(tmp_path / "hf", CONFIGS[name], seed=1)
    out = tmp_path / "model.gguf"
    architecture, config, tensors = write(tmp_path / "hf", out)
    back = GGUF(out)
    for key, x in tensors.items():
        np.testing.assert_allclose(
            architecture.theirs(config, key, back.__getitem__), x, rtol=0, atol=3e-7, err_msg=key
        )
    prompts = np.random.default_rng(0).integers(0, 256, (6, 40), dtype=np.int32)  # longer than the windows
    request = {"prompts": prompts.tolist(), "new_tokens": 8, "top": 20, "texts": []}
    answer = gguf_gate._run(out, reference.python, request)
    assert answer is not None, "the reference environment lacks xllamacpp"
    compared = 0
    whole = np.zeros((len(prompts), 48), np.int32)
    for i, (prompt, row) in enumerate(zip(prompts, answer["rows"], strict=True)):
        whole[i, : 40 + len(row["tokens"])] = [*prompt, *row["tokens"]]
    for logits, row in zip(reference.logits(tmp_path / "hf", whole)[0]["logits"], answer["rows"], strict=True):
        limit = (gguf_gate.MAY_DRIFT["float32"] + architecture.drift) * max(1, np.abs(logits).max())
        scores = gguf_gate._log_softmax(logits)
        for step, token in enumerate(row["tokens"]):
            here = scores[39 + step]
            assert here.max() - here[token] <= 2 * limit, f"step {step}: another token is likelier"
            if step < len(row["top"]):
                ids, theirs = (np.array(x) for x in zip(*row["top"][step], strict=True))
                error = np.abs(here[ids] - theirs).max()
                assert error <= limit, f"step {step}: {error} > {limit}"
                compared += 1
    assert compared >= 6


@pytest.mark.parametrize("name", OURS)
def test_our_export_passes_the_gate(tmp_path, reference, name):
    """The same models, read as our decoders."""
    reference.make(tmp_path / "hf", CONFIGS[name], seed=2)
    imported = import_hf(tmp_path / "hf")
    made = export_gguf(
        imported.decoder,
        imported.params,
        tmp_path / "a.gguf",
        tokenizer=Bytes().make([], pathlib.Path()),
        reference_python=reference.python,
    )
    assert [check.passed for check in made.checks] == [True] * 5
    # A Phi-3 without LongRoPE is also a Llama, and written as the first class that fits.
    expected = "llama" if name == "phi3" else architecture_of(CONFIGS[name]["model_type"]).name
    assert GGUF(tmp_path / "a.gguf").metadata["general.architecture"] == expected
    back = import_gguf(tmp_path / "a.gguf")
    assert back.decoder == imported.decoder, "what llama.cpp agrees with is what the file is read as"
    for path, x in tree.flatten(imported.params).items():
        np.testing.assert_allclose(tree.flatten(back.params)[path], x, rtol=0, atol=2e-7, err_msg=path)


def test_scalars_that_llama_cpp_lacks_are_folded(tmp_path, reference):
    plain = gpt2(layers=2, width=32, heads=4, vocab=VOCAB, context=64)
    decoder = replace(plain, embed_scale=3.0, logits=Logits(scale=0.5))
    params = perturbed(decoder)
    made = export_gguf(
        decoder,
        params,
        tmp_path / "a.gguf",
        tokenizer=Bytes().make([], pathlib.Path()),
        reference_python=reference.python,
    )
    assert [check.passed for check in made.checks] == [True] * 6
    assert made.folded == ("embed_scale = 3", "logits.scale = 0.5")


WRONG = {
    "hidden_act = 'gelu'": ("llama", {"hidden_act": "gelu"}),
    "sliding_window = 16": ("mistral", {"sliding_window": 16}),
    "rope_type = 'dynamic'": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}),
    "query_pre_attn_scalar = 16": ("gemma2", {"query_pre_attn_scalar": 16}),
    "full attention in every 2nd layer": ("gemma2", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    r"full attention in the layers \[0, 1\]": (
        "gemma3", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 5},
    ),
    "full attention in every 4th layer": (
        "olmo3", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    ),
    "truncate = False": (
        "olmo3", {"rope_parameters": {"full_attention": {**YARN, "truncate": False}, "sliding_attention": ROPE}},
    ),
    "attn_logit_softcapping = None": ("gemma2", {"attn_logit_softcapping": None}),
    "no_rope_layers": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    "apply_residual_connection_post_layernorm = True": (
        "bloom, odd number of heads", {"apply_residual_connection_post_layernorm": True},
    ),
    "activation_function = 'relu'": ("gpt2", {"activation_function": "relu"}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, reference, message):
    name, change = WRONG[message]
    reference.make(tmp_path, CONFIGS[name], seed=0)
    config = json.loads((tmp_path / "config.json").read_text())
    architecture = architecture_of(config["model_type"])
    assert architecture.keys(config)
    with pytest.raises(UserError, match=message):
        architecture.keys({**config, **change})


def test_a_class_without_architecture_is_refused():
    with pytest.raises(UserError, match=r"'opt' cannot be written as GGUF; expected one of llama, mistral"):
        architecture_of("opt")
