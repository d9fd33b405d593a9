"""Gradient rules: ConvTranspose, in any number of spatial axes, with stride, padding, dilation and groups.

A transposed convolution maps as the input gradient of a convolution does. So its own input gradient is that
convolution, with the same weight, and its weight gradient is that convolution's, with the roles of input and output
gradient exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lorac_exporters.gradients.convolution import weight_gradient
from lorac_exporters.gradients.geometry import Geometry
from lorac_exporters.gradients.rule import Rule, Site
from lorac_exporters.gradients.tape import Attribute, Tape, sizes
from lorac_exporters.graph_tools import describe, int_attribute, ints_attribute, need, text_attribute
from lorac_runtime.errors import ConversionError


def conv_transpose(tape: Tape, site: Site) -> Sequence[ir.Value | None]:
    """ConvTranspose: x (batch, c_in, ...), weight (c_in, c_out/groups, *kernel), bias (c_out,).

    Raises ConversionError where the padding follows from ``auto_pad`` or ``output_shape``, or where output_padding
    reaches the stride.
    """
    g, weight = mirrored(site.node), need(site.node.inputs[1])
    found = [
        _input_gradient(tape, g, site.grad, weight, like=site.x) if site.wants(0) else None,
        weight_gradient(tape, g, site.grad, site.x, like=weight) if site.wants(1) else None,
        _bias_gradient(tape, g, site.grad) if site.wants(2) else None,
    ]
    return found[: len(site.node.inputs)]


def mirrored(node: ir.Node) -> Geometry:
    """The convolution from the output's shape back to the input's shape.

    Cells that output_padding adds and no tap reaches are fewer than a stride: it leaves them over by itself.
    """
    _require_explicit(node)
    weight, small, large = need(node.inputs[1]), sizes(need(node.inputs[0]), 2), sizes(node.outputs[0], 2)
    c_in, per_group, *kernel = sizes(weight)
    rank, groups = len(kernel), int_attribute(node, "group", 1)
    begins = ints_attribute(node, "pads", (0,) * (2 * rank))[:rank]
    strides, dilations = (ints_attribute(node, name, (1,) * rank) for name in ("strides", "dilations"))
    parts = zip(small, large, kernel, strides, dilations, begins, strict=True)
    ends = tuple(max(0, s * (n - 1) + d * (k - 1) + 1 - m - b) for n, m, k, s, d, b in parts)
    return Geometry(per_group * groups, c_in, groups, tuple(kernel), strides, dilations, begins, ends, large, small)


def _require_explicit(node: ir.Node) -> None:
    if text_attribute(node, "auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes:
        raise ConversionError(f"{describe(node)} pads automatically; export it with the attribute pads instead")
    extra = ints_attribute(node, "output_padding", ())
    strides = ints_attribute(node, "strides", (1,) * len(extra))
    if any(e >= s for e, s in zip(extra, strides, strict=True)):
        raise ConversionError(
            f"{describe(node)} has output_padding {list(extra)}, which onnxruntime computes right only below the "
            f"strides, here {list(strides)}; pad the output instead"
        )


def _input_gradient(tape: Tape, g: Geometry, grad: ir.Value, weight: ir.Value, *, like: ir.Value) -> ir.Value:
    attributes: dict[str, Attribute] = {"strides": g.strides, "dilations": g.dilations, "group": g.groups}
    attributes["pads"] = [*g.begins, *g.ends]
    return tape.op("Conv", grad, weight, like=like, name="grad_input", attributes=attributes)


def _bias_gradient(tape: Tape, g: Geometry, grad: ir.Value) -> ir.Value:
    axes = tape.ints(0, *range(2, 2 + g.rank))
    return tape.op("ReduceSum", grad, axes, shape=(g.c_in,), attributes={"keepdims": 0}, name="grad_bias")


RULES: dict[str, Rule] = {"ConvTranspose": conv_transpose}
