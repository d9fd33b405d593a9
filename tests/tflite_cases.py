"""Check lowering rules: the same numbers from onnxruntime and from both TFLite runtimes, at batch 1 and resized.

Feature maps go in and come out channels-last; the checks turn them.
"""

from __future__ import annotations

from collections.abc import Sequence

import gradient_cases
import numpy as np
import onnx_ir as ir
from exporter_graphs import legacy_export
from tflite_runtimes import PLAIN_KERNELS, RUNTIMES, answers
from torch import nn

from lorac_exporters.canonical import canonicalize
from lorac_exporters.graph_tools import array, name_of, set_array
from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.schema import to_bytes

Arrays = dict[str, np.ndarray]
EVERYWHERE = (*RUNTIMES, *PLAIN_KERNELS)
BATCHES = (1, 3)
TOLERANCE = 1e-5  # of the largest number, at least of 1

normal = gradient_cases.normal


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    return np.abs(normal(*shape, seed=seed)) + np.float32(0.1)


def graph(body: str, inputs: Arrays) -> ir.Model:
    """A graph that computes ``y`` from ``x``, whose batch is free; all other inputs become initializers."""
    return gradient_cases.graph_of(body, inputs, fixed=[name for name in inputs if name != "x"])


def network_of(body: str, inputs: Arrays) -> Network:
    """What `graph` is lowered to."""
    return lower(graph(body, inputs))


def from_torch(net: nn.Module, *shape: int) -> ir.Model:
    """The canonical graph of a classifier; ``shape`` is that of one sample."""
    return canonicalize(ir.from_proto(legacy_export(net, (2, *shape), opset_version=18))).model


def check(body: str, inputs: Arrays, *, tolerance: float = TOLERANCE, runtimes: Sequence[str] = RUNTIMES) -> Network:
    """Lower `graph`, and hold every runtime's answers against onnxruntime's; returns the network.

    The batch of ``x`` does not matter: samples are drawn anew for each of `BATCHES`.
    """
    x = inputs["x"]
    made = [np.resize(x, (batch, *x.shape[1:])) * _scales(batch, x.ndim) for batch in BATCHES]
    return check_model(graph(body, inputs), *made, tolerance=tolerance, runtimes=runtimes)


def check_model(
    model: ir.Model, *inputs: np.ndarray, tolerance: float = TOLERANCE, runtimes: Sequence[str] = RUNTIMES
) -> Network:
    """Lower a graph of one input, and hold every runtime's answers to each of ``inputs`` against onnxruntime's."""
    network = lower(model)
    content = to_bytes(network)
    name = name_of(model.graph.inputs[0])
    for x in inputs:
        expected = gradient_cases.run(model, {name: x})
        for runtime in runtimes:
            found = answers(runtime, content, channels_last(x))
            for one, other in zip(found, expected, strict=True):
                assert_close(one, channels_last(other), tolerance, f"{runtime}, batch {len(x)}")
    return network


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE, where: str = "") -> None:
    """Within ``tolerance`` of the largest expected number, or of 1."""
    assert found.shape == expected.shape, (where, found.shape, expected.shape)
    assert np.isfinite(expected).all(), "the case itself makes no sense"
    allowed = tolerance * max(1.0, float(np.abs(expected).max(initial=0)))
    worst = float(np.abs(found.astype(np.float64) - expected).max(initial=0))
    assert worst <= allowed, f"{where}: {worst} apart, {allowed} allowed"


def channels_last(x: np.ndarray) -> np.ndarray:
    """(N, C, ...) as (N, ..., C)."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim > 2 else x


def node(op: str, inputs: str, **attributes: object) -> str:
    """A node that computes ``y``, in ONNX's text syntax.

    >>> node("MaxPool", "x", kernel_shape=(2, 2))
    'y = MaxPool <kernel_shape = [2, 2]> (x)'
    """
    written = ", ".join(f"{key} = {_text(value)}" for key, value in attributes.items())
    return f"y = {op} {f'<{written}> ' if written else ''}({inputs})"


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def only(network: Network, kind: str) -> Operator:
    """The one operator of its kind."""
    (found,) = [operator for operator in network.operators if operator.kind == kind]
    return found


def kinds(network: Network) -> list[str]:
    """The operators in order."""
    return [operator.kind for operator in network.operators]


def check_sources(model: ir.Model) -> dict[str, Tensor]:
    """New numbers written by each constant's `Source` must be what lowering the graph with them gives.

    Returns the constants that have a source, by the initializer's name.
    """
    before = lower(model)
    renewed = model.clone()
    values = {}
    for index, (name, value) in enumerate(renewed.graph.initializers.items()):
        old = array(value)
        if old is not None and old.dtype == np.float32:
            values[name] = normal(*old.shape, seed=100 + index)
            set_array(value, values[name])
    after = {t.name: t for t in lower(renewed).constants()}
    traced = [t for t in before.constants() if t.source is not None and t.source.name in values]
    for tensor in traced:
        assert np.array_equal(by_source(tensor, values[tensor.source.name]), after[tensor.name].data), tensor.name
    assert traced, "nothing to compare"
    return {tensor.source.name: tensor for tensor in traced}


def by_source(tensor: Tensor, value: np.ndarray) -> np.ndarray:
    """A new value of an initializer as a constant stores it."""
    source = tensor.source
    assert source is not None
    assert value.shape == source.shape
    viewed = value.reshape(source.view or source.shape)
    return (viewed if source.permute is None else viewed.transpose(source.permute)).reshape(tensor.shape)


def _scales(batch: int, rank: int) -> np.ndarray:
    """A number for each sample, so that samples differ."""
    return np.linspace(1.0, 1.5, batch, dtype=np.float32).reshape(batch, *(1,) * (rank - 1))
