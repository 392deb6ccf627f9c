"""Peak FLOP/s, the denominator of model-FLOPs utilisation: published for accelerators, measured on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

PUBLISHED = {  # part of the device kind, lower case -> dense bf16 FLOP/s of one device, by its data sheet
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
    "l40s": 362e12,
    "l4": 121e12,
    "a10g": 70e12,
    "v100": 125e12,
    "tpu v6": 918e12,
    "tpu v5p": 459e12,
    "tpu v5": 197e12,
    "tpu v4": 275e12,
}


SHAPES = ((1024, 1024, 1024), (1024, 256, 1024), (1024, 704, 256))
"""(rows, inner, columns) of the products whose speed is measured"""


def peak_flops(dtype: str, seconds: float = 0.3, einsum: Callable | None = None) -> tuple[float, str]:
    """FLOP/s of all devices together, and where the figure is from: `published` or `measured`. `einsum`: as
    `measured_flops`."""
    import jax

    kind = jax.devices()[0].device_kind.lower()
    for name, flops in PUBLISHED.items():
        if name in kind:
            return flops * jax.device_count(), "published"
    return measured_flops(dtype, seconds, einsum), "measured"


def measured_flops(dtype: str, seconds: float, einsum: Callable | None = None) -> float:
    """FLOP/s of the fastest matrix product that fits into `seconds`. Simulated devices share the cores.

    Products are square or have a layer's shapes, and are also measured in float32: where a processor has no
    instructions for bfloat16, XLA converts it to float32, and the step's own products would be faster than a ceiling of
    bfloat16 products alone.

    Args:
        einsum: the kernel of the run's own products (`Compute.einsum`), which may be faster than XLA's: those of a
            layer, forward and backward, are measured too.
    """
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    products = []
    for kind in dict.fromkeys((dtype, "float32")):
        for rows, inner, columns in SHAPES:
            a, b = jnp.ones((rows, inner), kind), jnp.ones((inner, columns), kind)
            product(a, b).block_until_ready()
            products.append((product, (a, b), 2 * rows * inner * columns))
    if einsum is not None:
        from slmjax.runs import probe

        layer, args = probe.layer_products(einsum, dtype)
        compiled = jax.jit(layer).lower(*args).compile()
        jax.block_until_ready(compiled(*args))
        products.append((compiled, args, probe.LAYER_FLOPS))
    best, end = 0.0, time.monotonic() + seconds
    while best == 0 or time.monotonic() < end:
        for compiled, args, flops in products:
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            best = max(best, flops / (time.perf_counter() - start))
    return best
