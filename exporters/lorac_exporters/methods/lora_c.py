"""LoRA-C (Ding et al., arXiv 2410.16954): low-rank updates of whole convolutions, stem and head in full."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lorac_exporters.blocks import inside
from lorac_exporters.methods import parts
from lorac_exporters.methods.method import Method
from lorac_exporters.plan import Layer, LoraConfig, Network, Plan
from lorac_runtime.delta import adapter_rank, adapter_shapes, is_smaller_than_weight, resolve_rank_mode
from lorac_runtime.manifest import Adapter, Trainable

OPTIONS = frozenset(f.name for f in dataclasses.fields(LoraConfig)) - {"seed"}


def plan_lora_c(network: Network, config: LoraConfig) -> Plan:
    """Adapters on every convolution but the first; the first and the head train in full (LoRA-C, section 3).

    Raises ValueError if one of ``config.blocks`` names neither a convolution, nor the head, nor what holds one.
    """
    parts.check_blocks(network, config)
    mode = resolve_rank_mode(config.rank_mode, network.backbone_parameters)
    convs = [c for c in network.convs if c.weight != network.head_weight[0]]
    adapters: list[Adapter] = []
    trainables: list[Trainable] = []
    frozen: list[tuple[str, str]] = []
    for index, conv in enumerate(convs):
        fate = _fate(conv, config, mode, stem=index == 0)
        if isinstance(fate, Adapter):
            adapters.append(fate)
            trainables += _adapter_tensors(fate, freeze_a=config.freeze_a)
        elif isinstance(fate, Trainable):
            trainables.append(fate)
        else:
            frozen.append((conv.name, fate))
    trainables += parts.biases(parts.usable(convs, config)) if config.biases == "all" else []
    trainables += parts.head(network, config, with_bias=config.biases != "none")
    return Plan("lora-c", tuple(adapters), tuple(trainables), tuple(frozen))


def _fate(conv: Layer, config: LoraConfig, mode: Literal["rk", "r"], *, stem: bool) -> Adapter | Trainable | str:
    """What becomes of a convolution: an adapter, its weight in full, or why it stays frozen."""
    if not inside(conv.name, config.blocks):
        return parts.OUTSIDE
    if conv.obstacle is not None:
        return conv.obstacle
    full = Trainable(conv.weight, conv.shape, "weight")
    if stem:
        return full
    adapter = _adapter(conv, config, mode)
    if config.small_layers == "adapter" or is_smaller_than_weight(conv.shape, adapter.rank):
        return adapter
    return full if config.small_layers == "full" else "its adapter would not be smaller than its weight"


def _adapter(conv: Layer, config: LoraConfig, mode: Literal["rk", "r"]) -> Adapter:
    return Adapter(
        layer=conv.name,
        weight=conv.weight,
        lora_a=f"{conv.name}.lora_a",
        lora_b=f"{conv.name}.lora_b",
        weight_shape=conv.shape,
        groups=conv.groups,
        r=config.rank,
        rank=adapter_rank(config.rank, conv.shape, mode),
        alpha=config.effective_alpha,
        layout=config.layout,
        lora_alpha=f"{conv.name}.lora_alpha" if config.learnable_alpha else None,
    )


def _adapter_tensors(adapter: Adapter, *, freeze_a: bool) -> list[Trainable]:
    """Those that train."""
    shape_a, shape_b = adapter_shapes(adapter.weight_shape, adapter.rank)
    tensors = [] if freeze_a else [Trainable(adapter.lora_a, shape_a, "lora_a")]
    tensors.append(Trainable(adapter.lora_b, shape_b, "lora_b"))
    if adapter.lora_alpha is not None:
        tensors.append(Trainable(adapter.lora_alpha, (1,), "alpha"))
    return tensors


METHODS = (
    Method(
        "lora-c", "low-rank adapters on every convolution but the first; stem and head in full", plan_lora_c, OPTIONS
    ),
)
