"""Activations of random networks, in every spelling that exporters use."""

from __future__ import annotations

from collections.abc import Callable

from random_graph import Graph, Value
from random_layers import conv


def activation(g: Graph, x: Value) -> Value:
    """Half of them behind a convolution, so that there is something to fuse them with."""
    if g.chance(0.5):
        x = conv(g, x)
    return activate(g, x)


def activate(g: Graph, x: Value) -> Value:
    name = g.choice([*ACTIVATIONS, "Relu", "Relu", "Clip 0 6"])
    g.note(f"activation {name}")
    return ACTIVATIONS[name](g, x)


def _clip(low: float | None, high: float | None) -> Callable[[Graph, Value], Value]:
    def layer(g: Graph, x: Value) -> Value:
        limits = [g.floats(limit) if limit is not None else "" for limit in (low, high)]
        return g.add("Clip", [x, *limits] if high is not None else [x, limits[0]], x.shape)

    return layer


def _unary(op: str, **attributes: float) -> Callable[[Graph, Value], Value]:
    return lambda g, x: g.add(op, [x], x.shape, **attributes)


def _gated(op: str, **attributes: float) -> Callable[[Graph, Value], Value]:
    """x times a function of x: SiLU and HardSwish as exporters write them."""
    return lambda g, x: g.add("Mul", [x, g.add(op, [x], x.shape, **attributes)], x.shape, form=f"gated by {op}")


def _prelu(g: Graph, x: Value) -> Value:
    shape = (x.shape[0], *[1] * (len(x.shape) - 1)) if g.chance(0.7) else (1,)
    return g.add("PRelu", [x, g.noise(*shape, size=0.3)], x.shape)


def _gelu(g: Graph, x: Value) -> Value:
    """With Erf, as PyTorch's exporter writes it for opset 18."""
    inner = g.add("Erf", [g.add("Div", [x, g.floats(2**0.5)], x.shape)], x.shape)
    more = g.add("Add", [inner, g.floats(1.0)], x.shape)
    return g.add("Mul", [g.add("Mul", [x, more], x.shape), g.floats(0.5)], x.shape, form="Gelu")


def _softmax(g: Graph, x: Value) -> Value:
    axis = g.choice([axis for axis in (1, -1) if x.shape[0 if axis == 1 else -1] > 1] or [1])
    name = g.choice(["Softmax", "Softmax", "LogSoftmax"])
    return g.add(name, [x], x.shape, form=f"axis {axis}", axis=axis)


ACTIVATIONS: dict[str, Callable[[Graph, Value], Value]] = {
    "Relu": _unary("Relu"),
    "Clip 0 6": _clip(0, 6),
    "Clip -1 1": _clip(-1, 1),
    "Clip 0 1": _clip(0, 1),
    "Clip -0.3 0.8": _clip(-0.3, 0.8),
    "Clip below": _clip(-0.5, None),
    "Clip above": _clip(None, 0.7),
    "Clip 0": _clip(0, None),
    "LeakyRelu": _unary("LeakyRelu", alpha=0.1),
    "LeakyRelu default": _unary("LeakyRelu"),
    "HardSwish": _unary("HardSwish"),
    "HardSigmoid": _unary("HardSigmoid"),
    "HardSigmoid of PyTorch": _unary("HardSigmoid", alpha=1 / 6),
    "Sigmoid": _unary("Sigmoid"),
    "Tanh": _unary("Tanh"),
    "PRelu": _prelu,
    "Elu": _unary("Elu"),
    "Softplus": _unary("Softplus"),
    "Abs": _unary("Abs"),
    "Neg": _unary("Neg"),
    "SiLU": _gated("Sigmoid"),
    "HardSwish written out": _gated("HardSigmoid", alpha=1 / 6),
    "Gelu": _gelu,
    "Softmax": _softmax,
}
