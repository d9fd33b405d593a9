"""Put the modules of a plan into a canonical graph, as ordinary nodes and initializers that change no output yet."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.canonical import Canonical
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import array, name_of, nodes_of, value_names
from lorac_exporters.heads import find_head
from lorac_exporters.modules import gates, skips
from lorac_exporters.plan import Plan, SiteModule
from lorac_runtime.errors import ConversionError, listed

Floats = npt.NDArray[np.float32]
KINDS = {skips.KIND: skips.insert, gates.KIND: gates.insert}
UNIFORM = (".skip_a", ".gate_down")  # tensors that start at random; the others start at zero


def with_modules(canonical: Canonical, plan: Plan, *, seed: int) -> Canonical:
    """A copy whose graph holds the modules of ``plan``; its outputs are the same. The same seed gives the same numbers.

    Raises ConversionError if a module's layer is not in the graph, or one of its tensors' names is taken.
    """
    if not plan.modules:
        return canonical
    model = canonical.model.clone()
    layers = _layers(model.graph, plan)
    _require_free_names(model.graph, plan)
    values = starting_numbers(plan.modules, seed=seed)
    tape = Tape(model.graph)
    for kind, insert in KINDS.items():
        modules = [m for m in plan.modules if m.kind == kind]
        tensors = {m.layer: [tape.constant(values[t.name], t.name) for t in m.tensors] for m in modules}
        if modules:
            insert(tape, modules, layers, tensors, find_head(model).node)
    model.graph.sort()
    return dataclasses.replace(
        canonical, model=model, values=canonical.values | values, added=canonical.added | values.keys()
    )


def starting_numbers(modules: tuple[SiteModule, ...], *, seed: int) -> dict[str, Floats]:
    """First numbers of every tensor: what projects down Kaiming uniform (a = sqrt 5), all others zero.

    So a skip adapter adds 0, and a gate is 2 * sigmoid(0) = 1.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, Floats] = {}
    for tensor in (t for module in modules for t in module.tensors):
        bound = 1.0 / math.sqrt(math.prod(tensor.shape[1:])) if tensor.name.endswith(UNIFORM) else 0.0
        values[tensor.name] = rng.uniform(-bound, bound, tensor.shape).astype(np.float32)
    return values


def _layers(graph: ir.Graph, plan: Plan) -> dict[str, ir.Node]:
    """The node of each module's layer, by the layer's name."""
    nodes = {
        name_of(n.inputs[1]): n for n in nodes_of(graph, "Conv", "Gemm", "MatMul") if array(n.inputs[1]) is not None
    }
    missing = [m.layer for m in plan.modules if m.weight not in nodes]
    if missing:
        raise ConversionError(f"no layer of the graph uses the weight of {', '.join(missing)}; was the graph changed?")
    return {m.layer: nodes[m.weight] for m in plan.modules}


def _require_free_names(graph: ir.Graph, plan: Plan) -> None:
    taken = value_names(graph)
    names = [t.name for m in plan.modules for t in m.tensors if t.name in taken]
    if names:
        raise ConversionError(listed("these names of the model are those of the added modules; rename:", names))
