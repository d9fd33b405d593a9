"""Gradient rules: BatchNormalization, with constant statistics or those of the batch.

Inference engines have no BatchNormalization that computes statistics. `write_out_batchnorm` computes them with other
operators and hands them to the ordinary one, whose kernel is the fastest way to scale channels; the rule knows the
result again and writes the gradient that passes through the statistics too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.rule import Rule, Site
from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import (
    array,
    describe,
    float_attribute,
    int_attribute,
    layer_name,
    name_of,
    need,
    nodes_of,
)
from lorac_runtime.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a batch says about each channel, (channels,) each; PyTorch moves its running variance by ``unbiased_var``.

    One value per channel has no variance: ``unbiased_var`` is NaN then.
    """

    mean: ir.Value
    unbiased_var: ir.Value


def write_out_batchnorm(model: ir.Model) -> dict[str, Statistics]:
    """Give every BatchNormalization of ``model`` the statistics of the batch, in place; shapes must be known.

    Returns the statistics by the name of each scale (gamma). What held running statistics before is unused then.

    Raises ConversionError for a BatchNormalization in training mode, or one that shares its scale with another.
    """
    found: dict[str, Statistics] = {}
    tape = Tape(model.graph)
    for node in nodes_of(model.graph, "BatchNormalization"):
        gamma = name_of(node.inputs[1])
        if gamma in found:
            raise ConversionError(f"{describe(node)} shares its scale {gamma!r} with another; give each its own")
        _require_inference(node)
        found[gamma] = _with_batch_statistics(tape, node, layer_name(gamma))
    return found


def _with_batch_statistics(tape: Tape, node: ir.Node, layer: str) -> Statistics:
    x, before = need(node.inputs[0]), len(tape.graph)
    axes, shape = _reduced(tape, x), (1, dims(x)[1], *[1] * (len(dims(x)) - 2))
    kept = tape.op("ReduceMean", x, axes, shape=shape, name=f"{layer}.batch_mean_kept")
    centred = tape.op("Sub", x, kept, like=x, name=f"{layer}.centred")
    mean = tape.op("Reshape", kept, tape.ints(-1), shape=dims(x)[1:2], name=f"{layer}.batch_mean")
    var = _channel(tape, "ReduceMean", tape.op("Mul", centred, centred, like=x), name=f"{layer}.batch_var")
    added = list(tape.graph)[before:]
    tape.graph.remove(added)
    tape.graph.insert_before(node, added)
    node.replace_input_with(3, mean)
    node.replace_input_with(4, var)
    return Statistics(mean, _unbiased(tape, x, var, layer))


def _unbiased(tape: Tape, x: ir.Value, var: ir.Value, layer: str) -> ir.Value:
    """var * n / (n - 1) for n values per channel; of all channels together there are n * channels."""
    count = _count(tape, x)
    factor = tape.op("Div", count, tape.op("Sub", count, float(sizes(var)[0]), shape=()), shape=())
    return tape.op("Mul", var, factor, like=var, name=f"{layer}.batch_var_unbiased")


def _count(tape: Tape, x: ir.Value) -> ir.Value:
    """How many numbers ``x`` holds, float32 ()."""
    count = tape.op("Size", x, shape=(), dtype=ir.DataType.INT64)
    return tape.op("Cast", count, shape=(), attributes={"to": int(ir.DataType.FLOAT)})


def _reduced(tape: Tape, x: ir.Value) -> ir.Value:
    """The axes that are no channels."""
    return tape.ints(0, *range(2, len(dims(x))))


def _channel(tape: Tape, op_type: str, x: ir.Value, name: str = "") -> ir.Value:
    """A reduction to (channels,)."""
    return tape.op(op_type, x, _reduced(tape, x), shape=dims(x)[1:2], attributes={"keepdims": 0}, name=name)


def _require_inference(node: ir.Node) -> None:
    if int_attribute(node, "training_mode", 0):
        raise ConversionError(
            f"{describe(node)} is in training mode, which inference engines cannot run; export the model in "
            "evaluation mode (model.eval())"
        )


def batch_normalization(tape: Tape, site: Site) -> Sequence[ir.Value | None]:
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias, for any mean and var.

    Where these are the batch's, the gradient of x holds what passes through them, and they get none of their own.

    Raises ConversionError in training mode, see `write_out_batchnorm`.
    """
    _require_inference(site.node)
    norm = _Norm(tape, site)
    centred = _centred_by_batch(site.node) if site.wants(0) and site.wants(4) else None
    return norm.gradients() if centred is None else norm.gradients_through_batch(centred)


@dataclasses.dataclass(frozen=True)
class _Norm:
    tape: Tape
    site: Site

    def gradients(self) -> list[ir.Value | None]:
        wants, grad, gamma = self.site.wants, self.site.grad, self.parameter(1)
        shift = _channel(self.tape, "ReduceSum", grad) if wants(2) or wants(3) else None
        scale = self._scale_gradient() if wants(1) or wants(4) else None
        return [
            self.normalized(grad, gamma, self.filled(0.0)) if wants(0) else None,
            scale if wants(1) else None,
            shift if wants(2) else None,
            self.product(need(shift), gamma, self.inverse_sigma(), -1.0) if wants(3) else None,
            self._variance_gradient(need(scale)) if wants(4) else None,
        ]

    def _scale_gradient(self) -> ir.Value:
        unit = self.normalized(self.site.x, self.filled(1.0), self.parameter(3))
        return _channel(self.tape, "ReduceSum", self.tape.op("Mul", self.site.grad, unit, like=unit), name="grad_scale")

    def _variance_gradient(self, scale_gradient: ir.Value) -> ir.Value:
        inverse = self.inverse_sigma()
        return self.product(scale_gradient, self.parameter(1), inverse, inverse, -0.5)

    def gradients_through_batch(self, centred: ir.Value) -> list[ir.Value | None]:
        """dx = scale / sigma * (dy - mean(dy) - unit * mean(dy * unit)) with unit = (x - mean) / sigma."""
        tape, grad, gamma, inverse = self.tape, self.site.grad, self.parameter(1), self.inverse_sigma()
        shift = _channel(tape, "ReduceSum", grad, name="grad_shift")
        aligned = _channel(tape, "ReduceSum", tape.op("Mul", grad, centred, like=centred))
        scale = tape.op("Mul", aligned, inverse, like=gamma, name="grad_scale")
        share = tape.op("Div", float(sizes(gamma)[0]), _count(tape, centred), shape=())  # 1 / values per channel
        flat = self.normalized(grad, gamma, self.product(shift, share))
        parallel = self.normalized(centred, self.product(scale, gamma, inverse, share), self.filled(0.0))
        x = tape.op("Sub", flat, parallel, like=centred, name="grad_input")
        wants = self.site.wants
        return [x, scale if wants(1) else None, shift if wants(2) else None, None, None]

    def normalized(self, x: ir.Value, scale: ir.Value, mean: ir.Value) -> ir.Value:
        """(x - mean) / sigma * scale: this very operator, without shift."""
        eps = {"epsilon": float_attribute(self.site.node, "epsilon", 1e-5)}
        inputs = (x, scale, self.filled(0.0), mean, self.parameter(4))
        return self.tape.op("BatchNormalization", *inputs, like=x, attributes=eps)

    def inverse_sigma(self) -> ir.Value:
        var, eps = self.parameter(4), float_attribute(self.site.node, "epsilon", 1e-5)
        sigma = self.tape.op("Sqrt", self.tape.op("Add", var, eps, like=var), like=var)
        return self.tape.op("Reciprocal", sigma, like=var, name="inverse_sigma")

    def product(self, first: ir.Value, *factors: ir.Value | float) -> ir.Value:
        for factor in factors:
            first = self.tape.op("Mul", first, factor, like=first)
        return first

    def filled(self, number: float) -> ir.Value:
        return self.tape.constant(np.full(sizes(self.parameter(1)), number, np.float32))

    def parameter(self, index: int) -> ir.Value:
        return need(self.site.node.inputs[index])


def _centred_by_batch(node: ir.Node) -> ir.Value | None:
    """x - mean, if mean and var are computed from x as `write_out_batchnorm` does it; None if they are others."""
    x, mean, var = node.inputs[0], node.inputs[3], node.inputs[4]
    kept, square = _made_of(mean, "Reshape")[:1], _mean_over_batch(var)
    factors = _made_of(square, "Mul")
    centred = factors[0] if factors else None
    matches = (
        factors == (centred, centred)
        and _made_of(centred, "Sub") == (x, *kept)
        and kept != ()
        and _mean_over_batch(kept[0]) is x
    )
    return centred if matches else None


def _mean_over_batch(value: ir.Value | None) -> ir.Value | None:
    """What a mean over all axes but the channels is taken of; None for any other value."""
    inputs = _made_of(value, "ReduceMean")
    if len(inputs) < 2 or inputs[0] is None:
        return None
    found, wanted = array(inputs[1]), [0, *range(2, len(dims(inputs[0])))]
    return inputs[0] if found is not None and found.tolist() == wanted else None


def _made_of(value: ir.Value | None, op_type: str) -> tuple[ir.Value | None, ...]:
    """The inputs of the node that made a value; none if it is not of type ``op_type``."""
    node = None if value is None else value.producer()
    return tuple(node.inputs) if node is not None and node.op_type == op_type else ()


RULES: dict[str, Rule] = {"BatchNormalization": batch_normalization}
