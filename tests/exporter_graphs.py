"""Graphs for the tests of exporters: small ONNX models from text, and PyTorch networks with random statistics."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

Arrays = dict[str, np.ndarray]


def from_text(body: str, *, weights: Arrays, x: str = "float[batch,3,8,8] x", y: str = "float[batch,5] y") -> ir.Model:
    """A model of opset 18 with these nodes, input, output and initializers; names may hold dots."""
    without_dots = re.sub(r"(?<=[a-z])[.](?=[a-z])", "__", body)  # the parser knows none
    text = f'<ir_version: 9, opset_import: ["": 18]> g ({x}) => ({y}) {{ {without_dots} }}'
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
        node.output[:] = [name.replace("__", ".") for name in node.output]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return ir.from_proto(proto)


def numbers(**shapes: tuple[int, ...]) -> Arrays:
    """Random float32 tensors; ``_`` in a name stands for a dot. Variances are positive, gammas of both signs."""
    rng = np.random.default_rng(7)
    result = {}
    for key, shape in shapes.items():
        low = 0.5 if key.endswith("_var") else -1.0
        name = key.replace("running_", "running|").replace("_", ".").replace("|", "_")
        result[name] = rng.uniform(low, 1.5, shape).astype(np.float32)
    return result


def constants(**values: list[int] | list[float] | float) -> Arrays:
    """int64 for whole numbers, float32 for others."""
    arrays = {name: np.array(value) for name, value in values.items()}
    return {k: v.astype(np.int64 if v.dtype.kind == "i" else np.float32) for k, v in arrays.items()}


def outputs(model: ir.Model | onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """What onnxruntime computes, without any helper of ours."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def image(*shape: int, seed: int = 3) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same(found: np.ndarray, expected: np.ndarray, *, tolerance: float = 1e-4) -> None:
    """Within ``tolerance`` of the largest expected number (at least 1), and not trivially so."""
    assert found.shape == expected.shape
    assert np.ptp(expected) > 1e-3, "the test input makes no difference"
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def randomize(net: nn.Module, *, seed: int = 0) -> nn.Module:
    """Random statistics and affine parameters in every BN, among them negative and exactly zero gammas."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.4, 2.0, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.3, 1.5, generator=generator)
                    module.weight[::5] *= -1
                    module.weight[3::8] = 0.0
                    module.bias.uniform_(-0.3, 0.3, generator=generator)
    return net.eval()


def in_torch(net: nn.Module, x: np.ndarray) -> np.ndarray:
    """What PyTorch computes in evaluation mode."""
    with torch.no_grad():
        return net.eval()(torch.from_numpy(x)).numpy()


def legacy_export(net: nn.Module, shape: tuple[int, ...], **options: Any) -> onnx.ModelProto:
    """The TorchScript exporter that most ONNX files in the world come from."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own age in several ways
        torch.onnx.export(net.eval(), torch.zeros(shape), stream, dynamo=False, **options)
    return onnx.load_from_string(stream.getvalue())


def cnn() -> nn.Sequential:
    """Two convolutions with BN, a dropout, a head; input (batch, 3, 16, 16), 4 classes."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return randomize(net)
