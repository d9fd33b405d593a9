"""What planners share: which layers may train, and the tensors of a head, of biases and of batch normalisations."""

from __future__ import annotations

from collections.abc import Iterable

from lorac_exporters.blocks import inside, require_blocks
from lorac_exporters.plan import Layer, LoraConfig, Network, layer_of
from lorac_runtime.manifest import Trainable

OUTSIDE = "outside of the trained blocks"


def check_blocks(network: Network, config: LoraConfig, *more: Trainable) -> None:
    """Raise ValueError if one of ``config.blocks`` names no layer of ``network``; ``more`` are tensors besides."""
    layers = [layer.name for layer in network.body] + [layer_of(t.name) for t in more]
    others = {name for name, _ in network.order} - {*layers}  # of stages, beside what the method could train
    require_blocks(tuple(block for block in config.blocks if block not in others), [*layers, *network.heads])


def usable(layers: Iterable[Layer], config: LoraConfig) -> list[Layer]:
    """Those that may train."""
    return [layer for layer in layers if layer.obstacle is None and inside(layer.name, config.blocks)]


def weights(layers: Iterable[Layer]) -> list[Trainable]:
    """Their weights, to be trained in full."""
    return [Trainable(layer.weight, layer.shape, "weight") for layer in layers]


def biases(layers: Iterable[Layer]) -> list[Trainable]:
    """Their biases, where they have any."""
    return [Trainable(layer.bias, (layer.shape[0],), "bias") for layer in layers if layer.bias is not None]


def affine(network: Network, config: LoraConfig) -> list[Trainable]:
    """Scale and shift of every batch normalisation that is a layer of its own."""
    tensors = [
        tensor
        for weight, bias, length in network.batchnorms
        for tensor in (Trainable(weight, (length,), "bn_weight"), Trainable(bias, (length,), "bn_bias"))
    ]
    return [t for t in tensors if inside(layer_of(t.name), config.blocks)]


def head(network: Network, config: LoraConfig, *, with_bias: bool) -> list[Trainable]:
    """The weights of the heads and, if wanted, their biases; nothing of those that lie outside of the blocks."""
    tensors = []
    if inside(network.head, config.blocks):
        tensors = [Trainable(*network.head_weight, "weight")]
        if with_bias and network.head_bias is not None:
            tensors.append(Trainable(*network.head_bias, "bias"))
    for layer in usable(network.more_heads, config):
        tensors += [*weights([layer]), *(biases([layer]) if with_bias else [])]
    return tensors


def frozen(network: Network, config: LoraConfig, trained: Iterable[Trainable], why: str) -> tuple[tuple[str, str], ...]:
    """(layer, reason) of every layer that does not train, the head last; ``why``: for want of a better reason."""
    names = {t.name for t in trained}
    reasons = {layer.name: layer.obstacle or why for layer in network.body if layer.weight not in names}
    for tensor in network.others:
        if tensor.name not in names:
            reasons.setdefault(layer_of(tensor.name), why)
    if network.head_weight[0] not in names:
        reasons[network.head] = why
    reasons |= {layer.name: layer.obstacle or why for layer in network.more_heads if layer.weight not in names}
    return tuple((name, text if inside(name, config.blocks) else OUTSIDE) for name, text in reasons.items())
