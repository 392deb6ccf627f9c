"""Parametrisations: how initial values, multipliers and learning rates of a model follow from those of a smaller base
model, so that what was tuned on the base is right for the model too.

    base = llama(layers=2, width=64, ...)
    model = CompleteP(base=base).model(llama(layers=24, width=1024, ...))

`model` has the multipliers that its width and depth demand, and the parametrisation as its `initial`, from which
training takes initial values, learning rates, weight decays and Adam epsilons. At the sizes of the base all of them are
those of the base: the run is the same bit for bit.

With m = size / size of the base (N width, L depth, `in` the inputs of a matrix, which for `down` are hidden channels):

| | SP | MuP | CompleteP |
|---|---|---|---|
| initial variance of matrices | 1 | 1/m_in | 1/m_in |
| learning rate of matrices (AdamW, Lion) | 1 | 1/m_in | m_L^(alpha-1)/m_in |
| learning rate of gains and biases in layers | 1 | 1 | m_L^(alpha-1) |
| weight decay of matrices | 1 | m_in | m_in |
| branches | 1 | 1 | 1/m_L^alpha |
| logits | 1 | 1/m_N | 1/m_N |
| scores | 1/sqrt(d) | sqrt(d_base)/d | sqrt(d_base)/d |
| Adam's epsilon in layers | 1 | 1/m_N | 1/(m_N m_L^alpha) |

Tables, the final norm and the unembedding are as in the base. A matrix whose step Muon orthogonalises has the learning
rate by which the spectral norm of its step grows like sqrt(outputs/inputs), as that of its values does; the optimizer
takes heads together as one matrix for each layer, and so does this rule.

References:
    Yang et al. 2022 (muP), arXiv:2203.03466; Yang, Simon and Bernstein 2023, arXiv:2310.17813 (spectral norms); Dey et
    al. 2025 (CompleteP), arXiv:2505.01618, table 1; Mlodozeniec et al. 2025 (Complete(d)P), arXiv:2512.22382; Qiu et
    al. 2025 (Muon), arXiv:2512.05620
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slmjax import tree
from slmjax.errors import UserError, is_number
from slmjax.models import multipliers
from slmjax.models.assembly import Assembly
from slmjax.models.decoder import Decoder
from slmjax.models.measures import UNEMBEDDING, Measure, measures, roles, same_role
from slmjax.models.multipliers import decoder, table_width
from slmjax.nn.initial import Initial, Normal, Role
from slmjax.optim.matrices import StepNorm, by_path
from slmjax.serialise import differences, to_json
from slmjax.types import Factors


@dataclass(frozen=True, kw_only=True)
class Parametrisation(abc.ABC):
    """A base model, and how larger ones follow from it."""

    base: Assembly
    """The model whose learning rate and weight decay were tuned, with its own initial values and multipliers"""

    def __post_init__(self) -> None:
        multipliers.check(decoder("parametrisation.base", self.base))
        if isinstance(self.base.initial, Parametrisation):
            raise UserError(
                f"parametrisation.base is itself scaled by {type(self.base.initial).__name__}; give that one's base"
            )

    @property
    def decoder(self) -> Decoder:
        """The base"""
        return decoder("parametrisation.base", self.base)

    @abc.abstractmethod
    def model(self, model: Assembly) -> Decoder:
        """The model with multipliers and initial values that follow from the base. Its own are not read.

        Raises:
            UserError: the parametrisation is not defined for such a model.
        """


@dataclass(frozen=True, kw_only=True)
class SP(Parametrisation):
    """The standard parametrisation: the base's multipliers and initial values at every size, and one learning rate. The
    control that the others are compared with."""

    def model(self, model: Assembly) -> Decoder:
        plain = multipliers.multiplied(decoder("model", model), self.decoder, branches=1.0, logits=1.0, scores=-0.5)
        return replace(plain, initial=self.base.initial)


@dataclass(frozen=True, kw_only=True)
class MuP(Parametrisation, Initial):
    """Maximal update parametrisation: transfer over widths. Yang et al. 2022, arXiv:2203.03466, table 8, with the
    epsilon of Dey et al. 2025, arXiv:2505.01618, table 1."""

    decay_power: Any = 1.0
    """The weight decay of a matrix grows as the inverse of its learning rate to this power: 1 keeps what a step decays;
    0.5 is lambda ~ sqrt(width), which keeps top singular values over long runs (Fan et al. 2025, arXiv:2510.15262)"""

    def model(self, model: Assembly) -> Decoder:
        model = decoder("model", model)
        branches, logits = self.depth(model) ** -self.power, table_width(self.decoder) / table_width(model)
        scaled = multipliers.multiplied(model, self.decoder, branches=branches, logits=logits, scores=-1.0)
        return replace(scaled, initial=self)

    def depth(self, model: Decoder) -> float:
        """m_L; here the depth is not scaled."""
        return 1.0

    @property
    def power(self) -> float:
        """alpha, the power of m_L"""
        return 1.0

    @property
    def stated(self) -> float:
        return self.base.initial.stated

    def check(self) -> None:
        self.base.initial.check()

    def fits(self, model: Any) -> None:
        wanted, given = (to_json(replace(each, initial=Normal())) for each in (self.model(model), model))
        wrong = differences(given, wanted, "model")
        if wrong:
            field, _, change = wrong[0].partition(": ")
            given_as, _, demanded = change.partition(" -> ")
            name = type(self).__name__
            raise UserError(
                f"{field} is {given_as}, but {name} demands {demanded} of a model of this size; make it with "
                f"{name}(base=...).model(...), or set this field too; a model cut out of another needs another initial"
            )

    def __call__(self, role: Role) -> tuple[Any, str]:
        same = self.as_in_base(role)
        initializer, words = self.base.initial(same)
        factor = self.initial_factor(role, same)
        if is_number(factor) and factor == 1:
            return initializer, words
        return lambda key, shape, dtype: factor * initializer(key, shape, dtype), f"{_short(factor)} * {words}"

    def as_in_base(self, role: Role) -> Role:
        """The role in the base; how many branches the residual stream sums is that of the model."""
        return same_role(role, roles(self.decoder))._replace(branches=role.branches)

    def initial_factor(self, role: Role, same: Role) -> Any:
        """Factor on the standard deviation."""
        if role.fan_in is None or same.fan_in is None or role.path == UNEMBEDDING:
            return 1.0
        ratio = role.fan_in / same.fan_in
        # A head has no multiplier, so the 1/m_N of the logits is in its values.
        return 1 / ratio if role.path.startswith("head/") else ratio**-0.5

    def factors(self, model: Any, step_norms: Callable[[Any], Mapping[str, StepNorm]]) -> Mapping[str, Factors]:
        norms, measured = step_norms(model.axes()), measures(model, self.decoder)
        found = {path: self.factor(path, measure, model, norms.get(path)) for path, measure in measured.items()}
        return {path: f for path, f in found.items() if not all(is_number(x) and x == 1 for x in f)}

    def factor(self, path: str, measure: Measure, model: Decoder, norm: StepNorm | None) -> Factors:
        """How one parameter trains beside the same parameter of the base."""
        m_l, m_n = self.depth(model), model.width / self.base.width
        deeper = m_l ** (self.power - 1) if measure.inside else 1.0
        eps = m_n**-1 * m_l**-self.power if measure.inside else self.outer_eps(m_n)
        if measure.inputs is None or measure.outputs is None or norm is None or path == UNEMBEDDING:
            return Factors(rate=deeper, eps=eps * self.shared_eps(measure.shared))
        # The spectral norm of a step is to grow like sqrt(outputs / inputs).
        of_model, of_base = (
            math.sqrt(outputs / inputs) / norm(inputs, outputs)
            for inputs, outputs in zip(measure.inputs, measure.outputs, strict=True)
        )
        wider = of_model / of_base
        return Factors(rate=wider * deeper, weight_decay=wider**-self.decay_power, eps=eps)

    def outer_eps(self, m_n: float) -> float:
        """Factor on epsilon outside the layers."""
        return 1.0

    def shared_eps(self, heads: float) -> float:
        """Factor on epsilon of a gain that all heads of a layer share, of which there are `heads` times as many."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class CompleteP(MuP):
    """Transfer over widths and depths: every branch is multiplied by 1 / m_L^alpha. Dey et al. 2025, arXiv:2505.01618.

    For models whose norms stand before (or inside) branches: a norm after the addition would undo the multiplier.
    """

    alpha: float = 1.0
    """From 0.5 to 1; with 1 every layer learns features at any depth, and learning rates do not depend on it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 <= self.alpha <= 1:
            raise UserError(f"parametrisation.alpha is {self.alpha}; expected 0.5 to 1")

    @property
    def power(self) -> float:
        return self.alpha

    def depth(self, model: Decoder) -> float:
        return model.layers / self.base.layers

    def model(self, model: Assembly) -> Decoder:
        scaled = super().model(model)
        after = [type(block).__name__ for block in scaled.blocks() if block.norms_stream]
        if after and self.depth(scaled) != 1:
            raise UserError(
                f"model.pattern: {after[0]} norms the residual stream itself after each addition, and "
                f"{type(self).__name__} is not defined for that at another depth than the base's ({self.base.layers} "
                "layers); use MuP, or a base of the same depth"
            )
        return scaled

    def as_in_base(self, role: Role) -> Role:
        """The role in the base, whose initial values are to be those of the model: the multiplier takes the place of
        smaller values in deeper models."""
        return same_role(role, roles(self.decoder))


@dataclass(frozen=True, kw_only=True)
class Module:
    """Numbers of the parameters whose path a pattern matches, as factors on those of the base."""

    pattern: str
    """Of paths: `layers*/attn/q`, `embed/*`"""
    initial: Any = 1.0
    """On the standard deviation of initial values"""
    rate: Any = 1.0
    """On the learning rate"""
    weight_decay: Any = 1.0
    eps: Any = 1.0


@dataclass(frozen=True, kw_only=True)
class CompletedP(CompleteP):
    """CompleteP with numbers of its own for each kind of parameter, tuned on the base, and Adam's epsilon corrected
    outside the layers. Mlodozeniec et al. 2025, arXiv:2512.22382.

    Its rules for other batch sizes and durations are `optim.transfer.Steps`.

    Epsilon follows the size of a gradient at width N: 1/m_N for whatever lies before the logits' multiplier or under
    it, that is, for every parameter; a gain that all heads share sums the gradients of as many heads.
    """

    modules: tuple[Module, ...] = ()
    """If several match, all of their factors apply"""

    def factors(self, model: Any, step_norms: Callable[[Any], Mapping[str, StepNorm]]) -> Mapping[str, Factors]:
        paths = by_path(model.axes())
        for module in self.modules:
            if not any(tree.matches(path, (module.pattern,)) for path in paths):
                raise UserError(
                    f"parametrisation.modules: {module.pattern!r} matches no parameter; there are: {', '.join(paths)}"
                )
        return super().factors(model, step_norms)

    def factor(self, path: str, measure: Measure, model: Decoder, norm: StepNorm | None) -> Factors:
        rate, decay, eps = super().factor(path, measure, model, norm)
        for module in self.of(path):
            rate, decay, eps = rate * module.rate, decay * module.weight_decay, eps * module.eps
        return Factors(rate, decay, eps)

    def initial_factor(self, role: Role, same: Role) -> Any:
        factor = super().initial_factor(role, same)
        for module in self.of(role.path):
            factor = factor * module.initial
        return factor

    def of(self, path: str) -> list[Module]:
        return [module for module in self.modules if tree.matches(path, (module.pattern,))]

    def outer_eps(self, m_n: float) -> float:
        return 1 / m_n

    def shared_eps(self, heads: float) -> float:
        return heads


def _short(factor: Any) -> str:
    return f"{factor:.4g}" if is_number(factor) else "a factor"
