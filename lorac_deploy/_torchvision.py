"""The one place that imports torchvision: ``from lorac_deploy._torchvision import datasets, models``.

Beside a CPU build of PyTorch pip installs a CUDA build of torchvision, whose compiled operators cannot load. Its
Python part then fails at import ("operator torchvision::nms does not exist"), because it describes ``nms`` and
``qnms`` to PyTorch's compiler without asking whether they exist. Declaring the two operators first makes models,
data sets and transforms work; calling either still fails, as it should. Where the compiled operators do load,
nothing is declared.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPS: Any = torch.ops
_LIBRARIES: Any = torch.library  # neither is typed


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("torchvision is not installed: pip install 'torchvision>=0.28,<0.29'")
    folder = Path(spec.submodule_search_locations[0])
    try:
        for file in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
            _OPS.load_library(str(file))
            return True
    except OSError:
        return False
    return False


def _declare_missing_operators() -> object:
    if hasattr(_OPS.torchvision, "nms") or _compiled_operators_load():
        return None
    library = _LIBRARIES.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + _SCHEMA)
    return library


_DECLARED = _declare_missing_operators()  # kept: the declarations vanish with this object

from torchvision import datasets, models  # noqa: E402  the operators must be declared before

__all__ = ["datasets", "models"]
