"""Random small networks as ONNX graphs: a number gives the network, the same one each time.

Each is a chain of layers and branches on odd-sized feature maps and an ending: a classifier, or a dense output.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable

import onnx
import random_layers as layers
import random_shaping as shaping
from random_activations import activate, activation
from random_graph import Graph, Value
from random_layers import convolution, linear, pointwise

Layer = Callable[[Graph, Value], Value | None]  # None: not possible for this value
FOREIGN = "something that TFLite lacks"
LARGEST = 2500  # numbers in a feature map


@dataclasses.dataclass(frozen=True)
class RandomNetwork:
    """The graph, the shape of one image, and how often each kind of operator occurs."""

    model: onnx.ModelProto
    shape: tuple[int, ...]
    kinds: Counter[str]


def random_network(seed: int) -> RandomNetwork:
    """The network of this number."""
    g = Graph(seed, 0, 0, 0)
    g.input = Value("input", (g.integer(1, 4), g.integer(5, 13), g.integer(5, 13)))
    x = activate(g, layers.conv(g, g.input))
    for _ in range(g.integer(2, 7)):
        x = _next(g, x)
    end = g.choice(list(ENDINGS))
    g.note(f"ending {end}")
    return RandomNetwork(g.model(ENDINGS[end](g, x)), g.input.shape, g.kinds)


def _next(g: Graph, x: Value) -> Value:
    """One more layer, where it is possible and the map stays small."""
    g.images.append(x)
    mark = len(g.nodes), g.kinds.copy()
    result = g.choice(LAYERS)(g, x)
    if result is None or math.prod(result.shape) > LARGEST:
        del g.nodes[mark[0] :]
        g.kinds = mark[1]
        return x
    return result


def squeeze_excite(g: Graph, x: Value) -> Value:
    """A gate for each channel, computed from its mean; the mean as GlobalAveragePool or ReduceMean."""
    shape = (x.channels, 1, 1)
    if g.chance(0.5):
        mean = g.add("GlobalAveragePool", [x], shape)
    else:
        mean = g.add("ReduceMean", [x, g.constant([2, 3])], shape, form="keepdims", keepdims=1)
    inner = pointwise(g, mean, g.integer(1, 4))
    outer = pointwise(g, g.add("Relu", [inner], inner.shape), x.channels)
    gate = g.add(g.choice(["Sigmoid", "HardSigmoid"]), [outer], shape)
    return g.add("Mul", [x, gate] if g.chance(0.5) else [gate, x], x.shape, form="of a gate")


def residual(g: Graph, x: Value) -> Value:
    """A branch joined with what it came from; either side may be an activation that others use too."""
    branch = convolution(g, x, x.channels, same=True)
    if g.chance(0.5):
        branch = convolution(g, activate(g, branch), x.channels, same=True)
    op = g.choice(["Add", "Add", "Add", "Mul", "Sub", "Max", "Min"])
    joined = g.add(op, [branch, x] if g.chance(0.5) else [x, branch], x.shape, form="of two maps")
    return activate(g, joined) if g.chance(0.6) else joined


def two_users(g: Graph, x: Value) -> Value:
    """A convolution, its activation, or both are used twice."""
    inner = convolution(g, x, x.channels, same=True)
    active = g.add("Relu", [inner], inner.shape)
    g.note("Relu and what it reads are both used")
    other = g.choice([inner, active])
    return g.add("Add", [other, convolution(g, active, x.channels, same=True)], x.shape)


def concat(g: Graph, x: Value) -> Value:
    """With a branch, or with an earlier map of the same size."""
    fitting = [value for value in g.images if value.shape[1:] == x.shape[1:]]
    other = g.choice(fitting) if g.chance(0.5) else activate(g, convolution(g, x, g.integer(1, 4), same=True))
    parts = [x, other] if g.chance(0.5) else [other, x, other]
    channels = sum(part.channels for part in parts)
    return g.add("Concat", parts, (channels, *x.shape[1:]), form="axis 1", axis=1)


def with_constant(g: Graph, x: Value) -> Value:
    """Arithmetic with a constant of any shape that broadcasts, on either side."""
    c, h, w = x.shape
    shape = g.choice([(), (1,), (c, 1, 1), (1, c, 1, 1), (c, h, w), (w,), (h, 1), (1, 1, h, w)])
    op = g.choice(["Add", "Sub", "Mul", "Div", "Max", "Min"])
    if op == "Div":  # a divisor that stays away from zero
        return g.add(op, [x, g.floats(g.rng.uniform(0.5, 2.0, shape))], x.shape, form="by a constant")
    number = g.noise(*shape)
    g.note(f"constant of {len(shape)} axes")
    if g.chance(0.4):
        return g.add(op, [number, x], x.shape, form="from a constant")
    return g.add(op, [x, number], x.shape, form="of a constant")


def arithmetic(g: Graph, x: Value) -> Value:
    """Functions of one number that need a fitting range."""
    square = g.add("Mul", [x, x], x.shape, form="of a map with itself")
    op = g.choice(["Sqrt", "Pow", "Exp", "Log", "Reciprocal", "Square root of Pow"])
    if op == "Exp":
        return g.add("Exp", [g.add("Tanh", [x], x.shape)], x.shape)
    if op == "Pow":
        return g.add("Pow", [g.add("Tanh", [x], x.shape), g.floats(g.choice([2.0, 3.0]))], x.shape)
    positive = g.add("Add", [square, g.floats(0.5)], x.shape)
    if op == "Square root of Pow":
        return g.add("Pow", [positive, g.floats(0.5)], x.shape, form="0.5")
    return g.add(op, [positive], x.shape)


def foreign(g: Graph, x: Value) -> Value | None:
    """Now and then something that TFLite lacks: such a network must be refused."""
    if g.chance(0.7) or max(x.shape[1:]) > 12 or min(x.shape[1:]) < 3:
        return None
    g.note(FOREIGN)
    c, h, w = x.shape
    op = g.choice(["Erf", "LRN", "MaxPool", "Pad", "Resize"])
    if op == "MaxPool":
        return g.add(op, [x], (c, h - 2, w - 2), kernel_shape=[2, 2], dilations=[2, 2])
    if op == "Pad":
        return g.add(op, [x, g.constant([0, 0, 1, 0, 0, 0, 0, 1])], (c, h + 1, w + 1), mode="edge")
    if op == "Resize":
        return g.add(op, [x, "", g.floats([1, 1, 2, 2])], (c, 2 * h, 2 * w), mode="cubic")
    return g.add("LRN", [x], x.shape, size=3) if op == "LRN" else g.add(op, [x], x.shape)


def pooled_gemm(g: Graph, x: Value) -> Value:
    flat = g.add("Flatten", [g.add("GlobalAveragePool", [x], (x.channels, 1, 1))], (x.channels,))
    return gemm(g, flat)


def gemm(g: Graph, x: Value) -> Value:
    """With the weight either way round, now and then without a bias or with factors."""
    width, c = g.integer(2, 6), x.shape[0]
    transposed = g.integer(0, 1)
    weight = g.weight(width, c, fan_in=c) if transposed else g.weight(c, width, fan_in=c)
    inputs = [x, weight, g.noise(width)] if g.chance(0.8) else [x, weight]
    factors = {"alpha": 0.5, "beta": 2.0} if len(inputs) == 3 and g.chance(0.1) else {}
    return g.add("Gemm", inputs, (width,), form=f"transB {transposed}", transB=transposed, **factors)


def flat_gemm(g: Graph, x: Value) -> Value:
    """Weights in the order of ONNX's Flatten, of one map or of two."""
    flat = _flat(g, x)
    if g.chance(0.3):
        flat = activate_row(g, flat)
    if g.chance(0.2):
        other = _flat(g, g.choice(g.images))
        flat = g.add("Concat", [flat, other], (flat.shape[0] + other.shape[0],), form="of rows", axis=1)
    hidden = gemm(g, flat)
    return gemm(g, g.add("Relu", [hidden], hidden.shape)) if g.chance(0.4) else hidden


def _flat(g: Graph, x: Value) -> Value:
    size = math.prod(x.shape)
    if g.chance(0.5):
        return g.add("Flatten", [x], (size,), form="of a map")
    return g.add("Reshape", [x, g.constant([g.choice([0, -1]), size])], (size,), form="to a row")


def activate_row(g: Graph, x: Value) -> Value:
    return g.add(g.choice(["Relu", "Tanh", "HardSwish"]), [x], x.shape, form="of a row")


def mean_linear(g: Graph, x: Value) -> Value:
    """ReduceMean without keepdims, MatMul, and now and then a Softmax."""
    axes = g.choice([[2, 3], [-1, -2]])
    mean = g.add("ReduceMean", [x, g.constant(axes)], (x.channels,), form="no keepdims", keepdims=0)
    scores = linear(g, mean, g.integer(2, 6))
    return g.add("Softmax", [scores], scores.shape, form="of scores", axis=-1) if g.chance(0.4) else scores


def conv_head(g: Graph, x: Value) -> Value:
    """SqueezeNet's: a map for each class, averaged."""
    scores = pointwise(g, x, g.integer(2, 6))
    return g.add("Flatten", [g.add("GlobalAveragePool", [scores], (scores.channels, 1, 1))], (scores.channels,))


def max_linear(g: Graph, x: Value) -> Value:
    largest = g.add("GlobalMaxPool", [x], (x.channels, 1, 1))
    row = g.add("Squeeze", [largest, g.constant([2, 3])], (x.channels,))
    return gemm(g, row)


def dense(g: Graph, x: Value) -> Value:
    """A class for each pixel."""
    return pointwise(g, x, g.integer(1, 4))


def as_it_is(g: Graph, x: Value) -> Value:
    return x if g.nodes[-1].output[0] == x.name else g.add("Relu", [x], x.shape)


def row(g: Graph, x: Value) -> Value:
    """The order of Flatten must be ONNX's."""
    return _flat(g, x)


LAYERS: list[Layer] = [
    *[layers.conv] * 4,
    *[activation] * 3,
    *[shaping.pool] * 3,
    *[residual] * 2,
    *[concat] * 2,
    *[with_constant] * 3,
    *[arithmetic] * 2,
    *[shaping.resize] * 2,
    layers.same_conv,
    layers.batchnorm,
    layers.affine,
    *[layers.transposed_conv] * 2,
    layers.layer_norm,
    foreign,
    two_users,
    squeeze_excite,
    shaping.depth_to_space,
    shaping.gather,
    *[shaping.pad] * 2,
    shaping.reduce,
    shaping.shuffle,
    shaping.slices,
    shaping.space_to_depth,
    shaping.split,
    shaping.tokens,
    shaping.turned,
]
ENDINGS: dict[str, Callable[[Graph, Value], Value]] = {
    "pooled Gemm": pooled_gemm,
    "Flatten Gemm": flat_gemm,
    "mean MatMul": mean_linear,
    "1 x 1 convolution": conv_head,
    "largest Gemm": max_linear,
    "dense": dense,
    "as it is": as_it_is,
    "row": row,
}
