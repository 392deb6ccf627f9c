"""Who may import whom (docs/architecture.md), how long a file may be, and that torch is never needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from slmjax.cli.main import VERBS

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "slmjax"

BASE = {
    "axes",
    "errors",
    "estimate",
    "types",
    "tree",
    "platform",
    "serialise",
    "user_code",
    "lock",
    "lease",
    "files",
    "signals",
    "traced",
    "__init__",
}
PARTS = {"nn", "losses", "compress", "optim", "data", "track", "views", "start"}
MAY_IMPORT = {  # layer -> what it may import besides itself
    "axes": set(),
    "errors": set(),
    "estimate": set(),
    "types": set(),
    "serialise": {"errors"},
    "platform": {"errors"},
    "user_code": {"errors"},
    "lock": {"errors"},
    "lease": {"errors", "lock"},
    "files": {"errors"},
    "signals": set(),
    "traced": {"errors", "serialise"},
    "tree": {"errors", "types"},
    "nn": BASE,
    "losses": BASE,
    "compress": BASE | {"nn", "optim", "views"},
    "optim": BASE,
    "data": BASE - {"tree"},
    "track": BASE - {"tree"},
    "views": BASE,
    "start": BASE,
    "scaling": {"errors"},
    "train": {"errors", "estimate", "types", "tree", "platform", "serialise", "lock", "lease", "signals"},
    "models": BASE | PARTS,
    "objectives": BASE | PARTS | {"models"},
    "distill": BASE | PARTS | {"models", "objectives", "evals"},
    "convert": BASE | PARTS | {"models"},
    "evals": BASE | PARTS | {"models"},
    "config": BASE | PARTS | {"models", "objectives", "convert", "evals", "train"},
    "experiment_file": BASE | {"config"},
    "runs": BASE
    | PARTS
    | {"models", "objectives", "distill", "convert", "evals", "train", "config", "experiment_file", "scaling"},
    "sweeps": BASE | {"models", "config", "experiment_file", "runs", "scaling", "track"},
    "launch": BASE - {"tree", "types"},
    "cli": BASE
    | PARTS
    | {"models", "objectives", "convert", "evals", "train", "config", "experiment_file", "runs", "scaling", "sweeps"}
    | {"launch"},
    "__init__": {"platform", "config", "runs"},  # for type checkers alone: what it gives is imported when it is used
}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def layer(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, top_level_only=False):
    """Modules that a file imports; `top_level_only` leaves out those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "slmjax":
                yield from (f"slmjax.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_lower_layers(path):
    here = layer(path)
    assert here in MAY_IMPORT, f"{path}: a new layer; say in tests/test_layering.py what it may import"
    for module in imports(path):
        if module.startswith("slmjax."):
            there = module.split(".")[1]
            allowed = MAY_IMPORT[here] | {here, "__version__"}
            assert there in allowed, f"{path.relative_to(ROOT)} imports {module}; {here} may import {sorted(allowed)}"


def test_nothing_imports_torch_or_transformers():
    for path in files():
        for module in imports(path):
            assert module.split(".")[0] not in ("torch", "transformers"), f"{path}: {module}"


def test_data_track_and_launch_do_not_import_jax():
    jax_users = ("jax", "flax", "optax", "orbax")
    for path in (path for name in ("data", "scaling", "launch") for path in (PACKAGE / name).rglob("*.py")):
        assert not [m for m in imports(path) if m.split(".")[0] in jax_users], path
    verbs = [PACKAGE / "cli" / f"{name}.py" for name in ("main", "args", *(module for module, _ in VERBS.values()))]
    for path in [*(PACKAGE / "track").rglob("*.py"), *verbs]:  # the verbs' files answer --help at once
        assert not [m for m in imports(path, top_level_only=True) if m.split(".")[0] in jax_users], path


def test_data_works_without_jax():
    """Imported for real: nothing that data/, track/ and scaling/ pull in pulls in jax."""
    code = """
import sys, importlib, pkgutil
import slmjax.data, slmjax.scaling, slmjax.track
for package in (slmjax.data, slmjax.scaling, slmjax.track):
    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{info.name}")
print("jax" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False", "something in slmjax.data, scaling or track imports jax"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400
