"""What a method of training is: a name, a planner, and what it needs of its surroundings."""

from __future__ import annotations

import dataclasses

from lorac_exporters.plan import LoraConfig, Network, Plan, Planner
from lorac_runtime.manifest import BN_POLICIES, BnPolicy


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of training. Calling it plans what trains in a network.

    ``summary`` is a line for ``--help``. ``options``: the fields of `LoraConfig` that change what it does (seed
    apart). ``bn_policies``: those that it goes with, its default first. ``loss``: the one that it needs, None where
    any will do.

    >>> from lorac_exporters.methods import METHODS
    >>> from lorac_exporters.plan import Layer
    >>> net = Network((Layer("conv1", "conv1.weight", None, (8, 3, 3, 3)),), ("fc.weight", (2, 8)), None, 216)
    >>> [t.name for t in METHODS["lora-c"](net, LoraConfig()).trainables]
    ['conv1.weight', 'fc.weight']
    """

    name: str
    summary: str
    planner: Planner
    options: frozenset[str] = frozenset()
    bn_policies: tuple[BnPolicy, ...] = BN_POLICIES
    loss: str | None = None

    def __call__(self, network: Network, config: LoraConfig) -> Plan:
        """The plan for ``network``; raises ValueError for settings that do not fit the method or the network."""
        return dataclasses.replace(self.planner(network, config), method=self.name)
