"""BERT, DistilBERT and MobileBERT against stock transformers, over the space of their configurations and heads."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.shapes import changed
from families.proof import NOTHING, assert_close, each, same_tensors
from hypothesis import strategies as st
from reference.client import positions_of
from safetensors.numpy import save_file

from slmjax.convert.hf import family_of, import_hf, write_hf
from slmjax.convert.safetensors_io import Tensors
from slmjax.errors import StorageError
from slmjax.models.encoder import Encoder
from slmjax.models.families import SIZES
from slmjax.models.flops import parameter_count
from slmjax.nn.compute import Compute
from slmjax.nn.heads import Classifier
from slmjax.nn.mlp import gelu, gelu_tanh, relu, tanh
from slmjax.nn.norm import LayerNorm

LABELS = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
GAIN = {"bert": 1.2, "distilbert": 1.2, "mobilebert": 0.6}
"""Of matrices. No norm keeps MobileBERT's stream from growing: at the usual gain rounding would grow with it"""
HEADS = st.sampled_from([(3, 24), (4, 32), (1, 20)])


@st.composite
def berts(draw):
    heads, width = draw(HEADS)
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 97,
        "hidden_size": width,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.sampled_from([40, 56])),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        "max_position_embeddings": 48,
        "type_vocab_size": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-3])),
    }


@st.composite
def distilberts(draw):
    heads, width = draw(HEADS)
    return {
        "model_type": "distilbert",
        "architectures": [draw(st.sampled_from(["DistilBertForMaskedLM", "DistilBertModel"]))],
        "vocab_size": 97,
        "dim": width,
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": heads,
        "hidden_dim": draw(st.sampled_from([40, 56])),
        "activation": draw(st.sampled_from(["gelu", "relu"])),
        "max_position_embeddings": 48,
        "sinusoidal_pos_embds": draw(st.booleans()),
    }


@st.composite
def mobileberts(draw):
    heads, inner = draw(st.sampled_from([(3, 12), (2, 16)]))
    return {
        "model_type": "mobilebert",
        "architectures": [draw(st.sampled_from(["MobileBertForMaskedLM", "MobileBertModel"]))],
        "vocab_size": 97,
        "hidden_size": draw(st.sampled_from([32, 24])),
        "intra_bottleneck_size": inner,
        "embedding_size": draw(st.sampled_from([8, 16])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": 20,
        "num_feedforward_networks": draw(st.integers(1, 4)),
        "hidden_act": draw(st.sampled_from(["relu", "gelu"])),
        "max_position_embeddings": 48,
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-3])),
    }


def probe(encoder, seed, rows=3, length=21):
    """Tokens, mask and token types [B, T]; rows after the first are padded on the right."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, encoder.vocab, (rows, length), dtype=np.int32)
    mask = np.ones_like(tokens)
    for i in range(1, rows):
        mask[i, length - i * 5 :] = 0
    types = rng.integers(0, encoder.types, (rows, length), dtype=np.int32) if encoder.types else None
    return tokens, mask, types


def told(encoder, params, tokens, mask, types=None):
    """What the head tells of each token, and the hidden vectors between layers."""
    model = encoder.build(Compute(dtype="float32"))
    more = {} if types is None else {"types": jnp.asarray(types)}

    @jax.jit
    def run(params, tokens, positions, mask):
        out = model.apply(params, tokens, positions, mask, collect=True, **more)
        return model.unembed(params, out.hidden), out.blocks

    return jax.tree.map(np.asarray, run(params, tokens, positions_of(mask), mask))


def compare(ours, theirs, mask, first):
    """Of the first token alone if `first`."""
    if first:
        assert_close(ours[:, :1], theirs[:, None], mask[:, :1], least=0.3)
    else:
        assert_close(ours, theirs, mask)


def prove(reference, folder, config, seed=0):
    """Both directions: outputs and hidden vectors agree, keys and bytes are those that transformers saves."""
    reference.make(folder / "theirs", config, seed=seed, gain=GAIN[config["model_type"]])
    imported = import_hf(folder / "theirs")
    encoder, family = imported.decoder, imported.family
    stock = family.stock(encoder)
    written = family.to_config(encoder)
    assert written is not None, f"{family.name} cannot write what it has read"
    assert family.from_config(written) == encoder
    assert family_of(encoder) is family

    x, mask, types = probe(encoder, seed)
    ours, blocks = told(encoder, imported.params, x, mask, types)
    theirs, _ = reference.logits(folder / "theirs", x, mask, hidden=True, types=types)
    compare(ours, theirs["logits"], mask, stock.first)
    for mine, other in zip(blocks, theirs["hidden"], strict=True):
        assert_close(mine, other, mask)

    (folder / "ours").mkdir()
    write_hf(folder / "ours", encoder, imported.params)
    same_tensors(Tensors(folder / "ours"), Tensors(folder / "theirs"))
    back, report = reference.logits(folder / "ours", x, mask, types=types)
    assert report == NOTHING
    compare(ours, back["logits"], mask, stock.first)
    return imported


@pytest.mark.parametrize("configs", [berts(), distilberts(), mobileberts()], ids=["bert", "distilbert", "mobilebert"])
def test_any_configuration(reference, configs):
    each(configs, functools.partial(prove, reference))


BERT = {
    "model_type": "bert", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 48,
}  # fmt: skip
MOBILE = {
    "model_type": "mobilebert", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 48, "intra_bottleneck_size": 16, "embedding_size": 12,
}  # fmt: skip


DISTIL = {
    "model_type": "distilbert", "vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    "max_position_embeddings": 48,
}  # fmt: skip


@pytest.mark.parametrize(("config", "name"), [(BERT, "BertModel"), (MOBILE, "MobileBertModel")], ids=["bert", "mobile"])
def test_poolers(reference, tmp_path, config, name):
    prove(reference, tmp_path, {**config, "architectures": [name]})


@pytest.mark.parametrize(
    ("config", "name", "activation"),
    [(BERT, "Bert", tanh), (MOBILE, "MobileBert", tanh), (DISTIL, "DistilBert", relu)],
    ids=["bert", "mobilebert", "distilbert"],
)
def test_classifiers(reference, tmp_path, config, name, activation):
    config = {**config, **LABELS, "architectures": [f"{name}ForSequenceClassification"]}
    imported = prove(reference, tmp_path, config)
    assert imported.decoder.head == Classifier(labels=("no", "maybe", "yes"), activation=activation)
    x, mask, _ = probe(imported.decoder, 0)
    other = replace(imported.decoder, head=replace(imported.decoder.head, activation=gelu))
    right, wrong = (told(e, imported.params, x, mask)[0][:, 0] for e in (imported.decoder, other))
    assert np.abs(right - wrong).max() > 1e-3


@pytest.fixture(scope="module")
def stock(reference, tmp_path_factory):
    """A BERT and a MobileBERT of transformers, read."""
    folder = tmp_path_factory.mktemp("stock")
    made = {}
    for name, config, architecture in (("bert", BERT, "BertForMaskedLM"), ("mobile", MOBILE, "MobileBertForMaskedLM")):
        reference.make(folder / name, {**config, "architectures": [architecture]}, gain=GAIN[config["model_type"]])
        made[name] = import_hf(folder / name)
    return made


SWITCHES = {
    "causal": ("bert", lambda e: changed(e, mixer={"causal": True})),
    "tanh gelu": ("bert", lambda e: changed(e, mlp={"activation": gelu_tanh})),
    "tanh gelu in the head": ("bert", lambda e: replace(e, head=replace(e.head, activation=gelu_tanh))),
    "eps": ("bert", lambda e: changed(e, norm=LayerNorm(eps=1e-2))),
    "no token types": ("bert", lambda e: replace(e, types=0)),
    "norm instead of the affine map": ("mobile", lambda e: changed(e, norm=LayerNorm(eps=1e-12))),
    "norm of the embedding": ("mobile", lambda e: replace(e, embed_norm=LayerNorm(eps=1e-12))),
    "gelu": ("mobile", lambda e: changed(e, mlp={"activation": gelu})),
    "three feed-forward layers": ("mobile", lambda e: changed(e, feeds=3)),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_moves_the_logits(stock, name):
    """Else parity would not prove it."""
    which, change = SWITCHES[name]
    encoder, params = stock[which].decoder, stock[which].params
    x, mask, _ = probe(encoder, 0)
    right, wrong = (told(e, params, x, mask)[0][mask == 1] for e in (encoder, change(encoder)))
    assert np.abs(right - wrong).max() > 1e-3


@pytest.mark.parametrize("which", ["bert", "mobile"])
def test_documents_of_a_row_do_not_see_each_other(stock, which):
    """Two documents packed into a row are computed as each alone; the trigram of MobileBERT, too, ends with them."""
    encoder, params = stock[which].decoder, jax.tree.map(jnp.asarray, stock[which].params)
    model = encoder.build(Compute(dtype="float32"))
    tokens = np.random.default_rng(0).integers(0, 97, (1, 20), dtype=np.int32)
    segments = np.repeat([[1, 2]], [12, 8], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(12), np.arange(8)])[None].astype(np.int32)
    tokens, positions, segments = map(jnp.asarray, (tokens, positions, segments))
    whole = model.apply(params, tokens, positions, segments).hidden
    for part in (slice(0, 12), slice(12, 20)):
        alone = model.apply(params, *(x[:, part] for x in (tokens, positions, segments))).hidden
        assert_close(np.asarray(whole[:, part]), np.asarray(alone), np.ones((1, alone.shape[1])))
    # and within a document both directions are seen
    first = [x[:, :12] for x in (tokens, positions, segments)]

    def third(table):
        return jnp.sum(
            model.apply({**params, "embed": {**params["embed"], "positions": table}}, *first).hidden[0, 3] ** 2
        )

    seen = jax.grad(third)(params["embed"]["positions"])
    assert (np.abs(np.asarray(seen)[:12]).max(axis=1) > 1e-6).all()


@pytest.mark.parametrize("name", [n for n, size in SIZES.items() if isinstance(size(), Encoder)])
def test_published_sizes_have_the_parameters_of_the_stock_class(reference, name):
    encoder = SIZES[name]()
    assert reference.count(family_of(encoder).to_config(encoder)) == parameter_count(encoder)


def test_old_names_copies_and_what_nobody_reads(stock, tmp_path):
    """As the files of 2019 are: gamma and beta, the tied table again, the head for next sentences, position ids."""
    (tmp_path / "ours").mkdir()
    write_hf(tmp_path / "ours", stock["bert"].decoder, stock["bert"].params)
    tensors = {k: np.asarray(v) for k, v in Tensors(tmp_path / "ours").items()}
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }
    table = tensors["bert.embeddings.word_embeddings.weight"]
    old |= {
        "cls.predictions.decoder.weight": table,
        "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
        "bert.embeddings.position_ids": np.arange(48)[None],
    }
    save_file(old, tmp_path / "ours" / "model.safetensors")
    back = import_hf(tmp_path / "ours").params
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), back, stock["bert"].params)
    assert all(jax.tree.leaves(same))
    save_file({**old, "cls.predictions.decoder.weight": table + 1}, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(StorageError, match=r"cls.predictions.decoder.weight differs from bert.embeddings"):
        import_hf(tmp_path / "ours")
