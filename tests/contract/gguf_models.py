"""A small model of each architecture that is written as GGUF, as config.json files of stock models; and GGUF files that
are changed."""

import gguf
import numpy as np

VOCAB = 288  # 258 ids of the tokenizer, and rows that have none
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WIDE = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
BASE = {**WIDE, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    **ROPE, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
    "beta_slow": 1.0, "attention_factor": 1.5,
}  # fmt: skip
LONG = [1.0 + 0.5 * i for i in range(8)]
GEMMA = {**BASE, "num_hidden_layers": 4, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
WINDOWS = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    "llama": {"model_type": "llama", **BASE, "tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "llama, biases, free head_dim, tied": {
        "model_type": "llama", **BASE, "head_dim": 32, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True, "rope_parameters": ROPE,
    },
    "llama, linear scaling": {
        "model_type": "llama", **BASE, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", **BASE, "head_dim": 32, "sliding_window": None, "rope_parameters": ROPE},
    "granite": {
        "model_type": "granite", **BASE, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
        "attention_multiplier": 0.2, "rope_parameters": ROPE,
    },
    "smollm3": {
        "model_type": "smollm3", **BASE, "num_hidden_layers": 4, "rope_parameters": {**ROPE, "rope_theta": 2e6},
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen2": {"model_type": "qwen2", **BASE, "rope_parameters": {**ROPE, "rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", **BASE, "head_dim": 32, "tie_word_embeddings": True, "rope_parameters": ROPE},
    "qwen3, yarn": {
        "model_type": "qwen3", **BASE, "head_dim": 32, "tie_word_embeddings": True,
        "rope_parameters": {k: v for k, v in YARN.items() if k != "attention_factor"},
    },
    "olmo2": {"model_type": "olmo2", **BASE, "rope_parameters": ROPE, "eos_token_id": 2},
    "olmo3": {
        "model_type": "olmo3", **BASE, "num_hidden_layers": 6, "sliding_window": 16, "eos_token_id": 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "olmo3, yarn": {
        "model_type": "olmo3", **BASE, "num_hidden_layers": 6, "sliding_window": 16, "eos_token_id": 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": YARN},
    },
    "gemma2": {"model_type": "gemma2", **GEMMA, "layer_types": WINDOWS, "rope_parameters": ROPE},
    "gemma3": {
        "model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 1e6}},
    },
    "phi3": {
        "model_type": "phi3", **BASE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
    },
    "phi3, partial rotation": {
        "model_type": "phi3", **BASE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": True, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "phi3, longrope": {
        "model_type": "phi3", **BASE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 2048, "original_max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.125 * i for i in range(8)],
            "long_factor": LONG, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 1024,
        },
    },
    "stablelm": {
        "model_type": "stablelm", **BASE, "use_qkv_bias": True,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
    },
    "stablelm, parallel, a norm a head": {
        "model_type": "stablelm", **BASE, "qk_layernorm": True, "use_parallel_residual": True,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "n_inner": 96, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", **WIDE, "intermediate_size": 96, "num_attention_heads": 4,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
    },
    "gpt_neox, serial": {
        "model_type": "gpt_neox", **WIDE, "intermediate_size": 96, "num_attention_heads": 4, "hidden_act": "gelu_new",
        "use_parallel_residual": False, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "bloom, odd number of heads": {
        "model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 96, "n_layer": 2, "n_head": 6, "seq_length": 128,
    },
}  # fmt: skip


def patched(file, out, **changes):
    """The file with keys or tensors replaced, removed (None) or added, as the library writes it. A packed tensor is
    (bytes, type)."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    fields = {k: f for k, f in reader.fields.items() if not k.startswith(("GGUF.", "general.architecture"))}
    for key, field in fields.items():
        if key in changes and changes[key] is None:
            del changes[key]
            continue
        value = changes.pop(key, None)
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents() if value is None else value, field.types[0], sub_type=inner)
    tensors = {t.name: t.data for t in reader.tensors}
    for key, value in changes.items():
        if isinstance(value, (np.ndarray, tuple)):
            tensors[key] = value
        elif key in tensors:
            del tensors[key]
        elif isinstance(value, (str, bool, float)):
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        else:
            writer.add_uint32(key, value)
    for name, x in tensors.items():
        raw, kind = x if isinstance(x, tuple) else (np.ascontiguousarray(x), None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return out
