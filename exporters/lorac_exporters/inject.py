"""Carry out a plan on an ONNX graph: facts for the planner, starting values, and the low-rank branches.

Each adapted layer gets ``weight + arrange(lora_b @ lora_a) * scale`` in front of it (weight space), made
of MatMul, Reshape, Transpose, Mul and Add, so that any engine that differentiates those can train it.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.batchnorm import norm_layers
from lorac_exporters.canonical import Canonical
from lorac_exporters.graph_tools import FILTERS, array, constant, convolutions, is_setting
from lorac_exporters.head_layers import conv_layer, head_layers, map_size
from lorac_exporters.linear_layers import linear_layers, linear_tensors, weighted_nodes
from lorac_exporters.partials import inject_partial
from lorac_exporters.plan import Layer, Network, Plan, Size, layer_of
from lorac_runtime.delta import adapter_shapes, conv_dims
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import Adapter

Floats = npt.NDArray[np.float32]


def describe(canonical: Canonical, original: Canonical | None = None, *, classifier: bool = True) -> Network:
    """The facts of a canonical graph that `lorac_exporters.plan` needs.

    ``original`` is the same network with its BN kept; it gives the parameter count of the network as its
    author knows it (BN and no added biases), which decides rank mode ``auto``. A ``classifier`` has one head, other
    networks may have several.
    """
    head, *more = head_layers(canonical.model, canonical.values, classifier=classifier)
    weights = {layer.weight for layer in (head, *more)}
    filters = fixed_filters(canonical.model)
    convs = tuple(_fixed(conv_layer(node), filters) for node in convolutions(canonical.model.graph))
    linears = linear_layers(canonical.model.graph, canonical.values, weights)
    planned = {name for layer in linears if layer.obstacle is None for name in (layer.weight, layer.bias)}
    rest = linear_tensors(canonical.model.graph, canonical.values, weights)
    in_heads = [name for layer in (head, *more) for name in (layer.weight, layer.bias) if name is not None]
    kept_bn = canonical.batchnorms if _has_batchnorm_nodes(canonical) else ()
    network = Network(
        convs=convs,
        head_weight=(head.weight, head.shape),
        head_bias=None if head.bias is None else (head.bias, canonical.values[head.bias].shape),
        backbone_parameters=count_parameters(original or canonical)
        - sum(canonical.values[name].size for name in in_heads),
        batchnorms=tuple((bn.weight, bn.bias, canonical.values[bn.weight].size) for bn in kept_bn),
        others=tuple(t for t in rest if t.name not in planned),
        linears=linears,
        head_obstacle=head.obstacle,
        norms=norm_layers(canonical.batchnorms, canonical.values, folded=not kept_bn),
        more_heads=tuple(more),
    )
    return dataclasses.replace(network, order=_order(canonical, network))


def fixed_filters(model: ir.Model) -> frozenset[str]:
    """Weights of convolutions that the PyTorch network holds as buffers: they are no parameters and never train."""
    return frozenset(json.loads(model.metadata_props.get(FILTERS, "[]")))


def _fixed(layer: Layer, filters: frozenset[str]) -> Layer:
    if layer.weight not in filters:
        return layer
    return dataclasses.replace(layer, bias=None, obstacle="its weight is a fixed filter, no parameter of the network")


def _order(canonical: Canonical, network: Network) -> tuple[tuple[str, Size | None], ...]:
    """Every layer of ``network`` as the graph calls them, and the sizes that convolutions and norms give."""
    sized = {layer_of(bn.weight) for bn in canonical.batchnorms} | {conv.name for conv in network.convs}
    layers = sized | {layer.name for layer in network.linears} | {layer_of(t.name) for t in network.others}
    found: dict[str, Size | None] = {}
    for node in canonical.model.graph:
        names = (layer_of(str(value.name)) for value in node.inputs if value is not None)
        for name in names:
            if name in layers.union(network.heads):
                found.setdefault(name, map_size(node.outputs[0]) if name in sized else None)
    return tuple(found.items())


def count_parameters(canonical: Canonical) -> int:
    """Parameters as PyTorch counts them: running statistics and the zero biases that we added left out."""
    skipped = {name for bn in canonical.batchnorms for name in (bn.running_mean, bn.running_var)}
    skipped |= fixed_filters(canonical.model)
    settings = {name for name, value in canonical.model.graph.initializers.items() if is_setting(value)}
    return sum(v.size for k, v in canonical.values.items() if k not in skipped | settings | canonical.added)


def starting_values(plan: Plan, base: dict[str, Floats], *, seed: int) -> dict[str, Floats]:
    """First values of all tensors of adapters: ``lora_b`` zero, ``lora_a`` Kaiming uniform (a = sqrt 5), alpha.

    Tensors that train in full, and channels that train, start at their value in ``base``.
    """
    values: dict[str, Floats] = {}
    rng = np.random.default_rng(seed)
    for adapter in plan.adapters:
        shape_a, shape_b = adapter_shapes(adapter.weight_shape, adapter.rank, adapter.pairs)
        bound = 1.0 / math.sqrt(shape_a[1])
        values[adapter.lora_a] = rng.uniform(-bound, bound, shape_a).astype(np.float32)
        values[adapter.lora_b] = np.zeros(shape_b, np.float32)
        if adapter.lora_alpha is not None:
            values[adapter.lora_alpha] = np.array([adapter.alpha], np.float32)
    values |= {p.tensor: base[p.weight][:, list(p.channels)] for p in plan.partials}
    return values | {t.name: base[t.name] for t in plan.trainables if t.name not in values}


def inject(model: ir.Model, plan: Plan, values: dict[str, Floats]) -> None:
    """Give every adapted layer of ``model`` its branch, in place; trainable tensors take ``values``.

    Raises ConversionError if a tensor of the plan is not in the graph afterwards.
    """
    graph = model.graph
    nodes = weighted_nodes(graph)
    for adapter in plan.adapters:
        if adapter.weight not in nodes:
            raise ConversionError(f"no layer of the graph uses {adapter.weight}; was the graph changed?")
        _add_branch(graph, nodes[adapter.weight], adapter, values)
    for partial in plan.partials:
        inject_partial(graph, partial, values[partial.tensor])
    for trainable in plan.trainables:
        value = graph.initializers.get(trainable.name)
        if value is None or array(value) is None:
            raise ConversionError(f"trainable tensor {trainable.name} is not an initializer of the graph")
        value.const_value = ir.tensor(values[trainable.name], name=trainable.name)


def _add_branch(graph: ir.Graph, layer: ir.Node, adapter: Adapter, values: dict[str, Floats]) -> None:
    a = constant(graph, adapter.lora_a, values[adapter.lora_a])
    b = constant(graph, adapter.lora_b, values[adapter.lora_b])
    nodes = _product(graph, a, b, adapter)
    nodes += _arrange(graph, nodes[-1].outputs[0], adapter)
    nodes += _scaled(graph, nodes[-1].outputs[0], adapter, values)
    total = ir.node("Add", [layer.inputs[1], nodes[-1].outputs[0]], name=f"{adapter.layer}.lora_weight")
    nodes.append(total)
    for node in nodes:
        node.outputs[0].name = str(node.name)
    graph.insert_before(layer, nodes)
    layer.replace_input_with(1, total.outputs[0])


def _product(graph: ir.Graph, a: ir.Value, b: ir.Value, adapter: Adapter) -> list[ir.Node]:
    """The node form of `lorac_runtime.delta.product`; of several pairs (pairs, rows of each, c_in * k_w)."""
    shapes = {"a": (adapter.pairs, adapter.rank, -1), "b": (adapter.pairs, -1, adapter.rank)}
    apart = []
    for (key, shape), factor in zip(shapes.items(), (a, b), strict=True) if adapter.pairs > 1 else ():
        wanted = constant(graph, f"{adapter.layer}.lora_{key}_shape", np.array(shape, np.int64))
        apart.append(ir.node("Reshape", [factor, wanted], name=f"{adapter.layer}.lora_{key}_apart"))
    left, right = (apart[1].outputs[0], apart[0].outputs[0]) if apart else (b, a)
    return [*apart, ir.node("MatMul", [left, right], name=f"{adapter.layer}.lora_product")]


def _arrange(graph: ir.Graph, product: ir.Value, adapter: Adapter) -> list[ir.Node]:
    """The node form of `lorac_runtime.delta.arrange`; (c_out * k_h, c_in * k_w) -> the weight's shape."""
    c_out, c_in, k_h, k_w = conv_dims(adapter.weight_shape)
    shape = constant(graph, f"{adapter.layer}.lora_shape", np.array(adapter.weight_shape, np.int64))
    if adapter.layout == "paper" or k_h == 1:
        return [ir.node("Reshape", [product, shape], name=f"{adapter.layer}.lora_arranged")]
    split = constant(graph, f"{adapter.layer}.lora_split", np.array([c_out, k_h, c_in, k_w], np.int64))
    first = ir.node("Reshape", [product, split], name=f"{adapter.layer}.lora_rows")
    swap = ir.node("Transpose", first.outputs, {"perm": [0, 2, 1, 3]}, name=f"{adapter.layer}.lora_arranged")
    graph.initializers.pop(str(shape.name))
    return [first, swap]


def _scaled(graph: ir.Graph, arranged: ir.Value, adapter: Adapter, values: dict[str, Floats]) -> list[ir.Node]:
    if adapter.lora_alpha is None:
        scale = constant(graph, f"{adapter.layer}.lora_scale", np.array(adapter.alpha / adapter.r, np.float32))
        return [ir.node("Mul", [arranged, scale], name=f"{adapter.layer}.lora_delta")]
    alpha = constant(graph, adapter.lora_alpha, values[adapter.lora_alpha])
    inverse = constant(graph, f"{adapter.layer}.lora_inverse_r", np.array([1.0 / adapter.r], np.float32))
    scale_node = ir.node("Mul", [alpha, inverse], name=f"{adapter.layer}.lora_scale")
    delta = ir.node("Mul", [arranged, scale_node.outputs[0]], name=f"{adapter.layer}.lora_delta")
    return [scale_node, delta]


def _has_batchnorm_nodes(canonical: Canonical) -> bool:
    return any(node.op_type == "BatchNormalization" for node in canonical.model.graph)
