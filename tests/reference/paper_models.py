"""Models that transformers has no class for, in plain torch: written from the papers, with the keys of their files.

Each is a pair of functions: `keys(config)` -> {key: shape of the tensor in the file}, and `logits(config, w, tokens,
mask, positions)` -> [B, T, V] from those tensors. Everything is spelled out a head and a layer at a time; nothing is
shared with slmjax.
"""

import math

import torch
import torch.nn.functional as F


def rms(x, gain, eps):
    """x / sqrt(mean(x^2) + eps) * gain. Zhang & Sennrich 2019."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain


def turned(x, positions, theta):
    """x [B, H, T, K]: channels i and i + K/2 are a plane, turned by position * theta^(-2i/K). Su et al. 2021."""
    half = x.shape[-1] // 2
    speed = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = (positions.double()[:, None, :, None] * speed).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def heads(x, k):
    """[B, T, H * K] -> [B, H, T, K]"""
    return x.unflatten(-1, (-1, k)).transpose(1, 2)


def attend(q, k, v, mask):
    """q [B, H, T, K]; k, v [B, G, T, K]; mask [B, T] 0 at padding -> [B, T, H * K]. Query h reads key head h·G/H."""
    out = []
    t = q.shape[2]
    seen = torch.tril(torch.ones(t, t, dtype=torch.bool)) & (mask[:, None, :] == mask[:, :, None])
    for h in range(q.shape[1]):
        g = h * k.shape[1] // q.shape[1]
        scores = q[:, h] @ k[:, g].transpose(1, 2) / math.sqrt(q.shape[-1])
        out.append(torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v[:, g])
    return torch.cat(out, -1)


def swiglu(x, gate, up, down):
    """down(silu(gate(x)) * up(x)). Shazeer 2020."""
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


class MiniCPM:
    """Hu et al. 2024, arXiv:2404.06395: a Llama; embedding × scale_emb, branches × scale_depth/√L, and the hidden
    vector divided by (d / dim_model_base) before the tied head."""

    @staticmethod
    def keys(c):
        d, f, k = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
        out = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            out |= {f"{p}input_layernorm.weight": (d,), f"{p}post_attention_layernorm.weight": (d,)}
            out |= {f"{p}self_attn.{n}_proj.weight": (c["num_key_value_heads"] * k, d) for n in "kv"}
            out |= {f"{p}self_attn.q_proj.weight": (d, d), f"{p}self_attn.o_proj.weight": (d, d)}
            out |= {f"{p}mlp.{n}_proj.weight": (f, d) for n in ("gate", "up")}
            out[f"{p}mlp.down_proj.weight"] = (d, f)
        return out

    @staticmethod
    def logits(c, w, tokens, mask, positions):
        d, depth, eps = c["hidden_size"], c["num_hidden_layers"], c["rms_norm_eps"]
        k, share = d // c["num_attention_heads"], c["scale_depth"] / math.sqrt(depth)
        x = w["model.embed_tokens.weight"][tokens] * c["scale_emb"]
        for i in range(depth):
            layer = {
                n.removeprefix(f"model.layers.{i}."): v for n, v in w.items() if n.startswith(f"model.layers.{i}.")
            }
            y = rms(x, layer["input_layernorm.weight"], eps)
            q, key, v = (heads(y @ layer[f"self_attn.{n}_proj.weight"].T, k) for n in "qkv")
            q, key = (turned(z, positions, c["rope_theta"]) for z in (q, key))
            x = x + share * (attend(q, key, v, mask) @ layer["self_attn.o_proj.weight"].T)
            y = rms(x, layer["post_attention_layernorm.weight"], eps)
            x = x + share * swiglu(y, *(layer[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down")))
        x = rms(x, w["model.norm.weight"], eps) / (d / c["dim_model_base"])
        return x @ w["model.embed_tokens.weight"].T


class OpenELM:
    """Mehta et al. 2024, arXiv:2404.14619, section 2.1: layer-wise scaling. Layer i of N has the attention width
    α_i·d with α_i = α_min + (α_max - α_min)·i/(N - 1), and the feed-forward width β_i·d likewise; both multipliers are
    rounded to two decimals in the release, the widths to the nearest multiple of (head · groups) and of 256 (half up,
    at least one of them, and up where down would lose more than a tenth)."""

    @staticmethod
    def widths(c, low_high, multiple):
        low, high = low_high
        n = c["num_transformer_layers"]
        shares = [round(low + (high - low) * i / (n - 1), 2) for i in range(n)]
        wanted = [share * c["model_dim"] for share in shares]
        near = [max(1, math.floor(x / multiple + 0.5)) * multiple for x in wanted]
        return [m if m >= 0.9 * x else m + multiple for m, x in zip(near, wanted, strict=True)]

    @classmethod
    def keys(cls, c):
        d, k, groups = c["model_dim"], c["head_dim"], c["num_gqa_groups"]
        out = {"transformer.token_embeddings.weight": (c["vocab_size"], d), "transformer.norm.weight": (d,)}
        if not c["share_input_output_layers"]:
            out["lm_head.weight"] = (c["vocab_size"], d)
        attention = cls.widths(c, c["qkv_multipliers"], k * groups)
        hidden = cls.widths(c, c["ffn_multipliers"], c["ffn_dim_divisor"])
        for i, (a, f) in enumerate(zip(attention, hidden, strict=True)):
            p = f"transformer.layers.{i}."
            out |= {f"{p}attn_norm.weight": (d,), f"{p}ffn_norm.weight": (d,)}
            out |= {f"{p}attn.qkv_proj.weight": (a + 2 * a // groups, d), f"{p}attn.out_proj.weight": (d, a)}
            out |= {f"{p}ffn.proj_1.weight": (2 * f, d), f"{p}ffn.proj_2.weight": (d, f)}
            if c["normalize_qk_projections"]:
                out |= {f"{p}attn.q_norm.weight": (k,), f"{p}attn.k_norm.weight": (k,)}
        return out

    @classmethod
    def logits(cls, c, w, tokens, mask, positions):
        k, eps = c["head_dim"], 1e-6
        x = w["transformer.token_embeddings.weight"][tokens]
        for i, a in enumerate(cls.widths(c, c["qkv_multipliers"], k * c["num_gqa_groups"])):
            p, g = f"transformer.layers.{i}.", a // c["num_gqa_groups"]
            y = rms(x, w[f"{p}attn_norm.weight"], eps)
            fused = w[f"{p}attn.qkv_proj.weight"]
            q, key, v = (heads(y @ m.T, k) for m in (fused[:a], fused[a : a + g], fused[a + g :]))
            if c["normalize_qk_projections"]:
                q, key = rms(q, w[f"{p}attn.q_norm.weight"], eps), rms(key, w[f"{p}attn.k_norm.weight"], eps)
            q, key = (turned(z, positions, c["rope_freq_constant"]) for z in (q, key))
            x = x + attend(q, key, v, mask) @ w[f"{p}attn.out_proj.weight"].T
            gate, up = w[f"{p}ffn.proj_1.weight"].chunk(2)
            x = x + swiglu(rms(x, w[f"{p}ffn_norm.weight"], eps), gate, up, w[f"{p}ffn.proj_2.weight"])
        x = rms(x, w["transformer.norm.weight"], eps)
        return x @ w.get("lm_head.weight", w["transformer.token_embeddings.weight"]).T


class OpenLM:
    """Li et al. 2024 (DCLM), arXiv:2406.11794, appendix on training: a Llama with LayerNorm without biases, and with
    queries and keys under a LayerNorm over all heads together; d_ff = 256⌈(8d/3)/256⌉."""

    @staticmethod
    def keys(c):
        both = {"default_layer_norm": ["weight", "bias"], "no_wb_layer_norm": []}
        d, parts = c["dim"], both.get(c["norm_type"], ["weight"])
        f = 256 * math.ceil(int(8 * d / 3) / 256)
        out = {"model.tok_embeddings.weight": (c["vocab_size"], d)}
        out |= {f"model.norm.{n}": (d,) for n in parts}
        if not c["weight_tying"]:
            out["model.output.weight"] = (c["vocab_size"], d)
        if c["post_embed_norm"]:
            out |= {f"model.post_embed_norm.{n}": (d,) for n in parts}
        for i in range(c["n_layers"]):
            p = f"model.layers.{i}."
            out |= {f"{p}{name}_norm.{n}": (d,) for name in ("attention", "ffn") for n in parts}
            out |= {f"{p}attention.in_proj.weight": (3 * d, d), f"{p}attention.out_proj.weight": (d, d)}
            out |= {f"{p}feed_forward.w12.weight": (2 * f, d), f"{p}feed_forward.w3.weight": (d, f)}
            if c["apply_qk_norm"]:
                out |= {f"{p}attention.{name}_norm.{n}": (d,) for name in "qk" for n in parts}
        return out

    @staticmethod
    def logits(c, w, tokens, mask, positions):
        k = c["dim"] // c["n_heads"]

        def norm(x, name):
            x = x - x.mean(-1, keepdim=True)
            x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + c["norm_eps"])
            return x * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)

        x = w["model.tok_embeddings.weight"][tokens]
        x = norm(x, "model.post_embed_norm") if c["post_embed_norm"] else x
        for i in range(c["n_layers"]):
            p = f"model.layers.{i}."
            q, key, v = (norm(x, f"{p}attention_norm") @ w[f"{p}attention.in_proj.weight"].T).chunk(3, -1)
            if c["apply_qk_norm"]:
                q, key = norm(q, f"{p}attention.q_norm"), norm(key, f"{p}attention.k_norm")
            q, key = (turned(heads(z, k), positions, 1e4) for z in (q, key))
            x = x + attend(q, key, heads(v, k), mask) @ w[f"{p}attention.out_proj.weight"].T
            gate, up = w[f"{p}feed_forward.w12.weight"].chunk(2)
            x = x + swiglu(norm(x, f"{p}ffn_norm"), gate, up, w[f"{p}feed_forward.w3.weight"])
        return norm(x, "model.norm") @ w.get("model.output.weight", w["model.tok_embeddings.weight"]).T


class SharedKeys:
    """Apple 2025, arXiv:2507.13575, section 2.1: the layers of the second block have no key and value projections; they
    read those of the last layer of the first block. The keys of this file are ours: nobody has published any."""

    @staticmethod
    def keys(c):
        d, k = c["width"], c["head_dim"]
        out = {"table": (c["vocab"], d), "norm": (d,)}
        for i in range(c["first"] + c["second"]):
            p = f"layers.{i}."
            out |= {f"{p}attn_norm": (d,), f"{p}mlp_norm": (d,), f"{p}q_norm": (k,)}
            out |= {f"{p}q": (c["heads"] * k, d), f"{p}o": (d, c["heads"] * k)}
            out |= {f"{p}gate": (c["hidden"], d), f"{p}up": (c["hidden"], d), f"{p}down": (d, c["hidden"])}
            if i < c["first"]:
                out |= {f"{p}k_norm": (k,), f"{p}k": (c["kv_heads"] * k, d), f"{p}v": (c["kv_heads"] * k, d)}
        return out

    @staticmethod
    def logits(c, w, tokens, mask, positions):
        k, eps = c["head_dim"], 1e-5
        x = w["table"][tokens]
        key = v = None
        for i in range(c["first"] + c["second"]):
            p = f"layers.{i}."
            y = rms(x, w[f"{p}attn_norm"], eps)
            q = turned(rms(heads(y @ w[f"{p}q"].T, k), w[f"{p}q_norm"], eps), positions, c["theta"])
            if i < c["first"]:
                key = turned(rms(heads(y @ w[f"{p}k"].T, k), w[f"{p}k_norm"], eps), positions, c["theta"])
                v = heads(y @ w[f"{p}v"].T, k)
            x = x + attend(q, key, v, mask) @ w[f"{p}o"].T
            y = rms(x, w[f"{p}mlp_norm"], eps)
            x = x + swiglu(y, w[f"{p}gate"], w[f"{p}up"], w[f"{p}down"])
        return rms(x, w["norm"], eps) @ w["table"].T


MODELS = {"minicpm": MiniCPM, "openelm": OpenELM, "openlm": OpenLM, "shared_keys": SharedKeys}


def draw(kind, config, seed):
    """{key: random tensor}, large enough that every nonlinearity and bias shows in the logits."""
    torch.manual_seed(seed)
    out = {}
    for key, shape in MODELS[kind].keys(config).items():
        noise = torch.randn(shape)
        table = "emb" in key or key == "table"
        if len(shape) == 1:
            out[key] = ("bias" not in key) + 0.3 * noise
        else:
            out[key] = noise * (0.5 if table else 1.2 / shape[1] ** 0.5)
    return out
