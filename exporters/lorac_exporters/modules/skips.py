"""Skip adapters in a graph: logits + scale * sum over sites of pool(x) A^T B^T.

Skip-LoRA (Matsutani et al., arXiv 2410.21073): y_n = x_n W_n + b_n + sum_k x_k A_k B_k. Pooling a map of features
first is an extension of this project, for convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import need, producer
from lorac_exporters.modules.pooling import pooled
from lorac_exporters.modules.sites import SKIP
from lorac_exporters.plan import SiteModule

KIND = SKIP
TOTAL = "with_skips"  # the node that adds to the logits


def insert(
    tape: Tape,
    modules: Sequence[SiteModule],
    layers: Mapping[str, ir.Node],
    tensors: Mapping[str, Sequence[ir.Value]],
    head: ir.Node,
) -> None:
    """Add the branches of ``modules`` to what ``head`` gives, in place.

    ``tensors`` of each layer are A (rank, channels) and B (classes, rank).
    """
    total: ir.Value | None = None
    for module in modules:
        a, b = tensors[module.layer]
        x = pooled(tape, layers[module.layer], module.layer)
        shape = (dims(x)[0], sizes(a)[0])
        hidden = tape.op("Gemm", x, a, shape=shape, name=f"{module.layer}.skip_hidden", attributes={"transB": 1})
        summed = () if total is None else (total,)
        shape = (dims(x)[0], sizes(b)[0])
        total = tape.op("Gemm", hidden, b, *summed, shape=shape, name=f"{module.layer}.skip", attributes={"transB": 1})
    scaled = tape.op("Mul", need(total), modules[0].scale, like=need(total), name="skip_scaled")
    _add_to(tape, head.outputs[0], scaled, name=TOTAL)


def _add_to(tape: Tape, logits: ir.Value, more: ir.Value, *, name: str) -> None:
    """``logits + more`` wherever ``logits`` was read; an output of the graph keeps its name."""
    total = tape.op("Add", logits, more, like=logits, name=name)
    was_output, old = logits.is_graph_output(), logits.name
    logits.replace_all_uses_with(total, replace_graph_outputs=True)
    producer(total).replace_input_with(0, logits)
    if was_output:
        logits.name, total.name = total.name, old
