"""Skip adapters: low-rank branches from every block to the logits; the network itself stays as it is."""

from __future__ import annotations

from lorac_exporters.blocks import inside
from lorac_exporters.methods import parts
from lorac_exporters.methods.method import Method
from lorac_exporters.modules.sites import SKIP, channels_in, chosen_sites, head_is_convolution, head_sizes
from lorac_exporters.plan import LoraConfig, Network, Plan, SiteModule
from lorac_runtime.manifest import Trainable


def plan_skip(network: Network, config: LoraConfig) -> Plan:
    """Skip-LoRA (Matsutani et al., arXiv 2410.21073): logits + sum over sites of x_k A_k B_k; only A and B train.

    x_k is what the layer of a site takes, averaged over its positions: that is an extension of this project, for the
    paper has fully connected layers. The head's input is the last site (`lorac_exporters.modules.sites`).

    Raises ValueError if the head is a convolution, or if one of ``config.blocks`` is no layer of the network.
    """
    if head_is_convolution(network):
        raise ValueError(
            f"method skip adds to the logits of a fully connected head, and the head {network.head} is a convolution: "
            "there is no place for it; use lora-c, attention or head"
        )
    parts.check_blocks(network, config)
    classes, features = head_sizes(network)
    sites = [(layer.name, layer.weight, channels_in(layer)) for layer in chosen_sites(network, config)]
    head_inside = inside(network.head, config.blocks)
    sites += [(network.head, network.head_weight[0], features)] if head_inside else []
    modules = tuple(_adapter(*site, classes, config) for site in sites)
    trainables = tuple(t for module in modules for t in module.tensors)
    frozen = parts.frozen(network, config, trainables, "only skip adapters train")
    return Plan("skip", (), trainables, frozen, modules=modules)


def _adapter(layer: str, weight: str, channels: int, classes: int, config: LoraConfig) -> SiteModule:
    tensors = (
        Trainable(f"{layer}.skip_a", (config.rank, channels), "weight"),
        Trainable(f"{layer}.skip_b", (classes, config.rank), "weight"),
    )
    return SiteModule(SKIP, layer, weight, channels, tensors, scale=config.effective_alpha / config.rank)


METHODS = (
    Method(
        "skip",
        "low-rank branches from every block to the logits, past the frozen network (Skip-LoRA)",
        plan_skip,
        frozenset({"rank", "alpha", "blocks"}),
        lr=0.03,
    ),
)
