"""Set before jax is imported: 8 simulated devices, and a compilation cache that later runs reuse.

Type annotations of slmjax (jaxtyping shapes included) are checked by beartype while the tests run.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["SLMJAX_XLA_FLAGS"] = "off"  # they would keep the compilation cache from storing anything
os.environ["SLMJAX_CPU_PROBE"] = "off"  # no test depends on how fast this machine is
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax-tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("slmjax", "typecheck.typecheck")

from reference.client import reference, reference4  # noqa: E402, F401
from running import tiny, tiny_run  # noqa: E402, F401
