"""What a method trains in a network: decided here, without touching the network (see `lorac_deploy.lora`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorac_deploy.structure import Network, describe, tensor_name, unadaptable
from lorac_runtime.delta import (
    LAYOUTS,
    RANK_MODES,
    Layout,
    RankMode,
    adapter_rank,
    adapter_shapes,
    adapter_size,
    is_smaller_than_weight,
    resolve_rank_mode,
)
from lorac_runtime.manifest import BN_POLICIES, Adapter, BnPolicy, Trainable

Biases = Literal["none", "head", "all"]
SmallLayers = Literal["frozen", "full"]
BIASES: tuple[Biases, ...] = ("none", "head", "all")
SMALL_LAYERS: tuple[SmallLayers, ...] = ("frozen", "full")


@dataclass(frozen=True)
class LoraConfig:
    """Settings of LoRA-C. The update's factor is ``alpha / rank`` in both rank modes.

    ``rank``: nominal r. ``alpha``: None means 2 * rank (the paper's best ratio).
    ``rank_mode``: inner dimension r * k_w (``rk``) or r (``r``); ``auto`` takes ``rk`` below ResNet-50's size.
    ``layout``: arrangement of B A as a kernel; ``paper`` reads the published code's checkpoints.
    ``learnable_alpha``: alpha becomes a trained tensor (1,) per layer.
    ``biases``: which existing biases train. ``small_layers``: what becomes of a convolution for which an
    adapter would not be smaller than its weight. ``seed``: of ``lora_a``'s initial values.

    >>> LoraConfig(rank=8).scale, LoraConfig(rank=8, alpha=4.0).scale
    (2.0, 0.5)

    Raises ValueError for a value outside its range, naming every one.
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
        problems = [
            f"{name} is {value!r}, expected one of {', '.join(allowed)}"
            for name, value, allowed in (
                ("rank_mode", self.rank_mode, RANK_MODES),
                ("layout", self.layout, LAYOUTS),
                ("biases", self.biases, BIASES),
                ("small_layers", self.small_layers, SMALL_LAYERS),
            )
            if value not in allowed
        ]
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            problems.append(f"rank is {self.rank!r}, expected an integer of at least 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha is {self.alpha!r}, expected a positive number")
        if problems:
            raise ValueError("these LoRA-C settings cannot be used: " + "; ".join(problems))

    @property
    def resolved_alpha(self) -> float:
        """alpha, or its default 2 * rank."""
        return float(2 * self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.resolved_alpha / self.rank


@dataclass(frozen=True)
class FrozenLayer:
    """A layer whose weight does not change, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class AttachReport:
    """What a method trains in one network. Tensor names are state-dict keys.

    ``rank_mode`` is the resolved one. ``model_parameters`` counts the network itself, adapters not included.
    """

    method: str
    config: LoraConfig
    bn_policy: BnPolicy
    rank_mode: Literal["rk", "r"]
    stem: str | None
    head: str
    adapters: tuple[Adapter, ...]
    trainables: tuple[Trainable, ...]
    frozen: tuple[FrozenLayer, ...]
    model_parameters: int

    @property
    def trained_parameters(self) -> int:
        """Number of trainable elements."""
        return sum(math.prod(t.shape) for t in self.trainables)

    @property
    def full(self) -> tuple[str, ...]:
        """Names of the network's own tensors that train."""
        own = ("weight", "bias", "bn_weight", "bn_bias")
        return tuple(t.name for t in self.trainables if t.role in own)

    def __str__(self) -> str:
        share = 100 * self.trained_parameters / max(1, self.model_parameters)
        return (
            f"{self.method}: {self.trained_parameters:,} trained of {self.model_parameters:,} parameters "
            f"({share:.2f} %); {len(self.adapters)} adapted layers, {len(self.full)} tensors in full, "
            f"{len(self.frozen)} layers frozen"
        )


@dataclass(frozen=True)
class Choice:
    """What a method chooses: adapters, trained tensors, and reasons for convolutions it leaves alone."""

    adapters: tuple[Adapter, ...]
    trainables: tuple[Trainable, ...]
    reasons: dict[str, str]


Method = Callable[[Network, LoraConfig, BnPolicy], Choice]


def plan(
    module: nn.Module,
    method: str,
    *,
    config: LoraConfig,
    bn_policy: BnPolicy,
    stem: str | None,
    head: str | None,
) -> AttachReport:
    """Decide what ``method`` trains in ``module``; nothing is changed. See `lorac_deploy.lora.select_trainable`.

    Raises ValueError for an unknown method, BN policy, stem or head.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if bn_policy not in BN_POLICIES:
        raise ValueError(f"BN policy {bn_policy!r} is not one of {', '.join(BN_POLICIES)}")
    network = describe(module, stem=stem, head=head)
    choice = METHODS[method](network, config, bn_policy)
    return AttachReport(
        method=method,
        config=config,
        bn_policy=bn_policy,
        rank_mode=resolve_rank_mode(config.rank_mode, network.backbone_parameters),
        stem=network.stem,
        head=network.head,
        adapters=choice.adapters,
        trainables=choice.trainables,
        frozen=_frozen(network, choice),
        model_parameters=network.parameters,
    )


def _lora_c(network: Network, config: LoraConfig, bn_policy: BnPolicy) -> Choice:
    """Adapters on every convolution but the first; stem and head in full (arXiv 2410.16954)."""
    mode = resolve_rank_mode(config.rank_mode, network.backbone_parameters)
    reasons, adapters, trainables = unadaptable(network), [], []
    for name, conv in network.convolutions.items():
        shape = tuple(conv.weight.shape)
        in_full = name == network.stem and "shared" not in reasons.get(name, "")
        if not in_full and name not in reasons:
            adapter = _adapter(name, conv.groups, shape, config, adapter_rank(config.rank, shape, mode))
            if is_smaller_than_weight(shape, adapter.rank):
                adapters.append(adapter)
                trainables += _adapter_tensors(adapter)
            elif config.small_layers == "full":
                in_full = True
            else:
                reasons[name] = _too_small(adapter)
        if in_full:
            trainables += _own(network, name, "weight")
        if config.biases == "all":
            trainables += _own(network, name, "bias")
    trainables += _own(network, network.head, "weight")
    if config.biases in ("head", "all"):
        trainables += _own(network, network.head, "bias")
    return Choice(tuple(adapters), tuple(trainables), reasons)
