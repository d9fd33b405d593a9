"""The classifier alone."""

from __future__ import annotations

from lorac_exporters.methods import parts
from lorac_exporters.methods.method import Method
from lorac_exporters.plan import LoraConfig, Network, Plan


def plan_head(network: Network, config: LoraConfig) -> Plan:
    """Only the classifier trains: its weight and bias. Nothing of ``config`` applies.

    Raises ValueError for ``config.blocks``, which are meant to change what trains.
    """
    if config.blocks:
        raise ValueError(f"blocks {', '.join(config.blocks)}: method head trains the head alone; leave them out")
    trainables = parts.head(network, config, with_bias=True)
    return Plan("head", (), tuple(trainables), parts.frozen(network, config, trainables, "only the head trains"))


METHODS = (Method("head", "the classifier alone", plan_head, lr=0.03),)
