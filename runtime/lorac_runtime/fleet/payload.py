"""What travels between a device of a fleet and the server: the trained tensors of an artifact, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import AdapterError, ArtifactError, listed
from lorac_runtime.manifest import Manifest

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Given = Mapping[str, Array]

NUMBERS = ("float32", "float16")
PERSONAL = ("none", "head")


@dataclasses.dataclass(frozen=True)
class Payload:
    """The tensors that travel (name -> shape, in the artifact's order), those that stay on each device, and the type
    of number that they travel in, one of `NUMBERS`.

    A frozen ``lora_a`` is neither: every device has it in its artifact. Statistics of batch normalisations are frozen.
    """

    shapes: dict[str, tuple[int, ...]]
    personal: tuple[str, ...] = ()
    numbers: str = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of all values that travel in one direction."""
        values = sum(int(np.prod(shape)) for shape in self.shapes.values())
        return values * np.dtype(self.numbers).itemsize


def payload_of(manifest: Manifest, *, personal: str = "none", numbers: str = "float32") -> Payload:
    """What of an artifact travels. ``personal="head"`` keeps the last layer's tensors on each device.

    Raises ArtifactError if nothing is left to travel, if a personal head does not train in this artifact, or if
    statistics of batch normalisations move; ValueError for other words.
    """
    for word, known in ((personal, PERSONAL), (numbers, NUMBERS)):
        if word not in known:
            raise ValueError(f"{word!r} is not one of {', '.join(known)}")
    if manifest.bn_policy != "frozen":
        raise ArtifactError(
            f"this artifact has BN policy {manifest.bn_policy}: statistics of cameras that see different things have "
            "no useful mean. Export it with --bn frozen for a fleet"
        )
    kept = head_of(manifest) if personal == "head" else ()
    shapes = {t.name: t.shape for t in manifest.trainables if t.name not in kept}
    if not shapes:
        raise ArtifactError(
            f"nothing would travel: this artifact (method {manifest.method}) trains "
            + ("its head alone, which is to stay on the devices" if kept else "nothing")
        )
    return Payload(shapes, kept, numbers)


def head_of(manifest: Manifest) -> tuple[str, ...]:
    """Names of the trained tensors of the last layer. Raises ArtifactError if it does not train in full."""
    weights = [t for t in manifest.trainables if t.role == "weight" and t.shape[0] == manifest.output.classes]
    if not weights or not weights[-1].name.endswith(".weight"):
        raise ArtifactError(
            f"no personal head: the last layer does not train in this artifact (method {manifest.method}); leave "
            "--personal head out, or export with a method that trains it"
        )
    layer = weights[-1].name.removesuffix("weight")
    return tuple(t.name for t in manifest.trainables if t.name in (f"{layer}weight", f"{layer}bias"))


def to_wire(payload: Payload, state: Given) -> Tensors:
    """The tensors of a training state that travel, in the numbers that they travel in.

    >>> to_wire(Payload({"x": (1,)}, numbers="float16"), {"x": np.ones(1, np.float32), "y": np.ones(2, np.float32)})
    {'x': array([1.], dtype=float16)}

    Raises AdapterError naming every tensor with values that are not finite, or too large for float16.
    """
    with np.errstate(over="ignore"):
        found = {name: np.asarray(state[name], payload.numbers) for name in payload.shapes}
    bad = [
        f"{name}: its largest value is {_largest(state[name])}" for name in found if not np.isfinite(found[name]).all()
    ]
    if bad:
        raise AdapterError(listed(f"not sent, because {payload.numbers} cannot hold it:", bad))
    return found


def from_wire(payload: Payload, tensors: Given) -> Tensors:
    """What came, as float32. Raises AdapterError listing everything that is wrong with it (`wire_problems`)."""
    problems = wire_problems(payload, tensors)
    if problems:
        raise AdapterError(listed("what came does not fit the artifact:", problems))
    return {name: np.asarray(tensors[name], np.float32) for name in payload.shapes}


def wire_problems(payload: Payload, tensors: Given) -> list[str]:
    """Every tensor that is missing, unexpected, of another shape or type, or not finite, one line each.

    >>> wire_problems(Payload({"x": (1,), "y": (2,)}), {"x": np.array([np.nan], np.float32), "z": np.zeros(1)})
    ['y is missing', 'z is unexpected', 'x has 1 values of 1 that are not finite']
    """
    problems = [f"{name} is missing" for name in payload.shapes if name not in tensors]
    problems += [f"{name} {_uninvited(payload, name)}" for name in tensors if name not in payload.shapes]
    for name, shape in payload.shapes.items():
        if name in tensors:
            problems += _array_problems(name, tensors[name], shape, payload.numbers)
    return problems


def _uninvited(payload: Payload, name: str) -> str:
    return "was to stay on the device" if name in payload.personal else "is unexpected"


def _array_problems(name: str, value: Array, shape: tuple[int, ...], numbers: str) -> list[str]:
    if value.shape != tuple(shape):
        return [f"{name} has shape {value.shape}, expected {tuple(shape)}"]
    if value.dtype != np.dtype(numbers):
        return [f"{name} is {value.dtype}, expected {numbers}"]
    bad = value.size - int(np.count_nonzero(np.isfinite(value)))
    return [f"{name} has {bad} values of {value.size} that are not finite"] if bad else []


def _largest(value: Array) -> str:
    return f"{np.max(np.abs(value)):.3g}" if np.isfinite(value).all() else "not finite"
