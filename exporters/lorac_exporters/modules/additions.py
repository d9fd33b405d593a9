"""What the modules of a plan add to a graph, counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from lorac_exporters.canonical import Canonical
from lorac_exporters.gradients.tape import sizes
from lorac_exporters.graph_tools import need
from lorac_exporters.modules import gates, skips
from lorac_exporters.plan import LoraConfig, Plan, SiteModule
from lorac_runtime.additions import Additions


def additions(plan: Plan, config: LoraConfig, *, before: Canonical, after: Canonical) -> Additions | None:
    """What ``after`` holds more than ``before``, the same graph without the modules; None if the plan has none."""
    if not plan.modules:
        return None
    known = {node.name for node in before.model.graph}
    new = [node for node in after.model.graph if node.name not in known]
    return Additions(
        sites=tuple(module.layer for module in plan.modules),
        nodes=len(new),
        parameters=sum(math.prod(t.shape) for module in plan.modules for t in module.tensors),
        multiply_adds=sum(_multiply_adds(node) for node in new),
        **_settings(plan.modules, config),
    )


def module_metadata(modules: Sequence[SiteModule], config: LoraConfig) -> dict[str, str]:
    """The settings of ``modules`` as the metadata of an adapter file have them; see `Additions.settings`."""
    return Additions((), 0, 0, 0, **_settings(modules, config)).settings


def _settings(modules: Sequence[SiteModule], config: LoraConfig) -> dict[str, Any]:
    kinds = {module.kind for module in modules}
    skip = {"rank": config.rank, "alpha": config.effective_alpha} if skips.KIND in kinds else {}
    return {**skip, **({"reduction": config.reduction} if gates.KIND in kinds else {})}


def _multiply_adds(node: ir.Node) -> int:
    """Those of one sample, where the node is a convolution or a matrix product."""
    if node.op_type not in ("Conv", "Gemm"):
        return 0
    positions = math.prod(sizes(node.outputs[0], 2)) if node.op_type == "Conv" else 1
    return math.prod(sizes(need(node.inputs[1]))) * positions
