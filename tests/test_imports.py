"""Every module can be imported, with warnings as errors: what an older or a newer library no longer has shows here."""

import importlib
import pkgutil

import pytest

import slmjax

pytestmark = pytest.mark.fast

MODULES = [found.name for found in pkgutil.walk_packages(slmjax.__path__, "slmjax.")]


def test_every_module_can_be_imported():
    assert len(MODULES) > 200
    for name in MODULES:
        if not name.endswith("__main__"):  # that one runs
            importlib.import_module(name)
