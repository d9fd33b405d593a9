"""A float32 network to static int8: weights per channel, activations with calibrated ranges, biases int32."""

from __future__ import annotations

import dataclasses

import numpy as np

from lorac_exporters.graph_tools import unique_name
from lorac_exporters.tflite.network import Array, DType, Network, Operator, Quantization, Tensor
from lorac_exporters.tflite.quantize_rules import HIGH, LOW, SAME_SCALE, WEIGHTED, Weighted, parameters
from lorac_exporters.tflite.scales import Plan, Ranges, plan
from lorac_runtime.errors import ConversionError
from lorac_runtime.quantization import bias_scales, quantized_bias, quantized_weight, weight_scales


@dataclasses.dataclass(frozen=True)
class Int8Report:
    """Which operators of an int8 file run in float32, as ``KIND 'output'``; and how many run in int8."""

    float_operators: tuple[str, ...]
    int8_operators: int


def quantize(network: Network, ranges: Ranges) -> Int8Report:
    """Turn a float32 network into int8, in place. Inputs and outputs stay float32: see `io_types`. No inverse.

    ``ranges``: smallest and largest number of each activation by name, from `calibrate.ranges`. Operators without an
    int8 kernel run in float32 between DEQUANTIZE and QUANTIZE.

    Raises ConversionError if a range is missing, a number is not finite, or nothing would run in int8.
    """
    chosen = plan(network, ranges)
    if not chosen.operators:
        raise ConversionError("no operator of this model has an int8 form; write it with weights fp16 or float32")
    before = list(network.operators)
    _Rewriting(network, chosen).run()
    in_int8 = set(chosen.operators)
    return Int8Report(tuple(_label(op) for op in before if op not in in_int8), len(in_int8))


class _Rewriting:
    """Rewrites the operators in order; ``stored`` and ``real`` map an activation to its int8 and float32 tensor."""

    def __init__(self, network: Network, chosen: Plan) -> None:
        self.network = network
        self.plan = chosen
        self.in_int8 = set(chosen.operators)
        self.operators: list[Operator] = []
        self.stored: dict[Tensor, Tensor] = {}
        self.real: dict[Tensor, Tensor] = {}
        self.names = {tensor.name for tensor in network.tensors()}
        self.uses = _constant_uses(network)

    def run(self) -> None:
        """Rewrite all operators."""
        for operator in self.network.operators:
            if operator in self.in_int8:
                self._in_int8(operator)
            else:
                self._in_float(operator)
        self.network.operators = self.operators

    def _in_int8(self, operator: Operator) -> None:
        rule = WEIGHTED.get(operator.kind)
        if rule is not None:
            self._weigh(operator, rule)
        scale = self.plan.scales[operator.outputs[0]]
        operator.inputs = [self._int8_input(operator, tensor, scale) for tensor in operator.inputs]
        self.operators.append(operator)
        operator.outputs = [self._int8_output(tensor) for tensor in operator.outputs]

    def _in_float(self, operator: Operator) -> None:
        operator.inputs = [t if t is None or t not in self.stored else self._as_float(t) for t in operator.inputs]
        self.operators.append(operator)

    def _int8_input(self, operator: Operator, tensor: Tensor | None, scale: Quantization) -> Tensor | None:
        if tensor is None or (tensor.dtype != "float32" and tensor not in self.stored):
            return tensor
        if tensor.data is not None:
            own = scale if operator.kind in SAME_SCALE else parameters(*_limits(tensor.data))
            return self._constant(tensor, own)
        stored = self._as_int8(tensor)
        rescaled = self.plan.rescaled.get((operator, tensor))
        return stored if rescaled is None else self._rescaled(stored, rescaled)

    def _int8_output(self, tensor: Tensor) -> Tensor:
        """The tensor itself, turned into int8; an output of the network gets a DEQUANTIZE and keeps its name."""
        scale = self.plan.scales[tensor]
        if tensor not in self.network.outputs:
            tensor.dtype, tensor.quantization = "int8", scale
            self.stored[tensor] = tensor
            return tensor
        twin = self._twin(tensor, "int8", scale)
        self.stored[tensor], self.real[tensor] = twin, tensor
        self.operators.append(Operator("DEQUANTIZE", [twin], [tensor]))
        return twin

    def _as_int8(self, tensor: Tensor) -> Tensor:
        if tensor not in self.stored:
            twin = self._twin(tensor, "int8", self.plan.scales[tensor])
            self.stored[tensor], self.real[tensor] = twin, tensor
            self.operators.append(Operator("QUANTIZE", [tensor], [twin]))
        return self.stored[tensor]

    def _as_float(self, tensor: Tensor) -> Tensor:
        if tensor not in self.real:
            twin = self._twin(tensor, "float32", None)
            self.real[tensor] = twin
            self.operators.append(Operator("DEQUANTIZE", [self.stored[tensor]], [twin]))
        return self.real[tensor]

    def _rescaled(self, stored: Tensor, scale: Quantization) -> Tensor:
        twin = self._twin(stored, "int8", scale)
        self.operators.append(Operator("QUANTIZE", [stored], [twin]))
        return twin

    def _twin(self, tensor: Tensor, dtype: DType, scale: Quantization | None) -> Tensor:
        return dataclasses.replace(tensor, name=self._fresh(f"{tensor.name}_{dtype}"), dtype=dtype, quantization=scale)

    def _constant(self, tensor: Tensor, scale: Quantization) -> Tensor:
        """An operand stored like an activation; its scale was chosen for these numbers, so it has no source."""
        data = np.rint(np.asarray(tensor.data, np.float64) / scale.scale[0]) + scale.zero_point[0]
        stored = np.clip(data, LOW, HIGH).astype(np.int8)
        name = self._fresh(f"{tensor.name}_int8")
        return Tensor(name, tensor.shape, "int8", data=stored, quantization=scale)

    def _weigh(self, operator: Operator, rule: Weighted) -> None:
        """Weight and bias by the formulas of `lorac_runtime.quantization`."""
        data, weight = operator.inputs[rule.data], operator.inputs[rule.weight]
        bias = operator.inputs[rule.bias] if rule.bias < len(operator.inputs) else None
        assert data is not None
        assert weight is not None
        input_scale = float(self.plan.scales[data].scale[0])
        scales = _weight_scales(weight, bias, rule.axis, input_scale)
        numbers = quantized_weight(_numbers(weight), scales, rule.axis)
        operator.inputs[rule.weight] = self._layer_constant(weight, numbers, scales, rule.axis or 0)
        if bias is not None:
            steps = bias_scales(scales, input_scale)
            stored, _ = quantized_bias(_numbers(bias), steps)  # the scales leave room for every bias
            operator.inputs[rule.bias] = self._layer_constant(bias, stored, steps, 0)

    def _layer_constant(self, tensor: Tensor, numbers: Array, scales: Array, axis: int) -> Tensor:
        """Keeps name and source; a constant of several operators gets a copy for each, which cannot be patched."""
        shared = self.uses[tensor] > 1
        name = self._fresh(f"{tensor.name}_int8") if shared else tensor.name
        zeros = Quantization(scales, np.zeros(scales.shape, np.int64), axis)
        source = None if shared else tensor.source
        dtype: DType = "int8" if numbers.dtype == np.int8 else "int32"
        return Tensor(name, tensor.shape, dtype, data=numbers, quantization=zeros, source=source)

    def _fresh(self, wish: str) -> str:
        name = unique_name(wish, self.names)
        self.names.add(name)
        return name


def _weight_scales(weight: Tensor, bias: Tensor | None, axis: int | None, input_scale: float) -> Array:
    try:
        return weight_scales(_numbers(weight), axis, None if bias is None else _numbers(bias), input_scale)
    except ValueError as err:
        raise ConversionError(f"{weight.name!r} cannot be stored in int8: {err}") from err


def _numbers(constant: Tensor) -> Array:
    return np.asarray(constant.data, np.float32)


def _limits(data: Array) -> tuple[float, float]:
    return float(np.min(data)), float(np.max(data))


def _constant_uses(network: Network) -> dict[Tensor, int]:
    uses: dict[Tensor, int] = {}
    for operator in network.operators:
        for tensor in operator.inputs:
            if tensor is not None and tensor.data is not None:
                uses[tensor] = uses.get(tensor, 0) + 1
    return uses


def _label(operator: Operator) -> str:
    return f"{operator.kind} {operator.outputs[0].name!r}"
