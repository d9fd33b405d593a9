"""Sites: inputs of layers, each named by its layer, at which small modules read a network or act on it.

A site is told by names alone, so that a PyTorch module and an exported graph have the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorac_exporters.blocks import inside
from lorac_exporters.plan import Layer, LoraConfig, Network

SKIP, GATES = "skip", "gates"  # kinds of modules at sites
FEWEST_BLOCKS = 3  # with fewer, every layer is a site


def chosen_sites(network: Network, config: LoraConfig) -> tuple[Layer, ...]:
    """The sites before the head's that lie in ``config.blocks``: the first layer of every block, in forward order.

    The layers of a block have the same parent, ``layer1.0`` of ``layer1.0.conv1``, or one below it. Where this gives
    fewer than `FEWEST_BLOCKS`, every layer is a block. The stem, the first convolution, is no site; in a network
    without convolutions every layer is one.
    """
    return tuple(layer for layer in all_sites(network) if inside(layer.name, config.blocks))


def all_sites(network: Network) -> list[Layer]:
    """Every site before the head's."""
    stem = network.convs[0].name if network.convs else None
    layers = [layer for layer in network.body if layer.obstacle is None and layer.name != stem]
    if not [layer for layer in network.body if len(layer.shape) > 2]:
        return layers
    firsts: dict[str, Layer] = {}
    for layer, block in zip(layers, blocks_of([layer.name for layer in layers]), strict=True):
        firsts.setdefault(block, layer)
    return list(firsts.values()) if len(firsts) >= FEWEST_BLOCKS else layers


def blocks_of(layers: Sequence[str]) -> list[str]:
    """The block of each layer: its parent, or the outermost one above it that is the parent of a layer as well.

    >>> blocks_of(["layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "conv5"])
    ['layer1.0', 'layer2.0', 'layer2.0', '']
    """
    parents = [name.rpartition(".")[0] for name in layers]
    outer = sorted(set(parents) - {""}, key=len)
    return [next((o for o in outer if parent == o or parent.startswith(f"{o}.")), parent) for parent in parents]


def channels_in(layer: Layer) -> int:
    """Channels of what a layer takes.

    >>> channels_in(Layer("conv", "conv.weight", None, (8, 2, 3, 3), groups=4))
    8
    """
    return layer.shape[1] * layer.groups


def head_sizes(network: Network) -> tuple[int, int]:
    """(classes, features) of the head, however its weight is stored."""
    weight = network.head_weight[1]
    classes = network.head_bias[1][0] if network.head_bias else weight[0]
    return classes, math.prod(weight) // classes


def head_is_convolution(network: Network) -> bool:
    """Whether the head is a convolution, over pixels or over pooled features."""
    return len(network.head_weight[1]) > 2
