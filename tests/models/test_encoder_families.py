"""Encoders' published sizes, and configurations read and written. Parity is in families/test_encoders.py."""

from dataclasses import replace

import pytest
from contract.shapes import changed

from slmjax.convert.hf import family_of
from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.models.encoder import Encoder
from slmjax.models.families import FAMILIES, SIZES, bert, distilbert, mobilebert
from slmjax.models.families.llama import llama
from slmjax.models.flops import parameter_count
from slmjax.nn.heads import Bare, Classifier, Pooler
from slmjax.nn.initial import Normal
from slmjax.nn.mlp import relu
from slmjax.nn.norm import LayerNorm

pytestmark = pytest.mark.fast

# Parameters of the class that the size is exported as: families/test_encoders.py has stock transformers count them.
PUBLISHED = {
    bert.bert_base: 109_514_298,
    bert.tinybert_4l: 14_350_248,
    bert.tinybert_6l: 66_955_008,
    bert.minilm_6l: 22_713_216,
    distilbert.distilbert_base: 66_985_530,
    mobilebert.mobilebert_base: 36_596_538,
}
TINY = {"layers": 2, "width": 32, "heads": 4, "hidden": 48, "vocab": 61, "context": 64}
POOLED = bert.bert(**TINY, head=Pooler())
ENCODERS = {
    "BERT": [bert.bert(**TINY), bert.bert(**TINY, activation=relu, eps=1e-5, types=1), POOLED,
             bert.bert(**TINY, head=Classifier(labels=("a", "b", "c"))), replace(POOLED, initial=Normal(std=0.05))],
    "DistilBERT": [distilbert.distilbert(**TINY), distilbert.distilbert(**TINY, head=Bare()),
                   distilbert.distilbert(**TINY, head=Classifier(activation=relu))],
    "MobileBERT": [mobilebert.mobilebert(**TINY, inner=16, embedding=8, feeds=2),
                   mobilebert.mobilebert(**TINY, inner=16, embedding=8, head=Classifier())],
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED, ids=lambda f: f.__name__)
def test_published_parameter_counts(size):
    assert parameter_count(size()) == PUBLISHED[size]
    assert f"{PUBLISHED[size]:,} parameters" in size.__doc__
    assert size in family_of(size()).sizes.values()


def test_every_size_is_listed():
    assert {size for size in SIZES.values() if isinstance(size(), Encoder)} == set(PUBLISHED)


@pytest.mark.parametrize("name", ENCODERS)
def test_configurations_round_trip_in_one_family_alone(name):
    (mine,) = (f for f in FAMILIES if f.name == name)
    for encoder in ENCODERS[name]:
        assert mine.from_config(mine.to_config(encoder)) == encoder
        assert [f.name for f in FAMILIES if isinstance(encoder, f.kind) and f.to_config(encoder)] == [name]
        rows = mine.rows(encoder)
        assert {row.ours for row in rows} == set(encoder.paths())
        assert len({row.theirs for row in rows}) == len(rows)


def test_decoders_are_not_offered_to_families_of_encoders():
    decoder = llama(layers=1, width=32, heads=4, kv_heads=2, hidden=48, vocab=61, context=64)
    for family in FAMILIES:
        assert family.kind in (Decoder, Encoder)
        if family.kind is Encoder:
            assert family.to_config(decoder) is None


@pytest.mark.parametrize(
    "encoder",
    [
        changed(POOLED, mixer={"causal": True}),
        changed(POOLED, mixer={"scale": 0.3}),
        changed(POOLED, norm=LayerNorm(eps=1e-5)),  # the embedding's differs
        replace(POOLED, pattern=POOLED.pattern * 2, repeats=1),
        replace(POOLED, head=Bare()),
        replace(POOLED, types=0),
        replace(distilbert.distilbert(**TINY), head=Pooler()),
        replace(mobilebert.mobilebert(**TINY, inner=16, embedding=8), trigram=None),
    ],
)
def test_what_no_class_can_express_is_refused(encoder):
    with pytest.raises(UserError, match="no class of transformers computes exactly"):
        family_of(encoder)


def test_defaults_are_those_of_the_configuration_classes():
    for module, name, base in (
        (bert, "Bert", bert.bert_base),
        (distilbert, "DistilBert", distilbert.distilbert_base),
        (mobilebert, "MobileBert", mobilebert.mobilebert_base),
    ):
        assert module.from_config({"architectures": [f"{name}ForMaskedLM"]}) == base()


WORDS = {"architectures": ["BertForMaskedLM"]}
MOBILE = {"architectures": ["MobileBertModel"]}


@pytest.mark.parametrize(
    ("family", "config", "names"),
    [
        (bert, {}, "architectures = None is not supported; expected one of BertForMaskedLM, BertModel"),
        (bert, {"architectures": ["BertForPreTraining"]}, "architectures = 'BertForPreTraining'"),
        (bert, {**WORDS, "is_decoder": True}, "is_decoder = True"),
        (bert, {**WORDS, "position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        (bert, {**WORDS, "tie_word_embeddings": False}, "tie_word_embeddings = False"),
        (bert, {**WORDS, "hidden_size": 312, "emb_size": 128}, "emb_size = 128"),
        (bert, {**WORDS, "hidden_act": "mish"}, "hidden_act = 'mish'"),
        (bert, {**WORDS, "adapters": {"a": 1}}, "adapters"),
        (bert, {"architectures": ["BertForSequenceClassification"], "id2label": {"1": "a"}}, "id2label"),
        (distilbert, {"architectures": ["DistilBertForMaskedLM"], "tie_weights_": False}, "tie_weights_ = False"),
        (mobilebert, {**MOBILE, "normalization_type": "layer_norm"}, "normalization_type = 'layer_norm'"),
        (mobilebert, {**MOBILE, "use_bottleneck": False}, "use_bottleneck = False"),
        (mobilebert, {**MOBILE, "true_hidden_size": 512}, "true_hidden_size = 512"),
    ],
)
def test_unsupported_fields_are_refused_by_name(family, config, names):
    with pytest.raises(UserError, match=names):
        family.from_config(config)
