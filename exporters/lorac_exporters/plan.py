"""What trains: one plan for a PyTorch module and for an ONNX graph, so that both always agree.

A plan is made from plain facts about the network (layer names and weight shapes); `lorac_deploy.lora` carries
it out in PyTorch, `lorac_exporters.inject` in a graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from lorac_exporters.blocks import inside, require_blocks
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
from lorac_runtime.expected import fixed_tensors
from lorac_runtime.manifest import Adapter, Trainable

Biases = Literal["none", "head", "all"]
BIASES: tuple[Biases, ...] = ("none", "head", "all")
SmallLayers = Literal["frozen", "full", "adapter"]
SMALL_LAYERS: tuple[SmallLayers, ...] = ("frozen", "full", "adapter")
OUTSIDE = "outside of the trained blocks"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """How adapters are made. ``alpha`` None means 2 * rank, the paper's best ratio.

    ``biases``: which biases train besides ("none" as the paper counts, "head", or "all": the head's and every
    convolution's). ``small_layers``: what becomes of a layer whose adapter would not be smaller than its weight;
    "adapter" gives it one all the same, as the paper's counts for r >= 32 do. ``freeze_a``: ``lora_a`` keeps its
    random start and only ``lora_b`` trains (LoRA-FA, arXiv 2308.03303). ``blocks``: train only layers of these names
    and below them, at a dot ("layer4" holds "layer4.0.conv1"), besides the head; () is everything.

    Raises ValueError for a value out of range.
    """

    rank: int = 4
    alpha: float | None = None
    rank_mode: RankMode = "auto"
    layout: Layout = "spatial"
    learnable_alpha: bool = False
    biases: Biases = "none"
    small_layers: SmallLayers = "frozen"
    freeze_a: bool = False
    blocks: tuple[str, ...] = ()
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
        if isinstance(self.blocks, str) or not all(name and "," not in name for name in self.blocks):
            raise ValueError(f"blocks must be a tuple of layer names, none empty or with a comma, got {self.blocks!r}")

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
    def fixed(self) -> dict[str, tuple[int, ...]]:
        """Tensors of adapters that do not train (``lora_a`` under ``freeze_a``), with their shapes."""
        return fixed_tensors(self.adapters, self.trainables)

    @property
    def trained_parameters(self) -> int:
        """Number of trainable elements."""
        return sum(math.prod(t.shape) for t in self.trainables)


Planner = Callable[[Network, LoraConfig], Plan]


def plan_lora_c(network: Network, config: LoraConfig) -> Plan:
    """Adapters on every convolution but the first; the first and the head train in full (LoRA-C, section 3).

    Raises ValueError if one of ``config.blocks`` names neither a convolution, nor the head, nor what holds one.
    """
    require_blocks(config.blocks, _with_head([c.name for c in network.convs], network))
    mode = resolve_rank_mode(config.rank_mode, network.backbone_parameters)
    adapters: list[Adapter] = []
    trainables: list[Trainable] = []
    frozen: list[tuple[str, str]] = []
    for index, conv in enumerate(network.convs):
        if conv.weight == network.head_weight[0]:
            continue
        fate = _fate(conv, config, mode, stem=index == 0)
        if isinstance(fate, Adapter):
            adapters.append(fate)
            trainables += _adapter_tensors(fate, freeze_a=config.freeze_a)
        elif isinstance(fate, Trainable):
            trainables.append(fate)
        else:
            frozen.append((conv.name, fate))
    trainables += _conv_biases(_usable(network, config)) if config.biases == "all" else []
    trainables += _head(network, with_bias=config.biases != "none")
    return Plan("lora-c", tuple(adapters), tuple(trainables), tuple(frozen))


def plan_head(network: Network, config: LoraConfig) -> Plan:
    """Only the classifier trains: its weight and bias. Nothing of ``config`` applies.

    Raises ValueError for ``config.blocks``, which are meant to change what trains.
    """
    if config.blocks:
        raise ValueError(f"blocks {', '.join(config.blocks)}: method head trains the head alone; leave them out")
    frozen = tuple((c.name, "only the head trains") for c in network.convs if c.weight != network.head_weight[0])
    return Plan("head", (), tuple(_head(network, with_bias=True)), frozen)


def plan_full(network: Network, config: LoraConfig) -> Plan:
    """Every parameter: convolutions, the head, other layers, and BN affine tensors where BN was not folded.

    Raises ValueError if one of ``config.blocks`` names no layer that could train.
    """
    affine = [
        t
        for weight, bias, length in network.batchnorms
        for t in (Trainable(weight, (length,), "bn_weight"), Trainable(bias, (length,), "bn_bias"))
    ]
    more = [*network.others, *affine]
    layers = [*(c.name for c in network.convs), *(_layer(t.name) for t in more)]
    require_blocks(config.blocks, _with_head(layers, network))
    usable = _usable(network, config)
    trainables = [Trainable(c.weight, c.shape, "weight") for c in usable]
    trainables += _conv_biases(usable)
    trainables += [t for t in more if inside(_layer(t.name), config.blocks)]
    trainables += _head(network, with_bias=True)
    frozen = _frozen_in_full(network, config, {t.name for t in trainables})
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


def _adapter_tensors(adapter: Adapter, *, freeze_a: bool) -> list[Trainable]:
    """Those that train."""
    shape_a, shape_b = adapter_shapes(adapter.weight_shape, adapter.rank)
    tensors = [] if freeze_a else [Trainable(adapter.lora_a, shape_a, "lora_a")]
    tensors.append(Trainable(adapter.lora_b, shape_b, "lora_b"))
    if adapter.lora_alpha is not None:
        tensors.append(Trainable(adapter.lora_alpha, (1,), "alpha"))
    return tensors


def _fate(conv: ConvLayer, config: LoraConfig, mode: Literal["rk", "r"], *, stem: bool) -> Adapter | Trainable | str:
    """What becomes of a convolution under LoRA-C: an adapter, its weight in full, or why it stays frozen."""
    if not inside(conv.name, config.blocks):
        return OUTSIDE
    if conv.obstacle is not None:
        return conv.obstacle
    full = Trainable(conv.weight, conv.shape, "weight")
    if stem:
        return full
    adapter = _adapter(conv, config, mode)
    if config.small_layers == "adapter" or is_smaller_than_weight(conv.shape, adapter.rank):
        return adapter
    return full if config.small_layers == "full" else "its adapter would not be smaller than its weight"


def _frozen_in_full(network: Network, config: LoraConfig, trained: set[str]) -> tuple[tuple[str, str], ...]:
    convs = [c for c in network.convs if c.weight != network.head_weight[0]]
    reasons = {c.name: None if c.weight in trained else c.obstacle for c in convs}
    for other in network.others:
        reasons.setdefault(_layer(other.name), None)
    told = {name: why if inside(name, config.blocks) else OUTSIDE for name, why in reasons.items()}
    return tuple((name, why) for name, why in told.items() if why)


def _usable(network: Network, config: LoraConfig) -> list[ConvLayer]:
    """Convolutions besides the head that may train."""
    convs = [c for c in network.convs if c.weight != network.head_weight[0] and c.obstacle is None]
    return [c for c in convs if inside(c.name, config.blocks)]


def _conv_biases(convs: list[ConvLayer]) -> list[Trainable]:
    return [Trainable(c.bias, (c.shape[0],), "bias") for c in convs if c.bias is not None]


def _head(network: Network, *, with_bias: bool) -> list[Trainable]:
    tensors = [Trainable(*network.head_weight, "weight")]
    if with_bias and network.head_bias is not None:
        tensors.append(Trainable(*network.head_bias, "bias"))
    return tensors


def _with_head(layers: list[str], network: Network) -> list[str]:
    return [*layers, _layer(network.head_weight[0])]


def _layer(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".bias")
