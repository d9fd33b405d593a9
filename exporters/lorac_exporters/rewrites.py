"""Operators that a training engine cannot differentiate, written out in operators that it can: equal values.

Only the copy that is trained is rewritten; base.onnx keeps its operators. The rules were measured on
onnxruntime-training 1.19.2. AveragePool has a gradient there, but its CPU kernel ends the process (SIGFPE).
"""

from __future__ import annotations

from collections.abc import Callable, Container

import onnx_ir as ir

from lorac_exporters import rewrite_activations as activations
from lorac_exporters import rewrite_layers as layers
from lorac_exporters.graph_tools import describe, nodes_of, replace_node
from lorac_exporters.rewrite_tape import Tape
from lorac_exporters.shapes import settle_shapes

Rule = Callable[[Tape], ir.Value | None]

RULES: dict[str, Rule] = {
    "AveragePool": layers.average_pool,
    "Celu": activations.celu,
    "DepthToSpace": layers.depth_to_space,
    "Elu": activations.elu,
    "GlobalMaxPool": layers.global_max_pool,
    "HardSigmoid": activations.hard_sigmoid,
    "HardSwish": activations.hard_swish,
    "InstanceNormalization": layers.instance_normalization,
    "LayerNormalization": layers.layer_normalization,
    "Mean": layers.mean_of,
    "Mish": activations.mish,
    "PRelu": activations.prelu,
    "Pad": layers.mirrored_pad,
    "ReduceMax": layers.reduce_max,
    "Selu": activations.selu,
    "Softplus": activations.softplus,
    "Softsign": activations.softsign,
    "SpaceToDepth": layers.space_to_depth,
    "Sum": layers.sum_of,
    "ThresholdedRelu": activations.thresholded_relu,
}


def rewrite_for_training(model: ir.Model, *, keep: Container[str] = ()) -> tuple[str, ...]:
    """Write out, in place, every operator of a canonical graph that needs it and for which a rule exists.

    Operators in ``keep`` stay: the engine can differentiate them.
    Outputs stay equal but for rounding. What no rule covers is left for `lorac_exporters.preflight` to name.
    Returns what was changed, a line each.
    """
    changes = []
    for node in nodes_of(model.graph, *(name for name in RULES if name not in keep)):
        tape = Tape(node)
        result = RULES[node.op_type](tape)
        if result is not None and tape.nodes:
            changes.append(f"{describe(node)}: written out as {', '.join(n.op_type for n in tape.nodes)}")
            replace_node(node, tape.nodes, result)
    settle_shapes(model)
    return tuple(changes)
