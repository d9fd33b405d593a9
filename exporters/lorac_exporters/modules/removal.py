"""Take the modules of a method off a graph again: the network as it was, in place of the network with them."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from lorac_exporters.graph_tools import array, bypass, name_of, need, nodes_of, producer, remove_unused
from lorac_exporters.modules.gates import GATED
from lorac_exporters.modules.skips import TOTAL


def without_modules(model: ir.Model, sites: Iterable[str]) -> None:
    """Undo `lorac_exporters.modules.insertion.with_modules` in place; ``sites`` are the layers that have one."""
    known = {f"{layer}.{ending}" for layer in sites for ending in GATED}
    for node in nodes_of(model.graph, "Conv", "Gemm", "MatMul"):
        if array(node.inputs[1]) is not None:
            node.replace_input_with(0, _before(need(node.inputs[0]), known))
    for node in [node for node in nodes_of(model.graph, "Add") if node.name == TOTAL]:
        bypass(node)
    remove_unused(model)


def _before(value: ir.Value, known: set[str]) -> ir.Value:
    """What gates by these names were put on."""
    while name_of(value) in known:
        value = need(producer(value).inputs[0])
    return value
