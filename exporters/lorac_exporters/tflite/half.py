"""Weights stored as float16: half the size, computed in float32 as before."""

from __future__ import annotations

import dataclasses

import numpy as np

from lorac_exporters.graph_tools import unique_name
from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.quantize_rules import WEIGHTED


@dataclasses.dataclass(frozen=True)
class HalfReport:
    """The tensors stored as float16, and how many numbers of each were too large for it, where there are any."""

    tensors: tuple[str, ...]
    saturated: dict[str, int]


def to_half(network: Network) -> HalfReport:
    """Store the weights of convolutions and linear layers as float16, in place; no inverse.

    Each becomes a constant of the same name and source with a DEQUANTIZE behind it, which runtimes do once, when they
    load the file. Numbers above 65504 become 65504. Biases stay float32: exact, and next to nothing in size.
    """
    names = {tensor.name for tensor in network.tensors()}
    half: dict[Tensor, Tensor] = {}
    saturated: dict[str, int] = {}
    operators: list[Operator] = []
    for tensor in _weights(network):
        stored, lost = _stored(tensor)
        name = unique_name(f"{tensor.name}_float32", names)
        names.add(name)
        half[tensor] = Tensor(name, tensor.shape)
        operators.append(Operator("DEQUANTIZE", [stored], [half[tensor]]))
        if lost:
            saturated[tensor.name] = lost
    for operator in network.operators:
        if operator.kind in WEIGHTED:
            operator.inputs = [t if t is None else half.get(t, t) for t in operator.inputs]
    network.operators = [*operators, *network.operators]
    return HalfReport(tuple(tensor.name for tensor in half), saturated)


def _weights(network: Network) -> list[Tensor]:
    """Float32 weights that nothing else reads, each once, in order."""
    found: dict[Tensor, None] = {}
    for operator in network.operators:
        if operator.kind in WEIGHTED:
            weight = operator.inputs[WEIGHTED[operator.kind].weight]
            if weight is not None and weight.data is not None and weight.dtype == "float32":
                found[weight] = None
    return [t for t in found if all(operator.kind in WEIGHTED for operator, _ in network.users(t))]


def _stored(tensor: Tensor) -> tuple[Tensor, int]:
    """The float16 twin of a constant, and how many of its numbers were cut off."""
    numbers = np.asarray(tensor.data, np.float32)
    limit = np.finfo(np.float16).max
    rounded = np.clip(numbers, -limit, limit).astype(np.float16)
    lost = int(np.count_nonzero(np.abs(numbers) >= 65520))  # nearer to the next float16, if there were one
    return dataclasses.replace(tensor, dtype="float16", data=rounded), lost
