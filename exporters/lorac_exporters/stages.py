"""Blocks of any network by the words front, middle, rear and head: stages are told by the sizes of feature maps.

A stage holds the convolutions whose outputs have one size. It ends where the size falls to two thirds or less along
an axis: a convolution without padding, which takes a few rows off, ends none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from lorac_exporters.blocks import inside, outline
from lorac_exporters.plan import Layer, Network, Size

WORDS = ("front", "middle", "rear", "head")
_SAME_STAGE = 2 / 3  # a smaller part than this of the size before begins a stage


def needs_sizes(blocks: Sequence[str]) -> bool:
    """Whether `resolve` must know what sizes the layers give.

    >>> needs_sizes(("front", "layer4")), needs_sizes(("head", "layer4"))
    (True, False)
    """
    return not {*WORDS[:-1]}.isdisjoint(blocks)


def resolve(network: Network, blocks: Sequence[str]) -> tuple[str, ...]:
    """``blocks`` with each word of `WORDS` replaced by the names of its layers; other names stay.

    A layer that is itself called by one of the words cannot be named: the word wins.

    >>> sizes = {"conv1": (16, 16), "a": (8, 8), "b": (4, 4), "c": (2, 2)}
    >>> convs = tuple(Layer(n, f"{n}.weight", None, (8, 8, 3, 3), size_out=s) for n, s in sizes.items())
    >>> net = Network(convs, ("fc.weight", (10, 8)), None, 1000)
    >>> resolve(net, ("rear", "a")), resolve(net, ("front",)), resolve(net, ("head",))
    (('c', 'fc', 'a'), ('conv1', 'a'), ('fc',))

    Raises ValueError where the stages of the network cannot be told, or it has no stage for a word.
    """
    told = blocks_of(network) if needs_sizes(blocks) else {"head": network.heads}
    if "middle" in blocks and "middle" not in told:
        raise ValueError(
            f"blocks middle: this network has two stages, front ({outline(told['front'])}) and rear "
            f"({outline(told['rear'])}), and none between them; choose one of these"
        )
    return tuple(dict.fromkeys(name for block in blocks for name in told.get(block, (block,))))


def blocks_of(network: Network) -> dict[str, tuple[str, ...]]:
    """The layers of each word of `WORDS`, in forward order; ``middle`` is left out where there are two stages only.

    front: the first convolution and the stage of the second. rear: the last stage, what follows it, and the head.

    Raises ValueError where the stages cannot be told: no convolution, unknown sizes, one size, or sizes that grow.
    """
    stages = _stages(network)
    first = min(stages.front, len(stages.layers) - 2)
    parts = (stages.layers[: first + 1], stages.layers[first + 1 : -1], stages.layers[-1:])
    front, middle, rear = (tuple(name for stage in part for name in stage) for part in parts)
    told = {"front": front, "middle": middle, "rear": (*rear, *network.heads), "head": network.heads}
    return {word: names for word, names in told.items() if names}


@dataclasses.dataclass(frozen=True)
class _Stages:
    """Layers of each stage; ``front`` is the stage of the second convolution."""

    layers: tuple[tuple[str, ...], ...]
    front: int


def _stages(network: Network) -> _Stages:
    convs = _ordered(network)
    _require_sizes(convs)
    placed = _Places(_Levels(convs), convs)
    order = network.order or tuple((layer.name, layer.size_out) for layer in network.body)
    numbers = {name: placed.of(name, size) for name, size in order if name not in network.heads}
    used = sorted(set(numbers.values()))
    layers = tuple(tuple(name for name, number in numbers.items() if number == level) for level in used)
    if len(used) < 2:
        raise ValueError(
            f"every convolution gives {_text(convs[0].size_out)} or about that, so that no stages can be told: "
            f"{_advice(network)}"
        )
    return _Stages(layers, used.index(max(placed.number[c.name] for c in convs[:2])))


def _ordered(network: Network) -> list[Layer]:
    """Convolutions of the body in forward order; those that are never called are left out."""
    convs = {layer.name: layer for layer in reversed(network.hidden_convs)}
    if not convs:
        raise ValueError(
            "stages are told by the sizes that convolutions give, and this network has none before its head: "
            f"{_advice(network)}"
        )
    return [convs[name] for name, _ in network.order if name in convs] or list(reversed(convs.values()))


def _require_sizes(convs: Sequence[Layer]) -> None:
    unknown = [conv.name for conv in convs if conv.size_out is None]
    if unknown:
        raise ValueError(
            f"stages are told by the sizes of feature maps, and that of {unknown[0]} is unknown: give the shape of an "
            "input (in PyTorch input_shape=..., for an ONNX file with open axes its size), or name layers instead"
        )


def _advice(network: Network) -> str:
    return f"name layers instead; there are {outline([layer.name for layer in network.body])}, and head"


class _Levels:
    """Sizes in groups, the largest first: those that differ by a few rows are one."""

    def __init__(self, convs: Sequence[Layer]) -> None:
        sizes = {size for _, size in _sized(convs)}
        self.groups: list[list[Size]] = []
        for size in sorted(sizes, key=lambda size: (math.prod(size), size), reverse=True):
            if self.groups and _ratio(self.groups[-1][-1], size) > _SAME_STAGE:
                self.groups[-1].append(size)
            else:
                self.groups.append([size])

    def find(self, size: Size | None) -> int | None:
        """The group that holds a size."""
        return next((number for number, group in enumerate(self.groups) if size in group), None)

    def of(self, convs: Sequence[Layer]) -> dict[str, int]:
        """The group of each convolution; one of pooled maps has that of the convolution before it."""
        sized = {conv.name: number for conv, size in _sized(convs) if (number := self.find(size)) is not None}
        _require_shrinking([(conv, sized[conv.name]) for conv in convs if conv.name in sized])
        sized |= _expansions([conv for conv in convs if conv.name in sized], sized)
        found, last = {}, 0
        for conv in convs:
            last = found[conv.name] = sized.get(conv.name, last)
        return found


class _Places:
    """Where layers of all kinds lie, asked for in forward order."""

    def __init__(self, levels: _Levels, convs: Sequence[Layer]) -> None:
        self.number, self._levels = levels.of(convs), levels
        self._last = 0
        self._size: Size | None = None

    def of(self, name: str, size: Size | None) -> int:
        """A convolution's own stage; another layer's by the size that it gives, or else that of the layer before."""
        if name in self.number:
            self._last, self._size = self.number[name], size
        found = None if name in self.number or size == self._size else self._levels.find(size)
        return found if found is not None and found in self.number.values() else self._last


def _sized(convs: Sequence[Layer]) -> Iterator[tuple[Layer, Size]]:
    """Convolutions whose output tells of a stage: not those that work on pooled maps, or reduce a map to a point."""
    for index, conv in enumerate(convs):
        size, taken = conv.size_out or (), conv.size_in
        point = all(length == 1 for length in size)
        if index == 0 or not point or (taken is not None and taken not in (size, conv.shape[2:])):
            yield conv, size


def _require_shrinking(placed: Sequence[tuple[Layer, int]]) -> None:
    """A convolution may still give the size of the stage before: branches of one block may come in any order."""
    deepest = placed[0]
    for conv, number in placed:
        if number < deepest[1] - 1:
            raise _growing(deepest[0], conv)
        deepest = max(deepest, (conv, number), key=lambda item: item[1])
    if placed[-1][1] < deepest[1]:
        raise _growing(deepest[0], placed[-1][0])


def _growing(small: Layer, large: Layer) -> ValueError:
    return ValueError(
        f"feature maps grow again ({large.name} gives {_text(large.size_out)} after {small.name} gave "
        f"{_text(small.size_out)}), so that no stages can be told: name layers instead"
    )


def _expansions(convs: Sequence[Layer], numbers: dict[str, int]) -> dict[str, int]:
    """The stages of pointwise convolutions that open a block whose next one has a stride: that of the next one.

    Such are the first ones of bottlenecks and inverted residuals. The block is told by the names of its layers.
    """
    found = {}
    for index in range(1, len(convs) - 1):
        conv, following, number = convs[index], convs[index + 1], numbers[convs[index].name]
        before = next(c for c in reversed(convs[:index]) if numbers[c.name] <= number or c is convs[0])
        fed = following.size_in == conv.size_out and following.shape[1] * following.groups == conv.shape[0]
        block = _common(conv.name, following.name)
        if (
            _is_pointwise(conv)
            and fed
            and numbers[following.name] > number
            and block
            and not inside(before.name, block)
        ):
            found[conv.name] = numbers[following.name]
    return found


def _is_pointwise(conv: Layer) -> bool:
    return all(length == 1 for length in conv.shape[2:]) and conv.size_in == conv.size_out


def _common(one: str, other: str) -> tuple[str, ...]:
    """The innermost module that holds two layers; none where names have no common part.

    >>> _common("layer2.0.conv1", "layer2.0.conv2"), _common("conv1", "conv2")
    (('layer2.0',), ())
    """
    pairs = zip(one.split(".")[:-1], other.split(".")[:-1], strict=False)
    parts: list[str] = []
    for mine, theirs in pairs:
        if mine != theirs:
            break
        parts.append(mine)
    return (".".join(parts),) if parts else ()


def _ratio(larger: Size, smaller: Size) -> float:
    return min(b / a for a, b in zip(larger, smaller, strict=True))


def _text(size: Size | None) -> str:
    return "x".join(map(str, size or ()))
