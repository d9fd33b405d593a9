"""What a model must be before it can be made canonical: everything that is in the way, named at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from lorac_exporters.graph_tools import describe, input_at, int_attribute, nodes_of
from lorac_runtime.errors import ConversionError, listed

OPSET = 18
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_QUANTIZED = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
    }
)
_OTHER_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def check_supported(model: ir.Model, *, classifier: bool = True) -> None:
    """Refuse what this project cannot adapt. Functions must be inlined before. A ``classifier`` has one output.

    Raises ConversionError naming every obstacle with what to do about it.
    """
    problems = [
        *_interface_problems(model, classifier=classifier),
        *_node_problems(model.graph),
        *_type_problems(model.graph),
    ]
    if not nodes_of(model.graph, "Conv", "Gemm", "MatMul"):
        problems.append("the model has neither a convolution nor a fully connected layer, so nothing could train")
    if problems:
        raise ConversionError(listed("this model cannot be adapted:", problems))


def _interface_problems(model: ir.Model, *, classifier: bool) -> Iterator[str]:
    opset = model.opset_imports.get("")
    if opset != OPSET:
        yield f"opset {opset}, expected {OPSET}: read the file with lorac_exporters.onnx_file.read_graph"
    inputs, outputs = model.graph.inputs, model.graph.outputs
    if len(inputs) != 1:
        yield f"{len(inputs)} inputs ({_names(inputs)}), expected one batch of samples: make the others constants"
    if len(outputs) != 1 and classifier:
        yield (
            f"{len(outputs)} outputs ({_names(outputs)}), expected the logits only: drop the others, or give the "
            "loss of all as a graph (--loss-graph)"
        )
    if len(inputs) == 1:
        yield from _input_problems(inputs[0])


def _names(values: Iterable[ir.Value]) -> str:
    return ", ".join(str(value.name) for value in values) or "none"


def _input_problems(value: ir.Value) -> Iterator[str]:
    if value.dtype != ir.DataType.FLOAT:
        kind = "unknown" if value.dtype is None else value.dtype.name.lower()
        yield f"input {value.name!r} is {kind}, expected float32: export the float model"
    if value.shape is None or len(value.shape) not in (2, 3, 4):
        yield (
            f"input {value.name!r} has shape {value.shape}, expected (batch, channels, height, width) of images, "
            "(batch, channels, length) or (batch, features) of signals"
        )
        return
    if any(not isinstance(dim, int) for dim in list(value.shape)[1:]):
        yield (
            f"input {value.name!r} has shape {value.shape}; all sizes but the batch must be numbers: "
            "choose one (lorac_exporters.shapes.fix_image_size), or export the model for one image size"
        )
    elif _is_channels_last(value):
        yield (
            f"input {value.name!r} has shape {value.shape} and is transposed first: it takes images with the "
            "channels last; export the model with channels first (tf2onnx: --inputs-as-nchw)"
        )


def _is_channels_last(value: ir.Value) -> bool:
    readers = [use.node for use in value.uses()]
    shape = list(value.shape or ())
    turned = bool(readers) and all(n.op_type == "Transpose" for n in readers)
    return turned and len(shape) > 2 and shape[-1] in (1, 3, 4)


def _node_problems(graph: ir.Graph) -> Iterator[str]:
    for node in graph:
        if node.domain != "":
            yield f"{describe(node)}: operator of {node.domain}, expected ONNX's own operators only"
        elif node.op_type in _CONTROL_FLOW or any(_is_subgraph(a) for a in node.attributes.values()):
            yield f"{describe(node)}: control flow; export the model by tracing it with one input size"
        elif node.op_type in _QUANTIZED:
            yield f"{describe(node)}: the model is quantized; give the float model it was made from"
        elif _is_training_node(node):
            yield f"{describe(node)}: in training mode; export the model in evaluation mode (model.eval())"


def _is_subgraph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _is_training_node(node: ir.Node) -> bool:
    if node.op_type == "BatchNormalization":
        return int_attribute(node, "training_mode", 0) != 0
    if node.op_type == "Dropout":
        mode = input_at(node, 2)
        if mode is None:
            return False
        known = ir.convenience.get_const_tensor(mode)  # also of a Constant node
        return known is None or bool(known.numpy())
    return False


def _type_problems(graph: ir.Graph) -> Iterator[str]:
    """float16 and float64 weights: their bytes would not be what a float32 adaptation writes."""
    for kind in _OTHER_FLOATS:
        found = [str(v.name) for v in graph.initializers.values() if v.dtype == kind and len(v.shape or ()) > 0]
        if found:
            yield (
                f"{len(found)} weights are {kind.name.lower()} ({', '.join(found[:3])} ...): "
                "give the float32 model; it can be converted after fusing"
            )
