"""Losses of the geometry of a document's hidden vectors: student and teacher may differ in width, without projection.

The published losses compare the vectors of a batch. Here they compare the tokens of one document, so that neither the
size of a micro-batch nor packing changes the value; each token has the value of its document. A document of too few
tokens has the value 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from slmjax.distill.features import Feature, Seen, document_sums, sizes, together


@dataclass(frozen=True, kw_only=True)
class CKA(Feature):
    """1 - |Y^T X|^2 / (|X^T X| |Y^T Y|) with Frobenius norms, where the rows of X [n, D] and Y [n, D'] are the hidden
    vectors of a document's n tokens, minus their mean. Kornblith et al. 2019, arXiv:1905.00414, section 3.

    In documents of fewer tokens than channels all models look alike: the value is small whatever they compute.
    """

    label: ClassVar[str] = "cka"

    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        same = together(segments)
        x, y = (_products(z.state(number), same) for z, number in zip((student, teacher), pair, strict=True))
        # |Y^T X|^2 = the sum over pairs of tokens of (X X^T) (Y Y^T), here that of each token's row
        xy, xx, yy = (document_sums(jnp.sum(a * b, axis=-1), same) for a, b in ((x, y), (x, x), (y, y)))
        live = (xx > 0) & (yy > 0)
        share = xy * jax.lax.rsqrt(jnp.where(live, xx, 1.0)) * jax.lax.rsqrt(jnp.where(live, yy, 1.0))
        return jnp.where(live & (sizes(same) > 1), 1.0 - share, 0.0)


@dataclass(frozen=True, kw_only=True)
class PairDistances(Feature):
    """The mean over ordered pairs of different tokens of a document of huber(|h_i - h_j| / mu - |h'_i - h'_j| / mu'),
    where mu and mu' are the means of these distances, and huber(x) = x^2 / 2 up to |x| = 1, then |x| - 1/2. Park et al.
    2019 (RKD-D), arXiv:1904.05068, section 3.2.1."""

    label: ClassVar[str] = "pair_distances"

    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        same = together(segments)
        others = same & ~jnp.eye(segments.shape[1], dtype=bool)
        n = sizes(same)
        pairs = jnp.maximum(n * (n - 1), 1)

        def relative(seen: Seen, number: int) -> jax.Array:
            distances = jnp.where(others, _distances(_products(seen.state(number), same)), 0.0)
            mean = document_sums(jnp.sum(distances, axis=-1), same) / pairs
            return distances / jnp.where(mean > 0, mean, 1.0)[..., None]

        ours, theirs = (relative(z, number) for z, number in zip((student, teacher), pair, strict=True))
        return document_sums(jnp.sum(huber(ours - theirs), axis=-1), same) / pairs


@dataclass(frozen=True, kw_only=True)
class PairAngles(Feature):
    """The mean over ordered triples of different tokens i, j, k of a document of huber(cos - cos'), where cos is the
    cosine of the angle at h_j between h_i - h_j and h_k - h_j (0 where two of the vectors coincide). Park et al. 2019
    (RKD-A), arXiv:1904.05068, section 3.2.2. Time grows with the cube of the length."""

    label: ClassVar[str] = "pair_angles"

    def __call__(
        self, student: Seen, teacher: Seen, pair: tuple[int, int], segments: jax.Array, own: Mapping[str, jax.Array]
    ) -> jax.Array:
        same = together(segments)
        length = segments.shape[1]
        others = same & ~jnp.eye(length, dtype=bool)
        products = [_products(z.state(number), same) for z, number in zip((student, teacher), pair, strict=True)]
        inverse = [_inverse(_distances(g)) for g in products]

        @jax.checkpoint
        def at(j: jax.Array) -> jax.Array:
            """The sum over i and k of the values of the triples whose vertex is token j, [B]."""

            def cosines(g: jax.Array, inverse: jax.Array) -> jax.Array:
                inner = g - g[:, :, j, None] - g[:, None, j, :] + g[:, j, j][:, None, None]
                return inner * inverse[:, :, j, None] * inverse[:, None, j, :]

            ours, theirs = (cosines(g, i) for g, i in zip(products, inverse, strict=True))
            counted = others & others[:, :, j, None] & others[:, None, j, :]
            return jnp.sum(jnp.where(counted, huber(ours - theirs), 0.0), axis=(1, 2))

        values = jnp.moveaxis(jax.lax.map(at, jnp.arange(length)), 0, 1)
        n = sizes(same)
        return document_sums(values, same) / jnp.maximum(n * (n - 1) * (n - 2), 1)


def huber(x: jax.Array) -> jax.Array:
    """x^2 / 2 up to |x| = 1, then |x| - 1/2."""
    size = jnp.abs(x)
    return jnp.where(size <= 1, 0.5 * jnp.square(x), size - 0.5)


def _products(x: jax.Array, same: jax.Array) -> jax.Array:
    """x [B, T, D] -> [B, T, T]: the products of two tokens' vectors, minus the mean of their document; 0 where they are
    of two documents."""
    weights = same.astype(x.dtype) / sizes(same)[..., None].astype(x.dtype)
    x = x - jnp.einsum("bts,bsd->btd", weights, x)
    return jnp.where(same, jnp.einsum("btd,bsd->bts", x, x), 0.0)


def _distances(g: jax.Array) -> jax.Array:
    """Products of vectors [B, T, T] -> their distances; exactly 0, without gradient, where they coincide up to
    rounding."""
    lengths = jnp.diagonal(g, axis1=1, axis2=2)
    total = lengths[:, :, None] + lengths[:, None, :]
    squares = total - 2 * g
    apart = squares > 16 * jnp.finfo(g.dtype).eps * total
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)


def _inverse(distances: jax.Array) -> jax.Array:
    apart = distances > 0
    return jnp.where(apart, 1.0 / jnp.where(apart, distances, 1.0), 0.0)
