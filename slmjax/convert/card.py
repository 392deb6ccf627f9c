"""The model card: README.md of an exported folder. What is not known is left out, never guessed."""

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
    """That were kept"""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """One token store of the mixture that was trained on."""

    name: str
    tokens: int
    """In its training split"""
    share: float
    """Of the sequences"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure of an evaluation."""

    metric: str
    value: float
    standard_error: float | None = None
    data: str | None = None
    """What it was measured on"""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Electricity that training took."""

    kwh: float
    method: str
    """nvml, rapl or tdp-estimate"""
    co2e_kg: float | None = None
    grid: str | None = None
    """Grid factor with source and year, from which CO2e follows"""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model. None and empty tuples are left out of the card."""

    name: str
    family: str | None = None
    """Human name of the architecture"""
    parameters: int | None = None
    context: int | None = None
    """Tokens"""
    vocab: int | None = None
    dtype: str | None = None
    labels: tuple[str, ...] = ()
    """Of a classifier"""
    folded: tuple[str, ...] = ()
    """Scalars of the trained model that were multiplied into the weights"""
    licence: str | None = None
    """Of the weights, an identifier of the Hugging Face hub (`apache-2.0`)"""
    language: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    mixture: tuple[Mixed, ...] = ()
    tokens: int | None = None
    """Trained on, repetitions counted"""
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
    """Whether the code differed from that commit"""
    parent: str | None = None
    """Where the weights came from, if they were imported"""
    version: str | None = None
    """Of slmjax"""
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
