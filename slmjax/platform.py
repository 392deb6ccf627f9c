"""What has to be set before jax is imported: XLA flags, the compilation cache."""

from __future__ import annotations

import os


def configure() -> None:
    """Sets what this platform needs, unless the user has set it: call before jax is imported."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/slmjax/jax"))
