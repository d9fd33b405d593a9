"""Public names: every promised one is there, loads to the same object each time, and no module hides behind it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

PACKAGES = ("lorac_deploy", "lorac_exporters.tflite", "lorac_runtime")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_an_object_even_after_its_module_was_loaded(package: str) -> None:
    module = importlib.import_module(package)
    assert 1 <= len(module.__all__) <= 15
    for name in module.__all__:
        first, second = getattr(module, name), getattr(module, name)
        assert first is second
        assert not isinstance(first, ModuleType), f"{package}.{name} is hidden by a module of that name"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import lorac_deploy

    with pytest.raises(AttributeError, match="no attribute 'undone'"):
        _ = lorac_deploy.undone


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, lorac_deploy.cli, lorac_deploy.commands.verify; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
