"""The model card: README.md of an exported folder. Unknown facts are left out, never guessed."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass

import jinja2


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part of the training data."""

    name: str
    licence: str | None = None
    url: str | None = None
    documents: int | None = None
    """Number of documents kept after cleaning and deduplication"""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """One token store of the mixture that was trained on."""

    name: str
    tokens: int
    """Tokens in its training split"""
    share: float
    """Fraction of the training sequences that came from it"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure of an evaluation."""

    metric: str
    value: float
    standard_error: float | None = None
    data: str | None = None
    """The data it was measured on"""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Electricity used by training."""

    kwh: float
    method: str
    """nvml, rapl or tdp-estimate"""
    co2e_kg: float | None = None
    grid: str | None = None
    """Carbon intensity of the grid that `co2e_kg` was computed with, its source and year"""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a model. Fields that are None or empty are left out of the card."""

    name: str
    family: str | None = None
    """Human name of the architecture"""
    parameters: int | None = None
    context: int | None = None
    """Tokens"""
    vocab: int | None = None
    dtype: str | None = None
    quantized: tuple[str, ...] = ()
    """How quantized weights are stored, such as "int4, a scale for each output channel: 5 matrices" """
    labels: tuple[str, ...] = ()
    """Label names of a classifier"""
    folded: tuple[str, ...] = ()
    """Scalars of the trained model that were multiplied into the weights, such as "embed_scale = 12.0" """
    licence: str | None = None
    """Licence of the weights, by its identifier on the Hugging Face hub (`apache-2.0`)"""
    language: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    mixture: tuple[Mixed, ...] = ()
    tokens: int | None = None
    """Tokens trained on, repetitions counted"""
    steps: int | None = None
    flops: float | None = None
    flops_convention: str | None = None
    energy: Energy | None = None
    hardware: str | None = None
    results: tuple[Result, ...] = ()
    fingerprint: str | None = None
    """SHA-256 of the experiment"""
    data_fingerprints: tuple[str, ...] = ()
    commit: str | None = None
    """git commit of the code"""
    changed: bool | None = None
    """Whether the code had uncommitted changes"""
    parent: str | None = None
    """Where the weights came from, if they were imported"""
    version: str | None = None
    """Version of slmjax"""
    tokenizer: bool = True
    """Whether tokenizer files lie beside the weights"""


def render(facts: Facts) -> str:
    """Facts -> Markdown with the YAML header that the Hugging Face hub reads."""
    template = importlib.resources.files("slmjax.convert").joinpath("card.md.j2").read_text("utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"count": _count, "cell": _cell, "yaml": _yaml}
    return environment.from_string(template).render(f=facts)


def _count(n: float) -> str:
    """1234567 -> 1,234,567; 1.2e15 -> 1.20e+15."""
    return f"{n:,}" if isinstance(n, int) and n < 10**13 else f"{n:.2e}"


def _cell(text: object) -> str:
    """Text that cannot break out of a table cell."""
    return "" if text is None else " ".join(str(text).replace("|", "\\|").split())


def _yaml(text: str) -> str:
    """A YAML string, quoted: `no` is a language, not a falsehood."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
