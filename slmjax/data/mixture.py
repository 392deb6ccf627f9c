"""Which part the n-th sequence of a mixture comes from, and how many sequences each part has given before it.

Both are pure functions of n, in integers, so that any position can be resumed and no counter is kept. Part 0 gives
floor(n * w0) of the first n sequences, part 1 its share of the rest in the same way, and so on. After
any n, each part has given its share to within one sequence a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from slmjax.errors import DataError


def shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """For each part but the last, its weight as a fraction of what the parts before it leave.

    Raises:
        DataError: no weight, or one that is not positive.
    """
    if not weights or any(not w > 0 for w in weights):
        raise DataError(f"weights of a mixture are {list(weights)}; give at least one part, each with a weight above 0")
    exact = [Fraction(w).limit_denominator(10**6) for w in weights]
    if any(w == 0 for w in exact):
        raise DataError(f"weights of a mixture are {list(weights)}; the smallest must be above 1e-6")
    return tuple(w / sum(exact[i:]) for i, w in enumerate(exact[:-1]))


def drawn(parts: tuple[Fraction, ...], n: int) -> list[int]:
    """How many of the first n sequences each part gives; they sum to n."""
    counts = []
    for share in parts:
        counts.append(n * share.numerator // share.denominator)
        n -= counts[-1]
    return [*counts, n]


def locate(parts: tuple[Fraction, ...], n: int) -> tuple[int, int]:
    """Sequence n (from 0) -> (its part, how many sequences that part has given before)."""
    for part, share in enumerate(parts):
        before = n * share.numerator // share.denominator
        if (n + 1) * share.numerator // share.denominator > before:
            return part, before
        n -= before
    return len(parts), n
