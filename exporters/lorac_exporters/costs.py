"""What a training step costs, read off its graphs: multiply-adds, bytes moved, saved activations, interconnections.

Counts hold for the engine ``onnxruntime``; nothing is run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from lorac_exporters import training_step as steps
from lorac_exporters.gradients.tape import dims
from lorac_exporters.graph_tools import int_attribute, need
from lorac_exporters.memory import saved_activations
from lorac_exporters.memory_order import byte_size, execution_order
from lorac_exporters.prefix import PREFIX
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import ADAPTER, load

_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape"})


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """What one step of ``batch`` samples costs. ``multiply_adds`` are those of convolutions and matrix products.

    ``bytes_moved`` counts what every operator reads and writes, as if nothing stayed in a cache. The ``prefix`` figures
    are those of the frozen part in front, which runs once per sample where its results are kept; the others do not hold
    them. ``saved_bytes``: activations kept for the backward pass. ``interconnections``: values that pass from what is
    fixed to what trains, or back, in the forward pass. ``feature_bytes``: what is kept per sample; 0 without a prefix.
    """

    batch: int
    trained_parameters: int
    multiply_adds: int
    bytes_moved: int
    saved_bytes: int
    interconnections: int
    adapter_bytes: int
    prefix_multiply_adds: int = 0
    prefix_bytes_moved: int = 0
    feature_bytes: int = 0


def artifact_costs(folder: Path, batch: int | None = None) -> StepCosts:
    """The costs of a step of the artifact in ``folder``; ``batch`` None is the artifact's own.

    An artifact without a training step (method recalibrate) has the costs of its forward pass.

    Raises ArtifactError if the folder is no artifact, or has no files for the engine ``onnxruntime``.
    """
    manifest = load(folder)
    size = batch or manifest.training.batch_size
    if steps.EVAL not in manifest.files:
        raise ArtifactError(f"{folder} has no step graphs: export it with --engine onnxruntime")
    forward = ir.load(folder / steps.EVAL)
    whole = ir.load(folder / steps.TRAIN) if steps.TRAIN in manifest.files else forward
    prefix = ir.load(folder / PREFIX) if PREFIX in manifest.files else None
    features = set() if prefix is None else {str(v.name) for v in prefix.graph.outputs}
    return StepCosts(
        batch=size,
        trained_parameters=manifest.trained_parameters,
        multiply_adds=multiply_adds(whole, size),
        bytes_moved=bytes_moved(whole, size),
        saved_bytes=0 if whole is forward else saved_activations(whole, size),
        interconnections=interconnections(forward, {t.name for t in manifest.trainables}, features),
        adapter_bytes=manifest.files[ADAPTER].nbytes,
        prefix_multiply_adds=0 if prefix is None else multiply_adds(prefix, size),
        prefix_bytes_moved=0 if prefix is None else bytes_moved(prefix, size),
        feature_bytes=0 if prefix is None else sum(byte_size(v, 1) for v in prefix.graph.outputs),
    )


def multiply_adds(model: ir.Model, batch: int) -> int:
    """Multiply-adds of all convolutions and matrix products that run at every step, for ``batch`` samples.

    Raises ValueError naming a value whose size the graph does not tell.
    """
    return sum(_multiply_adds(node, batch) for node in execution_order(model.graph))


def bytes_moved(model: ir.Model, batch: int) -> int:
    """Bytes that operators read and write at every step; views cost nothing.

    Raises ValueError naming a value whose size the graph does not tell.
    """
    nodes = [node for node in execution_order(model.graph) if node.op_type not in _VIEWS]
    values = (v for node in nodes for v in (*node.inputs, *node.outputs) if v is not None)
    return sum(byte_size(value, batch) for value in values)


def interconnections(model: ir.Model, trained: set[str], features: Collection[str] = ()) -> int:
    """How many inputs of fixed layers come from trained ones, and of trained layers from fixed ones.

    ``trained`` names its inputs that train, ``features`` those that a frozen part computed. Layers are operators with
    parameters; what has none belongs to no side and is looked through. (Aswani et al., arXiv 2110.10969, name this as
    a criterion; how it is counted is ours.)
    """
    sides = _sides(model.graph, trained)
    origins = {v: frozenset({False}) for v in model.graph.inputs if v.name in features}  # do their layers train?
    crossings = 0
    for node in model.graph:
        given = [origins[v] for v in node.inputs if v in origins]
        passed = frozenset().union(*given)
        if node in sides:
            crossings += sum((not sides[node]) in origin for origin in given)
            passed = frozenset({sides[node]})
        origins |= dict.fromkeys(node.outputs, passed)
    return crossings


def _sides(graph: ir.Graph, trained: set[str]) -> dict[ir.Node, bool]:
    """Operators with parameters: True where one of these trains."""
    parametric = dict.fromkeys(graph.initializers.values(), False)
    parametric |= {value: value.name in trained for value in graph.inputs if "batch" not in dims(value)}
    sides = {}
    for node in graph:
        given = [v for v in node.inputs if v is not None]
        known = [parametric[v] for v in given if v in parametric]
        if len(known) == len(given):
            parametric |= dict.fromkeys(node.outputs, any(known))
        elif any(known) or any(_is_weight(v) for v in given if v in parametric):
            sides[node] = any(known)
    return sides


def _is_weight(value: ir.Value) -> bool:
    """Whether a constant is a parameter of the model, which lies in base.onnx, and not a setting of an operator."""
    return isinstance(value.const_value, ir.ExternalTensor)


def _multiply_adds(node: ir.Node, batch: int) -> int:
    if node.op_type == "Conv":
        return _elements(node.outputs[0], batch) * math.prod(_sizes(need(node.inputs[1]), batch)[1:])
    if node.op_type == "ConvTranspose":
        return _elements(need(node.inputs[0]), batch) * math.prod(_sizes(need(node.inputs[1]), batch)[1:])
    if node.op_type in ("Gemm", "MatMul"):
        inner = _sizes(need(node.inputs[0]), batch)
        turned = node.op_type == "Gemm" and int_attribute(node, "transA", 0)
        return _elements(node.outputs[0], batch) * inner[-2 if turned else -1]
    return 0


def _elements(value: ir.Value, batch: int) -> int:
    return byte_size(value, batch) // 4


def _sizes(value: ir.Value, batch: int) -> tuple[int, ...]:
    """The axes of a value; one that its graph leaves open follows from the number of elements."""
    found = [batch if d == "batch" else d for d in dims(value)]
    known = [d for d in found if isinstance(d, int)]
    if len(known) < len(found) - 1:
        raise ValueError(f"the size of {value.name!r} is not known; its shape is {value.shape}")
    rest = _elements(value, batch) // max(1, math.prod(known))
    return tuple(d if isinstance(d, int) else rest for d in found)
