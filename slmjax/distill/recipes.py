"""The terms of published methods, for `Distill.terms`. Each docstring says which other fields the paper uses."""

from __future__ import annotations

from slmjax.distill.features import HiddenCosine, HiddenMSE
from slmjax.distill.layer_maps import Embedding, Explicit, Last, LayerMap, OneToOne, Uniform
from slmjax.distill.relations import AttentionKL, AttentionScores, Relations
from slmjax.distill.terms import Progressive, Term, Weight


def tinybert(teacher_width: int | None = None, layers: LayerMap | None = None) -> tuple[Term, ...]:
    """Attention scores and hidden vectors of each layer, and the embedding; the last two have a projection each if
    the teacher's width is given. The paper's first stage has nothing else (`match=0.0, cross_entropy=0.0`), its last
    the soft labels of a classifier alone. Jiao et al. 2020, arXiv:1909.10351.

    Args:
        layers: which layer learns from which; None: `Uniform()`.
    """
    layers = layers or Uniform()
    return (
        Term(loss=AttentionScores(layers=layers)),
        Term(loss=HiddenMSE(layers=layers, teacher_width=teacher_width)),
        Term(loss=HiddenMSE(layers=Embedding(), teacher_width=teacher_width)),
    )


def distilbert(weight: float = 1.0) -> tuple[Term, ...]:
    """The cosine of the last hidden vectors, the third part of the triple loss. The published run has
    `temperature=2.0, match=5.0, cross_entropy=2.0`, and begins with alternate layers of the teacher
    (`start.FromLayers`). Sanh et al. 2019, arXiv:1910.01108."""
    return (Term(loss=HiddenCosine(layers=Last()), weight=weight),)


def mobilebert(each: int) -> tuple[Term, ...]:
    """Hidden vectors and attention of one layer after another, each for `each` updates; the models have equally many
    layers, of the same width and heads. After the last layer, the paper goes on with the objective `Distill(match=0.5,
    cross_entropy=0.5)`, here in a run of its own that begins with this one. Sun et al. 2020, arXiv:2004.02984."""
    weight: Weight = Progressive(each=each)
    return (
        Term(loss=HiddenMSE(layers=OneToOne()), weight=weight),
        Term(loss=AttentionKL(layers=OneToOne()), weight=weight),
    )


def minilm() -> tuple[Term, ...]:
    """Attention and value relation of the last layer, nothing else (`match=0.0, cross_entropy=0.0`). The models have
    the same number of heads, of any width. Wang et al. 2020, arXiv:2002.10957."""
    return (
        Term(loss=AttentionKL(layers=Last())),
        Term(loss=Relations(queries=0.0, keys=0.0, layers=Last())),
    )


def minilm2(heads: int, teacher_layer: int | None = None, student_layer: int | None = None) -> tuple[Term, ...]:
    """Relations between queries, keys and values of one layer, nothing else (`match=0.0, cross_entropy=0.0`). The paper
    uses 48 relation heads for BERT base (64 for large models), and for the latter a layer below the last as the teacher
    (21 of 24). Wang et al. 2021, arXiv:2012.15828.

    Args:
        heads: relation heads.
        teacher_layer, student_layer: from 1; None: the last ones. Give both or neither.
    """
    if teacher_layer is None or student_layer is None:
        return (Term(loss=Relations(heads=heads, layers=Last())),)
    return (Term(loss=Relations(heads=heads, layers=Explicit(to=((student_layer, teacher_layer),)))),)
