"""Set before jax is imported: simulated devices, code that LLVM does not optimise, and a compilation cache.

8 devices, or as many as SLMJAX_TEST_DEVICES says. `make test` runs the files that need several (DEVICE_TESTS in the
Makefile) on 8 and the others on one, where a training run takes a third of the processor time.

Compiling takes most of the time of the tests, computing almost none of it. XLA's own passes (fusion, simplification)
stay on; only LLVM's are left out, which more than halves the time of a compilation.

Type annotations of slmjax (jaxtyping shapes included) are checked by beartype while the tests run.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={os.environ.get('SLMJAX_TEST_DEVICES', '8')} "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ["SLMJAX_XLA_FLAGS"] = "off"  # they would keep the compilation cache from storing anything
os.environ["SLMJAX_CPU_PROBE"] = "off"  # no test depends on how fast this machine is
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax-tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # tables are as wide as where no terminal says how wide

import hypothesis  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# How long an example takes tells how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile("slmjax", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("slmjax")

install_import_hook("slmjax", "typecheck.typecheck")

from reference.client import reference, reference4  # noqa: E402, F401
from running import tiny, tiny_run  # noqa: E402, F401
