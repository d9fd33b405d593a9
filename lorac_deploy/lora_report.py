"""What `lorac_deploy.lora.attach` says about a network it prepared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lorac_exporters.plan import LoraConfig, Network, Plan, SiteModule
from lorac_runtime.delta import resolve_rank_mode
from lorac_runtime.expected import fixed_tensors
from lorac_runtime.manifest import Adapter, BnPolicy, Partial, Trainable


@dataclass(frozen=True)
class AttachReport:
    """What a method trains in one network. Tensor names are state-dict keys.

    ``frozen`` lists (layer, reason) of every convolution or other layer whose weight does not change; BN layers
    follow the BN policy and are not listed. ``rank_mode`` is the resolved one. ``model_parameters`` counts the
    network itself, adapters not included.
    """

    method: str
    config: LoraConfig
    bn_policy: BnPolicy
    rank_mode: Literal["rk", "r"]
    head: str
    adapters: tuple[Adapter, ...]
    trainables: tuple[Trainable, ...]
    frozen: tuple[tuple[str, str], ...]
    model_parameters: int
    partials: tuple[Partial, ...] = ()
    modules: tuple[SiteModule, ...] = ()

    @property
    def trained_parameters(self) -> int:
        """Number of trainable elements."""
        return sum(math.prod(t.shape) for t in self.trainables)

    @property
    def fixed(self) -> dict[str, tuple[int, ...]]:
        """Tensors of adapters that do not train (``lora_a`` under ``freeze_a``), with their shapes."""
        return fixed_tensors(self.adapters, self.trainables)

    @property
    def full(self) -> tuple[str, ...]:
        """Names of the network's own tensors that train."""
        added = {t.name for module in self.modules for t in module.tensors}
        kinds = ("lora_a", "lora_b", "alpha", "partial")
        return tuple(t.name for t in self.trainables if t.role not in kinds and t.name not in added)

    def __str__(self) -> str:
        share = 100 * self.trained_parameters / max(1, self.model_parameters)
        fixed = sum(math.prod(shape) for shape in self.fixed.values())
        return (
            f"{self.method}: {self.trained_parameters:,} trained of {self.model_parameters:,} parameters "
            f"({share:.2f} %); {len(self.adapters)} adapted layers, {len(self.full)} tensors in full, "
            f"{len(self.frozen)} layers frozen"
            + (f"; some channels of {len(self.partials)} layers" if self.partials else "")
            + (f"; modules at {len(self.modules)} sites" if self.modules else "")
            + (f"; lora_a frozen, {fixed:,} parameters" if fixed else "")
        )


def attach_report(network: Network, plan: Plan, *, config: LoraConfig, bn_policy: BnPolicy) -> AttachReport:
    """Facts about a network and a plan for it, as one report."""
    trained = {t.name for t in plan.trainables}
    listed_already = {name for name, _ in plan.frozen}
    layers = dict.fromkeys(t.name.rpartition(".")[0] for t in network.others if t.name not in trained)
    others = tuple((name, f"not trained by {plan.method}") for name in layers if name not in listed_already)
    head = [shape for _, shape in (network.head_weight, network.head_bias or ("", (0,)))]
    return AttachReport(
        method=plan.method,
        config=config,
        bn_policy=bn_policy,
        rank_mode=resolve_rank_mode(config.rank_mode, network.backbone_parameters),
        head=network.head_weight[0].rpartition(".")[0],
        adapters=plan.adapters,
        trainables=plan.trainables,
        frozen=plan.frozen + others,
        model_parameters=network.backbone_parameters + sum(math.prod(shape) for shape in head),
        partials=plan.partials,
        modules=plan.modules,
    )
