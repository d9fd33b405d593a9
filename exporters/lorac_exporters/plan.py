"""What trains: one plan for a PyTorch module and for an ONNX graph, so that both always agree.

A plan is made from plain facts about the network (layer names and weight shapes) by one of
`lorac_exporters.methods.METHODS`; `lorac_deploy.lora` carries it out in PyTorch, `lorac_exporters.inject` in a graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from lorac_runtime.delta import LAYOUTS, RANK_MODES, Layout, RankMode
from lorac_runtime.expected import fixed_tensors
from lorac_runtime.manifest import Adapter, Partial, Trainable

Biases = Literal["none", "head", "all"]
BIASES: tuple[Biases, ...] = ("none", "head", "all")
SmallLayers = Literal["frozen", "full", "adapter"]
SMALL_LAYERS: tuple[SmallLayers, ...] = ("frozen", "full", "adapter")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """How adapters are made. ``alpha`` None means 2 * rank, the paper's best ratio.

    ``biases``: which biases train besides ("none" as the paper counts, "head", or "all": the head's and every
    convolution's). ``small_layers``: what becomes of a layer whose adapter would not be smaller than its weight;
    "adapter" gives it one all the same, as the paper's counts for r >= 32 do. ``freeze_a``: ``lora_a`` keeps its
    random start and only ``lora_b`` trains (LoRA-FA, arXiv 2308.03303). ``linear``: adapt hidden fully connected layers
    too where there are convolutions. ``blocks``: train only layers of these names
    and below them, at a dot ("layer4" holds "layer4.0.conv1"), besides the head; () is everything. ``share``: of each
    weight's input channels that train (method paca).

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
    linear: bool = False
    blocks: tuple[str, ...] = ()
    share: float = 0.25
    reduction: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {self.reduction}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
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


Size = tuple[int, ...]  # of a feature map: (height, width) or (length,)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or a fully connected layer: its name, the names of its tensors, its weight's shape, groups.

    The shape is (c_out, c_in/groups, k...), or (c_out, c_in) of a fully connected one. ``bias`` is None where no bias
    exists that may train; ``obstacle`` says why the layer must stay frozen, ``no_adapter`` why it takes no adapter
    though its weight may train. ``size_in`` and ``size_out`` are the
    spatial sizes, (height, width) or (length,), of what it takes and gives; () has no spatial axis, None is unknown.
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    groups: int = 1
    obstacle: str | None = None
    size_in: tuple[int, ...] | None = None
    size_out: tuple[int, ...] | None = None
    no_adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """A batch normalisation: its name, the tensors that scale and shift, and the convolution that folding gives it to.

    ``scale`` and ``shift`` are None where it has none of its own in this network; (channels,) each, or of a Mul + Add
    (1, channels, 1, 1). ``conv`` None: no convolution can absorb it.
    """

    name: str
    scale: Trainable | None
    shift: Trainable | None
    conv: str | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """The facts a plan needs: convolutions in forward order (the first is the stem), the head, BN affine sizes.

    ``head_weight``/``head_bias`` name the classifier's tensors (bias None where there is none). ``linears`` are the
    fully connected layers before the head, in forward order; a head that is a convolution is among ``convs`` too.
    ``batchnorms`` maps the affine tensors that are parameters of their own (unfolded BN) to their lengths, as
    (weight, bias, length). ``backbone_parameters`` counts the original network without its head. ``others``
    are parameters of other kinds of layers, which only full fine-tuning trains. ``norms`` are the batch normalisations
    with tensors of their own under any BN policy; a folded graph has those that no convolution could absorb.
    ``head_obstacle`` says why the head takes no adapter. ``order``: every layer that has parameters and the size of
    what it gives (None where that is no feature map), as they are called; () where that is not known. ``more_heads``
    are last layers beside the head: of other outputs, or of an output that is a sum. They train as the head does.
    """

    convs: tuple[Layer, ...]
    head_weight: tuple[str, tuple[int, ...]]
    head_bias: tuple[str, tuple[int, ...]] | None
    backbone_parameters: int
    batchnorms: tuple[tuple[str, str, int], ...] = ()
    others: tuple[Trainable, ...] = ()
    linears: tuple[Layer, ...] = ()
    head_obstacle: str | None = None
    norms: tuple[Norm, ...] = ()
    order: tuple[tuple[str, Size | None], ...] = ()
    more_heads: tuple[Layer, ...] = ()

    @property
    def body(self) -> tuple[Layer, ...]:
        """Every convolution and fully connected layer but the heads, in forward order."""
        return (*self.hidden_convs, *self.hidden_linears)

    @property
    def hidden_convs(self) -> tuple[Layer, ...]:
        """The convolutions that are no head."""
        return tuple(layer for layer in self.convs if layer.weight not in self.head_weights)

    @property
    def hidden_linears(self) -> tuple[Layer, ...]:
        """The fully connected layers that are no head."""
        return tuple(layer for layer in self.linears if layer.weight not in self.head_weights)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of all heads, the first of them `head`."""
        return (self.head, *(layer.name for layer in self.more_heads))

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Names of the weights of all heads."""
        return (self.head_weight[0], *(layer.weight for layer in self.more_heads))

    @property
    def head(self) -> str:
        """Name of the classifier."""
        return layer_of(self.head_weight[0])


def layer_of(tensor: str) -> str:
    """The layer that a weight or bias belongs to, by its name.

    >>> layer_of("layer1.0.conv1.weight"), layer_of("fc.bias")
    ('layer1.0.conv1', 'fc')
    """
    return tensor.removesuffix(".weight").removesuffix(".bias")


@dataclasses.dataclass(frozen=True)
class SiteModule:
    """A small module at the input of ``layer``, whose ``weight`` tells where that is; see `lorac_exporters.modules`.

    ``kind`` is a key of `lorac_exporters.modules.insertion.KINDS`; ``tensors`` are its own, in its order.
    ``channels`` are those of the input; ``scale`` multiplies what it adds.
    """

    kind: str
    layer: str
    weight: str
    channels: int
    tensors: tuple[Trainable, ...]
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What trains and what does not: adapters, trainable tensors in order, frozen layers with the reason."""

    method: str
    adapters: tuple[Adapter, ...]
    trainables: tuple[Trainable, ...]
    frozen: tuple[tuple[str, str], ...]
    partials: tuple[Partial, ...] = ()
    modules: tuple[SiteModule, ...] = ()

    @property
    def updated(self) -> tuple[str, ...]:
        """Weights that change though they do not train themselves: adapters add to them, or channels of them train."""
        return (*(adapter.weight for adapter in self.adapters), *(partial.weight for partial in self.partials))

    @property
    def fixed(self) -> dict[str, tuple[int, ...]]:
        """Tensors of adapters that do not train (``lora_a`` under ``freeze_a``), with their shapes."""
        return fixed_tensors(self.adapters, self.trainables)

    @property
    def trained_parameters(self) -> int:
        """Number of trainable elements."""
        return sum(math.prod(t.shape) for t in self.trainables)


Planner = Callable[[Network, LoraConfig], Plan]
