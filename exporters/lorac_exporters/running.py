"""Run a graph once with onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from lorac_exporters.graph_tools import name_of, to_bytes
from lorac_runtime.errors import ConversionError

Floats = npt.NDArray[np.float32]

# onnxruntime's errors have no common base below Exception
REFUSALS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def run(model: ir.Model, images: Floats) -> Floats:
    """The output of a model with one input, computed by onnxruntime on one thread; several as one, (N, all of them).

    Raises ConversionError if onnxruntime cannot run it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {name_of(model.graph.inputs[0]): images})
    except REFUSALS as err:
        raise ConversionError(f"onnxruntime cannot run the model on {images.shape}: {err}") from err
    return joined(outputs)


def joined(outputs: Sequence[Floats]) -> Floats:
    """An output as it is; several with a row per sample each, (N, ...), side by side: (N, all of them)."""
    if len(outputs) == 1:
        return outputs[0]
    return np.concatenate([np.asarray(output).reshape(len(output), -1) for output in outputs], axis=1)


def run_node(node: ir.Node, *inputs: Floats) -> Floats:
    """The first output of one ONNX node, alone, with its attributes and these inputs."""
    graph_inputs = [
        ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
        for i, x in enumerate(inputs)
    ]
    twin = ir.Node("", node.op_type, graph_inputs, list(node.attributes.values()))
    twin.outputs[0].name, twin.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(graph_inputs[:1], twin.outputs, nodes=[twin], opset_imports={"": 18}, name="node")
    for value, numbers in zip(graph_inputs[1:], inputs[1:], strict=True):
        value.const_value = ir.tensor(numbers, name=value.name)
        graph.register_initializer(value)
    return run(ir.Model(graph, ir_version=9), inputs[0])
