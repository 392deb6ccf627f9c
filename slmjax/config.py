"""Experiment: what is computed. Runtime: where and how. Both are frozen dataclasses, written to a run's config.json."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from slmjax.data.spec import Data
from slmjax.data.stream import ReadProcesses, ReadThreads
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.nn.compute import Compute
from slmjax.nn.numerics import Numerics
from slmjax.objectives import NextToken, ObjectiveSpec
from slmjax.optim.recipes import AdamW, OptimizerSpec
from slmjax.optim.schedules import Schedule
from slmjax.serialise import to_json
from slmjax.start import FromScratch, Start
from slmjax.traced import TRACED
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.guard import Guard, Skip
from slmjax.train.processes import Distributed, Local
from slmjax.train.sharding import Layout, Mesh
from slmjax.views import Identity, View

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The validation loss while training, on the same batches each time."""

    every: int = 250
    """Steps between evaluations; the last step is always evaluated; 0 evaluates nothing"""
    batches: int = 16
    """Batches an evaluation"""

    def __post_init__(self) -> None:
        _at_least("evaluation", self, every=0, batches=1)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Text written by the model while it trains."""

    every: int = 0
    """Steps between samples; 0 writes none"""
    prompts: tuple[str, ...] = ("The",)
    tokens: int = 40
    """New tokens a prompt"""
    temperature: float = 0.8

    def __post_init__(self) -> None:
        _at_least("runtime.samples", self, every=0, tokens=1, temperature=0)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides the results of a run. Its fingerprint is the run's identity."""

    name: str
    """Names the run and the model card; not part of the fingerprint"""
    model: Assembly = field(metadata=TRACED)
    data: Data
    schedule: Schedule = field(metadata=TRACED)
    steps: int
    """Optimizer updates"""
    objective: ObjectiveSpec = field(default_factory=NextToken)
    optimizer: OptimizerSpec = field(default_factory=AdamW, metadata=TRACED)
    start: Start = field(default_factory=FromScratch)
    """The parameters that training begins with: drawn from `seed`, or those of another model"""
    view: View = field(default_factory=Identity)
    numerics: Numerics = field(default_factory=Numerics)
    """How products with parameters and the key-value cache are rounded; default: to the compute dtype"""
    guard: Guard = field(default_factory=Skip)
    """What happens after a step with NaN or a loss spike"""
    evaluation: Evaluation = field(default_factory=Evaluation)
    accumulate: int = 1
    """Micro-batches a step, at least: divides the memory of activations, changes no gradient. `Compute.micro_size`
    makes more of them on platforms where that is faster"""
    seed: int = 0
    """Seed of the initial parameters and of the randomness of the steps; `data.seed` orders the data"""

    def __post_init__(self) -> None:
        _at_least("", self, steps=1, accumulate=1)
        if self.data.length > self.model.context:
            raise UserError(
                f"data.length is {self.data.length}, longer than model.context {self.model.context}; "
                "shorten the sequences or raise model.context"
            )
        self.model.initial.fits(self.model)
        self.view.over(self.steps)
        self.objective.fits(self.model)
        self.objective.reads(self.model, self.data)
        if self.data.batch % self.accumulate:
            raise UserError(
                f"accumulate is {self.accumulate}, which does not divide data.batch {self.data.batch}; choose a divisor"
            )


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where a run is recorded in addition to its folder."""

    wandb: typing.Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline"""
    project: str = "slmjax"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    artifacts: bool = False
    """Also record checkpoints and exports in W&B, as references to where they lie"""
    pue: float = 1.0
    """Power usage effectiveness: kWh that the data centre uses for each kWh of its computers"""
    country: str = ""
    """Country whose electricity grid the emissions are estimated with: three letters, ISO 3166 (FRA); empty: the
    world's average"""

    def __post_init__(self) -> None:
        if self.pue < 1:
            raise UserError(f"runtime.tracking.pue is {self.pue}; expected at least 1 (computers alone)")
        if self.country and not (len(self.country) == 3 and self.country.isalpha()):
            raise UserError(f"runtime.tracking.country is {self.country!r}; expected three letters, such as FRA")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how an experiment runs. Changing it changes no result beyond rounding."""

    workdir: str = ""
    """The run folder; default: runs/ and the experiment's name"""
    data_dir: str = "runs/data"
    """Where prepared data are stored and reused: token stores of recipes, tokenised labelled text"""
    dtype: typing.Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of activations and matrix products; auto: that of `compute`"""
    compute: Compute | None = None
    """Precision and kernels; None: the fastest known ones for this platform"""
    distributed: Distributed = field(default_factory=Local)
    """Which processes train together: local (this one), cluster, or processes"""
    reader: ReadThreads | ReadProcesses = field(default_factory=ReadThreads)
    """Whether threads or processes (`--runtime.reader processes`) read batches ahead; the batches are the same"""
    mesh: Mesh = field(default_factory=Mesh)
    layout: Layout = field(default_factory=Layout)
    """Which arrays are split over which axes of the mesh"""
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    tracking: Tracking = field(default_factory=Tracking)
    samples: Samples = field(default_factory=Samples)
    log_every: int = 1
    """Steps between rows of metrics.jsonl"""
    profile: bool = False
    """Write a trace of a few steps to RUN/profile (for TensorBoard or Perfetto)"""
    overwrite_changed: bool = False
    """Continue a run although its experiment has changed; the differences are written to the run's ledger"""

    def __post_init__(self) -> None:
        _at_least("runtime", self, log_every=1)


def _at_least(where: str, value: Any, **least: float) -> None:
    for name, bound in least.items():
        if not getattr(value, name) >= bound:
            path = f"{where}.{name}" if where else name
            raise UserError(f"{path} is {getattr(value, name)}; expected at least {bound}")


def identity(
    experiment: Experiment, stores: Sequence[str], start: str | None = None, models: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Everything that decides the results, as JSON: the experiment without its name, with hashes of the contents of its
    data, of the model that it starts from and of those that its objective reads in place of their paths.

    Args:
        stores: fingerprints of the files that the data are read from (`Opened.stores`).
        start: `start.content_hash` of the parameters that it starts from; None if they are drawn from the seed.
        models: `start.content_hash` of each of `ObjectiveSpec.models`.
    """
    described = {k: v for k, v in to_json(experiment).items() if k != "name"}
    if start is not None:
        described["start"] = {**described["start"], "model": start}
    described["objective"] = experiment.objective.identity(models or {})
    return {**described, "data": experiment.data.identity(), "stores": list(stores)}


def override(value: T, path: str, new: Any) -> T:
    """A copy of nested frozen dataclasses and tuples with one field replaced.

    Example: `override(base(), "schedule.peak_lr", 3e-3)`, `override(base(), "model.pattern.0.mixer.heads", 8)`.

    Raises:
        UserError: no such field (with the nearest name), or a value of the wrong type.
    """
    return _override(value, path.split("."), new, path)


def _override(value: Any, keys: list[str], new: Any, path: str) -> Any:
    key, *rest = keys
    if isinstance(value, tuple):
        if not key.isdigit() or int(key) >= len(value):
            raise UserError(f"{path}: {key!r} is not an index below {len(value)}")
        i = int(key)
        inner = _override(value[i], rest, new, path) if rest else new
        return (*value[:i], inner, *value[i + 1 :])
    if not dataclasses.is_dataclass(value):
        raise UserError(f"{path}: there is no field {key!r}, for a {type(value).__name__} has no fields")
    names = [f.name for f in dataclasses.fields(value) if f.init]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its fields are: {', '.join(names)}"
        raise UserError(f"{path}: {type(value).__name__} has no field {key!r}; {hint}")
    if rest:
        inner = _override(getattr(value, key), rest, new, path)
    else:
        inner = _checked(new, typing.get_type_hints(type(value))[key], path)
    return dataclasses.replace(value, **{key: inner})  # type: ignore[type-var]


def _checked(new: Any, hint: Any, path: str) -> Any:
    from typeguard import TypeCheckError, check_type

    try:
        return check_type(new, hint)
    except TypeCheckError:
        expected = getattr(hint, "__name__", str(hint))
        raise UserError(f"{path}: {new!r} is a {type(new).__name__}; expected {expected}") from None
