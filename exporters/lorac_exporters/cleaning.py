"""Equal-value clean-up of a graph: functions, constants, nodes that do nothing, names, storage."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer

from lorac_exporters.graph_tools import (
    array,
    bypass,
    constant,
    convolutions,
    describe,
    input_at,
    ints_attribute,
    layer_name,
    name_of,
    nodes_of,
    remove_unused,
    set_array,
    set_input,
    static_dims,
    text_attribute,
    unique_name,
    value_names,
)

IR_VERSION = 9
PRODUCER = "lorac-deploy"
_NO_LIMIT = 1 << 31  # elements: more than a file of 2 GiB can hold


def inline_functions(model: ir.Model) -> list[str]:
    """Write model-local functions out as nodes."""
    if not model.functions:
        return []
    names = sorted({str(key[1]) for key in model.functions})
    common.InlinePass()(model)
    model.functions.clear()
    return [f"functions written out as nodes: {', '.join(names)}"]


def own_initializers(model: ir.Model) -> list[str]:
    """Initializers that are also graph inputs (IR version 3 wanted that) become constants of the graph."""
    constants = [v for v in model.graph.inputs if v.const_value is not None]
    common.RemoveInitializersFromInputsPass()(model)
    return [f"{len(constants)} initializers are no longer graph inputs"] if constants else []


def unmerge_copies(model: ir.Model) -> list[str]:
    """An Identity of an initializer is a tensor that the exporter merged with an equal one: store both again."""
    changes = []
    for node in nodes_of(model.graph, "Identity"):
        source, old = node.inputs[0], node.outputs[0]
        if source is None or not source.is_initializer() or old.is_graph_output():
            continue
        name, numbers = name_of(old), array(source)
        assert numbers is not None
        old.name = None
        copy = constant(model.graph, name, numbers.copy())
        old.replace_all_uses_with(copy)
        model.graph.remove(node, safe=True)
        changes.append(f"{name}: its own copy of {source.name}, with which it was merged")
    return changes


def fold_constants(model: ir.Model) -> list[str]:
    """Compute what depends on constants only; Constant nodes become initializers."""
    before = len(model.graph)
    onnxscript.optimizer.fold_constants(
        model, onnx_shape_inference=True, output_size_limit=_NO_LIMIT, should_fold=lambda _: True
    )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    remove_unused(model)
    removed = before - len(model.graph)
    return [f"{removed} nodes computed constants: folded into initializers"] if removed else []


def drop_idle_nodes(model: ir.Model) -> list[str]:
    """Remove Identity, and Dropout (which does nothing at inference)."""
    changes = []
    for node in nodes_of(model.graph, "Identity", "Dropout"):
        changes.append(f"{describe(node)}: removed, it does nothing at inference")
        bypass(node)
    return changes


def drop_idle_pads(model: ir.Model) -> list[str]:
    """Remove Pad nodes that pad nothing (exporters write them before some average pools)."""
    changes = []
    for node in nodes_of(model.graph, "Pad"):
        pads = array(input_at(node, 1))
        if pads is not None and not np.any(pads) and static_dims(node.inputs[0]) is not None:
            changes.append(f"{describe(node)}: removed, it pads nothing")
            bypass(node)
    return changes


def explicit_pads(graph: ir.Graph) -> list[str]:
    """Write ``auto_pad`` out as numbers; shapes must be known.

    onnxruntime-training computes wrong gradients, without a word, for convolutions with SAME padding.
    """
    changes = []
    for node in nodes_of(graph, "Conv", "MaxPool", "AveragePool", "LpPool"):
        mode = text_attribute(node, "auto_pad", "NOTSET")
        node.attributes.pop("auto_pad", None)
        if mode != "NOTSET":
            node.attributes["pads"] = ir.AttrInt64s("pads", _same_pads(node, mode))
            changes.append(f"{describe(node)}: auto_pad {mode} written out as numbers")
    return changes


def _same_pads(node: ir.Node, mode: str) -> list[int]:
    """SAME: output = ceil(input / stride); an odd number of cells goes to the end (UPPER) or the start (LOWER)."""
    size, kernel = (static_dims(node.inputs[0]) or ())[2:], window(node)
    strides = ints_attribute(node, "strides", [1] * len(kernel))
    dilations = ints_attribute(node, "dilations", [1] * len(kernel))
    starts, ends = [], []
    for n, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        covered = (-(-(n or 1) // stride) - 1) * stride + (k - 1) * dilation + 1
        total = 0 if mode == "VALID" else max(0, covered - (n or 1))
        smaller, larger = total // 2, total - total // 2
        starts.append(smaller if mode == "SAME_UPPER" else larger)
        ends.append(larger if mode == "SAME_UPPER" else smaller)
    return [*starts, *ends]


def window(node: ir.Node) -> tuple[int, ...]:
    """Kernel sizes of a convolution or pooling; the attribute may be left out for a convolution."""
    if "kernel_shape" in node.attributes:
        return ints_attribute(node, "kernel_shape", ())
    return tuple(dim or 1 for dim in (static_dims(node.inputs[1]) or ())[2:])


def add_biases(graph: ir.Graph) -> list[str]:
    """Give every convolution a bias, zeros where it had none, named ``<layer>.bias``; returns the new names."""
    added = []
    for node in convolutions(graph):
        if input_at(node, 2) is None:
            weight = node.inputs[1]
            assert weight is not None
            assert weight.shape is not None
            name = unique_name(f"{layer_name(name_of(weight))}.bias", value_names(graph))
            set_input(node, 2, constant(graph, name, np.zeros(weight.shape[0], np.float32)))
            added.append(name)
    return added


def unique_node_names(graph: ir.Graph) -> list[str]:
    """Keep node names that are unique; name the others by operator and position."""
    kept = {str(node.name): node for node in reversed(graph) if node.name}
    renamed = 0
    for position, node in enumerate(graph):
        if kept.get(str(node.name)) is not node:
            node.name = unique_name(f"{node.op_type}_{position}", kept)
            kept[node.name] = node
            renamed += 1
    return [f"{renamed} nodes had no name of their own: named by operator and position"] if renamed else []


def strip(model: ir.Model) -> None:
    """IR version 9, one opset, initializers as raw bytes; no doc strings, no records of exporters.

    The model's own ``metadata_props`` stay: apps read class names from them.
    """
    kept = dict(model.metadata_props)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(kept)
    outputs = (v for node in model.graph for v in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        value.metadata_props.clear()  # the pass above leaves these
    model.ir_version, model.doc_string, model.domain, model.model_version = IR_VERSION, None, None, None
    model.producer_name, model.producer_version = PRODUCER, None
    for domain in [d for d in model.opset_imports if d != ""]:
        del model.opset_imports[domain]
    for node in model.graph:
        ordered = sorted(node.attributes.items())  # exporters write them in any order
        node.attributes.clear()
        node.attributes.update(ordered)
    for value in model.graph.initializers.values():
        numbers = array(value)
        assert numbers is not None
        set_array(value, numbers)
