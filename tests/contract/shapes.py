"""The decoders that the parity tests run on, perturbed so that every bias, gain and activation shows in the logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.nn.mlp import gelu
from slmjax.nn.rope_scaling import Llama3Scaling
from slmjax.tree import map_with_path

SMALL = {"layers": 2, "width": 32, "vocab": 97}

DECODERS = {
    "llama, grouped-query, tied": llama(**SMALL, heads=4, kv_heads=2, hidden=48, context=128),
    "llama, multi-head, untied": llama(**SMALL, heads=4, kv_heads=4, hidden=40, context=128, tied=False, theta=5e5),
    "llama, multi-query, free head_dim, biases, gelu": llama(
        **SMALL, heads=2, kv_heads=1, hidden=48, context=128, head_dim=24, tied=False, attention_bias=True,
        mlp_bias=True, activation=gelu, eps=1e-3,
    ),
    "llama, llama3 scaling, long": llama(
        **SMALL, heads=2, kv_heads=1, hidden=40, context=640, head_dim=32, theta=1e4,
        scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_context=64),
    ),
    "gpt2, tied": gpt2(**SMALL, heads=4, context=128),
    "gpt2, untied, odd width of the mlp": gpt2(**SMALL, heads=2, context=640, hidden=52, tied=False, eps=1e-3),
    "gpt2, erf gelu, unscaled attention": gpt2(**SMALL, heads=4, context=128, activation=gelu, scale=1.0),
}  # fmt: skip

# what transformers users have, in its own words: config.json files of stock models, small
CONFIGS = {
    "llama": {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "llama, tied, biases, free head_dim, llama3": {
              "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24,
              "max_position_embeddings": 512, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
              "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt2, untied, erf gelu, n_inner": {
              "model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512,
              "n_inner": 56, "activation_function": "gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
}  # fmt: skip


def perturbed(decoder, seed=0):
    """Parameters with gains around 1 and biases around 0 of deviation 0.3, tables of 0.5, matrices of gain 1.2."""
    params = decoder.build().init(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def draw(path, x):
        noise = rng.normal(size=x.shape).astype(np.float32)
        name = path.split("/")[-1]
        if name == "scale" or name.endswith("bias"):
            return jnp.asarray((name == "scale") + 0.3 * noise)
        if path.startswith("embed/"):
            return jnp.asarray(0.5 * noise)
        return jnp.asarray(x / jnp.std(x) * 1.2 / np.sqrt(decoder.width))

    return map_with_path(draw, params)


def padded(decoder, rows=3, length=None, seed=0):
    """Tokens and mask [B, T]; row i is padded on the left by a third of i rows."""
    length = length or decoder.context
    tokens = np.random.default_rng(seed).integers(0, decoder.vocab, (rows, length), dtype=np.int32)
    mask = np.ones_like(tokens)
    for i in range(1, rows):
        mask[i, : i * length // rows] = 0
    return tokens, mask


def changed(decoder, **block):
    """The decoder with fields of its block, or of the block's parts, replaced: changed(d, mlp={"activation": relu})."""
    (only,) = decoder.pattern
    fields = {k: replace(getattr(only, k), **v) if isinstance(v, dict) else v for k, v in block.items()}
    return replace(decoder, pattern=(replace(only, **fields),))
