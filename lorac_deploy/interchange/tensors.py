"""Files of tensors: safetensors, or PyTorch's own without any code in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorac_runtime.errors import AdapterError
from lorac_runtime.files import size_of

_NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put a network's tensors


def read_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file, by name, as float32 or float64 arrays.

    Raises AdapterError if it is missing, damaged, holds code, or something else than tensors.
    """
    try:
        size_of(path)
        found = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except FileNotFoundError as err:
        raise AdapterError(f"{path} not found") from err
    except pickle.UnpicklingError as err:
        raise AdapterError(f"{path} holds more than tensors, which is not opened: save its state_dict alone") from err
    except Exception as err:  # damaged archives end in errors of every kind
        raise AdapterError(f"{path} cannot be read ({type(err).__name__}: {err}); copy or save it again") from err
    return {name: _array(value) for name, value in found.items()}


def _safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


def _pickled(path: Path) -> Mapping[str, torch.Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    for name in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError("it holds no state_dict")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _array(value: torch.Tensor) -> npt.NDArray[Any]:
    kept = value if value.dtype in (torch.float32, torch.float64) else value.float()
    return np.asarray(kept.detach().cpu().numpy())
