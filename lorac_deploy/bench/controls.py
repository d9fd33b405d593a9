"""Files that must come out slower than their base, or must not: what shows that a latency benchmark can see at all.

All are made from an artifact's base.onnx and a fused file, and answer like the fused file, but for branches of fewer
channels than a change needs:

- ``unmerged``: weight-space adapters as constants. A runtime folds them at load: no slower, but for loading.
- ``adapters as inputs``: the same with lora_a and lora_b as inputs of the graph, so that nothing can be folded.
- ``adapter branch``: a k x k convolution to few channels and a 1 x 1 one back, beside each adapted convolution, as PEFT
  keeps it; its factors are the singular vectors of the weight's change.
- planted faults: one extra node in a fused file, one branch that was not folded (as wide as the change needs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import array, constant, convolutions, need, set_array, static_dims
from lorac_exporters.inject import inject
from lorac_exporters.plan import Plan
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import Manifest

Floats = npt.NDArray[np.float32]
ADAPTER_RANK = 8  # of branches for changes that are not of low rank
ROUNDING = 1e-4  # of a change that is the difference of two float32 weights, as a share of its largest singular value


def unmerged(base: ir.Model, manifest: Manifest, state: Mapping[str, npt.NDArray[Any]]) -> ir.Model:
    """``base`` with its adapters as constants beside the weights; ``state`` is in the manifest's coordinates.

    Raises ConversionError for an artifact without adapters, or whose batch normalisations are not folded.
    """
    if not manifest.adapters or manifest.coordinates != "folded":
        raise ConversionError(f"{manifest.model} ({manifest.method}) has no adapters that could stand beside weights")
    model = base.clone()
    values = {name: np.asarray(value, np.float32) for name, value in state.items()}
    inject(model, Plan(manifest.method, manifest.adapters, manifest.trainables, (), manifest.partials), values)
    return model


def with_inputs(model: ir.Model, names: list[str]) -> dict[str, Floats]:
    """Turn initializers into inputs of the graph, in place; returns their numbers, to be fed."""
    fed = {}
    for name in names:
        value = model.graph.initializers.pop(name)
        fed[name] = np.asarray(need_array(value), np.float32)
        value.const_value = None
        model.graph.inputs.append(value)
    return fed


def branches(fused: ir.Model, base: ir.Model, ranks: Mapping[str, int]) -> ir.Model:
    """``fused`` with its changed convolutions as the base's plus a branch; ``ranks`` by the weight's name.

    A rank is the most channels that a branch may have; a change of a higher one is cut.

    Raises ConversionError if no convolution of ``ranks`` is in the graph.
    """
    model, found = fused.clone(), 0
    for node in convolutions(model.graph):
        name = str(need(node.inputs[1]).name)
        if name in ranks:
            _add_branch(model.graph, node, need_array(base.graph.initializers[name]), ranks[name])
            found += 1
    if not found:
        raise ConversionError("no convolution takes a branch")
    return model


def branch_ranks(model: ir.Model, manifest: Manifest | None) -> dict[str, int]:
    """Channels of each adapted convolution's branch: the nominal rank, as somebody would give it to PEFT.

    Where nothing says which are adapted: `ADAPTER_RANK` for every convolution but the first.
    """
    weights = [str(need(node.inputs[1]).name) for node in convolutions(model.graph)]
    if manifest is None or not manifest.adapters:
        return dict.fromkeys(weights[1:] or weights, ADAPTER_RANK)
    return {a.weight: a.r for a in manifest.adapters if a.weight in weights}


def _add_branch(graph: ir.Graph, node: ir.Node, original: npt.NDArray[Any], rank: int) -> None:
    """Split the change of one convolution's weight off into two thin convolutions."""
    weight = need(node.inputs[1])
    changed = np.asarray(need_array(weight), np.float32)
    groups = node.attributes.get_int("group", 1)
    down, up = factors(changed - original, groups, rank)
    set_array(weight, np.asarray(original, np.float32))
    layer, y = str(weight.name), node.outputs[0]
    few = constant(graph, f"{layer}.branch_down", down)
    many = constant(graph, f"{layer}.branch_up", up)
    first = ir.node("Conv", [need(node.inputs[0]), few], dict(node.attributes), name=f"{layer}.down")
    second = ir.node("Conv", [first.outputs[0], many], {"group": groups}, name=f"{layer}.up")
    total = ir.node("Add", [y, second.outputs[0]], name=f"{layer}.sum")
    for made in (first, second, total):
        out = made.outputs[0]
        out.name, out.type, out.shape = f"{made.name}.out", y.type, y.shape
    if y.shape is not None:
        first.outputs[0].shape = ir.Shape([y.shape[0], down.shape[0], *y.shape[2:]])
    y.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, y)
    graph.insert_after(node, [first, second, total])


def factors(change: Floats, groups: int, rank: int) -> tuple[Floats, Floats]:
    """(down, up) of a weight's change (c_out, c_in/groups, *kernel), by singular values, each group for itself.

    down is (groups * r, c_in/groups, *kernel), up (c_out, r, 1, ...), r ``rank`` or the most that a group can use.

    >>> change = np.outer([1, 2, 3, 4], np.arange(18)).reshape(4, 2, 3, 3).astype(np.float32)
    >>> down, up = factors(change, 1, 2)
    >>> down.shape, up.shape
    ((2, 2, 3, 3), (4, 2, 1, 1))
    """
    c_out, *rest = change.shape
    parts = change.reshape(groups, c_out // groups, -1).astype(np.float64)
    r = min(rank, *parts.shape[1:])
    ups = [np.linalg.eigh(part @ part.T)[1][:, -r:] for part in parts]
    downs = [up.T @ part for up, part in zip(ups, parts, strict=True)]
    many = np.concatenate(ups).reshape(c_out, r, *[1] * (len(rest) - 1))
    return np.concatenate(downs).reshape(-1, *rest).astype(np.float32), many.astype(np.float32)


def exact_rank(change: Floats, groups: int) -> int:
    """The channels that a branch for a weight's change (c_out, c_in/groups, *kernel) needs, rounding aside.

    >>> exact_rank(np.outer([1, 2, 3, 4], np.arange(18)).reshape(4, 2, 3, 3).astype(np.float32), 1)
    1
    """
    parts = change.reshape(groups, change.shape[0] // groups, -1)
    return max(1, *(int(np.linalg.matrix_rank(part, rtol=ROUNDING)) for part in parts))


def extra_node(model: ir.Model) -> ir.Model:
    """A copy with one node too many: the largest feature map that an activation gives, to the power of almost 1.

    It changes no number by more than rounding, and costs some per cent. (A product with ones costs 0.4 % of a
    ResNet-18: no clock tells that from nothing, the structural check does.)
    """
    copy = model.clone()
    node = max(_activations(copy.graph), key=lambda n: _size(n.outputs[0]))
    y = node.outputs[0]
    exponent = constant(copy.graph, "planted.exponent", np.array(np.nextafter(np.float32(1), np.float32(2))))
    extra = ir.node("Pow", [y, exponent], name="planted.power")
    extra.outputs[0].name, extra.outputs[0].type, extra.outputs[0].shape = "planted.out", y.type, y.shape
    y.replace_all_uses_with(extra.outputs[0], replace_graph_outputs=True)
    extra.replace_input_with(0, y)
    copy.graph.insert_after(node, extra)
    return copy


def unfolded_branch(fused: ir.Model, base: ir.Model, ranks: Mapping[str, int]) -> ir.Model:
    """``fused`` with one convolution's change, that with the largest output, left as a branch.

    The branch has as many channels as the change needs to be exact.
    """
    nodes = {str(need(n.inputs[1]).name): n for n in convolutions(fused.graph)}
    name = max((n for n in ranks if n in nodes), key=lambda n: _size(nodes[n].outputs[0]))
    change = need_array(fused.graph.initializers[name]) - need_array(base.graph.initializers[name])
    groups = nodes[name].attributes.get_int("group", 1)
    return branches(fused, base, {name: exact_rank(np.asarray(change, np.float32), groups)})


def _activations(graph: ir.Graph) -> list[ir.Node]:
    """Nodes that give no negative numbers, of which a power is defined. Raises ConversionError if there is none."""
    found = [n for n in graph if n.op_type in ("Relu", "Clip", "Sigmoid", "HardSigmoid")]
    if not found:
        raise ConversionError("no activation takes an extra node behind it")
    return found


def _size(value: ir.Value) -> int:
    """Elements for one sample."""
    return math.prod(d for d in (static_dims(value) or (0,))[1:] if d)


def need_array(value: ir.Value) -> npt.NDArray[Any]:
    """The numbers of a constant. Raises ConversionError if it has none."""
    found = array(value)
    if found is None:
        raise ConversionError(f"{value.name} is computed in the graph, not stored in it")
    return found
