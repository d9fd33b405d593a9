"""Batch normalisation with constant statistics: folded into the convolution before it, or Mul + Add.

With g = gamma / sqrt(var + eps): weight_folded = g * weight, bias_folded = (bias - mean) * g + beta; where nothing
can absorb it, scale = g and shift = beta - mean * g, under the names of gamma and beta.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import (
    array,
    constant,
    describe,
    float_array,
    float_attribute,
    input_at,
    layer_name,
    name_of,
    need,
    nodes_of,
    replace_node,
    set_array,
    static_dims,
)
from lorac_exporters.plan import Norm
from lorac_runtime.errors import ConversionError
from lorac_runtime.folding import fold_bias, fold_conv, fold_factor
from lorac_runtime.manifest import BatchNorm, Trainable

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Site:
    """A BatchNormalization node, the convolution that can absorb it (None: none can), and its record."""

    node: ir.Node
    conv: ir.Node | None
    record: BatchNorm


def find_batchnorms(graph: ir.Graph) -> tuple[Site, ...]:
    """All BN nodes in graph order. Shapes must be known, parameters unshared, convolutions must have biases.

    Raises ConversionError if the parameters of a BN are computed by the graph.
    """
    return tuple(_site(node) for node in nodes_of(graph, "BatchNormalization"))


def fold_batchnorms(sites: tuple[Site, ...]) -> list[str]:
    """Remove every BN of ``sites`` from its graph; the function computed stays the same. Returns the changes."""
    return [_fold(site) if site.conv is not None else _make_affine(site) for site in sites]


def norm_layers(records: Iterable[BatchNorm], values: Mapping[str, Floats], *, folded: bool) -> tuple[Norm, ...]:
    """The batch normalisations of a graph with parameters ``values`` that have a scale and a shift of their own there.

    ``folded``: only those that became Mul + Add are left.
    """
    kept = [bn for bn in records if bn.affine or not folded]
    return tuple(
        Norm(
            bn.name,
            Trainable(bn.weight, values[bn.weight].shape, "bn_weight"),
            Trainable(bn.bias, values[bn.bias].shape, "bn_bias"),
            None if bn.affine else layer_name(bn.folded_into[0]),
        )
        for bn in kept
    )


def as_arithmetic(model: ir.Model) -> None:
    """Write every BatchNormalization of ``model`` as Mul and Add, in place; its scale and shift stay parameters.

    y = x * s + t with s = gamma / sqrt(var + eps) and t = beta - mean * s, computed in the graph, so that an engine
    whose BatchNormalization would use the batch's statistics can train gamma and beta all the same.
    """
    for node in nodes_of(model.graph, "BatchNormalization"):
        _write_out(model.graph, node)


def _write_out(graph: ir.Graph, node: ir.Node) -> None:
    x, gamma, beta = (need(value) for value in node.inputs[:3])
    name, mean, var = layer_name(name_of(gamma)), *(float_array(need(value)) for value in node.inputs[3:5])
    inverse = fold_factor(np.ones_like(var), var, float_attribute(node, "epsilon", 1e-5)).astype(np.float32)
    column = constant(graph, f"{name}.column", np.array((1, -1, *(1 for _ in _dims(node)[2:])), np.int64))
    scale = ir.node("Mul", [gamma, constant(graph, f"{name}.inverse_sigma", inverse)])
    moved = ir.node("Mul", [scale.outputs[0], constant(graph, f"{name}.mean", mean)])
    shift = ir.node("Sub", [beta, moved.outputs[0]])
    columns = [ir.node("Reshape", [part.outputs[0], column]) for part in (scale, shift)]
    scaled = ir.node("Mul", [x, columns[0].outputs[0]])
    shifted = ir.node("Add", [scaled.outputs[0], columns[1].outputs[0]])
    nodes = [scale, moved, shift, *columns, scaled, shifted]
    for index, added in enumerate(nodes):
        added.name = added.outputs[0].name = f"{name}.arithmetic_{index}"
    replace_node(node, nodes, shifted.outputs[0])


def _site(node: ir.Node) -> Site:
    _check_parameters(node)
    gamma, beta, mean, var = (name_of(value) for value in node.inputs[1:5])
    conv = _absorbing_conv(node)
    targets = (gamma, beta) if conv is None else (name_of(conv.inputs[1]), name_of(conv.inputs[2]))
    record = BatchNorm(
        name=layer_name(gamma),
        weight=gamma,
        bias=beta,
        running_mean=mean,
        running_var=var,
        eps=float_attribute(node, "epsilon", 1e-5),
        momentum=_pytorch_momentum(node),
        positions=math.prod(d or 1 for d in _dims(node)[2:]),
        folded_into=targets,
        affine=conv is None,
    )
    return Site(node, conv, record)


def _check_parameters(node: ir.Node) -> None:
    if any(array(value) is None for value in node.inputs[1:5]):
        raise ConversionError(f"{describe(node)}: its parameters are computed in the graph, expected constants")
    lowest = float(np.min(float_array(need(node.inputs[4]))))
    if not lowest + float_attribute(node, "epsilon", 1e-5) > 0:
        raise ConversionError(
            f"{describe(node)}: running variance {name_of(node.inputs[4])} goes down to {lowest}, "
            "expected positive numbers; the model's statistics are damaged"
        )


def _pytorch_momentum(node: ir.Node) -> float:
    """ONNX keeps ``momentum`` of the old statistics, PyTorch takes ``momentum`` of the new ones."""
    return float(1 - Decimal(str(float_attribute(node, "momentum", 0.9))))


def _dims(node: ir.Node) -> tuple[int | None, ...]:
    dims = static_dims(node.inputs[0])
    if dims is None:
        raise ConversionError(f"{describe(node)}: the shape of its input is unknown")
    return dims


def _absorbing_conv(node: ir.Node) -> ir.Node | None:
    """The convolution whose only reader is this BN, with constants of its own for weight and bias."""
    source = need(node.inputs[0])
    conv = source.producer()
    if conv is None or conv.domain != "" or conv.op_type != "Conv":
        return None
    if len(source.uses()) != 1 or source.is_graph_output():
        return None
    parameters = [conv.inputs[1], input_at(conv, 2)]
    own = all(p is not None and array(p) is not None and len(p.uses()) == 1 for p in parameters)
    return conv if own else None


def _fold(site: Site) -> str:
    assert site.conv is not None
    weight, bias = need(site.conv.inputs[1]), need(site.conv.inputs[2])
    gamma, beta, mean, var = (float_array(need(value)) for value in site.node.inputs[1:5])
    new_weight, new_bias = fold_conv(float_array(weight), float_array(bias), gamma, beta, mean, var, site.record.eps)
    set_array(weight, new_weight)
    set_array(bias, new_bias)
    _pass_through(site.node, site.conv)
    return f"BatchNormalization {site.record.name}: folded into {weight.name} and {bias.name}"


def _pass_through(node: ir.Node, conv: ir.Node) -> None:
    """The convolution's output takes the place and the name of the BN's."""
    replace_node(node, [], conv.outputs[0])


def _make_affine(site: Site) -> str:
    node, record = site.node, site.record
    gamma, beta, mean, var = (float_array(need(value)) for value in node.inputs[1:5])
    factor = fold_factor(gamma, var, record.eps)
    column = (1, -1, *(1 for _ in _dims(node)[2:]))
    scale_value, shift_value = need(node.inputs[1]), need(node.inputs[2])
    set_array(scale_value, factor.astype(np.float32).reshape(column))
    set_array(shift_value, fold_bias(None, factor, beta, mean).reshape(column))
    scaled = ir.node("Mul", [node.inputs[0], scale_value], name=f"{record.name}.mul")
    shifted = ir.node("Add", [scaled.outputs[0], shift_value], name=f"{record.name}.add")
    scaled.outputs[0].name = f"{record.name}.scaled"
    scaled.outputs[0].type, scaled.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    replace_node(node, [scaled, shifted], shifted.outputs[0])
    return f"BatchNormalization {record.name}: no convolution can absorb it, now Mul + Add"
