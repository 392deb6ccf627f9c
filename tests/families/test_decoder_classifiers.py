"""Decoders with a head for labels against stock transformers' ...ForSequenceClassification, family by family."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from families.proof import NOTHING, same_tensors
from reference.client import positions_of

from slmjax.convert.hf import family_of, import_hf, write_hf
from slmjax.convert.safetensors_io import Tensors
from slmjax.errors import UserError
from slmjax.models.families.granite import FAMILY as GRANITE
from slmjax.models.families.llama import llama
from slmjax.nn.compute import Compute
from slmjax.nn.heads import LastTokenScore
from slmjax.types import last_token

PAD = 5
COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 48, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
    "id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2},
}  # fmt: skip
FAMILIES = {
    "Llama": {"model_type": "llama"},
    "Qwen2": {"model_type": "qwen2"},
    "Qwen3": {"model_type": "qwen3", "head_dim": 8},
    "Mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "Gemma2": {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8},
    "Phi3": {"model_type": "phi3"},
    "StableLm": {"model_type": "stablelm"},
    "SmolLM3": {"model_type": "smollm3"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_stock_transformers(reference, tmp_path, name):
    """Texts of unequal lengths, padded on the right: stock finds their ends by the id of padding."""
    config = {**COMMON, **FAMILIES[name], "architectures": [f"{name}ForSequenceClassification"]}
    reference.make(tmp_path / "theirs", config)
    imported = import_hf(tmp_path / "theirs")
    decoder = imported.decoder
    assert decoder.head == LastTokenScore(labels=("no", "maybe", "yes"))
    rng = np.random.default_rng(0)
    mask = (np.arange(20) < np.array([[20], [13], [1]])).astype(np.int32)
    tokens = np.where(mask, rng.integers(6, 97, mask.shape), PAD).astype(np.int32)
    model = decoder.build(Compute(dtype="float32"))
    hidden = jax.jit(model.apply)(imported.params, tokens, positions_of(mask), mask).hidden
    at = last_token(mask)
    assert at.tolist() == [19, 12, 0]
    ours = np.asarray(jax.jit(model.unembed)(imported.params, hidden[np.arange(3), at]))
    (tmp_path / "ours").mkdir()
    write_hf(tmp_path / "ours", decoder, imported.params, family=imported.family)
    same_tensors(Tensors(tmp_path / "ours"), Tensors(tmp_path / "theirs"))
    for folder in ("theirs", "ours"):
        if folder == "ours":  # without a tokenizer its padding is 0
            tokens = np.where(mask, tokens, 0).astype(np.int32)
        told, report = reference.logits(tmp_path / folder, tokens, mask)
        assert report == NOTHING
        assert np.abs(told["logits"]).max() > 0.5
        assert np.abs(ours - told["logits"]).max() <= 1e-5 * max(1.0, np.abs(ours).max())
        assert (ours.argmax(-1) == told["logits"].argmax(-1)).all()


@pytest.mark.fast
def test_a_class_without_such_a_sister_is_refused():
    base = llama(layers=1, width=16, heads=2, kv_heads=1, hidden=24, vocab=40, context=16)
    scored = replace(base, head=LastTokenScore(labels=("a", "b")))
    assert family_of(scored).name == "Llama"
    assert family_of(scored).to_config(scored)["architectures"] == ["LlamaForSequenceClassification"]
    assert GRANITE.to_config(scored) is None
    with pytest.raises(UserError, match="no class of transformers"):
        family_of(replace(scored, final_norm=None))
