"""Partial connections (PaCA, "Partial Connection Adaptation for Efficient Fine-Tuning", 2025).

A seeded random share of each weight's input channels trains directly; nothing is added to the network. Only these
channels of a layer's input are kept for the backward pass, and no gradient of a whole weight is ever formed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lorac_exporters.blocks import inside
from lorac_exporters.methods import parts
from lorac_exporters.methods.method import Method
from lorac_exporters.plan import Layer, LoraConfig, Network, Plan
from lorac_runtime.expected import channels_digest
from lorac_runtime.manifest import Partial, Trainable

_SINGLE = "a single input channel (of each group) is its whole weight"


def chosen_channels(layer: str, count: int, share: float, seed: int) -> tuple[int, ...]:
    """max(1, round(``share`` * ``count``)) of a layer's ``count`` input channels, in ascending order.

    They depend on nothing but the arguments, so that PyTorch and a device's graph always agree; the channels of a
    smaller share are among those of a larger one.

    >>> chosen_channels("layer1.0.conv1", 16, 0.25, 0), chosen_channels("layer1.0.conv1", 3, 0.25, 0)
    ((1, 5, 7, 10), (1,))
    """
    ranked = sorted(range(count), key=lambda channel: _rank(f"{seed} {layer} {channel}"))
    return tuple(sorted(ranked[: max(1, round(share * count))]))


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def plan_paca(network: Network, config: LoraConfig) -> Plan:
    """A share of the input channels of every convolution and fully connected layer; the head trains in full.

    Raises ValueError if one of ``config.blocks`` holds no layer that could train, or for ``small_layers`` "adapter".
    """
    if config.small_layers == "adapter":
        raise ValueError("small_layers 'adapter': method paca has no adapters; choose 'frozen' or 'full'")
    parts.check_blocks(network, config)
    fates = {layer: _fate(layer, config) for layer in network.body}
    partials = tuple(fate for fate in fates.values() if isinstance(fate, Partial))
    tensors = [_trained(fate) for fate in fates.values() if not isinstance(fate, str)]
    tensors += parts.biases(parts.usable(network.body, config)) if config.biases == "all" else []
    tensors += parts.head(network, config, with_bias=config.biases != "none")
    frozen = [(layer.name, fate) for layer, fate in fates.items() if isinstance(fate, str)]
    frozen += [(head, parts.OUTSIDE) for head in network.heads if not inside(head, config.blocks)]
    return Plan("paca", (), tuple(tensors), tuple(frozen), partials)


def partial_metadata(partials: Sequence[Partial], config: LoraConfig) -> dict[str, str]:
    """What an adapter file says of the channels that train; nothing where there are none."""
    if not partials:
        return {}
    return {"share": repr(config.share), "seed": str(config.seed), "channels": channels_digest(partials)}


def _fate(layer: Layer, config: LoraConfig) -> Partial | Trainable | str:
    """What becomes of a layer: some channels, its weight in full, or why it stays frozen."""
    if not inside(layer.name, config.blocks):
        return parts.OUTSIDE
    if (reason := layer.obstacle or layer.no_adapter) is not None:  # what takes no adapter does not train in part
        return reason
    if layer.shape[1] == 1 and config.share < 1:
        return Trainable(layer.weight, layer.shape, "weight") if config.small_layers == "full" else _SINGLE
    channels = chosen_channels(layer.name, layer.shape[1], config.share, config.seed)
    return Partial(layer.name, layer.weight, f"{layer.name}.partial", layer.shape, layer.groups, channels)


def _trained(fate: Partial | Trainable) -> Trainable:
    return Trainable(fate.tensor, fate.shape, "partial") if isinstance(fate, Partial) else fate


METHODS = (
    Method(
        "paca",
        "a random share of each weight's input channels, no adapters; the head in full",
        plan_paca,
        frozenset({"share", "blocks", "biases", "small_layers"}),
    ),
)
