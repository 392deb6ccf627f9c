"""Every architecture that is written as GGUF is read back: the same model, whoever wrote the file, or one line."""

import pathlib

import gguf
import jax
import numpy as np
import pytest
from contract.gguf_models import CONFIGS, patched
from running import slmjax

from slmjax import tree
from slmjax.compress.quant.in_memory import InMemory
from slmjax.compress.quant.into_memory import floats
from slmjax.convert.gguf import gate as gguf_gate
from slmjax.convert.gguf.export import export_gguf
from slmjax.convert.gguf.families import ARCHITECTURES, architecture_named, architecture_of
from slmjax.convert.gguf.file import GGUF
from slmjax.convert.gguf.load import import_gguf, write_gguf
from slmjax.convert.hf import abstract
from slmjax.convert.memory import to_device
from slmjax.data.generation_config import GenerationConfig
from slmjax.data.tokenizer import Bytes
from slmjax.errors import StorageError, UserError
from slmjax.models.families import FAMILIES
from slmjax.nn.rope_scaling import LongRope
from slmjax.runs.loading import load

FAMILY = {family.model_type: family for family in FAMILIES}
MODELS = {name: config for name, config in CONFIGS.items() if config["model_type"] in FAMILY}
FIRST = {}
"""Name in llama.cpp -> the first of `MODELS` that is written so"""
MADE = Bytes().make([], pathlib.Path())


def decoder_of(name):
    return FAMILY[MODELS[name]["model_type"]].from_config(MODELS[name])


def drawn(decoder):
    """Parameters with few digits, to which 1 can be added without rounding."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.integers(-200, 200, x.shape).astype(np.float32) / 256, abstract(decoder))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name of a model -> its file, its decoder and its parameters."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}
    for i, name in enumerate(MODELS):
        decoder = decoder_of(name)
        made[name] = folder / f"{i}.gguf", decoder, drawn(decoder)
        architecture, _ = write_gguf(*made[name], tokenizer=MADE)
        FIRST.setdefault(architecture.name, name)
    return made


def same(a, b):
    for path, x in tree.flatten(a).items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(tree.flatten(b)[path]), err_msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_comes_back_bit_for_bit(files, tmp_path, name):
    file, decoder, params = files[name]
    back = import_gguf(file)
    assert back.decoder == decoder
    same(back.params, params)
    write_gguf(tmp_path / "again.gguf", back.decoder, back.params, tokenizer=MADE)
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_every_architecture_is_tried(files):
    assert set(FIRST) == {one.name for one in ARCHITECTURES}


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_are_those_that_llama_cpp_has_for_the_architecture(files, name):
    found = GGUF(files[name][0])
    arch = architecture_named(found.metadata["general.architecture"]).arch
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]}
    layers = found.metadata[f"{gguf.MODEL_ARCH_NAMES[arch]}.block_count"]
    whole = {one.format(bid=i) for one in known for i in range(layers)}
    assert {key.removesuffix(".weight").removesuffix(".bias") for key in found} <= whole


SIZE = ("attention.key_length", "attention.value_length")
ROTARY = ("rope.dimension_count",)
LEFT_OUT = {
    "gemma2": ("rope.freq_base", *ROTARY),
    "gemma3": ("rope.freq_base_swa", "attention.sliding_window_pattern", *ROTARY),
    "gptneox": ("rope.freq_base", "attention.head_count_kv", *SIZE),
    "phi3": SIZE,
    "stablelm": SIZE,
    "gpt2": ("attention.head_count_kv", *SIZE),
    "bloom": SIZE,
    "qwen2": (*SIZE, *ROTARY),
    "olmo2": (*SIZE, *ROTARY),
}
"""Keys that the converter of llama.cpp does not write (its folder conversion/), besides vocab_size"""


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_keys_that_converters_leave_out_have_the_values_of_llama_cpp(files, tmp_path, kind, reference):
    """Where a value is left to llama.cpp, stock llama.cpp says whether we take the same."""
    file, decoder, params = files[FIRST[kind]]
    missing = {f"{kind}.{key}": None for key in ("vocab_size", *LEFT_OUT[kind])}
    assert missing.keys() - {f"{kind}.vocab_size"} <= GGUF(file).metadata.keys()
    less = patched(file, tmp_path / "less.gguf", **missing)
    back = import_gguf(less)
    assert back.decoder == decoder
    same(back.params, params)
    if kind in ("gemma2", "gemma3", "gptneox"):
        prompts = np.random.default_rng(0).integers(0, 256, (2, 40)).tolist()
        answer = gguf_gate._run(less, reference.python, {"prompts": prompts, "new_tokens": 4, "top": 20, "texts": []})
        assert answer is not None
        limit = gguf_gate.limit_of("float32", architecture_named(kind).drift, quantized=False)
        checks = gguf_gate._compare(
            "llama.cpp", back.decoder, to_device(back.params), prompts, answer["rows"], 4, limit, MADE
        )
        assert [check.passed for check in checks] == [True] * len(checks), checks


def test_a_window_for_each_layer_may_be_listed(files, tmp_path):
    file, decoder, _ = files["gemma3"]
    windows = np.array([True] * 5 + [False, True])
    pattern = {"gemma3.attention.sliding_window_pattern": None}
    less = patched(file, tmp_path / "less.gguf", **pattern)
    opened = GGUF(less)
    opened.metadata["gemma3.attention.sliding_window_pattern"] = windows
    config = architecture_named("gemma3").config(opened)
    assert FAMILY["gemma3_text"].from_config(config) == decoder
    none = patched(file, tmp_path / "none.gguf", **{"gemma3.attention.sliding_window": None})
    assert all(block.mixer.window is None for block in import_gguf(none).decoder.blocks())


def test_a_head_that_repeats_the_embedding_is_tied(files, tmp_path):
    """As old converters wrote GPT-2 and BLOOM."""
    for name in ("qwen3", "gemma2", "bloom, odd number of heads"):
        file, decoder, params = files[name]
        assert decoder.tied
        table = GGUF(file)["token_embd.weight"]
        back = import_gguf(patched(file, tmp_path / "twice.gguf", **{"output.weight": table}))
        assert back.decoder == decoder
        same(back.params, params)
    other = patched(files["gemma2"][0], tmp_path / "other.gguf", **{"output.weight": table * 2})
    with pytest.raises(StorageError, match=r"tensor 'output\.weight' has no place in this model"):
        import_gguf(other)


def test_the_window_of_phi3_and_its_growth_are_kept(files, tmp_path):
    file, decoder, _ = files["phi3, longrope"]
    windowed = patched(file, tmp_path / "a.gguf", **{"phi3.attention.sliding_window": 100})
    assert {block.mixer.window for block in import_gguf(windowed).decoder.blocks()} == {100}
    grown = patched(file, tmp_path / "b.gguf", **{"phi3.rope.scaling.attn_factor": 1.5})
    scaling = import_gguf(grown).decoder.pattern[0].mixer.position.scaling
    assert isinstance(scaling, LongRope)
    assert (scaling.magnitude, decoder.pattern[0].mixer.position.scaling.attention_factor) == (1.5, None)
    write_gguf(tmp_path / "c.gguf", import_gguf(grown).decoder, drawn(decoder), tokenizer=MADE)
    assert GGUF(tmp_path / "c.gguf").metadata["phi3.rope.scaling.attn_factor"] == 1.5


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_divides_scores_by_another_root(files, name, layers):
    """By the root of width / heads, as llama.cpp does for these numbers of layers: here 16, not a head's width, 32.
    (So many layers take too long to run: with 16, log-probabilities agree with llama.cpp's to 8e-4, with 32 to 0.5.)"""
    period = {"gemma2": 2, "gemma3": 6}[name]
    kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    family = FAMILY[MODELS[name]["model_type"]]
    config = {**family.to_config(files[name][1]), "num_hidden_layers": layers, "layer_types": kinds}
    architecture = architecture_of(family.model_type)
    with pytest.raises(UserError, match=r"query_pre_attn_scalar = 32: llama\.cpp computes .* only with 16"):
        architecture.keys(config)
    config["query_pre_attn_scalar"] = 16
    opened = GGUF(files[name][0])
    opened.metadata |= architecture.keys(config)
    opened.infos |= {f"more {i}": opened.infos["token_embd.weight"] for i in range(layers)}
    decoder = family.from_config(architecture.config(opened))
    assert decoder == family.from_config(config)
    assert (decoder.layers, decoder.pattern[0].mixer.scale) == (layers, 16**-0.5)


WRONG = {
    r"gemma2\.embedding_length = missing; expected a positive": ("gemma2", {"gemma2.embedding_length": None}),
    r"gptneox\.use_parallel_residual = missing; expected true": ("gptneox", {"gptneox.use_parallel_residual": None}),
    r"gpt2\.attention\.layer_norm_epsilon = missing": ("gpt2", {"gpt2.attention.layer_norm_epsilon": None}),
    r"granite\.logit_scale = missing": ("granite", {"granite.logit_scale": None}),
    r"tensor 'blk\.1\.attn_qkv\.weight' of shape \[128, 64\] is missing": ("phi3", {"blk.1.attn_qkv.weight": None}),
    r"tensor 'position_embd\.weight' of shape \[128, 64\] is missing": ("gpt2", {"position_embd.weight": None}),
    r"tensor 'rope_factors_short\.weight' is missing": ("phi3, longrope", {"rope_factors_short.weight": None}),
    r"'rope_factors_long\.weight' has shape \[9\]; expected \[8\]": (
        "phi3, longrope", {"rope_factors_long.weight": np.ones(9, np.float32)},
    ),
    r"attn_factor = 1\.0488\d+; expected 1\.0 in a file without a tensor": (
        "phi3, longrope", {"rope_factors_long.weight": None, "rope_factors_short.weight": None},
    ),
    r"tensor 'blk\.0\.ffn_up\.weight' has shape \[96, 64\]; expected \[192, 64\]": (
        "phi3", {"blk.0.ffn_up.weight": np.ones((96, 64), np.float32)},
    ),
    r"tensor 'blk\.0\.attn_q_norm\.weight' has shape \[4, 8\]; expected \[4, 16\]": (
        "stablelm, parallel, a norm a head", {"blk.0.attn_q_norm.weight": np.ones((4, 8), np.float32)},
    ),
    r"tensor 'blk\.0\.attn_q\.bias' of shape \[64\] is missing": ("qwen2", {"blk.0.attn_q.bias": None}),
    r"tensor 'rope_freqs\.weight' has no place": ("qwen3", {"rope_freqs.weight": np.ones(8, np.float32)}),
    r"qwen2\.rope\.scaling\.type = 'longrope' is not supported": ("qwen2", {"qwen2.rope.scaling.type": "longrope"}),
    r"partial_rotary_factor = 0\.5 is not supported": ("olmo2", {"olmo2.rope.dimension_count": 8}),
    r"dimension_count = 20; expected an even number up to": ("stablelm", {"stablelm.rope.dimension_count": 20}),
    r"sliding_window_pattern = 0; expected a number of layers": (
        "gemma3", {"gemma3.attention.sliding_window_pattern": 0},
    ),
    r"phi3\.attention\.sliding_window = 'x'; expected a number of tokens": (
        "phi3", {"phi3.attention.sliding_window": "x"},
    ),
    r"gemma3\.final_logit_softcapping = 30\.0 is not supported": ("gemma3", {"gemma3.final_logit_softcapping": 30.0}),
    r"attention\.causal = False: a model that reads both ways": ("qwen3", {"qwen3.attention.causal": False}),
    r"finetuned = False: a Granite without positions": ("granite", {"granite.rope.scaling.finetuned": False}),
    r"feed_forward_length = 100 is not supported; only 4 \* width": ("bloom", {"bloom.feed_forward_length": 100}),
    r"4 heads of width 16 with 2 key-value heads, at a width of 64": ("gpt2", {"gpt2.attention.head_count_kv": 2}),
    r"hidden_size = 64 is not 4 heads .* of head_dim = 32": (
        "stablelm", {"stablelm.attention.key_length": 32, "stablelm.attention.value_length": 32},
    ),
    r"attention\.value_length is not attention\.key_length": ("qwen2", {"qwen2.attention.value_length": 8}),
    r"hidden_act = 'swish'; expected one of gelu": ("gptneox", {"gptneox.hidden_act": "swish"}),
    r"tokenizer\.ggml\.eot_token_id is 999; expected one of 288 ids": ("gpt2", {"tokenizer.ggml.eot_token_id": 999}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_contradicts_itself_or_is_not_supported_is_refused_in_one_line(files, tmp_path, message):
    name, changes = WRONG[message]
    file = files[FIRST.get(name, name)][0]
    with pytest.raises((UserError, StorageError), match=message) as error:
        import_gguf(patched(file, tmp_path / "bad.gguf", **changes))
    assert "\n" not in str(error.value)
    assert str(error.value).count("bad.gguf") == 1


def test_an_unknown_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    expected = (
        r"a\.gguf: general\.architecture = 'mamba' cannot be imported; expected one of llama, granite, smollm3, qwen2"
    )
    with pytest.raises(UserError, match=expected):
        import_gguf(tmp_path / "a.gguf")


PACKED = [
    *((name, "Q4_0") for name in ("gpt2", "phi3, longrope", "stablelm", "gemma2", "gpt_neox")),
    *(("gpt2", kind) for kind in ("Q8_0", "Q5_1", "BF16")),
]


@pytest.mark.parametrize(("name", "kind"), PACKED)
def test_packed_tensors_are_read_in_every_layout(files, tmp_path, name, kind):
    """Fused, transposed and reordered matrices: the values of the library's unpacking, as floats and as codes."""
    file, decoder, _ = files[name]
    number, tensors = gguf.GGMLQuantizationType[kind], GGUF(file)
    packed, rounded = {}, {}
    for key in (key for key in tensors if tensors[key].ndim == 2 and tensors[key].shape[1] % 32 == 0):
        if not key.startswith("position"):
            raw = gguf.quantize(tensors[key], number)
            packed[key], rounded[key] = (raw, number), gguf.dequantize(raw, number)
    assert len(packed) >= 9
    back = import_gguf(patched(file, tmp_path / "packed.gguf", **packed))
    expected = import_gguf(patched(file, tmp_path / "rounded.gguf", **rounded))
    assert back.decoder == expected.decoder == decoder
    same(back.params, expected.params)
    kept = import_gguf(tmp_path / "packed.gguf", packed=True).params
    same(floats(to_device(kept)), expected.params)
    is_codes = lambda x: isinstance(x, InMemory)  # noqa: E731
    held = [path for path, x in tree.flatten(kept, is_leaf=is_codes).items() if is_codes(x)]
    assert bool(held) == (kind in ("Q8_0", "Q4_0")), held


def test_end_tokens_are_a_set_of_three(files, tmp_path, monkeypatch):
    monkeypatch.delenv("SLMJAX_REFERENCE_PYTHON", raising=False)
    _, decoder, params = files["gpt2"]
    three, four = (GenerationConfig(said={"eos_token_id": [MADE.eos_id, *range(5, 5 + n)]}) for n in (2, 3))
    for said, left in ((three, ()), (four, (7,))):
        out = tmp_path / f"{len(said.ends)}.gguf"
        done = export_gguf(decoder, to_device(params), out, tokenizer=MADE, generation=said)
        assert done.ends_left_out == left
        assert import_gguf(out).generation.ends == three.ends
        assert load(out).generation.ends == three.ends


def test_an_end_of_turn_without_an_end_of_text_ends_a_text(files, tmp_path):
    file = files["gpt2"][0]
    turn = {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.eot_token_id": 9}
    back = import_gguf(patched(file, tmp_path / "a.gguf", **turn))
    assert (back.tokenizer.eos_id, back.generation.ends) == (None, (9,))
    plain = import_gguf(file)
    assert (plain.generation.ends, plain.tokenizer.eos_id) == ((), MADE.eos_id)


def test_file_and_import_generate_the_same(files, tmp_path):
    """StableLM, on the command line."""
    file, folder = files["stablelm"][0], tmp_path / "imported"
    done = slmjax("import", file, "--out", folder)
    assert (done.code, done.err) == (0, "")
    assert "StableLM of" in done.out
    argv = ("--prompt", "Call me", "--max-tokens", "6", "--temperature", "0")
    texts = [slmjax("generate", model, *argv) for model in (file, folder)]
    assert [text.code for text in texts] == [0, 0], texts
    assert texts[0].out == texts[1].out
