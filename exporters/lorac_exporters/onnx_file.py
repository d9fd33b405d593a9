"""Read a user's ONNX file into the graph form that the passes work on: one file, opset 18."""

from __future__ import annotations

from pathlib import Path

import google.protobuf.message
import onnx
import onnx.version_converter
import onnx_ir as ir

from lorac_exporters.support import OPSET
from lorac_runtime.errors import ConversionError

OLDEST_OPSET = 7  # before it, BatchNormalization and Dropout meant something else at inference


def read_graph(path: Path) -> ir.Model:
    """The model in the file, external data loaded, converted to opset 18.

    >>> import tempfile
    >>> text = '<ir_version: 8, opset_import: ["": 13]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    >>> path = Path(tempfile.mkdtemp()) / "m.onnx"
    >>> onnx.save(onnx.parser.parse_model(text), path)
    >>> read_graph(path).opset_imports
    {'': 18}

    Raises ConversionError if the file is missing, no ONNX model, or of an opset that cannot be converted.
    """
    proto = _load(path)
    opset = _opset(proto, path)
    if opset != OPSET:
        proto = _converted(proto, opset, path)
    try:
        return ir.from_proto(proto)
    except (ValueError, TypeError, KeyError) as err:
        raise ConversionError(f"{path} is not a valid ONNX model: {err}") from err


def _load(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(path)  # also loads tensors from files beside it
    except FileNotFoundError as err:
        raise ConversionError(f"{err.filename or path} not found") from err
    except OSError as err:
        raise ConversionError(f"{path} cannot be read: {err.strerror or err}") from err
    except (google.protobuf.message.DecodeError, onnx.checker.ValidationError, ValueError) as err:
        raise ConversionError(f"{path} is not an ONNX model, or was cut short: {err}") from err
    if not proto.graph.node:
        raise ConversionError(f"{path} is not an ONNX model with a graph")
    return proto


def _opset(proto: onnx.ModelProto, path: Path) -> int:
    opsets = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if not opsets:
        raise ConversionError(f"{path} does not say which ONNX opset it uses; export it again")
    return int(opsets[0])


def _converted(proto: onnx.ModelProto, opset: int, path: Path) -> onnx.ModelProto:
    if opset < OLDEST_OPSET:
        raise ConversionError(
            f"{path} uses opset {opset}, expected {OLDEST_OPSET} or newer: export the model again with opset {OPSET}"
        )
    try:
        return onnx.version_converter.convert_version(_with_shapes(proto), OPSET)
    except (RuntimeError, ValueError) as err:
        raise ConversionError(
            f"{path} uses opset {opset} and cannot be converted to {OPSET} ({err}); "
            f"export the model again with opset {OPSET}"
        ) from err


def _with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The converter needs shapes for some operators (Upsample, Softmax before opset 13)."""
    try:
        return onnx.shape_inference.infer_shapes(proto)
    except (RuntimeError, ValueError):
        return proto
