"""Gates over channels and positions at the input of every block, and the head."""

from __future__ import annotations

from lorac_exporters.blocks import inside
from lorac_exporters.methods import parts
from lorac_exporters.methods.method import Method
from lorac_exporters.modules.sites import GATES, channels_in, chosen_sites, head_sizes
from lorac_exporters.plan import LoraConfig, Network, Plan, SiteModule
from lorac_runtime.manifest import Trainable

LEAST_HIDDEN = 4


def plan_attention(network: Network, config: LoraConfig) -> Plan:
    """Gates at every site (`lorac_exporters.modules.sites`) and on the features of the head, which trains in full.

    In the spirit of Aswani et al. (arXiv 2110.10969): a frozen network, small modules between its blocks and a head
    for each domain. A layer that takes a map has a gate over channels and one over positions, a fully connected one
    the former alone.

    Raises ValueError if one of ``config.blocks`` is no layer of the network.
    """
    parts.check_blocks(network, config)
    modules = [_gates(c.name, c.weight, channels_in(c), len(c.shape), config) for c in chosen_sites(network, config)]
    if inside(network.head, config.blocks):
        name, shape = network.head_weight
        modules.append(_gates(network.head, name, head_sizes(network)[1], len(shape), config))
    trainables = [t for module in modules for t in module.tensors] + parts.head(network, config, with_bias=True)
    frozen = parts.frozen(network, config, trainables, "only gates and the head train")
    return Plan("attention", (), tuple(trainables), frozen, modules=tuple(modules))


def _gates(layer: str, weight: str, channels: int, rank: int, config: LoraConfig) -> SiteModule:
    """The gates of a layer whose weight has ``rank`` axes."""
    hidden = max(LEAST_HIDDEN, channels // config.reduction)
    tensors = [
        Trainable(f"{layer}.gate_down", (hidden, channels), "weight"),
        Trainable(f"{layer}.gate_down_bias", (hidden,), "bias"),
        Trainable(f"{layer}.gate_up", (channels, hidden), "weight"),
        Trainable(f"{layer}.gate_up_bias", (channels,), "bias"),
    ]
    if rank > 2:
        tensors.append(Trainable(f"{layer}.gate_space", (1, channels, *[1] * (rank - 2)), "weight"))
        tensors.append(Trainable(f"{layer}.gate_space_bias", (1,), "bias"))
    return SiteModule(GATES, layer, weight, channels, tuple(tensors))


METHODS = (
    Method(
        "attention",
        "gates over channels and positions at every block's input; the head in full",
        plan_attention,
        frozenset({"reduction", "blocks"}),
        lr=0.01,
    ),
)
