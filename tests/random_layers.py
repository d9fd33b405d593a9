"""Layers of random networks with weights: convolutions of every form, and norms."""

from __future__ import annotations

from random_graph import Graph, Value


def conv(g: Graph, x: Value) -> Value:
    """Dense, grouped or depthwise, of any kernel, stride, dilation and padding."""
    style = g.choice(["dense", "dense", "grouped", "depthwise"])
    group, c_out = _groups(g, x.channels, style)
    return convolution(g, x, c_out, group=group)


def _groups(g: Graph, c_in: int, style: str) -> tuple[int, int]:
    """Number of groups, and of output channels."""
    if style == "depthwise" and c_in > 1:
        return c_in, c_in * g.integer(1, 2)
    divisors = [d for d in range(2, c_in) if c_in % d == 0]
    if style == "grouped" and divisors:
        group = g.choice(divisors)
        return group, group * g.integer(1, 3)
    return 1, g.integer(1, 8)


def convolution(g: Graph, x: Value, c_out: int, *, group: int = 1, same: bool = False) -> Value:
    """A convolution; ``same`` keeps height and width."""
    kernels, strides, dilations, pads, sizes = [], [], [], [], []
    for size in x.shape[1:]:
        kernel = g.choice([1, 3, 5]) if same else g.integer(1, 5)
        dilation = g.choice([1, 1, 1, 2, 3])
        stride = 1 if same else g.choice([1, 1, 1, 2, 2, 3])
        reach = dilation * (kernel - 1)
        before, after = (reach // 2,) * 2 if same else _padding(g, reach, size)
        if size + before + after <= reach:
            kernel, dilation, reach, before, after = 1, 1, 0, 0, 0
        kernels.append(kernel)
        dilations.append(dilation)
        strides.append(stride)
        pads.append((before, after))
        sizes.append((size + before + after - reach - 1) // stride + 1)
    return _convolution_node(g, x, (c_out, *sizes), group, kernels, strides, dilations, pads)


def _convolution_node(
    g: Graph,
    x: Value,
    shape: tuple[int, ...],
    group: int,
    kernels: list[int],
    strides: list[int],
    dilations: list[int],
    pads: list[tuple[int, int]],
) -> Value:
    fan_in = x.channels // group
    for k in kernels:
        fan_in *= k
    inputs: list[Value | str] = [x, g.weight(shape[0], x.channels // group, *kernels, fan_in=fan_in)]
    if g.chance(0.7):
        inputs.append(g.noise(shape[0], size=0.3))
    style = "dense" if group == 1 else "depthwise" if group == x.channels else "grouped"
    _note_window(g, f"Conv {style}", strides, dilations, pads)
    return g.add(
        "Conv",
        inputs,
        shape,
        group=group,
        kernel_shape=kernels,
        strides=strides,
        dilations=dilations,
        pads=[*(p[0] for p in pads), *(p[1] for p in pads)],
    )


def _note_window(g: Graph, kind: str, strides: list[int], dilations: list[int], pads: list[tuple[int, int]]) -> None:
    g.note(kind)
    if max(strides) > 1:
        g.note(f"{kind}, strided")
    if max(dilations) > 1:
        g.note(f"{kind}, dilated")
    if any(before != after for before, after in pads):
        g.note(f"{kind}, padded unevenly")
    elif any(before for before, _ in pads):
        g.note(f"{kind}, padded evenly")


def _padding(g: Graph, reach: int, size: int) -> tuple[int, int]:
    """None, what SAME would be in PyTorch, the other way round, or anything."""
    way = g.choice(["none", "half", "half", "before", "any"])
    if way == "none" or reach == 0:
        return 0, 0
    if way == "half":
        return reach // 2, reach // 2
    if way == "before":
        return reach - reach // 2, reach // 2
    return g.integer(0, min(reach, size)), g.integer(0, min(reach, size))


def same_conv(g: Graph, x: Value) -> Value:
    """Padded by auto_pad instead of numbers; onnxruntime 1.19.2 is wrong where the stride exceeds the kernel."""
    kernel, mode = g.integer(1, 4), g.choice(["SAME_UPPER", "SAME_LOWER"])
    stride = g.integer(1, min(3, kernel))
    c_out = g.integer(1, 6)
    inputs = [x, g.weight(c_out, x.channels, kernel, kernel, fan_in=x.channels * kernel**2), g.noise(c_out)]
    shape = (c_out, *(-(-size // stride) for size in x.shape[1:]))
    strides, kernels = [stride, stride], [kernel, kernel]
    return g.add("Conv", inputs, shape, form=mode, kernel_shape=kernels, strides=strides, auto_pad=mode)


def batchnorm(g: Graph, x: Value) -> Value:
    """Behind whatever comes; now and then behind a convolution of its own, where it can be folded."""
    if g.chance(0.6):
        x = conv(g, x)
    c = x.channels
    scale, variance = g.noise(c, size=0.3, mean=1.0), g.floats(g.rng.uniform(0.5, 2.0, c))
    return g.add("BatchNormalization", [x, scale, g.noise(c), g.noise(c, size=0.3), variance], x.shape)


def affine(g: Graph, x: Value) -> Value:
    """Mul and Add of a number for each channel: a norm that someone wrote out."""
    scale, shift = g.noise(x.channels, 1, 1, size=0.3, mean=1.0), g.noise(1, x.channels, 1, 1)
    return g.add("Add", [g.add("Mul", [x, scale], x.shape, form="channels"), shift], x.shape, form="channels")


def pointwise(g: Graph, x: Value, c_out: int) -> Value:
    """A 1 x 1 convolution with a bias."""
    inputs = [x, g.weight(c_out, x.channels, 1, 1, fan_in=x.channels), g.noise(c_out, size=0.3)]
    return g.add("Conv", inputs, (c_out, *x.shape[1:]), form="1 x 1")


def transposed_conv(g: Graph, x: Value) -> Value | None:
    """Upwards: any kernel, stride, padding and output padding."""
    if max(x.shape[1:]) > 10:
        return None
    c_out, kernel, stride = g.integer(1, 6), g.integer(1, 4), g.integer(1, 3)
    before, after = (g.integer(0, (kernel - 1) // 2) for _ in range(2))
    extra = g.integer(0, stride - 1) if g.chance(0.5) else 0
    shape = (c_out, *((size - 1) * stride + kernel - before - after + extra for size in x.shape[1:]))
    inputs = [x, g.weight(x.channels, c_out, kernel, kernel, fan_in=x.channels * kernel), g.noise(c_out, size=0.3)]
    if min(shape) < 1:
        return None
    return g.add(
        "ConvTranspose",
        inputs,
        shape,
        form="with output padding" if extra else "padded" if before + after else "",
        kernel_shape=[kernel] * 2,
        strides=[stride] * 2,
        pads=[before, before, after, after],
        output_padding=[extra] * 2,
    )


def layer_norm(g: Graph, x: Value) -> Value:
    """Over channels, as ConvNeXt does: between two Transposes."""
    if x.channels < 3:
        x = pointwise(g, x, 4)
    c, *positions = x.shape
    # A small mean: where it exceeds the spread, onnxruntime 1.19.2 loses 30 times as many digits as TFLite.
    mean = g.add("ReduceMean", [x, g.constant([1])], (1, *positions), keepdims=1)
    x = g.add("Add", [g.add("Sub", [x, mean], x.shape), g.floats(0.5)], x.shape)
    last = g.add("Transpose", [x], (*positions, c), perm=[0, 2, 3, 1])
    inputs = [last, g.noise(c, size=0.3, mean=1.0), g.noise(c, size=0.3)]
    normal = g.add("LayerNormalization", inputs, last.shape, axis=-1, epsilon=1e-2)
    if g.chance(0.5):
        width = g.integer(2, 6)
        normal = linear(g, normal, width)
        c = width
    return g.add("Transpose", [normal], (c, *positions), perm=[0, 3, 1, 2])


def linear(g: Graph, x: Value, width: int) -> Value:
    """MatMul and Add over the last axis."""
    product = g.add("MatMul", [x, g.weight(x.shape[-1], width, fan_in=x.shape[-1])], (*x.shape[:-1], width))
    return g.add("Add", [product, g.noise(width, size=0.3)], product.shape, form="behind MatMul")
