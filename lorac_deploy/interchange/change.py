"""What an adapter changes in a network: the common form of every format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from lorac_runtime.delta import Layout
from lorac_runtime.errors import AdapterError, listed

Doubles = npt.NDArray[np.float64]
Tensors = Mapping[str, npt.NDArray[np.generic]]


@dataclasses.dataclass(frozen=True)
class Change:
    """What is added to the base's weights (``deltas``) and what takes a tensor's place (``values``), by tensor name.

    ``rank`` and ``layout`` are those of this project's adapters that hold the deltas exactly, where the format tells;
    ``notes`` say what was found.
    """

    deltas: dict[str, Doubles]
    values: dict[str, Doubles] = dataclasses.field(default_factory=dict)
    rank: int | None = None
    layout: Layout = "spatial"
    notes: tuple[str, ...] = ()

    def applied(self, base: Tensors) -> dict[str, Doubles]:
        """The tensors that change, as they are afterwards."""
        added = {name: np.asarray(base[name], np.float64) + delta for name, delta in self.deltas.items()}
        return added | self.values


def checked(change: Change, base: Tensors, where: str) -> Change:
    """The change, if it belongs to a network with the tensors ``base``.

    Raises AdapterError listing every tensor that the network lacks, that has another shape or is not finite.
    """
    problems = _problems(change.deltas, base) + _problems(change.values, base)
    if problems:
        raise AdapterError(listed(f"{where} is not an adapter of this network:", problems))
    if not change.deltas and not change.values:
        raise AdapterError(f"{where} changes nothing: it holds no adapter")
    return change


def _problems(tensors: Mapping[str, Doubles], base: Tensors) -> list[str]:
    found = []
    for name, value in tensors.items():
        if name not in base:
            found.append(f"{name} is not in the network{_alike(name, base)}")
        elif value.shape != base[name].shape:
            found.append(f"{name} has shape {value.shape}, the network's has {base[name].shape}")
        elif not np.isfinite(value).all():
            found.append(f"{name} holds NaN or infinite values")
    return found


def _alike(name: str, base: Iterable[str]) -> str:
    """A hint where only a prefix differs."""
    longest = max(base, key=lambda other: _common_end(name, other), default="")
    ends = longest.endswith("." + name) or name.endswith("." + longest)
    return f" (there is {longest})" if ends else ""


def _common_end(one: str, other: str) -> int:
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)
