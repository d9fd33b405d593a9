"""The graph that re-estimates BN statistics on a device (policy ``recalibrate``): forward passes only.

It is the network before folding, with every BN in batch-statistics mode, made of primitive operators because
inference builds of onnxruntime have no training-mode BatchNormalization. Outputs, for each BN in order:
``<bn>.batch_mean`` and ``<bn>.batch_var`` (biased), both (channels,).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lorac_exporters.graph_tools import constant
from lorac_runtime.manifest import BatchNorm


def statistics_graph(unfolded: ir.Model, batchnorms: tuple[BatchNorm, ...]) -> ir.Model:
    """A copy of ``unfolded`` (BN kept) that outputs batch statistics; nothing behind the last BN remains."""
    model = unfolded.clone()
    graph = model.graph
    names = {bn.weight: bn.name for bn in batchnorms}
    outputs: list[ir.Value] = []
    for node in [n for n in graph if n.op_type == "BatchNormalization"]:
        gamma = node.inputs[1]
        assert gamma is not None
        outputs += _replace(graph, node, names[str(gamma.name)])
    graph.outputs[:] = outputs
    RemoveUnusedNodesPass()(model)
    return model


def _replace(graph: ir.Graph, node: ir.Node, name: str) -> list[ir.Value]:
    """Write a BN node out as mean, variance, normalisation; returns the two statistics, (channels,) each."""
    x, gamma, beta = node.inputs[0], node.inputs[1], node.inputs[2]
    assert x is not None
    rank = 4 if x.shape is None else len(x.shape)
    axes = constant(graph, f"{name}.axes", np.array([0, *range(2, rank)], np.int64))
    column = constant(graph, f"{name}.column", np.array([1, -1] + [1] * (rank - 2), np.int64))
    flat = constant(graph, f"{name}.flat", np.array([-1], np.int64))
    eps = constant(graph, f"{name}.eps", np.array(node.attributes.get_float("epsilon", 1e-5), np.float32))
    mean = ir.node("ReduceMean", [x, axes], {"keepdims": 1})
    centred = ir.node("Sub", [x, mean.outputs[0]])
    square = ir.node("Mul", [centred.outputs[0], centred.outputs[0]])
    var = ir.node("ReduceMean", [square.outputs[0], axes], {"keepdims": 1})
    shifted = ir.node("Add", [var.outputs[0], eps])
    sigma = ir.node("Sqrt", shifted.outputs)
    unit = ir.node("Div", [centred.outputs[0], sigma.outputs[0]])
    gamma_column = ir.node("Reshape", [gamma, column])
    beta_column = ir.node("Reshape", [beta, column])
    scaled = ir.node("Mul", [unit.outputs[0], gamma_column.outputs[0]])
    result = ir.node("Add", [scaled.outputs[0], beta_column.outputs[0]])
    flat_mean = ir.node("Reshape", [mean.outputs[0], flat])
    flat_var = ir.node("Reshape", [var.outputs[0], flat])
    nodes = [mean, centred, square, var, shifted, sigma, unit, gamma_column, beta_column, scaled, result]
    for index, added in enumerate([*nodes, flat_mean, flat_var]):
        added.name = f"{name}.statistics_{index}"
        added.outputs[0].name = added.name
    _name_output(flat_mean, f"{name}.batch_mean")
    _name_output(flat_var, f"{name}.batch_var")
    graph.insert_before(node, [*nodes, flat_mean, flat_var])
    node.outputs[0].replace_all_uses_with(result.outputs[0])
    graph.remove(node, safe=True)
    return [flat_mean.outputs[0], flat_var.outputs[0]]


def _name_output(node: ir.Node, name: str) -> None:
    value = node.outputs[0]
    value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape([None])
