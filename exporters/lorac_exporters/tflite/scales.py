"""Which operators run in int8, and with which scale and zero point each activation is stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from lorac_exporters.tflite.network import Network, Operator, Quantization, Tensor
from lorac_exporters.tflite.quantize_rules import (
    FIXED,
    HUGE,
    LIGHT,
    SAME_SCALE,
    activations,
    has_int8_kernel,
    parameters,
)
from lorac_runtime.errors import ConversionError, listed

Ranges = Mapping[str, tuple[float, float]]


@dataclasses.dataclass
class Plan:
    """What is stored in int8: the operators, the scale of each of their activations, and where scales change.

    ``rescaled`` holds (operator, tensor): an input that has to change its scale before that operator reads it, and
    the scale that it must have then.
    """

    operators: list[Operator]
    scales: dict[Tensor, Quantization]
    rescaled: dict[tuple[Operator, Tensor], Quantization]


def plan(network: Network, ranges: Ranges) -> Plan:
    """The plan for a float32 network with these (min, max) of its activations, by name.

    Raises ConversionError if a range is missing or not finite.
    """
    chosen = int8_operators(network)
    groups = _Groups()
    for operator in chosen:
        groups.add(operator)
    groups.check(ranges)
    scales = groups.scales(ranges)
    return Plan(chosen, scales, {(op, t): scales[op.outputs[0]] for op, t in groups.apart})


def int8_operators(network: Network) -> list[Operator]:
    """Operators that run in int8, in order. Cheap ones that only read what was computed in float32 do not."""
    chosen: list[Operator] = []
    in_float: set[Tensor] = set()
    for operator in network.operators:
        reads = activations(operator)
        light = operator.kind in LIGHT and all(tensor in in_float for tensor in reads)
        if has_int8_kernel(operator) and not light:
            chosen.append(operator)
        else:
            in_float |= set(operator.outputs)
    return chosen


class _Groups:
    """Activations that must have one scale, joined as operators are added in order (a disjoint-set forest)."""

    def __init__(self) -> None:
        self._parent: dict[Tensor, Tensor] = {}
        self._fixed: dict[Tensor, Quantization] = {}  # by root
        self._constants: dict[Tensor, list[float]] = {}  # by root: numbers that the range must hold too
        self._derived: set[Tensor] = set()  # outputs of padding, whose range may hold minus infinity
        self.apart: list[tuple[Operator, Tensor]] = []

    def add(self, operator: Operator) -> None:
        """Take in the activations of an int8 operator."""
        reads = activations(operator)
        for tensor in (*reads, *operator.outputs):
            self._parent.setdefault(tensor, tensor)
        if operator.kind in SAME_SCALE:
            self._join(operator, reads)
        elif operator.kind in FIXED:
            scale, zero = FIXED[operator.kind]
            fixed = Quantization(np.array([scale], np.float32), np.array([zero], np.int64))
            self._fixed[self._root(operator.outputs[0])] = fixed

    def scales(self, ranges: Ranges) -> dict[Tensor, Quantization]:
        """Scale and zero point of every activation: those of its group."""
        limits: dict[Tensor, list[float]] = {root: list(numbers) for root, numbers in self._constants.items()}
        for tensor in self._parent:
            if tensor not in self._derived:
                limits.setdefault(self._root(tensor), []).extend(ranges[tensor.name])
        found = {root: parameters(min(numbers), max(numbers)) for root, numbers in limits.items()} | self._fixed
        return {tensor: found[self._root(tensor)] for tensor in self._parent}

    def check(self, ranges: Ranges) -> None:
        """Raises ConversionError if a range that is needed is missing or not finite."""
        problems = []
        for tensor in self._parent:
            if tensor.name not in ranges:
                problems.append(f"{tensor.name!r} has no range: calibrate the network that is being quantized")
            elif tensor not in self._derived and not all(math.isfinite(limit) for limit in ranges[tensor.name]):
                problems.append(f"{tensor.name!r} ranges over {ranges[tensor.name]}: not finite")
        if problems:
            raise ConversionError(listed("activations cannot be quantized:", problems))

    def _join(self, operator: Operator, reads: list[Tensor]) -> None:
        """One scale for inputs and outputs; an input whose scale is fixed changes it before it joins others."""
        alone = len({self._root(t) for t in reads}) == 1
        joined = [*operator.outputs]
        for tensor in dict.fromkeys(reads):
            if alone or self._root(tensor) not in self._fixed:
                joined.append(tensor)
            else:
                self.apart.append((operator, tensor))
                low, high = _span(self._fixed[self._root(tensor)])
                self._constants.setdefault(self._root(operator.outputs[0]), []).extend((low, high))
        for tensor in joined[1:]:
            self._merge(tensor, joined[0])
        self._take_constants(operator)

    def _take_constants(self, operator: Operator) -> None:
        numbers = [t.data for t in operator.inputs if t is not None and t.dtype == "float32" and t.data is not None]
        kept = [float(v) for data in numbers for v in (np.min(data), np.max(data)) if abs(v) < HUGE]
        self._constants.setdefault(self._root(operator.outputs[0]), []).extend(kept)
        if operator.kind == "PADV2":
            self._derived |= set(operator.outputs)

    def _merge(self, one: Tensor, other: Tensor) -> None:
        kept, gone = self._root(one), self._root(other)
        if kept is gone:
            return
        self._parent[gone] = kept
        self._constants.setdefault(kept, []).extend(self._constants.pop(gone, []))
        if gone in self._fixed:
            self._fixed[kept] = self._fixed.pop(gone)

    def _root(self, tensor: Tensor) -> Tensor:
        root = tensor
        while self._parent[root] is not root:
            root = self._parent[root]
        self._parent[tensor] = root  # the next search is shorter
        return root


def _span(fixed: Quantization) -> tuple[float, float]:
    """The smallest and the largest number that activations with this scale can hold."""
    scale, zero = float(fixed.scale[0]), int(fixed.zero_point[0])
    return scale * (-128 - zero), scale * (127 - zero)
