"""The matmul ceiling that model-FLOPs utilisation is a fraction of: published for accelerators, measured on a CPU."""

from __future__ import annotations

import time

PUBLISHED = {  # device kind (lower case, contained) -> dense bf16 FLOP/s of one device, from its maker's data sheet
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


def peak_flops(dtype: str, seconds: float = 0.3) -> tuple[float, str]:
    """FLOP/s of all devices together, and where the figure is from: `published` or `measured`."""
    import jax

    kind = jax.devices()[0].device_kind.lower()
    for name, flops in PUBLISHED.items():
        if name in kind:
            return flops * jax.device_count(), "published"
    return measured_flops(dtype, seconds), "measured"


def measured_flops(dtype: str, seconds: float, size: int = 1024) -> float:
    """FLOP/s of the fastest square matrix product that fits into `seconds`. Simulated devices share the cores."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def probe_bf16(size: int = 512, repeats: int = 5) -> str | None:
    """A warning if the gradient of a bfloat16 product is no faster here than in float32, else None.

    Imports jax and compiles two small products: some tenths of a second.
    """
    import jax
    import jax.numpy as jnp

    from slmjax.nn.einsum_cpu import transpose

    def seconds(dtype) -> float:
        x, g = jnp.ones((4 * size, size), dtype), jnp.ones((4 * size, size), dtype)
        dot = jax.jit(lambda x, g: transpose(x) @ g).lower(x, g).compile()
        dot(x, g).block_until_ready()
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            dot(x, g).block_until_ready()
            found.append(time.perf_counter() - start)
        return min(found)

    ratio = seconds(jnp.float32) / seconds(jnp.bfloat16)
    if ratio > 1.2:
        return None
    return (
        f"bfloat16 weight gradients run at {ratio:.2f}x the speed of float32: no fast path in this CPU or jaxlib; "
        "try --runtime.dtype float32 (docs/performance.md)"
    )
