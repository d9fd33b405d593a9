"""What a method of training is: a name, a planner, and what it needs of its surroundings."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lorac_exporters.blocks import inside, require_blocks
from lorac_exporters.methods.parts import OUTSIDE
from lorac_exporters.plan import LoraConfig, Network, Plan, Planner
from lorac_exporters.stages import resolve
from lorac_runtime.manifest import BN_POLICIES, BnPolicy, TrainingDefaults


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of training. Calling it plans what trains in a network.

    ``summary`` is a line for ``--help``. ``options``: the fields of `LoraConfig` that change what it does (seed
    apart). ``bn_policies``: those that it goes with, its default first. ``loss``: the one that it needs, None where
    any will do. ``batchnorm``: what it trains of batch normalisations beside what the BN policy implies; nothing
    ("constant"), the shift wherever that is a tensor of its own ("shift"), or scale and shift, for which they stay
    layers of the graph that trains under every policy ("live"). ``trains`` is False where there are forward passes
    only, and no settings of steps. ``adapts``: whether layers get adapters, whose form can be chosen. ``lr``: the peak
    learning rate that suits it (measured: docs/results.md). `policy`, `loss_of` and `training` say what a choice of the
    user's, or none, comes to.

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
    batchnorm: Literal["constant", "shift", "live"] = "constant"
    trains: bool = True
    adapts: bool = False
    lr: float = TrainingDefaults.lr

    def __call__(self, network: Network, config: LoraConfig) -> Plan:
        """The plan for ``network``; words among ``config.blocks`` are resolved (see `lorac_exporters.stages`).

        Raises ValueError for settings that do not fit the method or the network.
        """
        blocks = resolve(network, config.blocks) if "blocks" in self.options else config.blocks
        plan = self.planner(network, dataclasses.replace(config, blocks=blocks))
        if blocks:
            _require_trained(network, plan, config.blocks)
        outside = [(head, OUTSIDE) for head in network.heads if not inside(head, blocks)]
        frozen = tuple(dict([*plan.frozen, *outside]).items())
        return dataclasses.replace(plan, method=self.name, frozen=frozen)

    def policy(self, given: BnPolicy | None = None) -> BnPolicy:
        """The BN policy: ``given``, or the method's default.

        >>> from lorac_exporters.methods import METHODS
        >>> METHODS["full"].policy(), METHODS["full"].policy("batch")
        ('frozen', 'batch')

        Raises ValueError for one that the method does not go with.
        """
        chosen = self.bn_policies[0] if given is None else given
        if chosen not in BN_POLICIES:
            raise ValueError(f"BN policy {chosen!r} is not one of {', '.join(BN_POLICIES)}")
        if chosen not in self.bn_policies:
            fitting = " or ".join(self.bn_policies)
            raise ValueError(f"method {self.name} does not go with BN policy {chosen!r}: choose {fitting}")
        return chosen

    def loss_of(self, given: str | None = None) -> str:
        """The loss: ``given``, or the one that the method needs, or the default of `TrainingDefaults`.

        Raises ValueError for one that the method cannot train with.
        """
        chosen = given or self.loss or TrainingDefaults().loss
        if self.loss not in (None, chosen):
            raise ValueError(f"method {self.name} does not go with loss {chosen!r}: choose {self.loss}")
        return chosen

    def training(self, **given: Any) -> TrainingDefaults:
        """The settings of the device's training: those ``given``, for the others what suits the method.

        >>> from lorac_exporters.methods import METHODS
        >>> METHODS["tent"].training(epochs=1).loss, METHODS["head"].training().lr
        ('entropy', 0.03)

        Raises ValueError for a loss that the method cannot train with.
        """
        return TrainingDefaults(**{"lr": self.lr} | given | {"loss": self.loss_of(given.get("loss"))})


def _require_trained(network: Network, plan: Plan, blocks: tuple[str, ...]) -> None:
    """Raise ValueError if one of ``blocks`` holds nothing that the method could train, or nothing trains at all."""
    planned = [t.name for t in plan.trainables] + [layer for layer, reason in plan.frozen if reason != OUTSIDE]
    empty = [block for block in blocks if not any(inside(name, resolve(network, (block,))) for name in planned)]
    require_blocks(tuple(empty), [layer.name for layer in network.body] + [*network.heads])
    if empty:
        raise ValueError(f"blocks {', '.join(empty)}: they hold no layer that method {plan.method} could train")
    if not plan.trainables:
        why = "; ".join(f"{layer}: {reason}" for layer, reason in plan.frozen if reason != OUTSIDE)
        raise ValueError(f"method {plan.method} would train nothing in blocks {', '.join(blocks)} ({why})")
