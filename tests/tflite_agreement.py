"""Whether a .tflite file computes what its ONNX graph does: the comparison that all these tests share."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir
import onnxruntime
import tflite_runtimes
from tflite_runtimes import PLAIN_KERNELS, RUNTIMES, RuntimeCrashedError, RuntimeRefusedError

from lorac_exporters.canonical import canonicalize
from lorac_exporters.graph_tools import describe, need_graph, remove_unused
from lorac_exporters.graph_tools import to_bytes as onnx_bytes
from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.lowering import channels_last
from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.schema import to_bytes
from lorac_exporters.tflite.versions import settle
from lorac_runtime.errors import ConversionError

Arrays = list[np.ndarray]
TOLERANCE = 1e-5  # of the largest output, or of 1


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What became of a graph. ``errors``: the largest difference by runtime and batch, as a part of the largest output
    (at least 1); infinite where the runtime refused the file or gave another shape, and ``said`` holds its words.

    ``idle``: two different images give the same outputs, so that the comparison proves little.
    """

    refused: str | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    said: str = ""
    idle: bool = False

    @property
    def wrong(self) -> bool:
        return any(not error <= TOLERANCE for error in self.errors.values())


def judge(model: ir.Model, images: np.ndarray) -> Judgement:
    """Write a graph to TFLite and compare both runtimes with onnxruntime on ``images``, (2, channels, H, W)."""
    expected = in_onnxruntime(model, images)
    try:
        content = written(model)
    except ConversionError as err:
        return Judgement(str(err))
    idle = all(np.abs(y[0] - y[1]).max() <= 1e-3 for y in expected)
    return dataclasses.replace(compared(content, images, expected), idle=bool(idle))


def written(model: ir.Model) -> bytes:
    """The .tflite file of any graph."""
    return to_bytes(lowered(model))


def lowered(model: ir.Model) -> Network:
    network = lower(canonicalize(model, head=False).model)
    settle(network)
    return network


def in_onnxruntime(model: ir.Model, images: np.ndarray) -> Arrays:
    """Outputs, node by node as the graph says: without the optimizations that could share a fault with ours."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(onnx_bytes(model), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {session.get_inputs()[0].name: images}))


def compared(content: bytes, images: np.ndarray, expected: Arrays) -> Judgement:
    """A file against outputs in the order of ONNX's axes, for the batch and for its first image."""
    images, expected = as_stored(images), [as_stored(y) for y in expected]
    assert all(np.isfinite(y).all() for y in expected)
    errors, said = {}, []
    for runtime in (*RUNTIMES, *PLAIN_KERNELS):
        for batch in (len(images), 1) if runtime in RUNTIMES else (len(images),):
            key = f"{runtime}, batch {batch}"
            try:
                found = tflite_runtimes.answers(runtime, content, images[:batch])
                errors[key] = max(_error(*pair) for pair in zip(found, [y[:batch] for y in expected], strict=True))
            except (RuntimeRefusedError, RuntimeCrashedError) as err:
                errors[key] = math.inf
                said.append(str(err))
    return Judgement(errors=errors, said="\n".join(said))


def as_stored(array: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.ascontiguousarray(array.transpose(channels_last(array.ndim)))


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def first_wrong(model: ir.Model, images: np.ndarray) -> str:
    """The first node of the canonical graph that gives a wrong answer when the graph ends there, and its inputs."""
    canonical = canonicalize(model, head=False).model
    for position in range(len(canonical.graph)):
        cut = canonical.clone()
        node = cut.graph[position]
        cut.graph.outputs[:] = list(node.outputs[:1])
        remove_unused(cut)
        found = judge(cut, images)
        if found.wrong:
            nodes = "\n".join(map(str, need_graph(node)))
            return f"{describe(node)}: {found.errors} {found.said}\n{nodes}"
    return "none when the graph ends there"
