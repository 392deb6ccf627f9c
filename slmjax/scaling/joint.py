"""Laws that are more than one sum of power laws: of students of a teacher, and of models rounded after training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slmjax.scaling.fit import Fitted
from slmjax.scaling.law import Additive, Columns, Factor, Term
from slmjax.scaling.quantity import PARAMETERS, TOKENS, Exponential, Parameter, Quantity


def post_training(law: Additive, parameters: Quantity = PARAMETERS, bits: str = "bits_post") -> Additive:
    """A law with what rounding after training adds to the loss: C_T D^gamma_D / N^gamma_N exp(-P / gamma_post) (Kumar
    et al. 2024, arXiv:2411.04330): the more a model has learned, the more rounding costs it. `inverse_gamma_post` is
    fitted.

    Args:
        parameters: N, or the effective N of a model trained in few bits.
        bits: the column with P; 64 for runs that were not rounded.
    """
    factors = (
        Factor(TOKENS, "gamma_D", grows=True),
        Factor(parameters, "gamma_N"),
        Factor(Exponential(bits), "inverse_gamma_post"),
    )
    return Additive((*law.terms, Term("C_T", factors)), law.floor, law.exponents)


@dataclass(frozen=True, eq=False)
class Distillation:
    """The loss of a student of a teacher (Busbridge et al. 2025, arXiv:2502.08606):

    L_S = L_T + L_T^-c0 (1 + (L_T / (d1 L~_S))^(1/f1))^(-c1 f1) (A' / N^alpha' + B' / D^beta')^gamma'

    L_T is the teacher's loss; L~_S is what the student would reach without a teacher. Nine parameters: their values are
    weakly determined, predictions less so.

    Attributes:
        supervised: the law of models of the same data without a teacher, which gives L~_S.
    """

    supervised: Fitted

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        def positive(name: str, *starts: float) -> Parameter:
            return Parameter(name, log=True, low=-9.0, high=16.0, starts=tuple(float(np.log(s)) for s in starts))

        return (
            positive("c0", 0.3, 2.0), positive("c1", 1.0, 4.0), positive("d1", 1.3, 0.8), positive("f1", 0.1, 0.5),
            positive("A'", 30.0, 3000.0), positive("B'", 30.0, 3000.0),
            Parameter("alpha'", low=1e-3, high=3.0, starts=(0.3, 0.6)),
            Parameter("beta'", low=1e-3, high=3.0, starts=(0.3, 0.6)),
            positive("gamma'", 1.0, 0.5),
        )  # fmt: skip

    @property
    def columns(self) -> tuple[str, ...]:
        return ("params", "tokens", "teacher_loss")

    def log_loss(self, theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        log_alone = np.log(self.supervised.predict(columns))
        log_teacher = np.log(columns["teacher_loss"])
        log_n, log_d = np.log(columns["params"]), np.log(columns["tokens"])

        def log_student(t: np.ndarray) -> np.ndarray:
            c0, c1, d1, f1, a, b, alpha, beta, gamma = (t[:, i, None] for i in range(9))
            c0, c1, f1, gamma = np.exp(c0), np.exp(c1), np.exp(f1), np.exp(gamma)
            apart = softplus((log_teacher - d1 - log_alone) / f1)
            limits = log_sum(a - alpha * log_n, b - beta * log_d)
            return log_sum(log_teacher + 0 * c0, -c0 * log_teacher - c1 * f1 * apart + gamma * limits)

        return complex_step(log_student, theta)

    def starts(self, columns: Columns) -> np.ndarray:
        """[64, 9]: of the combinations of two values of each parameter, an eighth, with each value in half of
        them."""
        every = np.stack(np.meshgrid(*(np.asarray(p.starts) for p in self.parameters), indexing="ij"), -1)
        rows = every.reshape(-1, every.shape[-1])
        bits = np.arange(len(rows))[:, None] >> np.arange(9) & 1
        # Three parities fixed: a fraction of a factorial design, balanced in each parameter.
        fixed = [bits[:, list(which)].sum(-1) % 2 == 0 for which in ((0, 1, 2, 3), (2, 3, 4, 5), (5, 6, 7, 8))]
        return rows[np.logical_and.reduce(fixed)]


def complex_step(f: Callable[[np.ndarray], np.ndarray], theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f [B, n] of theta [B, p], and its derivatives [B, n, p] exact to rounding: the imaginary part at a point that
    is a tiny imaginary step away (Squire & Trapp 1998). f is made of analytic functions."""
    step = 1e-30
    jacobian = []
    value = np.empty(0)
    for i in range(theta.shape[1]):
        moved = theta.astype(np.complex128)
        moved[:, i] += 1j * step
        out = f(moved)
        value = np.real(out)
        jacobian.append(np.imag(out) / step)
    return value, np.stack(jacobian, -1)


def log_sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ln(exp(x) + exp(y)) of complex numbers, without overflow."""
    top = np.maximum(np.real(x), np.real(y))
    return top + np.log(np.exp(x - top) + np.exp(y - top))


def softplus(x: np.ndarray) -> np.ndarray:
    """ln(1 + exp(x)) of complex numbers, without overflow."""
    return log_sum(x, np.zeros_like(x))
