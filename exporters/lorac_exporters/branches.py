"""Low-rank adapters as nodes of a graph that plain onnxruntime trains: thin branches, or updated weights.

``branch`` computes conv(x, W) + conv(conv(x, A), B), both thin: the trunk keeps its constant weight, for which engines
have their fastest kernels, and no gradient of the whole weight is ever formed. ``weight`` computes conv(x, W + delta).
Both equal `lorac_runtime.delta` in value. Of a fully connected layer the branch is (x A^T) (scale B)^T. Adapters of
several pairs of factors (kernel-wise LoRA) exist as updated weights only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.choices import FORM_CHOICES as FORM_CHOICES
from lorac_exporters.choices import FORMS as FORMS
from lorac_exporters.choices import Form as Form
from lorac_exporters.choices import FormChoice as FormChoice
from lorac_exporters.form_costs import cheaper_form
from lorac_exporters.gradients.geometry import Geometry
from lorac_exporters.gradients.tape import Attributes, Dims, Tape, dims, sizes
from lorac_exporters.graph_tools import need, producer
from lorac_exporters.linear_layers import weighted_nodes
from lorac_runtime.delta import adapter_shapes, conv_dims
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import Adapter, TrainingDefaults

FormOf = Callable[[Adapter, Geometry], Form]
LEAST_RATIO, LEAST_RATIO_STRIDED = 8 / 3, 4 / 3  # channels per tap and rank from which shifts pay, measured


def form_of(choice: FormChoice, batch: int = TrainingDefaults.batch_size) -> FormOf:
    """How the form of a layer's adapter is chosen: the one asked for, or what costs less at this batch size.

    The function raises ConversionError for an adapter that has no branch, where one was asked for.

    >>> form_of("weight")(None, None)
    'weight'
    """
    if choice == "auto":
        return lambda adapter, geometry: cheaper_form(adapter, geometry, batch)
    return (lambda _adapter, _geometry: "weight") if choice == "weight" else _branch_only


def _branch_only(adapter: Adapter, _: Geometry) -> Form:
    if adapter.pairs > 1:
        raise ConversionError(
            f"form branch: {adapter.layer} has an adapter of {adapter.pairs} pairs of factors (kernel-wise), which "
            "exists as an updated weight only; take form weight or auto"
        )
    return "branch"


@dataclasses.dataclass(frozen=True)
class Factors:
    """The tensors of one adapter in the graph: lora_a (pairs * rank, c_in/groups * k_w), lora_b (c_out * k_h, rank).

    ``scale`` is alpha / r: a number, or (1,) where alpha trains.
    """

    a: ir.Value
    b: ir.Value
    scale: ir.Value | float


def add_adapters(tape: Tape, adapters: Mapping[str, Adapter], factors: Mapping[str, Factors], form: FormOf) -> None:
    """Give every adapted layer of the tape's graph its adapter, in place. Keys are names of weights.

    Raises ConversionError if a weight is not that of a convolution or Gemm, or an adapter has no such form.
    """
    graph = tape.graph
    nodes = weighted_nodes(graph)
    missing = sorted(adapters.keys() - nodes.keys())
    if missing:
        raise ConversionError(f"no layer of the graph uses {', '.join(missing)}; was the graph changed?")
    for name, adapter in adapters.items():
        node, (c_out, c_in, *_) = nodes[name], adapter.weight_shape
        geometry = Geometry.of(node) if node.op_type == "Conv" else Geometry.without_axes(c_in, c_out)
        _FORMS[form(adapter, geometry)](tape, node, geometry, adapter, factors[name])
    graph.sort()


def _add_branch(tape: Tape, layer: ir.Node, g: Geometry, adapter: Adapter, factors: Factors) -> None:
    y = layer.outputs[0]
    result = (_thin_products if g.rank == 0 else _thin_convolutions)(tape, layer, g, adapter, factors)
    total = tape.op("Add", y, result, like=y, name=f"{adapter.layer}.adapted")
    adder = producer(total)
    y.replace_all_uses_with(total, replace_graph_outputs=True)
    adder.replace_input_with(0, y)


def _thin_products(tape: Tape, gemm: ir.Node, _: Geometry, adapter: Adapter, factors: Factors) -> ir.Value:
    """(x A^T) (scale B)^T."""
    y, turned = gemm.outputs[0], {"transB": 1}
    few = (dims(y)[0], adapter.rank)
    hidden = tape.op(
        "Gemm", need(gemm.inputs[0]), factors.a, shape=few, attributes=turned, name=f"{adapter.layer}.down"
    )
    return tape.op("Gemm", hidden, _scaled(tape, factors), like=y, attributes=turned, name=f"{adapter.layer}.up")


def _thin_convolutions(tape: Tape, conv: ir.Node, g: Geometry, adapter: Adapter, factors: Factors) -> ir.Value:
    y = conv.outputs[0]
    split = _paper if adapter.layout == "paper" and g.taps > 1 else _spatial
    middle, down, up = split(tape, g, adapter, factors)
    hidden = _to_few(tape, need(conv.inputs[0]), down, attributes=middle.attributes(), shape=middle.shape(y))
    return _from_few(tape, hidden, up, attributes=middle.rest(), like=y)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How stride, padding and dilation of a convolution are shared by the two thin ones that stand for it.

    ``first`` marks the axes that the first of them handles.
    """

    g: Geometry
    channels: int
    first: tuple[bool, ...]

    def attributes(self) -> Attributes:
        """Attributes of the first convolution."""
        return self._attributes(self.first)

    def rest(self) -> Attributes:
        """Attributes of the second."""
        return self._attributes(tuple(not taken for taken in self.first))

    def _attributes(self, taken: tuple[bool, ...]) -> Attributes:
        def chosen(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
            return tuple(v if t else neutral for v, t in zip(values, taken, strict=True))

        g = self.g
        pads = (*chosen(g.begins, 0), *chosen(g.ends, 0))
        spread = {"strides": chosen(g.strides, 1), "dilations": chosen(g.dilations, 1)}
        return {**spread, "pads": pads, "group": g.groups}

    def shape(self, y: ir.Value) -> tuple[int | str | None, ...]:
        """Shape of what lies between the two."""
        axes = zip(self.first, self.g.out_size, self.g.in_size, strict=True)
        return (dims(y)[0], self.channels, *(out if taken else whole for taken, out, whole in axes))


def _to_few(tape: Tape, x: ir.Value, weight: ir.Value, *, attributes: Attributes, shape: Dims) -> ir.Value:
    """A convolution to few channels, weight (few, many, *kernel).

    Where `_shifts_pay`: a pointwise one to a channel for each tap, then a constant one that shifts and adds them.
    """
    few, many, *kernel = sizes(weight)
    if not _shifts_pay(few, many, kernel, attributes):
        return tape.op("Conv", x, weight, attributes=attributes, shape=shape)
    taps = math.prod(kernel)
    rows = tape.op("Reshape", weight, tape.ints(few, many, taps), shape=(few, many, taps))
    turned = tape.op("Transpose", rows, shape=(taps, few, many), attributes={"perm": [2, 0, 1]})
    flat = (taps * few, many, *(1,) * len(kernel))
    pointwise = tape.op("Reshape", turned, tape.ints(*flat), shape=flat)
    apart = tape.op("Conv", x, pointwise, shape=(dims(x)[0], taps * few, *dims(x)[2:]))
    ones = np.eye(taps * few, dtype=np.float32).reshape(taps * few, taps, few).transpose(2, 0, 1)
    shifts = tape.constant(ones.reshape(few, taps * few, *kernel))
    return tape.op("Conv", apart, shifts, attributes=attributes, shape=shape)


def _from_few(tape: Tape, x: ir.Value, weight: ir.Value, *, attributes: Attributes, like: ir.Value) -> ir.Value:
    """A convolution from few channels, weight (many, few, *kernel): `_to_few` the other way round."""
    many, few, *kernel = sizes(weight)
    if not _shifts_pay(few, many, kernel, attributes):
        return tape.op("Conv", x, weight, attributes=attributes, like=like)
    taps = math.prod(kernel)
    ones = np.eye(taps * few, dtype=np.float32).reshape(taps * few, taps, few).transpose(0, 2, 1)
    shifts = tape.constant(ones.reshape(taps * few, few, *kernel))
    stacked = tape.op("Conv", x, shifts, attributes=attributes, shape=(dims(x)[0], taps * few, *dims(like)[2:]))
    rows = tape.op("Reshape", weight, tape.ints(many, few, taps), shape=(many, few, taps))
    turned = tape.op("Transpose", rows, shape=(many, taps, few), attributes={"perm": [0, 2, 1]})
    flat = (many, taps * few, *(1,) * len(kernel))
    return tape.op("Conv", stacked, tape.op("Reshape", turned, tape.ints(*flat), shape=flat), like=like)


def _shifts_pay(few: int, many: int, kernel: Sequence[int], attributes: Attributes) -> bool:
    """Whether a thin convolution costs less as a pointwise one and constant shifts (docs/decisions/0013).

    Engines copy the input of a convolution once for each tap, but not that of a pointwise one. The shifts' work grows
    with the square of ``few``. Where a strided convolution is split, its gradient by phases is one of few channels.
    """
    taps, strides = math.prod(kernel), attributes["strides"]
    ratio = LEAST_RATIO if strides == (1,) * len(kernel) else LEAST_RATIO_STRIDED
    return attributes["group"] == 1 and taps > 1 and many >= ratio * taps * few


def _spatial(tape: Tape, g: Geometry, adapter: Adapter, factors: Factors) -> tuple[_Split, ir.Value, ir.Value]:
    """A 1 x k_w convolution to ``rank`` channels, then a k_h x 1 one."""
    c_out, c_in, k_h, k_w = conv_dims(adapter.weight_shape)
    high = () if g.rank == 1 else (1,)
    down_shape = (adapter.rank, c_in, *high, k_w)
    down = tape.op("Reshape", factors.a, tape.ints(*down_shape), shape=down_shape, name=f"{adapter.layer}.down")
    split_shape = (c_out, k_h, adapter.rank)
    scaled = _scaled(tape, factors)
    rows = tape.op("Reshape", scaled, tape.ints(*split_shape), shape=split_shape)
    turned = tape.op("Transpose", rows, shape=(c_out, adapter.rank, k_h), attributes={"perm": [0, 2, 1]})
    up_shape = (c_out, adapter.rank, *((k_h, 1) if g.rank == 2 else (1,)))
    up = tape.op("Reshape", turned, tape.ints(*up_shape), shape=up_shape, name=f"{adapter.layer}.up")
    first = (True,) * g.rank if k_h == 1 else (False, True)
    return _Split(g, g.groups * adapter.rank, first), _repeated(tape, down, g.groups), up


def _paper(tape: Tape, g: Geometry, adapter: Adapter, factors: Factors) -> tuple[_Split, ir.Value, ir.Value]:
    """A convolution with the whole kernel to ``k_h * rank`` channels, then a 1 x 1 one.

    The raw reshape puts row u of a block of ``b @ a`` into the u-th of k_h chunks of the flattened kernel, so each
    row of ``a`` stands in its chunk and zeros elsewhere.
    """
    c_out, c_in, k_h, k_w = conv_dims(adapter.weight_shape)
    chunk, rank = c_in * k_w, adapter.rank
    rows = tape.op("Reshape", factors.a, tape.ints(1, rank, 1, chunk), shape=(1, rank, 1, chunk))
    places = tape.constant(np.eye(k_h, dtype=np.float32).reshape(k_h, 1, k_h, 1))
    spread = tape.op("Mul", rows, places, shape=(k_h, rank, k_h, chunk))
    down_shape = (k_h * rank, *adapter.weight_shape[1:])
    down = tape.op("Reshape", spread, tape.ints(*down_shape), shape=down_shape, name=f"{adapter.layer}.down")
    up_shape = (c_out, k_h * rank, *(1,) * g.rank)
    scaled = _scaled(tape, factors)
    up = tape.op("Reshape", scaled, tape.ints(*up_shape), shape=up_shape, name=f"{adapter.layer}.up")
    return _Split(g, g.groups * k_h * rank, (True,) * g.rank), _repeated(tape, down, g.groups), up


def _scaled(tape: Tape, factors: Factors) -> ir.Value:
    return tape.op("Mul", factors.b, factors.scale, like=factors.b)


def _repeated(tape: Tape, weight: ir.Value, groups: int) -> ir.Value:
    """The same weight once for each group."""
    if groups == 1:
        return weight
    shape = dims(weight)
    times = tape.ints(groups, *(1,) * (len(shape) - 1))
    return tape.op("Tile", weight, times, shape=(groups * int(str(shape[0])), *shape[1:]))


def _add_to_weight(tape: Tape, layer: ir.Node, _: Geometry, adapter: Adapter, factors: Factors) -> None:
    c_out, c_in, k_h, k_w = conv_dims(adapter.weight_shape)
    delta = _product(tape, adapter, factors)
    if adapter.layout == "spatial" and k_h > 1:
        apart = (c_out, k_h, c_in, k_w)
        rows = tape.op("Reshape", delta, tape.ints(*apart), shape=apart)
        delta = tape.op("Transpose", rows, shape=(c_out, c_in, k_h, k_w), attributes={"perm": [0, 2, 1, 3]})
    elif dims(delta) != adapter.weight_shape:
        delta = tape.op("Reshape", delta, tape.ints(*adapter.weight_shape), shape=adapter.weight_shape)
    weight = need(layer.inputs[1])
    total = tape.op("Add", weight, delta, like=weight, name=f"{adapter.layer}.adapted_weight")
    layer.replace_input_with(1, total)


def _product(tape: Tape, adapter: Adapter, factors: Factors) -> ir.Value:
    """scale * B A, (c_out * k_h, c_in * k_w); of several pairs, one for each: (pairs, rows of a pair, c_in * k_w)."""
    (_, columns), (rows, rank) = adapter_shapes(adapter.weight_shape, adapter.rank, adapter.pairs)
    scaled, pairs = _scaled(tape, factors), adapter.pairs
    if pairs == 1:
        return tape.op("MatMul", scaled, factors.a, shape=(rows, columns))
    apart_a, apart_b = (pairs, rank, columns), (pairs, rows // pairs, rank)
    a = tape.op("Reshape", factors.a, tape.ints(*apart_a), shape=apart_a)
    b = tape.op("Reshape", scaled, tape.ints(*apart_b), shape=apart_b)
    return tape.op("MatMul", b, a, shape=(pairs, rows // pairs, columns))


_FORMS = {"branch": _add_branch, "weight": _add_to_weight}
