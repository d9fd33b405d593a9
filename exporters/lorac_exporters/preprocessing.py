"""Preprocessing inside the graph: the app passes raw images, the file does the rest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lorac_exporters.graph_tools import constant, unique_name, value_names
from lorac_exporters.shapes import BATCH
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import InputSpec

_Facts = tuple[str | None, ir.DataType | None, tuple[int | str, ...]]  # of an input: name, type, shape


def add_preprocessing(model: ir.Model, spec: InputSpec) -> None:
    """Let a canonical graph take uint8 images (batch, height, width, channels) under the same input name.

    Puts ``(pixel * scale - mean) / std`` as one multiplication and one addition per channel in front of it, and the
    change to channels-first order. There is no inverse.

    Raises ConversionError if the graph does not take float32 images of ``spec``'s shape and name, or if ``spec`` is of
    signals.
    """
    image = model.graph.inputs[0]
    if not spec.is_image:
        raise ConversionError(
            f"only raw uint8 images are normalised inside of the graph; this model takes {spec.dtype} signals of shape "
            f"{spec.shape}, which the program normalises: (value * scale - mean) / std"
        )
    expected: _Facts = (spec.name, ir.DataType.FLOAT, (BATCH, *spec.shape))
    found = (image.name, image.dtype, tuple(str(d) if not isinstance(d, int) else d for d in image.shape or ()))
    if found != expected:
        raise ConversionError(f"the graph takes {_text(found)}, expected {_text(expected)}")
    raw = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.UINT8))
    raw.shape = ir.Shape([BATCH, *spec.raw_shape])
    image.name = unique_name(f"{spec.name}_normalized", value_names(model.graph))
    nodes = _nodes(model.graph, raw, spec)
    nodes[-1].outputs[0].name, nodes[-1].outputs[0].shape = image.name, image.shape
    image.replace_all_uses_with(nodes[-1].outputs[0])
    model.graph.inputs[0] = raw
    model.graph.insert_before(model.graph[0], nodes)


def _nodes(graph: ir.Graph, raw: ir.Value, spec: InputSpec) -> list[ir.Node]:
    std = np.asarray(spec.std, np.float64)
    factor = constant(graph, f"{spec.name}_factor", np.float32(spec.scale / std))
    offset = constant(graph, f"{spec.name}_offset", np.float32(-np.asarray(spec.mean, np.float64) / std))
    cast = ir.node("Cast", [raw], {"to": int(ir.DataType.FLOAT)})
    scaled = ir.node("Mul", [cast.outputs[0], factor])
    shifted = ir.node("Add", [scaled.outputs[0], offset])
    turned = ir.node("Transpose", [shifted.outputs[0]], {"perm": [0, 3, 1, 2]})
    nodes = [cast, scaled, shifted, turned]
    for node in nodes:
        node.name = f"{spec.name}_{node.op_type.lower()}"
        value = node.outputs[0]
        value.name, value.type, value.shape = node.name, ir.TensorType(ir.DataType.FLOAT), raw.shape
    return nodes


def _text(parts: _Facts) -> str:
    name, kind, shape = parts
    return f"{name!r} {'unknown' if kind is None else kind.name.lower()} {shape}"
