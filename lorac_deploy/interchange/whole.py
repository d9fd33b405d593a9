"""A fine-tuned network's own tensors, all or some of them: the change is what they differ by from the base."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorac_deploy.interchange.change import Change, Doubles, Tensors
from lorac_deploy.interchange.tensors import read_tensors


def read_whole(path: Path, base: Tensors) -> Change:
    """What a state dict changes. Raises AdapterError where it cannot be read."""
    deltas: dict[str, Doubles] = {}
    values: dict[str, Doubles] = {}
    for name, value in read_tensors(path).items():
        given = np.asarray(value, np.float64)
        if name in base and given.shape == base[name].shape and given.ndim > 1:
            difference = given - np.asarray(base[name], np.float64)
            if difference.any():
                deltas[name] = difference
        elif not (name in base and np.array_equal(given, base[name])):
            values[name] = given
    return Change(deltas, values)
