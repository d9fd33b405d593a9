"""Small hand-made networks, at least one for each operator that has an int8 form: (2, 9, 8, 6) images in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lorac_exporters.tflite.network import Network, Operator, Option, Source, Tensor

SHAPE = (9, 8, 6)


def images(seed: int = 0, count: int = 2, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Random images, float32, neither centred nor of unit size."""
    return (np.random.default_rng(seed).normal(0.3, 1.5, (count, *shape))).astype(np.float32)


class Builder:
    """Adds operators one by one; ``net`` closes the network."""

    def __init__(self, shape: tuple[int, ...] = SHAPE, dtype: str = "float32") -> None:
        self.rng = np.random.default_rng(1)
        self.x = Tensor("x", (1, *shape), "uint8" if dtype == "uint8" else "float32", batch_axis=0)
        self.operators: list[Operator] = []
        self.count = 0

    def constant(self, content: np.ndarray, *, source: bool = False) -> Tensor:
        """A constant; with ``source`` it is an initializer as it stands."""
        self.count += 1
        name, kind = f"c{self.count}", "int32" if content.dtype == np.int32 else "float32"
        origin = Source(name, content.shape) if source else None
        return Tensor(name, content.shape, kind, data=content.astype(kind), source=origin)

    def normal(self, *shape: int, size: float = 0.3) -> Tensor:
        """Random weights."""
        return self.constant(self.rng.normal(0, size, shape).astype(np.float32), source=True)

    def add(self, kind: str, inputs: list[Tensor], *shapes: tuple[int, ...], **options: Option) -> Tensor:
        """An operator with outputs of these shapes without the batch; returns the first."""
        self.count += 1
        outputs = [Tensor(f"{kind.lower()}{self.count}_{i}", (1, *s), batch_axis=0) for i, s in enumerate(shapes)]
        self.operators.append(Operator(kind, list(inputs), outputs, options))
        return outputs[0]

    def conv(self, x: Tensor, channels: int, k: int = 3, *, stride: int = 1, act: str = "NONE") -> Tensor:
        """A dense convolution with SAME padding."""
        weight, bias = self.normal(channels, k, k, x.shape[-1]), self.normal(channels)
        sizes = tuple(-(-s // stride) for s in x.shape[1:3])
        return self.add("CONV_2D", [x, weight, bias], (*sizes, channels), **conv_options(stride, act=act))

    def net(self, *outputs: Tensor) -> Network:
        """The network with these outputs; those of the last operator by default."""
        ends = list(outputs) or self.operators[-1].outputs
        return Network(self.operators, [self.x], ends, ("x",), tuple(t.name for t in ends))


def conv_options(stride: int = 1, dilation: int = 1, *, act: str = "NONE", padding: str = "SAME") -> dict[str, Option]:
    """Options of a convolution."""
    return {
        "padding": padding,
        "stride_w": stride,
        "stride_h": stride,
        "dilation_w_factor": dilation,
        "dilation_h_factor": dilation,
        "fused_activation_function": act,
    }


def conv(stride: int = 1, dilation: int = 1, *, act: str = "NONE", padding: str = "SAME", groups: int = 1) -> Network:
    b = Builder()
    cut = 2 * dilation if padding == "VALID" else 0
    sizes = tuple(-(-(s - cut) // stride) for s in SHAPE[:2])
    inputs = [b.x, b.normal(8, 3, 3, SHAPE[2] // groups), b.normal(8)]
    options = conv_options(stride, dilation, act=act, padding=padding)
    b.add("CONV_2D", inputs, (*sizes, 8), **options)
    return b.net()


def depthwise(stride: int = 1, dilation: int = 1, multiplier: int = 1, act: str = "NONE") -> Network:
    b = Builder()
    channels = SHAPE[2] * multiplier
    sizes = tuple(-(-s // stride) for s in SHAPE[:2])
    inputs = [b.x, b.normal(1, 3, 3, channels), b.normal(channels)]
    b.add(
        "DEPTHWISE_CONV_2D",
        inputs,
        (*sizes, channels),
        depth_multiplier=multiplier,
        **conv_options(stride, dilation, act=act),
    )
    return b.net()


def linear(act: str = "NONE") -> Network:
    b = Builder((12,))
    b.add("FULLY_CONNECTED", [b.x, b.normal(7, 12), b.normal(7)], (7,), fused_activation_function=act)
    return b.net()


def pool(kind: str, padding: str, k: int = 3) -> Network:
    b = Builder()
    sizes = tuple(-(-(s - (k - 1 if padding == "VALID" else 0)) // 2) for s in SHAPE[:2])
    b.add(kind, [b.x], (*sizes, 6), padding=padding, stride_w=2, stride_h=2, filter_width=k, filter_height=k)
    return b.net()


def binary(kind: str, act: str = "NONE") -> Network:
    """Two activations with different scales."""
    b = Builder()
    half = b.conv(b.x, 6, 1)
    options = {} if kind in ("MAXIMUM", "MINIMUM") else {"fused_activation_function": act}
    b.add(kind, [b.x, half], SHAPE, **options)
    return b.net()


def with_constant(kind: str) -> Network:
    """An activation and one number per channel."""
    b = Builder()
    options = {} if kind in ("PRELU", "MAXIMUM", "MINIMUM") else {"fused_activation_function": "NONE"}
    b.add(kind, [b.x, b.normal(1, 1, 6) if kind == "PRELU" else b.normal(6)], SHAPE, **options)
    return b.net()


def unary(kind: str, shape: tuple[int, ...] = SHAPE, **options: Option) -> Network:
    b = Builder(shape)
    b.add(kind, [b.x], shape, **options)
    return b.net()


def gated(kind: str) -> Network:
    """x times the sigmoid of a projection, as squeeze and excitation does it."""
    b = Builder()
    gate = b.add(kind, [b.conv(b.x, 6, 1)], SHAPE)
    b.add("MUL", [b.x, gate], SHAPE, fused_activation_function="NONE")
    return b.net()


def reduction(kind: str, axes: tuple[int, ...], shape: tuple[int, ...], *, keep: bool) -> Network:
    b = Builder()
    b.add(kind, [b.x, b.constant(np.int32(axes))], shape, keep_dims=keep)
    return b.net()


def concatenation(*, fixed: bool = False) -> Network:
    """Inputs of different ranges; with ``fixed`` one is a sigmoid, whose scale cannot be chosen."""
    b = Builder()
    wide = b.conv(b.x, 4, 1)
    other = b.add("LOGISTIC", [b.x], SHAPE) if fixed else b.x
    b.add("CONCATENATION", [wide, other], (9, 8, 10), axis=3, fused_activation_function="NONE")
    return b.net()


def split(kind: str) -> Network:
    b = Builder()
    axis = b.constant(np.int32(3).reshape(()))
    if kind == "SPLIT":
        b.add(kind, [axis, b.x], (9, 8, 3), (9, 8, 3), num_splits=2)
    else:
        b.add(kind, [b.x, b.constant(np.int32([2, 4])), axis], (9, 8, 2), (9, 8, 4), num_splits=2)
    return b.net()


def sliced(kind: str) -> Network:
    b = Builder()
    if kind == "SLICE":
        bounds = [[0, 1, 2, 0], [-1, 5, 4, 3]]
        b.add(kind, [b.x, *(b.constant(np.int32(n)) for n in bounds)], (5, 4, 3))
    else:
        bounds = [[0, 1, 0, 0], [0, 9, 8, 6], [1, 2, 2, 1]]
        b.add(kind, [b.x, *(b.constant(np.int32(n)) for n in bounds)], (4, 4, 6), begin_mask=1, end_mask=1)
    return b.net()


def padded(value: float | None = None, *, mirror: bool = False) -> Network:
    b = Builder()
    pads = b.constant(np.int32([[0, 0], [1, 2], [0, 1], [2, 0]]))
    if mirror:
        b.add("MIRROR_PAD", [b.x, pads], (12, 9, 8), mode="REFLECT")
        return b.net()
    numbers = [] if value is None else [b.constant(np.float32([value]))]
    b.add("PAD" if value is None else "PADV2", [b.x, pads, *numbers], (12, 9, 8))
    return b.net()


def reshaped(kind: str) -> Network:
    b = Builder()
    if kind == "RESHAPE":
        b.add(kind, [b.x, b.constant(np.int32([-1, 72, 6]))], (72, 6), new_shape=(-1, 72, 6))
    elif kind == "shuffle":
        parts = b.add(
            "RESHAPE", [b.x, b.constant(np.int32([-1, 9, 8, 2, 3]))], (9, 8, 2, 3), new_shape=(-1, 9, 8, 2, 3)
        )
        turned = b.add("TRANSPOSE", [parts, b.constant(np.int32([0, 1, 2, 4, 3]))], (9, 8, 3, 2))
        b.add("RESHAPE", [turned, b.constant(np.int32([-1, 9, 8, 6]))], SHAPE, new_shape=(-1, 9, 8, 6))
    elif kind == "TRANSPOSE":
        b.add(kind, [b.x, b.constant(np.int32([0, 3, 1, 2]))], (6, 9, 8))
    else:
        b.add(kind, [b.x, b.constant(np.int32([5, 0, 3]))], (9, 8, 3), axis=3)
    return b.net()


def resized(kind: str, *, corners: bool = False) -> Network:
    b = Builder()
    nearest = kind == "RESIZE_NEAREST_NEIGHBOR"
    options: dict[str, Option] = {"align_corners": corners, "half_pixel_centers": not corners and not nearest}
    b.add(kind, [b.x, b.constant(np.int32([18, 16]))], (18, 16, 6), **options)
    return b.net()


def blocks(kind: str) -> Network:
    shape, out = ((9, 8, 8), (18, 16, 2)) if kind == "DEPTH_TO_SPACE" else ((8, 10, 3), (4, 5, 12))
    b = Builder(shape)
    b.add(kind, [b.x], out, block_size=2)
    return b.net()


CASES: dict[str, Callable[[], Network]] = {
    "conv": conv,
    "conv relu": lambda: conv(act="RELU"),
    "conv relu6 stride 2": lambda: conv(2, act="RELU6"),
    "conv valid": lambda: conv(padding="VALID"),
    "conv dilated": lambda: conv(dilation=2),
    "conv grouped": lambda: conv(groups=2),
    "depthwise": depthwise,
    "depthwise stride 2 relu6": lambda: depthwise(2, act="RELU6"),
    "depthwise dilated": lambda: depthwise(dilation=2),
    "depthwise multiplier 2": lambda: depthwise(multiplier=2),
    "linear": linear,
    "linear relu": lambda: linear("RELU"),
    "max pool same": lambda: pool("MAX_POOL_2D", "SAME"),
    "max pool valid": lambda: pool("MAX_POOL_2D", "VALID", 2),
    "average pool same": lambda: pool("AVERAGE_POOL_2D", "SAME"),
    "average pool valid": lambda: pool("AVERAGE_POOL_2D", "VALID", 2),
    "add": lambda: binary("ADD"),
    "add relu": lambda: binary("ADD", "RELU"),
    "sub": lambda: binary("SUB"),
    "mul": lambda: binary("MUL"),
    "maximum": lambda: binary("MAXIMUM"),
    "minimum": lambda: binary("MINIMUM"),
    "add constant": lambda: with_constant("ADD"),
    "sub constant": lambda: with_constant("SUB"),
    "mul constant": lambda: with_constant("MUL"),
    "maximum constant": lambda: with_constant("MAXIMUM"),
    "prelu": lambda: with_constant("PRELU"),
    "relu": lambda: unary("RELU"),
    "relu6": lambda: unary("RELU6"),
    "relu n1 to 1": lambda: unary("RELU_N1_TO_1"),
    "leaky relu": lambda: unary("LEAKY_RELU", alpha=0.1),
    "elu": lambda: unary("ELU"),
    "gelu": lambda: unary("GELU", approximate=False),
    "hard swish": lambda: unary("HARD_SWISH"),
    "logistic": lambda: unary("LOGISTIC"),
    "tanh": lambda: unary("TANH"),
    "softmax": lambda: unary("SOFTMAX", (10,), beta=1.0),
    "log softmax": lambda: unary("LOG_SOFTMAX", (10,)),
    "l2 normalization": lambda: unary("L2_NORMALIZATION", fused_activation_function="NONE"),
    "gate": lambda: gated("LOGISTIC"),
    "gate hard swish": lambda: gated("HARD_SWISH"),
    "mean spatial": lambda: reduction("MEAN", (1, 2), (6,), keep=False),
    "mean spatial kept": lambda: reduction("MEAN", (1, 2), (1, 1, 6), keep=True),
    "mean channels": lambda: reduction("MEAN", (3,), (9, 8), keep=False),
    "mean rows": lambda: reduction("MEAN", (1,), (8, 6), keep=False),
    "reduce max": lambda: reduction("REDUCE_MAX", (1, 2), (6,), keep=False),
    "reduce min": lambda: reduction("REDUCE_MIN", (3,), (9, 8), keep=False),
    "concatenation": concatenation,
    "concatenation of a sigmoid": lambda: concatenation(fixed=True),
    "split": lambda: split("SPLIT"),
    "split at sizes": lambda: split("SPLIT_V"),
    "slice": lambda: sliced("SLICE"),
    "strided slice": lambda: sliced("STRIDED_SLICE"),
    "pad": padded,
    "pad by mirroring": lambda: padded(mirror=True),
    "pad with a number": lambda: padded(9.0),
    "pad with minus infinity": lambda: padded(float(np.finfo(np.float32).min)),
    "reshape": lambda: reshaped("RESHAPE"),
    "transpose": lambda: reshaped("TRANSPOSE"),
    "channel shuffle": lambda: reshaped("shuffle"),
    "gather": lambda: reshaped("GATHER"),
    "resize nearest": lambda: resized("RESIZE_NEAREST_NEIGHBOR"),
    "resize bilinear": lambda: resized("RESIZE_BILINEAR"),
    "resize bilinear corners": lambda: resized("RESIZE_BILINEAR", corners=True),
    "depth to space": lambda: blocks("DEPTH_TO_SPACE"),
    "space to depth": lambda: blocks("SPACE_TO_DEPTH"),
}
