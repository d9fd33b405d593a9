"""What trains: one plan for a PyTorch module and for an ONNX graph, so that both always agree.

A plan is made from plain facts about the network (layer names and weight shapes); `lorac_deploy.lora` carries
it out in PyTorch, `lorac_exporters.inject` in a graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from lorac_runtime.delta import (
    LAYOUTS,
    RANK_MODES,
    Layout,
    RankMode,
    adapter_rank,
    adapter_shapes,
    is_smaller_than_weight,
    resolve_rank_mode,
)
from lorac_runtime.manifest import Adapter, Trainable

Biases = Literal["none", "head", "all"]
BIASES: tuple[Biases, ...] = ("none", "head", "all")
SmallLayers = Literal["frozen", "full", "adapter"]
SMALL_LAYERS: tuple[SmallLayers, ...] = ("frozen", "full", "adapter")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """How adapters are made. ``alpha`` None means 2 * rank, the paper's best ratio.

    ``biases``: which biases train besides ("none" as the paper counts, "head", or "all": the head's and every
    convolution's). ``small_layers``: what becomes of a layer whose adapter would not be smaller than its weight;
    "adapter" gives it one all the same, as the paper's counts for r >= 32 do.

    Raises ValueError for a value out of range.
    """

    rank: int = 4
    alpha: float | None = None
    rank_mode: RankMode = "auto"
    layout: Layout = "spatial"
    learnable_alpha: bool = False
    biases: Biases = "none"
    small_layers: SmallLayers = "frozen"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        allowed = {"rank_mode": RANK_MODES, "layout": LAYOUTS, "biases": BIASES, "small_layers": SMALL_LAYERS}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")

    @property
    def effective_alpha(self) -> float:
        """``alpha``, or its default 2 * rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclasses.dataclass(frozen=True)
class ConvLayer:
    """A convolution: its layer name, the names of its tensors, weight shape (c_out, c_in/groups, k...), groups.

    ``bias`` is None where no bias exists that may train; ``obstacle`` says why the layer must stay frozen.
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    groups: int = 1
    obstacle: str | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """The facts a plan needs: convolutions in forward order (the first is the stem), the head, BN affine sizes.

    ``head_weight``/``head_bias`` name the classifier's tensors (bias None where there is none).
    ``batchnorms`` maps the affine tensors that are parameters of their own (unfolded BN) to their lengths, as
    (weight, bias, length). ``backbone_parameters`` counts the original network without its head. ``others``
    are parameters of other kinds of layers, which only full fine-tuning trains.
    """

    convs: tuple[ConvLayer, ...]
    head_weight: tuple[str, tuple[int, ...]]
    head_bias: tuple[str, tuple[int, ...]] | None
    backbone_parameters: int
    batchnorms: tuple[tuple[str, str, int], ...] = ()
    others: tuple[Trainable, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What trains and what does not: adapters, trainable tensors in order, frozen layers with the reason."""

    method: str
    adapters: tuple[Adapter, ...]
    trainables: tuple[Trainable, ...]
    frozen: tuple[tuple[str, str], ...]

    @property
    def trained_parameters(self) -> int:
        """Number of trainable elements."""
        return sum(math.prod(t.shape) for t in self.trainables)


Planner = Callable[[Network, LoraConfig], Plan]


def plan_lora_c(network: Network, config: LoraConfig) -> Plan:
    """Adapters on every convolution but the first; the first and the head train in full (LoRA-C, section 3)."""
    mode = resolve_rank_mode(config.rank_mode, network.backbone_parameters)
    adapters: list[Adapter] = []
    trainables: list[Trainable] = []
    frozen: list[tuple[str, str]] = []
    for index, conv in enumerate(network.convs):
        if conv.weight == network.head_weight[0]:
            continue
        adapter = None if index == 0 or conv.obstacle else _adapter(conv, config, mode)
        if index == 0 and conv.obstacle is None:
            trainables.append(Trainable(conv.weight, conv.shape, "weight"))
        elif adapter is None:
            frozen.append((conv.name, conv.obstacle or ""))
        elif config.small_layers == "adapter" or is_smaller_than_weight(conv.shape, adapter.rank):
            adapters.append(adapter)
            trainables += _adapter_tensors(adapter)
        elif config.small_layers == "full":
            trainables.append(Trainable(conv.weight, conv.shape, "weight"))
        else:
            frozen.append((conv.name, "its adapter would not be smaller than its weight"))
    trainables += _conv_biases(network) if config.biases == "all" else []
    trainables += _head(network, with_bias=config.biases != "none")
    return Plan("lora-c", tuple(adapters), tuple(trainables), tuple(frozen))


def plan_head(network: Network, config: LoraConfig) -> Plan:
    """Only the classifier trains: its weight and bias. Nothing of ``config`` applies."""
    del config
    frozen = tuple((c.name, "only the head trains") for c in network.convs if c.weight != network.head_weight[0])
    return Plan("head", (), tuple(_head(network, with_bias=True)), frozen)


def plan_full(network: Network, config: LoraConfig) -> Plan:
    """Every parameter: convolutions, the head, other layers, and BN affine tensors where BN was not folded."""
    del config
    usable = [c for c in network.convs if c.weight != network.head_weight[0]]
    trainables = [Trainable(c.weight, c.shape, "weight") for c in usable if c.obstacle is None]
    trainables += [*_conv_biases(network), *network.others]
    for weight, bias, length in network.batchnorms:
        trainables += [Trainable(weight, (length,), "bn_weight"), Trainable(bias, (length,), "bn_bias")]
    trainables += _head(network, with_bias=True)
    trained = {t.name for t in trainables}
    frozen = tuple((c.name, c.obstacle) for c in usable if c.obstacle and c.weight not in trained)
    return Plan("full", (), tuple(trainables), frozen)


METHODS: dict[str, Planner] = {"lora-c": plan_lora_c, "head": plan_head, "full": plan_full}


def _adapter(conv: ConvLayer, config: LoraConfig, mode: Literal["rk", "r"]) -> Adapter:
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


def _adapter_tensors(adapter: Adapter) -> list[Trainable]:
    shape_a, shape_b = adapter_shapes(adapter.weight_shape, adapter.rank)
    tensors = [Trainable(adapter.lora_a, shape_a, "lora_a"), Trainable(adapter.lora_b, shape_b, "lora_b")]
    if adapter.lora_alpha is not None:
        tensors.append(Trainable(adapter.lora_alpha, (1,), "alpha"))
    return tensors


def _conv_biases(network: Network) -> list[Trainable]:
    usable = (c for c in network.convs if c.weight != network.head_weight[0] and c.obstacle is None)
    return [Trainable(c.bias, (c.shape[0],), "bias") for c in usable if c.bias is not None]


def _head(network: Network, *, with_bias: bool) -> list[Trainable]:
    tensors = [Trainable(*network.head_weight, "weight")]
    if with_bias and network.head_bias is not None:
        tensors.append(Trainable(*network.head_bias, "bias"))
    return tensors
