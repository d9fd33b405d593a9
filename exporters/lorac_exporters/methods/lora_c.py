"""LoRA-C (Ding et al., arXiv 2410.16954): low-rank updates of whole weights, stem and head in full; and its variants.

``lora-kernel`` is the paper's ablation with a pair of factors for each output channel. ``lora-all`` gives every layer
an adapter and trains none in full: the baseline LoRA-All of Skip2-LoRA (Matsutani et al., arXiv 2410.21073).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lorac_exporters.blocks import inside
from lorac_exporters.methods import parts
from lorac_exporters.methods.method import Method
from lorac_exporters.plan import Layer, LoraConfig, Network, Plan
from lorac_runtime.delta import adapter_rank, adapter_shapes, is_smaller_than_weight, resolve_rank_mode
from lorac_runtime.manifest import Adapter, Trainable

KERNEL_WISE = frozenset({"rank", "alpha", "layout", "learnable_alpha", "biases", "small_layers", "freeze_a", "blocks"})
LAYER_WISE = KERNEL_WISE | {"rank_mode", "linear"}

Mode = Literal["rk", "r"]
Fate = Adapter | Trainable | str  # an adapter, the weight in full, or why it stays frozen
Fates = list[tuple[Layer, Fate]]

_TOO_LARGE = "its adapter would not be smaller than its weight"
_NOT_ASKED = "fully connected: beside convolutions it gets an adapter only with the setting linear"
_NO_KERNELS = "fully connected: it has no kernels"


def plan_lora_c(network: Network, config: LoraConfig) -> Plan:
    """Adapters on every convolution but the first; the first and the head train in full (LoRA-C, section 3).

    A network without convolutions has the same done to its fully connected layers. With ``config.linear`` those that
    lie behind convolutions get adapters too.

    Raises ValueError if one of ``config.blocks`` names no layer that could train.
    """
    parts.check_blocks(network, config)
    mode = _mode(network, config)
    convs, linears = _hidden(network)
    adapted = [*convs, *(linears if config.linear or not convs else [])]
    fates: Fates = [
        (layer, _fate(layer, config, _layer_wise(layer, config, mode), stem=index == 0))
        for index, layer in enumerate(adapted)
    ]
    fates += [(layer, _reason(layer, config) or _NOT_ASKED) for layer in linears if layer not in adapted]
    head = parts.head(network, config, with_bias=config.biases != "none")
    return _plan(fates, config, biased=adapted, head=head)


def plan_lora_kernel(network: Network, config: LoraConfig) -> Plan:
    """As `plan_lora_c`, with a pair of factors for each output channel of a convolution (LoRA-C's ablation).

    Parameters of a layer: c_out * (c_in/groups * r * k_w + r * k_h), not below the weight's own where r >= k_h.

    Raises ValueError if one of ``config.blocks`` names no layer that could train, or no layer is large enough for an
    adapter of this rank.
    """
    parts.check_blocks(network, config)
    convs, linears = _hidden(network)
    fates: Fates = [
        (conv, _fate(conv, config, _kernel_wise(conv, config), stem=index == 0)) for index, conv in enumerate(convs)
    ]
    fates += [(layer, _reason(layer, config) or _NO_KERNELS) for layer in linears]
    _require_adapters(fates, config)
    head = parts.head(network, config, with_bias=config.biases != "none")
    return _plan(fates, config, biased=convs, head=head)


def plan_lora_all(network: Network, config: LoraConfig) -> Plan:
    """An adapter on every convolution and fully connected layer, stem and head among them; no weight in full.

    Raises ValueError if one of ``config.blocks`` names no layer that could train.
    """
    parts.check_blocks(network, config)
    mode = _mode(network, config)
    layers = [*network.body, _head_layer(network), *network.more_heads]
    fates: Fates = [
        (layer, _reason(layer, config) or layer.no_adapter or _layer_wise(layer, config, mode)) for layer in layers
    ]
    bias = [t for t in parts.head(network, config, with_bias=config.biases != "none") if t.role == "bias"]
    return _plan(fates, config, biased=network.body, head=bias)


def _mode(network: Network, config: LoraConfig) -> Mode:
    return resolve_rank_mode(config.rank_mode, network.backbone_parameters)


def _hidden(network: Network) -> tuple[list[Layer], list[Layer]]:
    """Convolutions and fully connected layers, the head not among them."""
    return list(network.hidden_convs), list(network.hidden_linears)


def _head_layer(network: Network) -> Layer:
    """The classifier as a layer that may take an adapter."""
    weight, shape = network.head_weight
    own = Layer(network.head, weight, None, shape, obstacle=network.head_obstacle)
    return next((conv for conv in network.convs if conv.weight == weight), own)


def _fate(layer: Layer, config: LoraConfig, adapter: Adapter, *, stem: bool) -> Fate:
    """What becomes of a layer that would get ``adapter``; the stem trains in full."""
    reason = _reason(layer, config)
    if reason is not None:
        return reason
    full = Trainable(layer.weight, layer.shape, "weight")
    if stem:
        return full
    if layer.no_adapter is not None:
        return layer.no_adapter
    if config.small_layers == "adapter" or is_smaller_than_weight(layer.shape, adapter.rank, adapter.pairs):
        return adapter
    return full if config.small_layers == "full" else _TOO_LARGE


def _reason(layer: Layer, config: LoraConfig) -> str | None:
    """Why a layer must stay frozen; None if it need not."""
    return layer.obstacle if inside(layer.name, config.blocks) else parts.OUTSIDE


def _layer_wise(layer: Layer, config: LoraConfig, mode: Mode) -> Adapter:
    return _adapter(layer, config, rank=adapter_rank(config.rank, layer.shape, mode))


def _kernel_wise(layer: Layer, config: LoraConfig) -> Adapter:
    return _adapter(layer, config, rank=config.rank, pairs=layer.shape[0])


def _adapter(layer: Layer, config: LoraConfig, *, rank: int, pairs: int = 1) -> Adapter:
    return Adapter(
        layer=layer.name,
        weight=layer.weight,
        lora_a=f"{layer.name}.lora_a",
        lora_b=f"{layer.name}.lora_b",
        weight_shape=layer.shape,
        groups=layer.groups,
        r=config.rank,
        rank=rank,
        alpha=config.effective_alpha,
        layout=config.layout,
        lora_alpha=f"{layer.name}.lora_alpha" if config.learnable_alpha else None,
        pairs=pairs,
    )


def _require_adapters(fates: Fates, config: LoraConfig) -> None:
    """Raise ValueError where kernel-wise adapters were wanted and not one came about."""
    names = [layer.name for layer, fate in fates if fate in (_TOO_LARGE, _NO_KERNELS)]
    if names and not any(isinstance(fate, Adapter) for _, fate in fates):
        raise ValueError(
            f"rank {config.rank} gives no layer a kernel-wise adapter ({_few(names)}): one is smaller "
            "than the weight only where the rank is below the height of the kernel; take a lower rank, or small_layers "
            "adapter or full"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _plan(fates: Fates, config: LoraConfig, *, biased: Iterable[Layer], head: list[Trainable]) -> Plan:
    """``biased`` are the layers whose biases train where all do, ``head`` are the head's own tensors."""
    adapters = tuple(fate for _, fate in fates if isinstance(fate, Adapter))
    trainables = [tensor for _, fate in fates for tensor in _tensors(fate, freeze_a=config.freeze_a)]
    trainables += parts.biases(parts.usable(biased, config)) if config.biases == "all" else []
    frozen = tuple((layer.name, fate) for layer, fate in fates if isinstance(fate, str))
    return Plan("lora-c", adapters, (*trainables, *head), frozen)


def _tensors(fate: Fate, *, freeze_a: bool) -> list[Trainable]:
    """What trains of a layer's weight."""
    if isinstance(fate, Adapter):
        return _adapter_tensors(fate, freeze_a=freeze_a)
    return [fate] if isinstance(fate, Trainable) else []


def _adapter_tensors(adapter: Adapter, *, freeze_a: bool) -> list[Trainable]:
    shape_a, shape_b = adapter_shapes(adapter.weight_shape, adapter.rank, adapter.pairs)
    tensors = [] if freeze_a else [Trainable(adapter.lora_a, shape_a, "lora_a")]
    tensors.append(Trainable(adapter.lora_b, shape_b, "lora_b"))
    if adapter.lora_alpha is not None:
        tensors.append(Trainable(adapter.lora_alpha, (1,), "alpha"))
    return tensors


METHODS = (
    Method(
        "lora-c",
        "low-rank adapters on every convolution but the first; stem and head in full",
        plan_lora_c,
        LAYER_WISE,
        adapts=True,
    ),
    Method(
        "lora-kernel",
        "lora-c with a pair of factors for each output channel",
        plan_lora_kernel,
        KERNEL_WISE,
        adapts=True,
    ),
    Method(
        "lora-all",
        "low-rank adapters on every layer, stem and head too; no weight in full",
        plan_lora_all,
        LAYER_WISE - {"small_layers", "linear"},
        adapts=True,
    ),
)
