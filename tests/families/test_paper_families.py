"""OpenELM, OpenLM (DCLM) and Apple's shared keys and values: no class in transformers, so against their papers."""

import jax
import numpy as np
import pytest
from contract.shapes import changed, padded
from families.paper_proof import prove_any_paper, prove_paper
from families.proof import assert_close, decodes_as_it_computes, logits, moves
from hypothesis import strategies as st

from slmjax.convert import table
from slmjax.convert.hf import Imported, abstract, family_of, import_hf, write_hf
from slmjax.convert.safetensors_io import Tensors, write
from slmjax.errors import UserError
from slmjax.models.families import apple, llama, open_lm, openelm
from slmjax.models.families.common.rows import Row, present
from slmjax.models.flops import parameter_count
from slmjax.nn.norm import LayerNorm

PUBLISHED = {  # of the files on the hub; Fox-1: computed, and half the bytes of its bfloat16 file of 3.33 GB
    openelm.openelm_270m: 271_527_168,
    openelm.openelm_450m: 457_179_136,
    openelm.openelm_1_1b: 1_079_891_456,
    openelm.openelm_3b: 3_036_647_424,
    open_lm.dclm_7b: 6_889_672_704,
    open_lm.dclm_1b: 1_439_795_200 + 24 * 2 * 2048,  # open_lm's own count of open_lm_1b, and norms of q and k
    llama.fox_1_1_6b: 1_665_271_808,
}


def openelm_config(**changes):
    return {
        "model_type": "openelm", "vocab_size": 97, "model_dim": 24, "head_dim": 4, "num_gqa_groups": 2,
        "num_transformer_layers": 3, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0],
        "ffn_dim_divisor": 8, "normalize_qk_projections": True, "share_input_output_layers": True,
        "rope_freq_constant": 10000, "max_context_length": 128, "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm", "rope_max_length": 256, "ffn_with_glu": True, **changes,
    }  # fmt: skip


@st.composite
def openelms(draw):
    groups, head_dim, width = draw(st.sampled_from([(2, 4, 24), (1, 8, 32), (3, 2, 32)]))
    return openelm_config(
        num_gqa_groups=groups,
        head_dim=head_dim,
        model_dim=width,
        num_transformer_layers=draw(st.integers(2, 3)),
        qkv_multipliers=draw(st.sampled_from([[0.5, 1.0], [0.3, 0.7]])),
        ffn_multipliers=draw(st.sampled_from([[0.5, 4.0], [1.1, 2.2]])),
        normalize_qk_projections=draw(st.booleans()),
        share_input_output_layers=draw(st.booleans()),
        rope_freq_constant=draw(st.sampled_from([10000, 500])),
    )


def open_lm_config(**changes):
    return {
        "model_type": "openlm", "vocab_size": 97, "dim": 24, "n_heads": 3, "n_layers": 2, "seq_len": 128,
        "norm_type": "gain_only_lp_layer_norm", "norm_eps": 1e-5, "apply_qk_norm": True, "post_embed_norm": False,
        "weight_tying": False, "ffn_type": "swiglu_torch", "positional_embedding_type": "rotary", "moe_freq": 0,
        **changes,
    }  # fmt: skip


@st.composite
def open_lms(draw):
    heads, width = draw(st.sampled_from([(3, 24), (2, 32), (1, 16)]))
    return open_lm_config(
        n_heads=heads,
        dim=width,
        n_layers=draw(st.integers(1, 3)),
        norm_type=draw(st.sampled_from(["gain_only_lp_layer_norm", "default_layer_norm", "no_wb_layer_norm"])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
        apply_qk_norm=draw(st.booleans()),
        post_embed_norm=draw(st.booleans()),
        weight_tying=draw(st.booleans()),
    )


@pytest.mark.parametrize(("kind", "configs"), [("openelm", openelms()), ("openlm", open_lms())])
def test_any_configuration(reference, kind, configs):
    prove_any_paper(reference, kind, configs)


@pytest.mark.parametrize(
    ("kind", "config", "seed"),
    [("openelm", openelm_config(share_input_output_layers=False), 1), ("openlm", open_lm_config(), 1)],
)
def test_the_same_64_tokens(reference, tmp_path, kind, config, seed):
    prove_paper(reference, tmp_path, kind, config, seed=seed, tokens=64)


def test_the_norm_over_all_heads_is_not_one_a_head(reference, tmp_path):
    """And none at all is another thing again."""
    right = prove_paper(reference, tmp_path, "openlm", open_lm_config(), seed=2)
    d = right.decoder
    for qk_norm in (None, QK_A_HEAD):
        assert moves(d, changed(d, mixer={"qk_norm": qk_norm}), right.params)
    assert moves(d, changed(d, norm=LayerNorm(eps=1e-1, bias=False)), right.params)


QK_A_HEAD = open_lm.QKNorm(norm=open_lm.GAIN_ONLY, gain_per_head=True)

SHARED = {
    "vocab": 97, "width": 24, "heads": 4, "kv_heads": 2, "head_dim": 6, "hidden": 40, "theta": 1e3,
}  # fmt: skip
SHARED_ROWS = (
    Row("embed/table", "table", "v d -> v d"),
    Row("final_norm/scale", "norm", "d -> d"),
    *(Row(f"layers/{n}_norm/scale", f"layers.{{}}.{n}_norm", "d -> d") for n in ("attn", "mlp")),
    *(Row(f"layers/attn/{n}_norm/scale", f"layers.{{}}.{n}_norm", "k -> k") for n in "qk"),
    *(Row(f"layers/attn/{n}", f"layers.{{}}.{n}", "(h k) d -> d h k") for n in "qkv"),
    Row("layers/attn/o", "layers.{}.o", "d (h k) -> h k d"),
    *(Row(f"layers/mlp/{n}", f"layers.{{}}.{n}", "f d -> d f") for n in ("gate", "up")),
    Row("layers/mlp/down", "layers.{}.down", "d f -> f d"),
)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 2)])
def test_keys_and_values_of_the_first_block_serve_the_second(reference, tmp_path, first, second):
    reference.make_paper("shared_keys", tmp_path / "it", {**SHARED, "first": first, "second": second}, seed=first)
    d = apple.two_blocks(**SHARED, first=first, second=second, context=64)
    params = table.to_ours(present(SHARED_ROWS, d), Tensors(tmp_path / "it"), abstract(d))
    x, mask = padded(d, rows=2, length=24)
    theirs, _ = reference.paper_logits("shared_keys", tmp_path / "it", x, mask)
    assert_close(logits(d, params, x, mask), theirs, mask)
    decodes_as_it_computes(Imported(decoder=d, params=params, family=apple.FAMILY, tokenizer_path=None, config={}))


@pytest.mark.fast
def test_the_cache_of_shared_layers_is_empty():
    d = apple.two_blocks(**SHARED, first=5, second=3, context=64)
    sizes = [x.size for x in jax.tree.leaves(d.build().init_cache(1, 64).layers)]
    assert sum(sizes) == 5 * 2 * 64 * 2 * 6  # 62.5% of the 8 layers, keys and values, 64 tokens, 2 heads of 6


@pytest.mark.fast
def test_the_two_blocks_are_five_to_three():
    blocks = apple.on_device_3b().blocks()
    shared = [isinstance(b.mixer, apple.SharedAttention) for b in blocks]
    assert shared == [False] * 15 + [True] * 9
    assert sum(shared) / len(shared) == 0.375
    assert f"{parameter_count(apple.on_device_3b()):,} parameters" in apple.on_device_3b.__doc__


@pytest.mark.fast
@pytest.mark.parametrize("size", PUBLISHED, ids=lambda f: f.__name__)
def test_published_counts(size):
    assert parameter_count(size()) == PUBLISHED[size]
    assert f"{PUBLISHED[size]:,} parameters" in size.__doc__


@pytest.mark.fast
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (openelm.openelm_270m, "layers differ in heads or hidden width, as in OpenELM"),
        (open_lm.dclm_7b, "LayerNorm over all heads together, as in DCLM"),
        (apple.on_device_3b, "keys and values of an earlier layer .SharedAttention.: no public class"),
    ],
)
def test_export_refuses_with_the_reason(size, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        write_hf(tmp_path, size(), {})


@pytest.mark.fast
def test_the_published_config_of_openelm_270m():
    """With the lists that the class has computed and saved."""
    size = openelm.openelm_270m()
    published = openelm_config(
        vocab_size=32000, model_dim=1280, head_dim=64, num_gqa_groups=4, num_transformer_layers=16,
        ffn_multipliers=[0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0],
        ffn_dim_divisor=256, max_context_length=2048, rope_max_length=4096, initializer_range=0.02,
        num_query_heads=[12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20],
        num_kv_heads=[3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5],
    )  # fmt: skip
    assert openelm.from_config(published) == size


@pytest.mark.fast
def test_the_published_config_of_dclm_7b():
    published = open_lm_config(
        vocab_size=50432, dim=4096, n_heads=32, n_layers=32, seq_len=2048, params=None, params_args_dict=None,
        attn_name="auto", moe_loss_weight=0.1, moe_capacity_factor=1.25, moe_num_experts=8, moe_top_k=2,
        moe_expert_model_parallelism=False, moe_weight_parallelism=False,
    )  # fmt: skip
    assert open_lm.from_config(published) == open_lm.dclm_7b()


def test_the_tables_that_open_lm_saves_beside_its_parameters_are_left(reference, tmp_path):
    reference.make_paper("openlm", tmp_path / "it", open_lm_config())
    tensors = {k: np.asarray(v) for k, v in Tensors(tmp_path / "it").items()}
    extra = {f"model.layers.{i}.attention.pos_embed.inv_freq": np.ones(4, np.float32) for i in range(2)}
    (tmp_path / "it" / "model.safetensors").unlink()
    write(tmp_path / "it", iter({**tensors, **extra}.items()), dtype="float32", shard_bytes=1 << 30)
    assert import_hf(tmp_path / "it").decoder == open_lm.from_config(open_lm_config())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("read", "changes", "names"),
    [
        (openelm, {"ffn_multipliers": [1.0, 2.0, 3.0, 4.0]}, "ffn_multipliers has 4 entries"),
        (openelm, {"ffn_with_glu": False}, "ffn_with_glu"),
        (openelm, {"activation_fn_name": "gelu"}, "activation_fn_name"),
        (openelm, {"num_query_heads": [1, 2, 3]}, "num_query_heads"),
        (openelm, {"num_experts": 2}, "num_experts"),
        (open_lm, {"ffn_type": "gemma_geglu"}, "ffn_type = 'gemma_geglu'"),
        (open_lm, {"norm_type": "batch_norm"}, "norm_type = 'batch_norm'"),
        (open_lm, {"positional_embedding_type": "head_rotary"}, "positional_embedding_type"),
        (open_lm, {"moe_freq": 2}, "moe_freq"),
        (open_lm, {"params_args_dict": {"model": "open_lm_7b"}}, "params_args_dict"),
        (open_lm, {"vocab_size": None}, "vocab_size is missing"),
        (apple, {}, "nobody has published"),
    ],
)
def test_what_cannot_be_read_is_named(read, changes, names):
    base = open_lm_config() if read is open_lm else openelm_config()
    with pytest.raises(UserError, match=names):
        read.FAMILY.from_config({**base, **changes})


@pytest.mark.fast
def test_layers_of_one_width_are_no_openelm_to_refuse():
    """They have a class, or another reason."""
    assert openelm.refusal(llama.fox_1_1_6b()) is None
    assert family_of(llama.fox_1_1_6b()) is llama.FAMILY
