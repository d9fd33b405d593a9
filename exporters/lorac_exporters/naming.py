"""Names of parameters: what a tensor is called after its layer, and which names exporters made up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import (
    WEIGHTED,
    array,
    input_at,
    layer_name,
    name_of,
    need,
    nodes_of,
    unique_name,
    value_names,
)

BN_ROLES = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}
BIAS = 2  # input index of the bias of WEIGHTED operators

Layers = dict[ir.Node, str]


def batchnorm_layers(graph: ir.Graph) -> Layers:
    """A layer name for each BN, none twice.

    It comes from a tensor that only this BN reads, else from a shared one that gives no other BN its name, else
    from the convolution before it.
    """
    nodes = nodes_of(graph, "BatchNormalization")
    layers = {node: names[0] for node in nodes if (names := _prefixes(node, own=True))}
    for node in nodes:
        taken = set(layers.values())
        candidates = [name for name in _prefixes(node, own=False) if name not in taken]
        layers.setdefault(node, unique_name([*candidates, _fallback(node)][0], taken))
    return {node: layers[node] for node in nodes}


def parameter_name(node: ir.Node, index: int, layers: Layers) -> str | None:
    """``<layer>.<role>`` of a BN parameter or a bias; None for other inputs."""
    if node in layers and index in BN_ROLES:
        return f"{layers[node]}.{BN_ROLES[index]}"
    if node.domain == "" and node.op_type in WEIGHTED and index == BIAS:
        return f"{layer_name(name_of(node.inputs[1]))}.bias"
    return None


def name_computed(graph: ir.Graph, given: frozenset[str]) -> list[str]:
    """Name biases and BN parameters after their layers where the exporter only computed them.

    ``given`` are the initializers of the original file; those keep their names. Parameters must be unshared.
    Returns the new names of those that hold nothing but the neutral value: zeros (running_var and weight: ones),
    which PyTorch does not count as parameters.
    """
    layers = batchnorm_layers(graph)
    neutral = []
    for node in nodes_of(graph, *WEIGHTED, "BatchNormalization"):
        for index in range(1, len(node.inputs)):
            wish, value = parameter_name(node, index, layers), input_at(node, index)
            if wish is None or array(value) is None or name_of(value) in given:
                continue
            need(value).name = unique_name(wish, value_names(graph) - {name_of(value)})
            if _is_neutral(need(value), wish):
                neutral.append(name_of(value))
    return neutral


def _is_neutral(value: ir.Value, wish: str) -> bool:
    expected = 1.0 if wish.endswith((".weight", ".running_var")) else 0.0
    return bool(np.all(array(value) == expected))


def _prefixes(node: ir.Node, *, own: bool) -> list[str]:
    """Layer names that the BN's tensors suggest; with ``own`` only those that nothing else reads."""
    named = [(name_of(node.inputs[index]), f".{role}", index) for index, role in BN_ROLES.items()]
    return [
        name.removesuffix(ending)
        for name, ending, index in named
        if name.endswith(ending) and (not own or len(need(node.inputs[index]).uses()) == 1)
    ]


def _fallback(node: ir.Node) -> str:
    before = need(node.inputs[0]).producer()
    if before is not None and before.op_type == "Conv":
        return f"{layer_name(name_of(before.inputs[1]))}.bn"
    return node.name or name_of(node.outputs[0])
